"""``hijack convert``: write a quantized checkpoint in another dialect or scheme."""

from __future__ import annotations

import argparse
import itertools
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

HELP = "write a quantized checkpoint in another dialect, or in another scheme"
_REQUANTIZE = "--requantize"
_PATTERNS = {
    "include": "with --requantize SCHEME: only these layers, such as '*.mlp.*'; may be "
    "repeated",
    "exclude": "with --requantize SCHEME: not these layers; may be repeated",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument("src", nargs="+", help="file, index, or shards")
    parser.add_argument("dst", help="file to write")
    parser.add_argument(
        "--dialect",
        help="see `hijack schemes`; needed unless --requantize names a scheme",
    )
    parser.add_argument(
        "--block-size",
        type=block_size,
        metavar="SIZE",
        help="block size instead of the dialect's choice",
    )
    add_options(parser)
    parser.add_argument(
        _REQUANTIZE,
        nargs="?",
        const=True,
        default=False,
        type=lambda text: text or True,
        metavar="SCHEME",
        help="requantize layers that cannot be converted without loss; or, with the "
        "name of a scheme, every layer that is in another one",
    )
    for name, text in _PATTERNS.items():
        parser.add_argument(f"--{name}", action="append", metavar="PATTERN", help=text)
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
    parser.set_defaults(refuse=parser.error)


def as_parsed(words: Sequence[str]) -> list[str]:
    """The command's arguments such that argparse takes no file for a scheme's name.

    ``--requantize`` may be the last word before the files.
    """
    parsed = list(words)
    for number, (word, following) in enumerate(itertools.pairwise(words)):
        if word == _REQUANTIZE and not following.replace("_", "").isalnum():
            parsed[number] = f"{_REQUANTIZE}="
    return parsed


def run(args: argparse.Namespace) -> int:
    """Convert, and print what was done."""
    if args.dialect is None and not isinstance(args.requantize, str):
        args.refuse("expected --dialect, or --requantize with the name of a scheme")
    watch = Stopwatch()
    source = args.src if len(args.src) > 1 else args.src[0]
    options = _options(source, args)
    if args.block_size is not None:
        options.setdefault("block_size", args.block_size)
    with progress_bar("converting") as progress:
        report = hijack.convert_file(
            source,
            args.dst,
            args.dialect,
            requantize=args.requantize,
            include=args.include,
            exclude=args.exclude,
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
    for layer, reason in report.kept.items():
        print(printable(f"kept: {layer}: {reason}"))
    print(f"{report}; {wrote(written, watch)}")
    print_notes(report.notes)
    return 0


def _options(source: str | Sequence[str], args: argparse.Namespace) -> dict[str, Any]:
    """Options of the scheme to requantize to, or of the schemes of the layers.

    Raises:
        SchemeError: if there is no such scheme, or none has such an option.
    """
    registry = hijack.current_registry()
    names: list[str] = []
    if isinstance(args.requantize, str):
        names = [registry.get(args.requantize).name]
    if not args.option:
        return {}
    from hijack.options import parse_options

    if not names:
        claims = hijack.identify(source, assume=args.assume).claims().values()
        names = sorted({claim.scheme for claim in claims})
    declared = [o for name in names for o in registry.get(name).declared_options()]
    return parse_options(declared, args.option, " and ".join(names) or "no scheme")
