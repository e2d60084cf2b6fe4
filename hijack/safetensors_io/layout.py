"""Plan the layout of a safetensors file before anything is written."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence

from hijack.errors import CheckpointError
from hijack.safetensors_io.header import TensorInfo, bits_of, bytes_of

#: Key to dtype and shape of every tensor a checkpoint will hold.
Plan = Mapping[str, TensorInfo]

#: More files than any checkpoint has; each is open while it is written.
MAX_SHARDS = 500


@dataclasses.dataclass(frozen=True)
class FileLayout:
    """The layout of one file.

    Attributes:
        header: the bytes before the tensors.
        offsets: key to the first byte and one past the last, from the file's start.
    """

    header: bytes
    offsets: Mapping[str, tuple[int, int]]

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return max((end for _, end in self.offsets.values()), default=len(self.header))


def plan_file(
    plan: Plan, metadata: Mapping[str, str], order: Sequence[str] | None = None
) -> FileLayout:
    """Plan a file without holes.

    The widest dtype comes first, as safetensors itself orders, so that every tensor is
    aligned. Another order is used if it keeps the alignment: safetensors in torch
    refuses unaligned tensors.

    Args:
        plan: key to dtype and shape; files and offsets are ignored.
        metadata: strings for the header.
        order: the keys of the plan.

    Raises:
        CheckpointError: if a dtype has no name in safetensors.
    """
    if order is None or not _aligned(plan, order):
        order = sorted(plan, key=lambda k: (-(bits_of(plan[k].dtype) or 0), k))
    table: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    ranges, end = {}, 0
    for key in order:
        begin, end = end, end + _size(key, plan[key])
        ranges[key] = begin, end
        table[key] = {
            "dtype": plan[key].dtype,
            "shape": list(plan[key].shape),
            "data_offsets": [begin, end],
        }
    text = json.dumps(table, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    offsets = {key: (start + a, start + b) for key, (a, b) in ranges.items()}
    return FileLayout(len(text).to_bytes(8, "little") + text, offsets)


def plan_files(
    plan: Plan,
    metadata: Mapping[str, str],
    order: Sequence[str] | None = None,
    max_shard_size: int | None = None,
) -> list[FileLayout]:
    """Plan one file, or shards; each shard has all of the metadata."""
    if max_shard_size is None:
        return [plan_file(plan, metadata, order)]
    layouts = []
    for shard in split(plan, max_shard_size):
        shard_order = None if order is None else [key for key in order if key in shard]
        layouts.append(plan_file(shard, metadata, shard_order))
    return layouts


def split(plan: Plan, max_size: int) -> list[Plan]:
    """Split a plan into shards, keeping its order.

    Args:
        plan: key to dtype and shape.
        max_size: bytes of tensors in a shard; only a single tensor may be larger.

    Raises:
        CheckpointError: if there would be too many shards.
    """
    shards: list[dict[str, TensorInfo]] = [{}]
    room = max_size
    for key, info in plan.items():
        if info.nbytes > room and shards[-1]:
            shards.append({})
            room = max_size
        shards[-1][key] = info
        room -= info.nbytes
    if len(shards) > MAX_SHARDS:
        raise CheckpointError(
            f"max_shard_size: {max_size:,} bytes give {len(shards)} files, expected at "
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
