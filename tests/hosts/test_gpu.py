"""Quantized models in each real ComfyUI on a real GPU: see ``gpu_case.py``."""

from __future__ import annotations

import itertools
from pathlib import Path

import comfy_harness  # its folder is put on the path in conftest.py
import pytest
import torch

CASE = Path(__file__).with_name("gpu_case.py")
DYNAMIC = "--enable-dynamic-vram"
#: Every release knows it, and here it changes nothing: without any it would be --cpu.
PLAIN = "--disable-xformers"
RUNS = {
    f"{version} {argument}": (folder, argument)
    for version, folder in comfy_harness.releases().items()
    for argument in (PLAIN, DYNAMIC)
    if argument != DYNAMIC or comfy_harness.has_dynamic_vram(folder)
}
#: Two ways to compute the same differ by less, relative to the output. On a GPU ComfyUI
#: itself multiplies LoRAs in float16 before it merges them, hijack does in float32.
ROUNDING = {"float32": 3e-5, "bfloat16": 3e-2}

if not torch.cuda.is_available():
    pytest.skip("no GPU: torch.cuda.is_available()", allow_module_level=True)

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.thorough,
    pytest.mark.skipif(not RUNS, reason="no ComfyUI: set HIJACK_TEST_COMFYUI"),
]


@pytest.fixture(scope="module", params=list(RUNS) or [None])
def run(request):
    """A release's folder, and how it is started."""
    return RUNS[request.param]


@pytest.fixture(scope="module")
def found(run, tmp_path_factory):
    """What one process with that release found."""
    folder, argument = run
    return comfy_harness.run_case(CASE, folder, tmp_path_factory.mktemp("f"), argument)


def ways(run):
    """How weights may lie on the GPU."""
    return ("whole",) if run[1] == DYNAMIC else ("whole", "half", "none")


def test_the_gpu_is_used(found, run):
    """The model is loaded there, by the patcher that was asked for."""
    assert found["devices"] == ["cuda:0"]
    assert (found["patcher"] == "ModelPatcherDynamic") == (run[1] == DYNAMIC)


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_quantized_weights_are_exact(found, run, dtype):
    """Loaded or streamed, they give what the exactly dequantized model gives."""
    for way in ways(run):
        assert found[f"{dtype} plain {way}"] < ROUNDING[dtype], way
    assert found["default"] < ROUNDING["bfloat16"]


@pytest.mark.parametrize("dtype", list(ROUNDING))
def test_loras_take_effect_and_leave_no_trace(found, run, dtype):
    """A LoRA beside the weight is right, and without it all bits are as before."""
    for lora, way in itertools.product(("small", "large"), ways(run)):
        assert found[f"{dtype} {lora} {way}"] < ROUNDING[dtype], (lora, way)
        assert found[f"{dtype} {lora} removed"]
    assert found[f"{dtype} large effect"] > 0.1


def test_loaded_memory_is_what_comfyui_asked_for(found, run):
    """Nothing of a model without memory is loaded, and about half of one with half."""
    if run[1] != DYNAMIC:
        half, none = found["loaded"][:2]
        assert half > none == 0


def test_saving_and_unloading(found):
    """Data and scales are saved as they came, and nothing stays on the GPU."""
    assert found["saved"]
    assert found["left"] == []
