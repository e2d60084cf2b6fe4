"""``hijack convert``: write a quantized checkpoint in another dialect."""

from __future__ import annotations

import argparse
from typing import Any

import hijack
from hijack.cli.progress import progress_bar
from hijack.cli.writing import (
    add_shard_size,
    block_size,
    print_notes,
    refuse_existing,
)
from hijack.errors import printable

HELP = "write a quantized checkpoint in another dialect, without loss"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("src", nargs="+", help="file, index, or shards")
    parser.add_argument("dst", help="file to write")
    parser.add_argument("--dialect", required=True, help="see `hijack schemes`")
    parser.add_argument(
        "--block-size",
        type=block_size,
        metavar="SIZE",
        help="blocks to have instead of the dialect's choice",
    )
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="quantize layers anew that cannot be converted without loss",
    )
    parser.add_argument(
        "--drop-input-scales",
        action="store_true",
        help="leave out scales of inputs the dialect has no place for",
    )
    parser.add_argument(
        "--assume",
        action="append",
        default=[],
        metavar="WORD",
        help="scheme, dialect or block size where the file does not tell; repeatable",
    )
    parser.add_argument(
        "--write-config",
        action="store_true",
        help="write config.json beside the file, where the dialect's readers expect it",
    )
    add_shard_size(parser)
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="name what lost or changed"
    )


def run(args: argparse.Namespace) -> int:
    """Convert, and print what was done."""
    if not args.force:
        refuse_existing(args.dst, args.max_shard_size)
    options: dict[str, Any] = {}
    if args.block_size is not None:
        options["block_size"] = args.block_size
    with progress_bar("converting") as progress:
        report = hijack.convert_file(
            args.src if len(args.src) > 1 else args.src[0],
            args.dst,
            args.dialect,
            requantize=args.requantize,
            drop_input_scales=args.drop_input_scales,
            assume=args.assume,
            max_shard_size=args.max_shard_size,
            write_config=args.write_config,
            progress=progress,
            **options,
        )
    if args.verbose:
        for layer in report.reblocked:
            print(printable(f"other blocks: {layer}"))
        for key in report.dropped:
            print(printable(f"left out: {key}"))
    for layer, loss in report.requantized.items():
        name = printable(layer)
        print(f"quantized anew: {name}: SQNR {loss.sqnr:.1f} dB, RMSE {loss.rmse:.3g}")
    print(printable(str(report)))
    print_notes(report.notes)
    return 0
