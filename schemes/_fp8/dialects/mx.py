"""MXFP8: one power of two for 32 columns, stored in plain order or in tiles.

Reference: OCP Microscaling Formats (MX), version 1.0.
"""

from __future__ import annotations

from schemes import _tiles as tiles
from schemes._blocks import Pair
from schemes._fp8.blocks import FP8_DTYPES, POWER_DTYPES
from schemes._fp8.dialects.base import QuantizedWeightInfo

#: Columns that share a scale.
COLS = 32


def plain_shape(shape: Pair) -> Pair:
    """Shape of the scales of (N, K) in plain order."""
    return shape[0], -(-shape[1] // COLS)


def tiled_shape(shape: Pair) -> Pair:
    """Shape of the scales of (N, K) in tiles, padded to whole ones."""
    return tiles.tiled_shape(plain_shape(shape))


def is_tiled(info: QuantizedWeightInfo) -> bool:
    """Whether the scales may be in tiles, judging by their shape."""
    return tuple(info.scale.shape) == tiled_shape(info.shape)


def is_tiled_by_torchao(info: QuantizedWeightInfo) -> bool:
    """Whether the scales may be in tiles of torchao's shape."""
    return tuple(info.scale.shape) == tiles.torchao_shape(plain_shape(info.shape))


def is_plain(info: QuantizedWeightInfo) -> bool:
    """Whether the scales may be in plain order, judging by their shape."""
    return tuple(info.scale.shape) == plain_shape(info.shape)


def is_mx(info: QuantizedWeightInfo) -> bool:
    """Whether dtypes and shapes are those of MXFP8."""
    return (
        info.weight.torch_dtype == FP8_DTYPES[0]
        and info.scale.torch_dtype in POWER_DTYPES
        and len(info.weight.shape) == 2
        and info.shape[1] % COLS == 0
    )
