"""Quantize inputs for products of eight bits: one launch each.

Every scale is the largest size it covers over the largest code, computed by an exact
division in float32, so that codes are bit for bit those of the same lines in torch.
FP8 codes are made by integer rounding, which builds for every GPU.

- `tokens`: a scale for each row, int8 or FP8, of inputs that may be rotated first.
- `groups`: a float32 scale for 128 columns of a row, as ``scaled_mm`` wants them for
  ``BlockWise1x128``, or a power of two for 32 columns in tiles, as for MXFP8.
- `int8_output`: what follows the integer product: scales, bias, dtype.
"""

# Functions of Triton have no Python types: the compiler infers theirs.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from schemes._kernels.quantized_inputs import Quantized
from schemes._kernels.triton.launch import launch
from schemes._kernels.triton.numbers import (
    fp8_code,
    nearest_integer,
    power_code,
    power_inverse,
)
from schemes._kernels.triton.rotate import CHUNK, rotated_tile, sign_matrix
from schemes._kernels.triton.tiles import as_bytes
from schemes._tiles import tiled_shape

#: The least scale, as of int8 weights.
MIN_SCALE = tl.constexpr(1e-30)
#: Largest codes.
_CODES = {
    torch.int8: ("int8", 127.0),
    torch.float8_e4m3fn: ("e4m3", 448.0),
    torch.float8_e5m2: ("e5m2", 57344.0),
}
#: Columns that a program reads at a time.
BLOCK = 2048
#: Elements of a program that has groups.
ELEMENTS = 4096
#: Rows and columns of a program of `int8_output`.
OUTPUT_ROWS, OUTPUT_COLUMNS = 4, 512


@triton.jit
def code_of(x, scale, CODE: tl.constexpr):
    """Divide float32 by a scale, round, and clamp: int8 codes or bytes of FP8."""
    quotient = tl.div_rn(x, scale)
    if CODE == "int8":
        rounded = nearest_integer(quotient)
        return tl.minimum(tl.maximum(rounded, -128), 127).to(tl.int8)
    else:
        return fp8_code(quotient, CODE)


# -- a scale for each row --------------------------------------------------------------


@triton.jit
def tokens_kernel(
    codes,
    scales,
    x,
    M,
    K,
    x_m,
    x_k,
    LARGEST: tl.constexpr,
    CODE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A row of codes (rows, K), which are zeros from row M on, and its scale (M,)."""
    row = tl.program_id(0)
    line = x + row.to(tl.int64) * x_m
    target = codes + row.to(tl.int64) * K
    most = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (column < K) & (row < M)
        values = tl.load(line + column * x_k, mask=inside, other=0).to(tl.float32)
        most = tl.maximum(most, tl.abs(values))
    scale = tl.maximum(tl.div_rn(tl.max(most, 0), LARGEST), MIN_SCALE)
    for start in range(0, K, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = (column < K) & (row < M)
        values = tl.load(line + column * x_k, mask=inside, other=0).to(tl.float32)
        tl.store(target + column, code_of(values, scale, CODE), mask=column < K)
    tl.store(scales + row, scale, mask=row < M)


@triton.jit
def rotated_tokens_kernel(
    codes,
    scales,
    x,
    rows,
    M,
    K,
    x_m,
    x_k,
    LARGEST: tl.constexpr,
    CODE: tl.constexpr,
    GROUP: tl.constexpr,
    ROOT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """As `tokens_kernel`, of rotated inputs; they are rotated twice, not stored."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    matrix = sign_matrix(GROUP).to(x.dtype.element_ty)
    most = tl.zeros((ROWS, CHUNK), tl.float32)
    for start in range(0, K, CHUNK):
        tile = rotated_tile(x, row, start, matrix, M, K, x_m, x_k, GROUP, ROOT, ROWS)
        tile = tile.to(x.dtype.element_ty).to(tl.float32)
        most = tl.maximum(most, tl.abs(tile))
    scale = tl.maximum(tl.div_rn(tl.max(most, 1), LARGEST), MIN_SCALE)
    for start in range(0, K, CHUNK):
        tile = rotated_tile(x, row, start, matrix, M, K, x_m, x_k, GROUP, ROOT, ROWS)
        tile = tile.to(x.dtype.element_ty).to(tl.float32)
        column = start + tl.arange(0, CHUNK)[None, :]
        target = codes + row.to(tl.int64)[:, None] * K + column
        inside = (row < rows)[:, None] & (column < K)
        tl.store(target, code_of(tile, scale[:, None], CODE), mask=inside)
    tl.store(scales + row, scale, mask=row < M)


def rotated_options(dtype: torch.dtype, is_amd: bool) -> dict[str, int]:
    """Rows of a program that rotates, and how it is compiled to fit the registers."""
    if dtype == torch.float32:
        return {"ROWS": 16, "num_warps": 4, "num_stages": 1}
    if is_amd:
        return {"ROWS": 16, "num_warps": 4, "num_stages": 2}
    return {"ROWS": 32, "num_warps": 8, "num_stages": 2}


def tokens(
    x: Tensor, dtype: torch.dtype, rotation: int = 0, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize each row with a scale of its own.

    Args:
        x: (M, K) float32, bfloat16 or float16; finite.
        dtype: int8, float8_e4m3fn or float8_e5m2.
        rotation: columns of a group that are rotated together, as `rotate` takes them;
            0 rotates none. The rotated inputs are rounded to ``x``'s dtype.
        rows: how many rows of codes to return, for products that want a certain number;
            zeros fill those from M on. None for M.

    Returns:
        Codes (rows, K), contiguous, and scales (M, 1) float32.
    """
    m, k = x.shape
    rows = m if rows is None else rows
    code, largest = _CODES[dtype]
    codes = x.new_empty((rows, k), dtype=dtype)
    scales = x.new_empty((m, 1), dtype=torch.float32)
    if rotation:
        how = rotated_options(x.dtype, torch.version.hip is not None)
        launch(
            rotated_tokens_kernel,
            -(-rows // how["ROWS"]),
            x.device,
            *(as_bytes(codes), scales, x, rows, m, k, *x.stride()),
            LARGEST=largest,
            CODE=code,
            GROUP=rotation,
            ROOT=1 << (rotation.bit_length() // 2),
            **how,
        )
    else:
        launch(
            tokens_kernel,
            rows,
            x.device,
            *(as_bytes(codes), scales, x, m, k, *x.stride()),
            LARGEST=largest,
            CODE=code,
            BLOCK=min(BLOCK, triton.next_power_of_2(k)),
        )
    return codes, scales


def int8_per_token(x: Tensor) -> Quantized:
    """As the function of this name in `quantized_inputs`, in one launch."""
    codes, scales = tokens(x, torch.int8)
    return Quantized(codes, (scales,))


def fp8_per_token(x: Tensor) -> Quantized:
    """As the function of this name in `quantized_inputs`, in one launch."""
    codes, scales = tokens(x, torch.float8_e4m3fn)
    return Quantized(codes, (scales,))


def fp8_per_group(x: Tensor) -> Quantized:
    """As the function of this name in `quantized_inputs`, in one launch."""
    codes, scales = groups(x, torch.float8_e4m3fn)
    return Quantized(codes, (scales,))


def mxfp8(x: Tensor) -> Quantized:
    """As the function of this name in `quantized_inputs`, in one launch."""
    codes, scales = powers(x, torch.float8_e4m3fn)
    return Quantized(codes, (scales,))


# -- a scale for some columns of a row -------------------------------------------------


@triton.jit
def groups_kernel(
    codes,
    scales,
    x,
    rows,
    wide,
    M,
    K,
    x_m,
    x_k,
    LARGEST: tl.constexpr,
    CODE: tl.constexpr,
    POWERS: tl.constexpr,
    ROWS: tl.constexpr,
    SPANS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """A tile of codes (rows, K), which are zeros from row M on, and its scales.

    Args:
        rows: how many rows of codes there are.
        wide: how many columns of scales there are.
        POWERS: whether scales are E8M0 in tiles, and not float32 in columns.
    """
    across = tl.cdiv(wide, SPANS)
    row = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)
    group = (tl.program_id(0) % across) * SPANS + tl.arange(0, SPANS)
    inner = tl.arange(0, SPAN)[None, None, :]
    column = group[None, :, None] * SPAN + inner
    inside = (row < M)[:, None, None] & (column < K)
    line = x + row.to(tl.int64)[:, None, None] * x_m
    values = tl.load(line + column * x_k, mask=inside, other=0).to(tl.float32)
    scale = tl.div_rn(tl.max(tl.abs(values), 2), LARGEST)
    if POWERS:
        power = power_code(scale)
        code = fp8_code(values * power_inverse(power)[:, :, None], CODE)
        # tiles of 128 x 4 scales, each as 32 x 16
        tile = (row // 128)[:, None] * (wide // 4) + (group // 4)[None, :]
        place = (row % 32 * 16 + row % 128 // 32 * 4)[:, None] + (group % 4)[None, :]
        target = scales + tile.to(tl.int64) * 512 + place
        exists = (row < M)[:, None] & (group * SPAN < K)[None, :]
        power = tl.where(exists, power, 0).to(tl.int8)
        tl.store(target, power, mask=(group < wide)[None, :])
    else:
        scale = tl.maximum(scale, MIN_SCALE)
        code = code_of(values, scale[:, :, None], CODE)
        target = scales + group.to(tl.int64)[None, :] * rows + row[:, None]
        tl.store(target, scale, mask=(row < rows)[:, None] & (group < wide)[None, :])
    target = codes + row.to(tl.int64)[:, None, None] * K + column
    tl.store(target, code, mask=(row < rows)[:, None, None] & (column < K))


def groups(
    x: Tensor, dtype: torch.dtype, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize with a float32 scale for each 128 columns of a row.

    Args:
        x: (M, K) float32, bfloat16 or float16; finite.
        dtype: float8_e4m3fn or float8_e5m2.
        rows: as of `tokens`.

    Returns:
        Codes (rows, K), contiguous, and scales (rows, ceil(K/128)) float32 of strides
        (1, rows), as ``scaled_mm`` takes them for ``BlockWise1x128``.
    """
    m, k = x.shape
    rows = m if rows is None else rows
    wide = -(-k // 128)
    codes = x.new_empty((rows, k), dtype=dtype)
    scales = x.new_empty((wide, rows), dtype=torch.float32)
    _launch_groups(x, codes, scales, rows, rows, wide, 128, False)
    return codes, scales.t()


def powers(
    x: Tensor, dtype: torch.dtype, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Quantize with a power of two for each 32 columns of a row (MXFP8).

    The power is the next one up, so that nothing is clipped.

    Args:
        x: (M, K) float32, bfloat16 or float16; finite.
        dtype: float8_e4m3fn or float8_e5m2.
        rows: as of `tokens`.

    Returns:
        Codes (rows, K), contiguous, and scales float8_e8m0fnu of `tiled_shape`, in the
        tiles of `schemes._tiles`, padded with zeros.
    """
    m, k = x.shape
    rows = m if rows is None else rows
    high, wide = tiled_shape((rows, -(-k // 32)))
    codes = x.new_empty((rows, k), dtype=dtype)
    scales = x.new_empty((high, wide), dtype=torch.float8_e8m0fnu)
    _launch_groups(x, codes, as_bytes(scales), rows, high, wide, 32, True)
    return codes, scales


def _launch_groups(
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    rows: int,
    high: int,
    wide: int,
    span: int,
    are_powers: bool,
) -> None:
    """Start `groups_kernel` for (high, wide) scales."""
    m, k = x.shape
    code, largest = _CODES[codes.dtype]
    spans = min(512 // span, triton.next_power_of_2(wide))
    height = ELEMENTS // (spans * span) if not are_powers else 8
    launch(
        groups_kernel,
        -(-high // height) * -(-wide // spans),
        x.device,
        *(as_bytes(codes), scales, x, rows, wide, m, k, *x.stride()),
        LARGEST=largest,
        CODE=code,
        POWERS=are_powers,
        ROWS=height,
        SPANS=spans,
        SPAN=span,
    )


# -- after the integer product ---------------------------------------------------------


@triton.jit
def int8_output_kernel(
    out,
    product,
    token_scale,
    weight_scale,
    bias,
    M,
    N,
    product_m,
    weight_n,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """A tile of (M, N) ``out``, which is contiguous."""
    across = tl.cdiv(N, COLUMNS)
    row = (tl.program_id(0) // across) * ROWS + tl.arange(0, ROWS)
    column = (tl.program_id(0) % across) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < M)[:, None] & (column < N)[None, :]
    line = product + row.to(tl.int64)[:, None] * product_m
    sums = tl.load(line + column[None, :], mask=inside, other=0).to(tl.float32)
    tokens = tl.load(token_scale + row, mask=row < M, other=0)
    weights = tl.load(weight_scale + column * weight_n, mask=column < N, other=0)
    values = sums * (tokens[:, None] * weights[None, :])
    if bias is not None:
        # two roundings, as torch's two operations have
        values = values.to(out.dtype.element_ty).to(tl.float32)
        offsets = tl.load(bias + column, mask=column < N, other=0).to(tl.float32)
        values = values + offsets[None, :]
    target = out + row.to(tl.int64)[:, None] * N + column[None, :]
    tl.store(target, values.to(out.dtype.element_ty), mask=inside)


def int8_output(
    product: Tensor,
    token_scale: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """Scale an integer product, round it, and add the bias: ``int8_linear``'s end.

    Args:
        product: (M, N) int32, its rows contiguous.
        token_scale: (M, 1) float32, contiguous.
        weight_scale: (N, 1) or (1, 1) float32.
        bias: (N,) of ``dtype``, contiguous, or None.
        dtype: float32, bfloat16 or float16.

    Returns:
        (M, N) of ``dtype``.
    """
    m, n = product.shape
    out = product.new_empty((m, n), dtype=dtype)
    step = weight_scale.stride(0) if weight_scale.shape[0] > 1 else 0
    launch(
        int8_output_kernel,
        -(-m // OUTPUT_ROWS) * -(-n // OUTPUT_COLUMNS),
        product.device,
        *(out, product, token_scale, weight_scale, bias, m, n),
        *(product.stride(0), step),
        ROWS=OUTPUT_ROWS,
        COLUMNS=OUTPUT_COLUMNS,
        # a product and a sum are rounded one by one
        enable_fp_fusion=False,
    )
    return out
