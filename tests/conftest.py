"""Shared by all tests: which ones run, and an environment that says nothing."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

MATRIX_HEAD = """# What works in ComfyUI, measured

Relative L2 distance of a latent after three steps to that of the exactly dequantized
float32 model, with the exact LoRA (1 % and 5 times the weight's norm); after removing
a LoRA, 0 means the same bits as before. Small Qwen-Image, CPU. Dynamic VRAM runs
ComfyUI's own code around doubles of a device and of comfy_aimdo's native half; only
some releases have it. Written by
`HIJACK_WRITE_MATRIX=docs/comfyui-matrix.md pytest tests/hosts/test_matrix.py`.
"""


def pytest_addoption(parser):
    """``--thorough`` runs everything, as CI does."""
    text = "also run the tests marked thorough, which take a quarter of an hour"
    parser.addoption("--thorough", action="store_true", help=text)


def pytest_collection_modifyitems(config, items):
    """Leave thorough tests out unless they are asked for, all or by file."""
    if _all_are_run(config):
        return
    left_out = [item for item in items if item.get_closest_marker("thorough")]
    items[:] = [item for item in items if item not in set(left_out)]
    config.hook.pytest_deselected(items=left_out)


def _all_are_run(config):
    named = any("test_" in argument for argument in config.args)
    return config.option.thorough or named


def pytest_terminal_summary(terminalreporter, config):
    """Say what was left out, and print the matrix of ComfyUI releases."""
    if not _all_are_run(config):
        terminalreporter.write_line(
            "Tests marked thorough were left out: pass --thorough to run them."
        )
    reports = list(terminalreporter.stats.get("passed", []))
    reports += terminalreporter.stats.get("failed", [])
    found = [v for r in reports for k, v in r.user_properties if k == "matrix"]
    if not found:
        return
    table = {(release, scheme): cells for release, scheme, cells in found}
    text = f"{MATRIX_HEAD}\n{as_markdown(table)}\n"
    terminalreporter.write_line(f"\n{text}")
    if os.environ.get("HIJACK_WRITE_MATRIX"):
        Path(os.environ["HIJACK_WRITE_MATRIX"]).write_text(text, "utf-8")


def as_markdown(table):
    """A table for each release: schemes down, cells across."""
    lines = []
    releases = dict.fromkeys(release for release, _ in table)
    for release in sorted(releases, key=lambda name: [*map(int, name.split(".")), 0]):
        rows = {scheme: cells for (of, scheme), cells in table.items() if of == release}
        cells = dict.fromkeys(cell for row in rows.values() for cell in row)
        lines += [f"## {release}", "", f"| | {' | '.join(cells)} |"]
        lines += ["|---|" + "---|" * len(cells)]
        for scheme, row in rows.items():
            values = [row.get(cell) for cell in cells]
            shown = ["n/a" if v is None else f"{v:.1e}" if v else "0" for v in values]
            lines.append(f"| {scheme} | {' | '.join(shown)} |")
        lines.append("")
    return "\n".join(lines).rstrip()


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """Tests set the variables they are about; the caller's do not count."""
    for name in ("HIJACK_DISABLE", "HIJACK_STRICT", "HIJACK_LORA", "HIJACK_PREFER"):
        monkeypatch.delenv(name, raising=False)
