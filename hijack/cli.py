"""The command line: quantize, identify, schemes, doctor, demo."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import os
import platform
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch

import hijack
from hijack.checkpoint.quantize import Progress
from hijack.checkpoint.text import parse_block_size, table
from hijack.errors import HijackError, SchemeError

DTYPES = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
VARIABLES = ("HIJACK_DISABLE", "HIJACK_STRICT")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments without the program's name; default is those of the process.

    Returns:
        The exit status: 0 done, 1 refused with a message, 130 interrupted. Wrong
        arguments end the process with 2.
    """
    args = _parser().parse_args(argv)
    try:
        _load_schemes()
        status: int = args.run(args)
        sys.stdout.flush()
    except HijackError as error:
        return _complain(str(error))
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - lives as long as the process
        return 0
    except OSError as error:
        return _complain(f"{error.filename or 'output'}: {error.strerror}")
    except KeyboardInterrupt:
        _complain("interrupted; nothing was replaced")
        return 130
    return status


def _complain(message: str) -> int:
    """One line on stderr, whatever the names in it hold."""
    line = " ".join(message.splitlines())
    encoding = sys.stderr.encoding or "utf-8"
    line = line.encode(encoding, "backslashreplace").decode(encoding)
    print(f"hijack: {line}", file=sys.stderr)
    return 1


def _block_size(text: str) -> Any:
    try:
        return parse_block_size(text)
    except SchemeError as error:  # a ValueError, whose words argparse would hide
        raise argparse.ArgumentTypeError(str(error)) from error


# -- commands --------------------------------------------------------------------------


def _quantize(args: argparse.Namespace) -> int:
    options: dict[str, Any] = {}
    if args.dtype is not None:
        options["dtype"] = DTYPES[args.dtype]
    if Path(args.dst).is_file() and not args.force:
        return _complain(f"{args.dst}: exists; pass --force to replace it")
    with progress_bar("quantizing") as progress:
        report = hijack.quantize_file(
            args.src if len(args.src) > 1 else args.src[0],
            args.dst,
            args.scheme,
            block_size=args.block_size,
            dialect=args.dialect,
            include=args.include,
            exclude=args.exclude,
            progress=progress,
            **options,
        )
    for layer, reason in report.skipped.items():
        if args.verbose:
            print(f"left dense: {layer} ({reason})")
    print(report)
    return 0


def _identify(args: argparse.Namespace) -> int:
    found = hijack.identify(args.path if len(args.path) > 1 else args.path[0])
    print(found.to_json() if args.json else found.as_table(verbose=args.verbose))
    return 0 if found.clear else 1


def _schemes(args: argparse.Namespace) -> int:
    rows = [
        [name, ", ".join(d.name for d in scheme.all_dialects()), scheme.origin]
        for name, scheme in sorted(hijack.schemes().items())
    ]
    print(table(["scheme", "dialects", "from"], rows))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    registry = hijack.default_registry()
    print(f"hijack {_version()} in {Path(hijack.__file__).parent}")
    print(f"python {platform.python_version()}, torch {torch.__version__}")
    for name in ("safetensors", "pluggy", "wrapt"):
        print(f"{name} {importlib.metadata.version(name)}")
    for variable in VARIABLES:
        print(f"{variable}={os.environ.get(variable, '')}")
    print(f"schemes: {', '.join(sorted(registry.schemes())) or 'none'}")
    for status in hijack.status().values():
        print(status)
    for problem in registry.problems:
        print(problem)
    return 1 if registry.problems else 0


def _demo(args: argparse.Namespace) -> int:
    from hijack.demo import run_demo

    run_demo(Path(args.out))
    return 0


# -- services --------------------------------------------------------------------------


@contextlib.contextmanager
def progress_bar(what: str) -> Iterator[Progress]:
    """A progress callback: a tqdm bar where tqdm is installed, else plain text."""
    try:
        from tqdm import tqdm
    except ImportError:
        yield _plain_progress
        if sys.stderr.isatty():
            print(file=sys.stderr)
        return
    bar = tqdm(total=0, desc=what, unit="layer", disable=None)

    def advance(done: int, total: int, layer: str) -> None:
        bar.total = total
        bar.update(done - bar.n)

    with bar:
        yield advance


def _plain_progress(done: int, total: int, layer: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{done}/{total} {layer[-50:]:<50}", end="", file=sys.stderr)


def _load_schemes() -> None:
    """Register the reference scheme where no installed entry point did."""
    if "blockwise_fp8" not in hijack.schemes():
        import schemes.blockwise_fp8  # noqa: F401 - registers itself


def _version() -> str:
    try:
        return importlib.metadata.version("comfyui-hijack")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


class _Parser(argparse.ArgumentParser):
    """Says in one line what is wrong, instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        """End with status 2."""
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "hijack", description="Quantize, identify and load checkpoints of any format."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    quantize = commands.add_parser("quantize", help="quantize a safetensors checkpoint")
    _quantize_arguments(quantize)
    identify = commands.add_parser("identify", help="say what a checkpoint is, and why")
    identify.add_argument("path", nargs="+", help="file, index, or shards")
    identify.add_argument("--json", action="store_true", help="everything, as JSON")
    identify.add_argument("-v", "--verbose", action="store_true", help="every layer")
    identify.set_defaults(run=_identify)
    schemes = commands.add_parser(
        "schemes", help="list the schemes that are registered"
    )
    schemes.set_defaults(run=_schemes)
    doctor = commands.add_parser("doctor", help="versions, plugins, hosts and problems")
    doctor.set_defaults(run=_doctor)
    demo = commands.add_parser("demo", help="quantize a small model and show the error")
    demo.add_argument("--out", default="hijack-demo", help="folder for what it writes")
    demo.set_defaults(run=_demo)
    return parser


def _quantize_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("src", nargs="+", help="file, index, or shards")
    parser.add_argument("dst", help="file to write")
    parser.add_argument(
        "--scheme", default="blockwise_fp8", help="see `hijack schemes`"
    )
    parser.add_argument(
        "--block-size",
        type=_block_size,
        metavar="SIZE",
        help="1x64 (default), 128x128, row, tensor",
    )
    parser.add_argument("--dtype", choices=DTYPES, help="code dtype, default e4m3")
    parser.add_argument("--dialect", help="default is the scheme's first")
    for name in ("include", "exclude"):
        parser.add_argument(
            f"--{name}",
            action="append",
            metavar="PATTERN",
            help=f"layers to {name}, such as 'transformer_blocks.*'; may be repeated",
        )
    parser.add_argument("--force", action="store_true", help="replace an existing file")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="name what is left"
    )
    parser.set_defaults(run=_quantize)
