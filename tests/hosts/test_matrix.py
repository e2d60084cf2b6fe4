"""Everything that must work, release by release and scheme by scheme: errors.

The table is printed after the tests; ``docs/comfyui-matrix.md`` is such a table.
"""

from __future__ import annotations

import functools
from pathlib import Path

import comfy_harness  # its folder is put on the path in conftest.py
import pytest

SCRIPT = Path(__file__).with_name("matrix_case.py")
RELEASES = comfy_harness.releases()

pytestmark = pytest.mark.comfyui

#: Rows that always run, and those that take a minute more for each release.
USUAL = ("blockwise_fp8", "example plugin")
THOROUGH = ("int8", "int8 ConvRot", "nvfp4", "mxfp4", "nf4", "w4a8", "convrot_w4a4")
SCHEMES = [*USUAL, *(pytest.param(n, marks=pytest.mark.thorough) for n in THOROUGH)]
#: A LoRA adds two products in float32, and kernels may add up in another order than the
#: dense layer; nothing else may differ at all.
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
#: Weights of INT8 that ComfyUI has quantized are multiplied in integers, as it does.
INTEGER_ERROR = 0.01
ONLINE = ("quantize online", "quantize on load")
#: Cells that compare a model with itself.
SAME = ("LoRA removed",)
DYNAMIC = ("plain", "LoRA", "LoRA big", "LoRA removed", "quantize on load")
DYNAMIC = (*DYNAMIC, "save and reload")


#: Rows without a kernel: they decode, and multiply as the dense layer does.
DECODED = ("example plugin", "w4a8")


def allowed(scheme):
    """Cell to the largest error."""
    most = CELLS
    if scheme not in DECODED:
        most = {cell: CELLS[cell] if cell in SAME else ROUNDING for cell in CELLS}
    if scheme.startswith("int8"):
        most = {**most, **dict.fromkeys(ONLINE, INTEGER_ERROR)}
    return most


@pytest.fixture(scope="module")
def row(request, tmp_path_factory, release):
    """Cell to error of a scheme with one release."""
    folder, root = tmp_path_factory.mktemp("matrix"), RELEASES[release]

    @functools.cache
    def run(schemes):
        found = comfy_harness.run_case(SCRIPT, root, folder, *schemes)
        if comfy_harness.has_dynamic_vram(root):
            dynamic = comfy_harness.run_case(SCRIPT, root, folder, "dynamic", *schemes)
            for scheme, cells in dynamic.items():
                found[scheme] |= {f"DynamicVRAM: {k}": v for k, v in cells.items()}
        return found

    return lambda scheme: run(USUAL if scheme in USUAL else THOROUGH)[scheme]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_every_cell_is_exact(row, scheme, release, record_property):
    """Each cell is there, and its error is none but float32 rounding."""
    record_property("matrix", (release, scheme, row(scheme)))
    assert CELLS.keys() <= row(scheme).keys()
    most = allowed(scheme)
    wrong = {
        cell: row(scheme)[cell] for cell in CELLS if row(scheme)[cell] > most[cell]
    }
    assert wrong == {}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_dynamic_vram_is_exact(row, scheme, release):
    """The same where ComfyUI loads weights when they are used."""
    if not comfy_harness.has_dynamic_vram(RELEASES[release]):
        pytest.skip(f"{release} has no dynamic VRAM")
    found = {cell: row(scheme)[f"DynamicVRAM: {cell}"] for cell in DYNAMIC}
    most = allowed(scheme)
    assert {cell: v for cell, v in found.items() if v > most[cell]} == {}
