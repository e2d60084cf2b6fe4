"""`QuantizedShard`: the part of a quantized weight that one of many processes holds.

FSDP2 leaves each process some rows of every weight and gathers them for a forward.
Tensor parallelism leaves it rows or columns, and computes with them. Both cut a tensor
with ``chunk``, as anybody may; so a quantized weight looks who asks, and gives torch's
distributed code shards, everybody else decoded parts. A shard holds its part of the
quantized data, and the scheme's other tensors whole, which are small.

FSDP gathers the quantized data, FP8 as bytes because gloo moves no FP8, and makes the
weight of it again. A shard of tensor parallelism decodes by itself if its scheme can
(`Scheme.params_of_part`); other shards refuse to.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from hijack.errors import HijackError, ReadOnlyError, SchemeError
from hijack.quantized import (
    FACTORIES,
    OPERATIONS,
    QuantizationConfig,
    QuantizedTensor,
    compute,
    new_tensor,
)

aten = torch.ops.aten

#: First and last element in each dimension of the whole weight.
Part = tuple[slice, ...]


class QuantizedShard(Tensor):
    """Some rows, or columns, of the data of a quantized weight.

    Its shape and dtype are those of the same part of the dense weight.

    Attributes:
        qdata: the part of the quantized data.
        weight: what the whole weight is, with data on meta.
        part: which part it is; None if only the process group knows.
        gathered: which part FSDP gathers; None is the whole weight.
    """

    qdata: Tensor
    weight: QuantizedTensor
    part: Part | None
    gathered: Part | None

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls,
        qdata: Tensor,
        weight: QuantizedTensor,
        shape: Sequence[int],
        part: Part | None = None,
        gathered: Part | None = None,
    ) -> QuantizedShard:
        with torch.inference_mode(False):
            self: QuantizedShard = torch.Tensor._make_wrapper_subclass(
                cls, tuple(shape), dtype=weight.dtype, device=qdata.device
            )
        self.qdata, self.weight = qdata, weight
        self.part, self.gathered = part, gathered
        return self

    def replace(self, **changes: Any) -> QuantizedShard:
        """The same but for some of the constructor's arguments."""
        fields: dict[str, Any] = {
            "qdata": self.qdata,
            "weight": self.weight,
            "shape": tuple(self.shape),
            "part": self.part,
            "gathered": self.gathered,
        }
        return QuantizedShard(**{**fields, **changes})

    def whole(self) -> Tensor:
        """The weight, if this was gathered and is all of it; else the shard."""
        return self

    def map(self, function: Callable[[Tensor], Tensor]) -> QuantizedShard:
        """Apply a function that moves or copies to every tensor inside."""
        params = {name: function(t) for name, t in self.weight.params.items()}
        weight = self.weight.replace(params=params)
        return self.replace(qdata=function(self.qdata), weight=weight)

    def quantized(self) -> QuantizedTensor:
        """The part as a weight of its own.

        Raises:
            SchemeError: if it cannot be decoded without the other parts.
        """
        params = None if self.part is None else params_of_part(self.weight, self.part)
        if params is None:
            raise SchemeError(
                f"{self!r}: cannot be decoded without the other parts; got a part of a "
                f"{self.weight.scheme.name} weight, expected the whole; gather it "
                "first, or leave the layer dense"
            )
        return self.weight.replace(
            qdata=self.qdata, params=params, shape=tuple(self.shape)
        )

    def data_ptr(self) -> int:
        """Address of the quantized data."""
        return self.qdata.data_ptr()

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return (
            f"QuantizedShard({self.weight.scheme.name}, shape={tuple(self.shape)}, of "
            f"{tuple(self.weight.shape)}, dtype={self.dtype}, device={self.device})"
        )

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return ["qdata", "weight"], (self.part, self.gathered)

    @staticmethod
    def __tensor_unflatten__(inner: Any, context: Any, size: Any, stride: Any) -> Any:
        return QuantizedShard(inner["qdata"], inner["weight"], tuple(size), *context)

    # -- FSDP --------------------------------------------------------------------------

    def fsdp_pre_all_gather(
        self, mesh: Any, size: Any, stride: Any, module: Any, policy: Any
    ) -> tuple[tuple[Tensor, ...], Any]:
        """What to gather, of as many rows in each process."""
        data = self.qdata
        if data.element_size() == 1:
            data = data.view(torch.uint8)
        rows = -(-size[0] // mesh.size())
        missing = rows * _each(self.weight) - len(data)
        if missing:
            data = torch.cat([data, data.new_zeros((missing, *data.shape[1:]))])
        sent = data.numel()
        if size[0] % mesh.size() and data.shape != (rows, *size[1:]):
            # of uneven rows FSDP gathers what is of the dense shape, or nothing
            filled = data.new_zeros(rows * math.prod(size[1:]))
            filled[:sent] = data.reshape(-1)
            data = filled.view(rows, *size[1:])
        return (data,), (size, sent, mesh.size())

    def fsdp_post_all_gather(
        self,
        outputs: tuple[Tensor, ...],
        metadata: Any,
        param_dtype: torch.dtype,
        *,
        out: Tensor | None = None,
    ) -> tuple[Tensor, tuple[Tensor, ...]] | None:
        """The weight of what was gathered; it shares the memory of it."""
        (data,), (size, sent, processes) = outputs, metadata
        count, rest = size[0] * _each(self.weight), self.qdata.shape[1:]
        parts = data.view(processes, -1)
        filled = parts.shape[1] != sent
        if out is not None:
            if filled:
                held: Any = out
                gathered = parts[:, :sent].reshape(-1, *rest)[:count]
                qdata = held.qdata
                # a backward asks whether they have changed, which they have not
                autograd: Any = torch.autograd
                with autograd._unsafe_preserve_version_counter(qdata):
                    qdata.view(gathered.dtype).copy_(gathered)
            return None  # else it has been gathered into
        data = parts[:, :sent].reshape(-1, *rest)[:count]
        qdata = data.view(self.weight.qdata.dtype)
        inner = (data,) if filled else ()
        weight = self.weight.replace(dtype=param_dtype)
        if self.gathered is not None:
            return QuantizedShard(qdata, weight, size, self.gathered), inner
        return weight.replace(qdata=qdata), inner

    # -- operations --------------------------------------------------------------------

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        special = SHARD_OPERATIONS.get(func)
        if special is not None:
            return special(*args, **kwargs)
        if func.overloadpacket in FACTORIES:
            return new_tensor(func, *args, **kwargs)
        if func._schema.is_mutable or func.namespace == "c10d":
            raise ReadOnlyError(
                f"{func}: cannot write to a part of a quantized weight; got a write, "
                "expected one to a dense weight; call hijack.unwrap before sharding"
            )
        args, kwargs = tree_map_only(
            QuantizedShard, lambda shard: shard.quantized().value(), (args, kwargs)
        )
        return func(*args, **kwargs)


# -- cutting ---------------------------------------------------------------------------


def params_of_part(weight: QuantizedTensor, part: Part) -> dict[str, Tensor] | None:
    """The parameters that decode a part of a weight by itself.

    Where the scheme does not say, each is cut as the weight is, or the same for every
    part. Which of them, their shapes do not tell, so it is tried, on a random weight.

    Args:
        weight: the whole weight; its data may be on meta.
        part: first and last element in each dimension.

    Returns:
        Parameters of the part; None if parts cannot be decoded alone.
    """
    shape = tuple(weight.shape)
    params = weight.scheme.params_of_part(weight.params, shape, part)
    if params is not None:
        return params
    kinds = tuple((name, t.shape, t.dtype) for name, t in weight.params.items())
    bounds = tuple((span.start, span.stop) for span in part)
    kept = _kept_whole(weight.config, shape, bounds, kinds)
    return None if kept is None else _cut_params(weight.params, shape, part, kept)


@functools.lru_cache(maxsize=4096)
def _kept_whole(
    config: QuantizationConfig,
    shape: tuple[int, ...],
    bounds: tuple[tuple[int, int], ...],
    kinds: tuple[Any, ...],
) -> frozenset[str] | None:
    """The parameters that are the same for a part as for the whole.

    Returns:
        Their names; None if a part does not decode, whatever is done with them.
    """
    part = tuple(slice(*each) for each in bounds)
    generator = torch.Generator().manual_seed(0)
    dense = torch.randn(shape, generator=generator, device="cpu")
    try:
        with torch.no_grad():
            qdata, params = config.scheme.quantize(dense, **dict(config.options))
    except HijackError:
        return None
    cut = _cut(qdata, shape, part)
    if cut is None or kinds != tuple((n, t.shape, t.dtype) for n, t in params.items()):
        return None
    expected = QuantizedTensor(qdata, params, config, shape).dense()[part]
    names = [name for name, tensor in params.items() if tensor.dim()]
    for count in range(len(names) + 1):
        for kept in map(frozenset, itertools.combinations(names, count)):
            if _decodes(config, cut, _cut_params(params, shape, part, kept), expected):
                return kept
    return None


def _decodes(
    config: QuantizationConfig,
    qdata: Tensor,
    params: dict[str, Tensor] | None,
    expected: Tensor,
) -> bool:
    if params is None:
        return False
    try:
        weight = QuantizedTensor(qdata, params, config, tuple(expected.shape))
        return torch.equal(weight.dense(), expected)
    except Exception:  # a scheme that cannot decode it says so in its own way
        return False


def _cut_params(
    params: Mapping[str, Tensor],
    shape: tuple[int, ...],
    part: Part,
    kept: frozenset[str],
) -> dict[str, Tensor] | None:
    cut = {n: t if n in kept else _cut(t, shape, part) for n, t in params.items()}
    return None if None in cut.values() else cut  # type: ignore[return-value]


def _cut(tensor: Tensor, shape: Sequence[int], part: Part) -> Tensor | None:
    """The entries of a tensor for a part of the weight; None if no border is there."""
    for dim, span in enumerate(part):
        length = span.stop - span.start
        if length == shape[dim]:
            continue
        narrowed = _narrowed(tensor, shape, dim, span.start, length)
        if narrowed is None:
            return None
        tensor = narrowed
    return tensor.contiguous()


def _narrowed(
    tensor: Tensor, shape: Sequence[int], dim: int, start: int, length: int
) -> Tensor | None:
    """The entries for a range of a weight's dimension, of which each may have several.

    Several elements of the weight may share an entry too. A tensor that is the same for
    the whole dimension stays as it is.
    """
    if dim >= tensor.dim() or tensor.shape[dim] == 1 != shape[dim]:
        return tensor
    entries, elements = tensor.shape[dim], shape[dim]
    if not elements or (start * entries) % elements or (length * entries) % elements:
        return None if length else tensor.narrow(dim, 0, 0)
    return tensor.narrow(dim, start * entries // elements, length * entries // elements)


def _each(weight: QuantizedTensor) -> int:
    """How many entries of the quantized data a row of the weight has."""
    return len(weight.qdata) // len(weight)


def shard_of(weight: Any) -> QuantizedShard | None:
    """The shard that a distributed parameter holds here, or None."""
    local = getattr(weight, "_local_tensor", None)
    return local if isinstance(local, QuantizedShard) else None


# -- details ---------------------------------------------------------------------------


def _asked_by_torch() -> str:
    """The module of torch's distributed code that called an operation, or ""."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        name = str(frame.f_globals.get("__name__", ""))
        if not name.startswith(("hijack", "torch._", "torch.utils")):
            return name if name.startswith("torch.distributed.") else ""
        frame = frame.f_back
    return ""


def _split(weight: Any, size: int, dim: int = 0) -> Any:
    """Shards for torch's distributed code, decoded parts for everybody else."""
    if isinstance(weight, QuantizedTensor):
        if not _asked_by_torch():
            return compute(aten.split.Tensor, weight, size, dim)
        if weight.additions:
            raise SchemeError(
                f"{weight!r}: got a weight with additions, expected one without; "
                "remove them before sharding"
            )
        part = tuple(slice(0, length) for length in weight.shape)
        whole = weight.replace(qdata=weight.qdata.to("meta"))
        weight = QuantizedShard(weight.qdata, whole, weight.shape, part)
        alone = _asked_by_torch().startswith("torch.distributed.tensor")
    else:
        alone = False
    shape, dim = weight.shape, dim % weight.dim()
    shards = []
    for start in range(0, shape[dim], size):
        length = min(size, shape[dim] - start)
        qdata = _narrowed(weight.qdata, shape, dim, start, length)
        here: Any = _within(weight.part, dim, start, length)
        if qdata is None or qdata.shape == weight.qdata.shape != shape:
            qdata = None if length != shape[dim] else weight.qdata
        if qdata is None or (alone and params_of_part(weight.weight, here) is None):
            raise SchemeError(
                f"{weight!r}: cannot be cut along dimension {dim} at {start} and "
                f"{start + length}; got quantized data of shape "
                f"{tuple(weight.qdata.shape)}, expected a border there; leave the "
                "layer dense"
            )
        size_here = (*shape[:dim], length, *shape[dim + 1 :])
        shards.append(weight.replace(qdata=qdata, shape=size_here, part=here))
    return shards


def _within(part: Part | None, dim: int, start: int, length: int) -> Part | None:
    if part is None:
        return None
    first = part[dim].start + start
    return (*part[:dim], slice(first, first + length), *part[dim + 1 :])


def _new_zeros(weight: Any, size: Sequence[int], **kwargs: Any) -> Tensor:
    """What FSDP copies its shard into, or zeros."""
    fsdp = _asked_by_torch().startswith("torch.distributed.fsdp")
    if not fsdp or tuple(size[1:]) != tuple(weight.shape[1:]):
        return new_tensor(aten.new_zeros.default, weight, size, **kwargs)  # type: ignore[no-any-return]
    known = weight if isinstance(weight, QuantizedTensor) else weight.weight
    rows = size[0] * _each(known)
    qdata = weight.qdata.new_zeros((rows, *weight.qdata.shape[1:]))
    if isinstance(weight, QuantizedTensor):
        whole = weight.replace(qdata=weight.qdata.to("meta"))
        return QuantizedShard(qdata, whole, size)
    gathered = weight.gathered if weight.part is None else weight.part
    return QuantizedShard(qdata, weight.weight, size, None, gathered)


def _slice(
    shard: QuantizedShard,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Tensor:
    first, last, _ = slice(start, end).indices(shard.shape[dim])
    length = max(last - first, 0)
    qdata = _narrowed(shard.qdata, shard.shape, dim, first, length)
    if step != 1 or qdata is None:
        return aten.slice.Tensor(shard.quantized().value(), dim, start, end, step)  # type: ignore[no-any-return]
    shape = (*shard.shape[:dim], length, *shard.shape[dim + 1 :])
    part = _within(shard.part, dim, first, length)
    return shard.replace(qdata=qdata, shape=shape, part=part).whole()


def _view(shard: QuantizedShard, size: Sequence[int]) -> Tensor:
    if tuple(size) == tuple(shard.shape):
        # a DTensor is made a tensor; of one process alone it is all there is
        complete = shard.shape == shard.weight.shape
        if complete and _asked_by_torch() == "torch.distributed.tensor._api":
            return shard.weight.replace(qdata=shard.qdata)
        return shard.replace()
    if list(size) != [-1] or not _asked_by_torch():
        return shard.quantized().value().view(tuple(size))
    # FSDP keeps it beside the shard and never reads it
    return shard.replace(qdata=shard.qdata.view(-1), shape=(shard.numel(),), part=None)


def _as_strided(
    weight: Any, size: Sequence[int], stride: Sequence[int], offset: int | None = None
) -> Tensor:
    whole = tuple(size) == tuple(weight.shape) and not offset
    if whole and tuple(stride) == weight.stride():
        return weight.replace()  # type: ignore[no-any-return]
    if isinstance(weight, QuantizedShard):
        weight = weight.quantized()
    return compute(aten.as_strided.default, weight, size, stride, offset)  # type: ignore[no-any-return]


def _copy_(target: Any, source: Any, non_blocking: bool = False) -> Any:
    if not isinstance(target, QuantizedShard):
        return target.copy_(source.quantized().value(), non_blocking=non_blocking)
    if not isinstance(source, QuantizedShard):
        raise ReadOnlyError(
            f"copy_: cannot write to {target!r}; got a dense tensor, expected a shard; "
            "call hijack.unwrap before sharding"
        )
    target.qdata.copy_(source.qdata, non_blocking=non_blocking)
    return target


def _to_copy(shard: QuantizedShard, **kwargs: Any) -> Tensor:
    dtype, device = kwargs.get("dtype"), kwargs.get("device")
    if dtype is not None and not dtype.is_floating_point:
        return shard.quantized().value().to(dtype=dtype, device=device)
    moved = shard.map(lambda t: t.to(device=device or t.device, copy=True))
    weight = moved.weight.replace(dtype=dtype or shard.dtype)
    return moved.replace(weight=weight)


def _empty_like(shard: QuantizedShard, **kwargs: Any) -> Tensor:
    device = kwargs.get("device")
    return shard.map(lambda t: torch.empty_like(t, device=device or t.device))


def _same(shard: QuantizedShard, *_: Any, **__: Any) -> QuantizedShard:
    return shard.replace()


#: What shards do else than compute; collectives are added to it.
SHARD_OPERATIONS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.clone.default: lambda shard, **_: shard.map(
        lambda t: t.clone(memory_format=torch.contiguous_format)
    ),
    aten._to_copy.default: _to_copy,
    aten.empty_like.default: _empty_like,
    aten.copy_.default: _copy_,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.new_zeros.default: _new_zeros,
    aten.view.default: _view,
    aten.as_strided.default: _as_strided,
    aten._pin_memory.default: lambda shard, *_: shard.map(Tensor.pin_memory),
    aten.is_pinned.default: lambda shard, *_: shard.qdata.is_pinned(),
}
OPERATIONS[aten.split.Tensor] = _split
OPERATIONS[aten.new_zeros.default] = _new_zeros
OPERATIONS[aten.as_strided.default] = _as_strided
