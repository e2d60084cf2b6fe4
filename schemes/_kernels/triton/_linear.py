"""``F.linear`` with a quantized weight, on GPUs."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from schemes._kernels import decoded
from schemes._kernels.block_scaled import BlockScaled
from schemes._kernels.triton._decode import decode
from schemes._kernels.triton.gemm import MAX_INPUTS as MAX_GEMM_INPUTS
from schemes._kernels.triton.gemm import can_multiply, gemm
from schemes._kernels.triton.gemv import MAX_INPUTS as MAX_GEMV_INPUTS
from schemes._kernels.triton.gemv import gemv


def linear(x: Tensor, weight: BlockScaled, bias: Tensor | None) -> Tensor:
    """``F.linear`` with a weight that is decoded for it.

    Few inputs are multiplied with the codes; for more, the weight is decoded into
    memory that all layers share, and the product is torch's own. Where derivatives are
    wanted the product is always torch's, with memory of its own: it keeps the weight.

    Args:
        x: (M, K) float32, bfloat16 or float16.
        weight: (N, K), on the same device.
        bias: (N,) of ``x``'s dtype, or None.

    Returns:
        (M, N) of ``x``'s dtype. It equals the product with the decoded weight within
        the rounding of another order of addition.
    """
    m = x.shape[0]
    if bias is not None and not bias.is_contiguous():
        bias = bias.contiguous()
    if not _is_differentiated(x, bias):
        if 0 < m <= MAX_GEMV_INPUTS:
            return gemv(x, weight, bias)
        if 0 < m <= MAX_GEMM_INPUTS and can_multiply(x, weight):
            return gemm(x, weight, bias)
        return decoded.linear(decode, x, weight, bias)
    dense = x.new_empty(weight.shape)
    decode(weight, dense)
    return F.linear(x, dense, bias)


def _is_differentiated(x: Tensor, bias: Tensor | None) -> bool:
    """Whether a derivative with respect to the inputs or the bias is wanted."""
    if torch.is_grad_enabled() and (
        x.requires_grad or (bias is not None and bias.requires_grad)
    ):
        return True
    return forward_ad._current_level >= 0
