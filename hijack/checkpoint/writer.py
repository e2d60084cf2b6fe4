"""Write safetensors files: planned first, streamed, whole or not at all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from hijack.checkpoint.header import DTYPE_NAMES
from hijack.errors import CheckpointError

#: Key to dtype and shape of every tensor a file will hold.
Plan = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


class CheckpointWriter:
    """Writes the tensors of a plan, in any order, into a file of that exact size."""

    def __init__(
        self, descriptor: int, plan: Plan, metadata: Mapping[str, str]
    ) -> None:
        self._descriptor = descriptor
        self._plan = plan
        header, self._offsets, end = _layout(plan, metadata)
        self._start = len(header)
        self._missing = set(plan)
        self._put(header, 0)
        os.ftruncate(descriptor, self._start + end)

    def write(self, key: str, tensor: Tensor) -> None:
        """Write one planned tensor.

        Raises:
            CheckpointError: if dtype or shape are not the planned ones.
        """
        planned = self._plan[key]
        if (tensor.dtype, tuple(tensor.shape)) != planned:
            raise CheckpointError(
                f"{key}: got {tensor.dtype} {tuple(tensor.shape)}, planned were "
                f"{planned[0]} {planned[1]}; the scheme gives other tensors for data "
                "than for a meta tensor"
            )
        data = tensor.detach().cpu().contiguous()
        if data.numel():
            raw = data.reshape(-1).view(torch.uint8)
            self._put(raw.numpy().data, self._start + self._offsets[key])
        self._missing.discard(key)

    def write_bytes(self, key: str, chunks: Iterator[bytes]) -> None:
        """Write one planned tensor from pieces of its bytes."""
        offset = self._start + self._offsets[key]
        for chunk in chunks:
            self._put(chunk, offset)
            offset += len(chunk)
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
        while view:
            done = os.pwrite(self._descriptor, view, offset)
            view, offset = view[done:], offset + done


@contextlib.contextmanager
def open_writer(
    path: str | os.PathLike[str], plan: Plan, metadata: Mapping[str, str] | None = None
) -> Iterator[CheckpointWriter]:
    """A writer whose file takes its name only when everything is written.

    The file is made beside the destination under another name, synced, and renamed. On
    any failure it is removed and the destination stays as it was.

    Args:
        path: the destination; may exist.
        plan: key to dtype and shape.
        metadata: strings for the header.

    Raises:
        CheckpointError: if the folder cannot be written or the disk is full.
    """
    path = Path(path)
    descriptor, name = _temporary(path)
    try:
        try:
            writer = CheckpointWriter(descriptor, plan, metadata or {})
            yield writer
            writer.finish()
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.chmod(name, _mode(path))
        os.replace(name, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(name)
        if isinstance(error, OSError):
            raise CheckpointError(
                f"{path}: cannot be written; {error.strerror}"
            ) from error
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
    plan = {key: (t.dtype, tuple(t.shape)) for key, t in tensors.items()}
    with open_writer(path, plan, metadata) as writer:
        for key, tensor in tensors.items():
            writer.write(key, tensor)


def _layout(
    plan: Plan, metadata: Mapping[str, str]
) -> tuple[bytes, dict[str, int], int]:
    """Header bytes, offset of each tensor in the data section, and its size.

    Widest dtype first, as safetensors itself orders, so that every tensor is aligned
    without holes.
    """
    unknown = next(
        (k for k, (dtype, _) in plan.items() if dtype not in DTYPE_NAMES), None
    )
    if unknown is not None:
        raise CheckpointError(
            f"{unknown}: safetensors has no name for {plan[unknown][0]}; convert it"
        )
    table: dict[str, object] = {}
    if metadata:
        table["__metadata__"] = dict(metadata)
    offsets, end = {}, 0
    for key in sorted(plan, key=lambda k: (-plan[k][0].itemsize, k)):
        dtype, shape = plan[key]
        size = math.prod(shape) * dtype.itemsize
        table[key] = {
            "dtype": DTYPE_NAMES[dtype],
            "shape": list(shape),
            "data_offsets": [end, end + size],
        }
        offsets[key], end = end, end + size
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, offsets, end


def _temporary(path: Path) -> tuple[int, str]:
    try:
        if path.is_dir():
            raise CheckpointError(f"{path}: is a folder, expected a file name")
        return tempfile.mkstemp(
            prefix=f".{path.name}.", suffix=".part", dir=path.parent
        )
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written; {error.strerror}") from error


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
