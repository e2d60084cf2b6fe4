"""Quantized data renamed, joined and reordered by the row, without a ComfyUI."""

from __future__ import annotations

import pytest
import torch

from hijack import HijackError
from hijack.hosts.comfyui.fused_rows import convert_rows
from hijack.quantized import QuantizationConfig, QuantizedTensor
from schemes.blockwise_fp8 import BlockwiseFP8

SCHEME = BlockwiseFP8()


def quantized_sd(rows, block_size, seed=0):
    """A random weight of that many rows and 128 columns."""
    weight = torch.randn(rows, 128, generator=torch.Generator().manual_seed(seed))
    qdata, params = SCHEME.quantize(weight, block_size=block_size)
    return QuantizedTensor(qdata, params, QuantizationConfig.of(SCHEME, {}, "hijack"))


def join(tensors):
    """Write tensors into one as ComfyUI does, and take them away."""
    parts = [tensors.pop(key) for key in ("q", "k", "v")]
    whole = torch.empty_like(parts[0])
    for index, part in enumerate(parts):
        start = sum(len(p) for p in parts[:index])
        grown = torch.empty([start + len(part), *part.shape[1:]], dtype=part.dtype)
        grown[:start] = whole[:start]
        grown.narrow(0, start, len(part))[:] = part
        whole = grown
    return {"qkv": whole, "other": tensors.pop("other")}


def swap(tensors):
    """Swap halves in place."""
    tensor = tensors.pop("weight")
    tensor[:] = torch.cat(tensor.chunk(2)[::-1])
    return {"swapped": tensor}


@pytest.mark.parametrize("block_size", [(1, 64), (1, 128), (8, 32)])
def test_parts_are_joined_as_codes(block_size):
    """What ComfyUI does to plain tensors is done to quantized ones, which stay so."""
    given = {
        name: quantized_sd(16, block_size, seed) for seed, name in enumerate("qkv")
    }
    given |= {"other": torch.ones(3), "left": torch.zeros(2)}
    expected = torch.cat([given[name].dense(torch.float32) for name in "qkv"])
    other = given["other"]
    made = convert_rows(given, join)
    assert isinstance(made["qkv"], QuantizedTensor)
    assert torch.equal(made["qkv"].dense(torch.float32), expected)
    assert made["other"] is other
    assert set(given) == {"left"}


def test_what_the_dialect_cannot_spell_is_spelled_otherwise():
    """musubi-tuner's files have one scale or one a row, not one for each of three."""
    given = {}
    for seed, name in enumerate("qkv"):
        weight = quantized_sd(16, (16, 128), seed)
        coding = QuantizationConfig.of(SCHEME, {}, "musubi")
        given[name] = QuantizedTensor(weight.qdata, weight.params, coding)
    given["other"] = torch.ones(3)
    expected = torch.cat([given[name].dense(torch.float32) for name in "qkv"])
    made = convert_rows(given, join)["qkv"]
    assert isinstance(made, QuantizedTensor)
    assert made.config.dialect == "hijack"
    assert torch.equal(made.dense(torch.float32), expected)


def test_rows_are_put_in_another_order():
    """Halves that ComfyUI swaps are swapped in data and scales."""
    weight = quantized_sd(16, (1, 64))
    top, bottom = weight.dense(torch.float32).chunk(2)
    made = convert_rows({"weight": weight}, swap)["swapped"]
    assert isinstance(made, QuantizedTensor)
    assert torch.equal(made.dense(torch.float32), torch.cat([bottom, top]))


@pytest.mark.parametrize("odd", ["dense", "other blocks", "other rows"])
def test_what_cannot_be_joined_is_decoded(odd):
    """Parts of different kinds become a dense weight that is exact."""
    given = {name: quantized_sd(16, (8, 64), seed) for seed, name in enumerate("qk")}
    given["v"] = {
        "dense": torch.ones(16, 128, dtype=torch.bfloat16),
        "other blocks": quantized_sd(16, (1, 64)),
        "other rows": quantized_sd(12, (8, 64)),
    }[odd]
    given["other"] = torch.ones(())
    expected = torch.cat([given[name].to(torch.float32) for name in "qkv"])
    made = convert_rows(given, join)["qkv"]
    assert type(made) is torch.Tensor
    assert torch.equal(made, expected)


def test_codes_of_a_shape_that_misleads_are_decoded():
    """Joining is tried on values: shapes do not say what a tensor is for."""

    class Shuffled(BlockwiseFP8):
        name = "shuffled"

        def quantize(self, weight, **options):
            qdata, params = super().quantize(weight, **options)
            return qdata, {name: t.flip(0) for name, t in params.items()}

        def dequantize(self, qdata, params, dtype):
            turned = {name: t.flip(0) for name, t in params.items()}
            return super().dequantize(qdata, turned, dtype)

    scheme = Shuffled()
    given = {}
    for name in "qkv":
        qdata, params = scheme.quantize(torch.randn(16, 128), block_size=(1, 64))
        given[name] = QuantizedTensor(
            qdata, params, QuantizationConfig.of(scheme, {}, "hijack")
        )
    given["other"] = torch.ones(3)
    expected = torch.cat([given[name].dense(torch.float32) for name in "qkv"])
    made = convert_rows(given, join)["qkv"]
    assert type(made) is torch.Tensor
    assert torch.equal(made, expected)


def test_names_nobody_converts_leave_the_state_dict_alone():
    """None stays None, and nothing is taken."""
    given = {"q": quantized_sd(16, (1, 64))}
    assert convert_rows(given, lambda tensors: None) is None
    assert set(given) == {"q"}


@pytest.mark.parametrize("where", ["inside", "outside"])
def test_views_of_codes_in_inference_mode(where):
    """As of any tensor there, wherever the data was made; ComfyUI runs nodes so."""
    with torch.inference_mode(where == "inside"):
        tensor = quantized_sd(16, (1, 64))
    with torch.inference_mode():
        dense = tensor.dense(torch.float32)
        for weight in (tensor, tensor.replace(dtype=torch.float32)):
            assert torch.equal(weight[2], dense[2])
            assert torch.equal(weight.view(-1), dense.view(-1))
            assert torch.equal(weight.chunk(2)[1], dense.chunk(2)[1])
            assert torch.equal(torch.eye(128) @ weight.t(), dense.t())
            summed = torch.ones(4, 128).add_(weight[:4])
            assert torch.equal(summed, 1 + dense[:4])


def test_codes_are_not_written_into():
    """A write would go to a decoded copy and be lost; it is refused instead."""
    with pytest.raises(HijackError, match="cannot write into a quantized weight"):
        quantized_sd(16, (1, 64))[:4] = 0.0
