"""Weights on the CPU, input on a device: see ``offload_case.py``."""

from __future__ import annotations

import itertools

import pytest

pytestmark = [pytest.mark.comfyui, pytest.mark.thorough]

CASE = "offload_case.py"
ROUNDING = 1e-6


def test_any_part_of_the_weights_may_be_on_the_device(case):
    """All, half or none loaded, with LoRAs: the output is that of the exact model."""
    assert case["device"] == "pretended:0"
    for what, part in itertools.product(
        ("plain", "small", "large"), ("all", "half", "none")
    ):
        assert case[f"{what} {part}"] < ROUNDING, (what, part)


def test_loaded_memory_is_what_comfyui_asked_for(case):
    """Nothing of a model without memory is loaded, all of one without limit."""
    loaded = list(case["loaded"].values())
    assert loaded[0] > loaded[1] > loaded[2] == 0


def test_unloading_a_part_keeps_the_output(case):
    """Layers that are taken off the device go on, with and without LoRA."""
    assert case["freed"]
    assert case["partially unloaded"] < ROUNDING
    assert case["lora partially unloaded"] < ROUNDING


def test_another_model_s_weights_do_not_stay_on_the_device(case):
    """Merged, a model is right, and takes the memory ComfyUI has planned for it."""
    assert max(case["merged"].values()) < ROUNDING
    assert case["beyond plan"] == {"all": 0, "none": 0}


def test_sizes_count_the_scales(case):
    """ComfyUI plans with every byte of quantized data and scales."""
    assert case["sizes"][0] == case["sizes"][1]
    assert case["scales counted"]


def test_nothing_is_left_on_the_device(case):
    """Unloaded, a model has no parameter, buffer or LoRA there."""
    assert case["left"] == []
