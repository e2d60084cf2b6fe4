"""The command line: its entry point.

The help and the version are printed without torch, which takes seconds to import: the
modules of the commands import what they need when they run.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

from hijack import __version__
from hijack.cli import compare, convert, demo, doctor, identify, quantize, schemes
from hijack.errors import HijackError, printable
from hijack.text import did_you_mean

#: The modules of the commands, in the order the help shows them.
COMMANDS = (quantize, convert, identify, compare, schemes, doctor, demo)
#: Packages that hijack cannot do without.
_NEEDED = ("torch", "safetensors", "pluggy", "wrapt", "filelock")


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        argv: arguments without the program's name; default is those of the process.

    Returns:
        The exit status: 0 done, 1 refused with a message, 3 something is wrong with a
        file, 130 interrupted. Wrong arguments end the process with 2.
    """
    _print_what_can_be_printed()
    parser = _parser()
    words = convert.as_parsed(sys.argv[1:] if argv is None else argv)
    args, unknown = parser.parse_known_args(words)
    if unknown:
        known: Iterable[str] = args.parser._option_string_actions
        hint = did_you_mean(unknown[0].partition("=")[0], known)
        args.parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    try:
        _check_packages()
        _load_schemes()
        status: int = args.run(args)
        sys.stdout.flush()
    except HijackError as error:
        return _complain(str(error))
    except ModuleNotFoundError as error:
        if error.name not in _NEEDED:
            raise
        python = f"{sys.executable} -m pip install {error.name}"
        return _complain(f"{error.name} is not installed; run: {python}")
    except BrokenPipeError:  # the reader, such as `head`, has exited
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - lives as long as the process
        return 0
    except OSError as error:
        return _complain(f"{error.filename or 'output'}: {error.strerror}")
    except KeyboardInterrupt:
        _complain("interrupted; nothing was replaced")
        return 130
    return status


def _print_what_can_be_printed() -> None:
    """Have letters that the terminal or a file cannot hold escaped, not refused."""
    for stream in (sys.stdout, sys.stderr):
        reconfigure = getattr(stream, "reconfigure", None)
        if reconfigure is not None:
            reconfigure(errors="backslashreplace")


def _complain(message: str) -> int:
    """Print one line on stderr."""
    print(f"hijack: {' '.join(message.splitlines())}", file=sys.stderr)
    return 1


def _check_packages() -> None:
    """Notice a package that is missing before a plugin fails without it."""
    for name in _NEEDED:
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _load_schemes() -> None:
    """Register the schemes that come with hijack where no entry point did."""
    # NumPy is optional; torch says that it is missing, though nothing here needs it
    warnings.filterwarnings("ignore", message="Failed to initialize NumPy")
    from schemes import register_all

    register_all()


class _Parser(argparse.ArgumentParser):
    """Prints errors in one line, without the usage, and guesses what was meant."""

    def error(self, message: str) -> NoReturn:
        """Exit with status 2."""
        end = "" if message.endswith("?") else ";"
        self.exit(
            2, f"{self.prog}: {printable(message)}{end} see `{self.prog} --help`\n"
        )

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        try:
            super()._check_value(action, value)
        except argparse.ArgumentError as error:
            error.message += did_you_mean(str(value), map(str, action.choices or ()))
            raise


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        "hijack", description="Quantize, identify and load checkpoints of any format."
    )
    parser.add_argument(
        "--version", action="version", version=f"%(prog)s {__version__}"
    )
    parser.set_defaults(parser=parser)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        name = module.__name__.rpartition(".")[2]
        command = commands.add_parser(name, help=module.HELP)
        module.arguments(command)
        command.set_defaults(run=module.run, parser=command)
    return parser
