"""ComfyUI's operations, with a Linear that becomes quantized when it is loaded.

A layer does not know at construction whether the file has it quantized. So every layer
is built by ComfyUI's own class, and its class is decided by the tensor it is given: a
`Coded` weight makes it quantized, anything else makes it ComfyUI's own again.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch

from hijack.hosts.comfyui.coded import Coded, PlainCarrier
from hijack.hosts.comfyui.comfy_kitchen import KitchenCarrier, quant_ops
from hijack.hosts.comfyui.lazy_tensor import Lazy
from hijack.hosts.comfyui.linear import Carrier, QuantizedLinear, dense_shape


def make_operations(base: Any, dtype: torch.dtype) -> Any:
    """Operations for a model with quantized layers.

    Args:
        base: the operations ComfyUI would use without them.
        dtype: what the model computes in.

    Returns:
        A class like ``base``, to be set as a model config's ``custom_operations``.
    """
    host = quant_ops()
    carrier: Carrier = PlainCarrier() if host is None else KitchenCarrier(host)
    quantized = type(
        "QuantizedLinear",
        (QuantizedLinear, base.Linear),
        {
            "carrier": carrier,
            "dense_class": base.Linear,
            "compute_dtype": dtype,
            "host_ops": sys.modules["comfy.ops"],
            "low_vram_patch": sys.modules["comfy.model_patcher"].LowVramPatch,
            "cast_options": _offloadable(),
        },
    )

    def become_quantized(module: Any) -> Callable[..., None]:
        object.__setattr__(module, "__class__", quantized)
        return module._load_from_state_dict  # type: ignore[no-any-return]

    namespace = {
        "Linear": _undecided(base.Linear, become_quantized),
        "Embedding": _undecided(base.Embedding, None),
    }
    return type("HijackOperations", (base,), namespace)


def _undecided(
    dense_class: Any, become: Callable[[Any], Callable[..., None]] | None
) -> Any:
    """A class whose objects are ``dense_class`` until a coded weight arrives."""

    class Undecided(dense_class):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # ComfyUI builds its own classes in ways it denies to subclasses.
            object.__setattr__(self, "__class__", dense_class)
            dense_class.__init__(self, *args, **kwargs)
            object.__setattr__(self, "__class__", Undecided)

        def _load_from_state_dict(
            self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
        ) -> None:
            key = f"{prefix}weight"
            weight = state_dict.get(key)
            object.__setattr__(self, "__class__", dense_class)
            load = self._load_from_state_dict
            coded = isinstance(weight, Coded) or getattr(weight, "code", None)
            if (
                coded
                and become is not None
                and tuple(weight.shape) == dense_shape(self)
            ):
                if isinstance(weight, Lazy):
                    weight = state_dict[key] = weight.taken()
                load = become(self)
            elif isinstance(weight, Coded):
                state_dict[key] = weight.dense(_dtype(self))
            load(state_dict, prefix, *args, **kwargs)

    Undecided.__name__ = Undecided.__qualname__ = dense_class.__name__
    return Undecided


def _dtype(module: Any) -> torch.dtype:
    """The dtype ComfyUI meant a dense weight to have."""
    weight = getattr(module, "weight", None)
    meant = getattr(module, "weight_comfy_model_dtype", None)
    found = meant if weight is None else weight.dtype
    return torch.float32 if found is None else found


def _offloadable() -> dict[str, bool]:
    """The argument that keeps weights being offloaded while they are used.

    Without it, releases that have it return two values for some layers and three for
    others.
    """
    accepts = inspect.signature(sys.modules["comfy.ops"].cast_bias_weight).parameters
    return {"offloadable": True} if "offloadable" in accepts else {}
