"""Models that are quantized inside ComfyUI: see ``online_case.py``."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.comfyui, pytest.mark.thorough]

CASE = "online_case.py"
ROUNDING = 1e-6


def test_loras_before_and_after(case):
    """Merged in float32 before, kept beside the weights after: both as they should."""
    assert case["lora then quantize"] < ROUNDING
    assert case["patches gone"]
    assert case["and another"] < ROUNDING
    assert case["quantize then lora"] < ROUNDING


def test_the_result_is_a_patcher_like_any_other(case):
    """Dtypes, devices, options and object patches are those of the original."""
    assert all(case["dtypes"])
    assert all(case["devices"])
    assert case["clone"]
    assert case["options kept"]
    assert all(case["object patches"])
    assert case["class"] == "QuantizedLinear"
    assert case["layers"] > 20
    assert case["sizes"][0] < 0.5 * case["sizes"][1]


def test_the_original_is_left_alone(case):
    """Also when it is interrupted half way."""
    assert case["original untouched"]
    assert case["interrupted"]


def test_the_original_is_not_kept_in_memory(case):
    """A quantized model holds nothing of the one it was made from."""
    assert case["original gone"]
    assert case["still works"]


def test_progress_counts_layers(case):
    """One step for each layer, up to the number of layers."""
    assert case["progress"]


def test_quantizing_again_and_saving(case):
    """The data of a quantized model is found again, and written as they are."""
    assert case["again"] == 0.0
    assert case["saved"] == 0.0
    assert case["saved weights"]


def test_choosing_no_layer_is_an_error(case):
    """It says what to change."""
    expected = "CheckpointError: include: pattern 'no.such.layer' matches no layer of"
    assert case["nothing chosen"].startswith(expected)


def test_another_branch_s_sampling_is_not_taken_over(case):
    """What a node has put into the model for another branch is not the model's own."""
    assert case["sampling"] == [True, True]


def test_a_lora_in_bypass_mode_is_refused(case):
    """Handed on, it would be lost without a word; after quantizing it takes effect."""
    if "bypass after" not in case:
        pytest.skip("this ComfyUI has no bypass mode")
    assert case["bypass"] == (
        "HijackError: QwenImage: a LoRA in bypass mode cannot be merged; load it with "
        "the Load LoRA node, or in bypass mode after Quantize Model"
    )
    assert case["bypass after"] < ROUNDING


def test_comfyui_s_own_scaled_layers_are_quantized(case):
    """Their scales go into the decoded weight, and have no place in the new model."""
    assert case["native"] < 0.01
    assert case["native works"]


@pytest.mark.parametrize("what", ["replaced", "cut"])
def test_a_file_that_changes_while_it_is_read_is_refused(case, what):
    """No model is made of two files; the error says what happened."""
    assert case[what].startswith("CheckpointError")
    assert "a.safetensors: changed while it was read" in case[what]
    assert case["kept"] < 0.01  # of one that does not change there is a model
