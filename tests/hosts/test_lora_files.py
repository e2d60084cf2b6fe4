"""LoRA files merged as real ComfyUIs merge them: see ``lora_files_case.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

COMFYUI_TESTS = Path(__file__).parent.parent / "comfyui"
if str(COMFYUI_TESTS) not in sys.path:
    sys.path.insert(0, str(COMFYUI_TESTS))

import architectures  # noqa: E402 - found through the path set above

pytestmark = [pytest.mark.comfyui, pytest.mark.thorough]

CASE = "lora_files_case.py"
#: Rounding of two ways to compute the same in float32, in parts of what is added.
ROUNDING = 1e-4
KINDS = {"plain", "alpha", "dora", "loha", "lokr", "lokr low", "diff", "vector"}
NAMES = [a.name for a in architectures.ARCHITECTURES]
#: Models of which musubi-tuner has a list of its own.
MUSUBI = {
    "qwen-image": "Qwen-Image",
    "flux": "FLUX.1",
    "flux2": "FLUX.2",
    "wan": "Wan",
    "wan-odd": "Wan",
    "z-image": "Z-Image",
}
OTHERS = {
    "sdxl": "Stable Diffusion, SDXL",
    "sd1.5": "Stable Diffusion, SDXL",
    "sd3": "Stable Diffusion 3",
    "chroma": "Chroma",
    "lumina2": "Lumina 2",
    "hunyuan-video": "HunyuanVideo",
    "ltx-video": "LTX-Video",
    "auraflow": "AuraFlow",
    "pixart": "PixArt",
    "cosmos-predict2": "Cosmos-Predict2, Anima",
    "hidream": "HiDream-I1",
}


@pytest.fixture
def found(case, name):
    """What was found for one architecture."""
    if case[name] is None:
        pytest.skip(f"this ComfyUI has no {name}")
    return case[name]


@pytest.mark.parametrize("name", ["sdxl", *NAMES])
def test_every_name_means_what_it_means_to_comfyui(found):
    """Each name ComfyUI has for a layer leads to the same rows of the same weight."""
    assert found["names"] > 20
    assert found["wrong"] == []


@pytest.mark.parametrize("name", ["sdxl", *NAMES])
def test_every_weight_is_merged_as_comfyui_merges_it(found):
    """All layers of a model, each with several kinds of LoRA, in float32."""
    assert found["kinds"].keys() >= KINDS
    assert found["worst"] < ROUNDING


def test_convolutions_are_among_them(case):
    """Kinds with a core for the kernel have been merged."""
    assert case["sdxl"]["kinds"]["mid"] > 0
    assert case["sdxl"]["kinds"]["loha core"] > 0


@pytest.mark.parametrize(("name", "family"), (MUSUBI | OTHERS).items())
def test_the_family_is_known(found, name, family):
    """By the keys of ComfyUI's own network, below a prefix."""
    assert found["architecture"] == family


@pytest.mark.parametrize("name", MUSUBI)
def test_what_is_quantized_is_what_musubi_tuner_quantizes(found):
    """Exactly the matrices whose keys hold its words."""
    assert found["source"] == "musubi-tuner"
    assert found["differently quantized"] == []
