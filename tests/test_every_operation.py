"""Every operation that torch knows, with a quantized weight in place of a dense one.

torch's own samples of arguments are used. A weight whose scheme loses nothing takes the
place of every matrix among them: the result must be the same, or the operation refused.
"""

from __future__ import annotations

import itertools
import warnings

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map_only

import hijack
from hijack.quantized import QuantizationConfig, QuantizedTensor

pytest.importorskip("expecttest", reason="torch's samples of arguments need it")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    from torch.testing._internal.common_methods_invocations import op_db

#: Give numbers that nobody has set.
UNDEFINED = {"empty_like", "empty", "new_empty", "new_empty_strided", "empty_strided"}


class Negated(hijack.Scheme):
    """Loses nothing, and data that are taken for the weight are all wrong."""

    name = "negated"

    def quantize(self, weight):
        """The negative."""
        return -weight, {"sign": torch.tensor(-1.0)}

    def dequantize(self, qdata, params, dtype):
        """The weight."""
        return (qdata * params["sign"]).to(dtype)


CONFIG = QuantizationConfig.of(Negated())


class Arguments:
    """Arguments of a call, of which the matrices are quantized."""

    def __init__(self, sample):
        self.weights = []
        self.values = tree_map_only(
            torch.Tensor, self.taken, (sample.input, sample.args, sample.kwargs)
        )

    def taken(self, tensor):
        """What takes a tensor's place."""
        copied = tensor.detach().clone()
        if not is_matrix(tensor):
            return copied
        qdata, params = CONFIG.scheme.quantize(copied)
        weight = QuantizedTensor(qdata, params, CONFIG, copied.shape, copied.dtype)
        self.weights.append((weight, qdata.clone()))
        return weight

    def call(self, function):
        """The result."""
        first, args, kwargs = self.values
        torch.manual_seed(0)
        return function(first, *args, **kwargs)


def is_matrix(tensor):
    """Whether a module could have it as a weight."""
    strided = tensor.layout is torch.strided
    return strided and tensor.dtype == torch.float32 and tensor.dim() == 2


def plain(tensor):
    """Values of any kind of tensor."""
    if isinstance(tensor, QuantizedTensor):
        return tensor.value()
    if type(tensor) is torch.Tensor:
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(torch.Tensor)


def samples(op):
    """Some of torch's samples that have a matrix."""
    found = op.sample_inputs("cpu", torch.float32, requires_grad=False)
    for sample in itertools.islice(found, 24):  # some operations have thousands
        flat = tree_flatten((sample.input, sample.args, sample.kwargs))[0]
        if any(isinstance(t, torch.Tensor) and is_matrix(t) for t in flat):
            yield sample


def compare(function, sample):
    """What an operation does with quantized matrices: "right", "refused" or a fault."""
    dense = tree_map_only(
        torch.Tensor,
        lambda t: t.detach().clone(),
        (sample.input, sample.args, sample.kwargs),
    )
    torch.manual_seed(0)
    try:
        expected = function(dense[0], *dense[1], **dense[2])
    except Exception:
        return "not for these"  # arguments of another variant
    arguments = Arguments(sample)
    try:
        result = arguments.call(function)
    except hijack.HijackError:
        return "refused"
    for weight, data in arguments.weights:
        if not torch.equal(weight.qdata.nan_to_num(), data.nan_to_num()):
            return "the data were written to"
    got, wanted = tree_flatten(result)[0], tree_flatten(expected)[0]
    for mine, theirs in zip(got, wanted, strict=True):
        if isinstance(theirs, torch.Tensor):
            torch.testing.assert_close(
                plain(mine), theirs, equal_nan=True, check_stride=False
            )
    return "right"


def test_every_operation_computes_with_the_weight_or_refuses():
    """And none writes to its data."""
    found, faults = {"right": 0, "refused": 0, "not for these": 0}, []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for op in op_db:
            if torch.float32 not in op.dtypes or op.name in UNDEFINED:
                continue
            for _, sample in zip(range(4), samples(op), strict=False):
                for function in filter(None, (op.op, op.inplace_variant)):
                    try:
                        outcome = compare(function, sample)
                    except Exception as error:
                        outcome = f"{type(error).__name__}: {error}"
                    if outcome in found:
                        found[outcome] += 1
                    else:
                        faults.append((op.name, outcome[:200]))
    assert not faults
    assert found["right"] > 1000, found
    assert found["refused"] > 100, found


@pytest.mark.parametrize("name", ["add", "mul", "mm", "abs", "cat"])
def test_results_are_not_written_into_a_weight(name):
    """``out=`` names what is written to."""
    weight = Arguments(
        type("Sample", (), {"input": torch.ones(3, 3), "args": (), "kwargs": {}})
    ).values[0]
    given = {"abs": [weight], "cat": [[torch.ones(1, 3), torch.ones(2, 3)]]}
    with pytest.raises(hijack.HijackError, match="cannot write"):
        getattr(torch, name)(*given.get(name, [torch.ones(3, 3)] * 2), out=weight)
