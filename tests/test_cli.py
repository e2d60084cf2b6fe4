"""The command line: what users type, and what they read when it is wrong."""

import json
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

from hijack import cli
from hijack.checkpoint.writer import CheckpointWriter


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
    assert "no layer is claimed" in run("identify", dense)[1]


def test_identify_reports_orphans_in_its_status(run, tmp_path):
    """A scale nobody reads makes the status 3."""
    path = tmp_path / "o.safetensors"
    save_file({"a.weight_scale": torch.ones(1)}, path)
    status, out, _ = run("identify", path)
    assert status == 3
    assert "orphan: a.weight_scale" in out


def test_schemes_lists_names_dialects_and_origin(run):
    """The reference scheme is there."""
    status, out, _ = run("schemes")
    assert status == 0
    row = next(line for line in out.splitlines() if line.startswith("blockwise_fp8"))
    assert "musubi, " in row
    assert ", hijack" in row
    assert row.endswith("schemes.blockwise_fp8")


def test_doctor_tells_versions_hosts_and_variables(run, monkeypatch):
    """Everything a bug report needs."""
    monkeypatch.setenv("HIJACK_DISABLE", "comfyui")
    status, out, _ = run("doctor")
    assert status == 0
    for expected in ("torch 2", "pluggy ", "HIJACK_DISABLE=comfyui", "comfyui"):
        assert expected in out


def bad_inputs(folder):
    """Words that are wrong, and what the message must say."""
    text = folder / "t.safetensors"
    text.write_text("hello, this is not a checkpoint")
    yield ("identify", folder / "none.safetensors"), "No such file"
    yield ("identify", text), "no safetensors file"
    yield ("identify", folder), "is a folder"
    yield ("quantize", text, folder / "q"), "no safetensors file"
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
        ["quantize", "a", "b", "--dtype", "int4"],
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
    assert "expected" in err or "choose from" in err or "required" in err


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
