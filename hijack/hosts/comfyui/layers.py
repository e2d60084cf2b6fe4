"""ComfyUI's operations, with a Linear that becomes quantized when it is loaded.

A layer does not know at construction whether the file has it quantized. So every layer
is built by ComfyUI's own class, and its class is decided by the tensor it is given: a
`Coded` weight makes it quantized, anything else makes it ComfyUI's own again.
"""

from __future__ import annotations

import copy
import inspect
import sys
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hijack.errors import ModuleError
from hijack.hosts.comfyui.coded import PLAIN, Coded
from hijack.hosts.comfyui.kitchen import KitchenCarrier, quant_ops

#: Every quantized layer alive, so that unpatching can say how many there are.
LIVE: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class PlainCarrier:
    """Keeps `Coded` as the parameter itself, where there is nothing better."""

    #: Whether writing another weight into the parameter writes all of it.
    restores_in_place = True

    def wrap(self, coded: Coded, dtype: torch.dtype) -> Tensor:
        return coded

    def unwrap(self, tensor: Tensor | None) -> Coded | None:
        return tensor if isinstance(tensor, Coded) else None

    def dense(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        return tensor.dense(dtype) if isinstance(tensor, Coded) else tensor

    def mark(self, module: Any, coded: Coded) -> None:
        """Nothing to tell ComfyUI."""


Carrier = KitchenCarrier | PlainCarrier


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
            "cast_options": _offloadable(),
        },
    )

    def become_quantized(module: Any, coded: Coded) -> Callable[..., None]:
        object.__setattr__(module, "__class__", quantized)
        return module._load_from_state_dict  # type: ignore[no-any-return]

    namespace = {
        "Linear": _undecided(base.Linear, become_quantized),
        "Embedding": _undecided(base.Embedding, None),
    }
    return type("HijackOperations", (base,), namespace)


def _undecided(
    dense_class: Any, become: Callable[[Any, Coded], Callable[..., None]] | None
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
            weight = state_dict.get(f"{prefix}weight")
            object.__setattr__(self, "__class__", dense_class)
            load = self._load_from_state_dict
            if isinstance(weight, Coded):
                if become is not None and tuple(weight.shape) == _shape(self):
                    load = become(self, weight)
                else:
                    state_dict[f"{prefix}weight"] = weight.dense(_dtype(self))
            load(state_dict, prefix, *args, **kwargs)

    Undecided.__name__ = Undecided.__qualname__ = dense_class.__name__
    return Undecided


def _shape(module: Any) -> tuple[int, ...]:
    return (module.out_features, module.in_features)


def _dtype(module: Any) -> torch.dtype:
    """The dtype ComfyUI meant a dense weight to have."""
    weight = getattr(module, "weight", None)
    meant = getattr(module, "weight_comfy_model_dtype", None)
    found = meant if weight is None else weight.dtype
    return torch.float32 if found is None else found


class QuantizedLinear:
    """What a Linear does differently once its weight is quantized."""

    carrier: Carrier
    dense_class: Any
    compute_dtype: torch.dtype
    host_ops: Any
    cast_options: dict[str, bool]

    def _load_from_state_dict(
        self: Any, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        key = f"{prefix}weight"
        coded = state_dict.get(key)
        if isinstance(coded, Coded):
            self._take(coded)
        elif coded is not None:  # loaded once more, with a dense weight
            self._become_dense(coded)
            self._load_from_state_dict(state_dict, prefix, *args, **kwargs)
            return
        bias = state_dict.get(f"{prefix}bias")
        if self.bias is None and bias is not None:  # ComfyUI left it for later
            self.bias = nn.Parameter(torch.empty_like(bias), requires_grad=False)
        rest = {name: tensor for name, tensor in state_dict.items() if name != key}
        local_metadata, strict, missing, unexpected, errors = args
        nn.Module._load_from_state_dict(
            self, rest, prefix, local_metadata, strict, missing, unexpected, errors
        )
        if coded is not None and key in missing:
            missing.remove(key)

    def _take(self: Any, coded: Coded) -> None:
        weight = self.carrier.wrap(coded, self.compute_dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.carrier.mark(self, coded)
        LIVE.add(self)

    def _become_dense(self: Any, weight: Tensor) -> None:
        LIVE.discard(self)
        object.__setattr__(self, "__class__", self.dense_class)
        dense = torch.empty(_shape(self), dtype=weight.dtype, device=weight.device)
        self.weight = nn.Parameter(dense, requires_grad=False)

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        coded = self.carrier.unwrap(self.weight)
        if coded is not None:  # QuantizedTensor itself cannot be copied this way
            weight = self.carrier.wrap(coded.apply(torch.clone), self.compute_dtype)
            memo[id(self.weight)] = nn.Parameter(weight, requires_grad=False)
        new = memo[id(self)] = self.__class__.__new__(self.__class__)
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        LIVE.add(new)
        return new

    # ComfyUI's mixed precision Linear replaces this method, which torch's does not.
    state_dict = nn.Module.state_dict

    def _save_to_state_dict(
        self: Any, destination: Any, prefix: str, keep_vars: bool
    ) -> None:
        coded = self.carrier.unwrap(self.weight)
        for name, parameter in self._parameters.items():
            if parameter is not None and (coded is None or name != "weight"):
                tensor = parameter if keep_vars else parameter.detach()
                destination[f"{prefix}{name}"] = tensor
        if coded is not None:
            tensors = coded.file_tensors()
            destination.update({f"{prefix}{name}": t for name, t in tensors.items()})

    def forward(self: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.forward_comfy_cast_weights(input)  # type: ignore[no-any-return]

    def forward_comfy_cast_weights(
        self: Any, input: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        ops = self.host_ops
        for patch in self.weight_function:  # 0.3.70 would decode and encode once more
            if getattr(patch, "set_func", None) is not None:
                patch.set_func = patch.convert_func = None
        weight, bias, *stream = ops.cast_bias_weight(self, input, **self.cast_options)
        weight = self.carrier.dense(weight, input.dtype)
        output = F.linear(input, weight, bias)
        if stream:
            ops.uncast_bias_weight(self, weight, bias, *stream)
        return output

    def convert_weight(
        self: Any, weight: Tensor, inplace: bool = False, **kwargs: Any
    ) -> Tensor:
        """The dense weight; ComfyUI asks before it adds a LoRA."""
        dtype = weight.dtype if weight.dtype in PLAIN else torch.float32
        return self.carrier.dense(weight, dtype)  # type: ignore[no-any-return]

    def set_weight(
        self: Any,
        weight: Tensor,
        inplace_update: bool = False,
        seed: int | None = None,
        return_weight: bool = False,
        **kwargs: Any,
    ) -> Tensor | None:
        """Quantize a weight with a LoRA in it, with scales of its own.

        Raises:
            ModuleError: if ComfyUI wants to write into the parameter and restore it so,
                and would restore the codes without their scales.
        """
        if inplace_update and not self.carrier.restores_in_place:
            raise ModuleError(
                "LoRA hooks: this ComfyUI cannot take them out of quantized layers "
                "again; apply the LoRA with a LoRA loader node instead"
            )
        coded = self.carrier.unwrap(self.weight)
        if coded is None:  # already replaced by a dense one
            new = weight.to(self.weight.dtype)
        else:
            again = coded.quantize_again(weight, seed or 0)
            new = self.carrier.wrap(again, self.compute_dtype)
        if return_weight:
            return new
        # Never in place, even if asked: the codes may be a read-only map of the file.
        self.weight = nn.Parameter(new, requires_grad=False)
        return None

    def _apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        for name, parameter in self._parameters.items():
            if parameter is None:
                continue
            coded = self.carrier.unwrap(parameter)
            if coded is None:
                moved = fn(parameter)
            else:  # codes keep their dtype, whatever the model is cast to
                moved = self.carrier.wrap(coded.apply(fn), self.compute_dtype)
            self._parameters[name] = nn.Parameter(moved, requires_grad=False)
        for name, buffer in self._buffers.items():
            self._buffers[name] = None if buffer is None else fn(buffer)
        return self


def _offloadable() -> dict[str, bool]:
    """The argument that keeps weights being offloaded while they are used.

    Without it, releases that have it return two values for some layers and three for
    others.
    """
    accepts = inspect.signature(sys.modules["comfy.ops"].cast_bias_weight).parameters
    return {"offloadable": True} if "offloadable" in accepts else {}
