"""What the files of a library are to hold of a model with quantized layers."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hijack.errors import CheckpointError
from hijack.formats.stacked_blocks import spell_stack
from hijack.hosts.checkpoint import TravellingWeight, decoded, travelling
from hijack.hosts.quantizer import Quantizer
from hijack.quantized import QuantizedTensor
from hijack.safetensors_io.header import join
from hijack.saving import choose_dialects, gathered, spell
from hijack.stacked import StackedWeight

Tensors = dict[str, Tensor]


def file_contents(
    model: nn.Module, rename: Callable[[nn.Module, Tensors], Tensors] | None = None
) -> tuple[Tensors, dict[str, str]]:
    """A model's tensors and metadata as a file is to have them.

    Args:
        model: what accelerate has offloaded of it is read.
        rename: given the model and its tensors, of which a quantized weight is one
            that travels, returns those that are to be spelled, by their names in the
            file.

    Raises:
        CheckpointError: if a layer cannot be spelled, or its data are elsewhere.
    """
    tensors = _one_tensor_a_weight(model)
    if rename is not None:
        tensors = rename(model, tensors)
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
    return with_own_memory(tensors | spelled), metadata


def _one_tensor_a_weight(model: nn.Module) -> Tensors:
    """A model's tensors; layers that share a quantized weight share the one tensor."""
    with _in_memory(model):
        tensors, weights = gathered(model)
    shared: dict[int, Tensor] = {}
    for layer, weight in weights.items():
        parameter = model.get_submodule(layer).weight
        one = shared.setdefault(id(parameter), TravellingWeight.of(weight))
        tensors[join(layer, "weight")] = one
    for key, tensor in tensors.items():
        if tensor.is_meta:
            raise CheckpointError(
                f"{key}: is offloaded, expected its data in memory; remove the hooks "
                "first, or load the model without offloading"
            )
        tensors[key] = travelling(tensor, key)
    return tensors


@contextlib.contextmanager
def _in_memory(model: nn.Module) -> Iterator[None]:
    """Have what accelerate has offloaded of a model in memory."""
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            own = (*module.parameters(recurse=False), *module.buffers(recurse=False))
            if hasattr(module, "_hf_hook") and any(tensor.is_meta for tensor in own):
                from accelerate.utils import align_module_device

                cpu = torch.device("cpu")
                stack.enter_context(align_module_device(module, cpu))
        yield


def with_own_memory(tensors: Mapping[str, Tensor]) -> Tensors:
    """The tensors as such that share memory only if they are the same.

    Those of a file are parts of it, and libraries take parts of one memory for tied.
    On the CPU nothing is copied.
    """
    known: dict[Any, Tensor] = {}
    result = {}
    for key, tensor in tensors.items():
        tensor = tensor.detach()
        layout = tensor.dtype, tensor.shape, tensor.stride()
        place = tensor.device, tensor.data_ptr(), layout
        if place not in known:
            known[place] = _own_storage(tensor)
        result[key] = known[place]
    return result


def _own_storage(tensor: Tensor) -> Tensor:
    """The same numbers, as all that a storage has."""
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    if tensor.device.type != "cpu" or not tensor.is_contiguous():
        return tensor.clone()
    data = tensor.reshape(-1).view(torch.uint8).numpy()
    return torch.from_numpy(data).view(tensor.dtype).reshape(tensor.shape)


def refuse_other_quantizer(model: Any) -> None:
    """Refuse a model that another quantizer has quantized a part of.

    Raises:
        CheckpointError: naming the other one.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, Quantizer | None):
        raise CheckpointError(
            "save_pretrained: got a model with weights quantized by hijack and by "
            f"{type(quantizer).__name__}, expected one of them; call hijack.unwrap "
            "first"
        )
