"""What ComfyUI's save nodes write of quantized layers.

Every save node ends in ``comfy.utils.save_torch_file``. By then a quantized layer has
become tensors under keys, or something that ComfyUI meant to merge LoRAs into when the
file is written, and which it can do only for its own formats. Here each layer is found
again and asked for what it stands for now, LoRAs included: quantized data and scales
that go together.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from hijack.errors import HijackError
from hijack.formats import matching
from hijack.hosts.comfyui.file_tensors import dialect_of
from hijack.hosts.comfyui.linear import LIVE, Source
from hijack.hosts.comfyui.reader import FileStateDict
from hijack.progress import Progress
from hijack.quantized import QuantizedTensor
from hijack.safetensors_io.header import join
from hijack.safetensors_io.writer import write_checkpoint
from hijack.saving import spell as spell_weights

#: What ComfyUI puts before the keys of a diffusion model it saves.
PREFIX = "model.diffusion_model."


def make_save_torch_file(original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of ``comfy.utils.save_torch_file``."""

    @functools.wraps(original)
    def save_torch_file(
        sd: dict[str, Any], ckpt: Any, metadata: Any = None, *args: Any, **kwargs: Any
    ) -> Any:
        if isinstance(sd, FileStateDict):  # a copy of a file
            sd = sd.stored()
        layers = find_layers(sd)
        if layers:
            sd, metadata = spell(sd, layers, metadata)
        if any(isinstance(value, QuantizedTensor) for value in sd.values()):
            # of no layer, such as a LoRA that was extracted: no weight to quantize
            sd = {key: _plain(value) for key, value in sd.items()}
        return original(sd, ckpt, metadata, *args, **kwargs)

    return save_torch_file


def _plain(value: Any) -> Any:
    """A tensor that safetensors can write."""
    return value.value() if isinstance(value, QuantizedTensor) else value


def save_model(
    patcher: Any,
    path: Path,
    dialect: str | None = None,
    metadata: Mapping[str, str] | None = None,
    progress: Progress | None = None,
) -> int:
    """Write a diffusion model with its LoRAs; the file appears when it is complete.

    Args:
        patcher: a ModelPatcher with quantized layers.
        path: the file.
        dialect: how to spell the layers; default is the dialect each came in.
        metadata: strings for the file's header.
        progress: called after each layer that is spelled, then after each tensor that
            is written; if it raises, no file appears.

    Returns:
        How many layers are quantized.

    Raises:
        HijackError: if no layer is quantized, the dialect cannot spell one, or writing
            fails.
    """
    tensors = {
        key.removeprefix(PREFIX): tensor for key, tensor in _state_dict(patcher).items()
    }
    layers = find_layers(tensors)
    if not layers:
        raise HijackError(
            f"{path.name}: the model has no layer that hijack quantized; quantize it "
            "first, or save it with ComfyUI's own node"
        )
    spelled, said = spell(tensors, layers, metadata, dialect, progress)
    # What ComfyUI merges LoRAs into when it is written is no tensor before this.
    written = {key: t.to("cpu").contiguous() for key, t in spelled.items()}
    write_checkpoint(path, written, said, progress=progress)
    return len(layers)


def _state_dict(patcher: Any) -> dict[str, Any]:
    """A state dict for saving, made the way ComfyUI's own save node makes it."""
    management = sys.modules["comfy.model_management"]
    if hasattr(patcher, "state_dict_for_saving"):
        management.load_models_gpu([patcher])
        found: dict[str, Any] = patcher.state_dict_for_saving()
    else:
        management.load_models_gpu([patcher], force_patch_weights=True)
        found = patcher.model.state_dict_for_saving()
    return found


def find_layers(state_dict: Mapping[str, Any]) -> dict[str, Any]:
    """The quantized modules that a state dict to be saved was made of, by layer."""
    found: dict[str, Any] = {}
    for key, value in state_dict.items():
        source = getattr(value, "hijack_source", None)
        # a name may have dots in it; what ComfyUI makes is there for weights alone
        name = source.name if isinstance(source, Source) else key.rpartition(".")[2]
        layer = key.removesuffix(name).removesuffix(".")
        module = None if layer in found else _module_of(value)
        if module is not None:
            found[layer] = module
    return found


def spell(
    state_dict: Mapping[str, Any],
    layers: Mapping[str, Any],
    metadata: Mapping[str, str] | None,
    dialect: str | None = None,
    progress: Progress | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """Replace what stands for quantized layers by the tensors of a file.

    Args:
        state_dict: key to tensor or to what ComfyUI makes a tensor of when it saves.
        layers: layer to quantized module, from `find_layers`.
        metadata: what the file is to say of itself besides.
        dialect: how to spell the layers; default is the dialect each came in.
        progress: called after each layer.

    Returns:
        The state dict and the metadata to write.

    Raises:
        HijackError: if a scheme has no such dialect, or it cannot spell a layer.
    """
    others = dict(state_dict)
    weights: dict[str, QuantizedTensor] = {}
    for done, (layer, module) in enumerate(layers.items(), 1):
        weights[layer] = module.current()
        for name in ("weight", *module.param_names):
            others.pop(join(layer, name), None)
        if progress is not None:
            progress(done, len(layers), layer)
    dialects = {
        layer: dialect_of(weight)
        if dialect is None
        else matching.dialect_of(weight.scheme, dialect)
        for layer, weight in weights.items()
    }
    spelled, said = spell_weights(weights, dialects, others, metadata)
    written = {key: t.contiguous().to("cpu") for key, t in spelled.items()}
    return {**others, **written}, said


def _module_of(value: Any) -> Any | None:
    source = getattr(value, "hijack_source", None)
    if isinstance(source, Source):
        return source.module()
    # From 0.25 on: what ComfyUI wraps around a QuantizedTensor until it is written.
    caster: Any = getattr(value, "caster", None)
    if hasattr(caster, "model"):
        return _owner(caster.model.model, str(caster.key))
    # Before: the QuantizedTensor itself, which cannot be written.
    qdata = getattr(value, "_qdata", None)
    if isinstance(qdata, Tensor):
        where = qdata.data_ptr()
        for module in list(LIVE):
            weight = module.host_tensors.unwrap(module.weight)  # type: ignore[operator,union-attr]
            if weight is not None and weight.qdata.data_ptr() == where:
                return module
    return None


def _owner(model: Any, key: str) -> Any | None:
    path = key.rpartition(".")[0]
    module = functools.reduce(getattr, path.split("."), model)
    return module if module in LIVE and hasattr(module, "current") else None
