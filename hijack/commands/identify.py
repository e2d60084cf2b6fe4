"""``hijack identify``: say what a checkpoint is, and why."""

from __future__ import annotations

import argparse

import hijack

HELP = "say what a checkpoint is, and why"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("path", nargs="+", help="file, index, or shards")
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    parser.add_argument("-v", "--verbose", action="store_true", help="every layer")


def run(args: argparse.Namespace) -> int:
    """Print what was found; 1 if something stands against reading the checkpoint."""
    found = hijack.identify(args.path if len(args.path) > 1 else args.path[0])
    print(found.to_json() if args.json else found.as_table(verbose=args.verbose))
    return 0 if found.clear else 1
