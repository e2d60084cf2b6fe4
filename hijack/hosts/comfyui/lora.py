"""LoRAs on quantized weights, kept beside the weight instead of merged into it.

ComfyUI adds a LoRA to the dense weight. Quantizing the sum again rounds every weight
anew, which loses a small LoRA and spoils a large one. Here a quantized weight keeps
what is to be added to it: plain low-rank pairs become two small products in the
forward, anything else (DoRA, LoHa, LoKr, full differences, ...) is computed by
ComfyUI's own code on the decoded weight. The quantized data never changes, so taking a
LoRA away leaves it bit-identical.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import operator
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from hijack.quantized import QuantizedTensor

#: ``merge`` quantizes LoRAs into the weight; any other value keeps them beside it.
POLICY = "HIJACK_LORA"

#: ComfyUI's patch: strength, adapter or values, strength of the model, slice, function.
Entry = tuple[Any, ...]


class Merge(tuple[Any, ...]):
    """A patch that is to be merged into the quantized data, whatever the policy.

    It is a tuple like ComfyUI's own, so that it goes wherever patches go.
    """

    __slots__ = ()


class Patches:
    """What is to be added to one weight.

    Args:
        entries: ComfyUI's patches, in order.
        key: the weight's key, for ComfyUI's messages.
        shape: (N, K) of the weight.
        extra: further arguments of ComfyUI's ``calculate_weight``.
    """

    def __init__(
        self,
        entries: Iterable[Entry],
        key: str,
        shape: Sequence[int],
        extra: dict[str, Any] | None = None,
    ) -> None:
        entries = tuple(entries)
        self.key = key
        self.extra = extra or {}
        # Low-rank pairs after the last patch of another kind only add; before it, that
        # patch may need to see their sum.
        plain = [_low_rank(entry, shape) for entry in entries]
        others = [index for index, pair in enumerate(plain) if pair is None]
        cut = others[-1] + 1 if others else 0
        self.entries = entries
        self.dense_entries = entries[:cut]
        self.pairs = [pair for pair in plain[cut:] if pair is not None]
        self.shape = tuple(shape)
        self._moved: dict[torch.device, list[Any]] = {}
        self._ready: dict[tuple[torch.device, torch.dtype], _Ready] = {}

    def __deepcopy__(self, memo: object) -> Patches:
        # It never changes; and torch.compile compares copies with what it copied.
        return self

    def apply(self, weight: Tensor) -> Tensor:
        """The dense weight with everything added; may write into it."""
        return self._calculate(self.entries, weight)

    def apply_dense(self, weight: Tensor) -> Tensor:
        """The dense weight with what is no low-rank pair added; may write into it."""
        device = weight.device
        moved = self._moved.get(device)  # once: another thread may drop it
        if moved is None:
            moved = [_moved(entry, device) for entry in self.dense_entries]
            self._moved[device] = moved
        return self._calculate(moved, weight)

    def low_rank(
        self, device: torch.device, dtype: torch.dtype, others: tuple[Patches, ...] = ()
    ) -> tuple[Tensor, Tensor] | None:
        """All low-rank pairs as one: (R, K) down and (N, R) up, scaled.

        What is made is kept for the next forward with the same others.

        Args:
            device: where they are multiplied.
            dtype: of both.
            others: further patches of the weight, whose pairs are among them.
        """
        ready = self._ready.get((device, dtype))
        # what inference mode made lets no gradient pass
        stale = ready is not None and (
            ready.down.is_inference() and not torch.is_inference_mode_enabled()
        )
        if ready is None or stale or not _are(ready.others, others):
            pairs = [
                pair.full(self.shape, device)
                for patches in (self, *others)
                for pair in patches.pairs
            ]
            if not pairs:
                return None
            down = torch.cat([down for down, _ in pairs], 0).to(dtype)
            up = torch.cat([up for _, up in pairs], 1).to(dtype)
            ready = self._ready[device, dtype] = _Ready(others, down, up)
        return ready.down, ready.up

    def drop_copies(self) -> None:
        """Forget those copies; the next forward makes them again."""
        self._moved.clear()
        self._ready.clear()

    def _calculate(self, entries: Sequence[Entry], weight: Tensor) -> Tensor:
        if not entries:
            return weight
        calculate: Callable[..., Tensor] = sys.modules["comfy.lora"].calculate_weight
        return calculate(entries, weight, self.key, **self.extra)


class _Ready(NamedTuple):
    """Low-rank pairs where a forward needs them."""

    others: tuple[Patches, ...]
    down: Tensor
    up: Tensor


def _are(some: tuple[Patches, ...], others: tuple[Patches, ...]) -> bool:
    """Whether these are the same objects."""
    return len(some) == len(others) and all(map(operator.is_, some, others))


@dataclasses.dataclass(frozen=True)
class Pair:
    """One plain LoRA: ``up @ down * scale`` on a slice of the weight."""

    up: Tensor
    down: Tensor
    scale: float
    offset: tuple[int, int, int] | None

    def full(self, shape: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Down and up in float32, padded with zeros to the whole weight's shape."""
        up = self.up.to(device, torch.float32).flatten(1) * self.scale
        down = self.down.to(device, torch.float32).flatten(1)
        if self.offset is None:
            return down, up
        dim, start, length = self.offset
        padding = (start, shape[dim] - start - length)
        if dim == 0:
            return down, torch.nn.functional.pad(up, (0, 0, *padding))
        return torch.nn.functional.pad(down, padding), up


def _low_rank(entry: Entry, shape: Sequence[int]) -> Pair | None:
    """The pair, if a patch is nothing but a low-rank sum."""
    strength, adapter, strength_model, offset, function = entry[:5]
    plain = sys.modules["comfy.weight_adapter"].LoRAAdapter
    weights: Sequence[Any] = getattr(adapter, "weights", ())
    if type(adapter) is not plain or len(weights) != 6:
        return None
    up, down, alpha, *unusual = weights
    if (
        function is not None
        or strength_model != 1.0
        or any(part is not None for part in unusual)
    ):
        return None
    rows, columns = shape
    if offset is not None:
        rows, columns = (
            offset[2] if dim == offset[0] else n for dim, n in enumerate(shape)
        )
    fits = (up.shape[0], up[0].numel()) == (rows, down.shape[0])
    if not fits or down[0].numel() != columns:
        return None
    scale = strength * (1.0 if alpha is None else alpha / down.shape[0])
    return Pair(up, down, float(scale), offset)


def _moved(entry: Entry, device: torch.device) -> Entry:
    """A patch with its adapter on a device, so that no forward moves it again.

    Another model's weight, or a difference of that size, stays where it is: ComfyUI
    moves it at each use, and has set no room aside for it.
    """
    strength, adapter, *rest = entry
    if not isinstance(adapter, sys.modules["comfy.weight_adapter"].WeightAdapterBase):
        return entry
    moved = copy.copy(adapter)
    moved.weights = tree_map_only(Tensor, lambda t: t.to(device), adapter.weights)
    return (strength, moved, *rest)


# -- ComfyUI's functions ---------------------------------------------------------------


def make_calculate_weight(original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of ``comfy.lora.calculate_weight``.

    Quantized layers convert their weight for it to a `QuantizedTensor`, which any other
    code may use as the dense weight.
    """

    @functools.wraps(original)
    def calculate_weight(
        patches: Any, weight: Any, key: str, *args: Any, **kwargs: Any
    ) -> Any:
        if not isinstance(weight, QuantizedTensor) or not patches:
            return original(patches, weight, key, *args, **kwargs)
        resized = _resizes(patches)
        merged = [p for p in patches if resized or isinstance(p, Merge) or merging()]
        kept = [p for p in patches if not any(p is other for other in merged)]
        if merged:
            dense = original(merged, weight.value(torch.float32), key, *args, **kwargs)
            if resized:
                return dense
            weight = weight.requantized(dense, seed_of(key))
        if not kept:
            return weight
        # ComfyUI takes each weight out of it once it has gone through here, but these
        # patches are applied in every forward.
        found = kwargs.get("original_weights") or {}
        extra = {"original_weights": {key: found[key]}} if key in found else {}
        patches = Patches(kept, key, weight.shape, extra)
        return weight.replace(additions=(*weight.additions, patches))

    return calculate_weight


def make_copy_to_param(original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of ``comfy.utils.copy_to_param``.

    It writes a backup over a parameter's memory. A quantized weight is replaced
    instead: its memory may be the file, and what belongs to it is not in one tensor.
    """

    @functools.wraps(original)
    def copy_to_param(obj: Any, attr: str, value: Any, *args: Any) -> Any:
        path, _, name = attr.rpartition(".")
        owner = functools.reduce(getattr, path.split("."), obj) if path else obj
        if name == "weight" and hasattr(owner, "take_weight"):
            owner.take_weight(value)
            return None
        return original(obj, attr, value, *args)

    return copy_to_param


def merging() -> bool:
    """Whether LoRAs are merged into the quantized data unless a node says otherwise."""
    return os.environ.get(POLICY, "").strip().lower() == "merge"


def seed_of(key: str) -> int:
    """The seed ComfyUI rounds a weight of that key with."""
    for name in ("comfy.utils", "comfy.model_patcher"):
        seed = getattr(sys.modules.get(name), "string_to_seed", None)
        if seed is not None:
            return int(seed(key))
    return 0


def _resizes(patches: Iterable[Entry]) -> bool:
    """Whether a patch gives the weight another shape."""
    for entry in patches:
        adapter = entry[1]
        weights = getattr(adapter, "weights", None)
        if isinstance(weights, tuple | list) and len(weights) == 6:
            if type(adapter).__name__ == "LoRAAdapter" and weights[5] is not None:
                return True
        elif isinstance(adapter, tuple) and len(adapter) == 2:
            values = adapter[1]
            if len(values) > 1 and isinstance(values[1], dict):
                return bool(values[1].get("pad_weight"))
    return False
