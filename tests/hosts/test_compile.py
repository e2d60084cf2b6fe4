"""The stock TorchCompileModel node on quantized models: see ``compile_case.py``."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.comfyui, pytest.mark.thorough]

CASE = "compile_case.py"
MODELS = ("plain", "lora", "lora, low VRAM")
MODELS += ("bound forward", "bound forward, lora", "bound forward, dora")


@pytest.mark.parametrize("model", MODELS)
def test_a_compiled_model_gives_the_same_latent(case, model):
    """With and without a LoRA, the first time and again."""
    assert case[model]["error"] < 1e-5
    assert case[model]["again"] < 1e-5


@pytest.mark.parametrize("model", MODELS)
def test_no_step_compiles_anew(case, model):
    """Graphs are compiled in the first steps and serve all later ones."""
    graphs = case[model]["graphs"]
    assert graphs[0] > 0
    assert graphs[-1] == graphs[1], graphs
    assert set(case[model]["later"]) == {graphs[-1]}
