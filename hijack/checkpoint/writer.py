"""Write safetensors files: planned first, streamed, whole or not at all."""

from __future__ import annotations

import contextlib
import io
import json
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hijack.checkpoint.header import TensorInfo, bits_of, bytes_of
from hijack.errors import CheckpointError

#: Key to dtype and shape of every tensor a file will hold.
Plan = Mapping[str, TensorInfo]


class CheckpointWriter:
    """Writes the tensors of a plan, in any order, into a file of that exact size."""

    def __init__(
        self,
        path: Path,
        descriptor: int,
        plan: Plan,
        metadata: Mapping[str, str],
        order: Sequence[str] | None = None,
    ) -> None:
        self._path = path
        # not os.pwrite, which Windows lacks
        self._file = io.FileIO(descriptor, "wb", closefd=False)
        self._plan = plan
        header, self._offsets, end = _layout(plan, metadata, order)
        self._start = len(header)
        self._missing = set(plan)
        self._put(header, 0)
        with _writing(path):
            self._file.truncate(self._start + end)

    def write(self, key: str, tensor: Tensor) -> None:
        """Write one planned tensor.

        Raises:
            CheckpointError: if dtype or shape are not the planned ones.
        """
        planned, got = self._plan[key], TensorInfo.of(tensor)
        if (got.dtype, got.shape) != (planned.dtype, planned.shape):
            raise CheckpointError(
                f"{key}: got {got.dtype} {list(got.shape)}, planned were "
                f"{planned.dtype} {list(planned.shape)}; the scheme gives other "
                "tensors for data than for a meta tensor"
            )
        data = tensor.detach().cpu().contiguous()
        if data.numel():
            raw = data.reshape(-1).view(torch.uint8)
            self._put(raw.numpy().data, self._start + self._offsets[key])
        self._missing.discard(key)

    def write_bytes(self, key: str, chunks: Iterable[bytes]) -> None:
        """Write one planned tensor from pieces of its bytes.

        Raises:
            CheckpointError: if the pieces are not as long as planned.
        """
        begin = self._start + self._offsets[key]
        offset, end = begin, begin + self._plan[key].nbytes
        for chunk in chunks:
            offset += len(chunk)
            if offset <= end:
                self._put(chunk, offset - len(chunk))
        if offset != end:
            raise CheckpointError(
                f"{key}: got {offset - begin} bytes, expected {end - begin}; was the "
                "source changed while it was read?"
            )
        self._missing.discard(key)

    def finish(self) -> None:
        """Refuse to call a file complete that lacks tensors."""
        if self._missing:
            raise CheckpointError(
                f"{min(self._missing)}: was planned but never written, one of "
                f"{len(self._missing)} tensors"
            )

    def _put(self, data: bytes | memoryview, offset: int) -> None:
        view = memoryview(data)
        with _writing(self._path):
            self._file.seek(offset)
            while view:
                view = view[self._file.write(view) :]


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Tell failures of the destination from those of whoever feeds the writer."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written; {error.strerror}") from error


@contextlib.contextmanager
def open_writer(
    path: str | os.PathLike[str],
    plan: Plan,
    metadata: Mapping[str, str] | None = None,
    order: Sequence[str] | None = None,
) -> Iterator[CheckpointWriter]:
    """A writer whose file takes its name only when everything is written.

    The file is made beside the destination under another name, synced, and renamed. On
    any failure it is removed and the destination stays as it was.

    Args:
        path: the destination; may exist.
        plan: key to dtype and shape; files and offsets do not count.
        metadata: strings for the header.
        order: of the tensors in the file, if all of them come to lie aligned in it;
            else, and by default, the widest come first.

    Raises:
        CheckpointError: if the folder cannot be written or the disk is full.
    """
    path = Path(path)
    descriptor, name = _temporary(path)
    try:
        try:
            writer = CheckpointWriter(path, descriptor, plan, metadata or {}, order)
            yield writer
            writer.finish()
            with _writing(path):
                os.fsync(descriptor)
        finally:
            os.close(descriptor)
        with _writing(path):
            os.chmod(name, _mode(path))
            os.replace(name, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(name)
        raise
    _sync_folder(path.parent)


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


def _layout(
    plan: Plan, metadata: Mapping[str, str], order: Sequence[str] | None
) -> tuple[bytes, dict[str, int], int]:
    """Header bytes, offset of each tensor in the data section, and its size.

    Widest dtype first, as safetensors itself orders, so that every tensor is aligned
    without holes; or in the order asked for, if that does not break the alignment.
    """
    table: dict[str, object] = {}
    if metadata:
        table["__metadata__"] = dict(metadata)
    offsets, end = {}, 0
    if order is None or not _aligned(plan, order):
        order = sorted(plan, key=lambda k: (-(bits_of(plan[k].dtype) or 0), k))
    for key in order:
        info = plan[key]
        size = bytes_of(info.dtype, info.shape)
        if size is None:
            raise CheckpointError(
                f"{key}: safetensors has no name for {info.dtype} {list(info.shape)}; "
                "convert it"
            )
        table[key] = {
            "dtype": info.dtype,
            "shape": list(info.shape),
            "data_offsets": [end, end + size],
        }
        offsets[key], end = end, end + size
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets, end


def _aligned(plan: Plan, order: Sequence[str]) -> bool:
    """Whether every tensor would begin at a multiple of its dtype's size."""
    end = 0
    for key in order:
        if end * 8 % (bits_of(plan[key].dtype) or 8):
            return False
        end += plan[key].nbytes
    return True


def _temporary(path: Path) -> tuple[int, str]:
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder, expected a file name")
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: is a pipe or a device, expected a file name")
    with _writing(path):
        return tempfile.mkstemp(
            prefix=f".{path.name[:200]}.", suffix=".part", dir=path.parent
        )


def _mode(path: Path) -> int:
    """Permissions of the file that is replaced, else what the umask gives."""
    with contextlib.suppress(OSError):
        return path.stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every system can open a folder
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
