"""What adapters of libraries that load models from folders have in common.

Such a library knows a ``quantization_config``, see `HijackConfig`, and asks a
`Quantizer`; what it writes is in `hijack.hosts.saving`.
"""

from __future__ import annotations

import functools
import os
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hijack.device_map import place_of
from hijack.errors import CheckpointError
from hijack.formats.native_marker import marked_layers
from hijack.hosts.checkpoint import decoded, is_dense, read_quantized
from hijack.hosts.config import HijackConfig
from hijack.hosts.quantizer import Quantizer
from hijack.modules import quantized_weight
from hijack.quantized import QuantizedTensor
from hijack.safetensors_io.header import Header, join
from hijack.sharding import shard_of
from hijack.stacked import StackedWeight


def read_files(
    files: Sequence[Any],
    state_dict: Mapping[str, Tensor] | None,
    quantizer: Any,
    *,
    dtype: torch.dtype = torch.float32,
    load: Callable[..., Mapping[str, Tensor]] | None = None,
) -> dict[str, Tensor] | None:
    """The weights of a model's files as a library wants them.

    Args:
        files: all of them: a scale may be in another than its weight.
        state_dict: what the library has read of them, or was given instead.
        quantizer: that the library has found, hijack's or another's; None if none.
        dtype: that quantized weights stand for.
        load: reads a file that is no safetensors file, to the device ``map_location``;
            None leaves such files alone.

    Returns:
        As for `read_quantized`: None if nothing is quantized, or another has done it.

    Raises:
        CheckpointError: if they are quantized, and a quantizer is to quantize them.
    """
    config = HijackConfig()
    quantizes = quantizer is not None
    if isinstance(quantizer, Quantizer):
        config, quantizes = quantizer.quantization_config, quantizer.scheme is not None
    elif quantizes:
        if quantizer.pre_quantized:
            return None
        load = None
    weights = _read(files, state_dict, config, dtype, load)
    if weights is not None and quantizes:
        raise CheckpointError(
            "quantization_config: got one that quantizes a dense checkpoint, and this "
            "is quantized already, expected none; leave out the quantization_config, "
            "or use HijackConfig() to read it"
        )
    return weights


def _read(
    files: Sequence[Any],
    state_dict: Mapping[str, Tensor] | None,
    config: HijackConfig,
    dtype: torch.dtype,
    load: Callable[..., Mapping[str, Tensor]] | None,
) -> dict[str, Tensor] | None:
    how: dict[str, Any] = {"assume": config.assume, "dtype": dtype}
    if files and all(str(file).endswith(".safetensors") for file in files):
        return read_quantized([os.fspath(file) for file in files], **how)
    if state_dict is None:
        if load is None:
            return None
        said = config.metadata or config.assume
        if not said and _are_dense(files, load):
            return None
        state_dict = {key: t for file in files for key, t in load(file).items()}
    layers = marked_layers(config.metadata)
    if layers:
        state_dict = _Marked(state_dict)
        state_dict._metadata = {n: {"hijack": entry} for n, entry in layers.items()}
    return read_quantized(state_dict, **how)


def _are_dense(files: Sequence[Any], load: Callable[..., Mapping[str, Tensor]]) -> bool:
    """Whether no tensor of some pickled files is quantized; no numbers are read."""
    metas = [load(file, map_location="meta") for file in files]
    tensors = {key: t for meta in metas for key, t in meta.items()}
    return is_dense(Header.from_state_dict(tensors))


class _Marked(dict[str, Tensor]):
    """A state dict that says which layers are quantized, as that of a module does."""

    _metadata: dict[str, Any]


def without_disk(device_map: Mapping[str, Any]) -> dict[str, Any]:
    """A device map with the CPU in the place of the disk.

    What is for the disk is written there once it is quantized; until then it stays in
    the file it is read from.
    """
    places = device_map.items()
    return {name: "cpu" if place == "disk" else place for name, place in places}


# -- models ----------------------------------------------------------------------------

#: Models with quantized weights that are alive, by the library that loaded them.
_LOADED: dict[str, weakref.WeakSet[nn.Module]] = {}


def remember(library: str, model: nn.Module) -> None:
    """Count a model among those that a library has loaded."""
    _LOADED.setdefault(library, weakref.WeakSet()).add(model)


def count_live(library: str) -> int:
    """How many modules of the models it has loaded hold quantized weights."""
    modules = (m for model in list(_LOADED.get(library, ())) for m in model.modules())
    return sum(quantized_weight(module) is not None for module in modules)


def is_quantized(model: nn.Module) -> bool:
    """Whether any weight of a model is quantized by hijack, or was before sharding."""
    return any(
        isinstance(weight, QuantizedTensor) or shard_of(weight) is not None
        for weight in model.parameters()
    )


def decode_stacks_on_disk(model: nn.Module, device_map: Mapping[str, Any]) -> None:
    """Decode stacks of weights that are for the disk: accelerate writes none there."""
    for name, module in model.named_modules():
        for attribute, stack in list[Any](module._parameters.items()):
            key = join(name, attribute)
            on_disk = place_of(key, device_map) == "disk"
            if isinstance(stack, StackedWeight) and on_disk:
                dense = nn.Parameter(decoded(stack, key), requires_grad=False)
                module._parameters[attribute] = dense


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
