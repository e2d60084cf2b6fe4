"""Quantize a weight to FP8 in blocks: scales and codes in one pass over the weight.

A program holds whole blocks, finds the largest size in each, and rounds them. Blocks
that are too large for that take two passes: their largest sizes, then the codes. Codes
and scales are bit for bit those of `schemes._fp8.quantize`.

Whether the weight is finite is written beside them, for whoever quantizes to look at
when it waits for the GPU anyway.
"""

# Functions of Triton have no Python types: the compiler infers theirs.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from schemes._kernels.triton.launch import launch
from schemes._kernels.triton.numbers import (
    bfloat16_value,
    fp8_code,
    power_code,
    power_inverse,
)
from schemes._kernels.triton.tiles import as_bytes

#: As in `schemes._fp8.quantize`.
MIN_SCALE = 1e-8
#: Elements of a program: of small blocks, and of one block at most.
ELEMENTS = 4096
MAX_BLOCK = 16384
#: Rows and columns that a program has of a larger block.
PART_ROWS, PART_COLUMNS = 16, 256
_CODES = {torch.float8_e4m3fn: ("e4m3", 448.0), torch.float8_e5m2: ("e5m2", 57344.0)}


@triton.jit
def scale_of(
    bits,
    scale,
    least,
    most,
    LARGEST: tl.constexpr,
    POWERS: tl.constexpr,
):
    """Scales for blocks whose largest sizes have these bits.

    Args:
        bits: int32, the bits of float32.
        scale: pointer to where scales are stored, for their dtype.
        least, most: what scales are clamped to.
        LARGEST: the largest FP8 number.
        POWERS: whether scales are powers of two, E8M0 as int8.

    Returns:
        The scales as stored, and in float32: one over them if they are powers of two.
    """
    value = tl.div_rn(bits.to(tl.float32, bitcast=True), LARGEST)
    if POWERS:
        power = power_code(value)
        return power.to(tl.int8), power_inverse(power)
    else:
        if scale.dtype.element_ty == tl.bfloat16:
            value = bfloat16_value(value)
        value = value.to(scale.dtype.element_ty).to(tl.float32)
        value = tl.minimum(tl.maximum(value, least), most)
        return value.to(scale.dtype.element_ty), value


@triton.jit
def block_code(values, scale, CODE: tl.constexpr, POWERS: tl.constexpr):
    """Divide by what `scale_of` returns, and round to FP8.

    Where a scale is 0, numbers become 0 or the largest.
    """
    if POWERS:
        quotient = values * scale
    else:
        zero = scale == 0.0
        quotient = tl.div_rn(values, tl.where(zero, 1.0, scale))
        beyond = tl.where(values > 0, 1e38, tl.where(values < 0, -1e38, 0.0))
        quotient = tl.where(zero, beyond, quotient)
    return fp8_code(quotient, CODE)


@triton.jit
def size_bits(values):
    """Bits of sizes, which order as the sizes do, NaN above infinity above all."""
    return values.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def blocks_kernel(
    codes,
    scale,
    damaged,
    weight,
    least,
    most,
    N,
    K,
    R,
    C,
    high,
    wide,
    weight_n,
    weight_k,
    LARGEST: tl.constexpr,
    CODE: tl.constexpr,
    POWERS: tl.constexpr,
    BLOCKS_DOWN: tl.constexpr,
    BLOCKS_ACROSS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Quantize some blocks; ROWS and COLUMNS are R and C, up to powers of two.

    Args:
        codes: (N, K) contiguous bytes.
        scale: (high, wide) contiguous.
        damaged: () int32, set to 1 if a block is not finite.
        least, most: as of `scale_of`.
    """
    across = tl.cdiv(wide, BLOCKS_ACROSS)
    down = (tl.program_id(0) // across) * BLOCKS_DOWN + tl.arange(0, BLOCKS_DOWN)
    along = (tl.program_id(0) % across) * BLOCKS_ACROSS + tl.arange(0, BLOCKS_ACROSS)
    r = tl.arange(0, ROWS)[None, :]
    c = tl.arange(0, COLUMNS)[None, :]
    row = (down * R)[:, None] + r
    column = (along * C)[:, None] + c
    row_exists = (r < R) & (row < N)
    column_exists = (c < C) & (column < K)
    inside = row_exists[:, :, None, None] & column_exists[None, None, :, :]
    row = row.to(tl.int64)[:, :, None, None]
    column = column[None, None, :, :]
    place = row * weight_n + column * weight_k
    values = tl.load(weight + place, mask=inside, other=0).to(tl.float32)
    bits = tl.max(tl.max(size_bits(values), 3), 1)
    stored, factor = scale_of(bits, scale, least, most, LARGEST, POWERS)
    exists = (down < high)[:, None] & (along < wide)[None, :]
    target = scale + down.to(tl.int64)[:, None] * wide + along[None, :]
    tl.store(target, stored, mask=exists)
    if tl.max(tl.max(bits, 1), 0) >= 0x7F800000:
        tl.store(damaged, 1)
    code = block_code(values, factor[:, None, :, None], CODE, POWERS)
    tl.store(codes + row * K + column, code, mask=inside)


@triton.jit
def part_of_block(N, K, R, C, wide, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Which block, and which rows and columns of it, a program has."""
    parts_down = tl.cdiv(R, ROWS)
    parts_across = tl.cdiv(C, COLUMNS)
    part = tl.program_id(0) % (parts_down * parts_across)
    block = tl.program_id(0) // (parts_down * parts_across)
    r = (part // parts_across) * ROWS + tl.arange(0, ROWS)
    c = (part % parts_across) * COLUMNS + tl.arange(0, COLUMNS)
    row = (block // wide) * R + r
    column = (block % wide) * C + c
    row_exists = (r < R) & (row < N)
    column_exists = (c < C) & (column < K)
    inside = row_exists[:, None] & column_exists[None, :]
    return block, part, row.to(tl.int64)[:, None], column[None, :], inside


@triton.jit
def sizes_kernel(
    sizes,
    weight,
    N,
    K,
    R,
    C,
    wide,
    weight_n,
    weight_k,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Raise (blocks,) int32 ``sizes`` to the largest bits of a part of a block."""
    block, _, row, column, inside = part_of_block(N, K, R, C, wide, ROWS, COLUMNS)
    place = row * weight_n + column * weight_k
    values = tl.load(weight + place, mask=inside, other=0).to(tl.float32)
    tl.atomic_max(sizes + block, tl.max(tl.max(size_bits(values), 1), 0))


@triton.jit
def parts_kernel(
    codes,
    scale,
    damaged,
    sizes,
    weight,
    least,
    most,
    N,
    K,
    R,
    C,
    wide,
    weight_n,
    weight_k,
    LARGEST: tl.constexpr,
    CODE: tl.constexpr,
    POWERS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """As `blocks_kernel`, for a part of a block whose largest size is known."""
    block, part, row, column, inside = part_of_block(N, K, R, C, wide, ROWS, COLUMNS)
    bits = tl.load(sizes + block)
    stored, factor = scale_of(bits, scale, least, most, LARGEST, POWERS)
    tl.store(scale + block, stored, mask=part == 0)
    if bits >= 0x7F800000:
        tl.store(damaged, 1)
    place = row * weight_n + column * weight_k
    values = tl.load(weight + place, mask=inside, other=0).to(tl.float32)
    code = block_code(values, factor, CODE, POWERS)
    tl.store(codes + row * K + column, code, mask=inside)


def quantize(
    weight: Tensor, size: tuple[int, int], codes: Tensor, scale: Tensor, damaged: Tensor
) -> None:
    """Quantize with the scale that puts each block's largest value at the range's end.

    Args:
        weight: (N, K) float32, bfloat16 or float16, of any strides.
        size: (R, C), the block size, no larger than the weight.
        codes: (N, K) float8_e4m3fn or float8_e5m2, contiguous, to write to.
        scale: (ceil(N/R), ceil(K/C)) float32, bfloat16, float16 or float8_e8m0fnu,
            contiguous, to write to; powers of two are rounded up.
        damaged: () int32, set to 1 if the weight holds inf or NaN, else left alone;
            what is written then has no meaning.
    """
    (n, k), (rows, cols) = weight.shape, size
    if not weight.numel():
        return
    high, wide = scale.shape
    code, largest = _CODES[codes.dtype]
    powers = scale.dtype == torch.float8_e8m0fnu
    least, most = (0.0, 0.0) if powers else _limits(scale.dtype)
    targets = (as_bytes(codes), as_bytes(scale), damaged)
    constants = {"LARGEST": largest, "CODE": code, "POWERS": powers}
    rows_up, cols_up = triton.next_power_of_2(rows), triton.next_power_of_2(cols)
    block = rows_up * cols_up
    if block <= MAX_BLOCK:
        across = min(max(256 // cols_up, 1), triton.next_power_of_2(wide))
        down = max(ELEMENTS // (block * across), 1)
        launch(
            blocks_kernel,
            -(-high // down) * -(-wide // across),
            weight.device,
            *(*targets, weight, least, most, n, k, rows, cols, high, wide),
            *weight.stride(),
            **constants,
            BLOCKS_DOWN=down,
            BLOCKS_ACROSS=across,
            ROWS=rows_up,
            COLUMNS=cols_up,
            num_warps=max(block * down * across // 1024, 4),
        )
        return
    sizes = torch.zeros(high * wide, dtype=torch.int32, device=weight.device)
    parts = -(-rows // PART_ROWS) * -(-cols // PART_COLUMNS)
    programs = high * wide * parts
    place = (n, k, rows, cols, wide, *weight.stride())
    tile = {"ROWS": PART_ROWS, "COLUMNS": PART_COLUMNS}
    launch(sizes_kernel, programs, weight.device, sizes, weight, *place, **tile)
    launch(
        parts_kernel,
        programs,
        weight.device,
        *(*targets, sizes, weight, least, most, *place),
        **constants,
        **tile,
    )


@functools.lru_cache(maxsize=8)
def _limits(dtype: torch.dtype) -> tuple[float, float]:
    """The least and the largest scale, as a dtype of scales has them."""
    least = torch.tensor(MIN_SCALE, dtype=dtype, device="cpu")
    return float(least), torch.finfo(dtype).max
