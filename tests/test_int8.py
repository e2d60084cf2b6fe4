"""INT8: what it stores, how exact it is, what it refuses, and what it computes."""

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

import hijack
from hijack.errors import (
    AmbiguousError,
    CheckpointError,
    DTypeError,
    HijackError,
    NonFiniteError,
    SchemeError,
    ShapeError,
)
from hijack.formats import matching
from hijack.quantized import QuantizationConfig, QuantizedTensor
from hijack.safetensors_io.header import Header
from hijack.testing import SchemeConformance, realistic_weight, sqnr_db
from schemes import _rotation as rotation
from schemes._kernels import int_mm
from schemes._kernels.block_scaled import BlockScaled
from schemes.int8 import Int8

SCHEME = Int8()
GOLDEN = Path(__file__).parent / "golden"
F32 = torch.float32


def int8_linear(x, codes, scale, group, bias):
    """The product in integers, of a weight with a scale for each row or one for all."""
    n, k = codes.shape
    tokens = x.reshape(-1, k)
    if group:
        tokens = rotation.rotate_inputs(tokens, group)
    size = (1, k) if len(scale) == n else (n, k)
    output = int_mm.linear(tokens, BlockScaled(codes, scale, size), bias)
    return output.view(*x.shape[:-1], n)


class TestInt8(SchemeConformance):
    """Every row has a scale."""

    min_sqnr_db = 30.0
    option_sets = (
        {"rotation": 16},
        {"rotation": 4, "block_size": "tensor"},
        {"scale_search": 8},
        {"scale_dtype": torch.bfloat16},
    )

    @pytest.fixture
    def scheme(self):
        """The scheme."""
        return Int8()


@pytest.mark.thorough  # the same tests with other options, or of a like scheme
class TestW8A8(TestInt8):
    """Inputs are quantized too, so outputs of Linears have an error as well."""

    options = {"quantized_inputs": True, "rotation": 4}
    min_forward_db = 30.0


# -- comfy-kitchen ---------------------------------------------------------------------


@pytest.fixture
def kitchen():
    """comfy-kitchen's own numerics, in torch alone."""
    return pytest.importorskip("comfy_kitchen.backends.eager.quantization")


SHAPES = [(64, 256), (33, 512), (1, 256), (128, 1024)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("outliers", [False, True])
def test_rows_and_one_scale_are_comfy_kitchens(kitchen, shape, outliers):
    """Codes, scales and decoded weights are the same bit for bit."""
    weight = realistic_weight(shape, outliers=outliers)
    rows = kitchen.quantize_int8_rowwise(weight)
    whole = kitchen.quantize_int8_tensorwise(weight)
    for (codes, scale), size in ((rows, "row"), (whole, "tensor")):
        qdata, params = SCHEME.quantize(weight, block_size=size)
        assert torch.equal(qdata, codes)
        assert torch.equal(params["weight_scale"].view(scale.shape), scale)
        for number, dtype in enumerate((F32, torch.float16, torch.bfloat16)):
            theirs = kitchen.dequantize_int8_simple_dtype(codes, scale, number)
            assert torch.equal(SCHEME.dequantize(qdata, params, dtype), theirs)


def exact(shape, group):
    """A weight whose rotation has no rounding, in whatever order a processor adds."""
    codes = torch.randint(-127, 128, shape).float()
    codes[:, 3] = 127
    rows = 2.0 ** -torch.arange(float(shape[0])).remainder(9)[:, None]
    return rotation.rotate(codes * rows, group)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [16, 64, 256])
def test_a_rotated_weight_is_comfy_kitchens(kitchen, shape, group):
    """ConvRot: the same codes, scales and decoded weights, bit for bit."""
    weight = exact(shape, group)
    codes, scale = kitchen.quantize_int8_convrot_weight(weight, group)
    qdata, params = SCHEME.quantize(weight, rotation=group)
    assert params["weight_rotation"].shape == (group, 0)
    assert torch.equal(qdata, codes)
    assert torch.equal(params["weight_scale"], scale)
    theirs = kitchen.dequantize_int8_convrot_weight(codes, scale, group)
    assert torch.equal(SCHEME.dequantize(qdata, params, F32), theirs)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("group", [16, 64, 256])
def test_any_rotated_weight_is_comfy_kitchens_but_for_the_order_of_sums(
    kitchen, shape, group
):
    """Where sums are rounded, codes on the edge may be their neighbours."""
    weight = realistic_weight(shape, outliers=True)
    codes, scale = kitchen.quantize_int8_convrot_weight(weight, group)
    qdata, params = SCHEME.quantize(weight, rotation=group)
    assert torch.allclose(params["weight_scale"], scale, rtol=1e-5)
    assert (qdata.int() - codes).abs().max() <= 1
    assert (qdata != codes).float().mean() < 0.01
    theirs = kitchen.dequantize_int8_convrot_weight(codes, scale, group)
    same = SCHEME.dequantize(codes, {**params, "weight_scale": scale}, F32)
    assert torch.allclose(same, theirs, atol=1e-5 * float(theirs.abs().max()))


@pytest.mark.parametrize("group", [0, 64, 256])
@pytest.mark.parametrize("size", ["row", "tensor"])
def test_products_of_float32_are_comfy_kitchens(kitchen, group, size):
    """W8A8 gives the same numbers, bit for bit, with a bias and without."""
    qdata, params = SCHEME.quantize(realistic_weight((48, 512)), block_size=size)
    x = torch.randint(-99, 100, (2, 5, 512)).float()  # whose rotation is exact
    scale = params["weight_scale"]
    for bias in (None, torch.randn(48)):
        theirs = kitchen.int8_linear(
            x, qdata, scale, bias, F32, bool(group), group or 256
        )
        assert torch.equal(int8_linear(x, qdata, scale, group, bias), theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_of_16_bits_are_nearer_to_the_truth_than_comfy_kitchens(
    kitchen, dtype
):
    """A code of the input differs by one at most: its quotient is rounded once here."""
    weight = realistic_weight((64, 512))
    qdata, params = SCHEME.quantize(weight)
    scale = params["weight_scale"]
    x = torch.randn(400, 512, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = int8_linear(x, qdata, scale, 0, None).double()
    theirs = kitchen.int8_linear(x, qdata, scale, None, dtype).double()
    token = x.abs().amax(1, keepdim=True).double() / 127
    steps = (token * (qdata.double() * scale).abs().sum(1)) * (1 + 2**-6)
    assert ((ours - theirs).abs() <= steps).all()
    exact = x.double() @ (qdata.double() * scale).t()
    assert (ours - exact).norm() <= (theirs - exact).norm() * 1.01


# -- numerics --------------------------------------------------------------------------


def hadamard(group):
    """The regular Hadamard matrix, by the digits of its indexes to the base of 4."""
    index, matrix = torch.arange(group), torch.ones(group, group)
    size = 1
    while size < group:
        digits = index // size % 4
        matrix[digits[:, None] + digits == 3] *= -1
        size *= 4
    return matrix / math.isqrt(group)


@pytest.mark.parametrize("group", rotation.ROTATIONS[1:-1])
def test_the_matrix_is_regular_and_undoes_itself(group):
    """All rows have the same sum; it equals the formula by digits."""
    matrix = rotation.rotate(torch.eye(group), group)
    assert torch.equal(matrix, hadamard(group))
    assert torch.equal(matrix @ matrix, torch.eye(group))
    assert (matrix.sum(0) == 1).all()


def test_codes_are_within_half_a_step():
    """Every weight comes back to half the scale, at all block sizes."""
    weight = realistic_weight((33, 70), outliers=True)
    for size in ("row", "tensor", (1, 32), (16, 16), (33, 7)):
        qdata, params = SCHEME.quantize(weight, block_size=size)
        back = SCHEME.dequantize(qdata, params, F32)
        rows, cols = SCHEME.block_size(qdata, params)
        step = torch.kron(params["weight_scale"], torch.ones(rows, cols))[:33, :70]
        assert ((back - weight).abs() <= step * 0.5001).all()


def test_a_rotation_spreads_outliers():
    """The error of a weight with few large columns becomes several dB less."""
    weight = torch.randn(64, 256)
    weight[:, 7] *= 50
    plain, turned = (
        SCHEME.dequantize(*SCHEME.quantize(weight, rotation=group), F32)
        for group in (0, 256)
    )
    assert sqnr_db(weight, turned) > sqnr_db(weight, plain) + 3


@pytest.mark.parametrize(("size", "gain"), [("row", 0.02), ("tensor", 1.0)])
def test_a_search_of_scales_has_less_error(size, gain):
    """In dB; most for one scale for a weight with outliers, and never more error."""
    weight = realistic_weight((128, 512), outliers=True)
    plain, better = (
        SCHEME.dequantize(
            *SCHEME.quantize(weight, block_size=size, scale_search=count), F32
        )
        for count in (0, 32)
    )
    assert sqnr_db(weight, better) > sqnr_db(weight, plain) + gain
    less = (better - weight).square().sum(1) <= (plain - weight).square().sum(1) * 1.01
    assert size == "tensor" or less.all()


def test_stochastic_rounding_has_no_bias_and_follows_its_seed():
    """Codes are neighbours, their mean is the quotient, and seeds repeat."""
    weight = realistic_weight((16, 64))
    _, params = SCHEME.quantize(weight)
    ratio = weight / params["weight_scale"]
    total = torch.zeros_like(weight)
    for seed in range(200):
        codes, _ = SCHEME.quantize(weight, stochastic=True, seed=seed)
        assert ((codes - ratio).abs() <= 1 + 1e-5).all()
        total += codes
    assert (total / 200 - ratio).abs().max() < 0.2
    first, second, third = (
        SCHEME.quantize(weight, stochastic=True, seed=seed)[0] for seed in (1, 1, 2)
    )
    assert torch.equal(first, second)
    assert not torch.equal(first, third)


def test_meta_tensors_give_meta_tensors():
    """Shapes and dtypes are known without data, rotation and short blocks included."""
    qdata, params = SCHEME.create_params(
        (33, 96), torch.bfloat16, "meta", block_size=(16, 64), rotation=16
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in params.items()}
    assert (qdata.dtype, qdata.device.type) == (torch.int8, "meta")
    assert shapes == {
        "weight_scale": (3, 2),
        "weight_block_size": (16, 64, 0),
        "weight_rotation": (16, 0),
    }
    told = SCHEME.options_of(qdata, params)
    assert told == {"block_size": (16, 64), "rotation": 16, "scale_dtype": F32}


def test_zeros_and_the_least_numbers_are_kept():
    """A row of zeros has comfy-kitchen's least scale."""
    weight = torch.zeros(2, 8)
    weight[1] = 1e-38
    qdata, params = SCHEME.quantize(weight)
    assert torch.equal(params["weight_scale"], torch.full((2, 1), 1e-30))
    assert not SCHEME.dequantize(qdata, params, F32)[0].any()


# -- what it refuses -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"rotation": 8}, "rotation: got 8 for 64 columns, expected 0 or a power of 4"),
        ({"rotation": 256}, "rotation: got 256 for 64 columns"),
        ({"block_size": 0}, r"block_size: got 0, expected \(rows, cols\)"),
        ({"scale_dtype": torch.float64}, "option scale_dtype: got torch.float64"),
        ({"scale_search": 1000}, "option scale_search: got 1000"),
    ],
)
def test_wrong_options_are_refused(options, match):
    """Messages say what was got and what is expected."""
    with pytest.raises(SchemeError, match=match):
        SCHEME.quantize(torch.ones(4, 64), **options)


def test_weights_that_cannot_be_quantized_are_refused():
    """Not finite, or quantized already."""
    weight = torch.ones(4, 64)
    weight[0, 0], weight[1, 1] = math.nan, math.inf
    with pytest.raises(NonFiniteError, match=r"\(4, 64\) holds 1 NaN and 1 infinite"):
        SCHEME.quantize(weight)
    with pytest.raises(DTypeError, match="expected a dense floating dtype"):
        SCHEME.quantize(torch.ones(4, 64, dtype=torch.int8))


def test_a_width_that_does_not_divide_is_declined():
    """Such layers stay dense, with the reason."""
    assert SCHEME.declines((4, 100), rotation=0) is None
    assert "its 100 columns" in SCHEME.declines((4, 100), rotation=256)


def test_validate_names_the_layer():
    """What a file got wrong is said with the layer it is in."""
    qdata, params = SCHEME.quantize(torch.randn(4, 64), rotation=16)
    SCHEME.validate(qdata, params, "x")
    scale = params["weight_scale"]

    def turned(*shape):
        return {**params, "weight_rotation": torch.empty(shape, dtype=torch.uint8)}

    cases = [
        (DTypeError, "weight is torch.uint8", qdata.view(torch.uint8), params),
        (CheckpointError, "weight_scale is missing", qdata, {}),
        (DTypeError, "weight_scale is", qdata, {"weight_scale": scale.int()}),
        (ShapeError, "weight_scale: is", qdata, {"weight_scale": scale[:3]}),
        (
            NonFiniteError,
            "weight_scale holds NaN",
            qdata,
            {"weight_scale": scale * math.nan},
        ),
        (CheckpointError, "weight_scale holds -", qdata, {"weight_scale": -scale}),
        (CheckpointError, "weight_scale holds 0", qdata, {"weight_scale": scale * 0}),
        (ShapeError, "rotation: got 8", qdata, turned(8, 0)),
        (ShapeError, "rotation: got 256", qdata, turned(256, 0)),
        (ShapeError, r"weight_rotation: has shape \(16,\)", qdata, turned(16)),
    ]
    for error, match, codes, wrong in cases:
        with pytest.raises(error, match=f"^x.y: {match}"):
            SCHEME.validate(codes, wrong, "x.y")


# -- parts and other blocks ------------------------------------------------------------


@pytest.mark.parametrize("group", [0, 16])
def test_a_part_decodes_to_the_part(group):
    """Rows of any number, and columns in whole groups; others have no answer."""
    qdata, params = SCHEME.quantize(torch.randn(12, 64), rotation=group)
    dense = SCHEME.dequantize(qdata, params, F32)
    part = (slice(3, 8), slice(16, 48))
    some = SCHEME.params_of_part(params, (12, 64), part)
    back = SCHEME.dequantize(qdata[part].contiguous(), some, F32)
    assert torch.allclose(back, dense[part], atol=1e-6)
    odd = SCHEME.params_of_part(params, (12, 64), (slice(0, 12), slice(8, 48)))
    assert (odd is None) == bool(group)


def test_other_blocks_keep_the_rotation():
    """One scale becomes rows; rows with scales of their own do not become one."""
    qdata, params = SCHEME.quantize(torch.randn(4, 64), block_size="tensor", rotation=4)
    rows = SCHEME.reblock(qdata, params, (1, 64))
    assert torch.equal(rows["weight_rotation"], params["weight_rotation"])
    assert torch.equal(rows["weight_scale"], params["weight_scale"].expand(4, 1))
    qdata, params = SCHEME.quantize(torch.randn(4, 64))
    assert SCHEME.reblock(qdata, params, (4, 64)) is None


def test_a_changed_weight_is_quantized_as_before():
    """Blocks, rotation and dtype of the scales stay; a seed rounds at random."""
    weight = torch.randn(8, 64)
    options = {"block_size": (2, 32), "rotation": 16, "scale_dtype": torch.bfloat16}
    made = SCHEME.quantize(weight, **options)
    old = QuantizedTensor(*made, QuantizationConfig.of(SCHEME))
    qdata, params = SCHEME.requantize(weight, old)
    assert torch.equal(qdata, made[0])
    assert all(torch.equal(params[name], made[1][name]) for name in made[1])
    assert not torch.equal(SCHEME.requantize(weight, old, seed=3)[0], qdata)


# -- forwards --------------------------------------------------------------------------


def wrapped(n, k, **options):
    """A quantized Linear and what its decoded weight gives."""
    layer = hijack.wrap_module(nn.Linear(k, n), SCHEME, **options)

    def dense(x):
        return F.linear(x, layer.weight.dense(x.dtype), layer.bias.to(x.dtype))

    return layer, dense


@pytest.mark.parametrize("block", ["row", "tensor", (8, 64)])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16])
def test_quantized_inputs_are_near_the_decoded_weight(block, dtype):
    """A product in integers has the error of eight bits, whatever rows share."""
    layer, dense = wrapped(33, 64, block_size=block, rotation=16, quantized_inputs=True)
    x = torch.randn(3, 7, 64).to(dtype)
    got, expected = layer.to(dtype)(x), dense(x)
    assert (got.dtype, got.shape) == (dtype, expected.shape)
    assert 30 < sqnr_db(expected.float(), got.float()) < 60


def test_inputs_are_not_quantized_unless_asked():
    """By default the output is that of the decoded weight."""
    layer, dense = wrapped(16, 64)
    x = torch.randn(3, 64)
    assert torch.allclose(layer(x), dense(x), atol=1e-5)


@pytest.mark.parametrize(
    "why", ["gradients", "blocks within a row", "float64", "no token"]
)
def test_the_weight_is_decoded_where_integers_cannot_do_it(why):
    """The output is that of the decoded weight then, and gradients are right."""
    block = (1, 32) if why == "blocks within a row" else "row"
    layer, dense = wrapped(16, 64, block_size=block, quantized_inputs=True)
    x = torch.randn(0 if why == "no token" else 5, 64)
    if why == "float64":
        x = x.double()
    x.requires_grad_(why == "gradients")
    assert torch.allclose(layer(x), dense(x), atol=1e-5)
    if why == "gradients":
        layer(x).sum().backward()
        assert torch.allclose(x.grad[0], layer.weight.dense().sum(0), atol=1e-5)
        with torch.no_grad():
            assert not torch.allclose(layer(x), dense(x), atol=1e-5)


def test_derivatives_of_other_kinds_are_those_of_the_decoded_weight():
    """Rounding would make them zero without a word."""
    layer, _ = wrapped(16, 64, quantized_inputs=True)
    x, tangent = torch.randn(5, 64), torch.randn(5, 64)
    expected = F.linear(tangent, layer.weight.dense())
    _, forward = torch.func.jvp(layer, (x,), (tangent,))
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(x, tangent)
        older = torch.autograd.forward_ad.unpack_dual(layer(dual)).tangent
    assert torch.allclose(forward, expected, atol=1e-5)
    assert torch.allclose(older, expected, atol=1e-5)


def test_autocast_multiplies_in_integers_too():
    """The output has autocast's dtype, as that of a dense layer."""
    layer, dense = wrapped(16, 64, rotation=16, quantized_inputs=True)
    x = torch.randn(5, 64)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        got = layer(x)
        assert got.dtype == torch.bfloat16
        inside = int8_linear(
            x.bfloat16(),
            layer.weight.qdata,
            layer.weight.params["weight_scale"],
            16,
            layer.bias,
        )
        assert torch.allclose(got, inside, atol=0.05)
        assert sqnr_db(dense(x).float(), got.float()) > 30


def test_a_large_output_is_made_in_parts(monkeypatch):
    """It is the same; float32 would take more memory than the output."""
    qdata, params = SCHEME.quantize(torch.randn(24, 64), rotation=16)
    scale, x, bias = params["weight_scale"], torch.randn(3, 7, 64), torch.randn(24)
    whole = int8_linear(x, qdata, scale, 16, bias)
    monkeypatch.setattr(int_mm, "OUTPUT_CHUNK", 24 * 4)
    assert torch.allclose(int8_linear(x, qdata, scale, 16, bias), whole, atol=1e-6)


def test_rows_of_a_rotated_table_are_decoded_alone():
    """An embedding gives the rows of the decoded weight."""
    table = nn.Embedding(50, 64)
    layer = hijack.wrap_module(table, SCHEME, rotation=16, block_size=(8, 64))
    index = torch.tensor([[3, 49], [3, 0]])
    assert torch.allclose(layer(index), layer.weight.dense()[index], atol=1e-6)


# -- files -----------------------------------------------------------------------------


def marker(**entries):
    """A layer's marker as ComfyUI stores it."""
    return torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8)


def layer_of(shape=(8, 256), scale=(8, 1), mark=None, **others):
    """A layer of integers, with a marker and other tensors."""
    tensors = {
        "weight": torch.arange(math.prod(shape)).remainder(251).sub(125).char(),
        "weight_scale": torch.rand(scale) + 0.1,
        **others,
    }
    tensors["weight"] = tensors["weight"].view(shape)
    if mark is not None:
        tensors["comfy_quant"] = marker(**mark) if isinstance(mark, dict) else mark
    return {f"a.{name}": tensor for name, tensor in tensors.items()}


def identified(tensors, metadata=None, **more):
    return hijack.identify(Header.from_state_dict(tensors, metadata), **more)


def decoded(claim, tensors):
    made = matching.decode(SCHEME, claim, tensors)
    options = matching.options_of(claim, SCHEME, made)
    return SCHEME.dequantize(*made, F32), options


CONVROT = {"format": "int8_tensorwise", "convrot": True}
#: marker, shape of the scale, block size, rotation, quantized inputs
MARKED = {
    "one scale": ({"format": "int8_tensorwise"}, (), (8, 256), 0, True),
    "one element": ({"format": "int8_tensorwise"}, (1,), (8, 256), 0, True),
    "rows": ({"format": "int8_tensorwise"}, (8,), (1, 256), 0, True),
    "rows of two": ({"format": "int8_tensorwise"}, (8, 1), (1, 256), 0, True),
    "rotated": (CONVROT, (8, 1), (1, 256), 256, True),
    "groups": ({**CONVROT, "convrot_groupsize": 64}, (8, 1), (1, 256), 64, True),
    "nested": (
        {
            "format": "int8_tensorwise",
            "params": {"convrot": True, "convrot_groupsize": 16},
        },
        (8, 1),
        (1, 256),
        16,
        True,
    ),
    "floats": (
        {**CONVROT, "full_precision_matrix_mult": True},
        (8, 1),
        (1, 256),
        256,
        False,
    ),
    "blocks": (
        {"format": "int8_blockwise", "group_size": 4},
        (2, 64),
        (4, 4),
        0,
        False,
    ),
}


@pytest.mark.parametrize("name", MARKED)
@pytest.mark.parametrize("apart", [True, False], ids=["tensor", "header"])
def test_comfyuis_markers_are_read(name, apart):
    """From a tensor or the header: blocks, rotation, and how the layer multiplies."""
    mark, scale, size, group, inputs = MARKED[name]
    tensors = layer_of(scale=scale, mark=mark if apart else None)
    table = {"_quantization_metadata": json.dumps({"layers": {"a": mark}})}
    claim = identified(tensors, None if apart else table).claims()["a"]
    assert claim.certainty is hijack.Certainty.MARKED
    assert (claim.dialect, claim.block_size, claim.unread) == ("comfy_quant", size, ())
    dense, options = decoded(claim, tensors)
    assert options["rotation"] == group
    assert bool(options.get("quantized_inputs")) == inputs
    grid = tensors["a.weight_scale"].view(8 // size[0], 256 // size[1])
    expected = tensors["a.weight"].double() * torch.kron(grid, torch.ones(size))
    if group:
        expected = expected.view(8, -1, group) @ hadamard(group).double()
    assert torch.allclose(dense.double(), expected.view(8, 256), atol=1e-4)


@pytest.mark.parametrize("scale", [(3,), (3, 10), (3, 10, 1)])
def test_banks_of_experts_are_read(scale):
    """A scale for each expert, or for each row of each."""
    mark = {"format": "int8_tensorwise", "num_experts": 3}
    tensors = layer_of((3, 10, 24), scale, mark)
    claim = identified(tensors).claims()["a"]
    assert (claim.contradiction, claim.unread) == ("", ())
    dense, _ = decoded(claim, tensors)
    factor = tensors["a.weight_scale"].reshape(3, -1, 1)
    assert torch.equal(dense, tensors["a.weight"].float() * factor)


@pytest.mark.parametrize(
    ("mark", "group"),
    [
        ({"convrot": True, "per_row": True}, 256),
        ({"convrot": True, "convrot_groupsize": 64}, 64),
        ({"convrot": False, "per_row": True}, 0),
        ({"per_row": True}, 0),
    ],
)
def test_a_marker_without_format_is_certain_if_it_says_of_the_rotation(mark, group):
    """As INT8-Fast and comfy-quants save; the report says what is missing."""
    found = identified(layer_of(mark=mark))
    claim = found.claims()["a"]
    assert decoded(claim, layer_of(mark=mark))[1]["rotation"] == group
    assert claim.contradiction == "a: comfy_quant names no format"
    assert "wrong marker" in found.as_table()


@pytest.mark.parametrize(
    "mark", [None, {}, torch.zeros(20, dtype=torch.uint8), {"format": "nvfp4"}]
)
def test_what_nothing_tells_of_is_asked_for(mark):
    """Without a marker that says whether the weight is rotated, the user has to."""
    tensors = layer_of(mark=mark)
    with pytest.raises(AmbiguousError, match=r"rotation=0 or .*rotation=256"):
        identified(tensors).check()
    for group in (0, 256, 64, 16):
        claim = identified(tensors, assume=[f"rotation={group}"]).claims()["a"]
        assert decoded(claim, tensors)[1]["rotation"] == group
    narrow = identified(layer_of((8, 100))).ambiguous["a"]
    assert [claim.options for claim in narrow] == [{"rotation": "0"}]


@pytest.mark.parametrize(
    ("mark", "match"),
    [
        ({**CONVROT, "convrot_groupsize": 100}, "rotation: got 100"),
        ({**CONVROT, "convrot_groupsize": "many"}, "rotation: got 'many'"),
        ({**CONVROT, "convrot_groupsize": None}, "rotation: got None"),
        ({**CONVROT, "convrot_groupsize": -4}, "rotation: got -4"),
        ({**CONVROT, "convrot_groupsize": 1024}, "rotation: got 1024 for 256 columns"),
    ],
)
def test_a_malformed_rotation_is_an_error_by_name(mark, match):
    """It names the layer and what was got; nothing is decoded."""
    model = nn.Sequential()
    model.add_module("a", nn.Linear(256, 8, bias=False))
    with pytest.raises(HijackError, match=rf"a: .*{match}"):
        hijack.load(model, layer_of(mark=mark))


@pytest.mark.parametrize(
    ("mark", "scale", "size"),
    [
        ({"format": "int8_tensorwise"}, (2, 64), (4, 4)),
        ({"format": "int8_blockwise", "group_size": 128}, (2, 64), (4, 4)),
        ({"format": "int8_blockwise", "group_size": 4}, (8, 1), (1, 256)),
    ],
)
def test_shapes_win_over_a_marker_that_does_not_match(mark, scale, size):
    """The mismatch is said."""
    found = identified(layer_of(scale=scale, mark=mark))
    claim = found.claims()["a"]
    assert claim.block_size == size
    assert claim.certainty is hijack.Certainty.UNIQUE
    assert "is declared to have blocks" in claim.contradiction


@pytest.mark.parametrize("shape", [(), (0,), (8, 0), (5,)])
@pytest.mark.parametrize("mark", [None, *(case[0] for case in MARKED.values())])
def test_weights_of_odd_shapes_break_nothing(shape, mark, caplog):
    """A file may say anything; what is no weight is claimed by nobody, or refused."""
    tensors = {
        "a.weight": torch.ones(shape).char(),
        "a.weight_scale": torch.ones(shape[:1]),
    }
    if mark is not None:
        tensors["a.comfy_quant"] = marker(**mark, num_experts=3)
    found = identified(tensors)
    assert not caplog.records
    assert 0 not in shape or found.layers == {}


@pytest.mark.parametrize(
    "others",
    [
        {"weight_zero_point": torch.zeros(8, 1)},
        {"weight_offset": torch.zeros(8, 1)},
        {"weight_g_idx": torch.zeros(256, dtype=torch.int32)},
    ],
)
def test_what_else_a_weight_is_made_of_is_not_ignored(others):
    """Nobody claims it, and loading is refused by name."""
    found = identified(layer_of(**others))
    assert found.layers == {}
    with pytest.raises(CheckpointError, match="a: is in the format int8 of another"):
        found.check()


@pytest.mark.parametrize(
    ("names", "zeros", "match"),
    [
        (
            ("_weight_qdata", "_weight_scale", "_weight_zero_point"),
            torch.zeros(8, 1, dtype=torch.int8),
            "a: zero_point is not zero",
        ),
        (
            ("weight", "SCB", "weight_format"),
            torch.zeros((), dtype=torch.uint8),
            "a: weight_format is not zero",
        ),
    ],
    ids=["torchao", "bitsandbytes"],
)
def test_zeros_that_are_none_are_refused(names, zeros, match):
    """They say that the weight is more than codes times scales."""
    weight, scale, extra = (f"a.{name}" for name in names)
    scales = torch.rand(8, 1) if "SCB" not in scale else torch.rand(8)
    tensors = {weight: torch.ones(8, 16).char(), scale: scales, extra: zeros}
    claim = identified(tensors).claims()["a"]
    matching.decode(SCHEME, claim, tensors)
    with pytest.raises(CheckpointError, match=match):
        matching.decode(SCHEME, claim, {**tensors, extra: zeros + 1})


@pytest.mark.parametrize("option", ["use_hadamard", "use_codebook"])
def test_sdnqs_own_rotation_is_refused(option):
    """Its matrix is another one; the config names the format."""
    config = json.dumps({"quant_method": "sdnq", option: True})
    tensors = {"a.weight": torch.ones(8, 16).char(), "a.scale": torch.rand(8, 1)}
    found = identified(tensors, {"quantization_config": config})
    assert found.unsupported["a"].format == "SDNQ"
    assert identified(tensors).ambiguous["a"][0].dialect == "sdnq"


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rotation": 64},
        {"block_size": "tensor"},
        {"quantized_inputs": False, "rotation": 16},
    ],
)
def test_comfyuis_files_come_back(tmp_path, options):
    """What is written is marked, and read with the same options and numbers."""
    save_file({"a.weight": torch.randn(16, 64)}, tmp_path / "dense.safetensors")
    path = tmp_path / "int8.safetensors"
    hijack.quantize_file(
        tmp_path / "dense.safetensors",
        path,
        "int8",
        dialect="comfy_quant",
        include=["a"],
        **options,
    )
    tensors = load_file(path)
    told = json.loads(bytes(tensors["a.comfy_quant"].tolist()))
    assert told["format"] == "int8_tensorwise"
    assert told.get("convrot_groupsize", 0) == options.get("rotation", 0)
    full = options.get("quantized_inputs") is False
    assert bool(told.get("full_precision_matrix_mult")) == full
    claim = hijack.identify(path).claims()["a"]
    dense, found = decoded(claim, tensors)
    expected = SCHEME.quantize(load_file(tmp_path / "dense.safetensors")["a.weight"])
    if not options:
        assert torch.equal(dense, SCHEME.dequantize(*expected, F32))
    assert found["rotation"] == options.get("rotation", 0)
    assert found["quantized_inputs"] is not full


def test_modelopt_rotates_no_weight():
    """Its config names it; factors of columns are none of the scheme's."""
    config = {"quant_method": "modelopt", "quant_algo": "W8A8_SQ_PER_CHANNEL"}
    metadata = {"quantization_config": json.dumps(config)}
    claim = identified(layer_of(), metadata).claims()["a"]
    assert (claim.dialect, claim.block_size) == ("modelopt", (1, 256))
    assert claim.certainty is hijack.Certainty.MARKED
    assert not claim.options
    smooth = identified(layer_of(pre_quant_scale=torch.ones(256)), metadata)
    assert not smooth.layers
    assert not smooth.ambiguous
    with pytest.raises(CheckpointError, match="a: is in the format int8 of another"):
        smooth.check()


def packed_layer(rows=8, columns=16, shape=None):
    """Tensors of compressed-tensors' W8A16, and the codes that are packed in them."""
    codes = torch.arange(rows * columns).view(rows, columns) * 7 % 256 - 128
    words = (codes + 128).view(rows, -1, 4) << torch.tensor([0, 8, 16, 24])
    tensors = {
        "a.weight_packed": words.sum(2).to(torch.int32),
        "a.weight_scale": torch.full((rows, 1), 0.5),
        "a.weight_shape": torch.tensor(shape or [rows, columns]),
    }
    return tensors, codes


def packed_config(*bits, form="pack-quantized"):
    """Metadata with a group of rows for each number of bits."""
    groups = {}
    for number, each in enumerate(bits):
        weights = {"num_bits": each, "type": "int", "strategy": "channel"}
        groups[str(number)] = {"weights": weights, "format": form}
    config = {"quant_method": "compressed-tensors", "config_groups": groups}
    return {"quantization_config": json.dumps(config)}


def test_compressed_tensors_packs_four_columns_into_an_integer(tmp_path):
    """The first column is in the low bits, and 128 is added to each."""
    tensors, codes = packed_layer()
    path = tmp_path / "a.safetensors"
    save_file(tensors, path, packed_config(8))
    model = nn.ModuleDict({"a": nn.Linear(16, 8, bias=False)})
    hijack.load(model, path)
    hijack.unwrap(model)
    assert torch.equal(model["a"].weight, codes * 0.5)


@pytest.mark.parametrize(
    "metadata",
    [packed_config(4), packed_config(8, 4), packed_config(8, form="int-quantized")],
    ids=["4 bits", "also 4 bits", "not packed"],
)
def test_packed_integers_are_not_read_if_they_may_be_others(metadata):
    """Those of 4 bits may have the same shapes."""
    found = identified(packed_layer()[0], metadata)
    assert not found.layers
    assert found.unsupported["a"].format == "compressed-tensors packed"


def test_packed_columns_that_were_added_are_refused(tmp_path):
    """Only the data of a tensor tells them, which a header has not."""
    path = tmp_path / "a.safetensors"
    save_file(packed_layer(shape=[8, 14])[0], path, packed_config(8))
    model = nn.ModuleDict({"a": nn.Linear(16, 8, bias=False)})
    with pytest.raises(CheckpointError, match=r"a: weight_shape is \[8, 14\], exp"):
        hijack.load(model, path)


def test_compressed_tensors_groups_tell_of_inputs_where_they_agree():
    """Two groups with the same blocks differ in their layers' names alone."""
    rows = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    token = {**rows, "strategy": "token", "dynamic": True}

    def inputs_of(*groups):
        config = {"quant_method": "compressed-tensors"}
        config["config_groups"] = {
            str(number): {"weights": rows, "input_activations": inputs}
            for number, inputs in enumerate(groups)
        }
        metadata = {"quantization_config": json.dumps(config)}
        claim = identified(layer_of(), metadata).claims()["a"]
        assert (claim.dialect, claim.block_size) == ("compressed_tensors", (1, 256))
        return claim.options.get("quantized_inputs")

    assert inputs_of(token) == inputs_of(token, token) == "true"
    assert inputs_of(None) is inputs_of(token, None) is inputs_of(None, token) is None


@pytest.mark.parametrize("dialect", ["comfy_quant", "compressed_tensors", "hijack"])
@pytest.mark.parametrize(
    "name", ["bitsandbytes_int8", "sdnq_int8_matmul", "comfyui_int8", "torchao_int8"]
)
def test_files_of_others_are_converted_without_loss(tmp_path, name, dialect):
    """Every layer decodes to the same weight, or the file is refused by name."""
    source = GOLDEN / name / "model.safetensors"
    target = tmp_path / "out.safetensors"
    refused = {
        ("comfyui_int8", "compressed_tensors"): "turned: .* no place for weight_rotat",
        ("torchao_int8", "comfy_quant"): "group.0: its blocks of 1x32",
    }
    if (name, dialect) in refused:
        with pytest.raises(CheckpointError, match=refused[name, dialect]):
            hijack.convert_file(source, target, dialect)
        return
    hijack.convert_file(source, target, dialect)
    before, after = load_file(source), load_file(target)
    found = hijack.identify(target).claims()
    for layer, claim in hijack.identify(source).claims().items():
        assert found[layer].dialect == dialect
        old = matching.read_weight(SCHEME, claim, before)
        new = matching.read_weight(SCHEME, found[layer], after)
        assert torch.allclose(old.dense(F32), new.dense(F32), rtol=1e-6, atol=0)


def test_comfyui_takes_no_blocks(tmp_path):
    """Such a layer cannot be written in its format; the error says where else."""
    qdata, params = SCHEME.quantize(torch.randn(16, 64), block_size=(4, 4))
    dialect = matching.dialect_of(SCHEME, "comfy_quant")
    with pytest.raises(CheckpointError, match="cannot write blocks of 4x4"):
        dialect.encode(qdata, params, {})


def test_a_file_of_its_own_says_the_rotation(tmp_path):
    """An empty tensor carries it; identify shows the blocks."""
    model = nn.Sequential(
        hijack.wrap_module(
            nn.Linear(64, 40, bias=False), SCHEME, rotation=16, block_size=(16, 32)
        )
    )
    path = tmp_path / "own.safetensors"
    hijack.save(model, path, dialect="hijack")
    assert load_file(path)["0.weight_rotation"].shape == (16, 0)
    claim = hijack.identify(path).claims()["0"]
    assert (claim.dialect, claim.block_size) == ("hijack", (16, 32))
    fresh = nn.Sequential(nn.Linear(64, 40, bias=False))
    hijack.load(fresh, path)
    before, after = model[0].weight, fresh[0].weight
    assert torch.equal(before.qdata, after.qdata)
    assert torch.allclose(before.dense(), after.dense(), atol=1e-6)
