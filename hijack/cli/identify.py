"""``hijack identify``: say what a checkpoint is, and why.

For scripts: it ends with 0 if every layer can be read, with 3 if something stands
against it (a foreign format, an ambiguity, a contradiction, an orphan), and with 1 if
the file is malformed.
"""

from __future__ import annotations

import argparse

import hijack
from hijack.model_families import detect_architecture
from hijack.safetensors_io.header import Header

HELP = "say what a checkpoint is, and why"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("path", nargs="+", help="file, index, or shards")
    parser.add_argument(
        "--assume",
        action="append",
        default=[],
        metavar="WORD",
        help="scheme, dialect or block size where the file does not tell; repeatable",
    )
    parser.add_argument("--json", action="store_true", help="everything, as JSON")
    parser.add_argument("-v", "--verbose", action="store_true", help="every layer")


def run(args: argparse.Namespace) -> int:
    """Print what was found; 3 if something stands against reading the checkpoint."""
    source = args.path if len(args.path) > 1 else args.path[0]
    found = hijack.identify(source, assume=args.assume)
    print(found.to_json() if args.json else found.as_table(verbose=args.verbose))
    known = detect_architecture(Header(found.infos))
    if known is not None and not args.json:
        print(f"model: {known.name}")
    return 0 if found.clear else 3
