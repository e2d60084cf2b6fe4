"""Merge LoRA files into the weights of a checkpoint before they are quantized."""

from __future__ import annotations

import dataclasses
import functools
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from hijack.errors import CheckpointError
from hijack.lora.alpha import alpha_scale, read_peft_config
from hijack.lora.delta import (
    UNSUPPORTED,
    check_parts,
    check_shapes,
    delta_shape,
    merge,
    split_key,
    take_rows,
)
from hijack.lora.unmatched import unmatched_message
from hijack.naming.resolver import LayerNames, Piece, Span
from hijack.safetensors_io.header import Header, TensorInfo
from hijack.safetensors_io.reader import open_tensors, read_header

#: Parts that do not count towards the difference of the weight.
_SEPARATE = frozenset({"bias", "up_bias", "alpha"})
#: A LoRA file, with its strength behind a colon or as a pair.
Spec = str | os.PathLike[str] | tuple[str | os.PathLike[str], float]


def parse_loras(specs: Spec | Iterable[Spec] | None) -> list[tuple[Path, float]]:
    """Files and strengths of LoRAs; a single one needs no list.

    Raises:
        CheckpointError: as for `parse_lora`.
    """
    if specs is None:
        return []
    if isinstance(specs, str | os.PathLike) or _is_pair(specs):
        return [parse_lora(specs)]
    # a TypeGuard says nothing of what is left
    return [parse_lora(spec) for spec in specs]  # type: ignore[arg-type]


def parse_lora(spec: Spec) -> tuple[Path, float]:
    """File and strength of ``"file.safetensors:0.8"``; the default strength is 1.

    Raises:
        CheckpointError: if the strength is not a finite number.
    """
    value: object = 1.0
    if isinstance(spec, tuple) and len(spec) == 2:
        path, value = Path(spec[0]), spec[1]
    elif not isinstance(spec, str | os.PathLike):
        raise CheckpointError(
            f"loras: got {spec!r}, expected a file, 'file.safetensors:0.8', or (file, "
            "strength)"
        )
    else:
        path = Path(spec)
        match = re.fullmatch(r"(.+):([^:/\\]*)", os.fspath(spec))
        if match and not os.path.exists(path):  # which never raises
            drive = len(match[1]) == 1 and math.isnan(_number(match[2]))
            path, value = (path, 1.0) if drive else (Path(match[1]), match[2])
    strength = _number(value)
    if not math.isfinite(strength):
        raise CheckpointError(
            f"{spec}: strength is {value!r}, expected a finite number, such as "
            "file.safetensors:0.8"
        )
    return path, strength


def _is_pair(spec: object) -> TypeGuard[tuple[str | os.PathLike[str], float]]:
    """Whether this is a file with its strength, not two files."""
    return (
        isinstance(spec, tuple)
        and len(spec) == 2
        and isinstance(spec[0], str | os.PathLike)
        and not isinstance(spec[1], str | os.PathLike | tuple)
    )


def _number(value: object) -> float:
    """A strength, or NaN if it is not a number."""
    try:
        return float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


@dataclasses.dataclass(frozen=True)
class _Update:
    """The change of one tensor of the checkpoint by a LoRA.

    Attributes:
        source: header of the LoRA file.
        module: its name there.
        parts: of the LoRA, as in `hijack.lora.delta`, to keys.
        rows: of the tensor, to concatenate; none for all.
        own: rows of the LoRA's difference that belong to them; none for all.
        factor: of the difference.
        strength: of the LoRA.
        transposed: whether the LoRA is for the transpose of the tensor.
    """

    source: Header
    module: str
    parts: Mapping[str, str]
    rows: tuple[Span, ...]
    own: tuple[Span, ...]
    factor: float
    strength: float
    transposed: bool = False

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """Read the parts in float32."""
        opened = open_tensors(self.source)
        tensors = {}
        for part, key in self.parts.items():
            tensors[part] = opened[key].to(device).float()
            if not bool(torch.isfinite(tensors[part]).all()):
                raise CheckpointError(
                    f"{self.source.source}: {key}: holds inf or NaN, expected finite "
                    "numbers; the file is damaged"
                )
        return tensors

    def apply(self, tensor: Tensor) -> Tensor:
        """Merge the LoRA into a float32 tensor; returns a new one."""
        parts = self.tensors(tensor.device)
        if self.own:
            where = f"{self.source.source}: {self.module}"
            parts = take_rows(parts, self.own, where)
        if self.transposed:
            axes = tuple(reversed(range(tensor.ndim)))
            merged = merge(tensor.permute(axes), parts, self.factor, self.strength)
            return merged.permute(axes)
        if not self.rows:
            return merge(tensor, parts, self.factor, self.strength)
        selected = torch.cat([tensor[start:stop] for start, stop in self.rows])
        merged = merge(selected, parts, self.factor, self.strength)
        result = tensor.clone()
        for start, stop in self.rows:
            result[start:stop], merged = merged.tensor_split([stop - start])
        return result


class Loras:
    """The LoRAs to merge into one checkpoint, by the keys they update.

    Attributes:
        unmatched: names in LoRA files that the checkpoint lacks.
    """

    def __init__(
        self, updates: Mapping[str, Sequence[_Update]], unmatched: Sequence[str]
    ) -> None:
        self._updates = updates
        self.unmatched = tuple(unmatched)

    @classmethod
    def open(
        cls,
        specs: Spec | Iterable[Spec],
        header: Header,
        ignore_unmatched: bool = False,
    ) -> Loras:
        """Read the headers of LoRA files and find their target layers.

        Kinds, ranks and shapes are checked here; data is read later.

        Args:
            specs: files, each with its strength as for `parse_lora`.
            header: of the checkpoint.
            ignore_unmatched: whether layers that the checkpoint lacks are left out.

        Raises:
            HeaderError: if a file is malformed.
            CheckpointError: if a file has no LoRA for the checkpoint, one of a kind
                that cannot be merged, one that does not fit, or, unless
                ``ignore_unmatched``, one for a layer that the checkpoint lacks.
        """
        updates: dict[str, list[_Update]] = {}
        unmatched: list[str] = []
        names = LayerNames({key: info.shape for key, info in header.tensors.items()})
        for path, strength in parse_loras(specs):
            file = _LoraFile(read_header(path), strength, header)
            file.match(names)
            if file.unmatched and not (ignore_unmatched and file.updates):
                raise CheckpointError(
                    unmatched_message(file.source, header, file.unmatched, file.merged)
                )
            unmatched += file.unmatched
            for key, update in file.updates:
                updates.setdefault(key, []).append(update)
        return cls(updates, unmatched)

    @property
    def keys(self) -> frozenset[str]:
        """The keys of the checkpoint that are changed."""
        return frozenset(self._updates)

    def touches(self, key: str) -> bool:
        """Whether a tensor of the checkpoint is changed."""
        return key in self._updates

    def merge(self, key: str, tensor: Tensor) -> Tensor:
        """Merge all LoRAs into a tensor of the checkpoint, in their order.

        Args:
            key: of the tensor.
            tensor: (...) floating point; not modified.

        Returns:
            (...) float32, on the tensor's device.

        Raises:
            CheckpointError: if a LoRA holds inf or NaN.
        """
        merged = tensor.float()
        for update in self._updates.get(key, ()):
            merged = update.apply(merged)
        return merged


class _LoraFile:
    """One LoRA file: which tensors of the checkpoint it updates.

    Attributes:
        updates: key of the checkpoint and its change.
        unmatched: names that the checkpoint lacks, and unknown keys.
        merged: names that it has.
    """

    def __init__(self, source: Header, strength: float, header: Header) -> None:
        self.source, self.strength, self.header = source, strength, header
        self.updates: list[tuple[str, _Update]] = []
        self.unmatched: list[str] = []
        self.merged: list[str] = []

    @functools.cached_property
    def peft_config(self) -> Mapping[str, Any]:
        """PEFT's config of the file."""
        return read_peft_config(self.source)

    def match(self, names: LayerNames) -> None:
        """Find the target layers of each LoRA in the file."""
        modules, self.unmatched = _group_keys(self.source)
        shapes = {name: self._shape(parts) for name, parts in modules.items()}
        found = names.resolve(shapes)
        for name, problem in found.problems.items():
            raise CheckpointError(f"{self.source.source}: {name}: {problem}")
        self.unmatched += found.unmatched
        self.merged = list(found.pieces)
        taken: dict[str, list[tuple[str, Piece]]] = {}
        for name, pieces in found.pieces.items():
            for piece in pieces:
                for key, update in self._updates_of(name, modules[name], piece):
                    others = taken.setdefault(key, [])
                    self._refuse_twice(name, key, piece, others)
                    others.append((name, piece))
                    self.updates.append((key, update))

    def _shape(self, parts: Mapping[str, str]) -> tuple[int, ...] | None:
        """The shape of the weight that a LoRA is for, as far as it tells."""
        delta = {p: k for p, k in parts.items() if p not in _SEPARATE}
        if not delta and "bias" in parts:
            delta = {"diff": parts["bias"]}  # which has as many rows
        return delta_shape({p: _empty(self.source, k) for p, k in delta.items()})

    def _refuse_twice(
        self, name: str, key: str, piece: Piece, others: Iterable[tuple[str, Piece]]
    ) -> None:
        for other, taken in others:
            if other != name and _overlap(piece.rows, taken.rows):
                raise CheckpointError(
                    f"{self.source.source}: {name}: targets {key}, as {other} "
                    "does; expected one LoRA for a layer"
                )

    def _updates_of(
        self, name: str, parts: Mapping[str, str], piece: Piece
    ) -> Iterator[tuple[str, _Update]]:
        """The changes of a weight and a bias by one LoRA."""
        where, layer = f"{self.source.source}: {name}", piece.layer
        weight = self._target_info(layer.key, where)
        if layer.transposed:
            weight = dataclasses.replace(weight, shape=weight.shape[::-1])
        rank = 0
        delta = {part: key for part, key in parts.items() if part not in _SEPARATE}
        if delta:
            rank = self._check_shapes(delta, weight, piece, where)
        factor = alpha_scale(
            self.source, name, parts.get("alpha"), rank, lambda: self.peft_config
        )
        update = _Update(
            self.source,
            name,
            delta,
            piece.rows,
            piece.own,
            factor,
            self.strength,
        )
        if delta:
            yield layer.key, dataclasses.replace(update, transposed=layer.transposed)
        for part in parts.keys() & {"bias", "up_bias"}:
            key, bias = layer.bias, {"diff": parts[part]}
            self._check_shapes(bias, self._target_info(key, where), piece, where)
            scale = factor if part == "up_bias" else 1.0
            yield key, dataclasses.replace(update, parts=bias, factor=scale)

    def _target_info(self, key: str, where: str) -> TensorInfo:
        if key not in self.header.tensors:
            raise CheckpointError(
                f"{where}: targets {key}, which is not in {self.header.source}; is "
                "it for another model?"
            )
        return self.header.tensors[key]

    def _check_shapes(
        self, parts: Mapping[str, str], info: TensorInfo, piece: Piece, where: str
    ) -> int:
        meta = {part: _empty(self.source, key) for part, key in parts.items()}
        shape = info.shape
        if piece.rows and shape:
            shape = (sum(stop - start for start, stop in piece.rows), *shape[1:])
        return check_shapes(meta, shape, where, piece.own)


def _overlap(one: Sequence[Span], other: Sequence[Span]) -> bool:
    """Whether two sets of rows, none being all, have a row in common."""
    if not one or not other:
        return True
    return any(a[0] < b[1] and b[0] < a[1] for a in one for b in other)


def _empty(source: Header, key: str) -> Tensor:
    """A tensor of a LoRA without its data."""
    info = source.tensors[key]
    dtype = info.torch_dtype
    if dtype is None or not dtype.is_floating_point or not info.real:
        raise CheckpointError(
            f"{source.source}: {key}: is {info.dtype}, expected floating point numbers"
        )
    return torch.empty(info.torch_shape, device="meta")


def _group_keys(source: Header) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Module to part to key of a LoRA file, and unknown keys.

    Raises:
        CheckpointError: if one cannot be merged.
    """
    modules: dict[str, dict[str, str]] = {}
    unknown_keys = []
    for key in source.tensors:
        kind = next((UNSUPPORTED[mark] for mark in UNSUPPORTED if mark in key), None)
        if kind is not None:
            raise CheckpointError(
                f"{source.source}: {key}: is {kind}, which is not supported; expected "
                "LoRA, DoRA, LoHa, LoKr or differences; convert it to a LoRA first"
            )
        split = split_key(key)
        if split is None:
            unknown_keys.append(key)
            continue
        module, part = split
        parts = modules.setdefault(module, {})
        if part in parts:
            raise CheckpointError(
                f"{source.source}: {key}: is the same part as {parts[part]}; expected "
                "one LoRA for a layer"
            )
        parts[part] = key
    if not modules:
        raise CheckpointError(
            f"{source.source}: holds no LoRA, its first keys are "
            f"{', '.join(unknown_keys[:3]) or 'none'}; expected X.lora_down.weight, "
            "X.lora_A.weight or the like; is it a checkpoint?"
        )
    for parts in modules.values():
        check_parts(parts, source.source)
    for key in unknown_keys:
        if "scale" in key and any(key.startswith(f"{name}.") for name in modules):
            raise CheckpointError(
                f"{source.source}: {key}: is the scale of a LoRA that is quantized, "
                "expected numbers without scales; get the LoRA in 16 bits"
            )
    return modules, unknown_keys
