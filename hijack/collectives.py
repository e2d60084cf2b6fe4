"""Collectives of torch.distributed with quantized weights and their shards.

A process sends the quantized data, as bytes where numbers of their dtype are not sent
(gloo moves no FP8), and the scheme's other tensors. What is gathered whole is the
quantized weight again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.utils._pytree import tree_map_only

from hijack.errors import CheckpointError
from hijack.quantized import OPERATIONS
from hijack.sharding import SHARD_OPERATIONS, QuantizedShard, shard_of
from hijack.stored import reduced

aten = torch.ops.aten


class GatheredShard(QuantizedShard):
    """What processes have gathered; padding, or another order, may be in it yet."""

    def replace(self, **changes: Any) -> QuantizedShard:
        """The same but for some fields."""
        other = super().replace(**changes)
        return GatheredShard(other.qdata, other.weight, tuple(other.shape))

    def whole(self) -> Tensor:
        """The weight, if this is all of it."""
        if self.shape == self.weight.shape:
            return self.weight.replace(qdata=self.qdata)
        return self


class ShardedCodes(Tensor):
    """Quantized data in the state dict of a sharded model, which are sent as bytes.

    All else that is done with it is done with the plain data.

    Attributes:
        codes: the plain data.
    """

    codes: Tensor

    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, codes: Tensor) -> ShardedCodes:
        self: ShardedCodes = torch.Tensor._make_wrapper_subclass(
            cls, codes.shape, dtype=codes.dtype, device=codes.device
        )
        self.codes = codes
        return self

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"ShardedCodes({self.codes!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        return reduced(self.codes, protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> ShardedCodes:
        return ShardedCodes(self.codes.clone())

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if func is _all_gather:
            return gather(args[0].codes, *args[1:])
        args, kwargs = tree_map_only(
            ShardedCodes, lambda each: each.codes, (args, kwargs or {})
        )
        result = func(*args, **kwargs)
        return ShardedCodes(result) if func in _STILL_CODES else result


#: What torch does to a part before it is sent.
_STILL_CODES = {
    *(aten.view.default, aten.detach.default, aten.alias.default),
    aten.constant_pad_nd.default,
}


def as_bytes(tensor: Tensor) -> Tensor:
    """A tensor as one that every backend sends."""
    narrow_float = tensor.is_floating_point() and tensor.element_size() == 1
    return tensor.view(torch.uint8) if narrow_float else tensor


def gather(tensor: Tensor, size: int, group: Any) -> Tensor:
    """The tensors of all processes, one after another.

    Args:
        tensor: of the same shape in each.
        size: how many processes there are.
        group: their group, or its name.
    """
    functional = torch.ops._c10d_functional
    sent = functional.all_gather_into_tensor(as_bytes(tensor).contiguous(), size, group)
    return functional.wait_tensor(sent).view(tensor.dtype)  # type: ignore[no-any-return]


# -- state dicts -----------------------------------------------------------------------


def distributed_data(weight: Any) -> Tensor:
    """The quantized data of a sharded weight, distributed as the weight is.

    Args:
        weight: a DTensor of shards.
    """
    from torch.distributed.tensor import DTensor

    shard: Any = shard_of(weight)
    whole = shard.weight.qdata
    data: Tensor = DTensor.from_local(
        ShardedCodes(shard.qdata),
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=whole.shape,
        stride=whole.stride(),
    )
    return data


def load_shard(shard: QuantizedShard, tensors: dict[str, Tensor], where: str) -> None:
    """Write the tensors of a distributed state dict into a shard.

    Args:
        shard: of this process.
        tensors: name to tensor; ``weight`` is distributed, the others are whole.
        where: the layer, for messages.

    Raises:
        CheckpointError: if they are of another kind.
    """
    data = getattr(tensors["weight"], "_local_tensor", None)
    data = data.codes if isinstance(data, ShardedCodes) else data
    fits = data is not None and (data.shape, data.dtype) == (
        shard.qdata.shape,
        shard.qdata.dtype,
    )
    if not fits or not tensors.keys() >= shard.weight.params.keys():
        raise CheckpointError(
            f"{where}: got tensors that do not fit a sharded quantized weight, "
            f"expected a DTensor of {shard.qdata.dtype} under weight and whole "
            f"{', '.join(shard.weight.params)}; load before sharding, or take "
            "a state dict of the sharded model"
        )
    with torch.no_grad():
        shard.qdata.copy_(data)  # type: ignore[arg-type]
        for name, param in shard.weight.params.items():
            given = tensors[name]
            param.copy_(getattr(given, "_local_tensor", given))


# -- details ---------------------------------------------------------------------------


def _gather_shards(shard: QuantizedShard, size: int, group: Any) -> Tensor:
    # which torch defines in Python, when it first gathers
    wraps = getattr(torch.ops._c10d_functional, "_wrap_tensor_autograd", None)
    if wraps is not None:
        OPERATIONS[wraps.default] = SHARD_OPERATIONS[wraps.default] = _same
    qdata = gather(shard.qdata, size, group)
    shape = (shard.shape[0] * size, *shard.shape[1:])
    return GatheredShard(qdata, shard.weight, shape).whole()


def _same(tensor: Tensor) -> Tensor:
    return tensor  # it has been waited for


def _pad(shard: QuantizedShard, padding: Sequence[int], value: float = 0) -> Tensor:
    """Fill up a shard at its end, so that all processes send as much."""
    shape, qdata, whole = list(shard.shape), shard.qdata, shard.weight
    first = len(shape) - len(padding) // 2  # padding begins with the last dimension
    for dim, end in enumerate(reversed(padding[1::2]), first):
        if not end:
            continue
        added = list(qdata.shape)
        added[dim] = end * whole.qdata.shape[dim] // whole.shape[dim]
        qdata = torch.cat([qdata, qdata.new_zeros(added)], dim)
        shape[dim] += end
    return shard.replace(qdata=qdata, shape=tuple(shape))  # the part is what it was


def _cat(shards: Sequence[Tensor], dim: int = 0) -> Tensor:
    """Put gathered columns together."""
    parts: list[Any] = list(shards)
    if not all(isinstance(part, GatheredShard) for part in parts):
        decoded = [
            part.quantized().value() if isinstance(part, QuantizedShard) else part
            for part in parts
        ]
        return torch.cat(decoded, dim)
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)
    qdata = torch.cat([part.qdata for part in parts], dim)
    return parts[0].replace(qdata=qdata, shape=tuple(shape)).whole()  # type: ignore[no-any-return]


def _broadcast(tensors: list[Any], *args: Any, **kwargs: Any) -> Any:
    """Write the weights of one process into those of the others."""
    inner = [t for weight in tensors for t in weight.plain_tensors().values()]
    *others, work = [
        torch.ops.c10d.broadcast_([as_bytes(tensor)], *args, **kwargs)[1]
        for tensor in inner
    ]
    for each in others:
        each.wait()
    return tensors, work


def _bounds(shard: QuantizedShard) -> Tensor:
    """First and last element of a part in each dimension, as numbers to send."""
    part = shard.part or (slice(-1, -1),) * shard.dim()
    return torch.tensor([[each.start, each.stop] for each in part])


def _scatter(
    outputs: list[Any], inputs: list[list[Any]], group: Any, root: int, *args: Any
) -> Any:
    """Send each process its part of the quantized data, and all of the rest."""
    (output,), parts = outputs, inputs[0] if inputs else []
    bounds = torch.full((output.dim(), 2), -1, device=output.qdata.device)
    known = [[_bounds(part).to(bounds.device) for part in parts]] if parts else []
    torch.ops.c10d.scatter_([bounds], known, group, root, *args)[1].wait()
    # it was made like the first one's
    output.part = tuple(slice(*each) for each in bounds.tolist())
    if any(each.stop < 0 for each in output.part):
        output.part = None
    for name, tensor in output.weight.params.items():
        if parts:
            tensor.copy_(parts[0].weight.params[name])
        sent = torch.ops.c10d.broadcast_([as_bytes(tensor)], group, root, 0, *args)
        sent[1].wait()
    data = [[as_bytes(part.qdata.contiguous()) for part in parts]] if parts else []
    work = torch.ops.c10d.scatter_([as_bytes(output.qdata)], data, group, root, *args)
    return outputs, work[1]


if torch.distributed.is_available():
    _all_gather = torch.ops._c10d_functional.all_gather_into_tensor.default
    OPERATIONS[torch.ops.c10d.broadcast_.default] = _broadcast
    SHARD_OPERATIONS[_all_gather] = _gather_shards
    wait = torch.ops._c10d_functional.wait_tensor.default
    OPERATIONS[wait] = SHARD_OPERATIONS[wait] = _same
    SHARD_OPERATIONS[torch.ops.c10d.scatter_.default] = _scatter
    SHARD_OPERATIONS[aten.constant_pad_nd.default] = _pad
    SHARD_OPERATIONS[aten.cat.default] = _cat
