"""What killed processes left of files they never finished, and who may remove it."""

import contextlib
import errno
import os
import subprocess
import sys
import threading

import pytest
from filelock import UnixFileLock
from safetensors.torch import load_file

from hijack.safetensors_io import atomic
from hijack.safetensors_io.writer import write_checkpoint
from tests.tiny_file import TENSORS, names, same

UNFINISHED = (
    "import sys, torch\n"
    "from hijack.safetensors_io.header import TensorInfo\n"
    "from hijack.safetensors_io.writer import open_writer\n"
    "plan = {'a': TensorInfo('F32', (2,)), 'b': TensorInfo('F32', (1,))}\n"
    "with open_writer(sys.argv[1], plan, overwrite=True) as writer:\n"
    "    writer.write('a', torch.tensor([1., 2.]))\n"
    "    print('written', flush=True)\n"
    "    sys.stdin.read()\n"
)


@contextlib.contextmanager
def unfinished(path):
    """A process that holds a file it never finishes; it is killed at the end."""
    process = subprocess.Popen(
        [sys.executable, "-c", UNFINISHED, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout.readline() == b"written\n"
    try:
        yield
    finally:
        process.kill()
        process.communicate()


def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path):
    """But nothing of runs to other names."""
    path, other = tmp_path / "x.safetensors", tmp_path / "x.b.safetensors"
    with unfinished(path):
        pass
    with unfinished(other):
        pass
    assert len(names(tmp_path)) == 4  # a folder and a lock each
    write_checkpoint(path, TENSORS)
    left = names(tmp_path)
    assert len(left) == 3
    assert left[-1] == path.name
    assert all(name.startswith(".x.b.safetensors.") for name in left[:-1])
    write_checkpoint(other, TENSORS)
    assert names(tmp_path) == ["x.b.safetensors", "x.safetensors"]


def test_a_second_writer_waits_for_the_first(tmp_path, caplog):
    """It says so, removes nothing of the first, and then writes its own."""
    path = tmp_path / "x.safetensors"
    second = threading.Thread(target=write_checkpoint, args=(path, TENSORS))
    with unfinished(path):
        during = names(tmp_path)
        second.start()
        second.join(0.3)
        assert second.is_alive()
        assert names(tmp_path) == during
    second.join(30)
    assert "waiting for another process" in caplog.text
    assert same(load_file(path)["a"], TENSORS["a"])
    assert names(tmp_path) == ["x.safetensors"]


def test_a_lock_that_is_deleted_while_it_is_waited_for_is_taken_again(tmp_path):
    """Eight writers one after another: no two at once, although each deletes it."""
    path = tmp_path / "x.safetensors"
    inside, most = 0, 0
    barrier = threading.Barrier(8)

    def hold():
        nonlocal inside, most
        barrier.wait()
        for _ in range(5):
            with atomic.temp_dir(path):
                inside += 1
                most = max(most, inside)
                assert len([n for n in names(tmp_path) if n.endswith(".part")]) == 1
                inside -= 1

    failures = []

    def run():
        try:
            hold()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []
    assert most == 1
    assert names(tmp_path) == []


def test_a_lock_that_vanishes_while_it_is_looked_at_is_taken(tmp_path, monkeypatch):
    """Its last holder deletes it between two looks."""
    monkeypatch.setattr(os.path, "lexists", lambda path: True)
    with atomic.temp_dir(tmp_path / "x.safetensors") as folder:
        assert folder.is_dir()


def test_what_only_looks_like_a_leftover_stays(tmp_path):
    """Files and links of such a name are somebody else's."""
    (tmp_path / ".x.safetensors.abcdefgh.part").write_bytes(b"mine")
    (tmp_path / "kept").mkdir()
    (tmp_path / "kept" / "file").touch()
    if sys.platform != "win32":
        (tmp_path / ".x.safetensors.01234567.part").symlink_to(tmp_path / "kept")
    before = names(tmp_path)
    write_checkpoint(tmp_path / "x.safetensors", TENSORS)
    assert names(tmp_path) == sorted([*before, "x.safetensors"])
    assert names(tmp_path / "kept") == ["file"]


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
@pytest.mark.parametrize("kind", ["link", "dangling", "pipe"])
def test_a_lock_that_is_no_file_is_not_touched(tmp_path, kind):
    """Whoever unpacks an archive has whatever was in it."""
    precious, lock = tmp_path / "precious", tmp_path / ".x.safetensors.lock"
    if kind == "pipe":
        os.mkfifo(lock)
    else:
        lock.symlink_to(precious)
    if kind == "link":
        precious.write_bytes(b"precious")
    before = names(tmp_path)
    write_checkpoint(tmp_path / "x.safetensors", TENSORS)
    assert names(tmp_path) == sorted([*before, "x.safetensors"])
    if kind == "link":
        assert precious.read_bytes() == b"precious"


@pytest.mark.parametrize("error", [OSError(errno.ENOLCK, "none"), NotImplementedError])
def test_where_there_are_no_locks_files_are_written_and_nothing_is_removed(
    tmp_path, monkeypatch, error
):
    """Some network file systems have none: nobody can tell what is a leftover."""

    def no_locks(self):
        raise error

    left = tmp_path / ".x.safetensors.abcdefgh.part"
    left.mkdir()
    monkeypatch.setattr(UnixFileLock, "_acquire", no_locks)
    write_checkpoint(tmp_path / "x.safetensors", TENSORS)
    found = [name for name in names(tmp_path) if not name.endswith(".lock")]
    assert found == [left.name, "x.safetensors"]


def test_names_as_long_as_they_may_be_are_written(tmp_path):
    """The folder's own name is cut so that it fits, also within a letter."""
    path = tmp_path / ("ä" * 127)
    write_checkpoint(path, TENSORS)
    assert names(tmp_path) == [path.name]
