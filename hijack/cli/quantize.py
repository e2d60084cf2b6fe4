"""``hijack quantize``: quantize a safetensors checkpoint."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import hijack
from hijack.cli.common import (
    Stopwatch,
    add_force,
    add_json,
    add_options,
    add_shard_size,
    files_written,
    print_json,
    print_notes,
    wrote,
)
from hijack.cli.progress import progress_bar
from hijack.errors import SchemeError, printable
from hijack.text import did_you_mean, table

if TYPE_CHECKING:
    from hijack.model_families import ModelFamily

HELP = "quantize a safetensors checkpoint"
_PATTERNS = {
    "include": "quantize only these layers, such as 'transformer_blocks.*'; replaces "
    "the model's defaults, unless one is 'default'; may be repeated",
    "exclude": "leave these layers dense, such as '*norm*', even if included; replaces "
    "the model's defaults, unless one is 'default'; may be repeated",
}
_FLAGS = {
    "--ignore-unmatched": "lose what LoRAs change in layers the checkpoint lacks",
    "--dry-run": "report layers and file sizes, and write nothing",
    "--write-config": "write config.json beside DST, for dialects whose readers expect "
    "a quantization_config",
    "--show-defaults": "print which layers are quantized by default: of SRC, or of "
    "every known model",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    parser.add_argument(
        "paths",
        nargs="*",
        metavar="SRC ... DST",
        help="a file, an index, or shards; and the file to write",
    )
    _add_formats(parser)
    _add_choices(parser)
    parser.add_argument("--device", default="cpu", help="such as cuda; default cpu")
    parser.add_argument(
        "--workers", type=int, metavar="N", help="threads, default one for each core"
    )
    parser.add_argument(
        "--processes",
        type=int,
        default=1,
        metavar="N",
        help="that share the work, with more cores than eight; default 1",
    )
    add_shard_size(parser)
    add_force(parser)
    add_json(parser)
    for flag, text in _FLAGS.items():
        parser.add_argument(flag, action="store_true", help=text)
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="list layers that are left dense"
    )
    parser.set_defaults(refuse=parser.error)


def _add_formats(parser: argparse.ArgumentParser) -> None:
    """How weights are quantized."""
    parser.add_argument(
        "--scheme", help="see `hijack schemes`, which names the default first"
    )
    parser.add_argument(
        "--block-size",
        metavar="SIZE",
        help="1x64, 128x128, row, tensor; default is the dialect's",
    )
    add_options(parser)
    parser.add_argument(
        "--dtype", help="dtype of the quantized data, such as e4m3 or e5m2"
    )
    parser.add_argument(
        "--scale-dtype",
        help="such as f32, bf16 or e8m0; default is the weight's or the dialect's",
    )
    parser.add_argument(
        "--scale-search",
        metavar="N",
        help="try N scales for each and take the one with the least error",
    )
    parser.add_argument(
        "--dialect", help="default is the scheme's first that can store the blocks"
    )


def _add_choices(parser: argparse.ArgumentParser) -> None:
    """Which weights are quantized, and what is done to them first."""
    for name, text in _PATTERNS.items():
        parser.add_argument(f"--{name}", action="append", metavar="PATTERN", help=text)
    parser.add_argument(
        "--rule",
        action="append",
        default=[],
        metavar="PATTERN=SIZE",
        help="block size of some layers, such as 'blocks.*.ffn=128x128'; or "
        "PATTERN=skip, =bf16, =f16, =f32 to leave them dense; the first that matches "
        "applies; may be repeated",
    )
    parser.add_argument(
        "--lora",
        action="append",
        default=[],
        metavar="FILE[:STRENGTH]",
        help="merge a LoRA first; may be repeated",
    )


def run(args: argparse.Namespace) -> int:
    """Quantize, and print what was done."""
    if args.show_defaults:
        _show_defaults(args)
        return 0
    if len(args.paths) < 2:
        _refuse(args, "expected SRC and DST")
    *src, dst = args.paths
    watch = Stopwatch()
    registry = hijack.current_registry()
    scheme = registry.get(args.scheme) if args.scheme else registry.default_scheme()
    options = _options(args, scheme)
    with progress_bar("quantizing") as progress:
        report = hijack.quantize_file(
            src if len(src) > 1 else src[0],
            dst,
            scheme,
            dialect=args.dialect,
            loras=args.lora,
            include=args.include,
            exclude=args.exclude,
            progress=progress,
            rules=args.rule,
            ignore_unmatched=args.ignore_unmatched,
            device=args.device,
            workers=args.workers,
            processes=args.processes,
            max_shard_size=args.max_shard_size,
            write_config=args.write_config,
            dry_run=args.dry_run,
            overwrite=args.force,
            **options,
        )
    written: list[Path] = []
    if report.written:
        sharded = args.max_shard_size is not None
        written = files_written(dst, sharded=sharded)
    if args.json:
        facts = {"seconds": watch.seconds, "paths": written}
        print_json({**vars(report), **facts})
        return 0
    end = f"; {wrote(written, watch)}" if written else ""
    print(f"{_text(report, verbose=args.verbose)}{end}")
    print_notes(report.notes)
    return 0


def _options(args: argparse.Namespace, scheme: hijack.Scheme) -> dict[str, Any]:
    """Options of the scheme on the command line; some have arguments of their own."""
    from hijack.options import COMMON, parse_options

    declared = scheme.declared_options()
    known, texts = {option.name: option for option in declared}, list[str]()
    for name in COMMON:
        text = getattr(args, name)
        if text is None:
            continue
        texts.append(f"{name}={text}")
        try:
            if name in known:
                known[name].parse(text)
        except SchemeError as error:
            words = map(known[name].word, known[name].choices)
            _refuse(args, f"{error}{did_you_mean(text, words)}")
    return parse_options(declared, [*texts, *args.option], scheme.name)


def _refuse(args: argparse.Namespace, what: str) -> NoReturn:
    args.refuse(what)
    raise SystemExit(2)


# -- output ----------------------------------------------------------------------------


def _text(report: hijack.QuantizeReport, *, verbose: bool) -> str:
    """The report as text."""
    lines = []
    if verbose:
        lines += [f"left dense: {name} ({why})" for name, why in report.skipped.items()]
        lines += [f"LoRA left out: {name}" for name in report.unmatched]
        lines = list(map(printable, lines))
    lines.append(report.model_text("-v lists them, --include names others"))
    full = verbose or not report.written
    if full or report.reblocked:
        blocks = [[size, str(count)] for size, count in report.blocks.items()]
        lines.append(table(["block", "layers"], blocks))
    if full:
        files = [[name, f"{size:,}"] for name, size in report.files.items()]
        lines.append(table(["file", "bytes of the file"], files))
    return "\n".join([*lines, str(report)])


def _show_defaults(args: argparse.Namespace) -> None:
    """Print the patterns of the model in a checkpoint, or of every model."""
    from hijack import model_families
    from hijack.safetensors_io.reader import read_header

    paths: Sequence[str] = args.paths
    families = model_families.model_families()
    if paths:
        header = read_header(paths if len(paths) > 1 else paths[0])
        family = model_families.detect_family(header.tensors)
        families = () if family is None else (family,)
    if args.json:
        print_json(list(families))
    elif families:
        print("\n".join(map(_patterns, families)))
    else:
        print(
            "the model is unknown; every layer with a 2-D weight is quantized, but for "
            "what looks like embeddings, norms, heads or routers; --dry-run -v lists it"
        )


def _patterns(family: ModelFamily) -> str:
    include, exclude = " ".join(family.include), " ".join(family.exclude)
    return (
        f"{family.name} ({family.source})\n"
        f"  include: {include or 'all'}\n  exclude: {exclude or 'none'}"
    )
