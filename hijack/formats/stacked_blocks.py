"""Experts in MXFP4 as two tensors for all of them, the way gpt-oss is published.

A parameter ``X`` of shape (E, K, N), the transposed weights of E experts, is stored as
``X_blocks`` (E, N, K/32, 16) uint8, two codes a byte, and ``X_scales`` (E, N, K/32)
uint8. Code by code it is what the scheme ``mxfp4`` has for each weight (N, K).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hijack.quantized import QuantizationConfig
from hijack.registry import Registry
from hijack.safetensors_io.header import Header
from hijack.stacked import StackedWeight

_SCHEME = "mxfp4"
_BLOCKS, _SCALES = "_blocks", "_scales"
_SCALE = "weight_scale"


def find_stacks(header: Header, registry: Registry) -> tuple[str, ...]:
    """Names of the parameters that a checkpoint stores so, if they can be read."""
    if _SCHEME not in registry.schemes():
        return ()
    return tuple(
        name
        for key in header.tensors
        if key.endswith(_BLOCKS)
        and _fit(header, name := key.removesuffix(_BLOCKS), key, name + _SCALES)
    )


def keys_of(name: str) -> tuple[str, str]:
    """Keys of the two tensors of a parameter."""
    return name + _BLOCKS, name + _SCALES


def read_stack(
    name: str, tensors: Mapping[str, Tensor], registry: Registry, dtype: Any
) -> StackedWeight:
    """A parameter as one tensor.

    Args:
        name: of the parameter, one of those that `find_stacks` found.
        tensors: of the checkpoint.
        registry: which has the scheme.
        dtype: that it stands for.
    """
    blocks, scales = (tensors[key] for key in keys_of(name))
    experts, rows, groups, width = blocks.shape
    qdata = blocks.reshape(experts, rows, groups * width)
    config = QuantizationConfig.of(registry.get(_SCHEME))
    shape = (experts, 2 * groups * width, rows)
    stack = StackedWeight(qdata, {_SCALE: scales}, config, shape, dtype)
    stack.transposed = True
    return stack


def spell_stack(name: str, stack: StackedWeight) -> dict[str, Tensor] | None:
    """The two tensors of a parameter; None if it cannot be stored so."""
    stored = stack.scheme.name == _SCHEME and stack.transposed
    if not stored or stack.params.keys() != {_SCALE} or stack.additions:
        return None
    scales = stack.params[_SCALE]
    return dict(
        zip(
            keys_of(name),
            (stack.qdata.reshape(*scales.shape, -1), scales),
            strict=True,
        )
    )


def _fit(header: Header, name: str, blocks: str, scales: str) -> bool:
    if name in header.tensors or scales not in header.tensors:
        return False
    found, scale = header.tensors[blocks], header.tensors[scales]
    return (
        (found.dtype, scale.dtype) == ("U8", "U8")
        and len(found.shape) == 4
        and found.shape[-1] == 16
        and found.shape[:-1] == scale.shape
    )
