"""A product of up to four inputs with a weight that is decoded in registers.

It moves the codes once and nothing else of the weight. A program multiplies one row of
the weight with all inputs. Its threads lie along K, so that even few rows keep a GPU
busy; their sums are added in a fixed order, so that results do not vary.
"""

# Functions of Triton have no Python types: the compiler infers theirs.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from schemes._kernels.block_scaled import BlockScaled
from schemes._kernels.triton.launch import launch
from schemes._kernels.triton.tiles import cut, number_tile, scale_tile, tensors

#: Inputs, at most: with more, multiplications take longer than reading codes.
MAX_INPUTS = 4
#: Columns that a thread multiplies at a time, and a warp.
SPAN = 16
WARP_COLUMNS = 512
#: Columns of a tile, at least and at most.
MIN_COLUMNS, MAX_COLUMNS = 1024, 4096


@triton.jit
def gemv_kernel(
    out,
    x,
    bias,
    codes,
    scale,
    factor,
    table,
    N,
    K,
    R,
    C,
    x_m,
    x_k,
    codes_n,
    codes_k,
    scale_n,
    scale_k,
    CODE: tl.constexpr,
    SCALE: tl.constexpr,
    HIGH_FIRST: tl.constexpr,
    INPUTS: tl.constexpr,
    SPANS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """One column of ``out``, which is (INPUTS, N) and contiguous."""
    row = tl.program_id(0) + tl.arange(0, 1)
    sums0 = tl.zeros((1, SPANS), tl.float32)
    sums1 = sums0
    sums2 = sums0
    sums3 = sums0
    for start in range(0, K, SPANS * SPAN):
        span = start + tl.arange(0, SPANS) * SPAN
        # fmt: off
        numbers = number_tile(
            codes, table, row, N, span, K, codes_n, codes_k,
            CODE, HIGH_FIRST, 1, SPANS, SPAN,
        )
        scales = scale_tile(
            scale, factor, row, N, span, K, R, C, scale_n, scale_k, SCALE
        )
        # fmt: on
        column = (span[:, None] + tl.arange(0, SPAN)[None, :])[None, :, :]
        line = x + column * x_k
        sums0 += scales * partial_sums(numbers, line, column < K)
        if INPUTS > 1:
            sums1 += scales * partial_sums(numbers, line + x_m, column < K)
        if INPUTS > 2:
            sums2 += scales * partial_sums(numbers, line + 2 * x_m, column < K)
        if INPUTS > 3:
            sums3 += scales * partial_sums(numbers, line + 3 * x_m, column < K)
    store_sums(out + row, sums0, bias, row, N)
    if INPUTS > 1:
        store_sums(out + N + row, sums1, bias, row, N)
    if INPUTS > 2:
        store_sums(out + 2 * N + row, sums2, bias, row, N)
    if INPUTS > 3:
        store_sums(out + 3 * N + row, sums3, bias, row, N)


@triton.jit
def partial_sums(numbers, line, inside):
    """Products with an input, summed over each span: (1, SPANS)."""
    inputs = tl.load(line, mask=inside, other=0).to(tl.float32)
    return tl.sum(numbers * inputs, 2)


@triton.jit
def store_sums(target, sums, bias, row, N):
    """Add up (1, SPANS) in a fixed order, add the bias, and store (1,)."""
    total = tl.sum(sums, 1)
    if bias is not None:
        total += tl.load(bias + row, mask=row < N, other=0).to(tl.float32)
    tl.store(target, total.to(target.dtype.element_ty), mask=row < N)


def gemv(x: Tensor, weight: BlockScaled, bias: Tensor | None) -> Tensor:
    """``F.linear`` of few inputs; sums are in float32, and rounded once.

    Args:
        x: (M, K) float32, bfloat16 or float16; M is 1 to `MAX_INPUTS`.
        weight: (N, K), whose elements are not rounded here.
        bias: (N,) contiguous, or None.

    Returns:
        (M, N) of ``x``'s dtype.
    """
    n, k = weight.shape
    m = x.shape[0]
    out = x.new_empty((m, n))
    codes, scale, factor, table = tensors(weight)
    how = cut(weight)
    span = min(how.span, SPAN)
    # the largest tile that divides K, so that no thread is idle
    columns = max(min(k & -k, MAX_COLUMNS), MIN_COLUMNS)
    launch(
        gemv_kernel,
        n,
        codes.device,
        *(out, x, bias, codes, scale, factor, table, n, k, how.rows, how.cols),
        *x.stride(),
        *codes.stride(),
        *scale.stride(),
        CODE=how.code,
        SCALE=how.scale,
        HIGH_FIRST=weight.high_first,
        INPUTS=m,
        SPANS=columns // span,
        SPAN=span,
        num_warps=columns // WARP_COLUMNS,
    )
    return out
