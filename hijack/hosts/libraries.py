"""What adapters of libraries that load models from folders have in common.

Such a library knows quantizers and a ``quantization_config``; see `HijackConfig`.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hijack.formats.native_marker import marked_layers
from hijack.hosts.checkpoint import read_quantized
from hijack.hosts.config import HijackConfig
from hijack.modules import quantized_weight
from hijack.quantized import QuantizedTensor
from hijack.registry import current_registry
from hijack.safetensors_io.header import Header
from hijack.selection import choose


def read_files(
    files: Sequence[Any],
    state_dict: Mapping[str, Tensor] | None,
    load: Callable[[Any], Mapping[str, Tensor]],
    config: HijackConfig | None,
) -> dict[str, Tensor] | None:
    """The weights of a model's files as a host wants them.

    Args:
        files: all of them: a scale may be in another than its weight.
        state_dict: what the host has read of them, if it has.
        load: reads a file that is no safetensors file.
        config: of the model, if it has one.

    Returns:
        As for `read_quantized`: None if nothing is quantized.
    """
    config = HijackConfig() if config is None else config
    if files and all(str(file).endswith(".safetensors") for file in files):
        return read_quantized([os.fspath(f) for f in files], assume=config.assume)
    if state_dict is None:
        state_dict = {key: t for file in files for key, t in load(file).items()}
    marked = _Marked(state_dict)
    layers = marked_layers(config.metadata)
    marked._metadata = {name: {"hijack": entry} for name, entry in layers.items()}
    return read_quantized(marked, assume=config.assume)


class _Marked(dict[str, Tensor]):
    """A state dict that says which layers are quantized, as that of a module does."""

    _metadata: dict[str, Any]


def choose_layers(model: nn.Module, config: HijackConfig) -> dict[str, dict[str, Any]]:
    """The layers of a dense model that a config has quantized, and their options.

    Args:
        model: may be on the meta device.
        config: one without a scheme chooses none.

    Raises:
        CheckpointError: if a pattern matches no layer, or none is left to quantize.
    """
    if config.scheme is None:
        return {}
    scheme, modules = current_registry().get(config.scheme), dict(model.named_modules())
    choice = choose(
        Header.from_state_dict(model.state_dict()),
        scheme.targets,
        config.include,
        config.exclude,
        config.rules,
        lambda shape, own: scheme.declines(shape, **{**config.options, **own}),
    )
    return {
        layer: {**config.options, **options}
        for layer, options in choice.layers.items()
        if isinstance(modules[layer], scheme.targets)
    }


def check_config(config: HijackConfig) -> None:
    """Refuse a scheme or options that nobody knows, before anything is read."""
    if config.scheme is not None:
        current_registry().get(config.scheme).check_options(config.options)


def count_quantized(models: Iterable[nn.Module]) -> int:
    """How many modules of some models hold quantized weights."""
    modules = (module for model in models for module in model.modules())
    return sum(quantized_weight(module) is not None for module in modules)


# -- saving ----------------------------------------------------------------------------


def with_own_memory(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as such that share memory only if they are the same.

    Those of a file are parts of it, and hosts take parts of one memory for tied, which
    they do not split into shards. Nothing is copied.
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
    data = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return torch.from_numpy(data).view(tensor.dtype).reshape(tensor.shape)


def make_get_memory_footprint(original: Callable[..., Any]) -> Callable[..., Any]:
    """Count quantized weights as large as their data are."""

    @functools.wraps(original)
    def get_memory_footprint(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        size = original(self, *args, **kwargs)
        for weight in self.parameters():
            if isinstance(weight, QuantizedTensor):
                size -= weight.numel() * weight.element_size()
                size += sum(part.nbytes for part in weight.plain_tensors().values())
        return size

    return get_memory_footprint
