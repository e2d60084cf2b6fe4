"""How a quantized weight is kept where ComfyUI moves it.

Before ComfyUI 0.8 the parameter is a `QuantizedTensor` of hijack's. Later releases
stream, pin and requantize nothing but their own quantized tensors, so there the
parameter is one of those (`comfy_kitchen`), a view of the same tensors.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from hijack.quantized import Addition, QuantizedTensor, WeightView


class HostTensors(Protocol):
    """Turns quantized weights into what ComfyUI keeps, and back."""

    def wrap(self, weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        """What to make a parameter of; it passes for a weight of ``dtype``."""

    def unwrap(self, tensor: Tensor | None) -> QuantizedTensor | None:
        """The quantized weight in it; None for any other tensor."""

    def holds(self, tensor: Tensor | None) -> bool:
        """Whether a tensor is a quantized weight of ours."""

    def view(self, tensor: Tensor) -> WeightView | None:
        """What a bound forward gets of it; None for any other tensor."""

    def additions(self, tensor: Tensor | None) -> tuple[Addition, ...]:
        """What is to be added to the weight that a tensor stands for."""

    def mark(self, module: Any, weight: QuantizedTensor) -> None:
        """Tell ComfyUI how it can quantize the module's weight again."""


class MovedWeight(QuantizedTensor):
    """A weight that ComfyUI moves by copying it into an empty one made like it.

    For anybody else an empty tensor made like a quantized weight is a dense one.
    """

    def replace(self, **changes: Any) -> QuantizedTensor:
        """The same but for some of the constructor's arguments."""
        return _moved_weight(super().replace(**changes))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is not torch.ops.aten.empty_like.default:
            return super().__torch_dispatch__(func, types, args, kwargs)
        weight, options = args[0], kwargs or {}
        device, dtype = options.get("device"), options.get("dtype") or weight.dtype
        empty = weight.map(lambda t: torch.empty_like(t, device=device or t.device))
        return empty.replace(dtype=dtype)


def _moved_weight(weight: QuantizedTensor) -> MovedWeight:
    shape, dtype = tuple(weight.shape), weight.dtype
    moved: Any = MovedWeight(
        weight.qdata, weight.params, weight.config, shape, dtype, weight.additions
    )
    return moved  # type: ignore[no-any-return]


class PlainHostTensors:
    """Keeps a `QuantizedTensor` as the parameter itself."""

    def wrap(self, weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        return _moved_weight(weight.replace(dtype=dtype))

    def unwrap(self, tensor: Tensor | None) -> QuantizedTensor | None:
        return tensor if isinstance(tensor, QuantizedTensor) else None

    def holds(self, tensor: Tensor | None) -> bool:
        return isinstance(tensor, QuantizedTensor)

    def view(self, tensor: Tensor) -> WeightView | None:
        if not isinstance(tensor, QuantizedTensor):
            return None
        shape = tuple(tensor.shape)
        return WeightView(
            tensor.qdata, tensor.params, tensor.config, shape, tensor.dtype
        )

    def additions(self, tensor: Tensor | None) -> tuple[Addition, ...]:
        return tensor.additions if isinstance(tensor, QuantizedTensor) else ()

    def mark(self, module: Any, weight: QuantizedTensor) -> None:
        """Nothing to tell ComfyUI."""
