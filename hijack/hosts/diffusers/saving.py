"""Saving: quantized layers are written as a file of their dialect has them.

The config says so, in the words of the host, which refuses a method that it does not
know: without hijack nobody takes the quantized data for weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hijack.errors import CheckpointError
from hijack.hosts.config import HijackConfig
from hijack.hosts.diffusers.quantizer import Quantizer, create_class
from hijack.modules import quantized_weight
from hijack.quantized import QuantizedTensor
from hijack.safetensors_io.header import CONFIG_KEY
from hijack.saving import contents

Function = Callable[..., Any]


def make_save_pretrained(original: Function) -> Function:
    """Save a model with its quantized layers, whoever quantized them."""

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        quantized = [
            name
            for name, module in self.named_modules()
            if quantized_weight(module) is not None
        ]
        config = dict(self.config)
        known = isinstance(config.pop(CONFIG_KEY, None), HijackConfig)
        if not quantized:
            # one that was quantized is dense now, and its config would say otherwise
            instead = _instead(self, config) if known else contextlib.nullcontext()
            with instead:
                return original(self, *args, **kwargs)
        _check(self, quantized)
        tensors, metadata = contents(self)
        own = HijackConfig(metadata=metadata)
        attributes = {
            "state_dict": lambda: _apart(tensors),
            "hf_quantizer": create_class()(own),
        }
        with _instead(self, {**config, CONFIG_KEY: own}, **attributes):
            return original(self, *args, **kwargs)

    return save_pretrained


def _check(model: Any, layers: list[str]) -> None:
    """Refuse a model that cannot be written as it is.

    Raises:
        CheckpointError: if its data are elsewhere, or another quantizer has a part.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if not isinstance(quantizer, Quantizer | None):
        raise CheckpointError(
            f"save_pretrained: got layers quantized by hijack, such as {layers[0]}, in "
            f"a model that {type(quantizer).__name__} has quantized, expected one of "
            "them; call hijack.unwrap first"
        )
    away = [n for n in layers if model.get_submodule(n).weight.is_meta]
    if away:
        raise CheckpointError(
            f"save_pretrained: {away[0]} is offloaded, expected its data in memory; "
            "remove the hooks first, or load the model without offloading"
        )


@contextlib.contextmanager
def _instead(model: Any, config: dict[str, Any], **attributes: Any) -> Iterator[None]:
    """Have a model another config and other attributes meanwhile."""
    changes = {"_internal_dict": type(model.config)(config), **attributes}
    before = {key: vars(model)[key] for key in changes if key in vars(model)}
    vars(model).update(changes)
    try:
        yield
    finally:
        for key in changes:
            del vars(model)[key]
        vars(model).update(before)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as such that share memory only if they are the same.

    Those of a file are parts of it, and the host takes parts of one memory for tied,
    which it does not split into shards.
    """
    known: dict[tuple[int, int], Tensor] = {}
    result = {}
    for key, tensor in tensors.items():
        place = tensor.data_ptr(), tensor.nbytes
        if place not in known:
            known[place] = _own_storage(tensor)
        result[key] = known[place]
    return result


def _own_storage(tensor: Tensor) -> Tensor:
    """The same memory, as all that a storage has."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    if whole or tensor.device.type != "cpu" or not tensor.is_contiguous():
        return tensor
    data = tensor.reshape(-1).view(torch.uint8).numpy()
    return torch.from_numpy(data).view(tensor.dtype).reshape(tensor.shape)


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
