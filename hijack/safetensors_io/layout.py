"""Where each tensor of a safetensors file comes to lie, before anything is written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence

from hijack.errors import CheckpointError
from hijack.safetensors_io.header import TensorInfo, bits_of, bytes_of

#: Key to dtype and shape of every tensor a checkpoint will hold.
Plan = Mapping[str, TensorInfo]

#: More files than any checkpoint has; each is held open while it is written.
MAX_SHARDS = 500


@dataclasses.dataclass(frozen=True)
class Layout:
    """One file, planned.

    Attributes:
        header: the bytes before the tensors.
        places: key to the first byte and one past the last, from the file's start.
    """

    header: bytes
    places: Mapping[str, tuple[int, int]]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return max((end for _, end in self.places.values()), default=len(self.header))


def lay_out(
    plan: Plan, metadata: Mapping[str, str], order: Sequence[str] | None = None
) -> Layout:
    """Plan a file without holes.

    Widest dtype first, as safetensors itself orders, so that every tensor is aligned;
    or in the order asked for, if that does not break the alignment: readers of
    safetensors in torch refuse a tensor that is not aligned.

    Args:
        plan: key to dtype and shape; files and offsets do not count.
        metadata: strings for the header.
        order: the keys of the plan.

    Raises:
        CheckpointError: if a dtype has no name in safetensors.
    """
    if order is None or not _aligned(plan, order):
        order = sorted(plan, key=lambda k: (-(bits_of(plan[k].dtype) or 0), k))
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    ends, end = {}, 0
    for key in order:
        begin, end = end, end + _size(key, plan[key])
        ends[key] = begin, end
        table[key] = {
            "dtype": plan[key].dtype,
            "shape": list(plan[key].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    places = {key: (start + begin, start + end) for key, (begin, end) in ends.items()}
    return Layout(len(text).to_bytes(8, "little") + text, places)


def lay_out_files(
    plan: Plan,
    metadata: Mapping[str, str],
    order: Sequence[str] | None = None,
    max_shard_size: int | None = None,
) -> list[Layout]:
    """Plan one file, or as many shards as it takes; each has all of the metadata."""
    if max_shard_size is None:
        return [lay_out(plan, metadata, order)]
    layouts = []
    for shard in split(plan, max_shard_size):
        inside = None if order is None else [key for key in order if key in shard]
        layouts.append(lay_out(shard, metadata, inside))
    return layouts


def split(plan: Plan, largest: int) -> list[Plan]:
    """Cut a plan into shards, in its own order.

    Args:
        plan: key to dtype and shape.
        largest: bytes of tensors in a shard; only a single tensor may have more.

    Raises:
        CheckpointError: if there would be too many shards.
    """
    shards: list[dict[str, TensorInfo]] = [{}]
    left = largest
    for key, info in plan.items():
        if info.nbytes > left and shards[-1]:
            shards.append({})
            left = largest
        shards[-1][key] = info
        left -= info.nbytes
    if len(shards) > MAX_SHARDS:
        raise CheckpointError(
            f"max_shard_size: {largest:,} bytes give {len(shards)} files, expected at "
            f"most {MAX_SHARDS}; choose a larger one"
        )
    return [*shards]


def _size(key: str, info: TensorInfo) -> int:
    size = bytes_of(info.dtype, info.shape)
    if size is None:
        raise CheckpointError(
            f"{key}: safetensors has no name for {info.dtype} {list(info.shape)}; "
            "convert it"
        )
    return size


def _aligned(plan: Plan, order: Sequence[str]) -> bool:
    """Whether every tensor would begin at a multiple of its dtype's size."""
    end = 0
    for key in order:
        if end * 8 % (bits_of(plan[key].dtype) or 8):
            return False
        end += plan[key].nbytes
    return True
