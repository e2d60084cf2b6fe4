"""``F.linear`` with a quantized weight: which way for how many rows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from schemes._kernels import buffers
from schemes._kernels.block_scaled import BlockScaled
from schemes._kernels.cpu.decoding import Source
from schemes._kernels.cpu.dot import MOST_ROWS, can_dot, dot
from schemes._kernels.cpu.llvm import host
from schemes._kernels.cpu.pairs import can_pair, multiply

#: Most rows that are multiplied in float32 where there are pairs; in pairs; and in
#: pairs where torch has a faster way for many rows.
MOST_DOT = 2
MOST_PAIRED = 128
MOST_PAIRED_BESIDE_TILES = 8
#: Bytes decoded between two products by one thread: they stay in a cache, and are so
#: many that the start of a product counts for little.
TILE_BYTES = 1 << 22
#: Rows of a tile, at least; products take them in vectors and blocks.
TILE_ROWS = 192
ROW_STEP = 64
#: More rows of input than this evict a tile, and a product takes long enough to read
#: its weight from memory.
MOST_TILED = 512
#: Bytes decoded then: most weights whole. So too with several threads, which wait for
#: the slowest after every tile: on a busy machine, for a time slice each.
PIECE_BYTES = 1 << 26


def linear(x: Tensor, weight: BlockScaled, bias: Tensor | None) -> Tensor:
    """Multiply with a quantized weight.

    Args:
        x: (M, K) float32, bfloat16 or float16, on the CPU.
        weight: (N, K), on the CPU.
        bias: (N,), or None.

    Returns:
        (M, N) of ``x``'s dtype.
    """
    if x.requires_grad:
        x = x.detach()
    m = len(x)
    out = torch.empty((m, weight.shape[0]), dtype=x.dtype)
    if not out.numel():
        return out
    if not x.shape[1]:
        out.zero_()
        return out if bias is None else out.add_(bias.detach())
    source = Source.of(weight)
    if m <= MOST_DOT and can_dot(source):
        return _few(dot, x, source, bias, out)
    most = MOST_PAIRED_BESIDE_TILES if host().tiles else MOST_PAIRED
    if m <= most and can_pair(x, source):
        return _few(multiply, x, source, bias, out)
    if m <= MOST_ROWS and can_dot(source):
        return _few(dot, x, source, bias, out)
    _tiles(x, source, bias, out)
    return out


def _few(
    run: Callable[[Tensor, Source, Tensor], None],
    x: Tensor,
    source: Source,
    bias: Tensor | None,
    out: Tensor,
) -> Tensor:
    """Run a kernel whose products are float32, and add the bias before rounding."""
    if out.dtype == torch.float32:
        run(x, source, out)
        return out if bias is None else out.add_(bias.detach())
    m, n = out.shape
    sums = buffers.shared("sums", m * n, torch.float32, x.device).view(m, n)
    run(x, source, sums)
    if bias is not None:
        sums.add_(bias.detach())
    return out.copy_(sums)


def _tiles(x: Tensor, source: Source, bias: Tensor | None, out: Tensor) -> None:
    """Decode some rows of the weight, multiply with them, and so on."""
    n, k = source.n, source.k
    step = _tile_rows(n, k * x.element_size(), len(x))
    buffer = buffers.shared("weight", step * k, x.dtype, x.device).view(step, k)
    for start in range(0, n, step):
        stop = min(start + step, n)
        dense = buffer[: stop - start]
        source.decode(dense, start, stop)
        target = out[:, start:stop]
        if bias is None:
            torch.mm(x, dense.t(), out=target)
        else:
            torch.addmm(bias.detach()[start:stop], x, dense.t(), out=target)


def _tile_rows(n: int, row_bytes: int, m: int) -> int:
    """Rows of the weight that are decoded at a time, much the same for all tiles."""
    whole = m > MOST_TILED or torch.get_num_threads() > 1
    rows = max((PIECE_BYTES if whole else TILE_BYTES) // row_bytes, TILE_ROWS)
    tiles = -(-n // rows)
    rows = -(-n // tiles)
    return min(-(-rows // ROW_STEP) * ROW_STEP, n)
