"""Quantized models of transformers where the host asks their layers for something."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch

import hijack
from hijack.errors import ReadOnlyError
from hijack.hosts import transformers as adapter
from hijack.modules import Wrapped, quantized_weight
from hijack.testing import HostConformance
from tests.libraries import transformers_models as models

BF16 = torch.bfloat16


def assert_equal_products(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Compare results of kernels that round in another order than the decoded model."""
    assert found.dtype == expected.dtype
    error = (found - expected).float().norm() / expected.float().norm()
    assert error < {torch.float32: 1e-5, BF16: 0.05}[found.dtype]


@pytest.mark.parametrize(
    ("name", "scheme", "dtype"),
    [
        *((name, "blockwise_fp8", BF16) for name in models.MODELS),
        *((name, "blockwise_fp8", torch.float32) for name in ("umt5", "qwen2.5-vl")),
        *((name, "int8", BF16) for name in ("t5", "clip", "qwen2.5-vl")),
        *((name, "nf4", BF16) for name in ("umt5", "llama", "qwen2.5-vl")),
        *((name, "mxfp4", torch.float32) for name in ("t5", "llama", "clip")),
    ],
)
def test_all_layers_quantized(name: str, scheme: str, dtype: torch.dtype) -> None:
    """With every layer quantized that a scheme can, a model computes as decoded."""
    model = models.build(name, dtype)
    report = hijack.wrap_model(model, scheme)
    assert len(report.layers) > 8
    expected = models.dense_copy(model)
    inputs: Any = None
    if name == "qwen2.5-vl":
        inputs = {
            key: value.to(dtype) if value.is_floating_point() else value
            for key, value in models.image_inputs().items()
        }
        # NF4 and its like are for matrices
        convolved = "model.visual.patch_embed.proj" in report.layers
        assert convolved == (scheme in ("blockwise_fp8", "int8"))
    assert model.dtype == dtype
    assert_equal_products(models.output(model, inputs), models.output(expected, inputs))


@pytest.fixture
def quantized() -> Any:
    model = models.build("llama")
    hijack.wrap_model(
        model, "blockwise_fp8", exclude=["lm_head", "*embed*"], block_size=32
    )
    return model


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"cache_implementation": "static"},
        {"num_beams": 3},
        {"use_cache": False},
        {"do_sample": True},
    ],
    ids=["dynamic", "static", "beams", "no cache", "sampling"],
)
def test_generate(arguments: dict[str, Any], quantized: Any) -> None:
    """A quantized model generates what the decoded one does, with every cache."""
    found = []
    for model in (quantized, models.dense_copy(quantized)):
        torch.manual_seed(7)
        settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
        ids = models.tokens()
        mask = torch.ones_like(ids)
        settings |= arguments
        found.append(model.generate(ids, attention_mask=mask, **settings))
    assert torch.equal(*found)


def test_what_the_host_counts(quantized: Any) -> None:
    """Parameters are counted as dense ones, memory as what is there."""
    dense = models.dense_copy(quantized)
    assert quantized.num_parameters() == dense.num_parameters()
    assert quantized.dtype == dense.dtype
    held = sum(tensor.nbytes for tensor in quantized.state_dict().values())
    held += sum(buffer.nbytes for buffer in quantized.buffers())
    assert quantized.get_memory_footprint() == held
    assert held < dense.get_memory_footprint()
    assert dense.get_memory_footprint() == sum(
        tensor.nbytes for tensor in (*dense.parameters(), *dense.buffers())
    )


def test_casts_of_a_model(quantized: Any) -> None:
    """A cast casts what a dense model casts: tables of positions too, but no codes."""
    control = models.dense_copy(quantized)
    for dtype in (torch.float32, BF16):
        quantized, control = quantized.to(dtype), control.to(dtype)
        tables = quantized.model.rotary_emb, control.model.rotary_emb
        assert tables[0].inv_freq.dtype == tables[1].inv_freq.dtype == dtype
        assert torch.equal(tables[0].inv_freq, tables[1].inv_freq)
        expected = models.dense_copy(quantized)
        assert torch.equal(models.output(quantized), models.output(expected))
        layer = quantized.model.layers[0].mlp.up_proj
        assert layer.weight.qdata.dtype == torch.float8_e4m3fn


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("size", [90, 100])
def test_resized_embeddings(size: int, quantized: Any) -> None:
    """A dense embedding is resized; one that is quantized refuses, and stays."""
    other = copy.deepcopy(quantized)
    quantized.resize_token_embeddings(size, mean_resizing=False)
    assert quantized.model.embed_tokens.weight.shape[0] == size
    assert models.output(quantized).shape[-1] == size
    hijack.wrap_module(other.model.embed_tokens, "int8")
    before = models.output(other)
    with pytest.raises(ReadOnlyError, match=r"hijack\.unwrap first"):
        other.resize_token_embeddings(size, mean_resizing=False)
    assert torch.equal(models.output(other), before)


@pytest.mark.parametrize("dim", [0, 1])
def test_prune_linear_layer(dim: int, quantized: Any) -> None:
    """Rows or columns that are kept of a quantized layer are those of the decoded."""
    from transformers.pytorch_utils import prune_linear_layer

    layer = quantized.model.layers[0].mlp.up_proj
    expected = models.dense_copy(quantized).model.layers[0].mlp.up_proj
    kept = torch.tensor([0, 3, 17])
    found = prune_linear_layer(layer, kept, dim)
    assert not isinstance(found, Wrapped)
    assert torch.equal(found.weight, prune_linear_layer(expected, kept, dim).weight)


def test_models_built_on_meta(quantized: Any, tmp_path: Path) -> None:
    """from_pretrained computes tables that no file has, though it builds on meta."""
    quantized.save_pretrained(tmp_path / "q")
    found = type(quantized).from_pretrained(tmp_path / "q", dtype=BF16)
    tensors = (*found.parameters(), *found.buffers())
    assert not any(tensor.is_meta for tensor in tensors)
    own = models.build("llama").model.rotary_emb.inv_freq
    assert torch.equal(found.model.rotary_emb.inv_freq, own)


# -- the adapter -----------------------------------------------------------------------


def test_patches_are_reversible() -> None:
    """Patched, unpatched and patched again, the host has what it had before."""
    auto = sys.modules["transformers.quantizers.auto"]
    host = sys.modules[adapter.MODULE]
    owners = [host, host.PreTrainedModel]
    tables = [auto.AUTO_QUANTIZER_MAPPING, auto.AUTO_QUANTIZATION_CONFIG_MAPPING]
    assert all("hijack" in table for table in tables)
    patched = [dict(vars(owner)) for owner in owners]
    hijack.hosts.unpatch("transformers", force=True)
    try:
        assert not any("hijack" in table for table in tables)
        changed = {
            name
            for owner, before in zip(owners, patched, strict=True)
            for name, value in vars(owner).items()
            if before[name] is not value
        }
        assert {"get_hf_quantizer", "save_pretrained"} <= changed
        for owner in owners:
            for name in changed & vars(owner).keys():
                found = vars(owner)[name]
                code = getattr(found, "__func__", found)
                assert code.__code__.co_filename.startswith(sys.prefix), name
    finally:
        status = hijack.hosts.patch("transformers")
    assert status.patched
    assert not status.foreign


def test_models_that_are_alive_are_counted(quantized: Any, tmp_path: Path) -> None:
    """The host knows how many quantized layers it has loaded."""
    quantized.save_pretrained(tmp_path / "q")
    before = adapter.live()
    found = type(quantized).from_pretrained(tmp_path / "q")
    assert adapter.live() == before + 14
    assert sum(quantized_weight(part) is not None for part in found.modules()) == 14


class TestTransformers(HostConformance):
    """The adapter leaves the host as it found it, in every order."""

    adapter = "hijack.hosts.transformers"
    use = """
import torch
from transformers import LlamaConfig, LlamaForCausalLM
torch.manual_seed(0)
config = LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=32,
    num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2)
model = LlamaForCausalLM(config)
import tempfile
with tempfile.TemporaryDirectory() as folder:
    model.save_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        result = model(torch.arange(8)[None]).logits
"""


_ORDER = """
import sys
for statement in sys.argv[2].split(";"):
    exec(statement)
import hijack.hosts
if "modeling_utils" not in sys.argv[2]:
    assert "transformers.modeling_utils" not in sys.modules
    assert not hijack.hosts.status()["transformers"].patched
from transformers import LlamaForCausalLM
from hijack.modules import Wrapped
assert hijack.hosts.status()["transformers"].patched
model = LlamaForCausalLM.from_pretrained(sys.argv[1])
assert sum(isinstance(part, Wrapped) for part in model.modules()) == 14
"""


@pytest.mark.parametrize(
    "statements",
    [
        "import hijack;import transformers",
        "import transformers;import hijack",
        "import transformers.modeling_utils;import hijack",
        "import transformers.configuration_utils;import hijack",
    ],
)
def test_orders_of_import(statements: str, quantized: Any, tmp_path: Path) -> None:
    """hijack may be imported before the host, after it, or when half of it is there."""
    quantized.save_pretrained(tmp_path / "q")
    root = Path(hijack.__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", _ORDER, str(tmp_path / "q"), statements],
        env={**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
