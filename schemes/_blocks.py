"""The blocks of a weight: their sizes, and the grid of scales over them.

A weight is seen as (N, K), all but the first of its dimensions flattened. Blocks are
(R, C); those at the right and lower edge may be short. A scale is a grid of
(ceil(N/R), ceil(K/C)), whatever shape a file gives it.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hijack import QuantizedTensor, text
from hijack.claim import Claim
from hijack.errors import CheckpointError, NonFiniteError, SchemeError, ShapeError
from hijack.safetensors_io.header import Header

#: Integers of as many bytes.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

BlockSize = int | str | tuple[int, int]
Pair = tuple[int, int]

SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Columns of the narrowest blocks of any format.
_NARROWEST = 32

# -- sizes ---------------------------------------------------------------------------


def matrix_shape(shape: tuple[int, ...]) -> Pair:
    """(N, K) of a weight's shape; all but the first dimension are flattened."""
    n = shape[0] if shape else 1
    k = 1
    for size in shape[1:]:
        k *= size
    return n, k


def parse_block_size(block_size: BlockSize, shape: Pair) -> Pair:
    """A block size as (rows, cols), no larger than the weight.

    Args:
        block_size: (rows, cols), an int n for (1, n), ``"1x64"``, ``"row"`` or
            ``"tensor"``.
        shape: (N, K) of the weight.

    Raises:
        SchemeError: if it is none of these or not positive.
    """
    size: Any = block_size
    if isinstance(size, str):
        try:
            size = text.parse_block_size(size)
        except SchemeError as error:
            raise SchemeError(f"block_size: {error}") from error
    if isinstance(size, str):
        size = (1 if size == "row" else max(shape[0], 1), max(shape[1], 1))
    if isinstance(size, int):
        size = (1, size)
    numbers = isinstance(size, (list, tuple)) and all(type(n) is int for n in size)
    if not numbers or len(size) != 2 or min(size) < 1:
        raise SchemeError(
            f"block_size: got {block_size!r}, expected (rows, cols) of positive ints, "
            "an int n for (1, n), 'ROWSxCOLS', 'row' or 'tensor'"
        )
    return min(size[0], max(shape[0], 1)), min(size[1], max(shape[1], 1))


def grid_shape(shape: Pair, size: Pair) -> Pair:
    """Rows and columns of the scales of (N, K) in blocks of (R, C)."""
    return -(-shape[0] // size[0]), -(-shape[1] // size[1])


def divides(shape: Pair, size: Pair) -> bool:
    """Whether no block is short."""
    return shape[0] % size[0] == 0 and shape[1] % size[1] == 0


# -- block sizes of a scale ----------------------------------------------------------


def grid_of(scale: tuple[int, ...], shape: Pair) -> Pair | None:
    """The grid of a stored scale, or None if it cannot cover the weight.

    One element is the scale of the whole weight; one dimension has a scale per row;
    three have a trailing 1, as in musubi-tuner's (N, K/C, 1).

    Args:
        scale: shape of the scale as stored.
        shape: (N, K) of the weight.
    """
    if all(size == 1 for size in scale):
        return 1, 1
    if len(scale) == 1:
        rows, cols = scale[0], 1
    elif len(scale) == 2 or (len(scale) == 3 and scale[2] == 1):
        rows, cols = scale[0], scale[1]
    else:
        return None
    one_each = len(scale) == 2 or rows == shape[0]
    return (rows, cols) if 0 < rows <= shape[0] and cols > 0 and one_each else None


def possible_sizes(shape: Pair, grid: Pair) -> tuple[list[Pair], bool]:
    """The possible block sizes of a grid, and whether the first is certain.

    A grid is ambiguous if blocks may be short: 192 rows in 2 blocks are 2 x 96 or
    128 + 64. Writers use powers of two. So an exact division is certain if it is one,
    or if no power of two gives the same grid. One scale per column, or as many columns
    of scales as there are rows, is never certain: no known program writes it, and it
    may be one scale per row, or blocks of rows, transposed.

    Args:
        shape: (N, K) of the weight.
        grid: rows and columns of the scale.
    """
    rows, certain_rows = _possible(shape[0], grid[0])
    cols, certain_cols = _possible(shape[1], grid[1])
    sizes = [(r, c) for r in rows for c in cols]
    return sizes, certain_rows and certain_cols and not transposed(shape, grid)


def transposed(shape: Pair, grid: Pair) -> bool:
    """Whether a grid may be that of rows, transposed; then it is ambiguous."""
    (n, k), (rows, cols) = shape, grid
    if n == 1 or cols == 1 or rows == n:
        return False
    return grid == (1, k) or (cols == n and k < n * _NARROWEST)


@functools.lru_cache(maxsize=1024)
def _possible(size: int, blocks: int) -> tuple[Sequence[int], bool]:
    """`possible_sizes` of one dimension; an exact division comes last."""
    if blocks == 1:
        return [size], True
    powers = (1 << bit for bit in range(size.bit_length()))
    ragged = [p for p in powers if -(-size // p) == blocks and p * blocks != size]
    if size % blocks:
        return ragged, False
    exact = size // blocks
    certain = exact & (exact - 1) == 0 or not ragged
    return ([] if certain else ragged) + [exact], certain


# -- quantized tensors ---------------------------------------------------------------


def block_size_of(qdata: Tensor, params: Mapping[str, Tensor]) -> Pair:
    """The block size of quantized tensors, as (rows, cols).

    Args:
        qdata: (N, ...).
        params: ``weight_scale`` and, where blocks are short, ``weight_block_size``.

    Raises:
        ShapeError: if the scale does not cover the weight.
    """
    marker = params.get("weight_block_size")
    marker_shape = None if marker is None else tuple(marker.shape)
    shapes = tuple(qdata.shape), tuple(params["weight_scale"].shape), marker_shape
    if torch.compiler.is_compiling():  # sizes are symbols, which no cache knows
        return infer_block_size(*shapes)
    return _known_block_size(*shapes)


def infer_block_size(
    weight: tuple[int, ...], scale: tuple[int, ...], marker: tuple[int, ...] | None
) -> Pair:
    """The block size of shapes: the marker's, else the exact division.

    Raises:
        ShapeError: if the scale does not cover the weight.
    """
    n, k = matrix_shape(weight)
    grid = _rank_two(scale)
    if not n or not k:  # a side of any length would take no bytes in a file
        raise ShapeError(f"weight: is {weight}, expected a weight with elements")
    if marker is not None:
        if len(marker) != 3 or min(marker[:2]) < 1 or marker[2] != 0:
            raise ShapeError(
                f"weight_block_size: has shape {marker}, expected (rows, cols, 0)"
            )
        rows, cols = marker[0], marker[1]
        if grid != grid_shape((n, k), (rows, cols)):
            raise ShapeError(
                f"weight_scale: is {scale}, expected {grid_shape((n, k), (rows, cols))}"
                f" for weight {weight} and block_size {(rows, cols)}; was it saved "
                "with another block_size?"
            )
        return rows, cols
    if grid is None or 0 in grid or n % grid[0] or k % grid[1]:
        raise ShapeError(
            f"weight_scale: is {scale}, which does not divide weight {weight}; a block "
            "size cannot be inferred from such a grid, expected weight_block_size too"
        )
    return n // grid[0], k // grid[1]


_known_block_size = functools.lru_cache(maxsize=1024)(infer_block_size)


def _rank_two(scale: tuple[int, ...]) -> Pair | None:
    """Rows and columns of a scale; one dimension is one scale per row."""
    rows, cols, *rest = (*scale, 1, 1)[: max(len(scale), 2)]
    return None if rest else (rows, cols)


def as_grid(scale: Tensor) -> Tensor:
    """Any scale as (ceil(N/R), ceil(K/C)); a view."""
    return scale if scale.ndim == 2 else scale.view((*scale.shape, 1, 1)[:2])


def reblock(scale: Tensor, shape: Pair, size: Pair, wanted: Pair) -> Tensor | None:
    """The same scales over other blocks, or None if that is impossible.

    A block is split by repeating its scale; blocks are merged if all have the same.

    Args:
        scale: (ceil(N/R), ceil(K/C)).
        shape: (N, K) of the weight.
        size: (R, C), its block size.
        wanted: (R', C') of the result.

    Returns:
        (ceil(N/R'), ceil(K/C')), or None.
    """
    bits = as_grid(scale)
    bits = bits.view(_BITS[scale.element_size()])
    for axis in (0, 1):
        old = torch.arange(shape[axis]) // size[axis]
        new = torch.arange(shape[axis]) // wanted[axis]
        pairs = torch.unique_consecutive(
            torch.stack([old, new]), dim=1
        )  # (2, P): overlapping old and new blocks
        first = torch.ones(pairs.shape[1], dtype=torch.bool)
        first[1:] = pairs[1, 1:] != pairs[1, :-1]
        merged = bits.index_select(axis, pairs[0, first])
        spread = merged.index_select(axis, pairs[1])
        if not torch.equal(spread, bits.index_select(axis, pairs[0])):
            return None
        bits = merged
    return bits.view(scale.dtype)


def cut(
    scale: Tensor, shape: Pair, size: Pair, part: tuple[slice, slice]
) -> dict[str, Tensor]:
    """The scheme's parameters for a part of a weight.

    Where the part begins or ends within a block, there is a scale for each row, or for
    each column.

    Args:
        scale: (ceil(N/R), ceil(K/C)).
        shape: (N, K) of the whole weight.
        size: (R, C), its block size.
        part: rows and columns.
    """
    grid = as_grid(scale)
    bits = grid.view(_BITS[grid.element_size()])
    blocks, lengths = [], []
    for axis in (0, 1):
        start, stop, block = part[axis].start, part[axis].stop, size[axis]
        if start % block == 0 and (stop % block == 0 or stop == shape[axis]):
            index = torch.arange(start // block, -(-stop // block))
        elif start // block == (stop - 1) // block:  # within one block
            index, block = torch.tensor([start // block]), stop - start
        else:
            index, block = torch.arange(start, stop) // block, 1
        bits = bits.index_select(axis, index.to(bits.device))
        blocks.append(min(block, stop - start))
        lengths.append(stop - start)
    return make_params(
        bits.view(scale.dtype), (lengths[0], lengths[1]), (blocks[0], blocks[1])
    )


def check_scales(qdata: Tensor, scale: Tensor, size: Pair, where: str) -> None:
    """Refuse scales that are NaN, infinite, negative, or zero for nonzero data.

    Args:
        qdata: (N, ...) quantized data.
        scale: (ceil(N/R), ceil(K/C)) of a floating dtype.
        size: (R, C), the block size.
        where: the layer, for messages.

    Raises:
        NonFiniteError: if a scale is NaN or infinite.
        CheckpointError: if one is negative, or zero for nonzero data.
    """
    grid = as_grid(scale)
    if not grid.numel():
        return
    low, high = grid.aminmax()
    if not math.isfinite(float(low)) or not math.isfinite(float(high)):
        raise scales_not_finite(where)
    if low < 0 or (low == 0 and _zero_matters(qdata, grid, size)):
        raise CheckpointError(
            f"{where}: weight_scale holds {float(low):g}, expected positive scales; "
            "the file is damaged, get it again"
        )


def scales_not_finite(where: str) -> NonFiniteError:
    """The error for a layer whose scales are NaN or infinite."""
    return NonFiniteError(
        f"{where}: weight_scale holds NaN or inf, expected finite scales; the file is "
        "damaged, get it again"
    )


def _zero_matters(qdata: Tensor, grid: Tensor, size: Pair) -> bool:
    """Whether a scale is zero although an element of its block is not.

    musubi-tuner's float16 scales underflow to zero for tiny weights. Divided by zero,
    these become the largest FP8 number, and are meant to be zeros.
    """
    data = qdata.reshape(matrix_shape(tuple(qdata.shape)))
    underflows = grid.dtype == torch.float16 and qdata.is_floating_point()
    underflow = torch.finfo(qdata.dtype).max if underflows else 0
    for at in (grid == 0).nonzero().tolist():
        rows = slice(at[0] * size[0], (at[0] + 1) * size[0])
        cols = slice(at[1] * size[1], (at[1] + 1) * size[1])
        block = data[rows, cols].float().abs()
        if ((block != 0) & (block != underflow)).any():
            return True
    return False


def make_params(scale: Tensor, shape: Pair, size: Pair) -> dict[str, Tensor]:
    """The scheme's parameters for a grid of scales.

    Args:
        scale: of any shape with as many elements as the grid has.
        shape: (N, K) of the weight.
        size: (R, C), the block size.

    Raises:
        ShapeError: if it has a different number of elements.
    """
    grid = grid_shape(shape, size)
    if scale.numel() != grid[0] * grid[1]:
        raise ShapeError(
            f"weight_scale: is {tuple(scale.shape)}, expected {grid} for weight "
            f"{shape} in blocks of {size[0]}x{size[1]}"
        )
    params = {"weight_scale": scale.reshape(grid)}
    if not divides(shape, size):
        params["weight_block_size"] = scale.new_empty((*size, 0), dtype=torch.uint8)
    return params


def sized(claim: Claim, header: Header) -> Claim:
    """A claim to a layer of the scheme's own names, with the size of its blocks."""
    infos = {role: header.tensors[key] for role, key in claim.keys.items()}
    block = infos.get("weight_block_size")
    try:
        size = infer_block_size(
            infos["weight"].shape,
            infos["weight_scale"].shape,
            block.shape if block else None,
        )
    except (ShapeError, KeyError):
        return claim
    return dataclasses.replace(claim, block_size=size)


# -- products ------------------------------------------------------------------------


def multiply(codes: Tensor, scale: Tensor, size: Pair) -> Tensor:
    """Each scale times its block.

    Args:
        codes: (N, K) float32.
        scale: (ceil(N/R), ceil(K/C)) float32.
        size: (R, C), the block size.

    Returns:
        (N, K) float32.
    """
    (n, k), (rows, cols) = codes.shape, size
    if divides((n, k), size):
        blocks = codes.reshape(n // rows, rows, k // cols, cols)
        return (blocks * scale[:, None, :, None]).view(n, k)
    # Inductor of torch 2.13 compiles scales that are spread over a ragged width into
    # garbage, by repeat_interleave as by an index: so whole blocks, then the short ones
    scale = scale[torch.arange(n, device=codes.device) // rows]  # (N, ceil(K/C))
    many, whole = k // cols, k // cols * cols
    blocks = codes[:, :whole].reshape(n, many, cols) * scale[:, :many, None]
    rest = codes[:, whole:] * scale[:, many:] if whole < k else codes[:, k:]
    return torch.cat([blocks.view(n, whole), rest], 1)


def embedding_forward(
    module: nn.Module, input: Tensor, weight: QuantizedTensor, bias: None
) -> Tensor:
    """``F.embedding`` that decodes the rows asked for and no others.

    Args:
        module: not used.
        input: (...) int64 or int32.
        weight: (N, K) of a scheme whose parameters are those of `make_params` and
            others that all rows share.
        bias: None.

    Returns:
        (..., K) of the dense weight's dtype.
    """
    qdata, params = weight.qdata, weight.params
    rows, cols = block_size_of(qdata, params)
    index = input.reshape(-1)  # (M,)
    shape = (*input.shape, qdata.shape[1])
    if not len(index):
        return torch.empty(shape, dtype=weight.dtype, device=qdata.device)
    found = {
        **params,
        "weight_scale": as_grid(params["weight_scale"])[index // rows],  # (M, K/C)
        "weight_block_size": qdata.new_empty((1, cols, 0), dtype=torch.uint8),
    }
    codes = qdata.view(torch.uint8)[index].view(qdata.dtype)  # (M, K)
    dense = weight.scheme.dequantize(codes, found, weight.dtype)
    return dense.view(shape)
