"""``hijack doctor``: versions, plugins, hosts and problems."""

from __future__ import annotations

import argparse

from hijack.cli.common import add_json, print_json

HELP = "versions, plugins, hosts and problems"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print what a bug report needs; 1 if a plugin has a problem."""
    from hijack.hosts.diagnostics import diagnose

    found = diagnose()
    if args.json:
        print_json(found)
    else:
        print(found)
    return 1 if found.problems else 0
