"""``hijack quantize``: quantize a safetensors checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch

import hijack
from hijack.checkpoint.text import parse_block_size
from hijack.commands.progress import progress_bar
from hijack.errors import CheckpointError, SchemeError

HELP = "quantize a safetensors checkpoint"
DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("src", nargs="+", help="file, index, or shards")
    parser.add_argument("dst", help="file to write")
    parser.add_argument(
        "--scheme", default="blockwise_fp8", help="see `hijack schemes`"
    )
    parser.add_argument(
        "--block-size",
        type=_block_size,
        metavar="SIZE",
        help="1x64 (default), 128x128, row, tensor",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="code dtype, default e4m3")
    parser.add_argument("--dialect", help="default is the scheme's first")
    for name in ("include", "exclude"):
        parser.add_argument(
            f"--{name}",
            action="append",
            metavar="PATTERN",
            help=f"layers to {name}, such as 'transformer_blocks.*'; may be repeated",
        )
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="name what is left"
    )


def run(args: argparse.Namespace) -> int:
    """Quantize, and print what was done."""
    options: dict[str, Any] = {}
    if args.dtype is not None:
        options["dtype"] = DTYPES[args.dtype]
    if Path(args.dst).is_file() and not args.force:
        raise CheckpointError(f"{args.dst}: exists; pass --force to replace it")
    with progress_bar("quantizing") as progress:
        report = hijack.quantize_file(
            args.src if len(args.src) > 1 else args.src[0],
            args.dst,
            args.scheme,
            block_size=args.block_size,
            dialect=args.dialect,
            include=args.include,
            exclude=args.exclude,
            progress=progress,
            **options,
        )
    for layer, reason in report.skipped.items():
        if args.verbose:
            print(f"left dense: {layer} ({reason})")
    print(report)
    return 0


def _block_size(text: str) -> Any:
    try:
        return parse_block_size(text)
    except SchemeError as error:  # a ValueError, whose words argparse would hide
        raise argparse.ArgumentTypeError(str(error)) from error
