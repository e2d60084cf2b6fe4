"""``hijack demo``: the main job on a small model, step by step."""

from __future__ import annotations

import argparse
from pathlib import Path

from hijack.cli.common import add_force, add_json

HELP = "quantize a small model and show the error"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--out", default="hijack-demo", help="folder for its files")
    add_force(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run every step."""
    from hijack.cli.demo_steps import run_demo

    run_demo(Path(args.out))
    return 0
