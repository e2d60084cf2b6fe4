"""The quantized layers in memory: how they are stored, and what computes with them."""

from __future__ import annotations

import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from torch import nn

from hijack.hosts.comfyui.linear import LIVE
from hijack.text import format_text

#: The forward of a layer that neither its scheme nor a plugin has one for.
DEFAULT = "default decode"


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
            found.append(_sentence(f"{name} on {loaded.device}", layers))
    if others:
        found.append(_sentence("models that are not loaded now", others))
    return tuple(found)


def _sentence(where: str, layers: Iterable[nn.Module]) -> str:
    stored, forwards = Counter(map(_stored, layers)), Counter(map(_forward, layers))
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


def _forward(module: Any) -> str:
    """What computes a layer, such as ``blockwise_fp8.linear_forward``."""
    bound: Callable[..., Any] | None = module.bound_forward
    if bound is None:
        return DEFAULT
    while isinstance(bound, functools.partial):
        bound = bound.func
    function: Any = bound
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{function.__module__.rpartition('.')[2]}.{name}"
