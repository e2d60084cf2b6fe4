"""The quantized layers in memory: how they are stored, and what computes with them."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from hijack import kernels
from hijack.hosts.comfyui.linear import LIVE
from hijack.text import format_text


def describe_layers() -> tuple[str, ...]:
    """One sentence for each loaded model, and one for the layers of all others."""
    management = sys.modules.get("comfy.model_management")
    others, found = set(LIVE), []
    for loaded in list(getattr(management, "current_loaded_models", ())):
        patcher = loaded.model
        if patcher is None:  # it is gone, and ComfyUI has not noticed yet
            continue
        layers = [m for m in patcher.model.modules() if m in others]
        others -= set(layers)
        if layers:
            name = type(patcher.model).__name__
            device = torch.device(loaded.device)
            found.append(_sentence(f"{name} on {device}", layers, device))
    if others:
        found.append(_sentence("models that are not loaded now", others, None))
    return tuple(found)


def _sentence(
    where: str, layers: Iterable[nn.Module], device: torch.device | None
) -> str:
    stored = Counter(map(_stored, layers))
    forwards = Counter(_forward(layer, device) for layer in layers)
    return (
        f"{where}: {forwards.total()} quantized layers: {counted(stored)}; "
        f"forward: {counted(forwards)}"
    )


def counted(numbers: Counter[str]) -> str:
    """Names and how often they are there, the most frequent first."""
    return ", ".join(f"{name} {number}" for name, number in numbers.most_common())


def _stored(module: Any) -> str:
    """Scheme, dialect and block size of a layer."""
    weight = module.host_tensors.unwrap(module.weight)
    if weight is None:
        return "dense for now"
    scheme = weight.scheme
    block = scheme.block_size(weight.qdata, weight.params)
    return format_text(scheme.name, weight.config.dialect, block)


def _forward(module: Any, device: torch.device | None) -> str:
    """What computes a layer where it is now."""
    weight = module.host_tensors.view(module.weight)
    if weight is None:
        return "dense"
    if device is not None and weight.device != device:
        return "offloaded"
    return kernels.describe(module, weight)
