"""What wrapped modules do by default: decode the weight, then do as before."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

if TYPE_CHECKING:
    from hijack.hooks import Layer, Wrapped


def dense_weight(module: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The dequantized weight of a wrapped module.

    Args:
        module: a wrapped module.
        dtype: dtype of the result; default is that of the weight before it was wrapped.

    Returns:
        A tensor of the dense weight's shape, on the module's device.
    """
    layer: Layer = module._hijack  # type: ignore[assignment]
    params = {name: getattr(module, name) for name in layer.names}
    dense = layer.scheme.dequantize(
        module.weight,  # type: ignore[arg-type]
        params,
        layer.dtype if dtype is None else dtype,
    )
    return dense


def default_forward(base: type[nn.Module]) -> Callable[..., Any]:
    """The forward of a wrapped module whose scheme has none of its own.

    Args:
        base: the module's class before it was wrapped. A subclass with a forward of its
            own keeps that forward.
    """
    return _FORWARDS.get(base.forward, _standin_forward)


def _input_dtype(module: Wrapped, x: Tensor) -> torch.dtype:
    return x.dtype if x.dtype.is_floating_point else module._hijack.dtype


def _bias(module: Any, dtype: torch.dtype) -> Tensor | None:
    bias: Tensor | None = module.bias
    return bias if bias is None or bias.dtype == dtype else bias.to(dtype)


def _linear_forward(self: Any, input: Tensor) -> Tensor:
    dtype = _input_dtype(self, input)
    return F.linear(input, dense_weight(self, dtype), _bias(self, dtype))


def _conv_forward(self: Any, input: Tensor) -> Tensor:
    dtype = _input_dtype(self, input)
    result: Tensor = self._conv_forward(
        input, dense_weight(self, dtype), _bias(self, dtype)
    )
    return result


def _embedding_forward(self: Any, input: Tensor) -> Tensor:
    return F.embedding(
        input,
        dense_weight(self),
        self.padding_idx,
        self.max_norm,
        self.norm_type,
        self.scale_grad_by_freq,
        self.sparse,
    )


def _standin_forward(self: Any, *args: Any, **kwargs: Any) -> Any:
    """Run the module's own forward on a stand-in that holds the dense weight.

    For modules whose forward hijack does not know. The stand-in shares everything else
    with the module, and two threads may call the module at once.
    """
    first = next((a for a in args if isinstance(a, Tensor)), None)
    dtype = self._hijack.dtype if first is None else _input_dtype(self, first)
    base = self._hijack.base
    standin = base.__new__(base)
    standin.__dict__.update(self.__dict__)
    standin.__dict__["_parameters"] = {
        **self._parameters,
        "weight": dense_weight(self, dtype),
    }
    return base.forward(standin, *args, **kwargs)


#: A module's own forward to one that takes the weight from its codes.
_FORWARDS: dict[Callable[..., Any], Callable[..., Tensor]] = {
    nn.Linear.forward: _linear_forward,
    nn.Conv1d.forward: _conv_forward,
    nn.Conv2d.forward: _conv_forward,
    nn.Conv3d.forward: _conv_forward,
    nn.Embedding.forward: _embedding_forward,
}
