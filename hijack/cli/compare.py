"""``hijack compare``: the error of each weight of a checkpoint."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path

import hijack
from hijack.cli.common import Stopwatch, add_assume, add_force, add_json, print_json
from hijack.cli.progress import progress_bar
from hijack.errors import CheckpointError, printable

HELP = "compare the weights of two checkpoints"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("reference", help="file or index, such as the original")
    parser.add_argument("other", help="file or index to compare with it")
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
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print the comparison; 3 if weights are missing, broken or differ in shape."""
    from hijack.checkpoint.copying import files_of
    from hijack.safetensors_io.atomic import new_file, refuse_replacing
    from hijack.safetensors_io.reader import read_header

    watch, sources = Stopwatch(), set[Path]()
    if args.plot:
        drawing = _drawing(args.plot)
        for path in (args.reference, args.other):
            sources |= files_of(path, read_header(path))
        refuse_replacing([Path(args.plot)], sources, overwrite=args.force)
    with progress_bar("comparing") as progress:
        comparison = hijack.compare_files(
            args.reference, args.other, assume=args.assume, progress=progress
        )
    if args.plot:
        with new_file(Path(args.plot), sources, overwrite=args.force) as part:
            drawing(comparison, part)
    if args.json:
        facts = json.loads(comparison.to_json())
        print_json({**facts, "plot": args.plot, "seconds": watch.seconds})
    else:
        drawn = f"drawn in {args.plot}, " if args.plot else ""
        print(comparison.as_table(args.worst))
        print(printable(f"{drawn}done in {watch}"))
    unmatched = comparison.only_reference or comparison.only_other
    return 3 if unmatched or comparison.skipped or comparison.broken else 0


def _count(text: str) -> int:
    """A number of rows, for argparse."""
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"got {text!r}, expected a number from 0 on")
    return int(text)


def _drawing(path: str) -> Callable[[hijack.Comparison, Path], None]:
    """The function that draws, if matplotlib is installed."""
    try:
        from hijack.checkpoint.plot import draw_comparison
    except ImportError as error:
        raise CheckpointError(
            f"{path}: drawing needs {error.name}; install comfyui-hijack[cli]"
        ) from error
    return draw_comparison
