"""LoRAs on quantized layers, in each real ComfyUI there is: see ``lora_case.py``."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.comfyui, pytest.mark.thorough]

CASE = "lora_case.py"
#: Rounding of two ways to compute the same in float32.
ROUNDING = 1e-6
KINDS = ("plain", "alpha", "dora", "loha", "lokr", "diff", "bias", "oft")
SUMS = ("two", "dora last", "dora first", "none", "slice of rows", "slice of columns")


def test_every_kind_of_adapter_keeps_its_effect(case):
    """Full load and low VRAM: the exact sum, not one that was quantized again."""
    for kind in KINDS:
        assert case[kind]["effect"] > 1000 * ROUNDING, kind
        assert case[kind]["error"] < ROUNDING, kind
        assert case[kind]["low vram"] < ROUNDING, kind


def test_loras_add_up(case):
    """Several, negative ones, mixed kinds, slices of a fused weight, strength 0."""
    assert {name: case[name] for name in SUMS if case[name] > ROUNDING} == {}


def test_fifty_rounds_leave_no_trace(case):
    """On and off, through clones: outputs repeat, data and scales stay the same."""
    assert case["rounds"]
    assert case["weights restored"]
    assert case["twin untouched"]


def test_lora_hooks_come_and_go(case):
    """Hooks, which ComfyUI writes into parameters, work and are taken out again."""
    assert case["hooks effect"] > 1000 * ROUNDING
    assert case["hooks"] < ROUNDING
    assert case["hooks cached"] < ROUNDING
    assert case["hooks removed"]
    assert case["hooks restored"]


def test_a_model_as_lora_works_in_every_step(case):
    """The original weight it is compared with is still there in the second one."""
    assert case["model as lora effect"] > 1000 * ROUNDING
    assert max(case["model as lora"]) < ROUNDING


def test_extracted_loras_are_of_decoded_weights(case):
    """What ComfyUI computes with is decoded, loaded or not; but for half precision."""
    assert case["given to compute with"] < ROUNDING
    assert max(case["extracted"].values()) < 1e-3


def test_models_merge(case):
    """ModelMergeSimple takes quantized models on both sides."""
    assert case["merged with dense"] < ROUNDING
    assert case["merged with quantized"] < ROUNDING


def test_merging_on_demand(case):
    """HIJACK_LORA=merge and marked patches quantize the sum, and it comes off again."""
    for name, error in case["merging"].items():
        assert 100 * ROUNDING < error < 0.02, name
    assert case["merged weights differ"]
    assert case["merging is repeatable"]
    assert case["merging removed"]
    assert case["merging restored"]
