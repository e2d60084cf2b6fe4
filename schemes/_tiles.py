"""The order in which NVIDIA's matrix units read the scales of blocks.

They read tiles of 128 x 4 scales, each as 32 x 16: row r and column c of a tile are at
row r % 32, column 4 * (r // 32) + c. ComfyUI stores scales that way, padded to whole
tiles; most other programs store them in plain order.
Reference: cuBLAS documentation, "1D block scaling factors layout".
"""

from __future__ import annotations

import torch
from torch import Tensor

_ROWS, _COLS = 128, 4


def tiled_shape(grid: tuple[int, int]) -> tuple[int, int]:
    """Shape of scales in tiles, padded to whole ones.

    Args:
        grid: shape of the scales in plain order.
    """
    return -(-grid[0] // _ROWS) * _ROWS, -(-grid[1] // _COLS) * _COLS


def torchao_shape(grid: tuple[int, int]) -> tuple[int, int]:
    """Shape under which torchao stores tiles: each is a row of 32 x 16.

    It is never that of scales in plain order.

    Args:
        grid: shape of the scales in plain order.
    """
    high, wide = tiled_shape(grid)
    return high // 4, wide * 4


def to_tiles(scale: Tensor) -> Tensor:
    """Scales in plain order as tiles, padded with zeros.

    Args:
        scale: (rows, columns), of a dtype of one byte.
    """
    rows, cols = scale.shape
    high, wide = tiled_shape((rows, cols))
    padded = scale.new_zeros((high, wide), dtype=torch.uint8)
    padded[:rows, :cols] = scale.view(torch.uint8)
    tiles = padded.view(high // _ROWS, 4, 32, wide // _COLS, 4).permute(0, 3, 2, 1, 4)
    return tiles.reshape(padded.shape).view(scale.dtype)


def from_tiles(scale: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tiles as scales in plain order, in new memory.

    Args:
        scale: of `tiled_shape`, of a dtype of one byte.
        grid: shape of the scales in plain order.
    """
    high, wide = scale.shape[0] // _ROWS, scale.shape[1] // _COLS
    tiles = scale.view(torch.uint8).reshape(high, wide, 32, 4, 4)
    padded = tiles.permute(0, 3, 2, 1, 4).reshape(scale.shape)
    return padded[: grid[0], : grid[1]].contiguous().view(scale.dtype)
