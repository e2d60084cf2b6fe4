"""What is common to programs that make one checkpoint file of another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from hijack.checkpoint.header import Header, TensorInfo
from hijack.checkpoint.reader import Paths, data_start
from hijack.errors import CheckpointError

#: Bytes copied at a time.
CHUNK = 1 << 22


def chunks(info: TensorInfo) -> Iterator[bytes]:
    """The bytes of a tensor in a file, piece by piece.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    if info.file is None:
        raise CheckpointError("only files can be copied, got tensors in memory")
    try:
        with info.file.open("rb") as file:
            file.seek(data_start(info.file) + info.begin)
            for left in range(info.end - info.begin, 0, -CHUNK):
                yield file.read(min(CHUNK, left))
    except OSError as error:
        raise CheckpointError(
            f"{info.file}: cannot be read; {error.strerror}"
        ) from error


def refuse_same_file(src: Paths, header: Header, dst: Path) -> None:
    """Refuse to write onto a file that is read, by whatever name.

    Raises:
        CheckpointError: naming the destination.
    """
    given = [src] if isinstance(src, str | os.PathLike) else list(src)
    sources = {Path(path) for path in given}
    sources |= {info.file for info in header.tensors.values() if info.file is not None}
    for path in sources:
        if dst.exists() and os.path.samefile(path, dst):
            raise CheckpointError(
                f"{dst}: is the source itself; expected another file to write to"
            )
