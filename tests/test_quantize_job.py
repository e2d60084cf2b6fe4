"""A job of `quantize_file` as a whole: LoRAs, casts, shards, threads, going on."""

import json
import os
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

import hijack
import schemes.blockwise_fp8  # noqa: F401 - registers the scheme
from hijack.checkpoint import config_json as config
from hijack.checkpoint import fingerprint, quantize_run
from hijack.checkpoint.quantize_plan import QuantizePlan
from hijack.errors import CheckpointError, NonFiniteError, SchemeError
from hijack.safetensors_io import atomic as partial
from hijack.safetensors_io.reader import open_tensors, read_header

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
    """A LoRA of two layers, one of them with a bias."""
    torch.manual_seed(1)
    tensors = {}
    for layer in ("l1", "l2"):
        tensors[f"{layer}.lora_A.weight"] = torch.randn(4, 128)
        tensors[f"{layer}.lora_B.weight"] = torch.randn(32, 4)
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
        hijack.quantize_file(source, path, loras=given)
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
        hijack.quantize_file(source, path, rules="l0=f16")


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
    assert read_header(path).metadata == {"k": "v"}
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
        CheckpointError, match=r"config\.json: would lie beside the source"
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
    with pytest.raises(
        CheckpointError, match=r"config\.json: is no table of JSON that"
    ):
        hijack.quantize_file(source, path, dialect="deepseek", write_config=True)
    assert there.read_text() == '{"model_type": "toy",}'
    assert names(path.parent) == ["config.json"]


def test_two_that_write_a_config_do_not_get_in_each_others_way(
    source, tmp_path, monkeypatch
):
    """Each has a file of its own until it is whole."""
    out, real = tmp_path / "out", config.replace
    out.mkdir()
    words = {"dialect": "deepseek", "write_config": True}

    def replace(part, target):
        monkeypatch.setattr(config, "replace", real)
        hijack.quantize_file(source, out / "b.safetensors", block_size=32, **words)
        real(part, target)

    monkeypatch.setattr(config, "replace", replace)
    hijack.quantize_file(source, out / "a.safetensors", block_size=64, **words)
    table = json.loads((out / "config.json").read_text())["quantization_config"]
    assert table["weight_block_size"] == [1, 64]
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
    assert header.metadata == {"k": "v"}
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


@pytest.mark.parametrize(("memory", "most"), [(1 << 30, 3), (1, 1), (2 * 12500, 2)])
def test_layers_in_memory_are_bounded(source, tmp_path, monkeypatch, memory, most):
    """By the threads and by their sizes; a single one may be larger than the bound."""
    count = {"now": 0, "most": 0}
    lock, real = threading.Lock(), QuantizePlan.make

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
    monkeypatch.setattr(QuantizePlan, "make", make)
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


# -- what changes meanwhile, and going on ----------------------------------------------


def test_a_source_that_is_changed_meanwhile_is_noticed(source, tmp_path):
    """The result would be made of two checkpoints."""

    def change(done, total, layer):
        os.utime(source, ns=(1, done))

    with pytest.raises(CheckpointError, match="was changed while it was read"):
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
        CheckpointError, match=rf"b\.{last}: got .* was the source chang"
    ):
        hijack.quantize_file(source, tmp_path / "q", progress=cut, workers=1)
    assert names(tmp_path) == [source.name]


def interrupted(source, path, after, **words):
    """A run with resume that is stopped after some layers; the layers it did."""
    done = []

    def stop(count, total, layer):
        done.append(layer)
        if count == after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        hijack.quantize_file(
            source, path, resume=True, workers=1, progress=stop, **words
        )
    return done


def test_a_job_goes_on_where_it_was_stopped(source, tmp_path):
    """The file is byte for byte what one run gives; nothing is done twice."""
    whole, path = tmp_path / "whole.safetensors", tmp_path / "q.safetensors"
    hijack.quantize_file(source, whole)
    first = interrupted(source, path, 3)
    assert not path.exists()
    seen = []
    hijack.quantize_file(
        source, path, resume=True, progress=lambda *call: seen.append(call)
    )
    assert path.read_bytes() == whole.read_bytes()
    assert len(seen) < LAYERS
    assert seen[-1][:2] == (LAYERS, LAYERS)
    assert not {layer for *_, layer in seen} & set(first)
    assert names(tmp_path) == [
        "dense.safetensors",
        "q.safetensors",
        "whole.safetensors",
    ]


@pytest.mark.parametrize(
    "change",
    [
        {"block_size": 32},
        {"dtype": torch.float8_e5m2},
        {"scale_search": 4},
        {"exclude": "l5"},
        {"source": "touched"},
        {"lora": True},
        {"max_shard_size": "1GB"},
    ],
    ids=str,
)
def test_another_job_begins_anew(source, lora, tmp_path, change):
    """Other options, another source or other LoRAs: nothing done before is used."""
    path, words = tmp_path / "q.safetensors", dict(change)
    interrupted(source, path, 3)
    if words.pop("source", None):
        os.utime(source, ns=(1, 1))
    if words.pop("lora", None):
        words["loras"] = [lora]
    seen = []
    hijack.quantize_file(
        source, path, resume=True, progress=lambda *call: seen.append(call), **words
    )
    assert len(seen) == LAYERS - ("exclude" in words)
    if "max_shard_size" not in words:
        assert not [name for name in names(tmp_path) if name.startswith(".")]


def test_a_lora_that_changed_begins_anew(source, lora, tmp_path):
    """It has the same name and strength, but is another file."""
    path = tmp_path / "q.safetensors"
    interrupted(source, path, 3, loras=[lora])
    os.utime(lora, ns=(1, 1))
    seen = []
    hijack.quantize_file(
        source,
        path,
        resume=True,
        loras=[lora],
        progress=lambda *call: seen.append(call),
    )
    assert len(seen) == LAYERS


def test_an_alpha_that_changed_begins_anew(source, lora, tmp_path):
    """PEFT keeps it in a file of its own; the LoRA's is the same as before."""
    whole, path = tmp_path / "whole.safetensors", tmp_path / "q.safetensors"
    lora = lora.rename(tmp_path / "adapter_model.safetensors")
    config = tmp_path / "adapter_config.json"
    config.write_text('{"lora_alpha": 2}')
    interrupted(source, path, 3, loras=[lora])
    config.write_text('{"lora_alpha": 8}')
    hijack.quantize_file(source, path, resume=True, loras=[lora])
    hijack.quantize_file(source, whole, loras=[lora])
    assert path.read_bytes() == whole.read_bytes()


@pytest.mark.parametrize("changed", ["_PACKAGES", "_sources"])
def test_other_code_begins_anew(source, tmp_path, monkeypatch, changed):
    """Of hijack or of a plugin: what an older one made is not mixed with the new."""
    package = tmp_path / "package"
    package.mkdir()
    (package / "module.py").write_text("old = True")
    places = (package,)
    given = places if changed == "_PACKAGES" else lambda plan: places
    monkeypatch.setattr(fingerprint, changed, given)
    path, seen = tmp_path / "q.safetensors", []
    done = interrupted(source, path, 3)
    (package / "module.py").write_text("new = True")
    fingerprint._code.cache_clear()  # as in another process
    hijack.quantize_file(
        source, path, resume=True, progress=lambda *call: seen.append(call)
    )
    assert len(seen) == LAYERS > len(done)


def test_a_killed_job_goes_on_where_its_journal_ends(source, tmp_path, monkeypatch):
    """The process is gone in the middle; what it had synced is not done again."""
    whole, path = tmp_path / "whole.safetensors", tmp_path / "q.safetensors"
    hijack.quantize_file(source, whole)
    script = (
        "import os, sys, hijack, schemes.blockwise_fp8\n"
        "from hijack.safetensors_io import atomic as partial\n"
        "partial.SYNC_EVERY = 1\n"
        "stop = lambda done, total, layer: done == 4 and os._exit(9)\n"
        "hijack.quantize_file(*sys.argv[1:], resume=True, progress=stop, workers=1)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, source, path])
    assert done.returncode == 9
    assert not path.exists()
    monkeypatch.setattr(partial, "SYNC_EVERY", 1)
    seen = []
    hijack.quantize_file(
        source, path, resume=True, progress=lambda *call: seen.append(call)
    )
    assert [call[:2] for call in seen] in ([(5, 6), (6, 6)], [(6, 6)])
    assert path.read_bytes() == whole.read_bytes()


def test_shards_go_on_too(source, tmp_path):
    """And nothing but the set is left."""
    path = tmp_path / "q.safetensors"
    interrupted(source, path, 3, max_shard_size="10KB")
    seen = []
    report = hijack.quantize_file(
        source,
        path,
        resume=True,
        max_shard_size="10KB",
        progress=lambda *call: seen.append(call),
    )
    assert len(seen) < LAYERS
    found = {*report.files, "q.safetensors.index.json", source.name}
    assert set(names(tmp_path)) == found


def test_options_of_the_scheme_that_are_wrong_are_named(source, tmp_path):
    """They are passed on, and nothing else is."""
    with pytest.raises(SchemeError, match="scale_search: got -1"):
        hijack.quantize_file(source, tmp_path / "q.safetensors", scale_search=-1)
