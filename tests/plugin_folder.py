"""Distributions with entry points in a folder, and a Python that finds them."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from pathlib import Path


def install(folder: Path, name: str, plugin: str, dist: str | None = None) -> None:
    """Put a distribution into a folder, as pip would.

    Args:
        folder: where modules and metadata go.
        name: of the entry point.
        plugin: source of the module it names.
        dist: name of the distribution; default is that of the entry point.
    """
    dist = dist or name
    (folder / f"{dist}_plugin.py").write_text(textwrap.dedent(plugin))
    info = folder / f"{dist}-1.0.dist-info"
    info.mkdir()
    head = f"Metadata-Version: 2.1\nName: {dist}\nVersion: 1.0\n"
    (info / "METADATA").write_text(head)
    (info / "entry_points.txt").write_text(f"[hijack]\n{name} = {dist}_plugin\n")


def python(folder: Path, code: str, **environment: str) -> str:
    """Run Python with a folder on its path; gives what it prints.

    Args:
        folder: with distributions.
        code: what to run.
        **environment: variables to set.
    """
    path = os.pathsep.join([str(folder), *sys.path])
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
