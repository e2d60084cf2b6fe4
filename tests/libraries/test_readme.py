"""The examples of the README for libraries, run from top to bottom."""

from __future__ import annotations

import re
from pathlib import Path

import diffusers
import torch
import transformers

import hijack

README = Path(__file__).resolve().parents[2] / "README.md"


def make_files(folder):
    """What the examples read: a single file, its config, and a checkpoint in FP8."""
    torch.manual_seed(0)
    transformer = diffusers.QwenImageTransformer2DModel(
        in_channels=64,
        num_layers=1,
        attention_head_dim=128,
        num_attention_heads=1,
        joint_attention_dim=64,
    )
    transformer.save_config(folder / "qwen-image")
    names = [
        n for n, m in transformer.named_modules() if isinstance(m, torch.nn.Linear)
    ]
    inside = [name for name in names if name.startswith("transformer_blocks")]
    hijack.wrap_model(transformer, "blockwise_fp8", include=inside, block_size=64)
    hijack.save(transformer, folder / "qwen-image-fp8.safetensors", "musubi")
    config = transformers.Qwen3Config(
        vocab_size=64,
        hidden_size=128,
        intermediate_size=128,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=64,
    )
    model = transformers.Qwen3ForCausalLM(config)
    model.save_pretrained(folder / "qwen3")
    hijack.wrap_model(model, "blockwise_fp8", include=["*_proj"], block_size=(128, 128))
    (folder / "qwen3-fp8").mkdir()
    hijack.save(model, folder / "qwen3-fp8" / "model.safetensors", "deepseek")
    config.quantization_config = {
        "quant_method": "fp8",
        "weight_block_size": [128, 128],
        "modules_to_not_convert": ["lm_head"],
    }
    config.save_pretrained(folder / "qwen3-fp8")


def test_the_examples_run(tmp_path, monkeypatch):
    """And what they make is quantized."""
    monkeypatch.chdir(tmp_path)
    make_files(tmp_path)
    text = README.read_text("utf-8")
    blocks = re.findall(r"^```py\n(.*?)^```", text, re.M | re.S)
    assert len(blocks) == 3
    scope = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), scope)
    again = type(scope["transformer"]).from_pretrained("qwen-image-fp8")
    for model in (scope["transformer"], again, scope["model"]):
        weights = [
            parameter
            for parameter in model.parameters()
            if isinstance(parameter, hijack.QuantizedTensor)
        ]
        assert len(weights) > 6
