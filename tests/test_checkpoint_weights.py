"""Checkpoints as hosts want them: one tensor a weight, which travels and arrives."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

import hijack
from hijack.hosts.checkpoint import (
    TravellingWeight,
    adopt,
    cropped,
    read_quantized,
    read_weights,
)
from hijack.quantized import QuantizedTensor
from hijack.wrap import wrap_layer


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


SPLIT = [("blockwise_fp8", "tensor"), ("nvfp4", None), ("nf4", None), ("w4a8", None)]


@pytest.mark.parametrize(("scheme", "block_size"), SPLIT)
def test_rows_share_what_is_the_whole_weights(tmp_path, scheme, block_size):
    """One scale, a codebook or a group size goes with any rows, as it is."""
    torch.manual_seed(0)
    options = {} if block_size is None else {"block_size": block_size}
    layers = {name: nn.Linear(256, 192, bias=False) for name in "ab"}
    model = nn.ModuleDict(layers)
    hijack.wrap_model(model, scheme, **options)
    hijack.save(model, tmp_path / "a.safetensors")
    tensors = read_weights(tmp_path / "a.safetensors")
    dense = {key: weight.dense() for key, weight in tensors.items()}
    first, second = tensors["a.weight"], tensors["b.weight"]
    parts = first.chunk(3)
    assert all(isinstance(part, TravellingWeight) for part in parts)
    for part, expected in zip(parts, dense["a.weight"].chunk(3), strict=True):
        assert torch.equal(part + 0, expected)
    swapped = torch.cat(parts[::-1])
    assert isinstance(swapped, TravellingWeight)
    assert torch.equal(swapped + 0, torch.cat(dense["a.weight"].chunk(3)[::-1]))
    both = torch.cat([first, second])  # which have scales of their own
    assert torch.equal(both + 0, torch.cat([*dense.values()]))


def test_a_part_that_was_decoded_is_the_hosts(tmp_path):
    """It may be written to, and is a plain Parameter in a module."""
    path, _ = checkpoint(tmp_path)
    part = read_weights(path)["0.weight"].T[:, :3]
    assert type(part) is torch.Tensor
    part.add_(1)
    assert type(nn.Parameter(part)) is nn.Parameter


def test_what_is_not_quantized_is_left_to_the_host(tmp_path):
    """A dense file, and plain casts to FP8, which hosts cast themselves."""
    path, dense = checkpoint(tmp_path)
    assert read_quantized(path).keys() == dense.keys()
    assert read_quantized(dense) is None
    hijack.save(nn.Linear(4, 4), tmp_path / "dense.safetensors")
    assert read_quantized(tmp_path / "dense.safetensors") is None
    casts = {key: t.to(torch.float8_e4m3fn) for key, t in dense.items()}
    assert read_quantized(casts) is None


def test_padded_weights_take_the_shape_of_the_model(tmp_path):
    """MXFP4 stores 32 columns of 16, and hijack's marker does not say so."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"a": nn.Linear(16, 64)})
    hijack.wrap_model(model, "mxfp4")
    hijack.save(model, tmp_path / "a.safetensors")
    tensors = read_weights(tmp_path / "a.safetensors")
    assert tensors["a.weight"].shape == (64, 32)
    fitting = cropped(tensors, hijack.unwrap(model))
    assert torch.equal(fitting["a.weight"] + 0, model["a"].weight)
    other = nn.ModuleDict({"a": nn.Linear(20, 64)})
    assert cropped(tensors, other)["a.weight"] is tensors["a.weight"]


def test_metadata_may_be_in_the_config_beside_a_file(tmp_path):
    """Where a library wrote the file, which has a header of its own."""
    from safetensors.torch import save_file

    from hijack.saving import contents

    model = nn.ModuleDict({"a": nn.Linear(256, 192)})
    hijack.wrap_model(model, "w4a8")
    tensors, metadata = contents(model, "hijack")
    save_file(tensors, tmp_path / "a.safetensors", {"format": "pt"})
    config = {"quant_method": "other", "metadata": metadata}
    for method in ("other", "hijack"):
        config["quant_method"] = method
        text = json.dumps({"quantization_config": config})
        (tmp_path / "config.json").write_text(text)
        found = hijack.identify(tmp_path / "a.safetensors").layers
        marked = found and found["a"].certainty is hijack.Certainty.MARKED
        assert bool(marked) == (method == "hijack")


def test_a_layer_that_is_wrapped_by_its_name_is_named():
    """In errors, and to plugins."""
    with pytest.raises(hijack.HijackError, match=r"^blocks\.0\.a: "):
        wrap_layer(nn.ReLU(), "blocks.0.a", "int8")


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


def test_a_weight_is_not_rounded_to_bare_fp8(tmp_path):
    """A host's dtype is the one to compute in."""
    path, _ = checkpoint(tmp_path)
    with pytest.raises(hijack.HijackError, match="expected the dtype to compute in"):
        read_weights(path)["0.weight"].to(torch.float8_e4m3fn)


def test_a_copy_into_a_dense_tensor_is_told(tmp_path, caplog):
    """The host then has no quantized weight, and its adapter may not know."""
    path, dense = checkpoint(tmp_path)
    target = torch.empty(256, 128)
    with caplog.at_level("INFO"):
        target.copy_(read_weights(path)["0.weight"])
    assert torch.equal(target, dense["0.weight"])
    assert "0 of shape (256, 128) is decoded by copy_" in caplog.text
