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

from hijack.errors import ReadOnlyError
from hijack.quantized import QuantizedTensor

aten = torch.ops.aten


class StackedWeight(QuantizedTensor):
    """Quantized weights as one tensor; the scheme's tensors are stacked like them.

    Its shape is that of the dense weights, stacked along a new first dimension. In a
    state dict it is itself: no file has such a tensor.

    Attributes:
        transposed: whether it stands for transposed weights; one that is taken out is
            then decoded, because a scheme has no transposed ones.
    """

    transposed = False

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
        """One of the weights, not transposed."""
        shape = self.shape[:0:-1] if self.transposed else self.shape[1:]
        return QuantizedTensor(
            self.qdata[index],
            {name: tensor[index] for name, tensor in self.params.items()},
            self.config,
            tuple(shape),
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
        first = self._decoded(0, dtype)
        dense = first.new_empty((self.shape[0], *first.shape))
        dense[0] = first
        for index in range(1, self.shape[0]):
            dense[index] = self._decoded(index, dtype)
        return dense

    def _decoded(self, index: int, dtype: torch.dtype | None = None) -> Tensor:
        weight = self.part(index).dense(dtype)
        return weight.t().contiguous() if self.transposed else weight

    def replace(self, **changes: Any) -> QuantizedTensor:
        """The same but for some fields; it stays a stack."""
        return _as_stack(type(self), super().replace(**changes), self.transposed)

    def for_module(self) -> QuantizedTensor:
        """The weights as a module may have them."""
        return _as_stack(StackedWeight, self, self.transposed)

    def __reduce_ex__(self, protocol: Any) -> Any:
        function, arguments = super().__reduce_ex__(protocol)
        return _rebuilt, (function, arguments, self.transposed)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        names, context = super().__tensor_flatten__()
        return names, (context, self.transposed)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor], context: Any, size: Any, stride: Any
    ) -> QuantizedTensor:
        context, transposed = context
        weight = QuantizedTensor.__tensor_unflatten__(inner, context, size, stride)
        return _as_stack(StackedWeight, weight, transposed)

    def write(self, weight: Tensor, what: str) -> None:
        """Refuse, also where writes requantize.

        Raises:
            ReadOnlyError: always.
        """
        raise ReadOnlyError(
            f"{what}: cannot write into {self!r}; got a write to stacked weights, "
            "expected one to a dense tensor; call hijack.unwrap first"
        )

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is aten.select.int and args[1] % args[0].dim() == 0:
            stack, _, index = args
            return stack._decoded(index) if stack.transposed else stack.part(index)
        return super().__torch_dispatch__(func, types, args, kwargs)


def _as_stack(
    kind: type[StackedWeight], weight: QuantizedTensor, transposed: bool
) -> StackedWeight:
    fields = (weight.config, tuple(weight.shape), weight.dtype, weight.additions)
    stack = kind(weight.qdata, weight.params, *fields)
    stack.transposed = transposed
    return stack


def _rebuilt(function: Any, arguments: Any, transposed: bool) -> Any:
    """A stack out of a pickle."""
    weight = function(*arguments)
    stack = _as_stack(StackedWeight, weight, transposed)
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
