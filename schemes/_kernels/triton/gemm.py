"""A product of up to 64 inputs with a weight that is decoded in registers.

Matrix units take the decoded tile as their first operand, rounded to the dtype of the
inputs as a dense weight would be. Where a weight has too few rows to fill the GPU, K
is split among programs; the last of them to finish adds the parts, in a fixed order.
"""

# Functions of Triton have no Python types: the compiler infers theirs.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from schemes._kernels import buffers
from schemes._kernels.block_scaled import BlockScaled
from schemes._kernels.triton.launch import has_matrix_units, launch, processors
from schemes._kernels.triton.tiles import cut, number_tile, scale_tile, tensors

#: Inputs, at most; beyond them a dense weight costs less than decoding it repeatedly.
MAX_INPUTS = 64
#: Rows and columns of a tile.
ROWS, COLUMNS = 64, 64
#: Columns of a span, at least and at most; narrower blocks have too many scales.
MIN_SPAN, MAX_SPAN = 16, 64
#: Parts that K is split into, at most.
MAX_PARTS = 16


@triton.jit
def gemm_kernel(
    out,
    x,
    bias,
    parts,
    arrived,
    codes,
    scale,
    factor,
    table,
    M,
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
    PARTS: tl.constexpr,
    INPUTS: tl.constexpr,
    ROWS: tl.constexpr,
    SPANS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Some columns of (M, N) ``out``, which is contiguous.

    Args:
        parts: (tiles, PARTS, ROWS, INPUTS) float32 for sums, not used for one part.
        arrived: (tiles,) int32 zeros, which are zeros again at the end.
    """
    tile = tl.program_id(0) // PARTS
    part = tl.program_id(0) % PARTS
    row = tile * ROWS + tl.arange(0, ROWS)
    input = tl.arange(0, INPUTS)
    sums = tl.zeros((ROWS, INPUTS), tl.float32)
    for start in range(part * SPANS * SPAN, K, PARTS * SPANS * SPAN):
        span = start + tl.arange(0, SPANS) * SPAN
        # fmt: off
        numbers = number_tile(
            codes, table, row, N, span, K, codes_n, codes_k,
            CODE, HIGH_FIRST, ROWS, SPANS, SPAN,
        )
        scales = scale_tile(
            scale, factor, row, N, span, K, R, C, scale_n, scale_k, SCALE
        )
        # fmt: on
        weight = (numbers * scales[:, :, None]).to(x.dtype.element_ty)
        weight = tl.reshape(weight, (ROWS, SPANS * SPAN))
        column = start + tl.arange(0, SPANS * SPAN)
        place = column[:, None] * x_k + input[None, :] * x_m
        inside = (column < K)[:, None] & (input < M)[None, :]
        inputs = tl.load(x + place, mask=inside, other=0)
        sums = tl.dot(weight, inputs, sums)
    last = True
    if PARTS > 1:
        inner = tl.arange(0, ROWS)[:, None] * INPUTS + input[None, :]
        mine = parts + (tile * PARTS + part).to(tl.int64) * (ROWS * INPUTS)
        tl.store(mine + inner, sums)
        tl.debug_barrier()  # all threads have stored before one says so
        last = tl.atomic_add(arrived + tile, 1, sem="acq_rel") == PARTS - 1
        if last:
            all_parts = parts + tile.to(tl.int64) * (PARTS * ROWS * INPUTS)
            sums = tl.zeros((ROWS, INPUTS), tl.float32)
            for number in range(PARTS):
                place = all_parts + number * (ROWS * INPUTS) + inner
                sums += tl.load(place, cache_modifier=".cg")
            tl.store(arrived + tile, 0)
    if last:
        if bias is not None:
            offsets = tl.load(bias + row, mask=row < N, other=0)
            sums += offsets.to(tl.float32)[:, None]
        result = tl.trans(sums).to(out.dtype.element_ty)
        target = out + input.to(tl.int64)[:, None] * N + row[None, :]
        inside = (input < M)[:, None] & (row < N)[None, :]
        tl.store(target, result, mask=inside)


def gemm(x: Tensor, weight: BlockScaled, bias: Tensor | None) -> Tensor:
    """``F.linear`` of some inputs; sums are in float32, and rounded once.

    Args:
        x: (M, K) bfloat16 or float16; M is 1 to `MAX_INPUTS`.
        weight: (N, K), whose elements are rounded to ``x``'s dtype.
        bias: (N,) contiguous, or None.

    Returns:
        (M, N) of ``x``'s dtype.
    """
    n, k = weight.shape
    m = x.shape[0]
    out = x.new_empty((m, n))
    codes, scale, factor, table = tensors(weight)
    how = cut(weight)
    span = min(how.span, MAX_SPAN)
    inputs = 16 if m <= 16 else 32 if m <= 32 else 64
    tiles = -(-n // ROWS)
    parts = _parts(tiles, k, 2 * processors(codes.device))
    sums, arrived = None, None
    if parts > 1:
        size = tiles * parts * ROWS * inputs
        sums = buffers.shared("sums", size, torch.float32, x.device)
        arrived = buffers.shared("arrived", tiles, torch.int32, x.device, zeros=True)
    launch(
        gemm_kernel,
        tiles * parts,
        codes.device,
        *(out, x, bias, sums, arrived, codes, scale, factor, table),
        *(m, n, k, how.rows, how.cols),
        *x.stride(),
        *codes.stride(),
        *scale.stride(),
        CODE=how.code,
        SCALE=how.scale,
        HIGH_FIRST=weight.high_first,
        PARTS=parts,
        INPUTS=inputs,
        ROWS=ROWS,
        SPANS=COLUMNS // span,
        SPAN=span,
    )
    return out


def can_multiply(x: Tensor, weight: BlockScaled) -> bool:
    """Whether the device has matrix units for these inputs, and blocks are wide.

    Narrow blocks would take more memory of a processor than small GPUs have.
    """
    return (
        x.dtype != torch.float32
        and cut(weight).span >= MIN_SPAN
        and has_matrix_units(weight.codes.device)
    )


def _parts(tiles: int, k: int, programs: int) -> int:
    """Parts of K, a power of two: as many programs as wanted, two steps for each."""
    parts = 1
    while parts < MAX_PARTS and tiles * parts < programs and 4 * parts * COLUMNS <= k:
        parts *= 2
    return parts
