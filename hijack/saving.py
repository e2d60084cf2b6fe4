"""Save models with their quantized layers."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import Tensor, nn

from hijack.errors import HijackError
from hijack.formats.dialect import Dialect, Spelled
from hijack.hooks import Wrapped
from hijack.loading import quantized
from hijack.safetensors_io.header import TensorInfo, join
from hijack.safetensors_io.writer import write_checkpoint
from hijack.scheme import Scheme


def save(
    model: nn.Module, path: str | os.PathLike[str], dialect: str | None = None
) -> None:
    """Write a model with its quantized layers to a safetensors file.

    Args:
        model: any module; wrapped layers are written as codes.
        path: the file; written whole or not at all.
        dialect: how to spell the quantized layers; default is the dialect each came
            from, else the first of the scheme's that can spell all its layers.

    Raises:
        CheckpointError: if the dialect is unknown to a scheme or cannot spell a layer.
    """
    wrapped = {n: m for n, m in model.named_modules() if isinstance(m, Wrapped)}
    tensors = {key: t.detach() for key, t in model.state_dict().items()}
    spelled: dict[Dialect, dict[str, Spelled]] = {}
    coded: dict[str, Tensor] = {}
    for name, chosen in _dialects(wrapped, dialect).items():
        module = wrapped[name]
        qdata, params = quantized(module)
        for key in ("weight", *params):
            del tensors[join(name, key)]
        try:
            made = chosen.encode(qdata, params, module._hijack.options)
        except HijackError as error:
            raise type(error)(f"{name or 'weight'}: {error}") from error
        coded |= {join(name, suffix): tensor for suffix, tensor in made.items()}
        scheme = module._hijack.scheme
        spelled.setdefault(chosen, {})[name] = Spelled(
            scheme.name,
            tuple(params),
            module._hijack.shape,
            scheme.block_size(qdata, params),
            {suffix: TensorInfo.of(tensor) for suffix, tensor in made.items()},
        )
    metadata: dict[str, str] = {}
    others = {key: TensorInfo.of(tensor) for key, tensor in tensors.items()}
    marks = [of.finish(layers, others) for of, layers in spelled.items()]
    for mark in marks:
        metadata |= mark.metadata
        coded |= mark.tensors
    write_checkpoint(path, tensors | coded, metadata)


def _dialects(wrapped: Mapping[str, Wrapped], name: str | None) -> dict[str, Dialect]:
    """The dialect of each wrapped layer; one for all that have none of their own."""
    chosen: dict[str, Dialect] = {}
    free: dict[Scheme, list[str]] = {}
    for layer, module in wrapped.items():
        scheme, own = module._hijack.scheme, module._hijack.dialect
        if name is not None:
            chosen[layer] = scheme.dialect(name)
            continue
        fit = scheme.written_as(own, *quantized(module), module._hijack.options)
        if own == fit.name:
            chosen[layer] = fit
        else:
            free.setdefault(scheme, []).append(layer)
    for scheme, layers in free.items():
        modules = [wrapped[layer] for layer in layers]
        fits = {
            scheme.written_as(None, *quantized(module), module._hijack.options)
            for module in modules
        }
        fit = fits.pop() if len(fits) == 1 else scheme.native
        chosen |= dict.fromkeys(layers, fit)
    return chosen
