"""The memory that quantizing on load takes: see ``memory_case.py``."""

from __future__ import annotations

import sys

import pytest

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.thorough,
    pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's own figures"),
]

CASE = "memory_case.py"


def test_the_dense_model_is_never_in_memory(case):
    """The peak is the quantized model and one and a half of the largest layer."""
    allowed = case["quantized"] + 1.5 * case["largest"]
    assert allowed < 0.8 * case["dense"], "the model is too small to tell"
    assert case["peak"] < allowed, case
