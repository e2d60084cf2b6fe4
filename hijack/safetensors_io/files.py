"""Open regular files, and read small JSON files strictly."""

from __future__ import annotations

import contextlib
import json
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from hijack.errors import HeaderError
from hijack.safetensors_io.header import CONFIG_KEY

#: Bytes of the longest JSON that is read, the limit of safetensors for headers.
MAX_BYTES = 100_000_000


@contextlib.contextmanager
def open_file(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file to read; others are refused, pipes without waiting."""
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
        raise HeaderError(f"{str(path)!r}: is not a valid file name") from error


def read_json(path: Path) -> Any:
    """Parse a small JSON file.

    Raises:
        HeaderError: if it is malformed, too large, or has a duplicate key.
    """
    with open_file(path) as file:
        text = file.read(MAX_BYTES + 1)
    if len(text) > MAX_BYTES:
        raise HeaderError(
            f"{path}: is longer than {MAX_BYTES:,} bytes, expected a small JSON file; "
            "it is damaged, or something else"
        )
    return parse_json(text, f"{path}:")


def parse_json(text: bytes, where: str) -> Any:
    """Parse JSON.

    Args:
        text: the JSON, in UTF-8.
        where: the subject of error messages.

    Raises:
        HeaderError: if it is malformed or has a duplicate key.
    """
    try:
        return json.loads(text.decode(), object_pairs_hook=_without_duplicates)
    except _DuplicateKeyError as error:
        raise HeaderError(f"{where} has the key {error} twice") from error
    except UnicodeDecodeError as error:
        raise HeaderError(f"{where} is not UTF-8; {error.reason}") from error
    except RecursionError as error:
        raise HeaderError(f"{where} is nested too deeply") from error
    except ValueError as error:
        raise HeaderError(f"{where} is not JSON; {error}") from error


def read_config(folder: Path, name: str = "config.json") -> Mapping[str, object] | None:
    """A JSON object in a folder; None if there is none that can be read."""
    path = folder / name
    if not path.is_file():
        return None
    try:
        config = read_json(path)
    except HeaderError:
        return None  # another program's file; the checkpoint can still be read
    return config if isinstance(config, dict) else None


def read_configs(folder: Path) -> Mapping[str, object] | None:
    """``config.json``, with SDNQ's separate quantization config."""
    config = read_config(folder)
    sdnq = read_config(folder, f"{CONFIG_KEY}.json")
    return config if sdnq is None else {**(config or {}), CONFIG_KEY: sdnq}


class _DuplicateKeyError(Exception):
    """A JSON object has a key twice."""


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        seen: set[str] = set()
        for key, _ in pairs:
            if key in seen:
                raise _DuplicateKeyError(repr(key))
            seen.add(key)
    return table
