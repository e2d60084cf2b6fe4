"""What a scheme may say of itself, and what follows where it says nothing."""

import copy

import pytest
import torch
from torch import nn

import hijack
from hijack.errors import SchemeError, ShapeError
from hijack.options import Option
from hijack.quantized import QuantizationConfig, QuantizedTensor
from schemes.blockwise_fp8 import BlockwiseFP8


class Halves(hijack.Scheme):
    """The smallest scheme with an option."""

    name = "halves"

    def quantize(self, weight, *, level=2.0):
        """Divide."""
        return (weight / level).half(), {"unit": torch.full((1,), level)}

    def dequantize(self, qdata, params, dtype):
        """Multiply."""
        return (qdata.float() * params["unit"]).to(dtype)


# -- bound forwards --------------------------------------------------------------------

calls = []


def rounded_input(module, input, weight, bias):
    """Quantizes its input, as no default does, and counts its calls."""
    if not torch.compiler.is_compiling():
        calls.append((module, type(weight)))
    x = (input * 4).round() / 4
    return nn.functional.linear(x, weight.dense(input.dtype), bias)


class Rounding(Halves):
    """A scheme whose forward computes something else than its `dequantize`."""

    name = "rounding"

    def bind_forward(self, module):
        """The same function for all Linears."""
        return rounded_input if isinstance(module, nn.Linear) else None


@pytest.fixture
def rounding():
    """A quantized layer, an input, and what its own forward makes of it."""
    calls.clear()
    layer = hijack.wrap_module(nn.Linear(8, 4), Rounding()).requires_grad_(False)
    x = torch.randn(3, 8)
    dense = hijack.unwrap(copy.deepcopy(layer))
    wanted = nn.functional.linear((x * 4).round() / 4, dense.weight, dense.bias)
    assert not torch.allclose(wanted, dense(x))
    return layer, x, wanted


def test_a_bound_forward_gets_module_input_weight_and_bias(rounding):
    """Once for each call, with the weight as it is."""
    layer, x, wanted = rounding
    for count in (1, 2):
        torch.testing.assert_close(layer(x), wanted)
        assert calls == [(layer, QuantizedTensor)] * count


def test_a_bound_forward_runs_whatever_became_of_the_module(rounding, tmp_path):
    """Copied, compiled, exported, called functionally, loaded: never the default."""
    layer, x, wanted = rounding
    path = tmp_path / "model.safetensors"
    hijack.save(layer, path)
    registry = hijack.create_registry()
    registry.register(layer.weight.scheme)
    loaded = nn.Linear(8, 4)
    hijack.load(loaded, path, registry=registry)
    model = nn.Sequential(copy.deepcopy(layer), nn.Identity())
    weight = {"weight": layer.weight}
    results = [
        copy.deepcopy(layer)(x),
        loaded(x),
        torch.compile(model, fullgraph=True)(x),
        torch.export.export(layer, (x,)).module()(x),
        torch.func.functional_call(layer, weight, (x,)),
        torch.func.vmap(layer)(x),
    ]
    for result in results:
        torch.testing.assert_close(result, wanted)
    doubled = {"weight": layer.weight.replace(params={"unit": torch.full((1,), 4.0)})}
    other = torch.func.functional_call(layer, doubled, (x,))
    torch.testing.assert_close(other - layer.bias, 2 * (wanted - layer.bias))


def test_modules_that_share_a_forward_share_a_class(rounding):
    """So that one compiled graph serves them all."""
    layer, _, _ = rounding
    other = hijack.wrap_module(nn.Linear(2, 2), layer.weight.scheme)
    assert type(other) is type(layer)
    assert type(layer).__name__ == "Linear"


# -- quantizing again ------------------------------------------------------------------


def test_a_weight_is_quantized_again_as_it_was():
    """The default has the layer's options, and rounds as `quantize` does."""
    layer = hijack.wrap_module(nn.Linear(8, 4), Halves(), level=4.0)
    changed = torch.randn(4, 8)
    for seed in (0, 7):
        again = layer.weight.requantized(changed, seed=seed)
        assert torch.equal(again.qdata, (changed / 4).half())
        assert again.options == {"level": 4.0}
        assert again.dtype == layer.weight.dtype


def test_a_seed_asks_for_stochastic_rounding_where_a_scheme_has_it():
    """By a declared method; the options themselves stay."""
    options = {"block_size": (2, 4), "dtype": torch.float8_e5m2}
    layer = hijack.wrap_module(nn.Linear(64, 32), BlockwiseFP8(), **options)
    changed = torch.randn(32, 64)

    def bits(seed):
        again = layer.weight.requantized(changed, seed=seed)
        assert again.options == options
        assert again.qdata.dtype == torch.float8_e5m2
        assert again.params["weight_scale"].shape == (16, 16)
        return again.qdata.view(torch.uint8)

    plain, _ = BlockwiseFP8().quantize(changed, **options)
    assert torch.equal(bits(0), plain.view(torch.uint8))
    assert torch.equal(bits(1), bits(1))
    assert not torch.equal(bits(1), bits(2))


# -- shapes ----------------------------------------------------------------------------


class Chosen(Halves):
    """Decodes to what a test chooses."""

    name = "chosen"

    def __init__(self, shape):
        self.shape = shape

    def dequantize(self, qdata, params, dtype):
        """Numbers from 0 on."""
        numbers = torch.arange(torch.Size(self.shape).numel(), dtype=dtype)
        return numbers.reshape(self.shape)


def weight_of(scheme, shape):
    """A weight of that shape and scheme."""
    config = QuantizationConfig.of(scheme)
    return QuantizedTensor(torch.zeros(1), {}, config, shape)


@pytest.mark.parametrize("shape", [(3, 5), (15,), (4, 6), (3, 8), (3, 5, 1)])
def test_padded_and_flat_weights_are_brought_into_shape(shape):
    """The first rows and columns are the weight; the rest is padding."""
    dense = weight_of(Chosen(shape), (3, 5)).dense()
    numbers = torch.arange(float(torch.Size(shape).numel())).reshape(shape)
    if len(shape) == 2:
        numbers = numbers[:3, :5]
    assert torch.equal(dense, numbers.reshape(3, 5))


@pytest.mark.parametrize("shape", [(2, 5), (3, 4), (14,), (16,), (1, 3, 6)])
def test_a_weight_that_lacks_elements_is_refused(shape):
    """Nothing is made up."""
    with pytest.raises(ShapeError, match=r"expected \(3, 5\) or one padded from it"):
        weight_of(Chosen(shape), (3, 5)).dense()


def test_the_dense_shape_is_found_without_data_where_it_can_be():
    """Else with the data that is there."""
    seen = []

    class Looking(Halves):
        name = "looking"

        def dequantize(self, qdata, params, dtype):
            seen.append(qdata.device.type)
            assert float(params["unit"]) == 2
            return super().dequantize(qdata, params, dtype)

    qdata, params = torch.zeros(4, 6).half(), {"unit": torch.full((1,), 2.0)}
    assert Halves().dense_shape(qdata, params) == (4, 6)
    assert Looking().dense_shape(qdata, params) == (4, 6)
    assert seen == ["meta", "cpu"]
    with pytest.raises(RuntimeError):
        Looking().dense_shape(qdata.to("meta"), {"unit": params["unit"].to("meta")})


# -- options ---------------------------------------------------------------------------


def test_options_are_read_off_quantize():
    """Names and defaults; a type only where the default tells it for sure."""

    class Many(Halves):
        name = "many"

        def quantize(self, weight, size=3, *, on=True, dtype=torch.int8, word="x"):
            return super().quantize(weight)

    found = {o.name: (o.type, o.default) for o in Many().declared_options()}
    assert found == {
        "size": ("any", 3),
        "on": ("bool", True),
        "dtype": ("dtype", torch.int8),
        "word": ("any", "x"),
    }


def test_declared_options_outrank_the_signature():
    """They are what is checked, and what messages name."""

    class Declared(Halves):
        name = "declared"
        options = (Option("level", "float", 2.0, minimum=1.0, maximum=8.0),)

    for level in (1, 8.0, 2.0):
        Declared().check_options({"level": level})
    for level in (0.5, 9, "2", True, None):
        with pytest.raises(
            SchemeError, match=r"declared: option level: got .* from 1 t"
        ):
            Declared().check_options({"level": level})


def test_a_scheme_that_takes_any_option_refuses_none():
    """``**options`` are the scheme's own business."""

    class Any(Halves):
        name = "any"

        def quantize(self, weight, **options):
            return super().quantize(weight)

    Any().check_options({"whatever": 3})


# -- sameness --------------------------------------------------------------------------


def test_schemes_are_alike_that_decode_alike():
    """Class, name and attributes count; where they come from does not."""
    one, two = Halves(), Halves()
    one.origin = "somewhere"
    assert one.is_like(two)
    assert not one.is_like(Rounding())
    two.level = 3
    assert not one.is_like(two)
    one.table, two.table = torch.ones(2), torch.ones(2)
    two.level = one.level = 3
    assert not one.is_like(two)  # nobody compares tables
    assert one.is_like(one)
