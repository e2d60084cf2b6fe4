"""Products in integers (W8A8): INT8 codes of weights and of inputs.

Each token x of the input is quantized as a row of its own, and the sum is exact ::

    y = (int8(x) . Q^T) * (s_x s_w) + bias                 the sum in int32

so that a row of the weight must have one scale.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from schemes._kernels import devices, plain
from schemes._kernels.block_scaled import DENSE, BlockScaled
from schemes._kernels.quantized_inputs import fused, int8_per_token, quantize

#: Elements of an output that are in float32 at a time.
OUTPUT_CHUNK = 1 << 26
#: Rows that cuBLAS is given multiples of: it takes more than 16 of 8.
_ROWS = 32
#: The first compute capability whose matrix units multiply INT8.
CAPABILITY = (7, 5)


def refuses(weight: BlockScaled, dtype: torch.dtype) -> str | None:
    """Why a weight and inputs of a dtype cannot be multiplied in integers, or None.

    Args:
        weight: (N, K).
        dtype: of the input.
    """
    if weight.codes.dtype != torch.int8 or weight.table is not None:
        return "the codes are no INT8"
    if weight.size[1] < weight.shape[1]:
        return "a row of the weight has several scales, an integer sum takes one"
    if dtype not in DENSE:
        return f"takes inputs of float32, bfloat16 and float16, not of {dtype}"
    found = devices.capability(weight.device)
    if (0, 0) < found < CAPABILITY:
        return f"compute capability {_dotted(found)} has no unit for INT8; 7.5 has"
    return None


def linear(x: Tensor, weight: BlockScaled, bias: Tensor | None) -> Tensor:
    """``F.linear`` in integers, with a scale for each token of the input.

    It computes what comfy-kitchen's ``int8_linear`` does, bit for bit if the input is
    float32. An input of 16 bits is divided by its scale in float32 here, and in its own
    dtype there, so that a code may differ by one.

    Args:
        x: (M, K) float32, bfloat16 or float16; of a rotated weight it is rotated.
        weight: (N, K) of int8, whose rows have one scale.
        bias: (N,), or None.

    Returns:
        (M, N) of ``x``'s dtype.
    """
    n, rows = weight.shape[0], weight.size[0]
    scale = plain.scales(weight)
    kernels = fused(x)
    if 1 < rows < n:
        scale = scale.repeat_interleave(rows, 0)[:n]
    if kernels is not None:
        return _fused_linear(kernels, x, weight.codes, scale, bias)
    scale = scale.t()  # (1, N) or (1, 1)
    step = max(OUTPUT_CHUNK // n, 1)
    if torch.compiler.is_compiling() or len(x) <= step:
        output = _multiply(x, weight.codes, scale)
    else:
        parts = [_multiply(part, weight.codes, scale) for part in torch.split(x, step)]
        output = torch.cat(parts)
    return output if bias is None else output + bias.to(x.dtype)


def _fused_linear(
    kernels: Any, x: Tensor, codes: Tensor, scale: Tensor, bias: Tensor | None
) -> Tensor:
    """`linear` in three launches: quantize, multiply, and all that follows."""
    m = len(x)
    wanted = -(-m // _ROWS) * _ROWS  # so many rows of codes, filled with zeros
    tokens, token_scale = kernels.tokens(x, torch.int8, rows=wanted)
    product = _int_mm(tokens, codes)[:m]
    if bias is not None:
        bias = bias.to(x.dtype).contiguous()
    output: Tensor = kernels.int8_output(product, token_scale, scale, bias, x.dtype)
    return output


def _multiply(x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
    """(M, N) of ``x``'s dtype: (M, K) times (N, K) int8 with scales (1, N)."""
    tokens, (token_scale,) = quantize(int8_per_token, x)
    return (_int_mm(tokens, codes).float() * (token_scale * scale)).to(x.dtype)


def _int_mm(a: Tensor, b: Tensor) -> Tensor:
    """(M, K) times the transpose of (N, K), both int8, as (M, N) int32.

    cuBLAS takes more than 16 rows and multiples of 8 columns; others are filled with
    zeros. So is a single column on the CPU, of which torch 2.13 writes no product.
    """
    (m, k), n = a.shape, len(b)
    if k == 1 and not a.is_cuda:
        a, b = F.pad(a, (0, 7)), F.pad(b, (0, 7))
    if a.is_cuda and (k % 8 or m % _ROWS or n % _ROWS):
        a = F.pad(a, (0, -k % 8, 0, -m % _ROWS))
        b = F.pad(b, (0, -k % 8, 0, -n % _ROWS))
    return torch._int_mm(a, b.t())[:m, :n]


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))
