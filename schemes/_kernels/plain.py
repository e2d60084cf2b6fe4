"""The decode that every kernel equals, in torch operations that any device has.

It is what runs where no kernel does: on the meta device, in compiled code, under
transforms and dispatch modes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from schemes._blocks import multiply
from schemes._kernels.block_scaled import BlockScaled


def decode(weight: BlockScaled, dtype: torch.dtype) -> Tensor:
    """The dense weight: the product in float32, rounded once.

    Args:
        weight: (N, K).
        dtype: floating dtype of the result.

    Returns:
        (N, K) of ``dtype``.
    """
    return multiply(numbers(weight), scales(weight), weight.size).to(dtype)


def numbers(weight: BlockScaled) -> Tensor:
    """What the codes stand for: (N, K) float32."""
    codes = weight.codes
    if weight.table is None:
        return codes.float()
    pair = torch.stack(nibbles(codes, weight.high_first), 2)  # (N, K/2, 2)
    return weight.table[pair.flatten(1).int()]


def nibbles(packed: Tensor, high_first: bool) -> tuple[Tensor, Tensor]:
    """The first and the second code of each byte, as uint8."""
    low, high = packed & 15, packed >> 4
    return (high, low) if high_first else (low, high)


def scales(weight: BlockScaled) -> Tensor:
    """(ceil(N/R), ceil(K/C)) float32, with the factor in them."""
    scale = weight.scale.float()
    return scale if weight.factor is None else scale * weight.factor
