"""Files in every dialect, in ComfyUI's own loader: see ``dialect_case.py``."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.comfyui, pytest.mark.thorough]

CASE = "dialect_case.py"
#: Two ways to compute the same in float32.
ROUNDING = 1e-6
#: What ComfyUI may read itself, and how far its own way to compute is off at most.
NATIVE = ("scaled_fp8 E4M3", "scaled_fp8 E5M2", "mxfp8", "nvfp4")
NATIVE, OFF = (*NATIVE, "nvfp4 with factors of its inputs"), 0.1
#: Files that ask for products in integers, with inputs quantized too, and how far off
#: that is from the product with the weight.
INTEGERS = ("int8 rows", "int8 ConvRot", "int8 ConvRot without format")
INTEGER_ERROR = 0.01


def test_every_dialect_is_read_exactly(case):
    """Nothing but rounding; also where ComfyUI's marker is wrong, or no marker is."""
    others = {*NATIVE, *INTEGERS}
    ours = {name: error for name, error in case.items() if name not in others}
    assert len(ours) > 8
    assert {name: error for name, error in ours.items() if error > ROUNDING} == {}


def test_what_comfyui_reads_itself_stays_its_own(case):
    """And means the same; from 0.4 on it would misread E5M2, so that is ours."""
    native = {name: case[name] for name in NATIVE}
    assert max(native.values()) < OFF
    if native["scaled_fp8 E4M3"] < ROUNDING:
        assert native["scaled_fp8 E5M2"] < ROUNDING


def test_integers_are_multiplied_as_integers(case):
    """By hijack or by ComfyUI, with the same error; none at all would be a float's."""
    found = {name: case[name] for name in INTEGERS}
    assert min(found.values()) > ROUNDING
    assert max(found.values()) < INTEGER_ERROR
