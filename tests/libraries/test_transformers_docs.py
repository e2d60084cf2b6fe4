"""The examples of docs/transformers.md, run from top to bottom."""

import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch

import hijack
from hijack.modules import Wrapped
from tests.libraries import transformers_models as models

DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "transformers.md"


def test_the_examples_run(tmp_path, monkeypatch):
    """With small models in the folders that they name."""
    monkeypatch.chdir(tmp_path)
    models.build("t5", dtype=torch.bfloat16).save_pretrained("t5")
    for name, folder, dialect in (
        ("llama", "llama-fp8", "musubi"),
        ("qwen3", "qwen3-fp8", "deepseek"),
    ):
        models.build(name).save_pretrained(folder)
        file = Path(folder) / "model.safetensors"
        dense = file.rename(tmp_path / f"{name}.safetensors")
        with_config = {"write_config": True} if dialect == "deepseek" else {}
        hijack.quantize_file(
            dense, file, "blockwise_fp8", dialect=dialect, block_size=64, **with_config
        )
    scope, loaded = {"__name__": "document"}, []
    for block in re.findall(
        r"^```python\n(.*?)^```", DOCUMENT.read_text(), re.M | re.S
    ):
        exec(compile(block, DOCUMENT.name, "exec"), scope)
        loaded += [scope[name] for name in ("model", "encoder") if name in scope]
    assert len({id(model) for model in loaded}) == 3
    for model in loaded:
        assert any(isinstance(part, Wrapped) for part in model.modules())
    found = models.output(scope["again"])
    assert torch.equal(found, models.output(scope["encoder"]))
    first = "encoder.block.0.layer.0.SelfAttention.q"
    assert not isinstance(scope["encoder"].get_submodule(first), Wrapped)
