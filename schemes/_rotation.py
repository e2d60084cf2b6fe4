"""The rotation of ConvRot's formats: a regular Hadamard matrix over groups of columns.

With H4 = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]] the matrix of a
group of g = 4^n columns is the n-fold Kronecker power of H4 over sqrt(g). It is
symmetric and its own inverse, so that the same product rotates a weight and turns it
back. Its numbers are +-2^-n, which every floating dtype has exactly. A tensor without
elements, ``weight_rotation`` of shape (g, 0), says how a weight is rotated.

Reference: comfy-kitchen, ``tensor/int8_utils.py``, whose product this is bit for bit on
the same machine. Processors differ in the order in which they add.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hijack.errors import SchemeError, ShapeError

#: Groups of columns that may be rotated; 0 rotates none.
ROTATIONS = (0, 4, 16, 64, 256, 1024, 4096)


def is_rotation_size(group: int) -> bool:
    """Whether a group of that many columns can be rotated: a power of 4, at least 4."""
    return group in ROTATIONS[1:]


def check_rotation(group: int, columns: int) -> None:
    """Refuse groups that no regular Hadamard matrix has, or that do not divide.

    Raises:
        SchemeError: with what is expected.
    """
    if group not in ROTATIONS or (group and columns % group):
        raise SchemeError(
            f"rotation: got {group!r} for {columns} columns, expected 0 or a power of "
            f"4 up to {ROTATIONS[-1]} that divides them"
        )


def rotate(matrix: Tensor, group: int) -> Tensor:
    """Rotate each group of the last dimension of a weight; twice gives it again.

    Args:
        matrix: (..., K) floating point, which the product is formed in.
        group: how many columns are rotated together, 4, 16, 64, 256 and so on.

    Returns:
        (..., K) of the same dtype, in new memory.

    Raises:
        SchemeError: if there is no such rotation, or it does not divide K.
    """
    # transposed it is the same matrix, but libraries add in another order
    return _times(matrix, _hadamard(group, matrix).t())


def rotate_inputs(inputs: Tensor, group: int) -> Tensor:
    """As `rotate`, with the sum in the order in which comfy-kitchen rotates inputs."""
    return _times(inputs, _hadamard(group, inputs))


def rotation_of(params: Mapping[str, Tensor]) -> int:
    """Columns of a rotated group; 0 if the weight is not rotated.

    Raises:
        ShapeError: if the tensor that says it has another shape.
    """
    marker = params.get("weight_rotation")
    if marker is None:
        return 0
    if marker.ndim != 2 or marker.shape[1] != 0:
        raise ShapeError(
            f"weight_rotation: has shape {tuple(marker.shape)}, expected (columns, 0)"
        )
    return int(marker.shape[0])


def rotation_marker(group: int, device: torch.device) -> dict[str, Tensor]:
    """The parameter that says how a weight is rotated; nothing if it is not."""
    if not group:
        return {}
    return {
        "weight_rotation": torch.empty((group, 0), dtype=torch.uint8, device=device)
    }


def uniform(like: Tensor, random: torch.Generator) -> Tensor:
    """Random numbers from 0 to 1 of another tensor's shape and dtype."""
    return torch.rand(
        like.shape, dtype=like.dtype, device=like.device, generator=random
    )


def _times(matrix: Tensor, by: Tensor) -> Tensor:
    """Every group of g columns of (..., K) times a matrix (g, g)."""
    groups = matrix.reshape(*matrix.shape[:-1], -1, len(by))
    return torch.matmul(groups, by).reshape(matrix.shape)


def _hadamard(group: int, like: Tensor) -> Tensor:
    """(group, group) of another tensor's dtype and device.

    Made anew each time: a kept one would have to know compilers and inference mode.
    """
    check_rotation(group, like.shape[-1])
    # made where it is used: a copy to a device would wait for it
    index = torch.arange(4, device=like.device)
    signs = torch.where(index + index[:, None] == 3, -1, 1)
    four = matrix = signs.to(like.dtype)
    while len(matrix) < group:
        matrix = torch.kron(matrix, four)
    return matrix / math.sqrt(group)
