"""The command line: what users type, and what they read when it is wrong."""

import json
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hijack
from hijack import cli, model_families, selection
from hijack.model_families import ModelFamily
from hijack.safetensors_io.writer import CheckpointWriter
from hijack.testing import registered


@pytest.fixture
def dense(tmp_path):
    """A dense checkpoint."""
    path = tmp_path / "dense.safetensors"
    save_file({"a.weight": torch.randn(64, 128).bfloat16()}, path)
    return path


@pytest.fixture
def run(capsys):
    """Run a command; give its status, output and messages."""

    def run(*words):
        status = cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


@pytest.mark.parametrize(
    ("words", "shape"),
    [
        ([], (64, 2, 1)),
        (["--block-size", "1x32"], (64, 4, 1)),
        (["--block-size", "32"], (64, 4, 1)),
        (["--block-size", "row"], (64, 1)),
        (["--block-size", "tensor"], ()),
    ],
)
def test_quantize_writes_the_block_size_asked_for(run, dense, tmp_path, words, shape):
    """Each spelling of a block size gives that scale."""
    path = tmp_path / "q.safetensors"
    status, out, _ = run("quantize", dense, path, *words)
    assert status == 0
    assert "1 layers quantized" in out
    assert load_file(path)["a.scale_weight"].shape == shape


def test_quantize_takes_dtype_and_dialect(run, dense, tmp_path):
    """e5m2 codes in the native dialect, with 2-D blocks."""
    path = tmp_path / "q.safetensors"
    words = ["--dtype", "e5m2", "--dialect", "hijack", "--block-size", "32x32"]
    assert run("quantize", dense, path, *words)[0] == 0
    tensors = load_file(path)
    assert tensors["a.weight"].dtype == torch.float8_e5m2
    assert tensors["a.weight_scale"].shape == (2, 4)


class Ranked(hijack.Scheme):
    """A toy: int8 with an option that is its own."""

    name = "ranked"
    options = (
        hijack.Option("rank", "int", 4, "how many it has", minimum=1, maximum=16),
    )

    def quantize(self, weight, *, rank=4):
        """One scale a row, and a tensor of the rank asked for."""
        scale = weight.abs().amax(1, keepdim=True).float() / 127
        codes = (weight / scale).round().to(torch.int8)
        factor = torch.zeros(len(weight), rank, device=weight.device)
        return codes, {"weight_scale": scale, "weight_factor": factor}

    def dequantize(self, qdata, params, dtype):
        """Multiply."""
        return (qdata * params["weight_scale"]).to(dtype)


@pytest.fixture
def ranked():
    """The toy, registered."""
    with registered(Ranked()) as scheme:
        yield scheme


def test_any_option_of_any_scheme_can_be_passed(run, dense, tmp_path, ranked):
    """By its name; text becomes a value of the option's type."""
    path = tmp_path / "q.safetensors"
    words = ("quantize", dense, path, "--scheme", "ranked", "--force")
    for extra, rank in (([], 4), (["--option", "rank=16"], 16)):
        assert run(*words, *extra)[0] == 0
        assert load_file(path)["a.weight_factor"].shape == (64, rank)
    fp8 = ["--option", "block_size=8x8", "--option", "dtype=float8_e5m2", "--force"]
    assert run("quantize", dense, path, "--dialect", "hijack", *fp8)[0] == 0
    tensors = load_file(path)
    assert tensors["a.weight"].dtype == torch.float8_e5m2
    assert tensors["a.weight_scale"].shape == (8, 16)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--option", "rnak=3"], "has no option 'rnak'; expected options among rank"),
        (["--option", "rank"], "got 'rank', expected NAME=VALUE"),
        (["--option", "=3"], "got '=3', expected NAME=VALUE"),
        (["--option", "rank=many"], "rank: got 'many', expected a whole number from 1"),
        (["--option", "rank=99"], "rank: got 99, expected a whole number from 1 to 16"),
        (["--block-size", "1x64"], "has no option 'block_size'; expected options amon"),
        (["--scale-search", "8"], "has no option 'scale_search'; expected options amo"),
    ],
)
def test_options_a_scheme_does_not_have_are_refused(
    run, dense, tmp_path, ranked, words, message
):
    """With those it has, and their values; the shorthands are FP8's."""
    path = tmp_path / "q.safetensors"
    status, _, err = run("quantize", dense, path, "--scheme", "ranked", *words)
    assert status == 1
    assert message in err
    assert not path.exists()


def test_convert_takes_options_of_the_schemes_in_a_file(run, dense, tmp_path):
    """For layers that are requantized."""
    path, other = tmp_path / "q.safetensors", tmp_path / "c.safetensors"
    assert run("quantize", dense, path, "--block-size", "1x32")[0] == 0
    words = ("convert", path, other, "--dialect", "deepseek", "--requantize")
    status, _, err = run(*words, "--option", "rank=3")
    assert status == 1
    assert "blockwise_fp8: has no option 'rank'; expected options among block_s" in err
    assert run(*words, "--option", "block_size=64x64")[0] == 0
    assert load_file(other)["a.weight_scale_inv"].shape == (1, 2)


def test_schemes_lists_the_options_of_each(run, ranked):
    """With defaults, values and help."""
    out = run("schemes")[1]
    part = out[out.index("\nranked: ") + 1 :].splitlines()
    row = "rank 4 a whole number from 1 to 16 how many it has"
    assert part[0] == f"ranked: {ranked.summary}"
    assert " ".join(part[4].split()) == row
    fp8 = out[out.index("\nblockwise_fp8: FP8 codes with one multiplying scale") :]
    assert "scale_search" in fp8
    assert "from 0 to 128" in fp8


def test_quantize_takes_scales_and_rules(run, dense, tmp_path):
    """Their dtype, a search for them, and blocks of single layers."""
    path = tmp_path / "q.safetensors"
    words = ["--scale-dtype", "f16", "--scale-search", "4", "--rule", "a=1x32"]
    assert run("quantize", dense, path, *words)[0] == 0
    scale = load_file(path)["a.scale_weight"]
    assert scale.dtype == torch.float16
    assert scale.shape == (64, 4, 1)
    run("quantize", dense, tmp_path / "plain", "--scale-dtype", "f16", "--rule", "a=32")
    assert not torch.equal(scale, load_file(tmp_path / "plain")["a.scale_weight"])


def test_quantize_merges_loras(run, dense, tmp_path):
    """With their strengths; those of other layers only on request."""
    path, lora = tmp_path / "q.safetensors", tmp_path / "l.safetensors"
    parts = {"lora_A": torch.ones(1, 128), "lora_B": torch.ones(64, 1)}
    layers = {f"{la}.{n}.weight": t.clone() for la in "ab" for n, t in parts.items()}
    save_file(layers, lora)
    words = ["--lora", f"{lora}:0.5", "--lora", lora]
    status, _, err = run("quantize", dense, path, *words)
    assert status == 1
    assert "has no layer for b" in err
    status, out, _ = run("quantize", dense, path, *words, "--ignore-unmatched", "-v")
    assert status == 0
    assert out.splitlines()[0] == "LoRA left out: b"
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(128, 64, bias=False)})
    hijack.load(model, path)
    weight = hijack.unwrap(model).a.weight.detach().float()
    expected = load_file(dense)["a.weight"].float() + 1.5
    assert (weight - expected).norm() / expected.norm() < 0.04


def test_a_dry_run_shows_sizes_and_writes_nothing(run, dense, tmp_path):
    """Even where a file is in the way."""
    path = tmp_path / "q.safetensors"
    path.write_bytes(b"precious")
    status, out, _ = run("quantize", dense, path, "--dry-run")
    assert status == 0
    assert path.read_bytes() == b"precious"
    rows = [line.split() for line in out.splitlines()]
    assert ["1x64", "1"] in rows
    assert out.splitlines()[-1].startswith("1 layers would be quantized, 0 left dense")
    assert run("quantize", dense, path, "--force")[0] == 0
    assert ["q.safetensors", f"{path.stat().st_size:,}"] in rows


def test_shards_are_written_beside_their_index(run, dense, tmp_path):
    """And replaced only if forced, as a file is."""
    path = tmp_path / "q.safetensors"
    words = ["quantize", dense, path, "--max-shard-size", "8KB"]
    assert run(*words)[0] == 0
    written = sorted(p.name for p in tmp_path.glob("q*"))
    shards = [f"q-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert written == [*shards, "q.safetensors.index.json"]
    status, _, err = run(*words)
    assert status == 1
    assert "q.safetensors.index.json: exists; pass --force" in err
    assert run(*words, "--force")[0] == 0
    assert run("identify", tmp_path / "q.safetensors.index.json")[0] == 0
    status, _, err = run(*words[:-1], "8 parsecs", "--force")
    assert status == 1
    assert "max_shard_size: got '8 parsecs', expected" in err


def test_defaults_are_shown(run, dense, tmp_path, monkeypatch):
    """Those of a checkpoint's model, and those of every model known."""
    text = run("quantize", "--show-defaults", dense)[1]
    assert "the model is unknown" in text
    assert "but for what looks like embeddings, norms, heads or routers" in text
    toy = ModelFamily("Toy", ("a*",), ("*.mod", "*.b"), "its makers", ())
    for module in (model_families, selection):
        monkeypatch.setattr(module, "detect_family", lambda keys: toy)
    path, target = tmp_path / "toy.safetensors", tmp_path / "q.safetensors"
    layers = ("a.0", "a.mod", "a.1")
    save_file({f"{la}.weight": torch.ones(2, 64) for la in layers}, path)
    status, out, _ = run("quantize", "--show-defaults", path)
    assert status == 0
    assert out.splitlines() == [
        "Toy (its makers)",
        "  include: a*",
        "  exclude: *.mod *.b",
    ]
    status, out, _ = run("quantize", path, target, "-v")
    assert "left dense: a.mod (not usual for Toy)" in out
    assert "model: Toy" in out
    words = ["--exclude", "default", "--exclude", "a.1", "--force"]
    out = run("quantize", path, target, "-v", *words)[1]
    assert "left dense: a.1 (excluded)" in out
    assert "1 layers quantized, 2 left dense" in out


def notes(out):
    """The notes a command ends with."""
    return [line for line in out.splitlines() if line.startswith("note: ")]


def test_a_line_says_that_a_model_is_not_known(run, tmp_path):
    """And how many layers were left dense for their names, which a pattern can name."""
    names = ("a.fc", "word_embeddings", "lm_head")
    source, target = tmp_path / "a.safetensors", tmp_path / "q.safetensors"
    save_file({f"{name}.weight": torch.ones(2, 64) for name in names}, source)
    out = run("quantize", source, target)[1]
    assert "model: not known; 2 layers that look like embeddings, norms, heads" in out
    out = run("quantize", source, target, "--include", "*", "--force")[1]
    assert "model: not known; layers are chosen by names and shapes" in out
    assert "3 layers quantized" in out


def test_a_note_says_that_patterns_replace_defaults(run, dense, tmp_path, monkeypatch):
    """Of a known model, unless the word default is among them."""
    toy = ModelFamily("Toy", ("*",), ("*norm*", "*mod*"), "its makers", ())
    monkeypatch.setattr(selection, "detect_family", lambda keys: toy)
    save_file({f"{name}.weight": torch.ones(2, 64) for name in "ab"}, dense)
    words = ("quantize", dense, tmp_path / "q.safetensors", "--dry-run")
    (note,) = notes(run(*words, "--exclude", "b")[1])
    assert "replaces what is left out of Toy by default (*norm* *mod*)" in note
    assert "--exclude default" in note
    (note,) = notes(run(*words, "--include", "a")[1])
    assert "include (--include) replaces what is quantized in Toy" in note
    assert not notes(run(*words, "--exclude", "b", "--exclude", "default")[1])
    assert not notes(run(*words)[1])


def test_a_note_says_that_the_scheme_declines_layers(run, tmp_path):
    """And why one is; layers that were not chosen are no reason for it."""
    source, target = tmp_path / "a.safetensors", tmp_path / "q.safetensors"
    widths = {"a.even": 64, "a.odd": 60, "a.norm_out": 60}
    save_file({f"{k}.weight": torch.ones(64, n) for k, n in widths.items()}, source)
    words = ("quantize", source, target, "--dry-run", "--scheme", "int8")
    chosen = ("--exclude", "*norm*")
    (note,) = notes(run(*words, *chosen, "--option", "rotation=64")[1])
    assert "1 of 2 layers stay dense, because the scheme declines them" in note
    assert "such as a.odd: its 60 columns are no whole groups of 64" in note
    assert not notes(run(*words, *chosen)[1])


def test_a_note_says_why_blocks_are_not_those_asked_for(run, dense, tmp_path):
    """Beside a table of the blocks there are."""
    path = tmp_path / "q.safetensors"
    out = run("quantize", dense, path, "--block-size", "1x60")[1]
    assert ["1x128", "1"] in [line.split() for line in out.splitlines()]
    (note,) = notes(out)
    assert "such as a with 1x128 instead of 1x60: if the block does not divide" in note
    assert "--dialect hijack" in note
    for words in (["1x32"], ["32"], ["1x60", "--dialect", "hijack"], ["999x999"]):
        words = [dense, path, "--force", "--block-size", *words]
        assert not notes(run("quantize", *words)[1])


def test_notes_say_what_readers_of_a_dialect_expect(run, dense, tmp_path):
    """A config.json, and of DeepSeek's files blocks of 128 x 128."""
    folder = tmp_path / "out"
    folder.mkdir()
    path, other = folder / "q.safetensors", tmp_path / "c.safetensors"
    deepseek = ("--dialect", "deepseek", "--force")
    (note,) = notes(run("quantize", dense, path, *deepseek)[1])
    assert "readers of deepseek look for quantization_config in config.json" in note
    assert not notes(run("quantize", dense, path, *deepseek, "--write-config")[1])
    (note,) = notes(run("convert", path, other, "--dialect", "compressed_tensors")[1])
    assert "--write-config" in note
    run("quantize", dense, path, "--force")
    for command in (["quantize", dense, "--block-size", "1x64"], ["convert", path]):
        name, source, *words = command
        found = notes(run(name, source, other, *deepseek, *words)[1])
        assert "most readers of deepseek only support blocks of 128x128" in found[1]


def test_defaults_of_every_model_are_shown(run):
    """Without a checkpoint."""
    status, out, _ = run("quantize", "--show-defaults")
    assert status == 0
    assert out.count("include: ") == out.count("exclude: ") > 10
    assert "Qwen-Image (musubi-tuner)" in out


def test_a_config_is_written_on_request(run, dense, tmp_path):
    """For dialects that have one."""
    path = tmp_path / "out" / "q.safetensors"
    path.parent.mkdir()
    words = ["--dialect", "deepseek", "--write-config", "--workers", "1"]
    assert run("quantize", dense, path, *words)[0] == 0
    config = json.loads((path.parent / "config.json").read_text())
    assert config["quantization_config"]["weight_block_size"] == [128, 128]


def test_an_existing_file_is_replaced_only_if_forced(run, dense, tmp_path):
    """Without --force the file stays and the message says so."""
    path = tmp_path / "q.safetensors"
    path.write_bytes(b"precious")
    status, _, err = run("quantize", dense, path)
    assert status == 1
    assert "exists; pass --force" in err
    assert path.read_bytes() == b"precious"
    assert run("quantize", dense, path, "--force")[0] == 0


def test_identify_shows_a_table_and_json(run, dense, tmp_path):
    """The same findings, for people and for programs."""
    path = tmp_path / "q.safetensors"
    run("quantize", dense, path)
    status, out, _ = run("identify", path)
    assert status == 0
    assert out.splitlines()[-1].split() == ["blockwise_fp8", "musubi", "1x64", "1"]
    assert "F8_E4M3 with scale_weight" in run("identify", path, "-v")[1]
    report = json.loads(run("identify", path, "--json")[1])
    assert report["layers"]["a"]["scheme"] == "blockwise_fp8"
    assert "not quantized: BF16" in run("identify", dense)[1]


def test_identify_reports_unconsumed_scales_in_its_status(run, tmp_path):
    """A scale nobody reads makes the status 3."""
    path = tmp_path / "o.safetensors"
    save_file({"a.weight_scale": torch.ones(1)}, path)
    status, out, _ = run("identify", path)
    assert status == 3
    assert "unconsumed: a.weight_scale" in out


def test_schemes_lists_names_dialects_and_origin(run):
    """The reference scheme is there."""
    status, out, _ = run("schemes")
    assert status == 0
    row = next(line for line in out.splitlines() if line.startswith("blockwise_fp8"))
    assert "musubi, " in row
    assert ", hijack" in row
    assert "kijai" not in row  # which is only read
    assert row.endswith("schemes.blockwise_fp8")


def test_doctor_tells_versions_hosts_and_variables(run, monkeypatch):
    """Everything a bug report needs."""
    monkeypatch.setenv("HIJACK_DISABLE", "comfyui")
    other = "HIJACK_" + "OTHER"  # one that a plugin reads
    monkeypatch.setenv(other, "1")
    status, out, _ = run("doctor")
    assert status == 0
    for expected in (
        f"python {platform.python_version()} on {platform.platform()}",
        "torch 2",
        "pluggy ",
        "comfy-kitchen ",
        "device: cpu, ",
        f"threads: {torch.get_num_threads()}",
        "HIJACK_DISABLE=comfyui",
        "HIJACK_LORA=",
        f"{other}=1",
        "schemes: blockwise_fp8 (schemes.blockwise_fp8)",
        "comfyui: ",
    ):
        assert expected in out


def bad_inputs(folder):
    """Words that are wrong, and what the message must say."""
    text = folder / "t.safetensors"
    text.write_text("hello, this is not a checkpoint")
    yield ("identify", folder / "none.safetensors"), "No such file"
    yield ("identify", text), "not a safetensors file"
    yield ("identify", folder), "not a safetensors file"
    (folder / "empty").mkdir()
    yield ("identify", folder / "empty"), "is a folder without checkpoints"
    yield ("quantize", text, folder / "q"), "not a safetensors file"
    yield ("demo", "--out", text), "t.safetensors: File exists"


def test_bad_input_gives_one_readable_line(run, tmp_path):
    """No traceback, status 1, one line that names the file."""
    for words, message in bad_inputs(tmp_path):
        status, out, err = run(*words)
        assert status == 1
        assert out == ""
        assert err.count("\n") == 1
        assert err.startswith("hijack: ")
        assert message in err


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["nonsense"],
        ["quantize", "a", "b", "--block-size", "0x3"],
        ["quantize", "a", "b", "--block-size", "1x2x3"],
        ["quantize", "a", "b", "--block-size", "1xfoo"],
        ["quantize", "a", "b", "--dtype", "int4"],
        ["quantize"],
        ["quantize", "a"],
        ["quantize", "a", "b", "--workers", "many"],
        ["quantize", "a", "b", "--scale-dtype", "int4"],
        ["quantise"],
        ["quantize", "a", "b", "--blok-size=1x64"],
    ],
)
def test_wrong_words_end_with_status_2(words, capsys):
    """One line says what was expected, and where to read more."""
    with pytest.raises(SystemExit) as end:
        cli.main(words)
    err = capsys.readouterr().err
    assert end.value.code == 2
    assert err.count("\n") == 1
    assert err.startswith("hijack")
    assert "--help" in err
    said = ("expected", "choose from", "required", "invalid int value", "did you mean")
    assert any(text in err for text in said)


def test_an_interruption_ends_with_status_130(run, dense, tmp_path, monkeypatch):
    """Ctrl-C is no traceback, and leaves no half of a file."""

    def interrupt(*_, **__):
        raise KeyboardInterrupt

    path = tmp_path / "q.safetensors"
    monkeypatch.setattr(CheckpointWriter, "write", interrupt)
    status, _, err = run("quantize", dense, path)
    assert status == 130
    assert err.splitlines()[-1] == "hijack: interrupted; nothing was replaced"
    assert [p.name for p in tmp_path.iterdir()] == [dense.name]


def test_a_device_that_is_not_there_is_reported(run, dense, tmp_path):
    """In a line, not with torch's whole message."""
    status, _, err = run("quantize", dense, tmp_path / "q", "--device", "cuda:99")
    assert status == 1
    assert "device: 'cuda:99' cannot be used; " in err
    assert err.count("\n") == 1


def test_a_folder_that_cannot_be_written_is_reported(run, dense, tmp_path):
    """The destination's folder is missing."""
    status, _, err = run("quantize", dense, tmp_path / "no" / "where" / "q")
    assert status == 1
    assert "cannot be written" in err


def test_python_m_hijack_is_the_command(dense):
    """The module runs as the command does, and a closed pipe is no error."""
    command = f"{sys.executable} -m hijack identify -v {dense} | head -c 1"
    done = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""


def test_names_in_a_file_print_nothing_but_letters(run, tmp_path):
    """An escape sequence in a key would clear the screen, or fake a line."""
    name = "a\x1b[2J\nerror: \u202eb"
    dense, other = tmp_path / "dense.safetensors", tmp_path / "other.safetensors"
    save_file({f"{name}.weight": torch.randn(64, 128)}, dense)
    save_file(
        {f"{name}.weight": torch.randn(64, 128), f"{name}.x": torch.ones(2)}, other
    )
    quantized, dense_too = tmp_path / "q.safetensors", tmp_path / "2.safetensors"
    lines = [*run("quantize", dense, quantized)[1:]]
    for words in (
        ("quantize", other, dense_too, "--exclude", "*", "--include", "none", "-v"),
        ("quantize", other, dense_too, "--rule", "*=32x32", "-v"),
        ("identify", quantized, "-v"),
        ("convert", quantized, tmp_path / "c", "--dialect", "deepseek", "--requantize"),
        ("convert", quantized, tmp_path / "d", "--dialect", "deepseek", "-v"),
        ("compare", dense, quantized),
        ("compare", dense, other),
        ("compare", other, dense),
    ):
        lines += run(*words)[1:]
    text = "".join(lines)
    assert r"a\x1b[2J\nerror: \u202eb" in text
    assert text.replace("\n", "").isprintable()
    assert "\nerror" not in text


@pytest.mark.parametrize("words", [["schemes"], ["schemes", "-v"], ["doctor"]])
def test_unknown_arguments_print_nothing_but_letters(words, capsys):
    """They may come from a file's name in a script."""
    with pytest.raises(SystemExit) as caught:
        cli.main([*words, "--a\x1b[2J\nerror: \u202eb"])
    text = capsys.readouterr().err
    assert caught.value.code == 2
    assert text.endswith("\n")
    assert text[:-1].isprintable()


# -- before torch is there -------------------------------------------------------------


def fresh(*words, code="", **environ):
    """Run a command in a process of its own; give what came back and its seconds."""
    start = time.perf_counter()
    script = (
        f"{code}\nimport sys\nfrom hijack.cli import main\nstatus = main()\n"
        "print('torch' in sys.modules, file=sys.stderr)\nsys.exit(status)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, words)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **environ},
    )
    return done, time.perf_counter() - start


@pytest.mark.parametrize("words", [["--version"], ["--help"], ["quantize", "--help"]])
def test_help_and_version_come_at_once(words):
    """In a fraction of the time that importing torch takes, which nobody does."""
    code = (
        "import atexit, sys\n"
        "atexit.register(lambda: print('torch' in sys.modules, file=sys.stderr))\n"
    )
    runs = [fresh(*words, code=code) for _ in range(3)]
    for done, _ in runs:
        assert done.returncode == 0
        assert done.stderr == "False\n"
    if words == ["--version"]:
        assert runs[0][0].stdout == f"hijack {hijack.__version__}\n"
    assert min(seconds for _, seconds in runs) < 1  # 0.15 s where nothing else runs


#: Makes a package look as if it were not installed.
WITHOUT = (
    "import sys\n"
    "class Without:\n"
    "    def find_spec(self, name, path=None, target=None):\n"
    "        if name == {name!r}:\n"
    "            raise ModuleNotFoundError(f'No module named {{name}}', name=name)\n"
    "sys.meta_path.insert(0, Without())\n"
)


@pytest.mark.parametrize("name", ["torch", "safetensors", "pluggy", "wrapt"])
def test_a_package_that_is_missing_is_one_sentence(name):
    """With the command that installs it."""
    done, _ = fresh("schemes", code=WITHOUT.format(name=name))
    assert done.returncode == 1
    first, *rest = done.stderr.splitlines()
    assert first == (
        f"hijack: {name} is not installed; run: {sys.executable} -m pip install {name}"
    )
    assert rest in (["True"], ["False"])


def test_nothing_is_said_of_a_missing_numpy(dense):
    """It is optional; torch warns of it when it is first used."""
    done, _ = fresh("identify", dense, code=WITHOUT.format(name="numpy"))
    assert done.returncode == 0
    assert done.stderr == "True\n"


def test_any_name_can_be_printed_in_any_encoding(tmp_path):
    """Letters that a terminal lacks are escaped."""
    path, broken = (
        tmp_path / "\u6a21\u578b.safetensors",
        tmp_path / "\u00e9.safetensors",
    )
    save_file({"\u5c42.weight": torch.randn(8, 64)}, path)
    broken.write_text("no checkpoint")
    for words, status in (
        (("quantize", path, tmp_path / "\u51fa.safetensors", "-v"), 0),
        (("compare", path, tmp_path / "\u51fa.safetensors"), 0),
        (("identify", broken), 1),
    ):
        done, _ = fresh(*words, PYTHONIOENCODING="ascii")
        assert (done.returncode, "Traceback" in done.stderr) == (status, False)
        assert r"\u" in done.stdout or r"\xe9" in done.stderr


# -- what summaries say ----------------------------------------------------------------


def test_every_summary_says_where_and_how_long(run, dense, tmp_path):
    """The path, the size of all files, and the time."""
    path, other = tmp_path / "q.safetensors", tmp_path / "c.safetensors"
    index = tmp_path / "s.safetensors.index.json"
    sharded = ["quantize", dense, tmp_path / "s", "--max-shard-size", "8KB"]
    for words, said in (
        (["quantize", dense, path], f"; wrote {path}"),
        (["convert", path, other, "--dialect", "hijack"], f"; wrote {other}"),
        (sharded, f"; wrote {index} and 2 shards"),
        (["compare", dense, path], "done"),
    ):
        last = run(*words)[1].splitlines()[-1]
        size = "" if said == "done" else r", \d+\.\d kB,"
        assert re.search(rf"{re.escape(said)}{size} in \d+\.\d s$", last), last
    assert "wrote" not in run("quantize", dense, path, "--dry-run")[1]


def test_every_command_speaks_json(run, dense, tmp_path):
    """One value on stdout, and nothing else."""
    path, other = tmp_path / "q.safetensors", tmp_path / "c.safetensors"

    def told(*words):
        status, out, _ = run(*words, "--json")
        assert status == 0
        return json.loads(out)

    report = told("quantize", dense, path)
    assert report["layers"] == ["a"]
    assert report["paths"] == [str(path)]
    assert report["seconds"] >= 0
    assert told("quantize", dense, path, "--dry-run")["paths"] == []
    assert told("convert", path, other, "--dialect", "hijack")["layers"] == {
        "a": [1, 64]
    }
    assert told("compare", dense, path)["layers"]["a.weight"]["sqnr_db"] > 20
    assert told("identify", path)["kind"] == "quantized checkpoint"
    assert told("schemes")["blockwise_fp8"]["options"]["scale_search"]
    assert told("doctor")["hijack"] == hijack.__version__
    assert told("quantize", "--show-defaults")[0]["include"]


def test_a_size_of_shards_needs_a_unit(run, dense, tmp_path):
    """5 would be 5 bytes, and a file for every tensor."""
    for size in ("5", "5000000000"):
        status, _, err = run(
            "quantize", dense, tmp_path / "s", "--max-shard-size", size
        )
        assert status == 1
        assert (
            f"max_shard_size: got '{size}', expected bytes as an int, or text with a"
            in err
        )
    assert sorted(tmp_path.iterdir()) == [dense]


def test_unknown_words_are_guessed(run, dense, tmp_path, capsys):
    """Commands, options, choices, schemes and dialects."""
    path = tmp_path / "q.safetensors"
    for words, meant in (
        (["quantise"], "quantize"),
        (["quantize", dense, path, "--blok-size", "row"], "--block-size"),
        (["quantize", dense, path, "--dtype", "e4m4"], "e4m3"),
    ):
        with pytest.raises(SystemExit):
            cli.main([str(word) for word in words])
        assert f"; did you mean '{meant}'? see `hijack" in capsys.readouterr().err
    for words, meant in (
        (["--scheme", "blokwise_fp8"], "blockwise_fp8"),
        (["--dialect", "deepsek"], "deepseek"),
        (["--option", "scale_serch=3"], "scale_search"),
        (["--exclude", "aa"], "a"),
    ):
        err = run("quantize", dense, path, *words)[2]
        assert err.endswith(f"; did you mean {meant!r}?\n")


# -- many files ------------------------------------------------------------------------


@pytest.fixture
def folder(dense, tmp_path):
    """A folder of models: dense, quantized, shards, a LoRA and a broken file."""
    folder = tmp_path / "models"
    (folder / "loras").mkdir(parents=True)
    hijack.quantize_file(dense, folder / "coded.safetensors")
    hijack.quantize_file(dense, folder / "parts", max_shard_size="8KB")
    parts = {"lora_A": torch.ones(1, 128), "lora_B": torch.ones(64, 1)}
    lora = {f"a.{name}.weight": part for name, part in parts.items()}
    save_file(lora, folder / "loras" / "style.safetensors")
    (folder / "readme.txt").write_text("no model")
    return folder


def test_a_file_of_another_program_is_listed_as_what_it_is(run, folder):
    """GGUF's table of tensors is not read."""
    gguf = folder / "other.gguf"
    gguf.write_bytes(b"GGUF\x03" + bytes(19))
    status, out, _ = run("identify", folder)
    assert status == 3
    row = next(line for line in out.splitlines() if str(gguf) in line)
    wanted = f"{gguf} GGUF file - - - 24 bytes cannot be loaded as it is; see -v"
    assert " ".join(row.split()) == wanted


@pytest.mark.parametrize(
    "scheme", ["convrot_w4a4", "mxfp4", "nf4", "nvfp4", "w4a8", "int8"]
)
def test_parameters_are_counted_unpacked(run, tmp_path, scheme):
    """As many as the dense weights have."""
    source, target = tmp_path / "a.safetensors", tmp_path / "q.safetensors"
    save_file({"a.fc.weight": torch.ones(64, 256)}, source)
    run("quantize", source, target, "--scheme", scheme)
    assert (
        "quantized checkpoint, 16.4 thousand parameters" in run("identify", target)[1]
    )


def test_a_folder_is_listed_with_a_row_for_each_checkpoint(run, folder):
    """Shards are one; a LoRA is called a LoRA; numbers are for people."""
    status, out, err = run("identify", folder)
    assert (status, err) == (0, "")
    rows = [line for line in out.splitlines() if str(folder) in line]
    assert len(rows) == 3
    texts = {Path(row.split()[0]).name: " ".join(row.split()[1:]) for row in rows}
    assert texts["coded.safetensors"].startswith(
        "quantized checkpoint - musubi 1x64 8.2 thousand "
    )
    assert texts["style.safetensors"] == "LoRA - F32 192 768 bytes"
    assert texts["parts.safetensors.index.json"].startswith("quantized checkpoint")
    assert (
        "LoRA, 192 parameters, 768 bytes"
        in run("identify", folder / "loras" / "style.safetensors")[1]
    )
    assert run("identify", folder, "-v")[1].count("F8_E4M3 with scale_weight") == 2
    assert [each["kind"] for each in json.loads(run("identify", folder, "--json")[1])]


def test_several_files_are_several_checkpoints(run, folder, dense):
    """But for shards of one name; a broken one does not hide the others."""
    broken = folder / "broken.safetensors"
    broken.write_text("no checkpoint")
    shards = sorted(folder.glob("parts-*"))
    assert len(shards) == 2
    status, out, err = run("identify", dense, broken, *shards)
    assert status == 1
    assert err.startswith(f"hijack: {broken}: ")
    assert err.count("\n") == 1
    rows = out.splitlines()[2:]
    assert len(rows) == 2
    assert rows[0].startswith(str(dense))
    assert "musubi 1x64" in rows[1]
    save_file({"a.weight_scale": torch.ones(1)}, broken)
    status, out, _ = run("identify", dense, broken, "--assume", "musubi")
    assert status == 3
    assert out.splitlines()[-1].endswith("cannot be loaded as it is; see -v")


def test_a_block_has_one_name_everywhere(run, tmp_path, dense):
    """A whole row is one in the summary, in the list of layers and among files."""
    path = tmp_path / "rows.safetensors"
    assert run("quantize", dense, path, "--block-size", "row")[0] == 0
    _, out, _ = run("identify", path, "-v")
    assert "musubi   row " in out
    assert "1x" not in out
    assert "musubi row" in run("identify", path, dense)[1]


def test_one_shard_is_no_plural(run, tmp_path, dense):
    """A file that fits into one shard says so in plain words."""
    path = tmp_path / "q.safetensors"
    _, out, _ = run("quantize", dense, path, "--max-shard-size", "5GB")
    assert "and 1 shard, " in out
