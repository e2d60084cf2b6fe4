"""The examples of docs/training.md, with the libraries that they use."""

import re
from pathlib import Path

import torch

import hijack
from hijack.quantized import QuantizedTensor

PAGE = Path(__file__).resolve().parents[2] / "docs/training.md"


def test_the_examples_run(tmp_path, monkeypatch):
    """Top to bottom, in one scope; those without libraries run in the other tests."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    blocks = re.findall(r"^```py(?:thon)?\n(.*?)^```", PAGE.read_text(), re.M | re.S)
    scope = {"__name__": "document"}
    for block in blocks:
        if "from peft" in block:  # without the LoRAs of the blocks before
            model = scope["nn"].Sequential(*(scope["Block"]() for _ in range(4)))
            scope["model"] = model.bfloat16()
            hijack.load(scope["model"], "base.safetensors")
        exec(compile(block, "training.md", "exec"), scope)
    assert isinstance(scope["merged"][1].up.weight, QuantizedTensor)
    assert isinstance(scope["model"][1].up.weight, QuantizedTensor)
