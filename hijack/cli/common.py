"""Shared by the commands: arguments, checks and notes."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from hijack.errors import SchemeError, printable
from hijack.text import bytes_text, parse_block_size


def add_shard_size(parser: argparse.ArgumentParser) -> None:
    """Add ``--max-shard-size``."""
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        help="write shards of at most 5GB or so, and an index",
    )


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--option``, for any option of any scheme."""
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the scheme, listed by `hijack schemes`; may be repeated",
    )


def add_assume(parser: argparse.ArgumentParser) -> None:
    """Add ``--assume``."""
    parser.add_argument(
        "--assume",
        action="append",
        default=[],
        metavar="WORD",
        help="scheme, dialect or block size if a file is ambiguous; may be repeated",
    )


def add_force(parser: argparse.ArgumentParser) -> None:
    """Add ``--force``, which agrees to lose what is in the way."""
    parser.add_argument("--force", action="store_true", help="replace existing files")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``."""
    parser.add_argument("--json", action="store_true", help="everything, as JSON")


def print_json(value: object) -> None:
    """Print one JSON value; numbers that are not finite are null."""
    print(json.dumps(_plain(value), indent=1, allow_nan=False))


def _plain(value: object) -> object:
    """A value for JSON; what has no spelling there is its text."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {str(key): _plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | None) else str(value)


class Stopwatch:
    """How long a command took, from its construction."""

    def __init__(self) -> None:
        self._start = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds so far, to a thousandth."""
        return round(time.perf_counter() - self._start, 3)

    def __str__(self) -> str:
        minutes, seconds = divmod(self.seconds, 60)
        return f"{minutes:.0f} min {seconds:.0f} s" if minutes else f"{seconds:.1f} s"


def files_written(dst: str, *, sharded: bool) -> list[Path]:
    """The files of a checkpoint that was written; the index of shards is the first.

    Args:
        dst: the destination as the user named it.
        sharded: whether shards were written.
    """
    from hijack.safetensors_io.shards import destination

    return destination(dst, sharded=sharded).replaced()


def wrote(files: Sequence[Path], watch: Stopwatch) -> str:
    """The end of a summary: what was written, how large, and how long it took."""
    size = sum(path.stat().st_size for path in files)
    shards = len(files) - 1
    of = f" and {shards} shard{'s' * (shards > 1)}" if shards else ""
    return printable(f"wrote {files[0]}{of}, {bytes_text(size)}, in {watch}")


def print_notes(notes: Iterable[str]) -> None:
    """Print notes on a result."""
    for note in notes:
        print(printable(f"note: {note}"))


def block_size(text: str) -> Any:
    """A block size for argparse."""
    try:
        return parse_block_size(text)
    except SchemeError as error:  # a ValueError, whose message argparse would hide
        raise argparse.ArgumentTypeError(str(error)) from error
