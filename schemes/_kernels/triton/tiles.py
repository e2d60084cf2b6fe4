"""A tile of the dense weight, decoded in registers, and how a weight is cut into them.

A tile is (rows, spans, columns of a span). All columns of a span have one scale in
every row, because spans are no wider than blocks and never cross their edges. So a
scale is loaded once for a span and not for each element.
"""

# Functions of Triton have no Python types: the compiler infers theirs.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from schemes._kernels.block_scaled import BlockScaled
from schemes._kernels.tables import is_e2m1
from schemes._kernels.triton.numbers import number, scale_number

#: Names of code and scale dtypes in kernels, and the dtype their bytes are passed as.
_CODES = {
    torch.float8_e4m3fn: "e4m3",
    torch.float8_e5m2: "e5m2",
    torch.int8: "int8",
}
_SCALES = {torch.float8_e4m3fn: "e4m3", torch.float8_e8m0fnu: "e8m0"}


@triton.jit
def number_tile(
    codes,
    table,
    row,
    end,
    span,
    K,
    codes_n,
    codes_k,
    CODE: tl.constexpr,
    HIGH_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    SPANS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """The numbers of some rows and columns, without scales; zeros where codes end.

    Args:
        codes, table: pointers to the tensors of a `BlockScaled`.
        row: (ROWS,) numbers of rows, which exist below ``end``.
        span: (SPANS,) first column of each span, which exist below ``K``.
        codes_n, codes_k: strides.
        CODE: as in `number`.
        HIGH_FIRST: whether of two codes in a byte the first is in the high bits.

    Returns:
        (ROWS, SPANS, SPAN) float32.
    """
    line = codes + row.to(tl.int64)[:, None, None] * codes_n
    if CODE == "e2m1" or CODE == "table":
        place = tl.arange(0, SPAN // 2)[None, None, :]
        half = (span // 2)[None, :, None] + place
        inside = (row < end)[:, None, None] & (half < K // 2)
        pair = tl.load(line + half * codes_k, mask=inside, other=0).to(tl.int32)
        low = number(pair & 15, table, CODE)
        high = number((pair >> 4) & 15, table, CODE)
        numbers = tl.join(high, low) if HIGH_FIRST else tl.join(low, high)
        return tl.reshape(numbers, (ROWS, SPANS, SPAN))
    else:
        column = span[None, :, None] + tl.arange(0, SPAN)[None, None, :]
        inside = (row < end)[:, None, None] & (column < K)
        code = tl.load(line + column * codes_k, mask=inside, other=0).to(tl.int32)
        return number(code, table, CODE)


@triton.jit
def scale_tile(
    scale,
    factor,
    row,
    end,
    span,
    K,
    R,
    C,
    scale_n,
    scale_k,
    SCALE: tl.constexpr,
):
    """The scales of some rows and spans, times the factor; zeros outside.

    Args:
        scale, factor: pointers to the tensors of a `BlockScaled`.
        row: (ROWS,) numbers of rows, which exist below ``end``.
        span: (SPANS,) first column of each span, which exist below ``K``.
        R, C: the block size.
        scale_n, scale_k: strides.
        SCALE: as in `scale_number`.

    Returns:
        (ROWS, SPANS) float32.
    """
    up = (row // R).to(tl.int64)[:, None] * scale_n
    along = (span // C)[None, :] * scale_k
    inside = (row < end)[:, None] & (span < K)[None, :]
    scales = scale_number(tl.load(scale + up + along, mask=inside, other=0), SCALE)
    if factor is not None:
        scales = scales * tl.load(factor)
    return scales


class Cut(NamedTuple):
    """What kernels need to know of a weight beside its tensors.

    Attributes:
        code: as in `number`.
        scale: as in `scale_number`.
        span: columns of the widest span: the largest power of two that divides C.
        rows: R, or a number that no row reaches if there is one block along the rows.
        cols: C, or a number that no column reaches if there is one block along them.
    """

    code: str
    scale: str
    span: int
    rows: int
    cols: int


@functools.lru_cache(maxsize=4096)
def _cut(
    codes: torch.dtype,
    scale: torch.dtype,
    size: tuple[int, int],
    grid: tuple[int, int],
    four_bits: str | None,
) -> Cut:
    """`Cut` of a weight with these dtypes and blocks."""
    rows, cols = size
    if grid[0] == 1:
        rows = 1 << 30
    if grid[1] == 1:
        cols = 1 << 30
    code = four_bits or _CODES[codes]
    return Cut(code, _SCALES.get(scale, "float"), cols & -cols, rows, cols)


def cut(weight: BlockScaled) -> Cut:
    """How to cut a weight into spans, and the names of its numbers."""
    four_bits = None
    if weight.table is not None:
        four_bits = "e2m1" if is_e2m1(weight.table) else "table"
    scale = weight.scale
    return _cut(weight.codes.dtype, scale.dtype, weight.size, scale.shape, four_bits)


def tensors(weight: BlockScaled) -> tuple[Any, ...]:
    """The arguments codes, scale, factor, table of a kernel; FP8 as bytes."""
    return as_bytes(weight.codes), as_bytes(weight.scale), weight.factor, weight.table


def as_bytes(tensor: Tensor) -> Tensor:
    """The same memory; dtypes that Triton does not know everywhere as int8."""
    if tensor.dtype.itemsize > 1 or tensor.dtype in (torch.int8, torch.uint8):
        return tensor
    return tensor.view(torch.int8)
