"""Saving, so that without hijack what is saved is refused and not misread.

transformers only warns of a ``quant_method`` that it does not know, and then takes
quantized data for weights. But it reads no file whose name has a *variant* that nobody
asked for. So the files are saved as a variant, under the model's own names, which the
marker in them has too.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hijack.errors import CheckpointError
from hijack.formats.stacked_blocks import spell_stack
from hijack.hosts.checkpoint import TravellingWeight, decoded, travelling
from hijack.hosts.config import HijackConfig
from hijack.modules import quantized_weight
from hijack.quantized import QuantizedTensor
from hijack.safetensors_io.header import join
from hijack.saving import choose_dialects, spell
from hijack.stacked import StackedWeight

Function = Callable[..., Any]

#: The variant in the names of files with quantized weights.
VARIANT = "hijack"


def make_save_pretrained(original: Function) -> Function:
    """Save models with quantized weights, whoever has quantized them."""
    signature = inspect.signature(original)

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _synchronised(self) or getattr(self, "_hf_peft_config_loaded", False):
            return original(self, *args, **kwargs)
        call = signature.bind(self, *args, **kwargs)
        variant = call.arguments.get("variant")
        _refuse_others(Path(call.arguments["save_directory"]), variant)
        call.arguments["variant"] = f"{VARIANT}.{variant}" if variant else VARIANT
        if "save_original_format" in signature.parameters:  # since transformers 5
            call.arguments["save_original_format"] = False
            return original(*call.args, **call.kwargs)
        self._checkpoint_conversion_mapping = {}  # which is the class's
        try:
            return original(*call.args, **call.kwargs)
        finally:
            del self._checkpoint_conversion_mapping

    return save_pretrained


def _refuse_others(folder: Path, variant: str | None) -> None:
    """Refuse a folder with weights that the host would read instead."""
    ending = f".{variant}" if variant else ""
    for name in (
        f"model{ending}.safetensors",
        f"model.safetensors.index{ending}.json",
        f"pytorch_model{ending}.bin",
    ):
        if (folder / name).exists():
            raise CheckpointError(
                f"{folder / name}: holds weights that are read instead of the "
                "quantized ones, expected a folder without; save to another one"
            )


def _synchronised(model: Any) -> bool:
    """Have a model's quantizer be there if, and only if, it is quantized by hijack.

    Returns:
        Whether it is.
    """
    from hijack.hosts.transformers.quantizer import HijackQuantizer, is_quantized

    quantizer = getattr(model, "hf_quantizer", None)
    if not is_quantized(model):
        if isinstance(quantizer, HijackQuantizer):  # it was unwrapped
            quantizer.remove_quantization_config(model)
        return False
    if quantizer is None:
        HijackQuantizer(HijackConfig()).attach(model)
    elif not isinstance(quantizer, HijackQuantizer):
        raise CheckpointError(
            "save_pretrained: got a model with weights quantized by hijack and by "
            f"{type(quantizer).__name__}, expected one of them; call hijack.unwrap "
            "first"
        )
    return True


def spelled_state_dict(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A model's tensors and metadata as a file is to have them.

    Raises:
        CheckpointError: if a layer cannot be spelled.
    """
    tensors = _original_names(model, _one_tensor_a_weight(model))
    weights: dict[str, QuantizedTensor] = {}
    for key, tensor in list(tensors.items()):
        layer, _, name = key.rpartition(".")
        if isinstance(tensor, StackedWeight):
            stored = spell_stack(key, tensor) or {key: decoded(tensor, key)}
            del tensors[key]
            tensors |= stored
        elif name != "weight":
            tensors[key] = decoded(tensor, key)
        elif isinstance(tensor, QuantizedTensor):
            weights[layer] = tensor
            del tensors[key]
    spelled, metadata = spell(weights, choose_dialects(weights), tensors)
    return _with_own_memory(tensors | spelled), metadata


def _one_tensor_a_weight(model: nn.Module) -> dict[str, Tensor]:
    """A model's state dict, in which quantized weights travel as one tensor each.

    Of layers that share a quantized weight only the first is there: the host ties the
    others to it when it loads the file.
    """
    tensors: dict[str, Tensor] = model.state_dict()
    seen: set[int] = set()
    for name, module in model.named_modules():
        prefix = join(name, "")
        with _in_memory(module) as moved:
            if moved:
                module._save_to_state_dict(tensors, prefix, keep_vars=False)
            weight = quantized_weight(module)
        if weight is not None:
            for key in weight.plain_tensors():
                del tensors[prefix + key]
            if id(module.weight) not in seen:
                tensors[f"{prefix}weight"] = TravellingWeight.of(weight)
            seen.add(id(module.weight))
    return {key: travelling(tensor.detach(), key) for key, tensor in tensors.items()}


def _original_names(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as the model's first files had them, where the host can tell."""
    host = sys.modules.get("transformers.core_model_loading")
    if host is None:  # before transformers 5
        return tensors
    reverted: dict[str, Tensor] = host.revert_weight_conversion(model, tensors)
    return reverted


@contextlib.contextmanager
def _in_memory(module: nn.Module) -> Iterator[bool]:
    """Have what accelerate has offloaded of a module in memory.

    Yields:
        Whether there was anything.
    """
    own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    if not any(tensor.is_meta for tensor in own):
        yield False
        return
    from accelerate.utils import align_module_device

    with align_module_device(module, torch.device("cpu")):
        yield True


def _with_own_memory(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors apart from each other, as far as they are not tied.

    The host takes tensors that share memory for tied; those that were read from a file
    share that of the file.
    """
    own: dict[tuple[int, int], Tensor] = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach()
        place = tensor.data_ptr(), tensor.nbytes
        if place not in own:
            whole = tensor.untyped_storage().nbytes() == tensor.nbytes
            own[place] = tensor if whole else tensor.clone()
        tensors[key] = own[place]
    return tensors


def make_get_memory_footprint(original: Function) -> Function:
    """Count quantized weights as large as their data are."""

    def get_memory_footprint(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        size = original(self, *args, **kwargs)
        for weight in self.parameters():
            if isinstance(weight, QuantizedTensor):
                size -= weight.numel() * weight.element_size()
                size += sum(part.nbytes for part in weight.plain_tensors().values())
        return size

    return get_memory_footprint
