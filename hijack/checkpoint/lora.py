"""LoRA files, merged into the weights of a checkpoint before they are quantized."""

from __future__ import annotations

import dataclasses
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from hijack.checkpoint.header import Header, join, parse_table
from hijack.checkpoint.lora_delta import SUFFIXES, check_parts, merge
from hijack.checkpoint.lora_keys import Names, Target
from hijack.checkpoint.reader import open_tensors, read_header
from hijack.errors import CheckpointError

#: A LoRA file, with its strength behind a colon or as a pair.
Spec = str | os.PathLike[str] | tuple[str | os.PathLike[str], float]
_NUMBER = r"[-+]?[\d.]+(?:[eE][-+]?\d+)?|[-+]?inf|nan"
#: Kinds there is no merging of, told by a part of their keys.
_UNSUPPORTED = {
    "oft_blocks": "OFT",
    "oft_diag": "BOFT",
    "lora_S": "an AdaLoRA",
    ".a1.weight": "GLoRA",
    "lora_embedding_A": "a LoRA of an embedding",
    ".w_norm": "a norm of LyCORIS",
}


def parse_lora(spec: Spec) -> tuple[Path, float]:
    """File and strength of ``"file.safetensors:0.8"``; without a number it is 1.

    Raises:
        CheckpointError: if the strength is no finite number.
    """
    if isinstance(spec, tuple):
        path, strength = Path(spec[0]), float(spec[1])
    else:
        text = os.fspath(spec)
        found = re.fullmatch(
            r"(.*[^:]):([-+]?[\d.]+(?:[eE][-+]?\d+)?|[-+]?inf|nan)", text
        )
        path, strength = Path(text), 1.0
        if found and not Path(text).exists():
            path, strength = Path(found[1]), _number(found[2])
    if not math.isfinite(strength):
        raise CheckpointError(
            f"{spec}: strength is {strength}, expected a finite number, such as "
            "file.safetensors:0.8"
        )
    return path, strength


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


@dataclasses.dataclass(frozen=True)
class _Module:
    """One LoRA: where it belongs and which keys it has."""

    source: Header
    name: str
    target: Target
    parts: Mapping[str, str]
    strength: float
    alpha: float | None

    def tensors(self) -> dict[str, Tensor]:
        """The parts that are of the weight, read now."""
        opened = open_tensors(self.source)
        parts = {part: opened[key] for part, key in self.parts.items()}
        if self.alpha is not None and "alpha" not in parts:
            parts["alpha"] = torch.tensor(self.alpha)
        return parts


class Loras:
    """The LoRAs to merge into one checkpoint, by the keys they change.

    Attributes:
        unmatched: names in LoRA files of layers that the checkpoint lacks.
    """

    def __init__(
        self, modules: Mapping[str, Sequence[_Module]], unmatched: Sequence[str]
    ) -> None:
        self._modules = modules
        self.unmatched = tuple(unmatched)

    @classmethod
    def open(
        cls, specs: Iterable[Spec], header: Header, ignore_unmatched: bool = False
    ) -> Loras:
        """Read the headers of LoRA files and find the layers they are for.

        Args:
            specs: files, each with its strength as for `parse_lora`.
            header: of the checkpoint.
            ignore_unmatched: whether layers that the checkpoint lacks are left out.

        Raises:
            HeaderError: if a file is malformed.
            CheckpointError: if it holds no LoRA, or one of an unknown kind, or layers
                that the checkpoint lacks and ``ignore_unmatched`` is false.
        """
        names = Names(header.layers())
        modules: dict[str, list[_Module]] = {}
        unmatched: list[str] = []
        for spec in specs:
            path, strength = parse_lora(spec)
            source = read_header(path)
            for name, parts in _grouped(source).items():
                target = names.find(name)
                if target is None:
                    unmatched.append(name)
                    continue
                alpha = _adapter_alpha(source, name)
                found = _Module(source, name, target, parts, strength, alpha)
                for key in _changed(header, found):
                    modules.setdefault(key, []).append(found)
        if unmatched and not ignore_unmatched:
            raise CheckpointError(
                f"{source.source}: {header.source} has no layer for {unmatched[0]}, "
                f"one of {len(unmatched)} such LoRAs; is it for another model? pass "
                "ignore_unmatched (--ignore-unmatched) to leave these out"
            )
        return cls(modules, unmatched)

    @property
    def keys(self) -> frozenset[str]:
        """The keys of the checkpoint that are changed."""
        return frozenset(self._modules)

    def touches(self, key: str) -> bool:
        """Whether a tensor of the checkpoint is changed."""
        return key in self._modules

    def merge(self, key: str, tensor: Tensor) -> Tensor:
        """A tensor of the checkpoint with all LoRAs in it.

        Args:
            key: of the tensor.
            tensor: (...) floating point.

        Returns:
            (...) float32, on the tensor's device.

        Raises:
            CheckpointError: if a LoRA does not fit, or is not finite.
        """
        merged = tensor.float()
        for module in self._modules.get(key, ()):
            where = f"{module.source.source}: {module.name}"
            parts = {n: t.to(tensor.device) for n, t in module.tensors().items()}
            bias = parts.pop("bias", None)
            if key == join(module.target.layer, "bias"):
                parts = {} if bias is None else {"diff": bias}
            rows = _rows(module.target, merged)
            changed = merge(merged[rows], parts, module.strength, where)
            if changed.shape == merged.shape:
                merged = changed
            else:
                merged = merged.clone()
                merged[rows] = changed
        return merged


def _rows(target: Target, weight: Tensor) -> slice:
    """The rows a LoRA is for: of fused weights, some as many as there are columns."""
    if target.part is None:
        return slice(None)
    height = weight.shape[1]
    end = len(weight) if target.rest else (target.part + 1) * height
    return slice(target.part * height, end)


def _grouped(source: Header) -> dict[str, dict[str, str]]:
    """Module to part to key of a LoRA file, each of a kind that is known."""
    modules: dict[str, dict[str, str]] = {}
    for key in source.tensors:
        for mark, kind in _UNSUPPORTED.items():
            if mark in key:
                raise CheckpointError(
                    f"{source.source}: {key}: is {kind}, expected LoRA, DoRA, LoHa, "
                    "LoKr or differences; convert it to a LoRA first"
                )
        ending = next((end for end in SUFFIXES if key.endswith(end)), None)
        if ending is None:
            raise CheckpointError(
                f"{source.source}: {key}: is no part of a LoRA, expected keys such as "
                "X.lora_down.weight or X.lora_A.weight; is this a LoRA file?"
            )
        name = key[: -len(ending)]
        modules.setdefault(name, {})[SUFFIXES[ending]] = key
    for name, parts in modules.items():
        check_parts(parts, f"{source.source}: {name}")
    if not modules:
        raise CheckpointError(f"{source.source}: is empty, expected a LoRA")
    return modules


def _changed(header: Header, module: _Module) -> list[str]:
    """The checkpoint's tensors that a LoRA changes.

    Raises:
        CheckpointError: if it changes a bias that the layer has not.
    """
    keys = []
    if module.parts.keys() - {"bias", "alpha"}:
        keys.append(join(module.target.layer, "weight"))
    if "bias" in module.parts:
        keys.append(join(module.target.layer, "bias"))
    for key in keys:
        if key not in header.tensors:
            raise CheckpointError(
                f"{module.source.source}: {module.name}: changes {key}, which "
                f"{header.source} has not; is it for another model?"
            )
    return keys


def _adapter_alpha(source: Header, name: str) -> float | None:
    """The alpha that diffusers keeps in the header's metadata, or None."""
    table = parse_table(source.metadata.get("lora_adapter_metadata", ""))
    component, _, module = name.partition(".")
    patterns = table.get(f"{component}.alpha_pattern")
    alpha = table.get(f"{component}.lora_alpha")
    if isinstance(patterns, dict):
        alpha = patterns.get(module, alpha)
    return float(alpha) if isinstance(alpha, int | float) else None
