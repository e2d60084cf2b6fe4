"""What save nodes write of quantized layers: see ``saving_case.py``."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.comfyui, pytest.mark.thorough]

CASE = "saving_case.py"
SCHEMES = ("blockwise_fp8", "plugin")
WAYS = ("full", "low vram")
#: What sums of float32 in another order may differ by.
ROUNDING = 1e-6
#: Quantizing the sum of weight and LoRA costs as much as quantizing the weight did.
QUANTIZED = 0.01


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("way", WAYS)
def test_a_saved_model_is_the_file_it_came_from(case, scheme, way):
    """Keys, data and scales bit for bit; it loads again; metadata is kept."""
    assert case[scheme][way]
    assert case[scheme][f"{way} reloaded"] < ROUNDING
    assert case[scheme][f"{way} metadata"]


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_lora_is_saved_with_scales_of_its_own(case, scheme):
    """Data and scales fit each other, whatever part of the model was loaded."""
    found = case[scheme]
    assert found["lora effect"] > 2 * QUANTIZED
    assert found["lora full"] < QUANTIZED
    assert found["lora low vram"] < QUANTIZED
    assert found["lora same file"]
    assert found["weights untouched"]


def test_saving_tells_how_far_it_is_and_can_be_cancelled(case):
    """Progress counts every layer, then every tensor; cancelled, no file appears."""
    assert case["told"]
    assert case["cancelled"] == [[], []]
