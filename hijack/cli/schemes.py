"""``hijack schemes``: the schemes that are registered, and their options."""

from __future__ import annotations

import argparse

import hijack
from hijack.cli.common import add_json, print_json
from hijack.errors import printable
from hijack.text import table

HELP = "list the schemes that are registered, and their options"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print a table of schemes, and one of the options of each."""
    known = hijack.schemes().values()
    order = sorted(known, key=lambda scheme: (not scheme.is_default, scheme.name))
    schemes = {scheme.name: scheme for scheme in order}
    if args.json:
        print_json({name: _facts(scheme) for name, scheme in schemes.items()})
        return 0
    rows = [
        [name, ", ".join(_written(scheme)), scheme.origin]
        for name, scheme in schemes.items()
    ]
    print(table(["scheme", "dialects written", "from"], rows))
    for name, scheme in schemes.items():
        summary = f"{printable(scheme.summary)}\n" if scheme.summary else ""
        print(f"\n{name}: {summary}{_options(scheme)}")
    return 0


def _written(scheme: hijack.Scheme) -> list[str]:
    from hijack.formats import matching

    return [d.name for d in matching.dialects_of(scheme) if d.writes]


def _facts(scheme: hijack.Scheme) -> dict[str, object]:
    return {
        "summary": scheme.summary,
        "default": scheme.is_default,
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
