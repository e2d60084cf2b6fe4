"""Loading quantized checkpoints into any model, and saving them."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import hijack
import schemes.blockwise_fp8  # noqa: F401 - registers the scheme
from hijack.errors import (
    CheckpointError,
    ModuleError,
    SchemeError,
    ShapeError,
    UnconsumedScaleError,
)
from hijack.modules import Wrapped, dense_weight
from hijack.safetensors_io import reader
from hijack.safetensors_io.reader import open_tensors, read_header
from tests.tiny_file import same


class Nibbles(hijack.Scheme):
    """Two 4-bit codes a byte: the stored shape is not the dense one."""

    name = "nibbles"

    def quantize(self, weight, **options):
        """Round to -7..7 and pack neighbours."""
        scale = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 7
        codes = (weight / scale).round().to(torch.int32) + 8
        return (codes[:, ::2] * 16 + codes[:, 1::2]).to(torch.uint8), {"scale4": scale}

    def dequantize(self, qdata, params, dtype):
        """Unpack and multiply."""
        codes = torch.stack([qdata // 16, qdata % 16], -1).flatten(1).float() - 8
        return (codes * params["scale4"]).to(dtype)


@pytest.fixture
def nibbles():
    """The packed scheme, registered."""
    yield hijack.register(Nibbles())
    hijack.unregister("nibbles")


SCRIPT = """
import sys, torch, hijack, schemes.blockwise_fp8

def anonymous():
    lines = open("/proc/self/smaps_rollup").read().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))

def model():
    with torch.device("meta"):
        return torch.nn.Sequential(*[torch.nn.Linear(2048, 2048) for _ in range(8)])

with torch.device("meta"):
    hijack.load(torch.nn.Sequential(torch.nn.Linear(64, 64)), sys.argv[2])
before, known = anonymous(), set(sys.modules)
target = model()
hijack.load(target, sys.argv[1])
print(anonymous() - before)
print("torch.distributed.tensor" in sys.modules)
print(type(target[0].weight).__name__, target[0].weight.qdata.dtype)
"""


@pytest.mark.skipif(
    not Path("/proc/self/smaps_rollup").exists(), reason="no smaps_rollup"
)
def test_a_file_is_mapped_and_not_copied(tmp_path):
    """Loading 36 MB takes no memory of its own, and imports no part of torch's.

    An operation on a quantized tensor would have torch import its distributed ones.
    """
    big, small = tmp_path / "big.safetensors", tmp_path / "small.safetensors"
    for path, width, count in ((big, 2048, 8), (small, 64, 1)):
        model = nn.Sequential(*[nn.Linear(width, width) for _ in range(count)])
        hijack.wrap_model(model, "blockwise_fp8")
        hijack.save(model, path)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, big, small],
        capture_output=True,
        text=True,
        check=True,
    )
    memory, imported, weight = done.stdout.splitlines()
    assert int(memory) * 1024 < 8e6
    assert imported == "False"
    assert weight == "QuantizedTensor torch.float8_e4m3fn"


def test_files_are_read_ahead_if_asked_for(tmp_path, monkeypatch):
    """All of each file is asked for in the background, once, and only then."""
    path, asked = tmp_path / "x.safetensors", []
    done = threading.Event()
    model = make()
    hijack.wrap_model(model, "blockwise_fp8")
    hijack.save(model, path)

    def advise(file, begin, size, advice):
        name = threading.current_thread().name
        asked.append((os.fstat(file).st_ino, begin, size, advice, name))
        if begin + size >= path.stat().st_size:
            done.set()

    monkeypatch.setattr(reader, "_AHEAD", 4096)
    monkeypatch.setattr(os, "posix_fadvise", advise, raising=False)
    monkeypatch.setattr(os, "POSIX_FADV_WILLNEED", 3, raising=False)
    hijack.load(make(), path)
    assert not asked
    fresh = make()
    hijack.load(fresh, path, prefetch=True)
    assert done.wait(60)
    assert [begin for _, begin, *_ in asked] == [
        *range(0, path.stat().st_size, 4096),
    ]
    assert {(inode, advice) for inode, _, _, advice, _ in asked} == {
        (path.stat().st_ino, 3)
    }
    assert threading.current_thread().name not in {name for *_, name in asked}
    assert_same_model(fresh, model)


@pytest.mark.parametrize("problem", ["missing", "no thread", "no file"])
def test_reading_ahead_is_a_hint(tmp_path, monkeypatch, problem):
    """Where it cannot be had, loading goes on without it."""
    path = tmp_path / "x.safetensors"
    model = make()
    hijack.wrap_model(model, "blockwise_fp8")
    hijack.save(model, path)
    if problem == "missing":
        monkeypatch.delattr(os, "posix_fadvise", raising=False)
    elif problem == "no thread":

        def refuse(thread):
            raise RuntimeError("can't start new thread")

        monkeypatch.setattr(threading.Thread, "start", refuse)
    else:
        reader._read_ahead([tmp_path / "gone"])
    fresh = make()
    hijack.load(fresh, path, prefetch=True)
    assert_same_model(fresh, model)
    hijack.load(make(), make().state_dict(), prefetch=True)


def make():
    """A small dense model."""
    return nn.Sequential(nn.Linear(128, 64), nn.LayerNorm(64), nn.Linear(64, 32))


def assert_same_model(first, second):
    """The same tensors bit for bit; outputs are equal to the rounding of products."""
    tensors, others = first.state_dict(), second.state_dict()
    assert tensors.keys() == others.keys()
    assert all(same(tensor, others[key]) for key, tensor in tensors.items())
    x = torch.randn(3, first[0].in_features)
    torch.testing.assert_close(first(x), second(x))


@pytest.fixture
def saved(tmp_path):
    """A wrapped model and the file it was saved to."""
    model = make()
    hijack.wrap_model(model, "blockwise_fp8", include=["0", "2"])
    path = tmp_path / "model.safetensors"
    hijack.save(model, path)
    return model, path


def test_save_and_load_give_the_same_model(saved):
    """A fresh dense model becomes the saved one, bit for bit."""
    model, path = saved
    fresh = make()
    report = hijack.load(fresh, path)
    assert set(report.layers) == {"0", "2"}
    assert report.dense == 4
    assert_same_model(fresh, model)
    assert "2 quantized layers (blockwise_fp8), 4 dense" in str(report)


def test_the_default_dialect_is_the_scheme_s_first(saved):
    """blockwise_fp8 layers are written as musubi-tuner writes them."""
    tensors = load_file(saved[1])
    assert tensors["0.scale_weight"].shape == (64, 2, 1)
    assert tensors["0.weight"].dtype == torch.float8_e4m3fn


def test_a_meta_model_loads_without_allocating(saved):
    """A model on the meta device takes the file's tensors as they are."""
    model, path = saved
    with torch.device("meta"):
        fresh = make()
    hijack.load(fresh, path)
    assert not any(p.is_meta for p in fresh.parameters())
    assert_same_model(fresh, model)


def test_loading_a_state_dict_keeps_its_tensors(saved):
    """assign: the module holds the very tensors it was given."""
    tensors = load_file(saved[1])
    fresh = make()
    hijack.load(fresh, tensors)
    assert fresh[0].weight.qdata.data_ptr() == tensors["0.weight"].data_ptr()
    assert fresh[0].weight_scale.data_ptr() == tensors["0.scale_weight"].data_ptr()


def test_a_wrapped_models_own_state_dict_loads(nibbles):
    """state_dict() carries the markers that name the scheme of packed codes."""
    model = make()
    hijack.wrap_model(model, nibbles)
    fresh = make()
    hijack.load(fresh, model.state_dict())
    assert_same_model(fresh, model)


def test_a_scheme_without_dialects_round_trips_through_a_file(nibbles, tmp_path):
    """Header metadata names scheme and parameters, also where shapes do not tell."""
    model = make()
    hijack.wrap_model(model, nibbles, include="0")
    path = tmp_path / "packed.safetensors"
    hijack.save(model, path)
    with safe_open(path, "pt") as file:
        marker = json.loads(file.metadata()["hijack"])
    assert marker["layers"]["0"] == {
        "params": ["scale4"],
        "scheme": "nibbles",
        "shape": [64, 128],
    }
    fresh = make()
    hijack.load(fresh, path)
    assert_same_model(fresh, model)


def test_ragged_blocks_keep_their_size(tmp_path):
    """A 128x128 grid over 192 rows comes back with the block size it had."""
    model = nn.Sequential(nn.Linear(256, 192))
    hijack.wrap_model(model, "blockwise_fp8", block_size=(128, 128))
    path = tmp_path / "ragged.safetensors"
    hijack.save(model, path)
    fresh = nn.Sequential(nn.Linear(256, 192))
    report = hijack.load(fresh, path)
    assert report.layers["0"].block_size == (128, 128)
    assert_same_model(fresh, model)


def test_a_loaded_file_is_saved_as_it_was(saved, tmp_path):
    """Load and save give the same tensors under the same keys."""
    fresh = make()
    hijack.load(fresh, saved[1])
    again = tmp_path / "again.safetensors"
    hijack.save(fresh, again)
    first, second = load_file(saved[1]), load_file(again)
    assert set(first) == set(second)
    for key in first:
        assert torch.equal(first[key].view(torch.uint8), second[key].view(torch.uint8))


def test_shards_and_their_index_load_as_one(saved, tmp_path):
    """A list of files, and an index that names them, are one checkpoint."""
    model, path = saved
    tensors = load_file(path)
    parts = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    keys = list(tensors)
    for part, some in zip(parts, (keys[:3], keys[3:]), strict=True):
        save_file({k: tensors[k] for k in some}, part)
    index = tmp_path / "model.safetensors.index.json"
    weight_map = {k: parts[i >= 3].name for i, k in enumerate(keys)}
    index.write_text(json.dumps({"weight_map": weight_map}))
    for source in (parts, index):
        fresh = make()
        hijack.load(fresh, source)
        assert_same_model(fresh, model)


def test_missing_and_unexpected_keys_are_errors_unless_allowed(saved):
    """strict names them and changes nothing; otherwise they are reported."""
    tensors = load_file(saved[1])
    del tensors["1.bias"]
    tensors["9.weight"] = torch.zeros(2)
    fresh = make()
    before = {k: v.clone() for k, v in fresh.state_dict().items()}
    with pytest.raises(
        CheckpointError, match=r"missing 1 \(1.bias\); unexpected 1 \(9"
    ):
        hijack.load(fresh, tensors)
    assert all(torch.equal(v, before[k]) for k, v in fresh.state_dict().items())
    report = hijack.load(fresh, tensors, strict=False)
    assert (report.missing, report.unexpected) == (("1.bias",), ("9.weight",))
    assert isinstance(fresh[0], Wrapped)


def test_a_scale_nobody_reads_is_an_error(saved):
    """A layer whose scale has the wrong name is not loaded as raw codes."""
    tensors = load_file(saved[1])
    tensors["0.scale_of_weight"] = tensors.pop("0.scale_weight")
    with pytest.raises((UnconsumedScaleError, CheckpointError), match=r"0\."):
        hijack.load(make(), tensors, strict=False)
    tensors["0.weight_scale_inv"] = tensors.pop("0.scale_of_weight")
    with pytest.raises(
        UnconsumedScaleError, match=r"no scheme reads 0.weight_scale_inv"
    ):
        hijack.load(make(), tensors)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"1.weight": torch.ones(63)}, ShapeError, r"1.weight: got shape \(63,\), exp"),
        (
            {"0.weight": torch.ones(64, 64).to(torch.float8_e4m3fn)},
            ShapeError,
            r"0: blockwise_fp8 .*\(64, 64\), the module expects \(64, 128",
        ),
    ],
)
def test_a_checkpoint_of_another_shape_leaves_the_model_alone(
    saved, change, error, message
):
    """Shapes are compared before anything is replaced."""
    fresh = make()
    with pytest.raises(error, match=message):
        hijack.load(fresh, {**load_file(saved[1]), **change})
    assert not any(isinstance(m, Wrapped) for m in fresh.modules())


def test_codes_for_a_module_the_scheme_does_not_target_are_refused(saved):
    """The error names the module's type."""
    fresh = nn.Sequential(nn.Bilinear(8, 16, 64), nn.LayerNorm(64), nn.Linear(64, 32))
    with pytest.raises(
        ModuleError, match=r"^0: .*blockwise_fp8 data for a Bilinear, expected one of"
    ):
        hijack.load(fresh, saved[1])


def test_a_wrapped_model_takes_a_dense_checkpoint():
    """Dense weights are quantized as they are loaded."""
    dense, wrapped, x = make(), make(), torch.randn(3, 128)
    hijack.wrap_model(wrapped, "blockwise_fp8", include=["0"])
    hijack.load(wrapped, dense.state_dict())
    assert isinstance(wrapped[0], Wrapped)
    error = (wrapped(x) - dense(x)).norm() / dense(x).norm()
    assert 0 < error < 0.05


def test_a_wrapped_model_takes_another_scheme(nibbles, saved):
    """Loading replaces the scheme a layer had."""
    model, path = saved
    fresh = make()
    hijack.wrap_model(fresh, nibbles)
    hijack.load(fresh, path)
    assert_same_model(fresh, model)
    assert hijack.unwrap(fresh)[0].weight.dtype == torch.float32


def test_tied_weights_load_from_one_key():
    """A shared weight, stored once, is shared codes afterwards."""

    def tied():
        model = nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
        model["b"].weight = model["a"].weight
        return model

    first, second = tied(), tied()
    hijack.wrap_model(first, "blockwise_fp8")
    tensors = {k: v for k, v in first.state_dict().items() if "b.weight" not in k}
    hijack.load(second, tensors)
    assert second["b"].weight is second["a"].weight
    assert torch.equal(dense_weight(second["b"]), dense_weight(first["a"]))


def test_a_tied_weight_that_the_file_has_dense_stays_dense():
    """Each of the two gets its own tensor of the file, as it is."""
    model, other = (
        nn.ModuleDict({"a": nn.Linear(64, 64), "b": nn.Linear(64, 64)})
        for _ in range(2)
    )
    model["b"].weight = model["a"].weight
    hijack.wrap_module(other["a"], "blockwise_fp8")
    hijack.load(model, other.state_dict())
    assert isinstance(model["a"].weight, hijack.QuantizedTensor)
    assert type(model["b"]) is nn.Linear
    assert torch.equal(model["b"].weight, other["b"].weight)


def test_save_refuses_a_dialect_that_cannot_spell_a_layer(tmp_path):
    """The error names the layer and the dialect, and nothing is written."""
    model = nn.Sequential(nn.Linear(256, 256))
    hijack.wrap_model(model, "blockwise_fp8", block_size=(128, 128))
    path = tmp_path / "x.safetensors"
    with pytest.raises(CheckpointError, match=r"^0: dialect musubi: cannot write"):
        hijack.save(model, path, dialect="musubi")
    with pytest.raises(CheckpointError, match=r"unknown dialect 'nix'.*hijack.*musubi"):
        hijack.save(model, path, dialect="nix")
    assert list(tmp_path.iterdir()) == []


def cast_to_fp8(state_dict, keys):
    """Some tensors of a state dict as plain casts."""
    return {
        k: t.to(torch.float8_e4m3fn) if k in keys else t for k, t in state_dict.items()
    }


@pytest.mark.parametrize("meta", [False, True])
def test_plain_casts_load_in_the_dtype_of_the_model(tmp_path, meta):
    """A file that nothing stands against is read: what is FP8 alone is cast."""
    model = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).bfloat16()
    casts = cast_to_fp8(model.state_dict(), model.state_dict().keys())
    path = tmp_path / "cast.safetensors"
    save_file(casts, path)
    assert hijack.identify(path).clear
    other = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)).bfloat16()
    report = hijack.load(other.to("meta") if meta else other, path)
    assert sorted(report.cast) == sorted(casts)
    for key, tensor in other.state_dict().items():
        assert tensor.dtype == torch.bfloat16
        assert torch.equal(tensor, casts[key].bfloat16())


def test_a_cast_bias_beside_a_scaled_weight_loads(tmp_path):
    """The scale is the weight's; nothing would scale the bias."""
    model = nn.Sequential(nn.Linear(64, 8)).bfloat16()
    hijack.wrap_model(model, "blockwise_fp8")
    path = tmp_path / "bias.safetensors"
    hijack.save(model, path)
    tensors = cast_to_fp8(load_file(path), ["0.bias"])
    save_file(tensors, path)
    assert hijack.identify(path).clear
    other = nn.Sequential(nn.Linear(64, 8)).bfloat16()
    assert hijack.load(other, path).cast == ("0.bias",)
    assert torch.equal(other[0].bias, tensors["0.bias"].bfloat16())


def test_what_identify_finds_unclear_load_refuses(tmp_path):
    """Integers and FP8 without scales beside scaled ones are garbage as numbers."""
    model = nn.Sequential(nn.Linear(8, 8))
    path = tmp_path / "lone.safetensors"
    for dtype in (torch.int8, torch.uint8):
        save_file({"0.weight": torch.ones(8, 8, dtype=dtype)}, path)
        assert not hijack.identify(path).clear
        with pytest.raises(CheckpointError, match=r"0: .*without a scale"):
            hijack.load(model, path, strict=False)


@pytest.mark.parametrize("key", ["scale", "table.scales", "quantizers.of_0"])
def test_what_may_scale_plain_casts_is_never_left_out(tmp_path, key):
    """A scale is not to be lost because its name tells nothing, even if not strict."""
    tensors = {"0.weight": torch.ones(8, 8).to(torch.float8_e4m3fn)}
    path = tmp_path / "cast.safetensors"
    model = nn.Sequential(nn.Linear(8, 8, bias=False))
    save_file({**tensors, key: torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match=key):
        hijack.load(model, path, strict=False)
    save_file({**tensors, "1.bias": torch.ones(1)}, path)
    assert hijack.load(model, path, strict=False).unexpected == ("1.bias",)
    save_file({"0.weight": torch.ones(8, 8), key: torch.ones(1)}, path)
    assert hijack.load(model, path, strict=False).unexpected == (key,)


@pytest.mark.parametrize("shards", [False, True])
def test_a_file_replaced_after_its_header_was_read_is_refused(tmp_path, shards):
    """Shapes of one file and data of another would be a mixture nobody made."""
    model = nn.Sequential(nn.Linear(64, 8)).bfloat16()
    hijack.wrap_model(model, "blockwise_fp8")
    path, other = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    hijack.save(model, path)
    save_file(load_file(path), other, {"hijack": "{}"})
    header = read_header([path] if shards else path)
    before = open_tensors(header)
    assert before["0.bias"].shape == (8,)
    late = open_tensors(header)
    other.replace(path)
    with pytest.raises(CheckpointError, match="changed while it was read"):
        late["0.bias"]
    assert before["0.weight"].shape == (8, 64)  # it was mapped in time
    assert torch.equal(open_tensors(read_header(path))["0.bias"], before["0.bias"])


@pytest.mark.parametrize(
    "name",
    ["training", "half", "__class__", "_hijack", "compute_dtype", "_bound_forward"],
)
def test_a_file_cannot_name_a_tensor_like_what_modules_have(nibbles, tmp_path, name):
    """The marker of the second of three layers does; no layer is changed by that."""

    def layers():
        return nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))

    model, path = layers(), tmp_path / "x.safetensors"
    hijack.wrap_model(model, nibbles)
    hijack.save(model, path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        marker = json.loads(file.metadata()["hijack"])
    tensors[f"1.{name}"] = tensors.pop("1.scale4")
    marker["layers"]["1"]["params"] = [name]
    save_file(tensors, path, {"hijack": json.dumps(marker)})
    fresh = layers()
    before = [(type(m), m.weight, dict(vars(m))) for m in fresh]
    with pytest.raises(SchemeError, match=f"named {name}, which Linear has already"):
        hijack.load(fresh, path)
    assert all(
        (type(m), m.weight is weight, vars(m)) == (kind, True, own)
        for m, (kind, weight, own) in zip(fresh, before, strict=True)
    )


def test_hijacks_marker_says_nothing_that_the_tensors_show(tmp_path):
    """The shape of a weight is in the file; only packed data need it written."""
    model, path = nn.Sequential(nn.Linear(64, 8)), tmp_path / "x.safetensors"
    hijack.wrap_model(model, "blockwise_fp8")
    hijack.save(model, path, dialect="hijack")
    with safe_open(path, "pt") as file:
        entry = json.loads(file.metadata()["hijack"])["layers"]["0"]
    assert "shape" not in entry


@pytest.mark.parametrize("assign", [False, True])
def test_a_wrapped_layer_that_was_made_dense_takes_a_dense_weight(assign):
    """Somebody replaced its weight; from then on it is loaded as any layer is."""
    layer = hijack.wrap_module(nn.Linear(8, 8), "blockwise_fp8")
    layer.weight = nn.Parameter(torch.zeros(8, 8))
    tensors = {"weight": torch.ones(8, 8), "bias": torch.ones(8)}
    layer.load_state_dict(tensors, assign=assign)
    assert torch.equal(layer.weight, torch.ones(8, 8))
    with pytest.raises(RuntimeError, match="Missing key"):
        layer.load_state_dict({"bias": torch.ones(8)}, assign=assign)
    with pytest.raises(RuntimeError, match=r"weight: got shape \(4, 8\)"):
        layer.load_state_dict({**tensors, "weight": torch.ones(4, 8)}, assign=assign)


# -- names, devices, and what no checkpoint holds --------------------------------------


class Rotary(nn.Module):
    """Computes a table when it is constructed, as rotary embeddings do."""

    def __init__(self, width, theta=10000.0, device=None):
        super().__init__()
        self.width, self.theta = width, theta
        powers = torch.arange(0, width, 2, device=device) / width
        self.register_buffer("frequencies", 1 / theta**powers, persistent=False)
        self.table = torch.outer(torch.arange(8, device=device), 1 / theta**powers)


class Forgetful(nn.Module):
    """Keeps no argument, so that its table cannot be computed again."""

    def __init__(self, theta=10000.0):
        super().__init__()
        self.register_buffer("table", torch.arange(4) / theta, persistent=False)


class Halving(nn.Module):
    """Keeps something else under the name of its argument."""

    def __init__(self, width):
        super().__init__()
        self.width = width // 2
        self.register_buffer("table", torch.arange(self.width), persistent=False)


def with_tables(*tables):
    model = nn.Module()
    model.proj = nn.Linear(128, 32)
    model.tables = nn.ModuleList(tables)
    return model


def quantized_file(path, prefix="", **options):
    torch.manual_seed(0)
    layer = nn.Linear(128, 32)
    tensors = {f"{prefix}proj.{k}": t for k, t in layer.state_dict().items()}
    source = path.with_suffix(".dense.safetensors")
    save_file(tensors, source)
    hijack.quantize_file(
        source, path, include=["*proj"], block_size=(1, 128), **options
    )
    return path


@pytest.mark.parametrize(
    "prefix", ["", "model.diffusion_model.", "diffusion_model.", "transformer.", "a.b."]
)
@pytest.mark.parametrize("dialect", ["musubi", "hijack", "torchao"])
def test_a_model_is_found_under_any_prefix(prefix, dialect, tmp_path):
    """Whatever the file calls its tensors; the report has the model's names."""
    path = quantized_file(tmp_path / "q.safetensors", prefix, dialect=dialect)
    model, plain = with_tables(), with_tables()
    report = hijack.load(model, path)
    assert list(report.layers) == ["proj"]
    assert report.layers["proj"].dialect == dialect
    assert report.forwards().keys() == {"proj"}
    hijack.load(plain, quantized_file(tmp_path / "p.safetensors"))
    assert torch.equal(model.proj.weight + 0, plain.proj.weight + 0)
    assert torch.equal(model.proj.bias, plain.proj.bias)


def test_a_prefix_that_is_one_of_two_is_not_chosen(tmp_path):
    """A file of two networks does not say which of them is meant."""
    layer = nn.Linear(128, 32).state_dict()
    tensors = {f"{p}.proj.{k}": t for p in ("ema", "student") for k, t in layer.items()}
    with pytest.raises(CheckpointError, match="keys do not match"):
        hijack.load(with_tables(), tensors)
    hijack.load(with_tables(), {k: t for k, t in tensors.items() if k[0] == "e"})


def test_names_that_are_there_come_before_prefixes(tmp_path):
    """A model that is in the file as it is, is not looked for elsewhere."""
    own, other = nn.Linear(128, 32), nn.Linear(128, 32)
    tensors = {f"proj.{k}": t for k, t in own.state_dict().items()}
    tensors |= {f"old.proj.{k}": t for k, t in other.state_dict().items()}
    model = with_tables()
    report = hijack.load(model, tensors, strict=False)
    assert torch.equal(model.proj.weight, own.weight)
    assert len(report.unexpected) == 2


def test_compiled_models_load_by_the_names_they_had(tmp_path):
    """``torch.compile`` puts a word into every name."""
    path = quantized_file(tmp_path / "q.safetensors")
    model = torch.compile(with_tables(), backend="eager")
    assert len(hijack.load(model, path).layers) == 1


def test_tables_that_can_be_computed_are(tmp_path):
    """Buffers and plain tensors of a model on meta, by the module's constructor."""
    path = quantized_file(tmp_path / "q.safetensors")
    with torch.device("meta"):
        model = with_tables(Rotary(16, 5e5))
    model.tables[0].is_mine = True  # as libraries mark modules
    report = hijack.load(model, path)
    wanted = Rotary(16, 5e5)
    assert torch.equal(model.tables[0].frequencies, wanted.frequencies)
    assert torch.equal(model.tables[0].table, wanted.table)
    assert report.on_meta == ()


class Configured(nn.Module):
    """Tells a part of it what the part does not keep, and keeps it in a config."""

    def __init__(self, width, theta=10000.0):
        super().__init__()
        self.config = {"width": width, "theta": theta}
        self.proj = nn.Linear(width, 32)
        self.rope = Forgetful(theta)


def test_tables_are_computed_by_what_knows_the_arguments(tmp_path):
    """A module that the table's module is in, by its config."""
    path = quantized_file(tmp_path / "q.safetensors")
    with torch.device("meta"):
        model = Configured(128, 5e5)
    hijack.load(model, path)
    assert torch.equal(model.rope.table, Forgetful(5e5).table)
    with torch.device("meta"):
        changed = Configured(128, 5e5)
        changed.rope.register_buffer("table", torch.arange(9), persistent=False)
    with pytest.raises(CheckpointError, match=r"rope.table"):
        hijack.load(changed, path)


@pytest.mark.parametrize("table", [Forgetful, lambda: Halving(8)])
def test_tables_that_cannot_be_computed_are_named(table, tmp_path):
    """Refused if strict, else in the report; a guess would be a wrong number."""
    path = quantized_file(tmp_path / "q.safetensors")
    with torch.device("meta"):
        model = with_tables(table(), Rotary(16))
    with pytest.raises(CheckpointError, match=r"tables.0.table.*on the meta"):
        hijack.load(model, path)
    assert model.proj.weight.is_meta
    report = hijack.load(model, path, strict=False)
    assert report.on_meta == ("tables.0.table",)
    assert "1 on meta" in str(report)
    assert not model.tables[1].frequencies.is_meta


def test_a_device_map_says_what_is_loaded_and_where(tmp_path):
    """By names of modules, the longest that fits; meta stays meta."""
    path = tmp_path / "q.safetensors"
    model = nn.Sequential(nn.Linear(128, 32), nn.Linear(32, 8), Rotary(16))
    hijack.wrap_model(model, "blockwise_fp8", include=["0"])
    hijack.save(model, path)

    def empty():
        with torch.device("meta"):
            return nn.Sequential(nn.Linear(128, 32), nn.Linear(32, 8), Rotary(16))

    for everywhere in ("cpu", torch.device("cpu"), {"": "cpu"}):
        loaded = empty()
        hijack.load(loaded, path, device_map=everywhere)
        assert not any(t.is_meta for t in (*loaded.parameters(), *loaded.buffers()))
    for left, kept in (("0", "1"), ("1", "0")):
        loaded = empty()
        report = hijack.load(loaded, path, device_map={"": "cpu", left: "meta"})
        assert loaded.get_submodule(left).weight.is_meta
        assert not loaded.get_submodule(kept).weight.is_meta
        assert report.missing == report.unexpected == ()
    hijack.load(loaded, path, device_map={"0.bias": "cpu", "0": "cpu", "1": "cpu"})
    for wrong, message in (
        ({"nobody": "cpu"}, "nobody"),
        ({"": "disk"}, "disk_offload"),
        ("nowhere", "such as"),
    ):
        with pytest.raises(CheckpointError, match=message):
            hijack.load(empty(), path, device_map=wrong)
