"""Quantized weights as comfy_kitchen's QuantizedTensor, from ComfyUI 0.8 on.

Only what is a QuantizedTensor is streamed, pinned, and requantized by ComfyUI. Its
layout is found by name alone, so every coding gets a name of its own; the class behind
it does nothing but ask the scheme.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

import torch
from torch import Tensor

from hijack.hosts.comfyui.coded import Addition, Coded, Coding

#: What comfy.quant_ops must offer, all of it used here.
NEEDED = (
    "QuantizedTensor",
    "QuantizedLayout",
    "register_layout_class",
    "get_layout_class",
)


def quant_ops() -> Any | None:
    """ComfyUI's quantization module, if it is the one this file was written for."""
    module = sys.modules.get("comfy.quant_ops")
    if not getattr(module, "_CK_AVAILABLE", False):
        return None
    return module if all(hasattr(module, name) for name in NEEDED) else None


class KitchenCarrier:
    """Turns `Coded` into QuantizedTensor and back, sharing all tensors."""

    def __init__(self, host: Any) -> None:
        self.host = host

    def wrap(self, coded: Coded, dtype: torch.dtype) -> Tensor:
        """A QuantizedTensor that passes for a weight of ``dtype``."""
        layout, name = self._layout(coded.coding)
        params = layout.pack(coded, dtype)
        tensor: Tensor = self.host.QuantizedTensor(coded.qdata, name, params)
        return tensor

    def unwrap(self, tensor: Tensor | None) -> Coded | None:
        """The `Coded` in a QuantizedTensor of ours; None for any other tensor."""
        layout: Any = self._layout_of(tensor)
        if layout is None:
            return tensor if isinstance(tensor, Coded) else None
        weight: Any = tensor
        coded: Coded = layout.unpack(weight._qdata, weight._params)
        return coded

    def holds(self, tensor: Tensor | None) -> bool:
        """Whether a tensor is a quantized weight of ours."""
        return self._layout_of(tensor) is not None

    def dense(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """The weight a tensor stands for, patches left out; any other tensor as is."""
        layout: Any = self._layout_of(tensor)
        if layout is None:
            return tensor
        weight: Any = tensor
        dense: Tensor = layout.coding.scheme.dequantize(
            weight._qdata, weight._params.tensors(), dtype
        )
        return dense

    def patches(self, tensor: Tensor | None) -> tuple[Addition, ...]:
        """What is to be added to the weight that a tensor stands for."""
        if self._layout_of(tensor) is None:
            return ()
        weight: Any = tensor
        patches: tuple[Addition, ...] = weight._params.patches
        return patches

    def _layout_of(self, tensor: Any) -> Any | None:
        if not isinstance(tensor, self.host.QuantizedTensor):
            return None
        layout = self.host.get_layout_class(tensor._layout_cls)
        return layout if hasattr(layout, "coding") else None

    def mark(self, module: Any, coded: Coded) -> None:
        """Tell ComfyUI by which layout it quantizes the module's weight again."""
        module.layout_type = self._layout(coded.coding)[1]

    def _layout(self, coding: Coding) -> tuple[Any, str]:
        return _layout(self.host, coding)


def saving_is_patched() -> bool:
    """Whether what ComfyUI saves passes through `hijack.hosts.comfyui.saving`."""
    from hijack.hosts.manager import status

    return status()["comfyui"].patched


@functools.cache
def _layout(host: Any, coding: Coding) -> tuple[Any, str]:
    """Make and register the layout of one coding."""
    options = ",".join(f"{name}={value}" for name, value in coding.options)
    name = (
        f"hijack:{coding.scheme.name}:{coding.dialect}:{options}:{id(coding.scheme):x}"
    )
    methods = {name: value for name, value in vars(_Layout).items() if name[0] != "_"}
    layout = type(
        f"Hijack_{coding.scheme.name}",
        (host.QuantizedLayout,),
        {**methods, "coding": coding},
    )
    host.register_layout_class(name, layout)
    return layout, name


class _Layout:
    """The methods of a layout; ``coding`` is the only thing that differs."""

    coding: Coding

    @classmethod
    def pack(cls, coded: Coded, dtype: torch.dtype) -> Any:
        """The params of a QuantizedTensor: each scheme tensor is a field of its own."""
        return params_class(len(coded.tensors))(
            *coded.tensors.values(),
            tuple(coded.tensors),
            dtype,
            tuple(coded.shape),
            coded.patches,
        )

    @classmethod
    def unpack(cls, qdata: Tensor, params: Any) -> Coded:
        shape, dtype = tuple(params.orig_shape), params.orig_dtype
        return Coded(qdata, params.tensors(), cls.coding, shape, params.patches, dtype)

    @classmethod
    def quantize(
        cls,
        tensor: Tensor,
        scale: Any = None,
        stochastic_rounding: int = 0,
        inplace_ops: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Any]:
        qdata, tensors = cls.coding.quantize(tensor, int(stochastic_rounding or 0))
        coded = Coded(qdata, tensors, cls.coding, tuple(tensor.shape))
        return qdata, cls.pack(coded, tensor.dtype)

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Any) -> Tensor:
        if params.patches:
            return cls.unpack(qdata, params).dense(params.orig_dtype)
        return cls.coding.scheme.dequantize(qdata, params.tensors(), params.orig_dtype)

    @classmethod
    def get_plain_tensors(cls, qtensor: Any) -> tuple[Tensor, ...]:
        return (qtensor._qdata, *qtensor._params.tensors().values())

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Any) -> dict[str, Tensor]:
        # Keys are "X.weight" plus the suffix; the module adds the dialect's other keys.
        codes = cls.unpack(qdata, params).file_tensors()["weight"]
        if codes.is_floating_point() or not params.names or not saving_is_patched():
            return {"": codes}
        # ComfyUI would make parameters of integers, which torch denies it. Left out,
        # the weight is found again by the layer's other tensors.
        return {}

    @classmethod
    def requantize_kwargs(cls, qtensor: Any) -> dict[str, Any]:
        return {}

    @classmethod
    def supports_fast_matmul(cls) -> bool:
        return False


class _Params:
    """What ComfyUI asks of params, for any number of tensors ``t0``, ``t1``, ..."""

    def tensors(self: Any) -> dict[str, Tensor]:
        return {name: getattr(self, f"t{i}") for i, name in enumerate(self.names)}

    def _tensor_fields(self: Any) -> list[str]:
        return [f"t{index}" for index in range(len(self.names))]

    def _map(self: Any, function: Any) -> Any:
        changed = {
            field: function(getattr(self, field)) for field in self._tensor_fields()
        }
        return dataclasses.replace(self, **changed)

    def to_device(self: Any, device: torch.device) -> Any:
        return self._map(lambda tensor: tensor.to(device=device))

    def clone(self: Any) -> Any:
        return self._map(torch.clone)

    def copy_from(self: Any, source: Any, non_blocking: bool = False) -> None:
        for field in self._tensor_fields():
            getattr(self, field).copy_(
                getattr(source, field), non_blocking=non_blocking
            )
        for field in ("names", "orig_dtype", "orig_shape", "patches"):
            object.__setattr__(self, field, getattr(source, field))


@functools.cache
def params_class(count: int) -> Any:
    """A frozen dataclass with that many tensor fields.

    ComfyUI looks for tensors among the fields only, so they cannot be in a dict.
    """
    tensors = [(f"t{index}", Tensor) for index in range(count)]
    rest = [
        ("names", tuple),
        ("orig_dtype", torch.dtype),
        ("orig_shape", tuple),
        ("patches", tuple),
    ]
    return dataclasses.make_dataclass(
        f"HijackParams{count}", [*tensors, *rest], bases=(_Params,), frozen=True
    )
