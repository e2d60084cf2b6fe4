"""Several schemes in one model and one file, packed formats, options and limits."""

import copy
import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import hijack
import schemes.blockwise_fp8
from hijack.errors import CheckpointError, HijackError, SchemeError
from hijack.modules import dense_weight
from hijack.options import Option
from tests.plugin_folder import python


class Nibbles(hijack.Scheme):
    """Two 4-bit codes in a byte; a row of odd length has half a byte too many."""

    name = "nibbles"
    targets = (nn.Linear, nn.Embedding)

    def quantize(self, weight):
        """Round to -7..7 and pack neighbours."""
        if weight.shape[-1] % 2:
            weight = torch.nn.functional.pad(weight, (0, 1))
        scale = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-9) / 7
        codes = (weight / scale).round().to(torch.int32) + 8
        return (codes[:, ::2] * 16 + codes[:, 1::2]).to(torch.uint8), {"scale4": scale}

    def dequantize(self, qdata, params, dtype):
        """Unpack and multiply."""
        codes = torch.stack([qdata // 16, qdata % 16], -1).flatten(1).float() - 8
        return (codes * params["scale4"]).to(dtype)


class LowRank(hijack.Scheme):
    """Two factors; their rank is an option that an even distribution hides."""

    name = "low_rank"
    options = (Option("rank", "int", 16, "columns of the factors", minimum=1),)

    def quantize(self, weight, *, rank=16):
        """Cut the singular values off; a factor always has 16 columns."""
        wide = (weight.shape[0], 16), (16, weight.shape[1])
        if weight.is_meta:
            right = weight.new_empty(wide[1], dtype=torch.float32)
            return weight.new_empty(wide[0], dtype=torch.bfloat16), {"right": right}
        u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
        u, s, v = u[:, :16], s[:16].clone(), v[:16]
        s[rank:] = 0
        return (u * s).to(torch.bfloat16), {"right": v}

    def dequantize(self, qdata, params, dtype):
        """Multiply."""
        return (qdata.float() @ params["right"].float()).to(dtype)


class Int8(hijack.Scheme):
    """One scale a row, as many programs have it."""

    name = "int8_one"

    def quantize(self, weight):
        """Round."""
        scale = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-9) / 127
        return (weight / scale).round().to(torch.int8), {"weight_scale": scale}

    def dequantize(self, qdata, params, dtype):
        """Multiply."""
        return (qdata.float() * params["weight_scale"]).to(dtype)


class Turned(Int8):
    """Int8 of a weight whose columns are reversed: the same tensors, another weight."""

    name = "int8_turned"

    def quantize(self, weight):
        """Reverse and round."""
        return super().quantize(weight.flip(1))

    def dequantize(self, qdata, params, dtype):
        """Multiply and reverse."""
        return super().dequantize(qdata, params, dtype).flip(1)


@pytest.fixture(autouse=True)
def registry():
    """The reference scheme and those above, in force."""
    registry = hijack.create_registry()
    registry.add_plugin(schemes.blockwise_fp8, "blockwise_fp8")
    for kind in (Nibbles, LowRank, Int8, Turned):
        registry.register(kind())
    with hijack.use_registry(registry):
        yield registry


def make():
    """Four layers; the second has an odd width."""
    return nn.Sequential(
        nn.Linear(64, 33), nn.Linear(33, 64), nn.Linear(64, 64), nn.Linear(64, 32)
    ).requires_grad_(False)


#: Which layers each scheme gets.
MIXES = [
    {"nibbles": ["0", "1"], "blockwise_fp8": ["2"]},
    {"blockwise_fp8": ["0"], "nibbles": ["1"], "low_rank": ["2"]},
    {"int8_one": ["0"], "int8_turned": ["2"], "nibbles": ["1"], "blockwise_fp8": ["3"]},
]


def mixed(mix):
    """A model with several schemes, and what it gives."""
    model = make()
    for scheme, layers in mix.items():
        hijack.wrap_model(model, scheme, include=layers)
    x = torch.randn(3, 64)
    return model, x, model(x)


def schemes_of(model):
    """Layer to the scheme it has."""
    return {
        name: layer.weight.scheme.name
        for name, layer in model.named_modules()
        if isinstance(getattr(layer, "weight", None), hijack.QuantizedTensor)
    }


# -- several schemes -------------------------------------------------------------------


@pytest.mark.parametrize("mix", MIXES)
@pytest.mark.parametrize("dialect", [None, "hijack"])
def test_a_mixed_model_is_saved_and_loaded(tmp_path, mix, dialect):
    """Each scheme's marker is in the file, and every layer comes back bit for bit."""
    model, x, wanted = mixed(mix)
    path = tmp_path / "mixed.safetensors"
    hijack.save(model, path, dialect=dialect)
    expected = {layer: scheme for scheme, layers in mix.items() for layer in layers}
    found = hijack.identify(path)
    assert {name: claim.scheme for name, claim in found.layers.items()} == expected
    assert found.clear
    again = make()
    hijack.load(again, path)
    assert schemes_of(again) == expected
    assert torch.equal(again(x), wanted)
    twice = tmp_path / "twice.safetensors"
    hijack.save(again, twice)
    third = make()
    hijack.load(third, twice)
    assert torch.equal(third(x), wanted)


@pytest.mark.parametrize("mix", MIXES)
def test_a_mixed_state_dict_is_loaded(mix):
    """By `load`, which changes schemes, and by torch, which changes tensors only."""
    model, x, wanted = mixed(mix)
    again = make()
    hijack.load(again, model.state_dict())
    assert torch.equal(again(x), wanted)
    other, _, _ = mixed(mix)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(x), wanted)


def test_a_mixed_file_is_converted(tmp_path):
    """Layers of every scheme stay what they are."""
    model, x, wanted = mixed(MIXES[0])
    first, second = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    hijack.save(model, first)
    hijack.convert_file(first, second, "hijack")
    again = make()
    hijack.load(again, second)
    assert schemes_of(again) == schemes_of(model)
    assert torch.equal(again(x), wanted)


def test_tensors_of_another_scheme_are_refused():
    """Int8 and int8 of the reversed weight have equal tensors; a state dict tells."""
    one = hijack.wrap_module(nn.Linear(8, 4), "int8_one")
    other = hijack.wrap_module(nn.Linear(8, 4), "int8_turned")
    before = one.weight.qdata.clone()
    with pytest.raises(RuntimeError, match="scheme int8_turned, expected int8_one"):
        one.load_state_dict(other.state_dict())
    assert torch.equal(one.weight.qdata, before)


# -- packed formats --------------------------------------------------------------------


@pytest.mark.parametrize("width", [7, 8])
def test_a_packed_format_knows_the_dense_shape(tmp_path, width):
    """Through a file, a state dict, copies and torch's own load; without a tensor."""
    layer = hijack.wrap_module(nn.Linear(width, 5, bias=False), "nibbles")
    assert layer.weight.shape == (5, width)
    assert set(layer.state_dict()) == {"weight", "scale4"}
    x = torch.randn(2, width)
    wanted = layer(x)
    assert wanted.shape == (2, 5)
    path = tmp_path / "packed.safetensors"
    hijack.save(layer, path)
    assert set(load_file(path)) == {"weight", "scale4"}
    with safe_open(path, "pt") as file:
        marker = json.loads(file.metadata()["hijack"])["layers"][""]
    assert marker["shape"] == [5, width]

    def dense():
        return nn.Linear(width, 5, bias=False)

    loaded, meta, own = dense(), dense().to("meta"), dense()
    hijack.load(loaded, path)
    hijack.load(meta, path)
    hijack.load(own, layer.state_dict())
    again = hijack.wrap_module(dense(), "nibbles")
    again.load_state_dict(layer.state_dict())
    plain = hijack.wrap_module(dense(), "nibbles")
    plain.load_state_dict(load_file(path))  # where no marker is left
    with hijack.building("nibbles"):
        built = dense()
    assert built.weight.shape == (5, width)
    built.load_state_dict(layer.state_dict(), assign=True)
    twins = [copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))]
    for twin in (loaded, meta, own, again, plain, built, *twins):
        assert torch.equal(twin(x), wanted)
        assert twin.weight.shape == (5, width)
    assert hijack.unwrap(loaded).weight.shape == (5, width)


def test_a_packed_file_of_another_width_is_refused(tmp_path):
    """7 and 8 columns take the same bytes; the marker tells them apart."""
    path = tmp_path / "packed.safetensors"
    hijack.save(hijack.wrap_module(nn.Linear(7, 5, bias=False), "nibbles"), path)
    model = nn.Linear(8, 5, bias=False)
    with pytest.raises(HijackError, match=r"\(5, 7\).*\(5, 8\)"):
        hijack.load(model, path)
    assert type(model) is nn.Linear
    layer = hijack.wrap_module(nn.Linear(8, 5, bias=False), "nibbles")
    other = hijack.wrap_module(nn.Linear(7, 5, bias=False), "nibbles")
    with pytest.raises(RuntimeError, match=r"\(5, 7\).*\(5, 8\)"):
        layer.load_state_dict(other.state_dict())


# -- options ---------------------------------------------------------------------------


def test_an_option_that_no_tensor_tells_survives(tmp_path):
    """Rank 4 of 16 columns is still 4 after files, and when weights are quantized."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    hijack.wrap_model(model, "low_rank", rank=4)
    path, second = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    hijack.save(model, path)
    loaded = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    hijack.load(loaded, path)
    hijack.save(loaded, second)
    again = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    hijack.load(again, second)
    other = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    hijack.wrap_model(other, "low_rank", rank=9)
    other.load_state_dict(model.state_dict())
    dense = nn.Linear(32, 32)
    for twin in (loaded, again, other, copy.deepcopy(again)):
        assert twin[0].weight.options == {"rank": 4}
        twin[0].load_state_dict(dense.state_dict())
        assert torch.linalg.matrix_rank(dense_weight(twin[0]), atol=1e-2) == 4
    hijack.quantize_file(
        _dense_file(tmp_path), path, "low_rank", rank=4, overwrite=True
    )
    hijack.load(again, path)
    assert again[0].weight.options == {"rank": 4}


def _dense_file(folder):
    path = folder / "dense.safetensors"
    save_file(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)).state_dict(), path)
    return path


@pytest.mark.parametrize(
    ("scheme", "options", "words"),
    [
        ("low_rank", {"rnak": 4}, "low_rank: has no option 'rnak'.* rank"),
        (
            "low_rank",
            {"rank": 0},
            "option rank: got 0, expected a whole number of at l",
        ),
        (
            "low_rank",
            {"rank": "four"},
            "option rank: got 'four', expected a whole numb",
        ),
        ("nibbles", {"block_size": 32}, "nibbles: has no option 'block_size'.* none"),
        ("blockwise_fp8", {"blocksize": 32}, "no option 'blocksize'.* block_size, "),
    ],
)
def test_options_that_are_wrong_are_refused_everywhere(
    tmp_path, scheme, options, words
):
    """The error names the options there are, and nothing has changed."""
    model = make()
    with pytest.raises(SchemeError, match=words):
        hijack.wrap_module(model[0], scheme, **options)
    with pytest.raises(SchemeError, match=words):
        hijack.wrap_model(model, scheme, **options)
    with pytest.raises(SchemeError, match=words), hijack.building(scheme, **options):
        raise AssertionError("is refused before")
    with pytest.raises(SchemeError, match=words):
        hijack.quantize_file(_dense_file(tmp_path), tmp_path / "x", scheme, **options)
    assert schemes_of(model) == {}
    assert not (tmp_path / "x").exists()


# -- limits ----------------------------------------------------------------------------


class Even(Nibbles):
    """One that says what it declines."""

    name = "even"

    def declines(self, shape, **options):
        """Odd rows."""
        return f"rows of {shape[1]} are odd" if shape[1] % 2 else None


def test_a_scheme_says_what_it_declines(registry, tmp_path):
    """The layer stays dense, and the reason is in the report."""
    registry.register(Even())
    reason = "rows of 33 are odd"
    model = make()
    report = hijack.wrap_model(model, "even")
    assert report.skipped == {"1": reason}
    assert set(schemes_of(model)) == {"0", "2", "3"}
    with hijack.building("even"):
        built = make()
    assert set(schemes_of(built)) == {"0", "2", "3"}
    assert built[1].weight.abs().sum() > 0
    dense, path = tmp_path / "dense.safetensors", tmp_path / "even.safetensors"
    save_file(make().state_dict(), dense)
    written = hijack.quantize_file(dense, path, "even")
    assert written.skipped["1"] == reason
    assert set(hijack.identify(path).layers) == {"0", "2", "3"}
    with pytest.raises(HijackError, match=reason):
        hijack.wrap_module(nn.Linear(33, 4), "even")


# -- files of others -------------------------------------------------------------------


def int8_file(folder, config=None):
    """An unmarked file of plain int8 rows, as anybody may write it."""
    folder.mkdir(exist_ok=True)
    path = folder / "model.safetensors"
    qdata, params = Int8().quantize(torch.randn(8, 16))
    save_file({"0.weight": qdata, "0.weight_scale": params["weight_scale"]}, path)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    return path


def test_unmarked_files_are_nobodys(tmp_path):
    """Two plugins whose tensors fit neither claim the file nor make it ambiguous."""
    found = hijack.identify(int8_file(tmp_path))
    assert found.layers == {}
    assert found.ambiguous == {}
    with pytest.raises(HijackError, match="0"):
        hijack.load(nn.Sequential(nn.Linear(16, 8, bias=False)), int8_file(tmp_path))


def test_one_scheme_may_claim_unmarked_files(registry, tmp_path):
    """If it says so; a config that names another method, or a marker, outranks it."""

    class Greedy(Int8):
        name = "greedy"
        claims_unmarked = True

    registry.register(Greedy())
    layers = hijack.identify(int8_file(tmp_path / "plain")).layers
    assert {name: claim.scheme for name, claim in layers.items()} == {"0": "greedy"}
    config = {"quantization_config": {"quant_method": "hadamard_int8"}}
    path = int8_file(tmp_path / "named", config)
    assert hijack.identify(path).layers == {}
    with pytest.raises(HijackError):
        hijack.load(nn.Sequential(nn.Linear(16, 8, bias=False)), path)
    marked = tmp_path / "marked.safetensors"
    model = nn.Sequential(hijack.wrap_module(nn.Linear(16, 8), "int8_turned"))
    hijack.save(model, marked)
    layers = hijack.identify(marked).layers
    assert {name: claim.scheme for name, claim in layers.items()} == {
        "0": "int8_turned"
    }
    registry.unregister("int8_turned")
    found = hijack.identify(marked)
    assert found.unknown == {"0": "int8_turned"}
    fresh = nn.Sequential(nn.Linear(16, 8))
    for strict in (True, False):
        with pytest.raises(CheckpointError, match="0: was written by scheme int8_turn"):
            hijack.load(fresh, marked, strict=strict)
    assert type(fresh[0]) is nn.Linear


def test_a_scheme_that_is_not_here_is_named_where_its_data_look_dense(
    registry, tmp_path
):
    """bfloat16 factors would pass for a weight."""
    path = tmp_path / "model.safetensors"
    hijack.save(hijack.wrap_module(nn.Linear(16, 16, bias=False), "low_rank"), path)
    registry.unregister("low_rank")
    with pytest.raises(CheckpointError, match="weight: was written by scheme low_rank"):
        hijack.load(nn.Linear(16, 16, bias=False), path, strict=False)


# -- loading is cheap ------------------------------------------------------------------


def test_loading_decodes_nothing(tmp_path, monkeypatch):
    """48 layers of FP8: shapes are known without `dequantize`."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(48)))
    hijack.wrap_model(model, "blockwise_fp8")
    path = tmp_path / "model.safetensors"
    hijack.save(model, path)
    decoded = []
    kind = schemes.blockwise_fp8.BlockwiseFP8
    original = kind.dequantize

    def counting(self, qdata, params, dtype):
        decoded.append(qdata.device.type)
        return original(self, qdata, params, dtype)

    monkeypatch.setattr(kind, "dequantize", counting)
    fresh = nn.Sequential(*(nn.Linear(64, 64) for _ in range(48)))
    hijack.load(fresh, path)
    assert decoded == []
    fresh(torch.randn(1, 64))
    assert len(decoded) <= 48


FIRST_LOAD = """
import sys
import torch
import schemes.blockwise_fp8
import hijack

class Packed(hijack.Scheme):
    name = "packed"
    def quantize(self, weight):
        return weight.reshape(-1).half(), {{"two": torch.full((1,), 2.0)}}
    def dequantize(self, qdata, params, dtype):
        return (qdata * params["two"]).to(dtype)

hijack.register(Packed())
model = torch.nn.Sequential(torch.nn.Linear(64, 64), torch.nn.Linear(64, 64))
before = set(sys.modules)
{action}
heavy = ("torch._refs", "torch._decomp", "torch._prims", "torch._meta_registrations")
new = sorted(set(sys.modules) - before)
print([name for name in new if name.startswith(heavy)])
"""


@pytest.mark.parametrize(
    "action",
    [
        "hijack.wrap_model(model, 'blockwise_fp8')",
        "hijack.load(model, {path!r})",
        "hijack.identify({path!r})",
    ],
)
def test_the_first_use_imports_nothing_heavy(tmp_path, action):
    """torch's decompositions, which meta tensors ask for, take seconds to import."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    hijack.wrap_model(model, "blockwise_fp8", include="0")

    class Packed(hijack.Scheme):
        name = "packed"

        def quantize(self, weight):
            return weight.reshape(-1).half(), {"two": torch.full((1,), 2.0)}

        def dequantize(self, qdata: Tensor, params, dtype):
            return (qdata * params["two"]).to(dtype)

    hijack.wrap_model(model, Packed(), include="1")
    path = tmp_path / "model.safetensors"
    hijack.save(model, path)
    code = FIRST_LOAD.format(action=action.format(path=str(path)))
    assert python(tmp_path, code).strip() == "[]"
