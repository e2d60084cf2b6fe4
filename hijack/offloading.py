"""`OffloadedWeight`: a quantized weight whose data are on disk, or elsewhere.

accelerate moves a weight to the meta device and its data to a file. Before a forward it
reads the data, casts them to the dtype of the weight, and makes a parameter of them by
the weight's type: ``type(weight)(data, requires_grad=False)``. Nothing else tells which
weight they are of. So a weight that is moved to meta gets a type of its own, which
keeps what data alone do not tell; that is little beside the data.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from hijack.dtypes import DENSE_DTYPES
from hijack.errors import DTypeError, ModuleError, ShapeError
from hijack.quantized import OPERATIONS, QuantizedTensor, to_copy


class OffloadedWeight(QuantizedTensor):
    """A weight on the meta device that knows how to decode its data.

    Attributes:
        rest: the weight with data on meta, and everything else where it was.
    """

    rest: ClassVar[QuantizedTensor]

    @classmethod
    def parameter_of(cls, value: Tensor) -> QuantizedTensor:
        """A Parameter of the weight with its data back.

        Args:
            value: the data, perhaps cast to a dense dtype; or a `QuantizedTensor`.

        Raises:
            ShapeError: if the data are not of the shape they had.
            DTypeError: if they are not data of this weight.
        """
        if isinstance(value, QuantizedTensor):
            parameter: Any = super().parameter_of(value)
            parameter.offloaded_type = cls
            return parameter  # type: ignore[no-any-return]
        qdata = _as_data(value, cls.rest.qdata)
        params = {name: t.to(value.device) for name, t in cls.rest.params.items()}
        dtype = value.dtype if value.dtype in DENSE_DTYPES else cls.rest.dtype
        weight = cls.rest.replace(qdata=qdata, params=params, dtype=dtype)
        parameter = torch.nn.Parameter(weight, requires_grad=False)
        parameter.offloaded_type = cls
        return parameter  # type: ignore[no-any-return]

    def replace(self, **changes: Any) -> QuantizedTensor:
        """The same but for some fields; on meta it still knows how to decode."""
        changed = super().replace(**changes)
        return changed if not changed.is_meta else _of_type(type(self), changed)


def refuse_offloaded(model: nn.Module, what: str) -> None:
    """Refuse a model whose weights accelerate's hooks keep elsewhere.

    What is done to the model would not be done to them, and they would take its place
    in the next forward.

    Args:
        model: any module.
        what: what was to be done, such as ``"save"``.

    Raises:
        ModuleError: naming the first of its modules with such a hook.
    """
    for name, module in model.named_modules():
        hook: Any = getattr(module, "_hf_hook", None)
        hooks = getattr(hook, "hooks", (hook,))
        if any(getattr(one, "offload", False) for one in hooks):
            raise ModuleError(
                f"{what}: {name or type(module).__name__}: got a module whose weights "
                "are offloaded by hooks of accelerate, expected one with its weights; "
                "call accelerate.hooks.remove_hook_from_submodules(model) first, and "
                "offload the model again afterwards"
            )


def offloaded(weight: QuantizedTensor) -> OffloadedWeight:
    """A weight moved to meta.

    Args:
        weight: with its data.
    """
    kind = weight.__dict__.get("offloaded_type")
    if kind is None:
        rest = QuantizedTensor.replace(weight, qdata=weight.qdata.to("meta"))
        kind = type("QuantizedTensor", (OffloadedWeight,), {"rest": rest})
    return _of_type(kind, weight.map(lambda tensor: tensor.to("meta")))


def _of_type(kind: type[OffloadedWeight], weight: QuantizedTensor) -> OffloadedWeight:
    return kind(
        weight.qdata,
        weight.params,
        weight.config,
        tuple(weight.shape),
        weight.dtype,
        weight.additions,
    )


def _as_data(value: Tensor, data: Tensor) -> Tensor:
    """Numbers in a dense dtype as the quantized data they were cast from."""
    if value.shape != data.shape:
        raise ShapeError(
            f"offloaded weight: got data of shape {tuple(value.shape)}, expected "
            f"{tuple(data.shape)}; offload the model anew"
        )
    if value.dtype == data.dtype:
        return value
    # every number of one byte is exact in every dense dtype
    back = value.to(data.dtype)
    if data.element_size() > 1 or not torch.equal(back.to(value.dtype), value):
        raise DTypeError(
            f"offloaded weight: got {value.dtype} numbers that are not quantized data "
            f"in {data.dtype}, expected the data that were offloaded; call "
            "hijack.unwrap before a dense weight is loaded"
        )
    return back


def _to_copy(weight: QuantizedTensor, **kwargs: Any) -> Tensor:
    device, dtype = kwargs.get("device"), kwargs.get("dtype") or weight.dtype
    to_meta = device is not None and torch.device(device).type == "meta"
    if to_meta and not weight.is_meta and dtype in DENSE_DTYPES:
        return offloaded(weight).replace(dtype=dtype)
    return to_copy(weight, **kwargs)


OPERATIONS[torch.ops.aten._to_copy.default] = _to_copy
