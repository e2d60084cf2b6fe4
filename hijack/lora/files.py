"""LoRA files, merged into the weights of a checkpoint before they are quantized."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from hijack.errors import CheckpointError
from hijack.lora.alpha import alpha_of
from hijack.lora.delta import (
    SUFFIXES,
    UNSUPPORTED,
    check_parts,
    fit,
    merge,
)
from hijack.lora.encoders import of_encoder
from hijack.lora.keys import Names, Target
from hijack.safetensors_io.header import Header, TensorInfo
from hijack.safetensors_io.reader import open_tensors, read_header

#: A LoRA file, with its strength behind a colon or as a pair.
Spec = str | os.PathLike[str] | tuple[str | os.PathLike[str], float]


def parse_loras(specs: Spec | Iterable[Spec] | None) -> list[tuple[Path, float]]:
    """Files and strengths of all that were given; one alone needs no list around it.

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
    """File and strength of ``"file.safetensors:0.8"``; without a number it is 1.

    Raises:
        CheckpointError: if the strength is no finite number.
    """
    given: object = 1.0
    if isinstance(spec, tuple) and len(spec) == 2:
        path, given = Path(spec[0]), spec[1]
    elif not isinstance(spec, str | os.PathLike):
        raise CheckpointError(
            f"loras: got {spec!r}, expected a file, 'file.safetensors:0.8', or (file, "
            "strength)"
        )
    else:
        path = Path(spec)
        found = re.fullmatch(r"(.+):([^:/\\]*)", os.fspath(spec))
        if found and not os.path.exists(path):  # which never raises
            drive = len(found[1]) == 1 and math.isnan(_number(found[2]))
            path, given = (path, 1.0) if drive else (Path(found[1]), found[2])
    strength = _number(given)
    if not math.isfinite(strength):
        raise CheckpointError(
            f"{spec}: strength is {given!r}, expected a finite number, such as "
            "file.safetensors:0.8"
        )
    return path, strength


def _is_pair(spec: object) -> TypeGuard[tuple[str | os.PathLike[str], float]]:
    """Whether this is a file and its strength, and not two files."""
    return (
        isinstance(spec, tuple)
        and len(spec) == 2
        and isinstance(spec[0], str | os.PathLike)
        and not isinstance(spec[1], str | os.PathLike | tuple)
    )


def _number(given: object) -> float:
    """A strength, or NaN if it is no number."""
    try:
        return float(given)  # type: ignore[arg-type]
    except (TypeError, ValueError, OverflowError):
        return math.nan


@dataclasses.dataclass(frozen=True)
class _Change:
    """What a LoRA does to one tensor of the checkpoint.

    Attributes:
        source: header of the LoRA file.
        module: its name there.
        parts: of the LoRA, as in `lora_delta`, to keys.
        rows: of the tensor, one behind another; None for all as they are.
        turned: whether the LoRA is for the transpose of the tensor.
        factor: what the difference is multiplied with.
        strength: how much of the LoRA is wanted.
    """

    source: Header
    module: str
    parts: Mapping[str, str]
    rows: tuple[slice, ...] | None
    turned: bool
    factor: float
    strength: float

    def tensors(self, device: torch.device) -> dict[str, Tensor]:
        """The parts in float32, read now."""
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
        """A float32 tensor with the LoRA in it; a new one."""
        parts = self.tensors(tensor.device)
        if self.turned:
            axes = tuple(reversed(range(tensor.ndim)))
            merged = merge(tensor.permute(axes), parts, self.factor, self.strength)
            return merged.permute(axes)
        if self.rows is None:
            return merge(tensor, parts, self.factor, self.strength)
        own = torch.cat([tensor[rows] for rows in self.rows])
        changed = merge(own, parts, self.factor, self.strength)
        result, at = tensor.clone(), 0
        for rows in self.rows:
            height = len(tensor[rows])
            result[rows] = changed[at : at + height]
            at += height
        return result


class Loras:
    """The LoRAs to merge into one checkpoint, by the keys they change.

    Attributes:
        unmatched: names in LoRA files of what the checkpoint lacks.
    """

    def __init__(
        self, changes: Mapping[str, Sequence[_Change]], unmatched: Sequence[str]
    ) -> None:
        self._changes = changes
        self.unmatched = tuple(unmatched)

    @classmethod
    def open(
        cls,
        specs: Spec | Iterable[Spec],
        header: Header,
        ignore_unmatched: bool = False,
    ) -> Loras:
        """Read the headers of LoRA files and find the layers they are for.

        Kinds, ranks and shapes are checked here; only numbers are read later.

        Args:
            specs: files, each with its strength as for `parse_lora`.
            header: of the checkpoint.
            ignore_unmatched: whether layers that the checkpoint lacks are left out.

        Raises:
            HeaderError: if a file is malformed.
            CheckpointError: if a file holds no LoRA for the checkpoint, one of a kind
                that cannot be merged, one that does not fit, or, unless
                ``ignore_unmatched``, one for a layer that the checkpoint lacks.
        """
        changes: dict[str, list[_Change]] = {}
        unmatched: list[str] = []
        names = Names(header.tensors)
        for path, strength in parse_loras(specs):
            file = _File(read_header(path), strength, header)
            file.match(names)
            if file.unmatched and not (ignore_unmatched and file.changes):
                raise CheckpointError(_unmatched(file, header))
            unmatched += file.unmatched
            for key, change in file.changes:
                changes.setdefault(key, []).append(change)
        return cls(changes, unmatched)

    @property
    def keys(self) -> frozenset[str]:
        """The keys of the checkpoint that are changed."""
        return frozenset(self._changes)

    @property
    def factors(self) -> list[tuple[str, str, float]]:
        """Key of the checkpoint, name in the LoRA file, and alpha / rank of each.

        Alpha may stand in another file beside that of the LoRA.
        """
        return [
            (key, change.module, change.factor)
            for key, changes in self._changes.items()
            for change in changes
        ]

    def touches(self, key: str) -> bool:
        """Whether a tensor of the checkpoint is changed."""
        return key in self._changes

    def merge(self, key: str, tensor: Tensor) -> Tensor:
        """A tensor of the checkpoint with all LoRAs in it, in their order.

        Args:
            key: of the tensor.
            tensor: (...) floating point, as the header says; is not changed.

        Returns:
            (...) float32, on the tensor's device.

        Raises:
            CheckpointError: if a LoRA holds inf or NaN.
        """
        merged = tensor.float()
        for change in self._changes.get(key, ()):
            merged = change.apply(merged)
        return merged


class _File:
    """One LoRA file: which tensors of the checkpoint it changes.

    Attributes:
        changes: key of the checkpoint and what is done to it.
        unmatched: names of what the checkpoint lacks, or nobody knows.
    """

    def __init__(self, source: Header, strength: float, header: Header) -> None:
        self.source, self.strength, self.header = source, strength, header
        self.changes: list[tuple[str, _Change]] = []
        self.unmatched: list[str] = []

    def match(self, names: Names) -> None:
        """Find the layer of each LoRA in the file."""
        modules, self.unmatched = _grouped(self.source)
        taken: dict[tuple[str, str], str] = {}
        for name, parts in modules.items():
            target = names.find(name)
            if target is None:
                self.unmatched.append(name)
                continue
            for key, change in self._changes_of(name, parts, target):
                other = taken.setdefault((key, target.way), name)
                if other != name:
                    raise CheckpointError(
                        f"{self.source.source}: {name}: changes {key}, as {other} "
                        "does; expected one LoRA for a layer"
                    )
                self.changes.append((key, change))

    def _changes_of(
        self, name: str, parts: Mapping[str, str], target: Target
    ) -> Iterator[tuple[str, _Change]]:
        """What one LoRA does to a weight and to a bias."""
        where = f"{self.source.source}: {name}"
        weight, rows = self._needed(target.key, where), None
        if target.turned:
            weight = dataclasses.replace(weight, shape=weight.shape[::-1])
        if target.way:
            height = weight.shape[0] if weight.shape else 0
            rows = target.rows(height, math.prod(weight.shape[1:]))
        rank, apart = 0, {"bias", "up_bias", "alpha"}
        own = {part: key for part, key in parts.items() if part not in apart}
        if own:
            rank = self._fit(own, weight, rows, where)
        factor = alpha_of(self.source, name, parts.get("alpha"), rank)
        change = _Change(self.source, name, own, rows, False, factor, self.strength)
        if own:
            yield target.key, dataclasses.replace(change, turned=target.turned)
        for part in parts.keys() & {"bias", "up_bias"}:
            key, only = target.bias, {"diff": parts[part]}
            self._fit(only, self._needed(key, where), rows, where)
            scale = factor if part == "up_bias" else 1.0
            yield key, dataclasses.replace(change, parts=only, factor=scale)

    def _needed(self, key: str, where: str) -> TensorInfo:
        if key not in self.header.tensors:
            raise CheckpointError(
                f"{where}: changes {key}, which {self.header.source} has not; is it "
                "for another model?"
            )
        return self.header.tensors[key]

    def _fit(
        self,
        parts: Mapping[str, str],
        info: TensorInfo,
        rows: tuple[slice, ...] | None,
        where: str,
    ) -> int:
        meta = {part: _empty(self.source, key) for part, key in parts.items()}
        shape = info.shape
        if rows is not None and shape:
            height = sum(len(range(*part.indices(shape[0]))) for part in rows)
            shape = (height, *shape[1:])
        return fit(meta, shape, where)


def _empty(source: Header, key: str) -> Tensor:
    """A tensor of a LoRA without its data."""
    info = source.tensors[key]
    dtype = info.torch_dtype
    if dtype is None or not dtype.is_floating_point or not info.real:
        raise CheckpointError(
            f"{source.source}: {key}: is {info.dtype}, expected floating point numbers"
        )
    return torch.empty(info.torch_shape, device="meta")


def _grouped(source: Header) -> tuple[dict[str, dict[str, str]], list[str]]:
    """Module to part to key of a LoRA file, and the keys that are of none.

    Raises:
        CheckpointError: if one cannot be merged.
    """
    modules: dict[str, dict[str, str]] = {}
    strays = []
    for key in source.tensors:
        kind = next((UNSUPPORTED[mark] for mark in UNSUPPORTED if mark in key), None)
        if kind is not None:
            raise CheckpointError(
                f"{source.source}: {key}: is {kind}, which is not supported; expected "
                "LoRA, DoRA, LoHa, LoKr or differences; make a LoRA of it first"
            )
        ending = next((end for end in SUFFIXES if key.endswith(end)), None)
        if ending is None:
            strays.append(key)
            continue
        parts = modules.setdefault(key[: -len(ending)], {})
        if SUFFIXES[ending] in parts:
            raise CheckpointError(
                f"{source.source}: {key}: says the same as {parts[SUFFIXES[ending]]}; "
                "expected one LoRA for a layer"
            )
        parts[SUFFIXES[ending]] = key
    if not modules:
        raise CheckpointError(
            f"{source.source}: holds no LoRA, its keys are such as "
            f"{', '.join(strays[:3]) or 'none'}; expected X.lora_down.weight, "
            "X.lora_A.weight or the like; is it a checkpoint?"
        )
    for parts in modules.values():
        check_parts(parts, source.source)
    return modules, strays


def _unmatched(file: _File, header: Header) -> str:
    """The message that a file is for another model, in whole or in part."""
    source, count = file.source.source, len(file.unmatched)
    encoders = [name for name in file.unmatched if of_encoder(name)]
    some = ", ".join(file.unmatched[:3])
    if not file.changes:
        only = "; they are of text encoders alone" if len(encoders) == count else ""
        return (
            f"{source}: none of its {count} names, such as {some}, is of a layer of "
            f"{header.source}{only}; expected a LoRA for this model"
        )
    many = f"({count} of {count + len(file.changes)})"
    if len(encoders) == count:
        return (
            f"{source}: {some}{', ...' if count > 3 else ''} {many} are of text "
            f"encoders, of which {header.source} has no such layers; expected a "
            "checkpoint with them, or a LoRA without; pass ignore_unmatched "
            "(--ignore-unmatched) to merge the rest alone"
        )
    also = f", {len(encoders)} of them of text encoders" if encoders else ""
    return (
        f"{source}: {header.source} has no layer for {some}"
        f"{', ...' if count > 3 else ''} {many}{also}; expected a LoRA for this model; "
        "pass ignore_unmatched (--ignore-unmatched) to leave these out"
    )
