"""convert: dialects change, numbers and everything else do not."""

import json
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import hijack
from hijack.errors import (
    AmbiguousError,
    CheckpointError,
    SchemeError,
    UnconsumedScaleError,
)
from hijack.formats import matching
from hijack.safetensors_io.reader import open_tensors, read_header
from schemes.blockwise_fp8 import BlockwiseFP8

SCHEME = BlockwiseFP8()
WRITTEN = ("musubi", "comfy_quant", "deepseek", "compressed_tensors", "torchao")
SHAPES = {"q": (128, 256), "k": (96, 96), "v": (130, 64), "z": (64, 128)}


def dense_file(path, shapes=SHAPES):
    """A small dense model, with a layer of zeros, a norm, a bias and metadata."""
    torch.manual_seed(0)
    tensors = {
        f"blocks.{i}.{name}.weight": torch.randn(shape).bfloat16()
        for i in range(2)
        for name, shape in shapes.items()
    }
    first = next(iter(tensors))
    tensors[first].zero_()
    tensors["norm.weight"] = torch.randn(64)
    tensors[first.replace("weight", "bias")] = torch.randn(128).bfloat16()
    save_file(tensors, path, {"format": "pt", "title": "ein Käse"})
    return path


@pytest.fixture
def musubi(tmp_path):
    """A file in musubi-tuner's dialect."""
    path = tmp_path / "musubi.safetensors"
    hijack.quantize_file(dense_file(tmp_path / "dense.safetensors"), path)
    return path


def decoded(path):
    """Layer to its weight in float32."""
    header = read_header(path)
    tensors = open_tensors(header)
    return {
        layer: SCHEME.dequantize(
            *matching.decode(SCHEME, claim, tensors), torch.float32
        )
        for layer, claim in hijack.identify(header).claims().items()
    }


def same_weights(one, two):
    """Whether two files decode to the same bits."""
    first, second = decoded(one), decoded(two)
    return first.keys() == second.keys() and all(
        torch.equal(first[name], second[name]) for name in first
    )


# -- without loss ----------------------------------------------------------------------


def test_musubi_to_deepseek_and_back_is_byte_identical(musubi, tmp_path):
    """1 x 64 blocks, rows, zeros, order, metadata: all as it was."""
    there, back = tmp_path / "deepseek.safetensors", tmp_path / "back.safetensors"
    report = hijack.convert_file(musubi, there, "deepseek")
    keys = load_file(there).keys()
    assert "blocks.0.q.weight_scale_inv" in keys
    assert not any("scale_weight" in key for key in keys)
    assert set(report.reblocked) == {"blocks.0.k", "blocks.1.k"}  # rows, in 2 blocks
    assert report.requantized == {}
    hijack.convert_file(there, back, "musubi")
    assert back.read_bytes() == musubi.read_bytes()


@pytest.mark.parametrize(
    "dialect", ["deepseek", "compressed_tensors", "torchao", "hijack"]
)
def test_no_conversion_changes_a_weight(musubi, tmp_path, dialect):
    """There, and back again."""
    there, back = tmp_path / "there.safetensors", tmp_path / "back.safetensors"
    hijack.convert_file(musubi, there, dialect)
    claims = hijack.identify(there).claims()
    assert {claim.dialect for claim in claims.values()} == {dialect}
    assert same_weights(musubi, there)
    hijack.convert_file(there, back, "musubi")
    assert same_weights(musubi, back)


@pytest.mark.parametrize("source", WRITTEN)
@pytest.mark.parametrize("target", WRITTEN)
def test_one_scale_for_a_weight_goes_everywhere(tmp_path, source, target):
    """Per-tensor files convert between all dialects that are written."""
    dense = dense_file(tmp_path / "dense.safetensors")
    paths = [tmp_path / f"{name}.safetensors" for name in ("one", "two")]
    hijack.quantize_file(dense, paths[0], dialect=source, block_size="tensor")
    hijack.convert_file(paths[0], paths[1], target)
    assert same_weights(*paths)
    assert hijack.identify(paths[1]).clear
    if target == "deepseek":  # which has no blocks then, and says so
        scales = [t for k, t in load_file(paths[1]).items() if "scale" in k]
        assert scales
        assert all(scale.shape == () for scale in scales)


def test_everything_else_is_kept_byte_for_byte(musubi, tmp_path):
    """Norms, biases, metadata; markers of the old dialect go, of the new come."""
    there = tmp_path / "there.safetensors"
    hijack.convert_file(musubi, there, "compressed_tensors")
    before, after = load_file(musubi), load_file(there)
    for key in ("norm.weight", "blocks.0.q.bias"):
        assert torch.equal(before[key], after[key])
        assert before[key].dtype == after[key].dtype
    with safe_open(there, "pt") as file:
        metadata = file.metadata()
    assert metadata["title"] == "ein Käse"
    config = json.loads(metadata["quantization_config"])
    assert config["quant_method"] == "compressed-tensors"
    assert "norm" in config["ignore"]
    hijack.convert_file(there, musubi, "musubi", overwrite=True)
    with safe_open(musubi, "pt") as file:
        assert file.metadata() == {"format": "pt", "title": "ein Käse"}


def test_the_config_is_written_beside_the_file_only_if_asked_for(musubi, tmp_path):
    """It joins what the source's config says; no half-written file is left."""
    (tmp_path / "config.json").write_text('{"model_type": "qwen", "n": [1, 2]}')
    folder = tmp_path / "out"
    folder.mkdir()
    hijack.convert_file(musubi, folder / "a.safetensors", "deepseek")
    assert [path.name for path in folder.iterdir()] == ["a.safetensors"]
    hijack.convert_file(
        musubi, folder / "a.safetensors", "deepseek", write_config=True, overwrite=True
    )
    config = json.loads((folder / "config.json").read_text())
    assert (config["model_type"], config["n"]) == ("qwen", [1, 2])
    assert config["quantization_config"]["weight_block_size"] == [1, 64]
    assert len(list(folder.iterdir())) == 2
    with pytest.raises(CheckpointError, match="torchao has no quantization_config"):
        hijack.convert_file(
            musubi, folder / "b.safetensors", "torchao", write_config=True
        )
    assert len(list(folder.iterdir())) == 2


def test_the_config_of_the_source_is_not_replaced(musubi, tmp_path):
    """The source would be read by it no longer."""
    folder = tmp_path / "out"
    folder.mkdir()
    path, other = folder / "a.safetensors", folder / "b.safetensors"
    hijack.convert_file(musubi, path, "deepseek", write_config=True)
    said = (folder / "config.json").read_bytes()
    with pytest.raises(
        CheckpointError, match=r"config\.json: would be beside the source"
    ):
        hijack.convert_file(path, other, "compressed_tensors", write_config=True)
    assert (folder / "config.json").read_bytes() == said
    assert not other.exists()


def test_ragged_blocks_stay_what_they_are(tmp_path):
    """576 x 320 in blocks of 128 x 128, and in other dialects the same numbers."""
    dense, one, two = (tmp_path / f"{n}.safetensors" for n in ("dense", "one", "two"))
    save_file({"a.weight": torch.randn(576, 320).bfloat16()}, dense)
    hijack.quantize_file(dense, one, dialect="deepseek")
    assert load_file(one)["a.weight_scale_inv"].shape == (5, 3)
    assert hijack.identify(one).claims()["a"].block_size == (128, 128)
    for dialect in ("compressed_tensors", "hijack"):
        hijack.convert_file(one, two, dialect, overwrite=True)
        assert same_weights(one, two)
        assert hijack.identify(two).claims()["a"].block_size == (128, 128)
    hijack.convert_file(one, two, "torchao", overwrite=True)  # which must divide
    assert hijack.identify(two).claims()["a"].block_size == (64, 64)
    assert same_weights(one, two)


def test_mxfp8_moves_between_the_two_orders_of_its_scales(tmp_path):
    """ComfyUI's tiles and padding, plain order elsewhere; the bits stay."""
    dense, one, two = (tmp_path / f"{n}.safetensors" for n in ("dense", "one", "two"))
    save_file({"a.weight": torch.randn(40, 96), "a.bias": torch.zeros(40)}, dense)
    options = {"scale_dtype": torch.float8_e8m0fnu}
    hijack.quantize_file(dense, one, dialect="comfy_quant", **options)
    stored = load_file(one)
    assert stored["a.weight"].shape == (64, 96)
    assert stored["a.weight_scale"].shape == (128, 4)
    hijack.convert_file(one, two, "compressed_tensors")
    plain = load_file(two)
    assert plain["a.weight"].shape == (40, 96)
    assert plain["a.weight_scale"].shape == (40, 3)
    assert plain["a.weight_scale"].dtype == torch.uint8
    assert same_weights(one, two)
    back = tmp_path / "back.safetensors"
    hijack.convert_file(two, back, "comfy_quant")
    again = load_file(back)
    assert again.keys() == stored.keys()
    assert all(
        torch.equal(again[key].view(torch.uint8), stored[key].view(torch.uint8))
        for key in stored
    )


@pytest.mark.parametrize(
    "target", ["musubi", "compressed_tensors", "torchao", "hijack"]
)
@pytest.mark.parametrize(("size", "blocks"), [((1, 32), (1, 32)), ("row", (1, 128))])
def test_the_blocks_asked_for_are_those_written(tmp_path, target, size, blocks):
    """Or the layers that do not give them are refused."""
    dense = dense_file(tmp_path / "dense.safetensors", {"v": (64, 128), "z": (96, 128)})
    source, result = tmp_path / "q.safetensors", tmp_path / "r.safetensors"
    hijack.quantize_file(dense, source, dialect="deepseek", block_size="tensor")
    report = hijack.convert_file(source, result, target, block_size=size)
    assert set(report.layers.values()) == {blocks}
    assert same_weights(source, result)
    hijack.quantize_file(dense, source, block_size=size, overwrite=True)
    with pytest.raises(CheckpointError, match=r"z: its blocks of .* do not give"):
        hijack.convert_file(source, result, target, block_size="tensor")


# -- refusals and loss -----------------------------------------------------------------


def test_blocks_the_dialect_lacks_are_refused_by_name(musubi, tmp_path):
    """ComfyUI has one scale for a weight; nothing is written."""
    there = tmp_path / "there.safetensors"
    with pytest.raises(
        CheckpointError, match=r"of 8 layers cannot be.*blocks\.0\.k.*--requantize"
    ):
        hijack.convert_file(musubi, there, "comfy_quant")
    with pytest.raises(
        CheckpointError, match="dialect kijai: can be read, not written"
    ):
        hijack.convert_file(musubi, there, "kijai", requantize=True)
    assert not there.exists()


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("gone", [False, True])
def test_a_source_that_is_changed_meanwhile_is_noticed(musubi, tmp_path, gone, last):
    """The result would be made of two checkpoints."""

    def change(done, total, layer):
        if last == (done == total):
            musubi.unlink(missing_ok=True) if gone else os.utime(musubi, ns=(1, 1))

    match = "changed while it was read"
    if gone and not last:
        match = "cannot be read; No such file"
    with pytest.raises(CheckpointError, match=match):
        hijack.convert_file(musubi, tmp_path / "o", "deepseek", progress=change)
    assert not (tmp_path / "o").exists()


def test_scales_of_two_kinds_are_refused_by_name(tmp_path):
    """DeepSeek has floats or exponents in a file; the message names a layer of each."""
    dense, source = tmp_path / "dense.safetensors", tmp_path / "q.safetensors"
    paths = []
    for number, scale in enumerate((torch.float32, torch.float8_e8m0fnu)):
        save_file({f"l{number}.weight": torch.randn(64, 64)}, dense)
        paths.append(tmp_path / f"{number}.safetensors")
        options = {"block_size": 32, "scale_dtype": scale}
        hijack.quantize_file(dense, paths[-1], dialect="hijack", **options)
    hijack.convert_file(paths, source, "hijack")
    with pytest.raises(
        CheckpointError, match=r"l0 has floats .*, l1 has exponents for"
    ):
        hijack.convert_file(source, dense, "deepseek")


def test_requantizing_is_not_proposed_where_it_cannot_help(musubi, tmp_path):
    """The blocks that were asked for cannot be written at all."""
    with pytest.raises(CheckpointError, match=r"cannot be converted: .*; choose") as e:
        hijack.convert_file(
            musubi, tmp_path / "o", "comfy_quant", requantize=True, block_size=(2, 2)
        )
    assert "--requantize" not in str(e.value)


def test_options_nobody_has_are_refused(musubi, tmp_path):
    """A slip of the pen is no default."""
    for options in ({"blocksize": 32}, {"block_size": (0, 1)}):
        with pytest.raises(SchemeError, match=r"'blocksize'; expected op|got \(0, 1\)"):
            hijack.convert_file(musubi, tmp_path / "o", "deepseek", **options)
    assert not (tmp_path / "o").exists()


def test_requantizing_reports_the_loss(musubi, tmp_path):
    """Against what the source decodes to, for those layers and no others."""
    there = tmp_path / "there.safetensors"
    report = hijack.convert_file(musubi, there, "comfy_quant", requantize=True)
    zeros = "blocks.0.q"
    assert zeros not in report.requantized  # all its scales are equal
    assert set(report.layers) - set(report.requantized) == {zeros}
    loss = report.requantized["blocks.1.q"]
    wanted, got = decoded(musubi)["blocks.1.q"], decoded(there)["blocks.1.q"]
    error = (got.double() - wanted.double()).square()
    assert loss.rmse == pytest.approx(error.mean().sqrt().item())
    assert 25 < loss.sqnr < 40
    assert "requantized, the worst" in str(report)


def test_scales_of_inputs_are_not_lost_silently(tmp_path):
    """musubi has no place for them; ComfyUI has."""
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    weight = torch.randn(8, 8).to(torch.float8_e4m3fn)
    legacy = {
        "a.weight": weight,
        "a.scale_weight": torch.tensor(0.5),
        "a.scale_input": torch.tensor(2.0),
        "scaled_fp8": torch.empty(0, dtype=torch.float8_e4m3fn),
    }
    save_file(legacy, one)
    hijack.convert_file(one, two, "comfy_quant")
    after = load_file(two)
    assert after["a.input_scale"] == 2.0
    assert "scaled_fp8" not in after
    with pytest.raises(
        CheckpointError, match=r"a\.scale_input: is an activation scale"
    ):
        hijack.convert_file(one, two, "musubi")
    report = hijack.convert_file(
        one, two, "musubi", drop_input_scales=True, overwrite=True
    )
    assert report.dropped == ("a.scale_input",)
    assert set(load_file(two)) == {"a.weight", "a.scale_weight"}


def test_foreign_layers_are_carried_along(musubi, tmp_path):
    """A file may mix formats; what no scheme reads is copied and named."""
    one, two = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    marker = torch.tensor(list(b'{"format": "awq_w4a16"}'), dtype=torch.uint8)
    extra = {
        "n.weight": torch.ones(4, 4, dtype=torch.int8),
        "n.weight_scale": torch.tensor(1.0),
        "n.comfy_quant": marker,
    }
    save_file({**load_file(musubi), **extra}, one)
    report = hijack.convert_file(one, two, "deepseek")
    assert report.unsupported == {"n": "comfy_quant of another kind"}
    after = load_file(two)
    assert all(torch.equal(after[key], extra[key]) for key in extra)


def test_what_cannot_be_read_is_not_converted(tmp_path):
    """Orphans, dense files, ambiguous ones, and the source itself."""
    path, out = tmp_path / "x.safetensors", tmp_path / "out.safetensors"
    save_file({"a.weight": torch.ones(4, 4)}, path)
    with pytest.raises(CheckpointError, match="no layer is in a format"):
        hijack.convert_file(path, out, "musubi")
    with pytest.raises(CheckpointError, match="is the source itself"):
        hijack.convert_file(path, path, "musubi")
    fp8 = torch.ones(192, 64).to(torch.float8_e4m3fn)
    save_file({"a.weight": fp8, "b.weight_scale_inv": torch.ones(2, 1)}, path)
    with pytest.raises(UnconsumedScaleError, match=r"b\.weight_scale_inv"):
        hijack.convert_file(path, out, "musubi")
    save_file({"a.weight": fp8, "a.weight_scale_inv": torch.ones(2, 1)}, path)
    with pytest.raises(AmbiguousError, match=r"deepseek 128x64 or deepseek 96x64"):
        hijack.convert_file(path, out, "musubi")
    hijack.convert_file(path, out, "hijack", assume=["128x64"])
    assert hijack.identify(out).claims()["a"].block_size == (128, 64)
    with pytest.raises(CheckpointError, match=r"assume: '4x4' chooses nothing"):
        hijack.convert_file(path, out, "hijack", assume=["4x4"])


def test_a_name_that_is_taken_is_refused(tmp_path):
    """The new key must not overwrite another tensor."""
    path, out = tmp_path / "x.safetensors", tmp_path / "out.safetensors"
    fp8 = torch.ones(4, 64).to(torch.float8_e4m3fn)
    taken = {"a._weight_qdata": torch.ones(1)}
    save_file({"a.weight": fp8, "a.scale_weight": torch.ones(4, 1, 1), **taken}, path)
    with pytest.raises(CheckpointError, match=r"_weight_qdata: dialect torchao would"):
        hijack.convert_file(path, out, "torchao")


# -- blocks ----------------------------------------------------------------------------


@given(
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.tuples(st.integers(1, 8), st.integers(1, 8)),
    st.tuples(st.integers(1, 20), st.integers(1, 20)),
    st.booleans(),
    st.integers(0, 2**31),
)
@settings(max_examples=200, deadline=None)
def test_other_blocks_decode_to_the_same_weight_or_are_refused(
    shape, size, wanted, equal, seed
):
    """Never another number, whether blocks divide each other or not."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=random)
    qdata, params = SCHEME.quantize(weight, block_size=size)
    if equal:
        params["weight_scale"].fill_(0.5)
    changed = SCHEME.reblock(qdata, params, wanted)
    if equal:
        assert changed is not None
    if changed is not None:
        one = SCHEME.dequantize(qdata, params, torch.float32)
        assert torch.equal(one, SCHEME.dequantize(qdata, changed, torch.float32))
        clipped = tuple(map(min, wanted, shape))
        assert SCHEME.block_size(qdata, changed) == clipped


def test_a_scheme_without_blocks_knows_no_others():
    """The default of `Scheme.reblock` refuses."""

    class Plain(hijack.Scheme):
        name = "plain"

        def quantize(self, weight, **options):
            return weight, {}

        def dequantize(self, qdata, params, dtype):
            return qdata.to(dtype)

    assert Plain().reblock(torch.ones(2, 2), {}, (1, 1)) is None
    assert Plain().block_size(torch.ones(2, 2), {}) is None


def test_convert_writes_shards_and_reads_them_back(musubi, tmp_path):
    """Shards hold what one file would; converting them back gives the file again."""
    index = tmp_path / "sharded" / "model.safetensors.index.json"
    index.parent.mkdir()
    hijack.convert_file(musubi, index, "deepseek", max_shard_size="20KB")
    assert len(list(index.parent.glob("*.safetensors"))) > 2
    assert max(p.stat().st_size for p in index.parent.glob("*.safetensors")) < 40_000
    assert decoded(index).keys() == decoded(musubi).keys()
    back = tmp_path / "back.safetensors"
    hijack.convert_file(index, back, "musubi")
    assert load_file(back).keys() == load_file(musubi).keys()
    assert all(
        torch.equal(dense, decoded(back)[layer])
        for layer, dense in decoded(musubi).items()
    )


def test_shards_that_are_read_are_not_replaced(musubi, tmp_path):
    """The source's index and shards stay, also where the new ones have other names."""
    index = tmp_path / "model.safetensors.index.json"
    hijack.convert_file(musubi, index, "deepseek", max_shard_size="20KB")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(CheckpointError, match="is the source itself"):
        hijack.convert_file(
            index, tmp_path / "model.safetensors", "musubi", max_shard_size="1GB"
        )
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_exponents_are_bytes_in_files_of_compressed_tensors(tmp_path):
    """Quantized there, they are float8_e8m0fnu until they are written."""
    dense, path = tmp_path / "dense.safetensors", tmp_path / "out.safetensors"
    save_file({"a.weight": torch.randn(8, 64)}, dense)
    options = {"block_size": "1x32", "scale_dtype": torch.float8_e8m0fnu}
    hijack.quantize_file(dense, path, dialect="compressed_tensors", **options)
    assert load_file(path)["a.weight_scale"].dtype == torch.uint8
