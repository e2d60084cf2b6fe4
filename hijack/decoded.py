"""`DecodedView`: a part of a quantized weight, decoded, and for reading only.

``weight[0]``, ``weight.t()`` and the like are views of a dense weight: who writes to
one, writes to the weight. Those of a quantized weight are views of a copy that was
decoded for them, so a write would be lost, and is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from hijack.errors import ReadOnlyError

#: Methods whose name ends with an underscore, though they leave the numbers alone.
_NO_WRITES = {"requires_grad_", "detach_", "share_memory_"}


class DecodedView(Tensor):
    """A tensor that refuses to be written to; what is computed with it is plain."""

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for tensor in written(func, args, kwargs):
            if isinstance(tensor, DecodedView):
                raise ReadOnlyError(
                    f"{func.__name__}: cannot write to a part of a quantized weight; "
                    f"got a write to a decoded copy of shape {tuple(tensor.shape)}, "
                    "which would be lost, expected one to a dense weight; call "
                    "hijack.unwrap first, or clone the part"
                )
        parts = [t for t in tree_flatten((args, kwargs))[0] if type(t) is DecodedView]
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
            memory = {_memory(part) for part in parts} - {None}
            return tree_map_only(
                Tensor, lambda t: as_part(t) if _memory(t) in memory else t, result
            )


def as_part(tensor: Tensor) -> Tensor:
    """A decoded tensor as one that is for reading only."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(DecodedView) if type(tensor) is Tensor else tensor


def written(func: Any, args: Any, kwargs: Any) -> Iterator[Tensor]:
    """The tensors that a function of torch writes to, which its name tells.

    Args:
        func: as ``__torch_function__`` gets it.
        args: its arguments.
        kwargs: its named arguments.
    """
    name = getattr(func, "__name__", "")
    places = [kwargs.get("out")]
    in_place = name.endswith("_") and not name.endswith("__")
    if name not in _NO_WRITES and (in_place or name in _WRITING_OPERATORS):
        places += args[:1]
    for tensor in tree_flatten(places)[0]:
        if isinstance(tensor, Tensor):
            yield tensor


#: ``a[0] = b``, ``a += b`` and the like.
_WRITING_OPERATORS = {
    *("__setitem__", "__iadd__", "__isub__", "__imul__", "__itruediv__"),
    *("__ifloordiv__", "__imod__", "__ipow__", "__iand__", "__ior__", "__ixor__"),
    *("__ilshift__", "__irshift__"),
}


def _memory(tensor: Tensor) -> int | None:
    """Address of the memory of a tensor, or None if it has none."""
    if tensor.is_meta or tensor.layout != torch.strided:
        return None
    try:
        return tensor.untyped_storage().data_ptr() or None
    except RuntimeError:  # a subclass without memory of its own
        return None
