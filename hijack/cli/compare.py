"""``hijack compare``: the error of each weight of a checkpoint."""

from __future__ import annotations

import argparse
from pathlib import Path

import hijack
from hijack.checkpoint.copying import files_of
from hijack.cli.common import add_assume, add_force
from hijack.cli.progress import progress_bar
from hijack.errors import CheckpointError
from hijack.safetensors_io.atomic import new_file, refuse_replacing
from hijack.safetensors_io.reader import read_header

HELP = "compare the weights of two checkpoints"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("reference", help="file or index, such as the original")
    parser.add_argument("other", help="file or index to compare with it")
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
    add_assume(parser)
    add_force(parser)


def run(args: argparse.Namespace) -> int:
    """Print the comparison; 3 if weights are missing, broken or differ in shape."""
    sources: set[Path] = set()
    if args.plot:
        for path in (args.reference, args.other):
            sources |= files_of(path, read_header(path))
        refuse_replacing([Path(args.plot)], sources, overwrite=args.force)
    with progress_bar("comparing") as progress:
        comparison = hijack.compare_files(
            args.reference, args.other, assume=args.assume, progress=progress
        )
    print(comparison.to_json() if args.json else comparison.as_table(args.worst))
    if args.plot:
        with new_file(Path(args.plot), sources, overwrite=args.force) as part:
            _draw(comparison, part)
    unmatched = comparison.only_reference or comparison.only_other
    return 3 if unmatched or comparison.skipped or comparison.broken else 0


def _count(text: str) -> int:
    """A number of rows, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from 0 on")
    return int(text)


def _draw(comparison: hijack.Comparison, path: Path) -> None:
    """Draw the comparison, if matplotlib is installed."""
    try:
        from hijack.cli.plot import draw_comparison
    except ImportError as error:
        raise CheckpointError(
            f"{path}: drawing needs {error.name}; install comfyui-hijack[cli]"
        ) from error
    draw_comparison(comparison, path)
