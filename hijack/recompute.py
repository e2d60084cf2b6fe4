"""Backward passes decode quantized weights again instead of keeping them dense.

The gradient of a product with respect to its input needs the weight, so autograd keeps
what the forward multiplied by: for a quantized layer the decoded copy, which is larger
than a dense model's weight would be. Inside `recomputing`, what autograd is about to
keep is looked at; memory that a `QuantizedTensor` was decoded into is replaced by the
weight, which is decoded again when the backward asks. This holds for every scheme and
every forward, whatever it computes. Compilers are told the same by `tagged`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from hijack.errors import ReadOnlyError

#: What torch's stubs do not have in full.
_AUTOGRAD: Any = torch._C._autograd


class _Weight(Protocol):
    """What is asked of a weight: `QuantizedTensor` has it."""

    qdata: Tensor

    def dense(self, dtype: torch.dtype | None = None) -> Tensor: ...

    def map(self, function: Callable[[Tensor], Tensor]) -> _Weight: ...


@dataclasses.dataclass(frozen=True)
class _Decoded:
    """Memory that a weight was decoded into.

    Attributes:
        dense: the decoded weight, which keeps the memory its own.
        version: of the memory when it was decoded.
        weight: the weight.
    """

    dense: Tensor
    version: int
    weight: _Weight


@dataclasses.dataclass(frozen=True)
class _Again:
    """What autograd keeps in place of a decoded weight, or of a view of it."""

    weight: _Weight
    qdata: Tensor
    version: int
    dtype: torch.dtype
    device: torch.device
    layout: tuple[int, ...]
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    def decode(self) -> Tensor:
        """The same numbers in new memory.

        Raises:
            ReadOnlyError: if the quantized data were written to since the forward.
        """
        qdata = self.weight.qdata
        if qdata is self.qdata and _version(qdata) != self.version:
            raise ReadOnlyError(
                f"backward: the data of {self.weight!r} have changed; got version "
                f"{_version(qdata)}, expected version {self.version} as in the "
                "forward; load weights after the backward, or run the forward again"
            )
        weight = self.weight
        if qdata.device != self.device:  # it was offloaded meanwhile
            weight = weight.map(lambda tensor: tensor.to(self.device))
        with torch.no_grad():
            dense = weight.dense(self.dtype)
            if dense.stride() != self.layout:  # by another kernel than in the forward
                same = torch.empty_strided(
                    *(dense.shape, self.layout), dtype=dense.dtype, device=dense.device
                )
                dense = same.copy_(dense)
            offset = dense.storage_offset() + self.offset
            return dense.as_strided(self.size, self.stride, offset)


@dataclasses.dataclass(frozen=True)
class _Kept:
    """Another tensor that autograd keeps, as whoever is asked next keeps it."""

    tensor: Any
    unpack: Callable[[Any], Tensor] | None
    version: int

    def get(self) -> Tensor:
        """The tensor.

        Raises:
            RuntimeError: if it was written to, as autograd itself says.
        """
        if self.unpack is not None:
            return self.unpack(self.tensor)
        tensor: Tensor = self.tensor
        if _version(tensor) != self.version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been "
                f"modified by an inplace operation: {tensor.dtype} tensor of shape "
                f"{tuple(tensor.shape)} is at version {_version(tensor)}; expected "
                f"version {self.version}"
            )
        return tensor


class _Recorder(threading.local):
    """The weights that were decoded in a forward of this thread, by their memory."""

    decoded: dict[int, _Decoded] | None = None


_RECORDER = _Recorder()


def decoded(weight: _Weight, dense: Tensor) -> None:
    """Say that a weight was decoded, in case autograd is about to keep it.

    Args:
        weight: the weight.
        dense: its value, in memory that is nobody else's.
    """
    known = _RECORDER.decoded
    if known is not None and type(dense) is Tensor:
        memory = dense.untyped_storage()._cdata
        known[memory] = _Decoded(dense, _version(dense), weight)


@contextlib.contextmanager
def tagged() -> Iterator[None]:
    """Have code that is being compiled decode again in its backward.

    What runs inside while a graph is made is tagged as the operations inside a
    checkpoint are, for the compiler would keep a decoded weight as eager code does.
    """
    traceback: Any = sys.modules.get("torch.fx.traceback")
    if traceback is None or not traceback.has_preserved_node_meta():
        yield
        return
    from torch.utils.checkpoint import CheckpointPolicy

    meta = traceback.get_current_meta()
    if "recompute" in meta:  # by a checkpoint
        yield
        return
    meta |= {"recompute": CheckpointPolicy.PREFER_RECOMPUTE, "ac_graph_id": 0}
    try:
        yield
    finally:
        del meta["recompute"], meta["ac_graph_id"]


def is_wanted(*inputs: Any) -> bool:
    """Whether autograd will keep weights of a forward, and can be told what to keep.

    Args:
        *inputs: what the forward is called with.

    Returns:
        False in compiled code, under transforms, and while something is traced.
    """
    return (
        torch.is_grad_enabled()
        and not torch.compiler.is_dynamo_compiling()
        and any(getattr(input, "requires_grad", False) for input in inputs)
        and _AUTOGRAD._saved_tensors_hooks_is_enabled()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._is_tracing()
    )


@contextlib.contextmanager
def recomputing() -> Iterator[None]:
    """Have autograd keep quantized weights in place of what they decode to.

    Whatever else is kept inside goes to the hooks outside, such as those of a
    checkpoint.
    """
    # torch 2.7 does not tell; hooks outside then see nothing of what is kept inside
    ask = getattr(_AUTOGRAD, "_top_saved_tensors_default_hooks", None)
    outer = None if ask is None else ask(True)
    outside = _RECORDER.decoded
    known: dict[int, _Decoded] = {}
    _RECORDER.decoded = known

    def pack(tensor: Tensor) -> _Again | _Kept:
        return _again(tensor, known) or _kept(tensor, outer)

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, _unpack):
            yield
    finally:
        _RECORDER.decoded = outside
        known.clear()  # the hooks live as long as the graph


def _again(tensor: Tensor, known: dict[int, _Decoded]) -> _Again | None:
    """What is kept of a tensor that is a decoded weight, or a view of one."""
    if not known or type(tensor) is not Tensor or tensor.layout != torch.strided:
        return None
    found = known.get(tensor.untyped_storage()._cdata)
    if found is None or tensor.requires_grad or tensor.dtype != found.dense.dtype:
        return None
    if _version(tensor) != found.version:  # something was added to it
        return None
    weight, dense = found.weight, found.dense
    return _Again(
        *(weight, weight.qdata, _version(weight.qdata)),
        *(dense.dtype, dense.device, dense.stride()),
        *(tuple(tensor.shape), tensor.stride()),
        int(tensor.storage_offset() - dense.storage_offset()),
    )


def _kept(tensor: Tensor, outer: Any) -> _Kept:
    if outer is None:
        return _Kept(tensor, None, _version(tensor))
    pack, unpack = outer
    return _Kept(pack(tensor), unpack, 0)


def _unpack(kept: _Again | _Kept) -> Tensor:
    return kept.decode() if isinstance(kept, _Again) else kept.get()


def _version(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version
