"""Files quantized layer by layer: what is written, what is kept, what is refused."""

import json
import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import hijack
import schemes.blockwise_fp8  # noqa: F401 - registers the scheme
from hijack.errors import CheckpointError, NonFiniteError, SchemeError
from hijack.safetensors_io.reader import read_header
from hijack.testing import registered

LARGEST = 448.0


def reference(weight, columns=64):
    """musubi-tuner's numbers, from their description: scale in the weight's dtype."""
    n, k = weight.shape
    grouped = weight.reshape(n, -1, columns if k % columns == 0 else k)
    scale = (grouped.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=1e-8)
    codes = (grouped.float() / scale.float()).clamp(-LARGEST, LARGEST)
    scale = scale if k % columns == 0 else scale[:, :, 0]
    return codes.to(torch.float8_e4m3fn).reshape(n, k), scale


@pytest.fixture
def source(tmp_path):
    """A small bfloat16 checkpoint with every kind of tensor."""
    torch.manual_seed(0)
    tensors = {
        "blocks.0.proj.weight": torch.randn(96, 128).bfloat16(),
        "blocks.0.proj.bias": torch.randn(96).bfloat16(),
        "blocks.0.odd.weight": torch.randn(32, 50).bfloat16(),
        "blocks.0.norm.weight": torch.randn(128).bfloat16(),
        "patch.weight": torch.randn(8, 4, 3, 3),
        "table": torch.arange(5),
    }
    path = tmp_path / "dense.safetensors"
    save_file(tensors, path, {"modelspec.title": "toy"})
    return path


def same(a, b):
    """Equal dtype, shape and bits."""
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8),
        b.contiguous().reshape(-1).view(torch.uint8),
    )


def test_codes_and_scales_are_those_of_musubi_tuner(source, tmp_path):
    """Block and row layers are bit-identical to an independent computation."""
    hijack.quantize_file(source, tmp_path / "q.safetensors")
    dense, coded = load_file(source), load_file(tmp_path / "q.safetensors")
    for layer in ("blocks.0.proj", "blocks.0.odd"):
        codes, scale = reference(dense[f"{layer}.weight"])
        assert same(coded[f"{layer}.weight"], codes)
        assert same(coded[f"{layer}.scale_weight"], scale)
        assert coded[f"{layer}.scale_weight"].shape == scale.shape


def test_everything_else_is_kept_byte_for_byte(source, tmp_path):
    """Other tensors and the metadata are copied; no marker is added."""
    path = tmp_path / "q.safetensors"
    report = hijack.quantize_file(source, path)
    dense, coded = load_file(source), load_file(path)
    for key in ("blocks.0.proj.bias", "blocks.0.norm.weight", "patch.weight", "table"):
        assert same(coded[key], dense[key])
    with safe_open(path, "pt") as file:
        assert file.metadata() == {"format": "pt", "modelspec.title": "toy"}
    assert sorted(report.layers) == ["blocks.0.odd", "blocks.0.proj"]
    assert report.skipped == {"patch": "4 dimensions"}
    assert report.bytes_before > report.bytes_after


def test_tensors_torch_has_no_dtype_for_are_kept_too(tmp_path):
    """Bytes are copied whatever they mean: 4-bit and 6-bit numbers, exponents."""
    data, infos = bytearray(torch.ones(2, 4).numpy().tobytes()), {}
    infos["w.weight"] = {"dtype": "F32", "shape": [2, 4], "data_offsets": [0, 32]}
    for dtype, size in (("F4", 4), ("F6_E2M3", 6), ("F8_E8M0", 8)):
        places = [len(data), len(data) + size]
        infos[dtype] = {"dtype": dtype, "shape": [8], "data_offsets": places}
        data += bytes(range(size))
    text = json.dumps(infos).encode()
    source, path = tmp_path / "s.safetensors", tmp_path / "q.safetensors"
    source.write_bytes(len(text).to_bytes(8, "little") + text + data)
    hijack.quantize_file(source, path)
    header, content = read_header(path), path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    for dtype, size in (("F4", 4), ("F6_E2M3", 6), ("F8_E8M0", 8)):
        info = header.tensors[dtype]
        assert (info.dtype, info.shape) == (dtype, (8,))
        kept = content[start + info.begin : start + info.end]
        assert kept == bytes(range(size))


def test_markers_of_an_earlier_quantization_are_dropped(tmp_path):
    """A dense file that was quantized once does not pass its old marker on."""
    source, path = tmp_path / "s.safetensors", tmp_path / "q.safetensors"
    old = '{"layers": {"x": {"scheme": "blockwise_fp8", "params": ["weight_scale"]}}}'
    save_file({"x.weight": torch.randn(4, 64)}, source, {"hijack": old, "k": "v"})
    hijack.quantize_file(source, path)
    assert read_header(path).metadata == {"format": "pt", "k": "v"}
    assert hijack.identify(path).claims()["x"].dialect == "musubi"


def test_patterns_and_options_choose(source, tmp_path):
    """Includes name layers of any dimension; excludes leave dense."""
    path = tmp_path / "q.safetensors"
    report = hijack.quantize_file(
        source, path, include=["patch", "blocks.*"], exclude="*.odd", block_size="row"
    )
    assert sorted(report.layers) == ["blocks.0.proj", "patch"]
    assert report.skipped == {"blocks.0.odd": "excluded"}
    coded = load_file(path)
    assert coded["blocks.0.proj.scale_weight"].shape == (96, 1)
    assert coded["patch.scale_weight"].shape == ()


def test_the_native_dialect_marks_its_layers(source, tmp_path):
    """Blocks musubi has no spelling for are written and read back."""
    path = tmp_path / "q.safetensors"
    hijack.quantize_file(source, path, block_size=(64, 48), dialect="hijack")
    claim = hijack.identify(path).claims()["blocks.0.proj"]
    assert claim.certainty == hijack.Certainty.MARKED
    assert claim.block_size == (64, 48)
    layer = torch.nn.ModuleDict({"proj": torch.nn.Linear(128, 96)})
    model = torch.nn.ModuleDict({"blocks": torch.nn.ModuleList([layer])})
    hijack.load(model, path, strict=False)
    dense = load_file(source)["blocks.0.proj.weight"].float()
    error = hijack.unwrap(model).blocks[0].proj.weight.float() - dense
    assert error.norm() / dense.norm() < 0.04


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "musubi"),
        ({"block_size": "row"}, "musubi"),
        ({"block_size": (64, 128)}, "hijack"),
        ({"rules": "blocks.*.proj=32x32"}, "hijack"),
        ({"scale_dtype": torch.float8_e8m0fnu}, "hijack"),
    ],
)
def test_without_a_dialect_one_is_taken_that_has_words_for_it(
    source, tmp_path, given, expected
):
    """All layers in the scheme's first, or all in its own."""
    path = tmp_path / "q.safetensors"
    report = hijack.quantize_file(source, path, **given)
    claims = hijack.identify(path).claims().values()
    assert len(claims) == 2
    assert {claim.dialect for claim in claims} == {report.dialect} == {expected}
    assert f"dialect {expected}" in str(report)


def test_progress_is_called_after_each_layer(source, tmp_path):
    """The callback gets counts and names."""
    seen = []
    hijack.quantize_file(
        source, tmp_path / "q.safetensors", progress=lambda *call: seen.append(call)
    )
    assert [call[:2] for call in seen] == [(1, 2), (2, 2)]
    assert {call[2] for call in seen} == {"blocks.0.proj", "blocks.0.odd"}


def broken(source, **changes):
    """The source with other tensors, in its place."""
    save_file({**load_file(source), **changes}, source)


def refused(source, tmp_path, error, message, **options):
    """Check a refusal, and that it left the old destination alone."""
    path = tmp_path / "q.safetensors"
    path.write_bytes(b"old")
    with pytest.raises(error, match=message):
        hijack.quantize_file(source, path, **options, overwrite=True)
    assert path.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(
        {path.name, source.name}
    )


def test_non_finite_weights_are_refused_with_the_layer_s_name(source, tmp_path):
    """One NaN in one layer ends the job, and nothing is written."""
    weight = load_file(source)["blocks.0.odd.weight"]
    weight[3, 3] = float("nan")
    broken(source, **{"blocks.0.odd.weight": weight})
    refused(
        source, tmp_path, NonFiniteError, r"blocks\.0\.odd: weight holds inf or NaN"
    )


def test_a_quantized_source_is_refused(source, tmp_path):
    """Quantizing codes again would be garbage."""
    codes = torch.ones(32, 50).to(torch.float8_e4m3fn)
    scale = torch.ones(32, 1)
    broken(source, **{"blocks.0.odd.weight": codes, "blocks.0.odd.scale_weight": scale})
    refused(source, tmp_path, CheckpointError, r"quantized already \(blocks\.0\.odd\)")


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize(
    ("name", "shards", "match"),
    [
        ("folder", None, "is a folder, expected a file name"),
        (
            "none/x",
            None,
            r"cannot be written; .*none is not a folder; make it",
        ),
        (
            "none/x",
            1 << 30,
            r"cannot be written; .*none is not a folder; make",
        ),
        ("x" * 256, None, "cannot be written; File name too long"),
        ("x" * 230, 1 << 30, "cannot be written; File name too long"),
        ("a\0b", None, r"a\\x00b': is not a valid file name"),
    ],
)
def test_no_file_can_be_written_there(source, tmp_path, name, shards, match, dry_run):
    """It is said before any work is done, and by a dry run too."""
    (tmp_path / "folder").mkdir()
    coded = tmp_path / "coded"
    hijack.quantize_file(source, coded)
    with pytest.raises(CheckpointError, match=match):
        hijack.quantize_file(
            source, f"{tmp_path}/{name}", max_shard_size=shards, dry_run=dry_run
        )
    if shards is None:
        with pytest.raises(CheckpointError, match=match):
            hijack.convert_file(coded, f"{tmp_path}/{name}", "deepseek")


@pytest.mark.parametrize(
    "endings",
    [
        ("lora_A.weight", "lora_B.weight"),
        ("lora_down.weight", "lora_up.weight", "alpha", "diff_b"),
        ("lokr_w1", "lokr_w2"),
        ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    ],
)
def test_a_lora_is_no_checkpoint(tmp_path, endings):
    """It is refused unless its layers are named; a checkpoint beside it is not."""
    path, done = tmp_path / "l.safetensors", tmp_path / "q.safetensors"
    parts = {
        f"a.{end}": torch.ones(*[64] * (2 - (end in "alpha diff_b"))) for end in endings
    }
    save_file(parts, path)
    refused(path, tmp_path, CheckpointError, r"is a LoRA; .*--lora\), or .*--include")
    save_file({**parts, "up.weight": torch.ones(64, 64)}, path)
    assert "up" in hijack.quantize_file(path, done, overwrite=True).layers


def test_the_layers_of_a_lora_can_be_named(tmp_path):
    """Then they are quantized like any other."""
    path = tmp_path / "l.safetensors"
    save_file({f"a.lora_{part}.weight": torch.ones(64, 64) for part in "AB"}, path)
    done = hijack.quantize_file(path, tmp_path / "q.safetensors", include="*lora_A")
    assert done.layers == ("a.lora_A",)


def test_wrong_arguments_are_refused(source, tmp_path):
    """Each says what was wrong."""
    refused(
        source, tmp_path, CheckpointError, r"'bloks\.\*' matches no", include="bloks.*"
    )
    refused(source, tmp_path, CheckpointError, "no layer is left", exclude="*")
    able = r"unknown dialect 'x'; expected one of .*, deepseek, hijack, musubi, torchao"
    refused(source, tmp_path, CheckpointError, able, dialect="x")
    refused(source, tmp_path, SchemeError, "unknown scheme 'x'", scheme="x")
    refused(source, tmp_path, SchemeError, "block_size", block_size=(0, 64))
    refused(source, tmp_path, SchemeError, "no_such", no_such=1)
    refused(source, tmp_path, CheckpointError, "none: cannot be", loras=["none:1"])
    refused(source, tmp_path, CheckpointError, "device: 'x' cannot be", device="x")
    words = {"device": "meta"}
    refused(source, tmp_path, CheckpointError, "device: 'meta' cannot be", **words)
    refused(source, tmp_path, CheckpointError, "workers: got 0, expected", workers=0)
    words = {"dialect": "musubi", "block_size": (32, 32)}
    refused(source, tmp_path, CheckpointError, "dialect musubi: cannot", **words)
    refused(source, tmp_path, CheckpointError, "not written; exp", dialect="kijai")


def test_the_source_is_never_overwritten(source, tmp_path):
    """Writing onto the source, under any of its names, is refused."""
    before = source.read_bytes()
    link = tmp_path / "link.safetensors"
    os.link(source, link)
    for path in (source, link):
        with pytest.raises(CheckpointError, match="is the source itself"):
            hijack.quantize_file(source, path)
    assert source.read_bytes() == before


def test_the_index_of_shards_is_never_overwritten(source, tmp_path):
    """It is a source too, although no tensor lies in it."""
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"table": source.name}}))
    before = index.read_bytes()
    with pytest.raises(CheckpointError, match="is the source itself"):
        hijack.quantize_file(index, index, max_shard_size="1GB")
    with pytest.raises(CheckpointError, match="is the name of an index"):
        hijack.quantize_file(index, index)
    assert index.read_bytes() == before
    hijack.quantize_file(index, tmp_path / "q.safetensors")


@pytest.mark.skipif(sys.platform == "win32", reason="no limits of file sizes here")
def test_a_disk_that_is_full_leaves_the_old_file(source, tmp_path):
    """The system refuses to write on: one clear error, and nothing is left behind."""
    path = tmp_path / "q.safetensors"
    path.write_bytes(b"old")
    script = (
        "import resource, sys, hijack, schemes.blockwise_fp8\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))\n"
        "hijack.quantize_file(*sys.argv[1:], overwrite=True)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, source, path], capture_output=True, text=True
    )
    assert "CheckpointError" in done.stderr
    assert f"{path}: cannot be written; File too large" in done.stderr
    assert path.read_bytes() == b"old"
    assert {p.name for p in tmp_path.iterdir()} == {path.name, source.name}


def test_memory_is_bounded_whatever_the_size_of_a_layer(tmp_path):
    """Quantizing a layer of 128 MB takes a few rows of it at a time.

    Each thread holds some: the number of threads is given, not that of the cores.
    """
    path = tmp_path / "big.safetensors"
    weight = torch.randn(2048, 2048).bfloat16()
    save_file({"l.weight": weight.repeat(16, 1)}, path)
    script = (
        "import resource, sys, torch, hijack, schemes.blockwise_fp8\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "hijack.quantize_file(sys.argv[2], sys.argv[3])\n"  # warms up
        "before = peak()\n"
        "hijack.quantize_file(sys.argv[1], sys.argv[3], workers=2, overwrite=True)\n"
        "print(peak() - before)\n"
    )
    small = tmp_path / "small.safetensors"
    save_file({"l.weight": weight}, small)
    done = subprocess.run(
        [sys.executable, "-c", script, path, small, tmp_path / "q.safetensors"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    scale = 1 if sys.platform == "darwin" else 1024
    assert int(done.stdout) * scale < 32e6


class LinearOnly(hijack.Scheme):
    """A toy that takes Linear layers of an even width."""

    name = "linear_only"

    def quantize(self, weight):
        """Halve the numbers' bits."""
        return weight.to(torch.float8_e4m3fn), {"weight_mark": weight.new_ones(1)}

    def dequantize(self, qdata, params, dtype):
        """Widen."""
        return qdata.to(dtype)

    def declines(self, shape):
        """Odd widths."""
        return f"width {shape[1]} is odd" if shape[1] % 2 else None


def test_targets_of_the_scheme_hold_and_the_result_loads(tmp_path):
    """What is no target stays dense, and so does what the scheme declines."""

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed_tokens = nn.Embedding(16, 8)
            self.conv = nn.Conv2d(4, 8, 3)
            self.inner = nn.Linear(8, 8)
            self.odd = nn.Linear(9, 8)

    dense, path = tmp_path / "dense.safetensors", tmp_path / "q.safetensors"
    save_file(Model().state_dict(), dense)
    with registered(LinearOnly()):
        report = hijack.quantize_file(dense, path, "linear_only", include="*")
        assert report.layers == ("inner",)
        assert report.skipped == {
            "conv": "looks like Conv2d; the scheme quantizes Linear",
            "embed_tokens": "looks like Embedding; the scheme quantizes Linear",
            "odd": "width 9 is odd",
        }
        assert len(hijack.load(Model(), path).layers) == 1
