"""`quantize_file` as a whole: LoRAs, casts, shards, threads, changed sources."""

import json
import os
import threading
from collections import Counter

import pytest
import torch
from safetensors.torch import load_file, save_file

import hijack
import schemes.mxfp4
import schemes.nvfp4  # noqa: F401 - registers the scheme
from hijack.checkpoint import quantize_plan, quantize_run
from hijack.checkpoint.quantize_plan import QuantizePlan
from hijack.errors import CheckpointError, NonFiniteError, SchemeError
from hijack.formats.dialect import Dialect
from hijack.safetensors_io import atomic
from hijack.safetensors_io.reader import open_tensors, read_header
from schemes import int8
from schemes.blockwise_fp8 import BlockwiseFP8

LAYERS = 6


@pytest.fixture
def source(tmp_path):
    """A bfloat16 checkpoint of a few layers."""
    torch.manual_seed(0)
    tensors = {f"l{i}.weight": torch.randn(32, 128).bfloat16() for i in range(LAYERS)}
    tensors |= {f"l{i}.bias": torch.randn(32).bfloat16() for i in range(LAYERS)}
    path = tmp_path / "dense.safetensors"
    save_file(tensors, path, {"k": "v"})
    return path


@pytest.fixture
def lora(tmp_path):
    """A LoRA of two layers, one of them with a bias.

    Its numbers have few digits: float32 holds every sum of their products exactly, so
    the merged bits are the same on all processors.
    """
    torch.manual_seed(1)
    tensors = {}
    for layer in ("l1", "l2"):
        tensors[f"{layer}.lora_A.weight"] = torch.randint(-16, 17, (4, 128)) / 8
        tensors[f"{layer}.lora_B.weight"] = torch.randint(-16, 17, (32, 4)) / 8
    tensors["l2.diff_b"] = torch.randn(32)
    path = tmp_path / "lora.safetensors"
    save_file(tensors, path)
    return path


def same(a, b):
    """Equal dtype, shape and bits."""
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8),
        b.contiguous().reshape(-1).view(torch.uint8),
    )


def equal(a, b):
    """Whether two checkpoints have the same tensors."""
    return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)


def names(folder):
    """What lies in a folder."""
    return sorted(path.name for path in folder.iterdir())


# -- LoRAs and dtypes ------------------------------------------------------------------


def merged(source, lora, strength):
    """The weights of a checkpoint in float32, with a LoRA."""
    tensors, parts = load_file(source), load_file(lora)
    tensors = {key: tensor.float() for key, tensor in tensors.items()}
    for layer in ("l1", "l2"):
        up, down = (parts[f"{layer}.lora_{part}.weight"] for part in "BA")
        tensors[f"{layer}.weight"] += strength * (up @ down)
    tensors["l2.bias"] += strength * parts["l2.diff_b"]
    return tensors


def test_loras_are_merged_in_full_precision_first(source, lora, tmp_path):
    """Codes are those of the float32 weight, scales have the source's dtype."""
    path = tmp_path / "q.safetensors"
    report = hijack.quantize_file(source, path, loras=[f"{lora}:0.5"])
    assert set(report.merged) == {"l1.weight", "l2.weight", "l2.bias"}
    assert "LoRAs merged into 3 tensors" in str(report)
    made, expected = load_file(path), merged(source, lora, 0.5)
    for layer in ("l0", "l1", "l2"):
        weight = expected[f"{layer}.weight"].view(32, 2, 64)
        scale = (weight.abs().amax(-1, keepdim=True) / 448).bfloat16()
        codes = (weight / scale.float()).clamp(-448, 448).to(torch.float8_e4m3fn)
        assert same(made[f"{layer}.scale_weight"], scale)
        assert same(made[f"{layer}.weight"], codes.view(32, 128))


def test_loras_are_given_alone_or_by_an_iterator(source, lora, tmp_path):
    """However they are given, all of them are merged."""
    wanted, path = tmp_path / "wanted.safetensors", tmp_path / "q.safetensors"
    hijack.quantize_file(source, wanted, loras=[lora])
    for given in (str(lora), lora, (lora, 1.0), iter([lora])):
        hijack.quantize_file(source, path, loras=given, overwrite=True)
        assert path.read_bytes() == wanted.read_bytes()


def test_a_merged_tensor_that_is_not_quantized_keeps_its_dtype(source, lora, tmp_path):
    """Biases and excluded layers are rounded once; all others are copied."""
    path = tmp_path / "q.safetensors"
    hijack.quantize_file(source, path, loras=[(lora, 2.0)], exclude="l1")
    made, expected = load_file(path), merged(source, lora, 2.0)
    for key in ("l1.weight", "l1.bias", "l2.bias", "l3.bias"):
        assert same(made[key], expected[key].bfloat16())


class Rounded(hijack.Scheme):
    """A scheme that knows nothing of dtypes: its scale has the weight's."""

    name = "rounded"

    def quantize(self, weight, **options):
        """One scale for each row, of the weight's dtype."""
        scale = weight.abs().amax(1, keepdim=True)
        return (weight / scale * 127).round().to(torch.int8), {"weight_scale": scale}

    def dequantize(self, qdata, params, dtype):
        """Back again."""
        return (qdata.float() * params["weight_scale"].float() / 127).to(dtype)


def test_a_scheme_that_cannot_choose_gets_the_source_s_dtype(source, lora, tmp_path):
    """The result is what quantizing a merged checkpoint gives."""
    path, other = tmp_path / "q.safetensors", tmp_path / "merged.safetensors"
    save_file({k: t.bfloat16() for k, t in merged(source, lora, 1.0).items()}, other)
    hijack.quantize_file(source, path, Rounded(), loras=[lora])
    hijack.quantize_file(other, tmp_path / "q2.safetensors", Rounded())
    assert equal(load_file(path), load_file(tmp_path / "q2.safetensors"))


def test_loras_for_another_model_are_refused_unless_ignored(source, lora, tmp_path):
    """What is left out is reported."""
    parts = load_file(lora)
    for key in [key for key in parts if "l1" in key]:
        parts[key.replace("l1", "other")] = parts[key].clone()
    save_file(parts, lora)
    path = tmp_path / "q.safetensors"
    with pytest.raises(CheckpointError, match="has no layer for other"):
        hijack.quantize_file(source, path, loras=[lora])
    report = hijack.quantize_file(source, path, loras=[lora], ignore_unmatched=True)
    assert report.unmatched == ("other",)
    assert "1 LoRAs of other layers left out" in str(report)


def test_loras_of_codes_are_refused(tmp_path, lora):
    """Weights cast to FP8 without a scale are nothing to merge into."""
    source = tmp_path / "codes.safetensors"
    codes = torch.randn(32, 128).to(torch.float8_e4m3fn)
    tensors = {"l1.weight": codes, "l2.weight": torch.randn(32, 128)}
    save_file({**tensors, "l2.bias": torch.randn(32)}, source)
    with pytest.raises(
        CheckpointError, match=r"l1\.weight: is F8_E4M3, expected a dens"
    ):
        hijack.quantize_file(source, tmp_path / "q.safetensors", loras=[lora])


def test_a_lora_is_never_overwritten(source, lora):
    """It is read until the end."""
    before = lora.read_bytes()
    with pytest.raises(CheckpointError, match="is the source itself"):
        hijack.quantize_file(source, lora, loras=[lora])
    assert lora.read_bytes() == before


def test_a_rule_writes_a_dense_layer_in_another_dtype(source, tmp_path):
    """Rounded to nearest; what does not fit is refused by name."""
    path = tmp_path / "q.safetensors"
    hijack.quantize_file(source, path, rules=["l0=f32", "l1=skip", "l2=row"])
    made, dense = load_file(path), load_file(source)
    assert same(made["l0.weight"], dense["l0.weight"].float())
    assert same(made["l1.weight"], dense["l1.weight"])
    assert made["l2.scale_weight"].shape == (32, 1)
    assert made["l3.scale_weight"].shape == (32, 2, 1)
    dense["l0.weight"][0, 0] = 1e30
    save_file(dense, source)
    with pytest.raises(NonFiniteError, match=r"l0\.weight: holds inf or NaN as F16"):
        hijack.quantize_file(source, path, rules="l0=f16", overwrite=True)


# -- plans and reports -----------------------------------------------------------------


def test_a_dry_run_says_everything_and_writes_nothing(source, lora, tmp_path):
    """Also the exact size of the files there would be."""
    path = tmp_path / "q.safetensors"
    words = {"loras": [lora], "rules": ["l0=skip", "l1=row"]}
    planned = hijack.quantize_file(source, path, dry_run=True, **words)
    assert names(tmp_path) == ["dense.safetensors", "lora.safetensors"]
    done = hijack.quantize_file(source, path, **words)
    assert planned.files == {"q.safetensors": path.stat().st_size} == done.files
    assert planned.blocks == {"1x64": 4, "1x128": 1} == done.blocks
    assert "5 layers would be quantized, 1 left dense" in str(planned)
    assert str(done) == str(planned).replace("would be quantized", "quantized")


def test_a_dry_run_refuses_what_a_run_would(source, tmp_path):
    """Whatever can be known from headers."""
    for words in ({"rules": "x=row"}, {"loras": ["none"]}, {"device": "nowhere"}):
        with pytest.raises(CheckpointError, match=r"x=row|none|nowhere"):
            hijack.quantize_file(source, tmp_path / "q", dry_run=True, **words)


def test_marks_that_are_no_longer_true_are_left_out(tmp_path):
    """Of a file that was quantized once, and made dense by another program."""
    source, path = tmp_path / "s.safetensors", tmp_path / "q.safetensors"
    said = {"format_version": "1.0", "layers": {"x": {"format": "float8_e4m3fn"}}}
    metadata = {"_quantization_metadata": json.dumps(said), "k": "v"}
    tensors = {"x.weight": torch.randn(4, 64), "scaled_fp8": torch.empty(0)}
    save_file(tensors, source, metadata)
    hijack.quantize_file(source, path)
    assert read_header(path).metadata == {"format": "pt", "k": "v"}
    assert load_file(path).keys() == {"x.weight", "x.scale_weight"}
    assert hijack.identify(path).claims()["x"].dialect == "musubi"


def test_tensors_that_mark_a_file_are_written(source, tmp_path):
    """Those that a dialect gives for the file as a whole."""
    path = tmp_path / "q.safetensors"
    hijack.quantize_file(source, path, dialect="comfy_quant")
    header = read_header(path)
    assert header.marker("l0.comfy_quant") == {"format": "float8_e4m3fn"}
    assert "_quantization_metadata" in header.metadata


def test_a_config_is_written_beside_the_result(source, tmp_path):
    """What the source's config says besides stays."""
    (source.parent / "config.json").write_text('{"model_type": "toy"}')
    path = tmp_path / "out" / "q.safetensors"
    path.parent.mkdir()
    hijack.quantize_file(source, path, dialect="deepseek", write_config=True)
    config = json.loads((path.parent / "config.json").read_text())
    assert config["model_type"] == "toy"
    assert config["quantization_config"]["quant_method"] == "fp8"
    assert names(path.parent) == ["config.json", "q.safetensors"]


def test_a_config_that_nobody_reads_or_the_source_has_is_not_written(source, tmp_path):
    """Before anything else is written."""
    path = tmp_path / "q.safetensors"
    with pytest.raises(CheckpointError, match="musubi has no quantization_config"):
        hijack.quantize_file(source, path, write_config=True)
    with pytest.raises(
        CheckpointError, match=r"config\.json: would be beside the source"
    ):
        hijack.quantize_file(source, path, dialect="deepseek", write_config=True)
    assert names(tmp_path) == ["dense.safetensors"]


@pytest.mark.parametrize("said", ["7", "true", '{"a": 1}', '"l0.weight"', "[[7]]"])
def test_a_list_in_the_metadata_that_is_none_is_nobody_s(source, tmp_path, said):
    """torchao lists the names of its tensors there; anything else is left alone."""
    dense, path = tmp_path / "said.safetensors", tmp_path / "q.safetensors"
    save_file(load_file(source), dense, {"tensor_names": said})
    hijack.quantize_file(dense, path)
    assert len(hijack.identify(path).layers) == LAYERS


def test_a_config_that_cannot_be_read_is_not_replaced(source, tmp_path):
    """What somebody wrote there would be lost; nothing else is written either."""
    path = tmp_path / "out" / "q.safetensors"
    path.parent.mkdir()
    there = path.parent / "config.json"
    there.write_text('{"model_type": "toy",}')
    with pytest.raises(CheckpointError, match=r"config\.json: is not a JSON object"):
        hijack.quantize_file(source, path, dialect="deepseek", write_config=True)
    assert there.read_text() == '{"model_type": "toy",}'
    assert names(path.parent) == ["config.json"]


def test_two_that_write_a_config_do_not_get_in_each_others_way(
    source, tmp_path, monkeypatch
):
    """The second waits for the first, and keeps what that wrote besides."""
    out, real = tmp_path / "out", atomic.replace
    out.mkdir()
    words = {"dialect": "deepseek", "write_config": True}
    entered, order = threading.Event(), []

    def replace(part, target):
        if target.name != "config.json":
            return real(part, target)
        if not entered.is_set():
            entered.set()
            second.join(0.3)  # it would be done if it did not wait
        order.append(json.loads(part.read_text())["quantization_config"])
        return real(part, target)

    def quantize(name, size):
        hijack.quantize_file(
            source, out / name, block_size=size, **words, overwrite=True
        )

    def follow():
        entered.wait()
        quantize("b.safetensors", 32)

    monkeypatch.setattr(atomic, "replace", replace)
    second = threading.Thread(target=follow)
    second.start()
    quantize("a.safetensors", 64)
    second.join()
    assert [table["weight_block_size"] for table in order] == [[1, 64], [1, 32]]
    table = json.loads((out / "config.json").read_text())["quantization_config"]
    assert table == order[1]
    assert names(out) == ["a.safetensors", "b.safetensors", "config.json"]


# -- shards ----------------------------------------------------------------------------


def test_shards_go_in_and_out(source, tmp_path):
    """And hold what a single file holds."""
    dense = tmp_path / "dense"
    dense.mkdir()
    tensors = load_file(source)
    halves = list(tensors)[: len(tensors) // 2]
    save_file({k: tensors[k] for k in halves}, dense / "a.safetensors", {"k": "v"})
    rest = {k: t for k, t in tensors.items() if k not in halves}
    save_file(rest, dense / "b.safetensors")
    index = dense / "m.safetensors.index.json"
    where = {
        key: "a.safetensors" if key in halves else "b.safetensors" for key in tensors
    }
    index.write_text(json.dumps({"weight_map": where}))

    single = tmp_path / "single.safetensors"
    hijack.quantize_file(source, single)
    out = tmp_path / "out" / "q.safetensors"
    out.parent.mkdir()
    report = hijack.quantize_file(index, out, max_shard_size="10KB")
    written = out.parent / "q.safetensors.index.json"
    header = read_header(written)
    assert header.metadata == {"format": "pt", "k": "v"}
    assert equal(dict(open_tensors(header)), load_file(single))
    assert report.files == {
        path.name: path.stat().st_size for path in out.parent.glob("*-of-*")
    }
    assert len(report.files) > 2


def test_shards_of_the_source_are_never_deleted(source, tmp_path):
    """An index that is replaced takes its shards with it."""
    path = tmp_path / "m.safetensors"
    shard = tmp_path / "m-00001-of-00001.safetensors"
    source.rename(shard)
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"l0.weight": shard.name}}))
    with pytest.raises(CheckpointError, match="is the source itself"):
        hijack.quantize_file(shard, path, max_shard_size="1GB")
    assert names(tmp_path) == [shard.name, index.name]


# -- threads ---------------------------------------------------------------------------


def test_any_number_of_threads_gives_the_same_file(source, lora, tmp_path):
    """And torch's own number of threads is what it was."""
    usual = torch.get_num_threads()
    files = []
    for workers in (None, 1, 2, 7):
        path = tmp_path / f"{workers}.safetensors"
        hijack.quantize_file(source, path, loras=[lora], workers=workers)
        files.append(path.read_bytes())
        assert torch.get_num_threads() == usual
    assert len(set(files)) == 1


SHAPES = {
    "even": ((256, 64), torch.bfloat16),
    "ragged": ((130, 70), torch.float16),
    "one_more": ((129, 128), torch.float32),
    "small": ((4, 64), torch.bfloat16),
    "conv": ((96, 8, 3, 3), torch.bfloat16),
}


@pytest.fixture
def many_shapes(tmp_path):
    """A checkpoint of weights whose rows are and are not whole parts; one at the root.

    Its path, in a folder of its own.
    """
    torch.manual_seed(0)
    tensors = {
        f"{name}.weight": torch.randn(shape).to(dtype)
        for name, (shape, dtype) in SHAPES.items()
    }
    tensors["weight"] = torch.randn(100, 96).bfloat16()
    path = tmp_path / "shapes" / "dense.safetensors"
    path.parent.mkdir()
    save_file(tensors, path)
    return path


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"block_size": (16, 32)},
        {"block_size": (128, 128), "dialect": "hijack"},
        {"block_size": "row", "scale_search": 4},
        {"block_size": "tensor"},
        {"block_size": (1, 32), "scale_dtype": torch.float8_e8m0fnu},
        {"stochastic": True, "seed": 3},
        {"dialect": "deepseek", "include": ["even", "one_more"]},
        {"dialect": "compressed_tensors", "include": "even"},
        {"scheme": "int8"},
        {"scheme": "int8", "block_size": (7, 20)},
        {"scheme": "int8", "rotation": 16, "include": ["even", "one_more"]},
        {"scheme": "int8", "stochastic": True},
        {"scheme": "nvfp4"},
        {"scheme": "mxfp4", "include": ["even", "ragged", "one_more"]},
    ],
    ids=str,
)
def test_weights_in_parts_give_the_same_file(
    many_shapes, tmp_path, monkeypatch, options
):
    """Whatever their size, and however many threads share a weight."""
    options = {"include": "*", **options}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    report = hijack.quantize_file(many_shapes, whole, **options)
    monkeypatch.setattr(quantize_plan, "PART", 700)
    monkeypatch.setattr(int8, "CHUNK", 900)
    seen = []
    again = hijack.quantize_file(
        many_shapes,
        parts,
        workers=3,
        progress=lambda *told: seen.append(told),
        **options,
    )
    assert whole.read_bytes() == parts.read_bytes()
    assert again.layers == report.layers
    assert {layer for _, _, layer in seen} == set(report.layers)
    count = len(report.layers)
    assert [told[:2] for told in seen] == [(i + 1, count) for i in range(count)]


def parts_of(path, monkeypatch, **options):
    """The layers that are quantized in parts, and in how many."""
    count = Counter()
    real = QuantizePlan.compute_part

    def counting(self, step, *words):
        count[step.layer] += 1
        return real(self, step, *words)

    with monkeypatch.context() as patch:
        patch.setattr(quantize_plan, "PART", 700)
        patch.setattr(QuantizePlan, "compute_part", counting)
        hijack.quantize_file(path, path.with_name("parts"), overwrite=True, **options)
    return dict(count)


def test_only_what_needs_no_other_rows_is_cut(many_shapes, monkeypatch):
    """Parts are whole rows of blocks; one scale for all of a weight needs all of it."""
    blocks = parts_of(many_shapes, monkeypatch)
    assert blocks["even"] == -(-256 // (700 // 64))
    assert "small" not in blocks
    wide = parts_of(many_shapes, monkeypatch, block_size=(100, 64), dialect="hijack")
    assert wide["one_more"] == 2
    assert parts_of(many_shapes, monkeypatch, scheme="int8")["even"] == blocks["even"]
    for whole in ({"block_size": "tensor"}, {"stochastic": True}, {"scheme": "nvfp4"}):
        assert not parts_of(many_shapes, monkeypatch, **whole)


class Reversing(Dialect):
    """Stores rows from the last to the first."""

    name = "reversing"

    def encode(self, qdata, params, options):
        """Copies, of the shapes that views would have."""
        return {name: t.flip(0) for name, t in {"weight": qdata, **params}.items()}


def test_a_dialect_that_needs_all_rows_gets_them(many_shapes, monkeypatch, tmp_path):
    """What it stores is not the scheme's bytes in their order."""
    monkeypatch.setattr(BlockwiseFP8, "dialects", (Reversing(),))
    words = {"dialect": "reversing", "include": "even"}
    assert not parts_of(many_shapes, monkeypatch, **words)
    hijack.quantize_file(many_shapes, tmp_path / "whole", **words)
    codes, _ = BlockwiseFP8().quantize(load_file(many_shapes)["even.weight"])
    tensors = open_tensors(read_header(tmp_path / "whole"))
    assert same(tensors["even.weight"], codes.flip(0))


@pytest.mark.parametrize("scheme", ["blockwise_fp8", "int8"])
def test_a_part_that_fails_says_what_the_whole_weight_does(
    many_shapes, monkeypatch, scheme
):
    """How many values of how many are not finite; nothing is left behind."""
    tensors = load_file(many_shapes)
    tensors["even.weight"][250, 3] = float("inf")
    tensors["even.weight"][3, 3] = float("nan")
    save_file(tensors, many_shapes)
    monkeypatch.setattr(quantize_plan, "PART", 700)
    message = r"^even: weight holds inf or NaN; got 2 non-finite of 16384 values"
    with pytest.raises(NonFiniteError, match=message):
        hijack.quantize_file(many_shapes, many_shapes.with_name("q"), scheme)
    assert names(many_shapes.parent) == [many_shapes.name]


@pytest.mark.parametrize(("memory", "most"), [(1 << 30, 3), (1, 1), (2 * 12500, 2)])
def test_layers_in_memory_are_bounded(source, tmp_path, monkeypatch, memory, most):
    """By the threads and by their sizes; a single one may be larger than the bound."""
    count = {"now": 0, "most": 0}
    lock, real = threading.Lock(), QuantizePlan.compute

    def make(*words):
        with lock:
            count["now"] += 1
            count["most"] = max(count.values())
        try:
            return real(*words)
        finally:
            barrier.wait()
            with lock:
                count["now"] -= 1

    barrier = threading.Barrier(most)
    monkeypatch.setattr(quantize_run, "MEMORY", memory)
    monkeypatch.setattr(QuantizePlan, "compute", make)
    hijack.quantize_file(source, tmp_path / "q.safetensors", workers=3)
    assert count["most"] == most


def test_a_thread_s_failure_ends_the_job(source, tmp_path):
    """With its own error, and nothing is left behind."""
    tensors = load_file(source)
    tensors["l3.weight"][0, 0] = float("nan")
    save_file(tensors, source)
    with pytest.raises(NonFiniteError, match="l3: weight holds inf or NaN"):
        hijack.quantize_file(source, tmp_path / "q.safetensors", workers=3)
    assert names(tmp_path) == [source.name]


def test_threads_the_system_refuses_are_no_deadlock(source, tmp_path, monkeypatch):
    """The job ends with the system's error."""
    real, started = threading.Thread.start, []

    def start(self):
        started.append(self)
        if len(started) == 2:
            raise RuntimeError("can't start new thread")
        real(self)

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(RuntimeError, match="can't start new thread"):
        hijack.quantize_file(source, tmp_path / "q.safetensors", workers=3)
    assert names(tmp_path) == [source.name]


def test_an_error_of_the_callback_ends_the_job(source, tmp_path):
    """As a button that stops it may raise one."""

    def stop(done, total, layer):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hijack.quantize_file(source, tmp_path / "q.safetensors", progress=stop)
    assert names(tmp_path) == [source.name]


# -- what changes meanwhile ------------------------------------------------------------


def test_a_source_that_is_changed_meanwhile_is_noticed(source, tmp_path):
    """The result would be made of two checkpoints."""

    def change(done, total, layer):
        os.utime(source, ns=(1, done))

    with pytest.raises(CheckpointError, match="changed while it was read"):
        hijack.quantize_file(source, tmp_path / "q.safetensors", progress=change)
    assert names(tmp_path) == [source.name]


@pytest.mark.parametrize("last", ["weight", "bias"])
def test_a_source_that_is_cut_short_meanwhile_is_refused(tmp_path, last):
    """What is read is counted, and nothing is mapped that may vanish."""
    source = tmp_path / "dense.safetensors"
    tensors = {"a.weight": torch.ones(4, 64), f"b.{last}": torch.ones(4, 64)}
    save_file(tensors, source)

    def cut(done, total, name):
        os.truncate(source, source.stat().st_size - 1)

    with pytest.raises(
        CheckpointError, match=rf"b\.{last}: got .* did the source chang"
    ):
        hijack.quantize_file(source, tmp_path / "q", progress=cut, workers=1)
    assert names(tmp_path) == [source.name]


def test_options_of_the_scheme_that_are_wrong_are_named(source, tmp_path):
    """They are passed on, and nothing else is."""
    with pytest.raises(SchemeError, match="scale_search: got -1"):
        hijack.quantize_file(source, tmp_path / "q.safetensors", scale_search=-1)
