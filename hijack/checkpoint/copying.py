"""Shared by the jobs that make one checkpoint file from another."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from hijack.errors import CheckpointError
from hijack.safetensors_io.header import Header, TensorInfo
from hijack.safetensors_io.reader import Paths, identity_of, open_data
from hijack.safetensors_io.shards import Destination

#: Bytes copied at a time.
CHUNK = 1 << 22


def chunks(info: TensorInfo) -> Iterator[bytes]:
    """The bytes of a tensor in a file, in chunks.

    Raises:
        CheckpointError: if the file cannot be read.
    """
    with open_data(info) as file:
        for left in range(info.end - info.begin, 0, -CHUNK):
            yield file.read(min(CHUNK, left))


def check_output(
    output: Destination,
    dst: Path,
    src: Paths,
    header: Header,
    others: Iterable[Path] = (),
) -> None:
    """Refuse to overwrite or delete an input, and destinations that cannot be written.

    Args:
        output: the destination that ``dst`` names.
        dst: the destination as the user named it.
        src: the source as the user named it.
        header: of the source.
        others: other input files.

    Raises:
        CheckpointError: naming the destination.
    """
    paths = [src] if isinstance(src, str | os.PathLike) else list(src)
    sources = {Path(path) for path in (*paths, *others)}
    sources |= {info.file for info in header.tensors.values() if info.file is not None}
    existing = [path for path in sources if path.exists()]
    for target in filter(Path.exists, (dst, *output.replaced())):
        if any(os.path.samefile(path, target) for path in existing):
            raise CheckpointError(
                f"{target}: is the source itself; expected another file to write to"
            )
    output.check()


class SourceSnapshot:
    """What the inputs were when their headers were read, to notice if they change.

    Args:
        header: of the source.
        others: other input files.
    """

    def __init__(self, header: Header, others: Iterable[Path] = ()) -> None:
        self._source = header.source
        self._before = {path: identity_of(path.stat()) for path in others}
        self._before |= header.files

    def check_unchanged(self) -> None:
        """Refuse a result that may mix two versions of the source.

        Raises:
            CheckpointError: if a file has changed.
        """
        try:
            same = all(
                identity_of(path.stat()) == before
                for path, before in self._before.items()
            )
        except OSError:
            same = False
        if not same:
            raise CheckpointError(
                f"{self._source}: changed while it was read; expected it to stay "
                "unchanged; start again"
            )
