"""Checkpoints as hosts want them: one tensor a weight, which travels and arrives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import hijack
from hijack.hosts.checkpoint import TravellingWeight, adopt, read_weights
from hijack.quantized import QuantizedTensor


def checkpoint(tmp_path, dialect=None, scheme="blockwise_fp8", **options):
    """A file of two Linears, and its exactly dequantized state dict."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.Linear(256, 128, bias=False))
    hijack.wrap_model(model, scheme, **options)
    path = tmp_path / "model.safetensors"
    hijack.save(model, path, dialect)
    return path, hijack.unwrap(model).state_dict()


@pytest.mark.parametrize("dialect", ["hijack", "musubi", "torchao"])
def test_a_file_is_read_as_the_dense_one(tmp_path, dialect):
    """The same keys, shapes and numbers; scales and markers are gone."""
    path, dense = checkpoint(tmp_path, dialect, block_size=64)
    tensors = read_weights(path)
    assert {k: t.shape for k, t in tensors.items()} == {
        k: t.shape for k, t in dense.items()
    }
    for key, tensor in tensors.items():
        assert torch.equal(tensor + 0, dense[key])
    assert isinstance(tensors["0.weight"], TravellingWeight)


@pytest.mark.parametrize("scheme", ["blockwise_fp8", "int8", "nvfp4", "nf4"])
def test_rows_travel_by_themselves_and_together(tmp_path, scheme):
    """Cut, swapped and joined they are what the dense rows are."""
    path, dense = checkpoint(tmp_path, scheme=scheme)
    weight, plain = read_weights(path)["0.weight"], dense["0.weight"]
    first, second = weight.chunk(2)
    assert torch.equal(first + 0, plain[:128])
    swapped = torch.cat([second, first])
    assert torch.equal(swapped + 0, torch.cat([plain[128:], plain[:128]]))
    assert torch.equal(weight[64:192] + 0, plain[64:192])
    assert torch.equal(torch.cat([weight, weight], dim=1)[:, 128:], plain)
    assert torch.equal(torch.split(weight, [64, 192])[1] + 0, plain[64:])


def test_rows_that_share_no_block_stay_quantized(tmp_path):
    """With a scale a row, or rows cut between blocks."""
    path, _ = checkpoint(tmp_path, block_size=64)
    parts = read_weights(path)["0.weight"].chunk(4)
    assert all(isinstance(part, TravellingWeight) for part in parts)
    assert isinstance(torch.cat(parts[::-1]), TravellingWeight)


def test_blocks_that_are_cut_through_are_decoded(tmp_path):
    """Half of a block has no scale of its own."""
    path, dense = checkpoint(tmp_path, block_size=(64, 64))
    part = read_weights(path)["0.weight"][:32]
    assert not isinstance(part, QuantizedTensor)
    assert torch.equal(part, dense["0.weight"][:32])


def test_what_a_host_assigns_becomes_quantized(tmp_path):
    """Under other names, cast, and as Parameters that require gradients."""
    path, dense = checkpoint(tmp_path)
    with torch.device("meta"):
        model = nn.ModuleDict({"a": nn.Linear(128, 256), "b": nn.Linear(256, 128)})
    tensors = read_weights(path)
    model["a"].weight = nn.Parameter(tensors["0.weight"].to(torch.bfloat16))
    model["a"].bias = nn.Parameter(tensors["0.bias"])
    model["b"].load_state_dict(
        {"weight": tensors["1.weight"], "bias": torch.zeros(128)}, assign=True
    )
    assert adopt(model) == ("a", "b")
    assert model["a"].weight.dtype == torch.bfloat16
    assert not model["a"].weight.requires_grad
    assert type(model["b"].weight) is QuantizedTensor
    assert torch.equal(model["b"].weight.dense(), dense["1.weight"])
    assert adopt(model) == ()


def test_a_wrapped_module_takes_the_quantized_tensors_as_they_are(tmp_path):
    """Quantizing what was decoded would change them."""
    path, _ = checkpoint(tmp_path)
    tensors = read_weights(path)
    layer = hijack.wrap_module(nn.Linear(128, 256), "blockwise_fp8", block_size=32)
    for assign in (False, True):
        layer.load_state_dict(
            {"weight": tensors["0.weight"], "bias": tensors["0.bias"]}, assign=assign
        )
        expected = tensors["0.weight"].plain_tensors()
        for name, tensor in layer.weight.plain_tensors().items():
            assert torch.equal(tensor.float(), expected[name].float())
    other = hijack.wrap_module(nn.Linear(128, 256), "int8")
    with pytest.raises(RuntimeError, match="expected int8"):
        other.load_state_dict({"weight": tensors["0.weight"]}, strict=False)


def test_a_parameter_of_no_target_is_decoded(tmp_path):
    """A bank of experts and the like, under any name."""
    path, dense = checkpoint(tmp_path)

    class Bank(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.experts = nn.Parameter(weight)

    bank = Bank(read_weights(path)["0.weight"])
    assert adopt(bank) == ()
    assert type(bank.experts) is nn.Parameter
    assert torch.equal(bank.experts, dense["0.weight"])


def test_plugins_are_asked_of_weights_that_arrive(tmp_path):
    """As of every module that a file makes quantized, with the file's header."""
    path, _ = checkpoint(tmp_path)
    asked = []

    class Plugin:
        @hijack.hookimpl
        def hijack_select_scheme(self, module, prefix, header):
            asked.append(("select", prefix, header is not None))

        @hijack.hookimpl
        def hijack_create_params(self, module, scheme, prefix, state_dict):
            asked.append(("create", prefix, state_dict is not None))

        @hijack.hookimpl
        def hijack_init(self, module, scheme):
            asked.append(("init", scheme.name))

    registry = hijack.create_registry()
    registry.add_plugin(Plugin(), "asked")
    module = nn.Linear(128, 256)
    module.load_state_dict(
        {k[2:]: t for k, t in read_weights(path).items() if k[0] == "0"}, assign=True
    )
    adopt(module, registry)
    assert asked == [
        ("select", "", True),
        ("create", "", True),
        ("init", "blockwise_fp8"),
    ]


def test_a_file_that_is_ambiguous_is_refused(tmp_path):
    """As `hijack.load` refuses it."""
    path = tmp_path / "bad.safetensors"
    from safetensors.torch import save_file

    tensors = {
        "a.weight": torch.zeros(64, 64, dtype=torch.float8_e4m3fn),
        "b.weight_scale": torch.ones(64),
        "a.scale_weight_typo": torch.ones(1),
    }
    save_file(tensors, path)
    with pytest.raises(hijack.HijackError):
        read_weights(path)
