"""Files as they are opened, and small ones read: regular, bounded, no key twice."""

from __future__ import annotations

import contextlib
import json
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from hijack.errors import HeaderError
from hijack.safetensors_io.header import CONFIG_KEY

#: Bytes of the longest JSON that is read, as safetensors has it for headers.
MAX_BYTES = 100_000_000


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """A file to read; what is no file is refused, a pipe without waiting for it."""
    try:
        mode = path.stat().st_mode
        if stat.S_ISDIR(mode):
            raise HeaderError(
                f"{path}: is a folder, expected a file, or the index of its shards"
            )
        if not stat.S_ISREG(mode):
            raise HeaderError(f"{path}: is a pipe or a device, expected a file")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise HeaderError(f"{path}: cannot be read; {error.strerror}") from error
    except ValueError as error:
        if isinstance(error, HeaderError) or "\0" not in str(path):
            raise
        raise HeaderError(f"{str(path)!r}: is no file name") from error


def read_json(path: Path) -> Any:
    """What a small file of JSON says.

    Raises:
        HeaderError: if it is none, larger than any such file, or has a key twice.
    """
    try:
        with open_file(path) as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise HeaderError(
                f"{path}: is longer than {MAX_BYTES:,} bytes, expected a small file "
                "of JSON; it is damaged, or something else"
            )
        return json.loads(text.decode(), object_pairs_hook=without_duplicates)
    except HeaderError:
        raise
    except DuplicateError as error:
        raise HeaderError(f"{path}: has the key {error} twice") from error
    except RecursionError as error:
        raise HeaderError(f"{path}: is nested too deeply") from error
    except ValueError as error:
        raise HeaderError(f"{path}: is not JSON; {error}") from error


def read_config(folder: Path, name: str = "config.json") -> Mapping[str, object] | None:
    path = folder / name
    if not path.is_file():
        return None
    try:
        config = read_json(path)
    except HeaderError:
        return None  # another program's file; the checkpoint can still be read
    return config if isinstance(config, dict) else None


def read_configs(folder: Path) -> Mapping[str, object] | None:
    """``config.json``, and what SDNQ writes of its own beside it."""
    config = read_config(folder)
    own = read_config(folder, f"{CONFIG_KEY}.json")
    return config if own is None else {**(config or {}), CONFIG_KEY: own}


class DuplicateError(Exception):
    """A JSON object has a key twice."""


def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise DuplicateError(repr(key))
            seen.add(key)
    return table
