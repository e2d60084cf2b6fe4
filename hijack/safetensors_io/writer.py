"""Write safetensors files: planned first, streamed, and atomic."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import errno
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from hijack.errors import CheckpointError
from hijack.progress import Progress
from hijack.safetensors_io.atomic import refuse_replacing, temp_dir
from hijack.safetensors_io.header import TensorInfo
from hijack.safetensors_io.layout import FileLayout, Plan, plan_files
from hijack.safetensors_io.shards import destination, part_name

#: System errors for a full disk or quota.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
#: System errors of file systems that cannot reserve space.
_NO_RESERVE = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)


@dataclasses.dataclass(frozen=True)
class WriterFiles:
    """The files that a writer writes, before they have their names.

    Attributes:
        path: the destination, for messages.
        plan: key to dtype and shape of every tensor.
        layouts: of the files.
        folder: the temporary folder of the files.
    """

    path: Path
    plan: Plan
    layouts: Sequence[FileLayout]
    folder: Path


class CheckpointWriter:
    """Writes the tensors of a plan, in any order and from any thread.

    Args:
        files: to write.
        create: whether to make them; they are there where another process has.

    Attributes:
        files: that it writes.
    """

    def __init__(self, files: WriterFiles, *, create: bool = True) -> None:
        self.files = files
        self._path, self._plan = files.path, files.plan
        self._size = _size(files.layouts)
        self._offsets = {
            key: (number, *offsets)
            for number, layout in enumerate(files.layouts)
            for key, offsets in layout.offsets.items()
        }
        self._missing = {
            key: end - begin for key, (_, begin, end) in self._offsets.items()
        }
        self._lock = threading.Lock()
        self._open: list[int] = []
        try:
            with self._writing():
                for number, layout in enumerate(files.layouts):
                    flags = os.O_RDWR | getattr(os, "O_BINARY", 0)
                    flags |= os.O_CREAT if create else 0
                    part = files.folder / part_name(number)
                    self._open.append(os.open(part, flags, 0o666))
                    if not create:
                        continue
                    _reserve(self._open[-1], layout.size)
                    self._put(number, layout.header, 0)
        except BaseException:
            self.close()  # an open file uses space even after it is deleted
            raise

    def write(self, key: str, tensor: Tensor) -> None:
        """Write one planned tensor.

        Raises:
            CheckpointError: if its dtype or shape is not the planned one, or it has
                no data.
        """
        if tensor.is_meta:
            raise CheckpointError(
                f"{key}: is on the meta device, expected a tensor with data; load it "
                "first"
            )
        planned, info = self._plan[key], TensorInfo.of(tensor)
        if (info.dtype, info.shape) != (planned.dtype, planned.shape):
            raise CheckpointError(
                f"{key}: got {info.dtype} {list(info.shape)}, expected the planned "
                f"{planned.dtype} {list(planned.shape)}; the scheme gives other "
                "tensors for data than for a meta tensor"
            )
        self.write_bytes(key, [memory_of(tensor.detach().cpu().contiguous())])

    def write_bytes(self, key: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Write one planned tensor from chunks of its bytes.

        Raises:
            CheckpointError: if the chunks are not as long as planned.
        """
        number, begin, end = self._offsets[key]
        offset = begin
        for chunk in chunks:
            offset += len(chunk)
            if offset <= end:
                with self._writing():
                    self._put(number, chunk, offset - len(chunk))
        if offset != end:
            raise CheckpointError(
                f"{key}: got {offset - begin} bytes, expected {end - begin}; did the "
                "source change while it was read?"
            )
        self.note(key, end - begin)

    def write_part(self, key: str, tensor: Tensor, offset: int) -> None:
        """Write a part of one planned tensor; all parts together are written once.

        Args:
            key: of the planned tensor.
            tensor: whose bytes are written.
            offset: of the first byte within the planned tensor.

        Raises:
            CheckpointError: if it does not fit.
        """
        data = memory_of(tensor.detach().cpu().contiguous())
        number, begin, end = self._offsets[key]
        if not 0 <= offset <= end - begin - len(data):
            raise CheckpointError(
                f"{key}: got {len(data)} bytes at {offset}, expected them within "
                f"{end - begin}; the scheme gives other tensors for rows than for the "
                "whole weight"
            )
        with self._writing():
            self._put(number, data, begin + offset)
        self.note(key, len(data))

    def note(self, key: str, size: int) -> None:
        """Count bytes of a tensor that were written, here or by another process."""
        with self._lock:
            left = self._missing.pop(key, 0) - size
            if left > 0:
                self._missing[key] = left

    def finish(self) -> None:
        """Wait until everything is on disk.

        Raises:
            CheckpointError: if a tensor was never written.
        """
        if self._missing:
            raise CheckpointError(
                f"{min(self._missing)}: was planned but never written, one of "
                f"{len(self._missing)} tensors"
            )
        with self._writing():
            for file in self._open:
                os.fsync(file)

    def close(self) -> None:
        """Close the files."""
        while self._open:
            os.close(self._open.pop())

    # -- details -----------------------------------------------------------------------

    def _put(self, number: int, data: bytes | memoryview, offset: int) -> None:
        view, file = memoryview(data), self._open[number]
        while view:
            if hasattr(os, "pwrite"):
                count = os.pwrite(file, view, offset)
            else:  # Windows
                with self._lock:
                    os.lseek(file, offset, os.SEEK_SET)
                    count = os.write(file, view)
            view, offset = view[count:], offset + count

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Turn errors of the destination into CheckpointError, not those of sources."""
        with _writing(self._path, self._size):
            yield


@contextlib.contextmanager
def open_writer(
    path: str | os.PathLike[str],
    plan: Plan,
    metadata: Mapping[str, str] | None = None,
    order: Sequence[str] | None = None,
    max_shard_size: int | None = None,
    *,
    overwrite: bool = False,
) -> Iterator[CheckpointWriter]:
    """A writer whose file gets its name only when everything is written.

    The file is written in a folder beside the destination, synced, and renamed. On
    failure it is removed and the destination is unchanged. Files of a killed process
    are removed by the next that writes there. If the destination is a link, the file
    it points to is replaced.

    Args:
        path: the destination.
        plan: key to dtype and shape; files and offsets are ignored.
        metadata: strings for the header.
        order: of the tensors in the file, used if it keeps all of them aligned; by
            default the widest come first.
        max_shard_size: bytes of tensors in a shard; if set, shards are written, and
            the destination is their index.
        overwrite: whether a file that exists is replaced.

    Raises:
        CheckpointError: if the destination exists and must not be replaced, the folder
            cannot be written or the disk is full.
    """
    path = Path(path)
    output = destination(path, sharded=max_shard_size is not None)
    layouts = plan_files(plan, metadata or {}, order, max_shard_size)
    output.check()
    refuse_replacing(output.replaced(), overwrite=overwrite)
    with contextlib.ExitStack() as stack:
        with _writing(path, _size(layouts)):
            folder = stack.enter_context(temp_dir(output.target, output.clean))
        # another process may have written the file while this one waited for it
        refuse_replacing(output.replaced(), overwrite=overwrite)
        writer = CheckpointWriter(WriterFiles(path, plan, layouts, folder))
        stack.callback(writer.close)
        yield writer
        writer.finish()
        writer.close()
        # or one without our lock, while this one worked
        refuse_replacing(output.replaced(), overwrite=overwrite)
        with _writing(path, _size(layouts)):
            output.commit(folder, layouts)


def write_checkpoint(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> None:
    """Write tensors in memory to a safetensors file, atomically.

    Args:
        path: the destination.
        tensors: key to tensor.
        metadata: strings for the header.
        overwrite: whether a file that exists is replaced.
        progress: called after each tensor.

    Raises:
        CheckpointError: if the file exists and must not be replaced, a dtype has no
            name in safetensors, or writing fails.
    """
    plan = {key: TensorInfo.of(tensor) for key, tensor in tensors.items()}
    with open_writer(path, plan, metadata, overwrite=overwrite) as writer:
        for done, (key, tensor) in enumerate(tensors.items(), 1):
            writer.write(key, tensor)
            if progress is not None:
                progress(done, len(tensors), key)


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return memoryview(b"")
    memory = (ctypes.c_char * size).from_address(tensor.data_ptr())
    memory.tensor = tensor  # type: ignore[attr-defined] # lives as long as the view
    return memoryview(memory).cast("B")


# -- details ---------------------------------------------------------------------------


def _size(layouts: Sequence[FileLayout]) -> int:
    return sum(layout.size for layout in layouts)


def _reserve(file: int, size: int) -> None:
    """Set a file's size, and reserve the space if the file system can."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, size)
            return
        except OSError as error:
            if error.errno not in _NO_RESERVE:
                with contextlib.suppress(OSError):
                    os.ftruncate(file, 0)  # free what was reserved before the failure
                raise
    os.ftruncate(file, size)


@contextlib.contextmanager
def _writing(path: Path, size: int) -> Iterator[None]:
    """Turn system errors into one that names the file and the cause."""
    try:
        yield
    except OSError as error:
        reason = f"{path}: cannot be written; {error.strerror}"
        if error.errno in _NO_ROOM:
            free = shutil.disk_usage(path.resolve().parent).free
            reason += (
                f"; got {free:,} bytes free, expected {size:,}; make room, or write "
                "elsewhere"
            )
            if free >= size:
                reason += "; the limit may be a quota, or the number of files"
        elif error.errno == errno.EFBIG:
            reason += (
                f"; got {size:,} bytes, expected no more than the file system and the "
                "process's limits allow; write shards, or elsewhere"
            )
        raise CheckpointError(reason) from error
