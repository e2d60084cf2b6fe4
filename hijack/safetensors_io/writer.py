"""Write safetensors files: planned first, streamed, whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from hijack.errors import CheckpointError
from hijack.safetensors_io.atomic import Journal, Partial, leftovers, part_name
from hijack.safetensors_io.header import TensorInfo
from hijack.safetensors_io.layout import Layout, Plan, lay_out_files
from hijack.safetensors_io.shards import Destination, destination

#: Errors of the system that mean there is no room.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT)
#: Errors of file systems that cannot set blocks aside.
_NO_RESERVE = (errno.EINVAL, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS)


class CheckpointWriter:
    """Writes the tensors of a plan, in any order and from any thread, to their places.

    Attributes:
        missing: keys of the tensors that are still to be written.
    """

    def __init__(
        self, path: Path, plan: Plan, layouts: Sequence[Layout], partial: Partial
    ) -> None:
        self._path, self._plan = path, plan
        self._size = _size(layouts)
        self._places = {
            key: (number, *place)
            for number, layout in enumerate(layouts)
            for key, place in layout.places.items()
        }
        self.missing = set(plan)
        self._journal: Journal | None = None
        self._lock = threading.Lock()
        self._files: list[int] = []
        try:
            with self._writing():
                for number, layout in enumerate(layouts):
                    self._files.append(partial.open(part_name(number)))
                    _reserve(self._files[-1], layout.size)
                    self._put(number, layout.header, 0)
        except BaseException:
            self.close()  # a file that is open takes room even when it is deleted
            raise

    def keep(self, partial: Partial, job: str) -> None:
        """Keep a journal; what one of the same job lists is missing no more."""
        with self._writing():
            self._journal = Journal(partial, job, self._sync)
        self.missing -= self._journal.done

    def write(self, key: str, tensor: Tensor) -> None:
        """Write one planned tensor.

        Raises:
            CheckpointError: if dtype or shape are not the planned ones, or it has no
                data.
        """
        if tensor.is_meta:
            raise CheckpointError(
                f"{key}: is on the meta device, expected a tensor with data; load it "
                "first"
            )
        planned, got = self._plan[key], TensorInfo.of(tensor)
        if (got.dtype, got.shape) != (planned.dtype, planned.shape):
            raise CheckpointError(
                f"{key}: got {got.dtype} {list(got.shape)}, planned were "
                f"{planned.dtype} {list(planned.shape)}; the scheme gives other "
                "tensors for data than for a meta tensor"
            )
        self.write_bytes(key, [memory_of(tensor.detach().cpu().contiguous())])

    def write_bytes(self, key: str, chunks: Iterable[bytes | memoryview]) -> None:
        """Write one planned tensor from pieces of its bytes.

        Raises:
            CheckpointError: if the pieces are not as long as planned.
        """
        number, begin, end = self._places[key]
        offset = begin
        for chunk in chunks:
            offset += len(chunk)
            if offset <= end:
                with self._writing():
                    self._put(number, chunk, offset - len(chunk))
        if offset != end:
            raise CheckpointError(
                f"{key}: got {offset - begin} bytes, expected {end - begin}; was the "
                "source changed while it was read?"
            )
        with self._writing():
            if self._journal is not None:
                self._journal.add(key, end - begin)
        self.missing.discard(key)

    def finish(self) -> None:
        """Wait until everything is on disk.

        Raises:
            CheckpointError: if a tensor was never written.
        """
        if self.missing:
            raise CheckpointError(
                f"{min(self.missing)}: was planned but never written, one of "
                f"{len(self.missing)} tensors"
            )
        with self._writing():
            self._sync()

    def close(self) -> None:
        """Close the files; what was written so far goes into the journal."""
        with contextlib.suppress(OSError):
            if self._journal is not None:
                self._journal.flush()
                self._journal.close()
        while self._files:
            os.close(self._files.pop())

    # -- details -----------------------------------------------------------------------

    def _put(self, number: int, data: bytes | memoryview, offset: int) -> None:
        view, file = memoryview(data), self._files[number]
        while view:
            if hasattr(os, "pwrite"):
                count = os.pwrite(file, view, offset)
            else:  # Windows
                with self._lock:
                    os.lseek(file, offset, os.SEEK_SET)
                    count = os.write(file, view)
            view, offset = view[count:], offset + count

    def _sync(self) -> None:
        for file in self._files:
            os.fsync(file)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """Tell failures of the destination from those of whoever feeds the writer."""
        with _writing(self._path, self._size):
            yield


@contextlib.contextmanager
def open_writer(
    path: str | os.PathLike[str],
    plan: Plan,
    metadata: Mapping[str, str] | None = None,
    order: Sequence[str] | None = None,
    max_shard_size: int | None = None,
    job: str | None = None,
) -> Iterator[CheckpointWriter]:
    """A writer whose file takes its name only when everything is written.

    The file is made in a folder beside the destination, synced, and renamed. On any
    failure it is removed and the destination stays as it was; what a killed process
    left is removed by the next that writes there. A link is not replaced, but the file
    it leads to.

    Args:
        path: the destination; may exist.
        plan: key to dtype and shape; files and offsets do not count.
        metadata: strings for the header.
        order: of the tensors in the file, if all of them come to lie aligned in it;
            else, and by default, the widest come first.
        max_shard_size: bytes of tensors in a file; then shards are written, and the
            destination is their index, as `ShardSet` says.
        job: what the file is made of, if failures shall leave what is done, for the
            next writer with the same job and plan to go on with.

    Raises:
        CheckpointError: if the folder cannot be written or the disk is full.
    """
    path = Path(path)
    place = destination(path, sharded=max_shard_size is not None)
    layouts = lay_out_files(plan, metadata or {}, order, max_shard_size)
    if job is not None:
        headers = hashlib.sha256(b"".join(layout.header for layout in layouts))
        job = f"{job} {headers.hexdigest()}"
    place.check()
    with _writing(path, _size(layouts)):
        partial = _claim(place, layouts, job)
    yield from _written(path, plan, place, layouts, partial, job)


def _written(
    path: Path,
    plan: Plan,
    place: Destination,
    layouts: Sequence[Layout],
    partial: Partial,
    job: str | None,
) -> Iterator[CheckpointWriter]:
    """Open the files, have them written, and give them their names."""
    writer, kept = None, False
    try:
        writer = CheckpointWriter(path, plan, layouts, partial)
        if job is not None:
            writer.keep(partial, job)
            kept = True
        yield writer
        writer.finish()
        writer.close()
        with _writing(path, _size(layouts)):
            place.commit(partial, layouts)
        kept = False
    finally:
        if writer is not None:
            writer.close()
        intact = place.recover(partial)
        if kept and intact:
            partial.release()
        else:
            partial.remove()


def write_checkpoint(
    path: str | os.PathLike[str],
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write tensors in memory to a safetensors file, whole or not at all.

    Args:
        path: the destination; may exist.
        tensors: key to tensor.
        metadata: strings for the header.

    Raises:
        CheckpointError: if a dtype has no name in safetensors, or writing fails.
    """
    plan = {key: TensorInfo.of(tensor) for key, tensor in tensors.items()}
    with open_writer(path, plan, metadata) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor)


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy."""
    size = tensor.numel() * tensor.element_size()
    if not size:
        return memoryview(b"")
    memory = (ctypes.c_char * size).from_address(tensor.data_ptr())
    memory.tensor = tensor  # type: ignore[attr-defined] # lives as long as the view
    return memoryview(memory).cast("B")


# -- details ---------------------------------------------------------------------------


def _claim(place: Destination, layouts: Sequence[Layout], job: str | None) -> Partial:
    """The folder to write in: what is left of the same job, else a new one."""
    claimed = None
    for partial in leftovers(place.target):
        intact = place.recover(partial)
        sizes = [_file_size(partial, number) for number in range(len(layouts))]
        if (
            claimed is None
            and intact
            and sizes == [layout.size for layout in layouts]
            and job is not None
            and Journal.fits(partial, job)
        ):
            claimed = partial
        else:
            partial.remove()
    return claimed or Partial.create(place.target)


def _size(layouts: Sequence[Layout]) -> int:
    return sum(layout.size for layout in layouts)


def _file_size(partial: Partial, number: int) -> int:
    with contextlib.suppress(OSError):
        return (partial.folder / part_name(number)).stat().st_size
    return -1


def _reserve(file: int, size: int) -> None:
    """Give a file its size, and its blocks if the file system can set them aside."""
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(file, 0, size)
            return
        except OSError as error:
            if error.errno not in _NO_RESERVE:
                with contextlib.suppress(OSError):
                    os.ftruncate(file, 0)  # gives back what it got before it failed
                raise
    os.ftruncate(file, size)


@contextlib.contextmanager
def _writing(path: Path, size: int) -> Iterator[None]:
    """Turn errors of the system into one that says what could not be written."""
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
                reason += "; what is used up may be a quota, or the number of files"
        elif error.errno == errno.EFBIG:
            reason += (
                f"; got {size:,} bytes, expected no more than the file system and the "
                "process's limits allow; write shards, or elsewhere"
            )
        raise CheckpointError(reason) from error
