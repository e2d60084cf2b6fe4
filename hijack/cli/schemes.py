"""``hijack schemes``: the schemes that are registered, and their options."""

from __future__ import annotations

import argparse

import hijack
from hijack.cli.common import add_json, print_json
from hijack.text import table

HELP = "list the schemes that are registered, and their options"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print a table of schemes, and one of the options of each."""
    schemes = dict(sorted(hijack.schemes().items()))
    if args.json:
        print_json({name: _facts(scheme) for name, scheme in schemes.items()})
        return 0
    rows = [
        [name, ", ".join(_written(scheme)), scheme.origin]
        for name, scheme in schemes.items()
    ]
    print(table(["scheme", "dialects written", "from"], rows))
    for name, scheme in schemes.items():
        print(f"\n{name}: {_options(scheme)}")
    return 0


def _written(scheme: hijack.Scheme) -> list[str]:
    from hijack.formats import matching

    return [d.name for d in matching.dialects_of(scheme) if d.writes]


def _facts(scheme: hijack.Scheme) -> dict[str, object]:
    return {
        "dialects": _written(scheme),
        "origin": scheme.origin,
        "options": {
            option.name: {
                "default": None
                if option.default is None
                else option.text(option.default),
                "values": option.expected(),
                "help": option.help,
            }
            for option in scheme.declared_options()
        },
    }


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
