"""Shared by the commands: arguments, checks and notes."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from hijack.errors import SchemeError, printable
from hijack.text import parse_block_size


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
