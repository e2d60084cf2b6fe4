"""What a written checkpoint replaces: one file, or an index with its shards.

A set of shards cannot be replaced in one step. Its index can: whoever opens the set
begins there, so the moment the index gets its name is the moment the new set counts.

1. The shards are written and synced under other names, in a folder beside the index.
2. A note is made there of the names they will have and of the shards of the old set.
3. They get their names, none of which is in use: where the old set, or anything else,
   has ``model-00001-of-00003``, the new one has ``model.2-00001-of-00003``.
4. The index is replaced. Before this the old set is whole, from now on the new one.
5. The shards of the old set are deleted, then the folder with the note.

Steps 2 to 5 are taken by one process at a time, for two would choose the same names.

Whoever finds the note of a process that was killed deletes what it names and the index
does not: after 2 or 3 the new shards, after 4 those of the old set. Shards that no
index of this name ever named, or that are called otherwise, are left alone.
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
from hijack.safetensors_io.atomic import (
    Partial,
    alone,
    part_name,
    replace,
    sync_folder,
    write_durably,
)
from hijack.safetensors_io.files import read_json
from hijack.safetensors_io.layout import Layout

_NOTE = "note"
_INDEX = "index"


class Destination(Protocol):
    """Where a checkpoint comes to be.

    Attributes:
        target: the file whose replacement makes the new checkpoint count; no link.
    """

    target: Path

    def check(self) -> None:
        """Refuse what cannot be replaced by a file, or has no folder to lie in.

        Raises:
            CheckpointError: saying what is there.
        """

    def replaced(self) -> list[Path]:
        """The files that are there now and will be replaced or deleted."""

    def names(self, count: int) -> list[str]:
        """What the files will be called."""

    def commit(self, partial: Partial, layouts: Sequence[Layout]) -> None:
        """Give finished files their names.

        Raises:
            OSError: if that fails; `recover` then undoes what was done.
        """

    def recover(self, partial: Partial) -> bool:
        """End a commit that may have been cut short, before or after it counted.

        Returns:
            Whether the files are still in the folder.
        """


def destination(path: str | os.PathLike[str], *, sharded: bool) -> Destination:
    """The destination that a path means.

    Args:
        path: of a file, such as ``model.safetensors``; for shards, that name or the
            index's, ``model.safetensors.index.json``.
        sharded: whether shards are written.

    Raises:
        CheckpointError: if a single file has the name of an index, or no file can have
            the name.
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
        """Refuse folders, pipes and devices, and folders that are not there."""
        _check_file(self.path, self.target)

    def replaced(self) -> list[Path]:
        """The file."""
        return [self.path] if self.path.exists() else []

    def names(self, count: int) -> list[str]:
        """The file's."""
        return [self.target.name]

    def commit(self, partial: Partial, layouts: Sequence[Layout]) -> None:
        """Rename it."""
        replace(partial.folder / part_name(0), self.target)

    def recover(self, partial: Partial) -> bool:
        """Nothing to do: a rename is done or not."""
        return (partial.folder / part_name(0)).exists()


class _Shards:
    """An index and the shards it names."""

    def __init__(self, path: Path) -> None:
        self.stem = path.name.removesuffix(".index.json").removesuffix(".safetensors")
        self.index = path.with_name(f"{self.stem}.safetensors.index.json")
        self.target = Path(os.path.realpath(self.index))
        self.folder = self.target.parent
        self._ours = re.compile(
            rf"{re.escape(self.stem)}(\.\d+)?-\d{{5}}-of-\d{{5}}\.safetensors"
        )

    def check(self) -> None:
        """Refuse what is no file, and a single file that readers would prefer."""
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
        return [self.index, *(self.folder / name for name in self._own(self._listed()))]

    def names(self, count: int) -> list[str]:
        """Names nothing has."""
        for number in itertools.count(1):
            stem = self.stem if number == 1 else f"{self.stem}.{number}"
            names = [
                f"{stem}-{shard:05d}-of-{count:05d}.safetensors"
                for shard in range(1, count + 1)
            ]
            if not any(os.path.lexists(self.folder / name) for name in names):
                break
        return names

    def commit(self, partial: Partial, layouts: Sequence[Layout]) -> None:
        """Name the shards, then replace the index, while no other process does."""
        with alone(self.folder):
            self._commit(partial, layouts)

    def _commit(self, partial: Partial, layouts: Sequence[Layout]) -> None:
        names = self.names(len(layouts))
        note = {"new": names, "old": self._own(self._listed())}
        write_durably(partial.folder / _NOTE, json.dumps(note).encode())
        write_durably(partial.folder / _INDEX, _index(names, layouts))
        sync_folder(partial.folder)
        for number, name in enumerate(names):
            os.rename(partial.folder / part_name(number), self.folder / name)
        sync_folder(self.folder)
        replace(partial.folder / _INDEX, self.target)

    def recover(self, partial: Partial) -> bool:
        """Delete what the note names and the index does not."""
        path = partial.folder / _NOTE
        if not os.path.lexists(path):
            return True
        try:
            note = read_json(path)
            noted = {*note["new"], *note["old"]}
        except (HeaderError, KeyError, TypeError):
            return False  # not complete, so nothing was renamed yet
        with alone(self.folder):
            live = self._listed()
            if live is not None:
                for name in self._own(noted - live):
                    with contextlib.suppress(OSError):
                        os.unlink(self.folder / name)
        return False

    def _own(self, names: Iterable[str] | None) -> list[str]:
        """Those that are of a set of this name, and no path that leads elsewhere."""
        return sorted(name for name in names or () if self._ours.fullmatch(name))

    def _listed(self) -> set[str] | None:
        """The shards the index names; none without an index, None if it is broken."""
        if not os.path.lexists(self.target):
            return set()
        try:
            names = read_json(self.target)["weight_map"].values()
            return {os.fspath(name) for name in names}
        except (HeaderError, KeyError, TypeError, AttributeError):
            return None


def _index(names: Sequence[str], layouts: Sequence[Layout]) -> bytes:
    """The text of an index, as transformers and diffusers have it."""
    places = {
        key: name
        for name, layout in zip(names, layouts, strict=True)
        for key in layout.places
    }
    size = sum(layout.size - len(layout.header) for layout in layouts)
    table = {
        "metadata": {"total_size": size},
        "weight_map": dict(sorted(places.items())),
    }
    return (json.dumps(table, indent=2) + "\n").encode()


def _check_name(path: str | os.PathLike[str]) -> None:
    """Refuse what the system cannot look for, before anything else does."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return
    except ValueError as error:  # a NUL in it
        raise CheckpointError(f"{os.fspath(path)!r}: is no file name") from error
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written; {error.strerror}") from error


def _check_file(path: Path, target: Path) -> None:
    if not target.parent.is_dir():
        raise CheckpointError(
            f"{path}: cannot be written; {target.parent} is no folder that exists; "
            "make it, or write elsewhere"
        )
    if path.is_dir():
        raise CheckpointError(f"{path}: is a folder, expected a file name")
    if path.exists() and not path.is_file():
        raise CheckpointError(f"{path}: is a pipe or a device, expected a file name")


# -- sizes ---------------------------------------------------------------------------

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?", re.IGNORECASE)


def parse_size(size: int | str) -> int:
    """A size in bytes: a number, or text such as ``"5GB"``, ``"500MB"``, ``"2GiB"``.

    Raises:
        CheckpointError: if it is none of these, or not positive.
    """
    found = _SIZE.fullmatch(size.strip()) if isinstance(size, str) else None
    count = size if isinstance(size, int) else 0
    if found is not None:
        number, unit = float(found[1]), (found[2] or "").upper()
        base = 1024 if unit.endswith("I") else 1000
        count = int(number * base ** " KMGT".index(unit[:1] or " "))
    if count < 1:
        raise CheckpointError(
            f"max_shard_size: got {size!r}, expected bytes as an int, or text such as "
            "5GB, 500MB or 2GiB"
        )
    return count
