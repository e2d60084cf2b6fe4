"""``hijack compare``: how far the weights of two checkpoints are apart."""

from __future__ import annotations

import argparse
from pathlib import Path

import hijack
from hijack.cli.progress import progress_bar
from hijack.errors import CheckpointError

HELP = "how far the weights of two checkpoints are apart"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("reference", help="file or index, such as the original")
    parser.add_argument("other", help="file or index held against it")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    parser.add_argument(
        "--plot", metavar="PNG", help="draw the error of every weight into a file"
    )
    parser.add_argument(
        "--worst",
        type=_count,
        default=20,
        metavar="N",
        help="rows to print, default 20",
    )
    parser.add_argument(
        "--assume",
        action="append",
        default=[],
        metavar="WORD",
        help="scheme, dialect or block size where a file does not tell; repeatable",
    )


def run(args: argparse.Namespace) -> int:
    """Print what was found; 3 if weights are missing, broken or of other shapes."""
    with progress_bar("comparing") as progress:
        found = hijack.compare_files(
            args.reference, args.other, assume=args.assume, progress=progress
        )
    print(found.to_json() if args.json else found.as_table(args.worst))
    if args.plot:
        _draw(found, Path(args.plot))
    lone = found.only_reference or found.only_other
    return 3 if lone or found.skipped or found.broken else 0


def _count(text: str) -> int:
    """A number of rows; argparse names what is none."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from 0 on")
    return int(text)


def _draw(found: hijack.Comparison, path: Path) -> None:
    """Draw it, if matplotlib is there."""
    try:
        from hijack.cli.plot import draw_comparison
    except ImportError as error:
        raise CheckpointError(
            f"{path}: drawing needs {error.name}; install comfyui-hijack[cli]"
        ) from error
    draw_comparison(found, path)
