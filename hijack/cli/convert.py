"""``hijack convert``: write a quantized checkpoint in another dialect."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

import hijack
from hijack.cli.common import (
    Stopwatch,
    add_assume,
    add_force,
    add_json,
    add_options,
    add_shard_size,
    block_size,
    files_written,
    print_json,
    print_notes,
    wrote,
)
from hijack.cli.progress import progress_bar
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
        help="block size instead of the dialect's choice",
    )
    add_options(parser)
    parser.add_argument(
        "--requantize",
        action="store_true",
        help="requantize layers that cannot be converted without loss",
    )
    parser.add_argument(
        "--drop-input-scales",
        action="store_true",
        help="leave out input scales that the dialect cannot store",
    )
    add_assume(parser)
    parser.add_argument(
        "--write-config",
        action="store_true",
        help="write config.json beside the file, where the dialect's readers expect it",
    )
    add_shard_size(parser)
    add_force(parser)
    add_json(parser)
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="list layers that changed"
    )


def run(args: argparse.Namespace) -> int:
    """Convert, and print what was done."""
    watch = Stopwatch()
    source = args.src if len(args.src) > 1 else args.src[0]
    options = _options(source, args.assume, args.option)
    if args.block_size is not None:
        options.setdefault("block_size", args.block_size)
    with progress_bar("converting") as progress:
        report = hijack.convert_file(
            source,
            args.dst,
            args.dialect,
            requantize=args.requantize,
            drop_input_scales=args.drop_input_scales,
            assume=args.assume,
            max_shard_size=args.max_shard_size,
            write_config=args.write_config,
            progress=progress,
            overwrite=args.force,
            **options,
        )
    sharded = args.max_shard_size is not None
    written = files_written(args.dst, sharded=sharded)
    if args.json:
        facts = {"seconds": watch.seconds, "paths": written}
        print_json({**vars(report), **facts})
        return 0
    if args.verbose:
        for layer in report.reblocked:
            print(printable(f"other blocks: {layer}"))
        for key in report.dropped:
            print(printable(f"left out: {key}"))
    for layer, error in report.requantized.items():
        quality = f"SQNR {error.sqnr:.1f} dB, RMSE {error.rmse:.3g}"
        print(f"requantized: {printable(layer)}: {quality}")
    print(f"{report}; {wrote(written, watch)}")
    print_notes(report.notes)
    return 0


def _options(
    source: str | Sequence[str], assume: Sequence[str], texts: Sequence[str]
) -> dict[str, Any]:
    """Options of the schemes of a checkpoint's layers.

    Raises:
        SchemeError: if no scheme in it has such an option.
    """
    if not texts:
        return {}
    from hijack.options import parse_options

    claims = hijack.identify(source, assume=assume).claims().values()
    names = sorted({claim.scheme for claim in claims})
    registry = hijack.current_registry()
    declared = [o for name in names for o in registry.get(name).declared_options()]
    return parse_options(declared, texts, " and ".join(names) or "no scheme")
