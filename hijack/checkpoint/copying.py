"""What is common to programs that make one checkpoint file of another."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from hijack.errors import CheckpointError
from hijack.safetensors_io.header import Header, TensorInfo
from hijack.safetensors_io.reader import Paths, data_start
from hijack.safetensors_io.shards import Destination

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


def refuse_place(
    place: Destination,
    dst: Path,
    src: Paths,
    header: Header,
    others: Iterable[Path] = (),
) -> None:
    """Refuse to write onto a file that is read, to delete one, or where none can be.

    Args:
        place: what ``dst`` means.
        dst: the destination as it was given.
        src: the source as it was given.
        header: of the source.
        others: files that are read beside it.

    Raises:
        CheckpointError: naming the destination.
    """
    given = [src] if isinstance(src, str | os.PathLike) else list(src)
    sources = {Path(path) for path in (*given, *others)}
    sources |= {info.file for info in header.tensors.values() if info.file is not None}
    read = [path for path in sources if path.exists()]
    for target in filter(Path.exists, (dst, *place.replaced())):
        if any(os.path.samefile(path, target) for path in read):
            raise CheckpointError(
                f"{target}: is the source itself; expected another file to write to"
            )
    place.check()


class Watch:
    """The files that are read: what they are, and whether they still are.

    Args:
        header: of the source.
        others: files that are read beside it.
    """

    def __init__(self, header: Header, others: Iterable[Path] = ()) -> None:
        self._source = header.source
        infos = header.tensors.values()
        self._files = {info.file for info in infos if info.file is not None}
        self._files |= set(others)
        self.before = self._now()

    def _now(self) -> list[tuple[str, int, int]]:
        stats = [(path, path.stat()) for path in sorted(self._files)]
        return [(str(path), stat.st_size, stat.st_mtime_ns) for path, stat in stats]

    def check(self) -> None:
        """Refuse a result of which nobody knows what it was made of.

        Raises:
            CheckpointError: if a file is another one than it was.
        """
        try:
            same = self._now() == self.before
        except OSError:
            same = False
        if not same:
            raise CheckpointError(
                f"{self._source}: was changed while it was read; expected it to stay "
                "as it is; begin again"
            )
