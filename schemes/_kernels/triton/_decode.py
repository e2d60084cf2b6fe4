"""Decode a weight, or some of its rows, into dense memory: one launch."""

# Functions of Triton have no Python types: the compiler infers theirs.
# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator"

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from schemes._kernels.block_scaled import BlockScaled
from schemes._kernels.triton.launch import launch
from schemes._kernels.triton.tiles import cut, number_tile, scale_tile, tensors

#: Elements of a program, and of these columns: 32 a thread, in four loads.
ELEMENTS = 4096
COLUMNS = 256
#: Columns of a span, at most: of wider ones a thread would hold several rows.
MAX_SPAN = 64


@triton.jit(do_not_specialize=["first", "end"])
def decode_kernel(
    out,
    codes,
    scale,
    factor,
    table,
    first,
    end,
    K,
    R,
    C,
    out_n,
    out_k,
    codes_n,
    codes_k,
    scale_n,
    scale_k,
    CODE: tl.constexpr,
    SCALE: tl.constexpr,
    HIGH_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    SPANS: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Decode the rows from ``first`` to ``end`` into ``out``; a program has one tile.

    Arguments are those of `number_tile` and `scale_tile`; ``out`` starts with row
    ``first``.
    """
    across = tl.cdiv(K, SPANS * SPAN)
    program = tl.program_id(0)
    place = (program // across) * ROWS + tl.arange(0, ROWS)
    row = first + place
    span = (program % across) * (SPANS * SPAN) + tl.arange(0, SPANS) * SPAN
    # fmt: off
    numbers = number_tile(
        codes, table, row, end, span, K, codes_n, codes_k,
        CODE, HIGH_FIRST, ROWS, SPANS, SPAN,
    )
    scales = scale_tile(
        scale, factor, row, end, span, K, R, C, scale_n, scale_k, SCALE
    )
    # fmt: on
    tile = numbers * scales[:, :, None]
    column = span[None, :, None] + tl.arange(0, SPAN)[None, None, :]
    target = out + place.to(tl.int64)[:, None, None] * out_n + column * out_k
    inside = (row < end)[:, None, None] & (column < K)
    tl.store(target, tile.to(out.dtype.element_ty), mask=inside)


def decode(weight: BlockScaled, out: Tensor, rows: slice | None = None) -> None:
    """Write rows of the dense weight, each element rounded once to nearest even.

    Args:
        weight: (N, K).
        out: (n, K) float32, bfloat16 or float16, of any strides.
        rows: the n rows, without a step; None for all.
    """
    n, k = weight.shape
    first, end, _ = (slice(None) if rows is None else rows).indices(n)
    if k == 0 or end <= first:
        return
    codes, scale, factor, table = tensors(weight)
    how = cut(weight)
    span = min(how.span, MAX_SPAN)
    columns = max(min(COLUMNS, triton.next_power_of_2(k)), span)
    height = min(ELEMENTS // columns, triton.next_power_of_2(end - first))
    launch(
        decode_kernel,
        -(-(end - first) // height) * -(-k // columns),
        codes.device,
        *(out, codes, scale, factor, table, first, end, k, how.rows, how.cols),
        *out.stride(),
        *codes.stride(),
        *scale.stride(),
        CODE=how.code,
        SCALE=how.scale,
        HIGH_FIRST=weight.high_first,
        ROWS=height,
        SPANS=columns // span,
        SPAN=span,
    )
