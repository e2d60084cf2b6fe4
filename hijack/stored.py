"""`StoredWeight`: quantized data in a state dict, which remembers what they are.

The state dict of a quantized module holds plain tensors, as a file does: the quantized
data under ``weight``, the scheme's other tensors beside them. Programs read the
``weight`` of a state dict as numbers: trainers add a LoRA to it, accelerate casts it to
the dtype of the parameter it is for. The numbers mean nothing without the others. So
the tensor under ``weight`` moves, copies, compares and saves as the plain data, but

- cast to a dense dtype it is the quantized weight again, which is what the state dict
  of the dense module would hold; a module can take it (`QuantizedTensor.parameter_of`);
- what is computed with either are `RawNumbers`, which say so: they can be looked at and
  multiplied by their scales, but no module takes them, nor does any product;
- no dense numbers can be written to it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor
from torch.utils._pytree import tree_map_only

from hijack.decoded import written
from hijack.dtypes import DENSE_DTYPES
from hijack.errors import CheckpointError
from hijack.quantized import QuantizedTensor


class StoredWeight(Tensor):
    """The quantized data of a weight; see the module.

    Attributes:
        quantized: the weight they are the data of; it shares their memory.
    """

    quantized: QuantizedTensor

    @classmethod
    def of(cls, weight: QuantizedTensor) -> StoredWeight:
        """The data of a weight, for a state dict."""
        stored = weight.qdata.detach().as_subclass(cls)
        stored.quantized = QuantizedTensor.replace(weight)
        return stored

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        first = args[0] if args else None
        if isinstance(first, StoredWeight) and func in _MOVES:
            return _moved(first, func, args[1:], kwargs)
        _refuse_dense_writes(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        mark = _raw_numbers if _computes(func) else as_raw
        result = tree_map_only(Tensor, mark, result)
        return tree_map_only(StoredWeight, _plain_or_same(args), result)

    def __deepcopy__(self, memo: dict[int, Any]) -> StoredWeight:
        copied = StoredWeight.of(self.quantized.map(torch.clone))
        memo[id(self)] = copied
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(plain(self), protocol)


# processes hand tensors to each other by their type
ForkingPickler.register(
    StoredWeight,
    lambda stored: reduce_tensor(plain(stored)),  # type: ignore[no-untyped-call]
)


class SavedCodes(Tensor):
    """Quantized data out of a distributed checkpoint.

    torch.distributed.checkpoint copies what it reads into the tensors of any state
    dict, in whatever dtype these are. These copy themselves into quantized data alone.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        _refuse_dense_writes(func, args, kwargs)
        with torch._C.DisableTorchFunctionSubclass():
            result = func(*args, **kwargs)
        return tree_map_only(Tensor, _still_codes(args[0]), result)


def _still_codes(codes: Tensor) -> Any:
    """Marks parts of quantized data, and what is computed with them."""

    def mark(tensor: Tensor) -> Tensor:
        if type(tensor) is Tensor and tensor.dtype == codes.dtype:
            return saved_codes(tensor)
        return as_raw(tensor)

    return mark


def reduced(codes: Tensor, protocol: Any) -> Any:
    """How quantized data of a state dict are pickled: as what they are, plain data.

    In a distributed checkpoint they say so when they are read.
    """
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if name.startswith("torch.distributed.checkpoint"):
            return saved_codes, (codes,)
        frame = frame.f_back
    return codes.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


def saved_codes(codes: Tensor) -> Tensor:
    """What a distributed checkpoint is read as."""
    return codes.as_subclass(SavedCodes)


# which reads nothing else than what is declared to be safe
torch.serialization.add_safe_globals([saved_codes])


class RawNumbers(Tensor):
    """Numbers computed from quantized data without their scales.

    They are what they are, and can be looked at; as a weight they are garbage.
    """

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        _refuse_products(func)
        for tensor in written(func, args, kwargs):
            if not isinstance(tensor, RawNumbers):
                raise _refusal(func)
        return super().__torch_function__(func, types, args, kwargs)  # type: ignore

    def __reduce_ex__(self, protocol: Any) -> Any:
        return plain(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]


class RecalledWeight(QuantizedTensor):
    """A weight out of a state dict, to be put in a module.

    Who casts the ``weight`` of a state dict and then computes may mean the quantized
    data, or have it cast back to their dtype after a LoRA was added. So its numbers are
    those of the data, and what is computed with them is marked.
    """

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The quantized data as numbers, without their scales."""
        return plain(self.qdata).to(self.dtype if dtype is None else dtype)

    def for_module(self) -> QuantizedTensor:
        """The weight as a module may have it: it computes."""
        return QuantizedTensor.replace(self)

    def replace(self, **changes: Any) -> QuantizedTensor:
        """The same but for some fields; its numbers stay those of the data."""
        return _recall(super().replace(**changes))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        _refuse_products(func)
        if func._schema.is_mutable and not isinstance(args[0], RecalledWeight):
            raise _refusal(func)
        result = super().__torch_dispatch__(func, types, args, kwargs)
        return tree_map_only(Tensor, as_raw, result)


def as_raw(tensor: Tensor) -> Tensor:
    """Dense numbers computed from quantized data, marked as such."""
    if type(tensor) in (Tensor, StoredWeight) and tensor.dtype in DENSE_DTYPES:
        return _marked_raw(tensor)
    return tensor


def _computes(func: Any) -> bool:
    """Whether a function of torch gives other numbers of the same dtype."""
    name = getattr(func, "__name__", "").strip("_")
    return (
        name.removeprefix("r").removeprefix("i") in _ARITHMETIC or name in _ARITHMETIC
    )


#: Arithmetic, which integers have in their own dtype.
_ARITHMETIC = {
    *("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "neg", "abs"),
    *("and", "or", "xor", "lshift", "rshift", "clamp", "where", "lerp", "addcmul"),
}


def _raw_numbers(tensor: Tensor) -> Tensor:
    if type(tensor) is not Tensor or tensor.dtype == torch.bool:
        return tensor
    return _marked_raw(tensor)


def _marked_raw(tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(RawNumbers)


def refuse_raw(tensors: Mapping[str, Any]) -> None:
    """Refuse a state dict with numbers computed from quantized data.

    Args:
        tensors: key to tensor.

    Raises:
        CheckpointError: naming the key.
    """
    for key, tensor in tensors.items():
        if isinstance(tensor, RawNumbers):
            raise _refusal(None, key)


def plain(tensor: Tensor) -> Tensor:
    """A tensor of a state dict, if it is quantized data as nothing but data."""
    if not isinstance(tensor, StoredWeight | SavedCodes | RawNumbers):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


def recalled(weight: Any) -> Any:
    """The quantized weight that data of a state dict are of; anything else as it is.

    ``functional_call`` puts a state dict's tensors into a module.
    """
    return weight.quantized if isinstance(weight, StoredWeight) else weight


# -- details ---------------------------------------------------------------------------

#: Functions that move, copy or cast the whole of a tensor.
_MOVES = {
    Tensor.to,
    Tensor.type,
    Tensor.float,
    Tensor.double,
    Tensor.half,
    Tensor.bfloat16,
    Tensor.cpu,
    Tensor.cuda,
    Tensor.clone,
    torch.clone,
    Tensor.contiguous,
    Tensor.detach,
    torch.detach,
    Tensor.pin_memory,
    Tensor.data.__get__,  # type: ignore[attr-defined]
}


def _moved(stored: StoredWeight, func: Any, rest: Any, kwargs: Any) -> Any:
    """A move or a cast of the data, as one of the weight."""

    def function(tensor: Tensor) -> Any:
        return func(tensor, *rest, **kwargs)

    data = plain(stored)
    probe = function(torch.empty(0, dtype=data.dtype, device=data.device))
    if not isinstance(probe, Tensor):  # the name of its type
        return function(data)
    if probe.dtype == data.dtype:
        return StoredWeight.of(stored.quantized.map(function))
    if probe.dtype not in DENSE_DTYPES:
        return function(data)
    moved = stored.quantized.map(lambda tensor: tensor.to(probe.device))
    return _recall(moved.replace(dtype=probe.dtype))


def _recall(weight: QuantizedTensor) -> RecalledWeight:
    return RecalledWeight(
        weight.qdata,
        weight.params,
        weight.config,
        tuple(weight.shape),
        weight.dtype,
        weight.additions,
    )


def _refuse_dense_writes(func: Any, args: Any, kwargs: Any) -> None:
    """Refuse a write that leaves something else than quantized data, or numbers."""
    for tensor in written(func, args, kwargs):
        if not _may_write(func, tensor, args):
            raise _refusal(func)


def _may_write(func: Any, target: Tensor, args: Any) -> bool:
    """Whether a write leaves quantized data quantized data, and numbers numbers."""
    if func.__name__ in ("zero_", "resize_", "set_"):
        return True
    if func.__name__ != "copy_" or len(args) < 2 or not isinstance(args[1], Tensor):
        return False
    return plain(target).dtype == plain(args[1]).dtype


def _plain_or_same(args: Any) -> Any:
    """What functions that return one of their arguments return."""
    known = {id(arg) for arg in args}
    return lambda stored: stored if id(stored) in known else plain(stored)


#: Operations that are only done with a weight.
_PRODUCTS = {
    *("linear", "matmul", "mm", "addmm", "bmm", "baddbmm", "mv", "addmv", "dot"),
    *("einsum", "tensordot", "embedding", "convolution", "__matmul__", "__rmatmul__"),
    *(f"conv{n}d" for n in (1, 2, 3)),
    *(f"conv_transpose{n}d" for n in (1, 2, 3)),
}


def _refuse_products(func: Any) -> None:
    packet = getattr(func, "overloadpacket", func)
    if getattr(packet, "__name__", "") in _PRODUCTS:
        raise _refusal(func)


def _refusal(func: Any, key: str = "") -> CheckpointError:
    where = key or getattr(func, "__name__", "") or "state dict"
    return CheckpointError(
        f"{where}: got numbers computed from the weight of a quantized module's state "
        "dict, which are its quantized data, expected a dense weight; use "
        "module.weight to compute with, or call hijack.unwrap first to change it"
    )
