"""The rotation of ConvRot's formats, of inputs, in one kernel.

The matrix of a group of g = 4^m columns is the m-fold Kronecker power of

    [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]

over sqrt(g). Its element (i, j) is negative for an odd number of digits, in base 4, of
i and j that are 3 together. So 64 columns are multiplied with one matrix of 64 x 64
signs, which a program makes in registers, and wider groups add up such products with
a sign for each. The signs are exact in every dtype; sums are in float32.
"""

# Functions of Triton have no Python types: the compiler infers theirs.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from schemes._kernels.triton.launch import launch

#: Columns of a matrix of signs.
CHUNK = tl.constexpr(64)
#: Tiles of a program: making the matrix takes as long as multiplying with it.
REPEATS = 4


@triton.jit
def signs(i, j):
    """Elements of the matrix times sqrt(g): 1 or -1 in int32.

    Args:
        i, j: int32, 0 to 4095, of shapes that broadcast.
    """
    digits = i ^ j
    threes = digits & (digits >> 1) & 0x555
    threes = threes ^ (threes >> 8)
    threes = threes ^ (threes >> 4)
    threes = threes ^ (threes >> 2)
    return 1 - 2 * (threes & 1)


@triton.jit
def sign_matrix(GROUP: tl.constexpr):
    """(CHUNK, CHUNK) float32: signs, and zeros between groups that are narrower."""
    i = tl.arange(0, CHUNK)[:, None]
    j = tl.arange(0, CHUNK)[None, :]
    matrix = signs(i, j)
    if GROUP < CHUNK:
        matrix = tl.where(i // GROUP == j // GROUP, matrix, 0)
    return matrix.to(tl.float32)


@triton.jit
def rotated_tile(
    x,
    row,
    start,
    matrix,
    M,
    K,
    x_m,
    x_k,
    GROUP: tl.constexpr,
    ROOT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rotate some rows and `CHUNK` columns.

    Args:
        x: pointer to (M, K).
        row: (ROWS,) numbers of rows.
        start: the first column, a multiple of `CHUNK`.
        matrix: (CHUNK, CHUNK) of ``x``'s dtype, of `sign_matrix`.
        x_m, x_k: strides.
        GROUP, ROOT: g and its square root.

    Returns:
        (ROWS, CHUNK) float32; zeros outside of (M, K).
    """
    line = x + row.to(tl.int64)[:, None] * x_m
    inner = tl.arange(0, CHUNK)[None, :]
    sums = tl.zeros((ROWS, CHUNK), tl.float32)
    if GROUP <= CHUNK:
        inside = (row < M)[:, None] & (start + inner < K)
        inputs = tl.load(line + (start + inner) * x_k, mask=inside, other=0)
        sums = tl.dot(inputs, matrix, sums, input_precision="ieee")
    else:
        place = start % GROUP
        for other in range(0, GROUP, CHUNK):
            column = start - place + other + inner
            inside = (row < M)[:, None] & (column < K)
            inputs = tl.load(line + column * x_k, mask=inside, other=0)
            products = tl.dot(inputs, matrix, input_precision="ieee")
            sums += products * signs(place, other).to(tl.float32)
    return sums * (1.0 / ROOT)


@triton.jit
def rotate_kernel(
    out,
    x,
    M,
    K,
    x_m,
    x_k,
    GROUP: tl.constexpr,
    ROOT: tl.constexpr,
    REPEATS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rotate (M, K) into contiguous ``out``; a program has some rows of a chunk."""
    across = tl.cdiv(K, CHUNK)
    first = (tl.program_id(0) // across) * (REPEATS * ROWS)
    start = (tl.program_id(0) % across) * CHUNK
    matrix = sign_matrix(GROUP).to(x.dtype.element_ty)
    column = start + tl.arange(0, CHUNK)[None, :]
    for begin in range(first, tl.minimum(first + REPEATS * ROWS, M), ROWS):
        row = begin + tl.arange(0, ROWS)
        tile = rotated_tile(x, row, start, matrix, M, K, x_m, x_k, GROUP, ROOT, ROWS)
        target = out + row.to(tl.int64)[:, None] * K + column
        inside = (row < M)[:, None] & (column < K)
        tl.store(target, tile.to(out.dtype.element_ty), mask=inside)


def rotation_options(dtype: torch.dtype) -> dict[str, int]:
    """Rows of a tile, and how it is compiled.

    There are no matrix units for float32: a larger tile would not fit the registers.
    """
    if dtype == torch.float32:
        return {"ROWS": 16, "num_warps": 4, "num_stages": 1}
    return {"ROWS": 32, "num_warps": 8, "num_stages": 2}


def rotate(x: Tensor, group: int) -> Tensor:
    """Rotate each group of columns; twice gives the inputs again.

    Args:
        x: (M, K) float32, bfloat16 or float16, on a device with matrix units.
        group: g, a power of 4 from 4 to 4096 that divides K.

    Returns:
        (M, K) of ``x``'s dtype, contiguous. It equals the product with the matrix
        within the rounding of another order of addition.
    """
    m, k = x.shape
    out = x.new_empty((m, k))
    how = rotation_options(x.dtype)
    launch(
        rotate_kernel,
        -(-m // (REPEATS * how["ROWS"])) * -(-k // CHUNK.value),
        x.device,
        *(out, x, m, k, *x.stride()),
        GROUP=group,
        ROOT=1 << (group.bit_length() // 2),
        REPEATS=REPEATS,
        **how,
    )
    return out
