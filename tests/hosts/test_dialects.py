"""Files in every dialect, in ComfyUI's own loader: see ``dialect_case.py``."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.comfyui, pytest.mark.thorough]

CASE = "dialect_case.py"
#: Two ways to compute the same in float32.
ROUNDING = 1e-6
#: What ComfyUI may read itself, and how far its own way to compute is off at most.
NATIVE, OFF = ("scaled_fp8 E4M3", "scaled_fp8 E5M2", "mxfp8"), 0.1


def test_every_dialect_is_read_exactly(case):
    """Nothing but rounding; also where ComfyUI's marker is wrong, or no marker is."""
    ours = {name: error for name, error in case.items() if name not in NATIVE}
    assert len(ours) > 8
    assert {name: error for name, error in ours.items() if error > ROUNDING} == {}


def test_what_comfyui_reads_itself_stays_its_own(case):
    """And means the same; from 0.4 on it would misread E5M2, so that is ours."""
    native = {name: case[name] for name in NATIVE}
    assert max(native.values()) < OFF
    if native["scaled_fp8 E4M3"] < ROUNDING:
        assert native["scaled_fp8 E5M2"] < ROUNDING
