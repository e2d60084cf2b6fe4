"""MXFP8: one power of two for 32 columns, and the order its scales are stored in.

NVIDIA's matrix units read the scales in tiles of 128 x 4, each as 32 x 16: row r and
column c of a tile are at row r % 32, column 4 * (r // 32) + c. ComfyUI stores them that
way, padded to whole tiles; everybody else in plain order.
Reference: cuBLAS documentation, "1D block scaling factors layout"; OCP MX, version 1.0.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hijack.formats.claim import Certainty
from hijack.formats.dialect import Row
from hijack.safetensors_io.header import Header
from schemes._fp8.blocks import FP8_DTYPES, POWER_DTYPES, Pair
from schemes._fp8.dialects.base import Found, FP8Dialect, Said
from schemes._fp8.dialects.markers import marked

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


def is_tiled(found: Found) -> bool:
    """Whether the scales have the shape of tiles, and so may be."""
    return tuple(found.scale.shape) == tiled_shape(found.shape)


def is_plain(found: Found) -> bool:
    """Whether the scales have the shape of plain order, and so may be in it."""
    return tuple(found.scale.shape) == plain_shape(found.shape)


def is_mx(found: Found) -> bool:
    """Whether dtypes and shapes are those of MXFP8 at all."""
    return (
        found.weight.torch_dtype == FP8_DTYPES[0]
        and found.scale.torch_dtype in POWER_DTYPES
        and len(found.weight.shape) == 2
        and found.shape[1] % COLS == 0
    )


class PlainMXDialect(FP8Dialect):
    """MXFP8 with scales in plain order, and nothing that says so.

    Where 128 divides the rows and also 4 the scales of one, ComfyUI's tiles have the
    same shape: then either is a guess, unless a config names a method without tiles.
    """

    name = "mxfp8"
    scale_dtypes = POWER_DTYPES
    row = Row(
        "exporters of MXFP8",
        "X.weight, X.weight_scale",
        "U8 or F8_E8M0 (N, K/32), in plain order",
        "1 x 32",
        "none; of ComfyUI's shapes where 128 divides N and K",
    )

    def grid(self, scale: tuple[int, ...], shape: Pair) -> Pair | None:
        """Of plain order, or none."""
        return plain_shape(shape) if scale == plain_shape(shape) else None

    def said(self, header: Header, found: Found) -> Said | None:
        """Claim what no marker or config claims."""
        method = header.quantization.get("quant_method")
        if not is_mx(found) or marked(header, found.layer):
            return None
        if method not in (None, "mxfp8", "modelopt"):
            return None
        tiles = method is None and is_tiled(found)
        sure = Certainty.GUESS if tiles else Certainty.UNIQUE
        return Said(sure, "scales in plain order", (1, COLS))
