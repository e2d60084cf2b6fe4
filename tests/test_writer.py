"""Files written whole or not at all: order, failures, full disks."""

import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from safetensors.torch import load_file

import hijack
from hijack.errors import CheckpointError
from hijack.safetensors_io.header import TensorInfo
from hijack.safetensors_io.reader import read_header
from hijack.safetensors_io.writer import open_writer, write_checkpoint
from tests.tiny_file import PLAN, TENSORS, names, same

# -- what is written -------------------------------------------------------------------


def test_written_files_are_read_by_safetensors(tmp_path):
    """Every dtype, empty tensors and scalars survive; equal input gives equal bytes."""
    tensors = {
        "a": torch.randn(3).double(),
        "b": torch.randn(2, 3).to(torch.float8_e5m2),
        "c": torch.empty(4, 2, 0, dtype=torch.uint8),
        "d": torch.tensor(True),
        "e": torch.randn(5).half(),
        "f": torch.randn(4, 6).t(),
    }
    first, second = tmp_path / "1.safetensors", tmp_path / "2.safetensors"
    write_checkpoint(first, tensors, {"k": "v"})
    write_checkpoint(second, dict(reversed(tensors.items())), {"k": "v"})
    loaded = load_file(first)
    assert all(same(loaded[key], tensor) for key, tensor in tensors.items())
    assert first.read_bytes() == second.read_bytes()
    assert names(tmp_path) == ["1.safetensors", "2.safetensors"]


def test_tensors_come_in_the_order_asked_for(tmp_path):
    """If all of them are aligned in it; else widest first, as by default."""
    plan = {"x": TensorInfo("U8", (4,)), "y": TensorInfo("F32", (1,))}
    path = tmp_path / "x.safetensors"

    def order(plan, wanted):
        with open_writer(path, plan, order=wanted, overwrite=True) as writer:
            for key, info in plan.items():
                writer.write_bytes(key, [key.encode() * info.nbytes])
        infos = read_header(path).tensors
        assert list(infos) == sorted(infos, key=lambda key: infos[key].begin)
        content = path.read_bytes()
        start = 8 + int.from_bytes(content[:8], "little")
        for key, info in infos.items():
            data = content[start + info.begin : start + info.end]
            assert data == key.encode() * info.nbytes
        return list(infos)

    assert order(plan, None) == ["y", "x"]
    assert order(plan, ["x", "y"]) == ["x", "y"]
    assert order({**plan, "x": TensorInfo("U8", (3,))}, ["x", "y"]) == ["y", "x"]


def test_tensors_are_written_in_parts(tmp_path):
    """In any order; the file is complete when every part has been written."""
    path, data = tmp_path / "x.safetensors", torch.arange(10, dtype=torch.int16)
    plan = {"x": TensorInfo("I16", (10,)), "y": TensorInfo("U8", (2, 0))}
    with open_writer(path, plan) as writer:
        writer.write_part("x", data[6:], 12)
        writer.write_part("y", torch.empty(2, 0, dtype=torch.uint8), 0)
        writer.write_part("x", data[:6], 0)
    assert torch.equal(load_file(path)["x"], data)
    plan.pop("y")
    with (
        pytest.raises(CheckpointError, match="x: was planned but never written"),
        open_writer(path, plan, overwrite=True) as writer,
    ):
        writer.write_part("x", data[:6], 0)
    assert torch.equal(load_file(path)["x"], data)


@pytest.mark.parametrize("offset", [-2, 14])
def test_a_part_stays_within_its_tensor(tmp_path, offset):
    """It would be written over another one."""
    path, data = tmp_path / "x.safetensors", torch.arange(4, dtype=torch.int16)
    plan = {"x": TensorInfo("I16", (10,))}
    with (
        pytest.raises(CheckpointError, match=r"x: got 8 bytes at .* within 20"),
        open_writer(path, plan) as writer,
    ):
        writer.write_part("x", data, offset)


def test_permissions_are_the_old_file_s_or_the_usual(tmp_path):
    """A replaced file stays private; a new one is what the umask makes it."""
    path = tmp_path / "x.safetensors"
    write_checkpoint(path, TENSORS)
    other = tmp_path / "other"
    other.touch()
    assert path.stat().st_mode == other.stat().st_mode
    path.chmod(0o600)
    write_checkpoint(path, TENSORS, overwrite=True)
    assert path.stat().st_mode & 0o777 == 0o600


@pytest.mark.skipif(sys.platform == "win32", reason="links need rights there")
def test_a_link_stays_a_link(tmp_path):
    """What it leads to is replaced, in its own folder."""
    real = tmp_path / "elsewhere" / "real.safetensors"
    real.parent.mkdir()
    real.write_bytes(b"old")
    link = tmp_path / "link.safetensors"
    link.symlink_to(real)
    write_checkpoint(link, TENSORS, overwrite=True)
    assert link.is_symlink()
    assert load_file(real).keys() == TENSORS.keys()
    assert names(real.parent) == ["real.safetensors"]


def test_many_threads_may_write(tmp_path):
    """Tensors written at once come to lie where they belong."""
    tensors = {f"t{i}": torch.full((1000 + i,), i) for i in range(200)}
    plan = {key: TensorInfo.of(tensor) for key, tensor in tensors.items()}
    path = tmp_path / "x.safetensors"
    with open_writer(path, plan) as writer, ThreadPoolExecutor(8) as pool:
        list(pool.map(writer.write, tensors, tensors.values()))
    loaded = load_file(path)
    assert all(same(loaded[key], tensor) for key, tensor in tensors.items())


def test_many_threads_may_write_where_there_is_no_pwrite(tmp_path, monkeypatch):
    """Windows has one position for each file; writers take turns."""
    monkeypatch.delattr(os, "pwrite")
    test_many_threads_may_write(tmp_path)


# -- what fails ------------------------------------------------------------------------


class FeedError(Exception):
    """Whatever feeds the writer fails."""


def no_b(writer):
    """Forget a tensor."""
    writer.write("a", torch.ones(2))


def fail(writer):
    """Fail half-way."""
    writer.write("a", torch.ones(2))
    raise FeedError


def interrupt(writer):
    """Be stopped half-way."""
    raise KeyboardInterrupt


def other_shape(writer):
    """Write what was not planned."""
    writer.write("a", torch.ones(3))


def too_short(writer):
    """Copy from a file that has become shorter."""
    writer.write_bytes("a", [b"1234"])


def too_long(writer):
    """Copy from a file that has become longer."""
    writer.write_bytes("a", [b"12345678", b"9"])


@pytest.mark.parametrize(
    ("job", "error", "message"),
    [
        (no_b, CheckpointError, "b: was planned but never written"),
        (fail, FeedError, None),
        (interrupt, KeyboardInterrupt, None),
        (
            other_shape,
            CheckpointError,
            r"a: got F32 \[3\], expected the planned F32 \[2\]",
        ),
        (too_short, CheckpointError, "a: got 4 bytes, expected 8"),
        (too_long, CheckpointError, "a: got 9 bytes, expected 8"),
    ],
)
@pytest.mark.parametrize("shards", [None, 8])
def test_a_writer_that_fails_leaves_the_old_file(tmp_path, job, error, message, shards):
    """Whatever goes wrong, the part is removed and the old file is whole."""
    path = tmp_path / "x.safetensors.index.json"
    if shards is None:
        path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    opened = open_writer(path, PLAN, max_shard_size=shards, overwrite=True)
    with pytest.raises(error, match=message), opened as writer:
        job(writer)
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == [path.name]


def test_dtypes_without_a_name_are_refused(tmp_path):
    """Before anything is written."""
    with pytest.raises(CheckpointError, match=r"a: safetensors has no name for torch"):
        write_checkpoint(tmp_path / "x", {"a": torch.ones(2, dtype=torch.complex128)})
    assert names(tmp_path) == []


def test_a_tensor_without_data_is_refused_by_name(tmp_path):
    """Such as of a model that nothing was loaded into."""
    with pytest.raises(CheckpointError, match="weight: is on the meta device, expect"):
        hijack.save(torch.nn.Linear(3, 3, device="meta"), tmp_path / "x")
    assert names(tmp_path) == []


def test_a_folder_is_no_file_name(tmp_path):
    """Neither is the folder that is missing."""
    with pytest.raises(CheckpointError, match="is a folder, expected a file name"):
        write_checkpoint(tmp_path, TENSORS)
    with pytest.raises(CheckpointError, match=r"written; .*none is not a folder"):
        write_checkpoint(tmp_path / "none" / "x.safetensors", TENSORS)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
def test_pipes_and_devices_are_never_replaced(tmp_path):
    """A rename would put a file where /dev/null was."""
    path = tmp_path / "pipe"
    os.mkfifo(path)
    with pytest.raises(CheckpointError, match="is a pipe or a device"):
        write_checkpoint(path, TENSORS)
    assert path.is_fifo()


# -- full disks ------------------------------------------------------------------------

NO_ROOM = (
    r"x\.safetensors: cannot be written; No space left on device; got [\d,]+ bytes "
    r"free, expected 132; make room, or write elsewhere"
)


def full(*_):
    """What the system says when the disk is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    "where", ["posix_fallocate", "ftruncate", "pwrite", "fsync", "replace"]
)
def test_a_disk_that_is_full_at_any_step_leaves_the_old_file(
    tmp_path, monkeypatch, where
):
    """The error says what was needed and what there is; nothing is left behind."""
    if not hasattr(os, where):
        pytest.skip("not on this system")
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    if where == "ftruncate":
        monkeypatch.delattr(os, "posix_fallocate", raising=False)
    monkeypatch.setattr(os, where, full)
    with pytest.raises(CheckpointError, match=NO_ROOM):
        write_checkpoint(path, TENSORS, overwrite=True)
    monkeypatch.undo()
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == [path.name]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="no list of open files")
@pytest.mark.parametrize("where", ["posix_fallocate", "pwrite"])
def test_no_file_stays_open_when_a_disk_is_full(tmp_path, monkeypatch, where):
    """Deleted or not, its blocks would be in use for as long as the process lives."""
    real, calls = getattr(os, where), []

    def second(*args):
        calls.append(args)
        return real(*args) if len(calls) < 2 else full()

    monkeypatch.setattr(os, where, second)
    with pytest.raises(CheckpointError, match="No space left"):
        open_writer(tmp_path / "x", PLAN, max_shard_size=4).__enter__()
    links = [f"/proc/self/fd/{name}" for name in os.listdir("/proc/self/fd")]
    opened = [os.readlink(link) for link in links if os.path.islink(link)]
    assert not [path for path in opened if path.startswith(str(tmp_path))]


def test_a_disk_with_room_and_no_files_left_is_told_apart(tmp_path, monkeypatch):
    """No room is needed for what a quota, or too many files, stand in the way of."""
    real = os.open

    def no_file(path, *words, **more):
        return full() if str(path).endswith("00001") else real(path, *words, **more)

    monkeypatch.setattr(os, "open", no_file)
    message = "elsewhere; the limit may be a quota, or the number of files"
    with pytest.raises(CheckpointError, match=message):
        write_checkpoint(tmp_path / "x.safetensors", TENSORS)
    assert names(tmp_path) == []


def test_blocks_that_cannot_be_set_aside_are_not(tmp_path, monkeypatch):
    """Where a file system has no way to reserve room, the file is written anyhow."""

    def unknown(*_):
        raise OSError(errno.EOPNOTSUPP, os.strerror(errno.EOPNOTSUPP))

    monkeypatch.setattr(os, "posix_fallocate", unknown, raising=False)
    path = tmp_path / "x.safetensors"
    write_checkpoint(path, TENSORS)
    assert same(load_file(path)["a"], TENSORS["a"])


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="cannot set room aside")
def test_a_disk_too_small_is_noticed_before_anything_is_written(tmp_path):
    """The room is asked for at once; a limit of the system stands for the disk."""
    path = tmp_path / "x.safetensors"
    path.write_bytes(b"old")
    script = (
        "import resource, sys, torch\n"
        "from hijack.safetensors_io.header import TensorInfo\n"
        "from hijack.safetensors_io.writer import open_writer\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))\n"
        "plan = {'a': TensorInfo('U8', (1 << 30,))}\n"
        "with open_writer(sys.argv[1], plan, overwrite=True):\n"
        "    print('was opened')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True
    )
    assert "CheckpointError" in done.stderr
    assert "cannot be written; File too large; got 1,073,741,904 bytes" in done.stderr
    assert done.stdout == ""
    assert path.read_bytes() == b"old"
    assert names(tmp_path) == [path.name]
