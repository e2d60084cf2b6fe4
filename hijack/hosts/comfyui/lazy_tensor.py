"""A tensor that is read when it is needed, and quantized when a layer takes it.

With these in a state dict, ComfyUI builds a model whose weights are quantized one by
one while it loads: never is more than one of them dense in memory.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from hijack.errors import CheckpointError
from hijack.formats.dialect import Dialect
from hijack.hosts.comfyui.coded import Coded, Coding
from hijack.layers import quantize_weight
from hijack.scheme import Scheme

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How weights are to be quantized.

    Attributes:
        scheme: the scheme.
        options: options of ``scheme.quantize``, such as ``block_size``.
    """

    scheme: Scheme
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def apply(self, weight: Tensor, layer: str) -> Coded:
        """Quantize one dense weight.

        Raises:
            HijackError: if the scheme refuses it, naming the layer.
        """
        dialect, options = self._spelling(weight, layer)
        qdata, params = quantize_weight(self.scheme, weight, options, layer)
        coding = Coding(self.scheme, dialect.name, tuple(sorted(options.items())))
        return Coded(qdata, params, coding, tuple(weight.shape))

    def _spelling(self, weight: Tensor, layer: str) -> tuple[Dialect, dict[str, Any]]:
        """The first dialect that can spell the layer, and the options it needs."""
        *dialects, last = self.scheme.all_dialects()
        meta = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
        for dialect in dialects:
            options = dialect.fit_options(tuple(weight.shape), self.options)
            made = quantize_weight(self.scheme, meta, options, layer)
            with contextlib.suppress(CheckpointError):
                dialect.encode(*made, options)
                return dialect, options
        return last, last.fit_options(tuple(weight.shape), self.options)


class Lazy(Tensor):
    """Stands for a tensor of known shape and dtype.

    Attributes:
        read: gives the tensor, a new one each time.
        code: quantizes it; None if it is to stay dense.
    """

    read: Callable[[], Tensor]
    code: Callable[[Tensor], Coded] | None

    @staticmethod
    def __new__(
        cls,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        read: Callable[[], Tensor],
        code: Callable[[Tensor], Coded] | None = None,
    ) -> Lazy:
        with torch.inference_mode(False):
            self: Lazy = torch.Tensor._make_wrapper_subclass(
                cls,
                shape,
                dtype=dtype,
                device=torch.device("cpu"),
                requires_grad=False,
            )
        self.read, self.code = read, code
        return self

    def taken(self) -> Tensor:
        """The tensor, quantized if it is to be."""
        return self.read() if self.code is None else self.code(self.read())

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"Lazy({tuple(self.shape)}, {self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func in _SAME:
            lazy = args[0]
            return Lazy(tuple(lazy.shape), lazy.dtype, lazy.read, lazy.code)
        if func.overloadpacket is aten.to:  # reaches us whole in inference mode
            return func.decompose(*args, **(kwargs or {}))
        args, kwargs = tree_map_only(Lazy, lambda lazy: lazy.read(), (args, kwargs))
        return func(*args, **(kwargs or {}))


_SAME = (aten.detach.default, aten.alias.default, aten.contiguous.default)
