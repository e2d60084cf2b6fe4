"""Save models with their quantized layers."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor, nn

from hijack.errors import CheckpointError, HijackError
from hijack.formats import matching
from hijack.formats.dialect import Dialect, EncodedLayer
from hijack.offloading import refuse_offloaded
from hijack.quantized import QuantizedTensor
from hijack.safetensors_io.header import FRAMEWORK, TensorInfo, join, merge_metadata
from hijack.safetensors_io.writer import write_checkpoint
from hijack.scheme import Scheme


def save(
    model: nn.Module,
    path: str | os.PathLike[str],
    dialect: str | None = None,
    *,
    overwrite: bool = False,
) -> None:
    """Write a model with its quantized layers to a safetensors file.

    Args:
        model: any module; its quantized layers are written as quantized data.
        path: the file; written whole or not at all.
        dialect: how to spell the quantized layers; default is the dialect each came
            from, else the first of the scheme's that can spell all its layers.
        overwrite: whether a file that exists is replaced.

    Raises:
        CheckpointError: if the file exists and must not be replaced, if the dialect is
            unknown to a scheme or cannot spell a layer, or if a weight is sharded over
            processes.
        ModuleError: if weights are offloaded by hooks.
    """
    refuse_offloaded(model, "save")
    for name, parameter in model.named_parameters():
        if hasattr(parameter, "device_mesh"):
            raise CheckpointError(
                f"{name}: got a parameter that is sharded over processes, expected a "
                "whole one; save a state dict with torch.distributed.checkpoint"
            )
    weights = {
        name: weight
        for name, module in model.named_modules()
        if isinstance(weight := module._parameters.get("weight"), QuantizedTensor)
    }
    tensors = {key: t.detach() for key, t in model.state_dict().items()}
    for name, weight in weights.items():
        for key in weight.plain_tensors():
            del tensors[join(name, key)]
    spelled, metadata = spell(weights, _dialects(weights, dialect), tensors)
    metadata = FRAMEWORK | metadata
    write_checkpoint(path, tensors | spelled, metadata, overwrite=overwrite)


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


def _dialects(
    weights: Mapping[str, QuantizedTensor], name: str | None
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
