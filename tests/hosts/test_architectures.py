"""Small models of many architectures in each real ComfyUI: ``architecture_case.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

COMFYUI_TESTS = Path(__file__).parent.parent / "comfyui"
if str(COMFYUI_TESTS) not in sys.path:
    sys.path.insert(0, str(COMFYUI_TESTS))

import architectures  # noqa: E402 - found through the path set above

CASE = "architecture_case.py"
#: Rounding of two ways to compute the same in float32.
ROUNDING = 1e-5
NATIVE = [
    pytest.param(a.name, "native", id=a.name) for a in architectures.ARCHITECTURES
]
DIFFUSERS = [
    pytest.param(a.name, "diffusers", id=f"{a.name}-diffusers")
    for a in architectures.ARCHITECTURES
    if a.diffusers is not None
]


@pytest.fixture
def found(case, name, naming):
    """What was found for one file of one architecture."""
    if case[name] is None:
        pytest.skip(f"this ComfyUI has no {name}")
    if naming not in case[name]:
        pytest.skip(f"this ComfyUI reads no {name} with {naming} names")
    return case[name][naming]


@pytest.mark.comfyui
@pytest.mark.thorough
@pytest.mark.parametrize(("name", "naming"), NATIVE + DIFFUSERS)
def test_the_model_is_the_exact_one(found):
    """First output and a sampled latent are those of the decoded file."""
    assert "failed" not in found, found["failed"]
    first, latent = found["errors"]
    assert first <= ROUNDING
    assert latent <= ROUNDING


@pytest.mark.comfyui
@pytest.mark.thorough
@pytest.mark.parametrize(("name", "naming"), NATIVE + DIFFUSERS)
def test_without_hijack_it_would_be_another(found):
    """ComfyUI alone refuses the file, or gives something far off or not finite."""
    alone = found["without hijack"]
    assert isinstance(alone, str) or alone[0] is None or alone[0] > 0.1, alone


@pytest.mark.comfyui
@pytest.mark.thorough
@pytest.mark.parametrize(("name", "naming"), NATIVE + DIFFUSERS)
def test_every_linear_stays_quantized(found):
    """Also one whose weight the file has in parts."""
    assert found.get("linears", 0) > 0, found.get("failed")
    assert found["quantized"] == found["linears"]


@pytest.mark.comfyui
@pytest.mark.thorough
def test_every_kind_of_scale_is_among_them(case):
    """Blocks, rows where 64 does not divide the width, and one scale for the rest."""
    assert case["wan-odd"]["native"]["scales"]["2-D by 2-D"] > 0
    assert case["wan-odd"]["native"]["scales"]["2-D by 3-D"] > 0
    unet = case["sd1.5"]["native"]["scales"]
    assert unet["4-D by 0-D"] > 0
    assert unet["1-D by 0-D"] > 0
    assert unet["2-D by 3-D"] > 0
