"""MXFP8: one power of two for 32 columns, and the order its scales are stored in.

NVIDIA's matrix units read the scales in tiles of 128 x 4, each as 32 x 16: row r and
column c of a tile are at row r % 32, column 4 * (r // 32) + c. ComfyUI stores them that
way, padded to whole tiles; all other programs store them in plain order.
Reference: cuBLAS documentation, "1D block scaling factors layout"; OCP MX, version 1.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from schemes._fp8.blocks import FP8_DTYPES, POWER_DTYPES, Pair
from schemes._fp8.dialects.base import QuantizedWeightInfo

#: Columns that share a scale.
COLS = 32
_TILE = (128, 4)


def plain_shape(shape: Pair) -> Pair:
    """Shape of the scales of (N, K) in plain order."""
    return shape[0], -(-shape[1] // COLS)


def tiled_shape(shape: Pair) -> Pair:
    """Shape of the scales of (N, K) in tiles, padded to whole ones."""
    rows, cols = plain_shape(shape)
    return -(-rows // _TILE[0]) * _TILE[0], -(-cols // _TILE[1]) * _TILE[1]


def to_tiles(scale: Tensor) -> Tensor:
    """(N, K/32) in plain order as tiles, padded with zeros."""
    rows, cols = scale.shape
    high, wide = -(-rows // _TILE[0]), -(-cols // _TILE[1])
    padded = scale.new_zeros((high * _TILE[0], wide * _TILE[1]), dtype=torch.uint8)
    padded[:rows, :cols] = scale.view(torch.uint8)
    tiles = padded.view(high, 4, 32, wide, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(padded.shape)


def from_tiles(scale: Tensor, shape: Pair) -> Tensor:
    """Tiles as (N, K/32) in plain order; a copy of the exponents' bits."""
    rows, cols = plain_shape(shape)
    high, wide = scale.shape[0] // _TILE[0], scale.shape[1] // _TILE[1]
    tiles = scale.view(torch.uint8).reshape(high, wide, 32, 4, 4)
    padded = tiles.permute(0, 3, 2, 1, 4).reshape(scale.shape)
    return padded[:rows, :cols].contiguous()


def is_tiled(info: QuantizedWeightInfo) -> bool:
    """Whether the scales may be in tiles, judging by their shape."""
    return tuple(info.scale.shape) == tiled_shape(info.shape)


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
