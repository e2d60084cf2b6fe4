"""A tensor that is read when it is needed, and quantized when a layer takes it.

With these in a state dict, ComfyUI builds a model whose weights are quantized one by
one while it loads: at most one of them is dense in memory at a time.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from hijack.errors import CheckpointError
from hijack.formats import matching
from hijack.formats.dialect import Dialect
from hijack.quantized import QuantizationConfig, QuantizedTensor, quantize_weight
from hijack.scheme import Scheme

aten = torch.ops.aten


def quantize_layer(
    config: QuantizationConfig, weight: Tensor, layer: str
) -> QuantizedTensor:
    """Quantize one dense weight so that a dialect of the scheme can spell it.

    Args:
        config: how; its dialect does not matter.
        weight: dense.
        layer: its name, for messages.

    Raises:
        HijackError: if the scheme refuses it, naming the layer.
    """
    dialect, options = _fit_dialect(config, weight, layer)
    qdata, params = quantize_weight(config.scheme, weight, options, layer)
    fitted = QuantizationConfig.of(config.scheme, options, dialect.name)
    return QuantizedTensor(qdata, params, fitted, tuple(weight.shape), weight.dtype)


def _fit_dialect(
    config: QuantizationConfig, weight: Tensor, layer: str
) -> tuple[Dialect, dict[str, Any]]:
    """The first dialect that can spell the layer, and the options it needs."""
    scheme, asked = config.scheme, dict(config.options)
    *dialects, last = matching.dialects_of(scheme)
    meta = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    for dialect in dialects:
        options = dialect.fit_options(tuple(weight.shape), asked)
        quantized = quantize_weight(scheme, meta, options, layer)
        with contextlib.suppress(CheckpointError):
            dialect.encode(*quantized, options)
            return dialect, options
    return last, last.fit_options(tuple(weight.shape), asked)


class LazyTensor(Tensor):
    """Stands for a tensor of known shape and dtype.

    Attributes:
        read: gives the tensor, a new one each time.
        quantize: quantizes it with a scheme; None if it is to stay dense.
        scheme: the one to quantize it with, unless a plugin says otherwise.
    """

    read: Callable[[], Tensor]
    quantize: Callable[[Scheme, Tensor], QuantizedTensor] | None
    scheme: Scheme | None

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        read: Callable[[], Tensor],
        quantize: Callable[[Scheme, Tensor], QuantizedTensor] | None = None,
        scheme: Scheme | None = None,
    ) -> LazyTensor:
        with torch.inference_mode(False):
            self: LazyTensor = torch.Tensor._make_wrapper_subclass(
                cls,
                shape,
                dtype=dtype,
                device=torch.device("cpu"),
                requires_grad=False,
            )
        self.read, self.quantize, self.scheme = read, quantize, scheme
        return self

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyTensor({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _SAME:
            lazy = args[0]
            return LazyTensor(
                tuple(lazy.shape), lazy.dtype, lazy.read, lazy.quantize, lazy.scheme
            )
        if func.overloadpacket is aten.to:  # reaches us whole in inference mode
            return func.decompose(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(
            LazyTensor, lambda lazy: lazy.read(), (args, kwargs)
        )
        return func(*args, **(kwargs or {}))


def _read(lazy: LazyTensor) -> Tensor:
    return lazy.read()


_SAME = (aten.detach.default, aten.alias.default, aten.contiguous.default)
