"""The examples of docs/diffusers.md, run from top to bottom."""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file

import hijack
from tests.libraries.diffusers_models import (
    build,
    folder_of,
    patched,  # noqa: F401
    quantized_layers,
)

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "diffusers.md"
NAME = "QwenImageTransformer2DModel"


def test_the_examples_run(tmp_path, monkeypatch):
    """With a small model in the folders that they name."""
    monkeypatch.chdir(tmp_path)
    model = build(NAME)
    folder_of(model, "qwen-image", model.state_dict())
    names = [n for n, m in model.named_modules() if n.endswith("attn.to_q")]
    lora = {f"transformer.{n}.lora_A.weight": torch.randn(2, 64) for n in names}
    lora |= {f"transformer.{n}.lora_B.weight": torch.randn(64, 2) for n in names}
    Path("loras").mkdir()
    save_file(lora, "loras/style.safetensors")
    hijack.wrap_model(model, "blockwise_fp8")
    path = folder_of(model, "qwen-image-fp8") / "diffusion_pytorch_model.safetensors"
    hijack.save(model, path, "musubi")
    hijack.save(model, "qwen-image-fp8.safetensors", "musubi")
    scope, models = {"__name__": "document"}, []
    text = DOCUMENT.read_text()
    for block in re.findall(r"^```python\n(.*?)^```", text, re.M | re.S):
        exec(compile(block, DOCUMENT.name, "exec"), scope)
        models.append(scope["transformer"])
    assert len({id(model) for model in models}) == 3
    assert all(map(quantized_layers, models))
    assert quantized_layers(scope["again"]) == quantized_layers(models[-1])
