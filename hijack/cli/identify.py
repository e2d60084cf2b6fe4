"""``hijack identify``: detect the format of a checkpoint.

The exit status is 0 if the checkpoint can be loaded, 3 if not (an unsupported format,
an ambiguous layer, a mismatch, an unconsumed scale), and 1 if the file is malformed.
"""

from __future__ import annotations

import argparse

import hijack
from hijack.cli.common import add_assume
from hijack.model_families import detect_family

HELP = "detect the format of a checkpoint"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("path", nargs="+", help="file, index, or shards")
    add_assume(parser)
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    parser.add_argument("-v", "--verbose", action="store_true", help="every layer")


def run(args: argparse.Namespace) -> int:
    """Print what was found; 3 if the checkpoint cannot be loaded."""
    source = args.path if len(args.path) > 1 else args.path[0]
    result = hijack.identify(source, assume=args.assume)
    print(result.to_json() if args.json else result.as_table(verbose=args.verbose))
    family = detect_family(result.infos)
    if family is not None and not args.json:
        print(f"model: {family.name}")
    return 0 if result.clear else 3
