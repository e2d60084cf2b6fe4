"""The state dict of a model as its files have it."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from hijack.formats.stacked_blocks import spell_stack
from hijack.hosts.checkpoint import TravellingWeight, decoded, travelling
from hijack.modules import quantized_weight
from hijack.quantized import QuantizedTensor
from hijack.safetensors_io.header import join
from hijack.saving import choose_dialects, spell
from hijack.stacked import StackedWeight


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
