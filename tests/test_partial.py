"""What is left of files that were never finished: removed, kept, or gone on with."""

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

from hijack.safetensors_io import atomic
from hijack.safetensors_io.header import TensorInfo
from hijack.safetensors_io.writer import open_writer, write_checkpoint
from tests.tiny_file import PLAN, TENSORS, names, same

# -- what killed runs leave ------------------------------------------------------------

KILLED = (
    "import os, sys, torch\n"
    "from hijack.safetensors_io.header import TensorInfo\n"
    "from hijack.safetensors_io.writer import open_writer\n"
    "plan = {'a': TensorInfo('F32', (2,)), 'b': TensorInfo('F32', (1,))}\n"
    "with open_writer(sys.argv[1], plan, job=sys.argv[2] or None) as writer:\n"
    "    writer.write('a', torch.tensor([1., 2.]))\n"
    "    if sys.argv[2]: writer._journal.flush()\n"
    "    print('written', flush=True)\n"
    "    sys.stdin.read()\n"
)


def start(path, job=""):
    """A process that holds a file it never finishes."""
    process = subprocess.Popen(
        [sys.executable, "-c", KILLED, path, job],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"written\n"
    return process


def kill(process):
    """End it as a power cut would."""
    process.kill()
    process.communicate()


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    """But nothing of a run that is still going, nor of one with another name."""
    path, other = tmp_path / "x.safetensors", tmp_path / "x.b.safetensors"
    killed, going, elsewhere = start(path), start(path), start(other)
    kill(killed)
    kill(elsewhere)
    assert len(names(tmp_path)) == 3
    write_checkpoint(path, TENSORS)
    left = [name for name in names(tmp_path) if name.endswith(".part")]
    assert len(left) == 2
    assert sorted(name.count(".b.") for name in left) == [0, 1]
    kill(going)
    write_checkpoint(path, TENSORS)
    write_checkpoint(other, TENSORS)
    assert names(tmp_path) == ["x.b.safetensors", "x.safetensors"]


def test_a_folder_of_a_run_killed_at_its_first_step_is_removed(tmp_path):
    """It is there, but nobody has locked it yet."""
    (tmp_path / ".x.safetensors.abcdefgh.part").mkdir()
    write_checkpoint(tmp_path / "x.safetensors", TENSORS)
    assert names(tmp_path) == ["x.safetensors"]


def test_what_only_looks_like_a_leftover_stays(tmp_path):
    """Files and links of such a name are somebody else's."""
    (tmp_path / ".x.safetensors.abcdefgh.part").write_bytes(b"mine")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "lock").touch()
    if sys.platform != "win32":
        (tmp_path / ".x.safetensors.01234567.part").symlink_to(tmp_path / "kept")
    before = names(tmp_path)
    write_checkpoint(tmp_path / "x.safetensors", TENSORS)
    assert names(tmp_path) == sorted([*before, "x.safetensors"])
    assert names(tmp_path / "kept") == ["lock"]


def test_a_lock_taken_too_early_is_no_loss(tmp_path, monkeypatch):
    """A new folder taken for a leftover by another process is replaced."""
    made = []
    real = atomic.tempfile.mkdtemp

    def robbed(*words):
        folder = real(*words)
        made.append(folder)
        if len(made) == 1:
            os.rmdir(folder)
        return folder

    monkeypatch.setattr(atomic.tempfile, "mkdtemp", robbed)
    write_checkpoint(tmp_path / "x.safetensors", TENSORS)
    assert len(made) == 2
    assert names(tmp_path) == ["x.safetensors"]


@pytest.mark.skipif(atomic.fcntl is None, reason="no such locks here")
def test_where_there_are_no_locks_files_are_written_and_nothing_is_removed(
    tmp_path, monkeypatch
):
    """Some network file systems have none: nobody can tell what is a leftover."""

    def no_locks(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    left = tmp_path / ".x.safetensors.abcdefgh.part"
    left.mkdir()
    (left / "lock").touch()
    monkeypatch.setattr(atomic.fcntl, "flock", no_locks)
    write_checkpoint(tmp_path / "x.safetensors", TENSORS)
    assert names(tmp_path) == [left.name, "x.safetensors"]


def test_where_open_files_cannot_be_deleted_that_is_the_lock(tmp_path, monkeypatch):
    """As on Windows: what cannot be deleted is held, all else is a leftover."""
    held, left = (tmp_path / f".x.safetensors.{c * 8}.part" for c in "ab")
    for folder in (held, left):
        folder.mkdir()
        (folder / "lock").touch()
        (folder / "00001").touch()
    real = os.unlink

    def unlink(path):
        if str(path).startswith(str(held)):
            raise PermissionError(errno.EACCES, "is open")
        real(path)

    monkeypatch.setattr(atomic, "fcntl", None)
    monkeypatch.setattr(os, "unlink", unlink)
    write_checkpoint(tmp_path / "x.safetensors", TENSORS)
    assert names(tmp_path) == [held.name, "x.safetensors"]


def test_names_as_long_as_they_may_be_are_written(tmp_path):
    """The folder's own name is cut so that it fits, also within a letter."""
    path = tmp_path / ("ä" * 127)
    write_checkpoint(path, TENSORS)
    assert names(tmp_path) == [path.name]


# -- going on --------------------------------------------------------------------------


def interrupted(path, tensors):
    """A run of a job that is stopped after it has written some tensors."""

    def job(writer):
        for key, tensor in tensors.items():
            writer.write(key, tensor)
        raise KeyboardInterrupt

    opened = open_writer(path, PLAN, job="job")
    with pytest.raises(KeyboardInterrupt), opened as writer:
        job(writer)


def test_a_run_of_the_same_job_goes_on_where_a_killed_one_was(tmp_path):
    """What the journal lists is not asked for again; the file is the same."""
    path, whole = tmp_path / "x.safetensors", tmp_path / "whole.safetensors"
    write_checkpoint(whole, TENSORS)
    kill(start(path, "job"))
    with open_writer(path, PLAN, job="job") as writer:
        assert writer.missing == {"b"}
        writer.write("b", TENSORS["b"])
    assert path.read_bytes() == whole.read_bytes()
    assert names(tmp_path) == ["whole.safetensors", "x.safetensors"]


def test_a_run_that_fails_leaves_what_it_did_if_it_has_a_job(tmp_path):
    """An interruption is no loss either."""
    path = tmp_path / "x.safetensors"
    interrupted(path, {"b": TENSORS["b"]})
    with open_writer(path, PLAN, job="job") as writer:
        assert writer.missing == {"a"}
        writer.write("a", TENSORS["a"])
    assert same(load_file(path)["b"], TENSORS["b"])
    assert names(tmp_path) == ["x.safetensors"]


@pytest.mark.parametrize(
    ("job", "plan"),
    [("another", PLAN), ("job", {**PLAN, "b": TensorInfo("I32", (1,))}), (None, PLAN)],
)
def test_a_run_of_another_job_begins_anew(tmp_path, job, plan):
    """Other sources, options or tensors: nothing of the leftover is used."""
    path = tmp_path / "x.safetensors"
    kill(start(path, "job"))
    tensors = {"a": torch.zeros(2), "b": torch.zeros(1).to(plan["b"].torch_dtype)}
    with open_writer(path, plan, job=job) as writer:
        assert writer.missing == {"a", "b"}
        for key, tensor in tensors.items():
            writer.write(key, tensor)
    assert all(same(load_file(path)[key], tensors[key]) for key in "ab")
    assert names(tmp_path) == ["x.safetensors"]


def spoil(folder, how):
    """Damage a leftover as a crash of the system may."""
    journal = folder / "journal"
    if how == "cut short":
        journal.write_bytes(journal.read_bytes() + b'"b')
    elif how == "not text":
        journal.write_bytes(journal.read_bytes() + b"\xff\n")
    elif how == "empty":
        journal.write_bytes(b"")
    elif how == "no file":
        (folder / "00001").unlink()
    else:
        os.truncate(folder / "00001", 9)


@pytest.mark.parametrize(
    ("how", "missing"),
    [
        ("cut short", {"b"}),
        ("not text", {"a", "b"}),
        ("empty", {"a", "b"}),
        ("no file", {"a", "b"}),
        ("short file", {"a", "b"}),
    ],
)
def test_a_damaged_leftover_is_believed_as_far_as_it_is_whole(tmp_path, how, missing):
    """A line that was cut short is none; a journal that is not whole lists nothing."""
    path = tmp_path / "x.safetensors"
    kill(start(path, "job"))
    spoil(next(tmp_path.glob(".*.part")), how)
    with open_writer(path, PLAN, job="job") as writer:
        assert writer.missing == missing
        for key in missing:
            writer.write(key, TENSORS[key])
    assert all(same(load_file(path)[key], TENSORS[key]) for key in "ab")
    assert names(tmp_path) == ["x.safetensors"]


def test_a_key_is_listed_only_after_its_bytes_are_on_disk(tmp_path, monkeypatch):
    """The files are synced between the writing of a tensor and its line."""
    monkeypatch.setattr(atomic, "SYNC_EVERY", 8)
    events = []
    real = os.fsync

    def fsync(descriptor):
        events.append(os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2])
        journal = next(tmp_path.glob(".*/journal"), None)
        events.append(journal.read_text().count("\n") if journal else 0)
        real(descriptor)

    if not os.path.exists("/proc/self/fd"):
        pytest.skip("no names of open files here")
    monkeypatch.setattr(os, "fsync", fsync)
    interrupted(tmp_path / "x", {"a": TENSORS["a"]})
    assert events == ["journal", 1, "00001", 1, "journal", 2]


def test_threads_may_share_a_journal(tmp_path, monkeypatch):
    """Every tensor is listed once, whoever wrote it and whenever it was synced."""
    monkeypatch.setattr(atomic, "SYNC_EVERY", 64)
    plan = {f"t{i}": TensorInfo("U8", (16,)) for i in range(100)}
    data, barrier = bytes(16), threading.Barrier(4)

    def write(writer, keys):
        barrier.wait()
        for key in keys:
            writer.write_bytes(key, [data])

    def job(writer):
        with ThreadPoolExecutor(4) as pool:
            parts = [list(plan)[i::4] for i in range(4)]
            list(pool.map(write, [writer] * 4, parts))
        raise KeyboardInterrupt

    opened = open_writer(tmp_path / "x", plan, job="job")
    with pytest.raises(KeyboardInterrupt), opened as writer:
        job(writer)
    journal = next(tmp_path.glob(".*/journal")).read_text().splitlines()
    assert sorted(map(json.loads, journal[1:])) == sorted(plan)
    shutil.rmtree(next(tmp_path.glob(".*.part")))
