"""`StackedWeight`: quantized weights of one kind, stacked to one tensor.

Hosts keep the weights of a layer's experts in one parameter of three dimensions, and
take one expert out at a time. What is taken out of a `StackedWeight` along its first
dimension is one quantized weight; whatever else is computed with it is computed with
all of them decoded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hijack.quantized import QuantizedTensor

aten = torch.ops.aten


class StackedWeight(QuantizedTensor):
    """Quantized weights as one tensor; the scheme's tensors are stacked like them.

    Its shape is that of the dense weights, stacked along a new first dimension. In a
    state dict it is itself: no file has such a tensor.
    """

    @classmethod
    def of(cls, weights: Sequence[Tensor]) -> StackedWeight | None:
        """A stack of weights; None if they are not all quantized in the same way."""
        if not weights or len({_kind(weight) for weight in weights}) > 1:
            return None
        first: Any = weights[0]
        if _kind(first) is None:
            return None
        parts: list[Any] = list(weights)
        qdata = _stack([part.qdata for part in parts])
        params = {
            name: _stack([part.params[name] for part in parts]) for name in first.params
        }
        shape = (len(parts), *first.shape)
        return cls(qdata, params, first.config, shape, first.dtype)

    def part(self, index: int) -> QuantizedTensor:
        """One of the weights."""
        return QuantizedTensor(
            self.qdata[index],
            {name: tensor[index] for name, tensor in self.params.items()},
            self.config,
            tuple(self.shape[1:]),
            self.dtype,
        )

    def parts(self) -> list[QuantizedTensor]:
        """All of the weights."""
        return [self.part(index) for index in range(self.shape[0])]

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded weights, stacked; at most one is there twice.

        Args:
            dtype: of the result; None is its own.
        """
        first = self.part(0).dense(dtype)
        dense = first.new_empty((self.shape[0], *first.shape))
        dense[0] = first
        for index in range(1, self.shape[0]):
            dense[index] = self.part(index).dense(dtype)
        return dense

    def replace(self, **changes: Any) -> QuantizedTensor:
        """The same but for some fields; it stays a stack."""
        return _as_stack(type(self), super().replace(**changes))

    def for_module(self) -> QuantizedTensor:
        """The weights as a module may have them."""
        return _as_stack(StackedWeight, self)

    def __reduce_ex__(self, protocol: Any) -> Any:
        function, arguments = super().__reduce_ex__(protocol)
        return _rebuilt, (function, arguments)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor], context: Any, size: Any, stride: Any
    ) -> QuantizedTensor:
        weight = QuantizedTensor.__tensor_unflatten__(inner, context, size, stride)
        return _as_stack(StackedWeight, weight)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is aten.select.int and args[1] % args[0].dim() == 0:
            return args[0].part(args[2])
        return super().__torch_dispatch__(func, types, args, kwargs)


def _as_stack(kind: type[StackedWeight], weight: QuantizedTensor) -> StackedWeight:
    fields = (weight.config, tuple(weight.shape), weight.dtype, weight.additions)
    return kind(weight.qdata, weight.params, *fields)


def _rebuilt(function: Any, arguments: Any) -> Any:
    """A stack out of a pickle."""
    weight = function(*arguments)
    stack = _as_stack(StackedWeight, weight)
    return stack.as_parameter() if isinstance(weight, torch.nn.Parameter) else stack


def _kind(weight: Tensor) -> Any:
    """What weights of a stack have in common; None if it is not quantized."""
    if not isinstance(weight, QuantizedTensor) or isinstance(weight, StackedWeight):
        return None
    if weight.additions:
        return None
    inner = weight.plain_tensors()
    tensors = tuple((name, t.dtype, tuple(t.shape)) for name, t in inner.items())
    return weight.config, tensors, tuple(weight.shape), weight.dtype, weight.device


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    """Stack tensors of any dtype; torch stacks none of some that are one byte wide."""
    dtype = tensors[0].dtype
    if dtype.itemsize > 1:
        return torch.stack(list(tensors))
    return torch.stack([tensor.view(torch.uint8) for tensor in tensors]).view(dtype)
