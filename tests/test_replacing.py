"""What hijack may replace: nothing it reads, and nothing else without being asked."""

import os
import threading

import pytest
import torch
from safetensors.torch import save_file

import hijack
import schemes.blockwise_fp8  # noqa: F401 - registers the scheme
from hijack import cli
from hijack.errors import CheckpointError

EXISTS = r"exists; pass --force \(in Python overwrite=True\)"


@pytest.fixture
def dense(tmp_path):
    """A dense checkpoint."""
    path = tmp_path / "dense.safetensors"
    save_file({"a.weight": torch.randn(64, 128).bfloat16()}, path)
    return path


@pytest.fixture
def coded(dense, tmp_path):
    """The same, quantized."""
    path = tmp_path / "coded.safetensors"
    hijack.quantize_file(dense, path)
    return path


@pytest.fixture
def lora(tmp_path):
    """A LoRA for it."""
    path = tmp_path / "lora.safetensors"
    parts = {"lora_A": torch.ones(1, 128), "lora_B": torch.ones(64, 1)}
    save_file({f"a.{name}.weight": part for name, part in parts.items()}, path)
    return path


def write_by_save(dense, coded, path, **words):
    """Write with `hijack.save`."""
    hijack.save(torch.nn.Linear(4, 4), path, **words)


WRITERS = {
    "quantize": lambda dense, coded, path, **words: hijack.quantize_file(
        dense, path, **words
    ),
    "quantize to shards": lambda dense, coded, path, **words: hijack.quantize_file(
        dense, path, max_shard_size="6KB", **words
    ),
    "convert": lambda dense, coded, path, **words: hijack.convert_file(
        coded, path, "hijack", **words
    ),
    "save": write_by_save,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_every_function_asks_before_it_replaces_a_file(writer, dense, coded, tmp_path):
    """The file is as it was, until ``overwrite=True``."""
    folder = tmp_path / "out"
    folder.mkdir()
    path = folder / "x.safetensors"
    WRITERS[writer](dense, coded, path)
    before = {each: each.read_bytes() for each in folder.iterdir()}
    with pytest.raises(CheckpointError, match=EXISTS):
        WRITERS[writer](dense, coded, path)
    assert {each: each.read_bytes() for each in folder.iterdir()} == before
    WRITERS[writer](dense, coded, path, overwrite=True)
    assert len(list(folder.iterdir())) == len(before)


def test_the_second_of_two_does_not_replace_what_the_first_wrote(dense, tmp_path):
    """It waits for the lock, and is refused before it does any work."""
    path, layers = tmp_path / "x.safetensors", []
    second = threading.Thread(target=lambda: failures.append(attempt()))
    failures = []

    def attempt():
        try:
            hijack.quantize_file(dense, path, progress=lambda *done: layers.append(1))
        except CheckpointError as error:
            return str(error)

    def meanwhile(done, total, layer):
        second.start()
        second.join(0.3)  # it would be done if it did not wait

    hijack.quantize_file(dense, path, progress=meanwhile)
    second.join(30)
    assert "exists; pass --force" in failures[0]
    assert layers == []


def test_a_file_that_appears_meanwhile_is_not_replaced(dense, tmp_path):
    """Another program may finish the same file while this one works."""
    path = tmp_path / "x.safetensors"

    def appear(done, total, layer):
        path.write_bytes(b"precious")

    with pytest.raises(CheckpointError, match=EXISTS):
        hijack.quantize_file(dense, path, progress=appear)
    assert path.read_bytes() == b"precious"


@pytest.mark.parametrize("force", [[], ["--force"]])
@pytest.mark.parametrize("how", ["itself", "link", "hard link"])
@pytest.mark.parametrize("which", ["dense", "coded", "lora"])
def test_no_command_writes_over_what_it_reads(
    which, how, force, dense, coded, lora, tmp_path, capsys
):
    """By any name of the file, however it is asked for."""
    source = {"dense": dense, "coded": coded, "lora": lora}[which]
    target = source
    if how != "itself":
        target = tmp_path / "other.name"
        (os.symlink if how == "link" else os.link)(source, target)
    before = source.read_bytes()
    commands = [["quantize", dense, target, "--lora", lora]]
    if which == "coded":
        commands = [["convert", coded, target, "--dialect", "hijack"]]
    if which != "lora":
        commands.append(["compare", dense, coded, "--plot", target])
    for command in commands:
        assert cli.main([str(word) for word in [*command, *force]]) == 1
        assert f"{target}: is the source itself" in capsys.readouterr().err
        assert source.read_bytes() == before


def test_a_picture_replaces_a_file_only_if_forced(dense, coded, tmp_path, capsys):
    """Before anything is compared; afterwards it is a picture."""
    pytest.importorskip("matplotlib")
    path = tmp_path / "model.safetensors"
    path.write_bytes(b"precious")
    words = ["compare", str(dense), str(coded), "--plot", str(path)]
    assert cli.main(words) == 1
    said = capsys.readouterr()
    assert "exists; pass --force" in said.err
    assert said.out == ""
    assert path.read_bytes() == b"precious"
    assert cli.main([*words, "--force"]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_config_of_another_checkpoint_is_replaced_only_if_asked(dense, tmp_path):
    """One that says nothing of quantization is added to, which loses nothing."""
    folder = tmp_path / "out"
    folder.mkdir()
    config = folder / "config.json"
    config.write_text('{"kept": 1}')
    words = {"dialect": "deepseek", "write_config": True}
    hijack.quantize_file(dense, folder / "a.safetensors", **words)
    before = config.read_bytes()
    assert b"kept" in before
    words["block_size"] = (32, 32)
    with pytest.raises(CheckpointError, match=f"config.json: {EXISTS}"):
        hijack.quantize_file(dense, folder / "b.safetensors", **words)
    assert config.read_bytes() == before
    hijack.quantize_file(dense, folder / "b.safetensors", overwrite=True, **words)
    assert config.read_bytes() != before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_a_picture_replaces_no_pipe_and_no_folder(dense, coded, tmp_path, capsys):
    """Whoever may write to /dev could lose a device otherwise."""
    pytest.importorskip("matplotlib")
    pipe, folder = tmp_path / "pipe", tmp_path / "folder"
    os.mkfifo(pipe)
    folder.mkdir()
    words = ["compare", str(dense), str(coded), "--force", "--plot"]
    for target in (pipe, folder):
        assert cli.main([*words, str(target)]) == 1
        assert "is a folder, a pipe or a device" in capsys.readouterr().err
    assert pipe.is_fifo()
