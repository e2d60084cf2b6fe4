"""Kernels for CPUs, compiled with llvmlite: no compiler is needed on the machine.

`decode` writes rows of the dense weight at the speed of memory; `linear` multiplies a
few rows in dot products that read each code once, and decodes for more of them.
Importing this package imports no llvmlite; `refuses` does, once.
"""

from __future__ import annotations

import torch
from torch import Tensor

from schemes._kernels.block_scaled import CODES, DENSE, SCALES, BlockScaled
from schemes._kernels.cpu.llvm import KernelError, why_not

__all__ = [
    "KernelError",
    "decode",
    "linear",
    "quantize_fp8",
    "quantize_int8",
    "refuses",
]


def refuses(weight: BlockScaled, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot take a weight, in a sentence; None if they can.

    Args:
        weight: (N, K).
        dtype: of the inputs, or of the decoded weight.
    """
    reason = why_not()
    if reason is not None:
        return reason
    if weight.device.type != "cpu" or weight.scale.device.type != "cpu":
        return f"the weight is on {weight.device.type}, expected cpu"
    if dtype not in DENSE:
        return f"inputs are {dtype}, expected float32, bfloat16 or float16"
    codes = CODES if weight.table is None else (torch.uint8,)
    if weight.codes.dtype not in codes:
        return f"codes are {weight.codes.dtype}, expected one of {codes}"
    if weight.scale.dtype not in SCALES:
        return f"scales are {weight.scale.dtype}, expected one of {SCALES}"
    return None


def decode(weight: BlockScaled, out: Tensor, rows: slice = slice(None)) -> None:
    """Write rows of the dense weight, bit for bit as `BlockScaled` says.

    Args:
        weight: (N, K), which `refuses` does not refuse.
        out: (n, K) float32, bfloat16 or float16, with any strides.
        rows: which n of the N rows, without a step.

    Raises:
        KernelError: if the kernel cannot be compiled.
    """
    from schemes._kernels.cpu import decoding

    decoding.decode(weight, out, rows)


def linear(x: Tensor, weight: BlockScaled, bias: Tensor | None = None) -> Tensor:
    """``F.linear`` with a quantized weight, without derivatives.

    Args:
        x: (M, K) float32, bfloat16 or float16, on the CPU.
        weight: (N, K), which `refuses` does not refuse.
        bias: (N,), or None.

    Returns:
        (M, N) of ``x``'s dtype. Every product of a number of ``x`` and one of the
        weight enters a sum in float32; the weight is rounded to ``x``'s dtype before
        where many rows are multiplied.

    Raises:
        KernelError: if a kernel cannot be compiled.
    """
    from schemes._kernels.cpu import product

    return product.linear(x, weight, bias)


def quantize_fp8(
    matrix: Tensor,
    size: tuple[int, int],
    codes: Tensor,
    scale: Tensor,
    candidates: int = 0,
    *,
    parallel: bool = True,
) -> bool:
    """Quantize a weight to FP8 in one pass, bit for bit as ``schemes._fp8.quantize``.

    With candidates, each block takes the scale with the least squared error: each scale
    is tried on every number, so that no block errs more than with
    `schemes._fp8.quantize.search_scale`, but for the error of float32. That compares
    sums of other rounding, so the choice may differ where two scales are as good.

    Args:
        matrix: (N, K) float32, bfloat16 or float16, on the CPU; N, K > 0.
        size: (R, C), the block size, no larger than the weight.
        codes: (N, K) float8_e4m3fn or float8_e5m2, dense along columns; written.
        scale: (ceil(N/R), ceil(K/C)) float32, bfloat16, float16 or float8_e8m0fnu,
            dense along columns; written.
        candidates: other scales to try for each block; 0 takes the absmax scale.
        parallel: whether to use torch's number of threads. A caller that has threads of
            its own, one for some rows of blocks each, says False.

    Returns:
        Whether all numbers are finite; if not, what is written is of no use.

    Raises:
        KernelError: if the kernel cannot be compiled.
    """
    from schemes._kernels.cpu import quantize

    return quantize.quantize_fp8(matrix, size, codes, scale, candidates, parallel)


def quantize_int8(
    matrix: Tensor,
    size: tuple[int, int],
    codes: Tensor,
    scale: Tensor,
    candidates: int = 0,
    *,
    parallel: bool = True,
) -> bool:
    """Quantize a weight to int8 in one pass, bit for bit as the scheme ``int8``.

    Args:
        matrix: (N, K) float32, bfloat16 or float16, on the CPU; N, K > 0.
        size: (R, C), the block size, no larger than the weight.
        codes: (N, K) int8, dense along columns; written.
        scale: (ceil(N/R), ceil(K/C)) float32, bfloat16 or float16, dense along columns;
            written.
        candidates: scales below the absmax scale to try for each block, down to half.
        parallel: as for `quantize_fp8`.

    Returns:
        Whether all numbers and scales are finite; if not, what is written is of no use.

    Raises:
        KernelError: if the kernel cannot be compiled.
    """
    from schemes._kernels.cpu import quantize

    return quantize.quantize_int8(matrix, size, codes, scale, candidates, parallel)
