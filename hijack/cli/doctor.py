"""``hijack doctor``: versions, plugins, hosts and problems."""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import platform
from pathlib import Path

import hijack
from hijack.cli.common import add_json, print_json
from hijack.errors import printable

HELP = "versions, plugins, hosts and problems"
VARIABLES = ("HIJACK_DISABLE", "HIJACK_STRICT")
PACKAGES = ("torch", "safetensors", "pluggy", "wrapt")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's arguments."""
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print what a bug report needs; 1 if a plugin has a problem."""
    import torch

    registry = hijack.current_registry()
    versions = {name: _version(name) for name in PACKAGES}
    versions["torch"] = torch.__version__  # with the build, such as +cu128
    folder = Path(hijack.__file__).parent
    hosts = hijack.status()
    problems = [printable(str(problem)) for problem in registry.problems]
    schemes = sorted(registry.schemes())
    if args.json:
        print_json(
            {
                "hijack": hijack.__version__,
                "folder": str(folder),
                "python": platform.python_version(),
                "packages": versions,
                "variables": {name: os.environ.get(name) for name in VARIABLES},
                "schemes": schemes,
                "hosts": hosts,
                "slow_imports": dict(registry.slow_imports),
                "problems": problems,
            }
        )
        return 1 if problems else 0
    print(f"hijack {hijack.__version__} in {folder}")
    print(f"python {platform.python_version()}, torch {versions.pop('torch')}")
    for name, version in versions.items():
        print(f"{name} {version}")
    for variable in VARIABLES:
        print(f"{variable}={os.environ.get(variable, '')}")
    print(f"schemes: {', '.join(schemes) or 'none'}")
    for status in hosts.values():
        print("\n".join(map(printable, str(status).splitlines())))
    for plugin, seconds in registry.slow_imports.items():
        print(f"plugin {plugin}: took {seconds:.1f} s to import")
    for problem in problems:
        print(problem)
    return 1 if problems else 0


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "without metadata"
