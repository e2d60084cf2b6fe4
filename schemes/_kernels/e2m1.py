"""Round to E2M1 and pack two codes into a byte; see `schemes._fp4` for the numbers."""

from __future__ import annotations

import torch
from torch import Tensor

#: Largest magnitude.
MAX = 6.0


def encode(values: Tensor) -> Tensor:
    """Round to the nearest E2M1 number, ties to the even code, and pack.

    Args:
        values: (N, K) float32; K is even. What exceeds 6 becomes 6.

    Returns:
        (N, K/2) uint8.
    """
    size = values.abs().clamp(max=MAX)
    # steps of a half up to 2, of one up to 4, and then of two
    large = torch.where(size < 4, size.round() + 2, (size / 2).round() + 4)
    codes = torch.where(size < 2, (size * 2).round(), large).to(torch.uint8)
    codes += values.signbit().to(torch.uint8) * 8
    return codes[:, ::2] | (codes[:, 1::2] << 4)
