"""A quantized weight as one tensor that knows how to decode itself.

ComfyUI passes weights around as values of a state dict: it renames keys, slices and
joins tensors, moves them, and backs up a module's ``weight`` alone. With codes and
scales in one tensor all of that stays right: what moves, moves together, and whatever
is computed with it is computed with the decoded weight.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from hijack.errors import DTypeError
from hijack.scheme import Scheme

aten = torch.ops.aten

#: Dtypes an ordinary weight has.
PLAIN = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@dataclasses.dataclass(frozen=True)
class Coding:
    """How codes are decoded, made again, and spelled in a file.

    Attributes:
        scheme: the scheme.
        dialect: name of the dialect the layer came in.
        options: options to quantize with again, as sorted items.
    """

    scheme: Scheme
    dialect: str
    options: tuple[tuple[str, Any], ...] = ()

    def encode(self, qdata: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file, keyed by suffix."""
        dialect = self.scheme.dialect(self.dialect)
        return dialect.encode(qdata, params, dict(self.options))

    def spelled(self, dialect: str) -> Coding:
        """The same in another dialect.

        Raises:
            CheckpointError: if the scheme has no dialect of that name.
        """
        self.scheme.dialect(dialect)
        return dataclasses.replace(self, dialect=dialect)

    def quantize(
        self, weight: Tensor, seed: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Quantize a dense weight as the layer was.

        Args:
            weight: dense.
            seed: other than 0 asks for stochastic rounding, if the scheme has it.
        """
        accepted = inspect.signature(self.scheme.quantize).parameters
        options = dict(self.options)
        if not any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
            options = {k: v for k, v in options.items() if k in accepted}
        if seed and {"stochastic", "seed"} <= accepted.keys():
            options.update(stochastic=True, seed=seed)
        return self.scheme.quantize(weight, **options)


class Addition(Protocol):
    """What is to be added to a weight, such as `hijack.hosts.comfyui.lora.Patches`."""

    def apply(self, weight: Tensor) -> Tensor:
        """The dense weight with it; may write into the weight."""


class Coded(Tensor):
    """Codes, the tensors to decode them with, and how; the shape is the dense one.

    In a state dict its dtype is that of the codes, and a cast to any other decodes. In
    a layer it is the dtype the weight stands for, and a cast only changes that.

    Attributes:
        qdata: the codes.
        tensors: the scheme's other tensors, by name.
        coding: how to decode them.
        patches: what is to be added to the decoded weight, in order.
        resident: whether it is the weight of a layer.
    """

    qdata: Tensor
    tensors: dict[str, Tensor]
    coding: Coding
    patches: tuple[Addition, ...]
    resident: bool

    @staticmethod
    def __new__(
        cls,
        qdata: Tensor,
        tensors: Mapping[str, Tensor],
        coding: Coding,
        shape: tuple[int, ...] | None = None,
        patches: tuple[Addition, ...] = (),
        stands_for: torch.dtype | None = None,
    ) -> Coded:
        shape = dense_shape(qdata, tensors, coding) if shape is None else shape
        # Codes in a dtype one computes in would pass for the weight itself.
        dtype = torch.uint8 if qdata.dtype in PLAIN else qdata.dtype
        dtype = dtype if stands_for is None else stands_for
        # Made in inference mode it could not be detached from one made outside.
        with torch.inference_mode(False):
            self: Coded = torch.Tensor._make_wrapper_subclass(
                cls, shape, dtype=dtype, device=qdata.device, requires_grad=False
            )
        self.qdata, self.tensors, self.coding = qdata, dict(tensors), coding
        self.patches, self.resident = patches, stands_for is not None
        return self

    def dense(self, dtype: torch.dtype, device: torch.device | None = None) -> Tensor:
        """The weight, decoded on ``device`` (its own by default), patches included."""
        coded = self if device is None else self.apply(lambda t: t.to(device))
        dequantize = coded.coding.scheme.dequantize
        if not self.patches:
            return dequantize(coded.qdata, coded.tensors, dtype)
        weight = dequantize(coded.qdata, coded.tensors, torch.float32)
        for patches in self.patches:
            weight = patches.apply(weight)
        return weight.to(dtype)

    def standing_for(self, dtype: torch.dtype) -> Coded:
        """The same as the weight of a layer that computes in ``dtype``."""
        return Coded(
            self.qdata,
            self.tensors,
            self.coding,
            tuple(self.shape),
            self.patches,
            dtype,
        )

    def for_state_dict(self) -> Coded:
        """The same in a state dict, where any cast decodes it."""
        shape = tuple(self.shape)
        return Coded(self.qdata, self.tensors, self.coding, shape, self.patches)

    def patched(self, patches: Addition) -> Coded:
        """The same, with more to be added to it."""
        return self._with(self.qdata, self.tensors, (*self.patches, patches))

    def _with(
        self,
        qdata: Tensor,
        tensors: Mapping[str, Tensor],
        patches: tuple[Addition, ...],
    ) -> Coded:
        dtype = self.dtype if self.resident else None
        return Coded(qdata, tensors, self.coding, tuple(self.shape), patches, dtype)

    def apply(self, function: Callable[[Tensor], Tensor]) -> Coded:
        """Apply a function that moves or copies; dtypes stay as they are."""

        def same_dtype(tensor: Tensor) -> Tensor:
            new = function(tensor)
            return new if new.dtype == tensor.dtype else tensor.to(new.device)

        tensors = {name: same_dtype(t) for name, t in self.tensors.items()}
        return self._with(same_dtype(self.qdata), tensors, self.patches)

    def quantize_again(self, weight: Tensor, seed: int = 0) -> Coded:
        """Another dense weight, quantized as this one was."""
        return self._with(*self.coding.quantize(weight, seed), ())

    def file_tensors(self) -> dict[str, Tensor]:
        """The tensors of a file in the layer's dialect, keyed by suffix."""
        return self.coding.encode(self.qdata, self.tensors)

    def file_names(self) -> tuple[str, ...]:
        """The suffixes of `file_tensors`."""
        return tuple(self.apply(lambda tensor: tensor.to("meta")).file_tensors())

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        scheme = self.coding.scheme.name
        return f"Coded({scheme}, {tuple(self.shape)}, {self.qdata.dtype})"

    # -- torch -------------------------------------------------------------------------

    def __setitem__(self, index: Any, value: Any) -> None:
        # It would be written into a part that was decoded, and be lost.
        raise DTypeError(
            f"{self!r}: cannot write into a quantized weight; decode it first"
        )

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        names = ["qdata"]
        for index, tensor in enumerate(self.tensors.values()):
            setattr(self, f"_tensor{index}", tensor)
            names.append(f"_tensor{index}")
        dtype = self.dtype if self.resident else None
        return names, (self.coding, tuple(self.tensors), self.patches, dtype)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor], context: Any, size: Any, stride: Any
    ) -> Coded:
        coding, names, patches, dtype = context
        tensors = {name: inner[f"_tensor{index}"] for index, name in enumerate(names)}
        return Coded(inner["qdata"], tensors, coding, tuple(size), patches, dtype)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        special = _SPECIAL.get(func)
        if special is not None:
            return special(*args, **kwargs)
        if func.overloadpacket is aten.to:  # reaches us whole in inference mode
            return func.decompose(*args, **kwargs)
        if func._schema.is_mutable and isinstance(args[0], Coded):
            raise DTypeError(
                f"{func}: cannot write into a quantized weight; decode it first"
            )
        # A view of what is made in inference mode cannot be one of this tensor.
        with torch.inference_mode(False):
            args, kwargs = tree_map_only(Coded, _float32, (args, kwargs))
        return func(*args, **kwargs)


def dense_shape(
    qdata: Tensor, tensors: Mapping[str, Tensor], coding: Coding
) -> tuple[int, ...]:
    """Shape of the weight that codes stand for, which packed codes do not tell."""
    metas = {name: tensor.to("meta") for name, tensor in tensors.items()}
    dequantize = coding.scheme.dequantize
    try:
        return tuple(dequantize(qdata.to("meta"), metas, torch.float32).shape)
    except Exception:  # a scheme that must see its data: decode once to know
        return tuple(dequantize(qdata, tensors, torch.float32).shape)


def _float32(coded: Coded) -> Tensor:
    return coded.dense(torch.float32)


def _same(coded: Coded, *_: Any, **__: Any) -> Coded:
    return coded.apply(lambda tensor: tensor)


def _clone(coded: Coded, *_: Any, **__: Any) -> Coded:
    return coded.apply(torch.clone)


def _to_copy(coded: Coded, **kwargs: Any) -> Tensor:
    dtype, device = kwargs.get("dtype"), kwargs.get("device")
    if dtype is not None and dtype != coded.dtype:
        if not coded.resident:
            return coded.dense(dtype, device)
        coded = coded.standing_for(dtype)
    return coded.apply(lambda t: t.to(device=device or t.device, copy=True))


def _empty_like(coded: Coded, **kwargs: Any) -> Tensor:
    dtype, device = kwargs.get("dtype"), kwargs.get("device") or coded.device
    if dtype is not None and dtype != coded.dtype:
        if not coded.resident:
            return torch.empty(tuple(coded.shape), dtype=dtype, device=device)
        coded = coded.standing_for(dtype)
    return coded.apply(lambda t: torch.empty_like(t, device=device))


def _copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(target, Coded):
        dense = source.dense(target.dtype, target.device)  # type: ignore[attr-defined]
        return target.copy_(dense, non_blocking=non_blocking)
    if not isinstance(source, Coded):
        raise DTypeError(
            "copy_: cannot write a dense tensor into a quantized weight; "
            "quantize it first"
        )
    target.patches = source.patches
    target.qdata.copy_(source.qdata, non_blocking=non_blocking)
    for name, tensor in target.tensors.items():
        tensor.copy_(source.tensors[name], non_blocking=non_blocking)
    return target


_SPECIAL: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.contiguous.default: _same,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
    aten.empty_like.default: _empty_like,
    aten.copy_.default: _copy_,
}


class PlainCarrier:
    """Keeps `Coded` as the parameter itself, where there is nothing better."""

    def wrap(self, coded: Coded, dtype: torch.dtype) -> Tensor:
        return coded.standing_for(dtype)

    def unwrap(self, tensor: Tensor | None) -> Coded | None:
        return tensor if isinstance(tensor, Coded) else None

    def holds(self, tensor: Tensor | None) -> bool:
        return isinstance(tensor, Coded)

    def dense(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if not isinstance(tensor, Coded):
            return tensor
        return tensor.coding.scheme.dequantize(tensor.qdata, tensor.tensors, dtype)

    def patches(self, tensor: Tensor | None) -> tuple[Addition, ...]:
        return tensor.patches if isinstance(tensor, Coded) else ()

    def mark(self, module: Any, coded: Coded) -> None:
        """Nothing to tell ComfyUI."""
