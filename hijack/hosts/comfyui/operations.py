"""ComfyUI's operations, with a Linear that becomes quantized when it is loaded.

A layer does not know at construction whether the file has it quantized. So every layer
is built by ComfyUI's own class, and its class is decided by the tensor it is given: a
quantized weight makes it quantized, anything else makes it ComfyUI's own again.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable
from typing import Any

import torch

from hijack.hosts.comfyui.comfy_kitchen import KitchenTensors, quant_ops
from hijack.hosts.comfyui.host_tensors import HostTensors, PlainHostTensors
from hijack.hosts.comfyui.linear import QuantizedLinear, keeps_quantized
from hijack.quantized import QuantizedTensor

#: Makes a layer quantized, given its weight, the key prefix and the state dict, and
#: gives the function that loads the rest of it.
Become = Callable[[Any, Any, str, Any], Callable[..., None]]


def make_operations(base: Any, dtype: torch.dtype) -> Any:
    """Operations for a model with quantized layers.

    Args:
        base: the operations ComfyUI would use without them.
        dtype: what the model computes in.

    Returns:
        A class like ``base``, to be set as a model config's ``custom_operations``.
    """
    host = quant_ops()
    tensors: HostTensors = PlainHostTensors() if host is None else KitchenTensors(host)
    quantized: Any = type(
        "QuantizedLinear",
        (QuantizedLinear, base.Linear),
        {
            "host_tensors": tensors,
            "dense_class": base.Linear,
            "compute_dtype": dtype,
            "host_ops": sys.modules["comfy.ops"],
            "low_vram_patch": sys.modules["comfy.model_patcher"].LowVramPatch,
            "cast_options": _cast_options(),
        },
    )
    # ComfyUI applies the functions it sees to the decoded weight
    without = {"weight_function": property(lambda layer: [])}
    quantized.class_to_cast = type("QuantizedLinear", (quantized,), without)

    def become_quantized(
        module: Any, weight: Any, prefix: str, state_dict: Any
    ) -> Callable[..., None]:
        change = quantized.prepare(module, weight, prefix, state_dict)
        object.__setattr__(module, "__class__", quantized)
        module.take(change)
        return module.load_rest  # type: ignore[no-any-return]

    namespace = {
        "Linear": _deferred(base.Linear, become_quantized),
        "Embedding": _deferred(base.Embedding, None),
    }
    return type("HijackOperations", (base,), namespace)


def _deferred(dense_class: Any, become: Become | None) -> Any:
    """A class whose objects are ``dense_class`` until a quantized weight arrives."""

    class Deferred(dense_class):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # ComfyUI builds its own classes in ways it denies to subclasses.
            object.__setattr__(self, "__class__", dense_class)
            dense_class.__init__(self, *args, **kwargs)
            object.__setattr__(self, "__class__", Deferred)

        def _load_from_state_dict(
            self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
        ) -> None:
            key = f"{prefix}weight"
            weight = state_dict.get(key)
            object.__setattr__(self, "__class__", dense_class)
            load = self._load_from_state_dict
            if become is not None and keeps_quantized(self, weight):
                load = become(self, weight, prefix, state_dict)
            elif isinstance(weight, QuantizedTensor):
                state_dict[key] = weight.value(_dtype(self))
            load(state_dict, prefix, *args, **kwargs)

    Deferred.__name__ = Deferred.__qualname__ = dense_class.__name__
    return Deferred


def _dtype(module: Any) -> torch.dtype:
    """The dtype ComfyUI meant a dense weight to have."""
    weight = getattr(module, "weight", None)
    meant = getattr(module, "weight_comfy_model_dtype", None)
    found = meant if weight is None else weight.dtype
    return torch.float32 if found is None else found


def _cast_options() -> dict[str, bool]:
    """Arguments of ComfyUI's cast, as far as this release has them.

    ``offloadable`` keeps weights being offloaded while they are used; without it some
    layers get two values back and others three. ``want_requant`` has a weight that a
    LoRA was merged into quantized again at once, and not from the second step on.
    """
    accepts = inspect.signature(sys.modules["comfy.ops"].cast_bias_weight).parameters
    return {name: True for name in ("offloadable", "want_requant") if name in accepts}
