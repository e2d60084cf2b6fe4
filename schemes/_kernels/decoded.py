"""Products with a weight that is decoded as a whole, into memory all layers share."""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from schemes._kernels import buffers
from schemes._kernels.block_scaled import BlockScaled


def linear(
    decode: Callable[[BlockScaled, Tensor], None],
    x: Tensor,
    weight: BlockScaled,
    bias: Tensor | None,
) -> Tensor:
    """``F.linear`` with the decoded weight.

    Args:
        decode: called with the weight and memory (N, K) of ``x``'s dtype to write to.
        x: (M, K) float32, bfloat16 or float16.
        weight: (N, K), on the same device.
        bias: (N,) of ``x``'s dtype, or None.

    Returns:
        (M, N) of ``x``'s dtype.
    """
    n, k = weight.shape
    dense = buffers.shared("weight", n * k, x.dtype, x.device).view(n, k)
    decode(weight, dense)
    return F.linear(x, dense, bias)
