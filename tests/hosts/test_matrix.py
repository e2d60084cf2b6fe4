"""Everything that must work, release by release, for two schemes: a table of errors.

The table is printed after the tests; ``docs/comfyui-matrix.md`` is such a table.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import comfy_harness  # its folder is put on the path in conftest.py
import pytest

HERE = Path(__file__).parent
RELEASES = comfy_harness.releases()

pytestmark = pytest.mark.comfyui

SCHEMES = ("blockwise_fp8", "example plugin")
#: A LoRA adds two products in float32, nothing else may differ at all.
ROUNDING = 1e-6
CELLS = {
    "plain": 0.0,
    "LoRA": ROUNDING,
    "LoRA big": ROUNDING,
    "LoRA removed": 0.0,
    "partial load": 0.0,
    "LoRA, partial load": ROUNDING,
    "LoRA big, partial load": ROUNDING,
    "quantize online": 0.0,
    "quantize on load": 0.0,
    "save and reload": 0.0,
}
DYNAMIC = ("plain", "LoRA", "LoRA big", "LoRA removed", "quantize on load")
DYNAMIC = (*DYNAMIC, "save and reload")


def has_dynamic_vram(folder: Path) -> bool:
    """Whether a release can load weights when they are used."""
    text = (folder / "comfy" / "model_patcher.py").read_text("utf-8")
    available = importlib.util.find_spec("comfy_aimdo") is not None
    return available and "class ModelPatcherDynamic" in text


def run(folder, *arguments):
    """What one process found."""
    done = subprocess.run(
        [sys.executable, HERE / "matrix_case.py", *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def row(request, tmp_path_factory, release):
    """Scheme to cell to error, for one release."""
    folder = tmp_path_factory.mktemp("matrix")
    found = run(folder, RELEASES[release], folder)
    if has_dynamic_vram(RELEASES[release]):
        dynamic = run(folder, RELEASES[release], folder, "dynamic")
        for scheme, cells in dynamic.items():
            found[scheme] |= {f"DynamicVRAM: {k}": v for k, v in cells.items()}
    return found


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_cell_is_exact(row, scheme, release, record_property):
    """Each cell is there, and its error is none but float32 rounding."""
    record_property("matrix", (release, scheme, row[scheme]))
    assert {cell: row[scheme][cell] for cell in CELLS}.keys() == CELLS.keys()
    wrong = {c: row[scheme][c] for c, most in CELLS.items() if row[scheme][c] > most}
    assert wrong == {}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dynamic_vram_is_exact(row, scheme, release):
    """The same where ComfyUI loads weights when they are used."""
    if not has_dynamic_vram(RELEASES[release]):
        pytest.skip(f"{release} has no dynamic VRAM")
    found = {cell: row[scheme][f"DynamicVRAM: {cell}"] for cell in DYNAMIC}
    assert {c: v for c, v in found.items() if v > CELLS[c]} == {}
