"""What commands that write a checkpoint have in common."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from typing import Any

from hijack.errors import CheckpointError, SchemeError, printable
from hijack.safetensors_io.shards import destination
from hijack.text import parse_block_size


def add_shard_size(parser: argparse.ArgumentParser) -> None:
    """Add the argument that asks for shards."""
    parser.add_argument(
        "--max-shard-size",
        metavar="SIZE",
        help="write shards of at most 5GB or so, and an index",
    )


def refuse_existing(dst: str, max_shard_size: str | None) -> None:
    """Refuse to replace what is there.

    Raises:
        CheckpointError: naming the first file that would be replaced.
    """
    for path in destination(dst, sharded=max_shard_size is not None).replaced():
        raise CheckpointError(f"{path}: exists; pass --force to replace it")


def print_notes(notes: Iterable[str]) -> None:
    """Print what people should know of a result, behind all else."""
    for note in notes:
        print(printable(f"note: {note}"))


def block_size(text: str) -> Any:
    """A block size for argparse."""
    try:
        return parse_block_size(text)
    except SchemeError as error:  # a ValueError, whose words argparse would hide
        raise argparse.ArgumentTypeError(str(error)) from error
