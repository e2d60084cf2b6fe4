"""`StackedWeight`: quantized weights of experts in one parameter."""

from __future__ import annotations

import copy
import io
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hijack
from hijack.errors import CheckpointError, ReadOnlyError
from hijack.hosts import checkpoint
from hijack.hosts.checkpoint import TravellingStack, TravellingWeight, adopt
from hijack.quantized import QuantizedTensor
from hijack.stacked import StackedWeight

SCHEMES = ("blockwise_fp8", "int8", "nf4", "mxfp4", "nvfp4")


def quantized(scheme: str, rows: int = 64, seed: int = 0) -> QuantizedTensor:
    generator = torch.Generator().manual_seed(seed)
    layer = nn.Linear(64, rows, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(rows, 64, generator=generator))
    weight = hijack.wrap_module(layer, scheme).weight
    assert isinstance(weight, QuantizedTensor)
    return weight


def stack_of(scheme: str, count: int = 3) -> tuple[StackedWeight, Tensor]:
    """A stack, and what it stands for."""
    weights = [quantized(scheme, seed=seed) for seed in range(count)]
    stack = StackedWeight.of(weights)
    assert stack is not None
    return stack, torch.stack([weight.dense() for weight in weights])


class Experts(nn.Module):
    """Experts as hosts have them."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.bank = weight if isinstance(weight, nn.Parameter) else None
        if self.bank is None:
            self.bank = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        chosen = torch.arange(self.bank.shape[0])
        return sum(F.linear(x, self.bank[index]) for index in chosen)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_one_of_it_stays_quantized(scheme: str) -> None:
    """What is taken out is a quantized weight; the whole decodes to all of them."""
    stack, dense = stack_of(scheme)
    assert stack.shape == dense.shape
    assert stack.dtype == dense.dtype
    for index in (1, -1, torch.tensor(2)):
        part = stack[index]
        assert isinstance(part, QuantizedTensor)
        assert torch.equal(part.dense(), dense[index])
    assert torch.equal(stack.value(), dense)
    assert torch.equal(stack[torch.tensor([2, 0])], dense[[2, 0]])
    assert torch.equal(stack.transpose(1, 2) + 1, dense.transpose(1, 2) + 1)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_module_computes_with_it(scheme: str) -> None:
    """Moved, cast, copied and pickled, a module computes as with the dense weights."""
    stack, dense = stack_of(scheme)
    module, expected = Experts(stack.as_parameter()), Experts(dense)
    x = torch.randn(2, 64)
    assert torch.equal(module(x), expected(x))
    for copied in (copy.deepcopy(module), _pickled(module), module.to("cpu")):
        assert isinstance(copied.bank, StackedWeight)
        assert isinstance(copied.bank, nn.Parameter)
        assert torch.equal(copied(x), expected(x))
    cast = copy.deepcopy(module).to(torch.bfloat16)
    assert cast.bank.dtype == torch.bfloat16
    assert cast.bank.qdata.dtype == stack.qdata.dtype
    bf16 = torch.stack([part.dense(torch.bfloat16) for part in stack.parts()])
    assert torch.equal(cast.bank.value(), bf16)
    assert torch.equal(hijack.unwrap(module).bank, dense)
    assert type(module.bank) is nn.Parameter


def _pickled(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    found: nn.Module = torch.load(file, weights_only=False)
    return found


def test_what_it_refuses(tmp_path: Path) -> None:
    """It is not written to, not trained, and no file stores it."""
    module = Experts(stack_of("blockwise_fp8")[0].as_parameter())
    with pytest.raises(ReadOnlyError, match="cannot write"):
        module.bank.add_(1)
    with pytest.raises(ReadOnlyError, match="cannot train"):
        module.bank.requires_grad_(True)
    with pytest.raises(CheckpointError, match="stacked"):
        hijack.save(module, tmp_path / "file.safetensors")


def test_different_weights_are_no_stack() -> None:
    """Weights of other shapes, schemes or dtypes, or dense ones, are not stacked."""
    first = quantized("int8")
    for other in (
        quantized("int8", rows=32),
        quantized("blockwise_fp8"),
        first.to(torch.bfloat16),
        first.dense(),
    ):
        assert StackedWeight.of([first, other]) is None


@pytest.mark.parametrize("scheme", ["blockwise_fp8", "int8", "mxfp4"])
def test_on_their_way_to_a_module(scheme: str) -> None:
    """Stacked, joined by rows and taken apart again, they stay what they were."""
    gates = [quantized(scheme, seed=seed) for seed in range(3)]
    ups = [quantized(scheme, seed=seed + 3) for seed in range(3)]
    stacks = [
        torch.stack([TravellingWeight.of(weight) for weight in weights])
        for weights in (gates, ups)
    ]
    bank = torch.cat(stacks, dim=1)
    assert isinstance(bank, TravellingStack)
    dense = [
        torch.cat([gate.dense(), up.dense()])
        for gate, up in zip(gates, ups, strict=True)
    ]
    assert torch.equal(bank.value(), torch.stack(dense))
    module = Experts(nn.Parameter(bank, requires_grad=True))
    adopt(module)
    assert type(module.bank) is StackedWeight
    assert torch.equal(module.bank.value(), torch.stack(dense))
    for whole, weights in zip(torch.chunk(bank, 2, dim=1), (gates, ups), strict=True):
        for part, weight in zip(torch.chunk(whole, 3, dim=0), weights, strict=True):
            single = part.squeeze(0)
            assert isinstance(single, TravellingWeight)
            assert torch.equal(single.qdata, weight.qdata)
            assert torch.equal(single.dense(), weight.dense())


def test_what_is_decoded_on_the_way_is_told(caplog: pytest.LogCaptureFixture) -> None:
    """A host's operation that decodes weights is named in the log; moves are not."""
    weight = TravellingWeight.of(quantized("int8"))
    weight.found = None
    with caplog.at_level("INFO", checkpoint.__name__):
        stack = torch.stack([weight.to(torch.bfloat16).contiguous(), weight[...]])
        assert "is decoded" in caplog.text  # of two dtypes
        caplog.clear()
        stack = torch.stack([weight, weight]).to(torch.bfloat16)
        assert not caplog.text
        dense = stack.transpose(1, 2)
    assert "(2, 64, 64) is decoded by transpose" in caplog.text
    assert not isinstance(dense, QuantizedTensor)
