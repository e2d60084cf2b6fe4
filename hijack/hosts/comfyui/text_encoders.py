"""Where text encoders, VAEs and ControlNets enter.

ComfyUI picks a text encoder's operations anew for each of its parts, but loads all of
them through one method. So its layers are built as ComfyUI likes, and those that a
scheme claims change their class when the tensors arrive. A ControlNet takes operations
as an option. A VAE takes neither, and is decoded.
"""

from __future__ import annotations

import contextlib
import functools
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hijack.hosts.comfyui.detection import decode_claimed, encode_claimed
from hijack.hosts.comfyui.linear import QuantizedLinear
from hijack.hosts.comfyui.operations import make_operations
from hijack.hosts.comfyui.reader import FileStateDict, open_file, open_if_patched
from hijack.quantized import QuantizedTensor

#: Keys of ControlNets that ComfyUI does arithmetic with instead of building layers.
ARITHMETIC = ("lora_controlnet", "difference")


def make_load_text_encoders(original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of ``comfy.sd.load_text_encoder_state_dicts``."""

    @functools.wraps(original)
    def load_text_encoder_state_dicts(*args: Any, **kwargs: Any) -> Any:
        # Before ComfyUI looks at shapes, at markers, and renames keys.
        options = kwargs.get("model_options", args[3] if len(args) > 3 else None)
        for state_dict in args[0] if args else kwargs.get("state_dicts", ()):
            if _own_operations(options):
                open_file(state_dict)
            elif open_if_patched(state_dict):
                encode_claimed(state_dict)
        return original(*args, **kwargs)

    return load_text_encoder_state_dicts


def make_load_sd(original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of ``comfy.sd.CLIP.load_sd``."""

    @functools.wraps(original)
    def load_sd(self: Any, sd: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        if not any(isinstance(tensor, QuantizedTensor) for tensor in sd.values()):
            return original(self, sd, *args, **kwargs)
        with taking_quantized(self.cond_stage_model):
            return original(self, sd, *args, **kwargs)

    return load_sd


def make_vae_init(original: Callable[..., None]) -> Callable[..., None]:
    """The replacement of ``comfy.sd.VAE.__init__``."""

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807 - its name
        state_dict = args[0] if args else kwargs.get("sd")
        if state_dict and not isinstance(state_dict, FileStateDict):  # which decodes
            decode_claimed(state_dict, "VAE", kwargs.get("metadata"))
        original(self, *args, **kwargs)

    return __init__


def make_load_controlnet(original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of ``comfy.controlnet.load_controlnet_state_dict``."""

    @functools.wraps(original)
    def load_controlnet_state_dict(
        state_dict: dict[str, Tensor],
        model: Any = None,
        model_options: Any = None,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        options = dict(model_options or {})
        open_file(state_dict)
        if _own_operations(options):
            pass
        elif any(key in state_dict for key in ARITHMETIC):
            decode_claimed(state_dict, "ControlNet")
        elif encode_claimed(state_dict):
            dtype = sys.modules["comfy.utils"].weight_dtype(state_dict)
            base = sys.modules["comfy.ops"].manual_cast
            options["custom_operations"] = make_operations(base, dtype or torch.float32)
        return original(state_dict, model, options, *args, **kwargs)

    return load_controlnet_state_dict


def make_weight_dtype(original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of ``comfy.utils.weight_dtype``: it skips quantized weights.

    Loaders of ControlNets ask it which dtype a file's model is to have.
    """

    @functools.wraps(original)
    def weight_dtype(sd: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(tensor, QuantizedTensor) for tensor in sd.values()):
            sd = {key: t for key, t in sd.items() if not isinstance(t, QuantizedTensor)}
        return original(sd, *args, **kwargs)

    return weight_dtype


def _own_operations(options: Any) -> bool:
    """Whether a loader brings operations of its own, which read the file as it is."""
    return bool(options) and options.get("custom_operations") is not None


@contextlib.contextmanager
def taking_quantized(model: nn.Module) -> Iterator[None]:
    """Let a model that is built already be loaded with `QuantizedTensor` weights.

    ComfyUI's own Linear layers become quantized; any other layer is given the decoded
    weight. Layers that nothing is loaded into stay as they are.
    """
    kinds: dict[tuple[type, torch.dtype], Any] = {}
    changed: list[tuple[nn.Module, type, torch.device | None]] = []
    for module in model.modules():
        kind, weight = type(module), getattr(module, "weight", None)
        linear = _is_linear(module)
        if isinstance(module, QuantizedLinear) or not (linear or weight is not None):
            continue
        dtype = _dtype_of(module)
        if (kind, dtype) not in kinds:
            kinds[kind, dtype] = _deferred(kind, dtype, linear)
        object.__setattr__(module, "__class__", kinds[kind, dtype])
        changed.append((module, kind, getattr(weight, "device", None)))
    try:
        yield
    finally:
        deferred = set(kinds.values())
        for module, kind, device in changed:
            if type(module) in deferred:
                object.__setattr__(module, "__class__", kind)
            elif isinstance(module, QuantizedLinear) and device is not None:
                module.to(device)  # ComfyUI may take it for loaded there


def _is_linear(module: nn.Module) -> bool:
    """Whether it is a Linear of ComfyUI's, whose weight may not be there yet."""
    kind = type(module)
    return kind.__name__ == "Linear" and kind.__module__ == "comfy.ops"


def _deferred(kind: type, dtype: torch.dtype, linear: bool) -> Any:
    operations = make_operations(
        type("Operations", (), {"Linear": kind, "Embedding": kind}), dtype
    )
    return operations.Linear if linear else operations.Embedding


def _dtype_of(module: Any) -> torch.dtype:
    """The dtype ComfyUI gave a layer, or float32, in which text encoders compute."""
    weight = getattr(module, "weight", None)
    made = getattr(module, "factory_kwargs", {}).get("dtype")
    dtype = made if weight is None else weight.dtype
    if isinstance(dtype, torch.dtype) and dtype.itemsize > 1:
        return dtype
    return torch.float32
