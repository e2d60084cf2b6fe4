"""Save models with their quantized layers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn

from hijack.errors import CheckpointError, HijackError
from hijack.formats import matching
from hijack.formats.dialect import Dialect, EncodedLayer
from hijack.offloading import refuse_offloaded
from hijack.quantized import QuantizedTensor
from hijack.resharding import is_distributed, whole
from hijack.safetensors_io.header import FRAMEWORK, TensorInfo, join, merge_metadata
from hijack.safetensors_io.writer import write_checkpoint
from hijack.scheme import Scheme
from hijack.sharding import shard_of
from hijack.stacked import StackedWeight


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    dialect: str | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write a model with its quantized layers to a safetensors file.

    A model that is sharded over processes is gathered, one weight after another, by all
    of them; the first one writes it. `torch.distributed.checkpoint` gathers nothing.

    Args:
        model: any module; its quantized layers are written as quantized data.
        path: the file; written whole or not at all.
        dialect: how to spell the quantized layers; default is the dialect each came
            from, else the first of the scheme's that can spell all its layers.
        overwrite: whether a file that exists is replaced.

    Raises:
        CheckpointError: if the file exists and must not be replaced, if the dialect is
            unknown to a scheme or cannot spell a layer.
        ModuleError: if weights are offloaded by hooks.
    """
    refuse_offloaded(model, "save")
    sharded = any(map(is_distributed, model.parameters()))
    writes = not sharded or torch.distributed.get_rank() == 0
    error = None
    try:
        tensors, metadata = contents(model, dialect, keep=writes)
        if writes:
            write_checkpoint(path, tensors, metadata, overwrite=overwrite)
    except Exception as raised:
        if not writes or not sharded:
            raise
        error = raised
    if sharded:  # the others hear of it, and wait until the file is there
        told = [None if error is None else str(error)]
        torch.distributed.broadcast_object_list(told, 0)
        if error is not None:
            raise error
        if told[0] is not None:
            raise CheckpointError(told[0])


def contents(
    model: nn.Module, dialect: str | None = None, *, keep: bool = True
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of a file that holds a model.

    Args:
        model: sharded weights are gathered one after another, by all processes.
        dialect: as for `save`.
        keep: whether to keep what is gathered; nothing is returned otherwise.

    Raises:
        CheckpointError: as `save` does.
    """
    tensors, weights = gathered(model, keep=keep)
    _refuse_stacks(tensors)
    if not keep:
        return {}, {}
    spelled, metadata = spell(weights, choose_dialects(weights, dialect), tensors)
    return tensors | spelled, FRAMEWORK | metadata


def gathered(
    model: nn.Module, *, keep: bool = True
) -> tuple[dict[str, Tensor], dict[str, QuantizedTensor]]:
    """A model's other tensors by key, and its quantized weights by layer.

    Args:
        model: sharded weights are gathered one after another, by all processes.
        keep: whether to keep what is gathered.
    """
    weights: dict[str, QuantizedTensor] = {}
    tensors = {key: t.detach() for key, t in model.state_dict().items()}
    for name, module in model.named_modules():
        parameter: Any = module._parameters.get("weight")
        if not isinstance(parameter, QuantizedTensor) and shard_of(parameter) is None:
            continue
        if isinstance(parameter, StackedWeight):
            continue  # it is one tensor in the state dict too
        weight: Any = whole(parameter)
        for key in weight.plain_tensors():
            del tensors[join(name, key)]
        if keep:
            weights[name] = weight
    for key, tensor in tensors.items():
        unsharded = whole(tensor)
        tensors[key] = unsharded if keep else unsharded.to("meta")
    return tensors, weights


def _refuse_stacks(tensors: Mapping[str, Tensor]) -> None:
    for key, tensor in tensors.items():
        if isinstance(tensor, QuantizedTensor):
            raise CheckpointError(
                f"{key}: got quantized weights stacked to one tensor, which no file "
                "stores, expected one tensor a weight; save with the host's own "
                "save_pretrained, or call hijack.unwrap first"
            )


def spell(
    weights: Mapping[str, QuantizedTensor],
    dialects: Mapping[str, Dialect],
    others: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Quantized weights as the tensors and the metadata of a file.

    Args:
        weights: layer to weight.
        dialects: layer to the dialect to spell it in.
        others: key to tensor, all other tensors of the file.
        metadata: what the file is to say of itself besides.

    Returns:
        Full key to tensor, and the metadata.

    Raises:
        HijackError: naming a layer that its dialect cannot spell.
    """
    tensors: dict[str, Tensor] = {}
    layers: dict[Dialect, dict[str, EncodedLayer]] = {}
    for name, weight in weights.items():
        dialect = dialects[name]
        try:
            encoded = dialect.encode(weight.qdata, weight.params, weight.options)
        except HijackError as error:
            raise type(error)(f"{name or 'weight'}: {error}") from error
        tensors |= {join(name, suffix): tensor for suffix, tensor in encoded.items()}
        spelled = matching.encoded_layer(weight, encoded)
        layers.setdefault(dialect, {})[name] = spelled
    infos = {key: TensorInfo.of(tensor) for key, tensor in others.items()}
    marks = matching.file_metadata(layers, infos)
    said = merge_metadata(dict(metadata or {}), marks.metadata)
    return {**tensors, **marks.tensors}, said


def choose_dialects(
    weights: Mapping[str, QuantizedTensor], name: str | None = None
) -> dict[str, Dialect]:
    """The dialect of each layer; one for all that have none of their own."""
    chosen: dict[str, Dialect] = {}
    free: dict[Scheme, list[str]] = {}
    for layer, weight in weights.items():
        if name is not None:
            chosen[layer] = matching.dialect_of(weight.scheme, name)
            continue
        own = weight.config.dialect
        fit = encoding_dialect(weight, own)
        if own == fit.name:
            chosen[layer] = fit
        else:
            free.setdefault(weight.scheme, []).append(layer)
    for scheme, layers in free.items():
        fits = {encoding_dialect(weights[layer], None) for layer in layers}
        fit = fits.pop() if len(fits) == 1 else matching.native_of(scheme)
        chosen |= dict.fromkeys(layers, fit)
    return chosen


def encoding_dialect(weight: QuantizedTensor, name: str | None) -> Dialect:
    """The dialect of that name if it can spell a weight, else one that can."""
    return matching.encoding_dialect(
        weight.scheme, name, weight.qdata, weight.params, weight.options
    )
