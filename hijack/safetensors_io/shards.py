"""The destination of a checkpoint: one file, or an index with its shards.

A set of shards cannot be replaced in one step, but its index can. Readers start with
the index, so the new set takes effect when the index is renamed.

1. The shards are written and synced under other names, in a folder beside the index.
2. A note in that folder lists their final names and the shards of the old set.
3. They are renamed to unused names: if ``model-00001-of-00003`` exists, the new one is
   ``model.2-00001-of-00003``.
4. The index is replaced. Until then the old set is complete, from then on the new one.
5. Files in the note that are not in the index are deleted, then the folder.

The lock of `hijack.safetensors_io.atomic` keeps other processes out from 1 to 5. If the
process is killed, the next one does step 5 for it, which deletes the new shards if the
kill came before 4, and the old ones if it came after. Shards that were never in an
index of this name, or have other names, are left alone.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Protocol

from hijack.errors import CheckpointError, HeaderError
from hijack.safetensors_io.atomic import replace, sync_folder, write_durably
from hijack.safetensors_io.files import read_json
from hijack.safetensors_io.layout import FileLayout

_NOTE = "note"
_INDEX = "index"


class Destination(Protocol):
    """Where a checkpoint is written.

    Attributes:
        target: the file whose replacement puts the new checkpoint into effect; links
            are resolved.
    """

    target: Path

    def check(self) -> None:
        """Refuse a destination that is not a file, or has no folder.

        Raises:
            CheckpointError: saying what exists there.
        """

    def replaced(self) -> list[Path]:
        """The existing files that will be replaced or deleted."""

    def names(self, count: int) -> list[str]:
        """The final names of the files."""

    def commit(self, folder: Path, layouts: Sequence[FileLayout]) -> None:
        """Rename the finished files in a temporary folder to their final names.

        Raises:
            OSError: if that fails; `clean` then undoes it.
        """

    def clean(self, folder: Path) -> None:
        """Delete shards that a commit from a temporary folder left without an index."""


def part_name(number: int) -> str:
    """The name of a file in the temporary folder."""
    return f"{number + 1:05d}"


def destination(path: str | os.PathLike[str], *, sharded: bool) -> Destination:
    """The destination that a path means.

    Args:
        path: of a file, such as ``model.safetensors``; for shards, that name or the
            index's, ``model.safetensors.index.json``.
        sharded: whether shards are written.

    Raises:
        CheckpointError: if a single file has the name of an index, or the name is not
            valid.
    """
    _check_name(path)
    return _Shards(Path(path)) if sharded else _File(Path(path))


class _File:
    """A single file."""

    def __init__(self, path: Path) -> None:
        if path.name.endswith(".index.json"):
            raise CheckpointError(
                f"{path}: is the name of an index, expected that of a file; pass "
                "max_shard_size to write shards"
            )
        self.path = path
        self.target = Path(os.path.realpath(path))

    def check(self) -> None:
        """Refuse folders, pipes, devices, and missing folders."""
        _check_file(self.path, self.target)

    def replaced(self) -> list[Path]:
        """The file."""
        return [self.path] if self.path.exists() else []

    def names(self, count: int) -> list[str]:
        """The file's."""
        return [self.target.name]

    def commit(self, folder: Path, layouts: Sequence[FileLayout]) -> None:
        """Rename it."""
        replace(folder / part_name(0), self.target)

    def clean(self, folder: Path) -> None:
        """Nothing to do: a rename is atomic."""


class _Shards:
    """An index and the shards it names."""

    def __init__(self, path: Path) -> None:
        self.stem = path.name.removesuffix(".index.json").removesuffix(".safetensors")
        self.index = path.with_name(f"{self.stem}.safetensors.index.json")
        self.target = Path(os.path.realpath(self.index))
        self.folder = self.target.parent
        self._pattern = re.compile(
            rf"{re.escape(self.stem)}(\.\d+)?-\d{{5}}-of-\d{{5}}\.safetensors"
        )

    def check(self) -> None:
        """Refuse a destination that is not a file, and a file readers would prefer."""
        _check_file(self.index, self.target)
        for name in self.names(1):  # longer than that of the index
            _check_name(self.folder / name)
        single = self.index.with_name(f"{self.stem}.safetensors")
        if single.exists():
            raise CheckpointError(
                f"{single}: exists, and programs would read it instead of the shards; "
                "expected another name; delete it, or write elsewhere"
            )

    def replaced(self) -> list[Path]:
        """The index and the shards it names."""
        if not self.index.exists():
            return []
        return [
            self.index,
            *(self.folder / name for name in self._shard_names(self._indexed() or ())),
        ]

    def names(self, count: int) -> list[str]:
        """Unused names."""
        for number in itertools.count(1):
            stem = self.stem if number == 1 else f"{self.stem}.{number}"
            names = [
                f"{stem}-{shard:05d}-of-{count:05d}.safetensors"
                for shard in range(1, count + 1)
            ]
            if not any(os.path.lexists(self.folder / name) for name in names):
                break
        return names

    def commit(self, folder: Path, layouts: Sequence[FileLayout]) -> None:
        """Rename the shards, then replace the index."""
        names = self.names(len(layouts))
        note = [*names, *self._shard_names(self._indexed() or ())]
        write_durably(folder / _NOTE, json.dumps(note).encode())
        write_durably(folder / _INDEX, _index(names, layouts))
        sync_folder(folder)
        for number, name in enumerate(names):
            os.rename(folder / part_name(number), self.folder / name)
        sync_folder(self.folder)
        replace(folder / _INDEX, self.target)

    def clean(self, folder: Path) -> None:
        """Delete the files in the note that are not in the index."""
        live = self._indexed()
        if live is None or not os.path.lexists(folder / _NOTE):
            return
        try:
            noted = self._shard_names(read_json(folder / _NOTE))
        except (HeaderError, TypeError):
            return  # incomplete, so nothing was renamed yet
        for name in noted:
            if name not in live:
                with contextlib.suppress(OSError):
                    os.unlink(self.folder / name)

    def _shard_names(self, names: Iterable[object]) -> list[str]:
        """The names that belong to a set of this name; never paths."""
        texts = (name for name in names if isinstance(name, str))
        return sorted(name for name in texts if self._pattern.fullmatch(name))

    def _indexed(self) -> set[str] | None:
        """The shards in the index; empty without an index, None if it is broken."""
        if not os.path.lexists(self.target):
            return set()
        try:
            names = read_json(self.target)["weight_map"].values()
            return {os.fspath(name) for name in names}
        except (HeaderError, KeyError, TypeError, AttributeError):
            return None


def _index(names: Sequence[str], layouts: Sequence[FileLayout]) -> bytes:
    """The text of an index, as transformers and diffusers write it."""
    weight_map = {
        key: name
        for name, layout in zip(names, layouts, strict=True)
        for key in layout.offsets
    }
    size = sum(layout.size - len(layout.header) for layout in layouts)
    table = {
        "metadata": {"total_size": size},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return (json.dumps(table, indent=2) + "\n").encode()


def _check_name(path: str | os.PathLike[str]) -> None:
    """Refuse names that the system cannot look up."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except ValueError as error:  # a NUL in it
        raise CheckpointError(
            f"{os.fspath(path)!r}: is not a valid file name"
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written; {error.strerror}") from error


def _check_file(path: Path, target: Path) -> None:
    if not target.parent.is_dir():
        raise CheckpointError(
            f"{path}: cannot be written; {target.parent} is not a folder; "
            "make it, or write elsewhere"
        )
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder, expected a file name")
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: is a pipe or a device, expected a file name")


# -- sizes ---------------------------------------------------------------------------

_SIZE = re.compile(r"([0-9]{1,18}(?:\.[0-9]+)?)\s*([KMGT]i?B?|B)", re.IGNORECASE)


def parse_size(size: int | str) -> int:
    """A size in bytes: a number, or text such as ``"5GB"``, ``"500MB"``, ``"2GiB"``.

    Text needs a unit: who types 5 means no 5 bytes.

    Raises:
        CheckpointError: if it is none of these, or not positive.
    """
    match = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    count = size if type(size) is int else 0
    if match is not None:
        number, unit = float(match[1]), match[2].upper().removesuffix("B")
        base = 1024 if unit.endswith("I") else 1000
        count = int(number * base ** " KMGT".index(unit[:1] or " "))
    if count < 1:
        raise CheckpointError(
            f"max_shard_size: got {size!r}, expected bytes as an int, or text with a "
            "unit such as 5GB, 500MB or 2GiB"
        )
    return count
