"""The command line: its entry point and the small commands."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

import hijack
from hijack.cli import compare, convert, identify, quantize
from hijack.errors import HijackError, printable
from hijack.formats import matching
from hijack.registry import disabled
from hijack.text import table

#: The modules of `hijack.cli`, in the order the help shows them.
COMMANDS = (quantize, convert, identify, compare)
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
    except BrokenPipeError:  # the reader, such as `head`, has exited
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - lives as long as the process
        return 0
    except OSError as error:
        return _complain(f"{error.filename or 'output'}: {error.strerror}")
    except KeyboardInterrupt:
        _complain("interrupted; nothing was replaced")
        return 130
    return status


def _complain(message: str) -> int:
    """Print one line on stderr, with unprintable characters escaped."""
    line = " ".join(message.splitlines())
    encoding = sys.stderr.encoding or "utf-8"
    line = line.encode(encoding, "backslashreplace").decode(encoding)
    print(f"hijack: {line}", file=sys.stderr)
    return 1


def _load_schemes() -> None:
    """Register the reference scheme where no installed entry point did."""
    if "blockwise_fp8" not in hijack.schemes() and not disabled("blockwise_fp8"):
        import schemes.blockwise_fp8  # noqa: F401 - registers itself


class _Parser(argparse.ArgumentParser):
    """Prints errors in one line, without the usage."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        self.exit(2, f"{self.prog}: {message}; see `{self.prog} --help`\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "hijack", description="Quantize, identify and load checkpoints of any format."
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(name, help=module.HELP)
        module.arguments(command)
        command.set_defaults(run=module.run)
    schemes = commands.add_parser(
        "schemes", help="list the schemes that are registered"
    )
    schemes.set_defaults(run=_schemes)
    doctor = commands.add_parser("doctor", help="versions, plugins, hosts and problems")
    doctor.set_defaults(run=_doctor)
    demo = commands.add_parser("demo", help="quantize a small model and show the error")
    demo.add_argument("--out", default="hijack-demo", help="folder for its files")
    demo.set_defaults(run=_demo)
    return parser


# -- small commands -------------------------------------------------------------------


def _schemes(args: argparse.Namespace) -> int:
    rows = [
        [
            name,
            ", ".join(d.name for d in matching.dialects_of(scheme) if d.writes),
            scheme.origin,
        ]
        for name, scheme in sorted(hijack.schemes().items())
    ]
    print(table(["scheme", "dialects written", "from"], rows))
    for name, scheme in sorted(hijack.schemes().items()):
        print(f"\n{name}: {_options(scheme)}")
    return 0


def _options(scheme: hijack.Scheme) -> str:
    """The values of ``--option``, as a table."""
    options = scheme.declared_options()
    if not options:
        return "no options"
    rows = [
        [
            option.name,
            "-" if option.default is None else option.text(option.default),
            option.expected(),
            option.help,
        ]
        for option in options
    ]
    head = ["--option NAME", "default", "values", "what it is"]
    return f"options\n{table(head, rows)}"


def _doctor(args: argparse.Namespace) -> int:
    registry = hijack.current_registry()
    print(f"hijack {_version()} in {Path(hijack.__file__).parent}")
    print(f"python {platform.python_version()}, torch {torch.__version__}")
    for name in ("safetensors", "pluggy", "wrapt"):
        print(f"{name} {importlib.metadata.version(name)}")
    for variable in VARIABLES:
        print(f"{variable}={os.environ.get(variable, '')}")
    print(f"schemes: {', '.join(sorted(registry.schemes())) or 'none'}")
    for status in hijack.status().values():
        print("\n".join(map(printable, str(status).splitlines())))
    for plugin, seconds in registry.slow_imports.items():
        print(f"plugin {plugin}: took {seconds:.1f} s to import")
    for problem in registry.problems:
        print(printable(str(problem)))
    return 1 if registry.problems else 0


def _version() -> str:
    try:
        return importlib.metadata.version("comfyui-hijack")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed)"


def _demo(args: argparse.Namespace) -> int:
    from hijack.cli.demo import run_demo

    run_demo(Path(args.out))
    return 0
