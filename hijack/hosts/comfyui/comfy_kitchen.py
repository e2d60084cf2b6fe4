"""Quantized weights as comfy_kitchen's QuantizedTensor, from ComfyUI 0.8 on.

Only what is a QuantizedTensor is streamed, pinned, and requantized by ComfyUI. Its
layout is found by name alone, so every config gets a name of its own; the class behind
it does nothing but ask the scheme.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from typing import Any

import torch
from torch import Tensor

from hijack.quantized import (
    Addition,
    QuantizationConfig,
    QuantizedTensor,
    WeightView,
)

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


class KitchenTensors:
    """Turns `QuantizedTensor` into comfy_kitchen's and back, sharing all tensors."""

    def __init__(self, host: Any) -> None:
        self.host = host

    def wrap(self, weight: QuantizedTensor, dtype: torch.dtype) -> Tensor:
        """comfy_kitchen's tensor, passing for a weight of ``dtype``."""
        layout, name = _layout(self.host, weight.config)
        params = layout.pack(weight, dtype)
        tensor: Tensor = self.host.QuantizedTensor(weight.qdata, name, params)
        return tensor

    def unwrap(self, tensor: Tensor | None) -> QuantizedTensor | None:
        """The weight in comfy_kitchen's tensor of ours; None for any other."""
        layout: Any = self._layout_of(tensor)
        if layout is None:
            return tensor if isinstance(tensor, QuantizedTensor) else None
        kept: Any = tensor
        weight: QuantizedTensor = layout.unpack(kept._qdata, kept._params)
        return weight

    def holds(self, tensor: Tensor | None) -> bool:
        """Whether a tensor is a quantized weight of ours."""
        return self._layout_of(tensor) is not None

    def view(self, tensor: Tensor) -> WeightView | None:
        """What a bound forward gets of it; None for any other tensor."""
        layout: Any = self._layout_of(tensor)
        if layout is None:
            return None
        kept: Any = tensor
        params = kept._params
        shape, dtype = tuple(params.orig_shape), params.orig_dtype
        return WeightView(kept._qdata, params.tensors(), layout.config, shape, dtype)

    def additions(self, tensor: Tensor | None) -> tuple[Addition, ...]:
        """What is to be added to the weight that a tensor stands for."""
        if self._layout_of(tensor) is None:
            return ()
        kept: Any = tensor
        additions: tuple[Addition, ...] = kept._params.additions
        return additions

    def _layout_of(self, tensor: Any) -> Any | None:
        if not isinstance(tensor, self.host.QuantizedTensor):
            return None
        layout = self.host.get_layout_class(tensor._layout_cls)
        return (
            layout
            if isinstance(getattr(layout, "config", None), QuantizationConfig)
            else None
        )

    def mark(self, module: Any, weight: QuantizedTensor) -> None:
        """Tell ComfyUI by which layout it quantizes the module's weight again."""
        module.layout_type = _layout(self.host, weight.config)[1]


def saving_is_patched() -> bool:
    """Whether what ComfyUI saves passes through `hijack.hosts.comfyui.saving`."""
    from hijack.hosts.manager import in_force

    return in_force("comfy.utils.save_torch_file")


@functools.cache
def _layout(host: Any, config: QuantizationConfig) -> tuple[Any, str]:
    """Make and register the layout of one way to quantize."""
    scheme = config.scheme
    options = ",".join(f"{name}={value}" for name, value in config.options)
    name = f"hijack:{scheme.name}:{config.dialect}:{options}:{id(scheme):x}"
    methods = {name: value for name, value in vars(_Layout).items() if name[0] != "_"}
    layout = type(
        f"Hijack_{scheme.name}",
        (host.QuantizedLayout,),
        {**methods, "config": config},
    )
    host.register_layout_class(name, layout)
    return layout, name


class _Layout:
    """The methods of a layout; ``config`` is the only thing that differs."""

    config: QuantizationConfig

    @classmethod
    def pack(cls, weight: QuantizedTensor, dtype: torch.dtype) -> Any:
        """The params of a QuantizedTensor: each scheme tensor is a field of its own."""
        return params_class(len(weight.params))(
            *weight.params.values(),
            tuple(weight.params),
            dtype,
            tuple(weight.shape),
            weight.additions,
        )

    @classmethod
    def unpack(cls, qdata: Tensor, params: Any) -> QuantizedTensor:
        return QuantizedTensor(
            qdata,
            params.tensors(),
            cls.config,
            tuple(params.orig_shape),
            params.orig_dtype,
            params.additions,
        )

    @classmethod
    def quantize(
        cls,
        tensor: Tensor,
        scale: Any = None,
        stochastic_rounding: int = 0,
        inplace_ops: bool = False,
        **_: Any,
    ) -> tuple[Tensor, Any]:
        options = dict(cls.config.options)
        seed = int(stochastic_rounding or 0)
        meta = cls.config.scheme.create_params(
            tuple(tensor.shape), tensor.dtype, "meta", **options
        )
        like = QuantizedTensor(*meta, cls.config, tuple(tensor.shape), tensor.dtype)
        weight = like.requantized(tensor, seed)
        return weight.qdata, cls.pack(weight, tensor.dtype)

    @classmethod
    def dequantize(cls, qdata: Tensor, params: Any) -> Tensor:
        if params.additions:
            return cls.unpack(qdata, params).value()
        shape, dtype = tuple(params.orig_shape), params.orig_dtype
        return WeightView(qdata, params.tensors(), cls.config, shape, dtype).dense()

    @classmethod
    def get_plain_tensors(cls, qtensor: Any) -> tuple[Tensor, ...]:
        return (qtensor._qdata, *qtensor._params.tensors().values())

    @classmethod
    def state_dict_tensors(cls, qdata: Tensor, params: Any) -> dict[str, Tensor]:
        # Keys are "X.weight" plus the suffix; the module adds the others.
        if qdata.is_floating_point() or not params.names or not saving_is_patched():
            return {"": qdata}
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
        for field in ("names", "orig_dtype", "orig_shape", "additions"):
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
        ("additions", tuple),
    ]
    return dataclasses.make_dataclass(
        f"HijackParams{count}", [*tensors, *rest], bases=(_Params,), frozen=True
    )
