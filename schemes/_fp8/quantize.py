"""Quantize a weight to FP8 in blocks: choose the scales, and round.

Rows are processed in chunks, so that temporaries stay small.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hijack.errors import NonFiniteError
from schemes._blocks import grid_shape, matrix_shape
from schemes._fp8.blocks import POWER_DTYPES, decode_scale

#: musubi-tuner's floor of the scale.
MIN_SCALE = 1e-8
#: Elements processed at a time: on the CPU what fits the cache, elsewhere enough to
#: hide the launch of operations.
CHUNK = 1 << 18
DEVICE_CHUNK = 1 << 24
#: Most candidates of a search: as many as bfloat16 has in an octave.
MAX_CANDIDATES = 128
#: Relative error of the sums of squared errors.
MARGIN = 2.0**-14

# -- scales --------------------------------------------------------------------------


def absmax_scale(
    weight: Tensor, size: tuple[int, int], dtype: torch.dtype, scale_dtype: torch.dtype
) -> Tensor:
    """The scale that puts each block's largest value at the end of the range.

    Args:
        weight: (N, ...) floating point.
        size: (R, C), the block size, no larger than the weight.
        dtype: the FP8 dtype.
        scale_dtype: float32, bfloat16, float16 or float8_e8m0fnu; the last rounds up
            to a power of two, so that nothing is clipped.

    Returns:
        (ceil(N/R), ceil(K/C)) of ``scale_dtype``.

    Raises:
        NonFiniteError: if the weight holds inf or NaN, also once it is float32.
    """
    rows, cols = size
    shape = matrix_shape(tuple(weight.shape))
    matrix = weight.reshape(shape)
    # allocated once: small tensors that outlive large temporaries between them would
    # fragment the memory
    amax = matrix.new_empty(grid_shape(shape, (1, cols)))
    step = _step(matrix)
    for part, target in zip(
        torch.split(matrix, step), torch.split(amax, step), strict=True
    ):
        target.copy_(_blocks(part, cols).abs().amax(2))
    amax = amax.float()  # (N, ceil(K/C))
    _check_finite(amax, weight)
    amax = F.pad(amax, (0, 0, 0, -len(amax) % rows))
    amax = amax.view(-1, rows, amax.shape[1]).amax(1)
    # divide by a tensor: a GPU multiplies by a scalar's reciprocal, which rounds twice
    scale = amax / amax.new_tensor(torch.finfo(dtype).max)
    if scale_dtype in POWER_DTYPES:
        return _round_up_to_power(scale)
    scale = scale.to(scale_dtype)
    return scale.clamp(MIN_SCALE, torch.finfo(scale_dtype).max)


def _round_up_to_power(scale: Tensor) -> Tensor:
    """The next power of two up, as float8_e8m0fnu; 2**-127 for 0.

    comfy-kitchen and DeepSeek round this way; OCP MX rounds down, and clips.
    """
    fraction, exponent = torch.frexp(scale)  # fraction in [0.5, 1), or 0
    exponent = exponent - (fraction == 0.5).int()
    exponent = torch.where(scale > 0, exponent, -127).clamp(-127, 127)
    return (exponent + 127).to(torch.uint8).view(POWER_DTYPES[0])


def _check_finite(amax: Tensor, weight: Tensor) -> None:
    if not amax.isfinite().all():  # the largest of anything with a NaN is NaN
        weight = weight.float()  # float64 may become infinite
        nans, infs = int(weight.isnan().sum()), int(weight.isinf().sum())
        raise NonFiniteError(
            f"weight of shape {tuple(weight.shape)} holds {nans} NaN and {infs} "
            "infinite values as float32, expected finite ones; repair the checkpoint "
            "or exclude it"
        )


# -- search --------------------------------------------------------------------------


def search_scale(
    weight: Tensor,
    scale: Tensor,
    size: tuple[int, int],
    dtype: torch.dtype,
    candidates: int,
) -> Tensor:
    """The scale of each block with the least squared error, among candidates.

    The numbers of a floating format have the same relative spacing at 2x as at x, so
    one octave above the absmax scale, where nothing is clipped, covers all
    possibilities. The candidates are 2**(j/J) times a power of two, the same for all
    blocks. So an element's error depends only on the candidate and on its first seven
    bits of mantissa, up to a power of two, and is looked up in a table. For scales that
    are powers of two the only other candidate is half as large, which clips.

    The best candidate is then compared with the absmax scale, both as stored, by
    rounding every element. A block keeps the absmax scale unless the candidate is
    better by more than the error of float32.

    Args:
        weight: (N, K) floating point.
        scale: (ceil(N/R), ceil(K/C)), from `absmax_scale`.
        size: (R, C), the block size.
        dtype: the FP8 dtype.
        candidates: J, number of other scales to try, 1 to 128.

    Returns:
        (ceil(N/R), ceil(K/C)) of ``scale``'s dtype.
    """
    plain = decode_scale(scale)
    table = None
    if scale.dtype not in POWER_DTYPES:
        table = _ErrorTable(dtype, scale.dtype, candidates, weight.device)
    # few rows at a time, so that an error per candidate and block fits too
    step = _chunk(weight) // (plain.shape[1] * max(size[1], candidates))
    group = max(step // size[0], 1)
    scales = []
    for start in range(0, len(plain), group):
        rows = weight[start * size[0] : (start + group) * size[0]]
        first = plain[start : start + group]
        pieces = partial(_pieces, rows, size, max(step, 1))
        if table is None:
            other = (first / 2).clamp_min_(2.0**-127)
        else:
            other = table.likely(pieces, first)
        scales.append(_better(pieces, first, other, dtype))
    return _store(torch.cat(scales), scale.dtype)


#: Absolute values of rows of blocks (n, ceil(K/C), C), and the row of the grid that
#: each belongs to, (n,); None if they are the rows of the grid.
_Piece = tuple[Tensor, Tensor | None]
_Pieces = Callable[[], Iterator[_Piece]]


def _pieces(weight: Tensor, size: tuple[int, int], step: int) -> Iterator[_Piece]:
    """The blocks of a few rows at a time."""
    for start in range(0, len(weight), step):
        part = _blocks(weight[start : start + step], size[1]).abs()
        row = None
        if size[0] > 1:
            row = torch.arange(start, start + len(part), device=weight.device)
            row = row // size[0]
        yield part, row


def _spread(grid: Tensor, row: Tensor | None) -> Tensor:
    """(g, ...) as (n, ...): the value of each row of a piece."""
    return grid if row is None else grid[row]


def _gather(grid: Tensor, row: Tensor | None, values: Tensor) -> None:
    """Add (n, ...), the values of the rows of a piece, to (g, ...)."""
    if row is None:
        grid.add_(values)
    else:
        grid.index_add_(0, row, values)


class _ErrorTable:
    """Squared errors of elements by exponent and mantissa, for each candidate.

    Row 128 * e + m is for elements of mantissa 1 + m/128. Exponents are relative to the
    absmax scale's, up to the largest possible one; smaller elements than the first row
    count as zero. All candidates are twice the mantissas, even those that will be used
    undoubled. This affects only subnormal FP8 numbers, whose error is small.
    """

    EXPONENTS = 16

    def __init__(
        self,
        dtype: torch.dtype,
        scale_dtype: torch.dtype,
        candidates: int,
        device: torch.device,
    ) -> None:
        self.scale_dtype = scale_dtype
        # on the CPU, so that the table is the same everywhere
        numbers = torch.arange(candidates, dtype=torch.int32, device="cpu")
        # (J,) float32, in [1, 2], as the scale's dtype has them
        mantissas = torch.exp2(numbers.float() / candidates).to(scale_dtype).float()
        # the largest element is less than this power of two times the scale's
        reach = int(math.log2(torch.finfo(dtype).max)) + 2
        # of the first row, less the scale's
        self.lowest = reach - self.EXPONENTS
        row = torch.arange(self.EXPONENTS * 128, device="cpu")[:, None]
        element = torch.ldexp((128 + row % 128).float(), row // 128 + self.lowest - 7)
        scale = 2 * mantissas
        rounded = (element / scale).to(dtype).float() * scale
        errors = (rounded - element).square_()  # (16 * 128, J)
        errors[0] = 0
        self.numbers = numbers.to(device)
        self.mantissas, self.errors = mantissas.to(device), errors.to(device)

    def likely(self, pieces: _Pieces, scale: Tensor) -> Tensor:
        """The candidate with the least error for each block of (g, ceil(K/C)), float32.

        Args:
            pieces: returns the rows of all blocks.
            scale: (g, ceil(K/C)) float32, the absmax scales.
        """
        info = torch.finfo(self.scale_dtype)
        # a float16 scale may have become 0
        scale = scale.clamp_min(info.smallest_normal * info.eps)
        fraction, exponent = torch.frexp(scale)  # fraction in [0.5, 1)
        first = (exponent + (126 + self.lowest)).bitwise_left_shift_(7).short()
        error = self.errors.new_zeros((*scale.shape, self.errors.shape[1]))
        for part, row in pieces():
            bits = part.bfloat16().view(torch.int16)
            keys = bits - _spread(first, row)[:, :, None]
            keys = keys.clamp_(0, len(self.errors) - 1).int()
            sums = F.embedding_bag(keys.flatten(0, 1), self.errors, mode="sum")
            _gather(error, row, sums.view(len(part), *error.shape[1:]))
        # argmin is slow: the candidate's number replaces the last bits
        bits = error.view(torch.int32).bitwise_and_(-128).bitwise_or_(self.numbers)
        best: Tensor = self.mantissas[bits.amin(2).bitwise_and_(127)]
        up = (best < 2 * fraction).int()  # the octave starts at the absmax scale
        best = torch.ldexp(best, exponent - 1 + up).clamp_(max=info.max)
        return best.to(self.scale_dtype).float()


def _better(
    pieces: _Pieces, first: Tensor, other: Tensor, dtype: torch.dtype
) -> Tensor:
    """(g, ceil(K/C)) float32: the other scale if its squared error is less."""
    old, new = torch.zeros((2, *first.shape), dtype=torch.float64, device=first.device)
    for part, row in pieces():
        part = part.float()
        for scale, error in ((first, old), (other, new)):
            _gather(error, row, _squared_error(part, _spread(scale, row), dtype))
    # below 2**-100, squares in float32 lose precision
    better = (new < old * (1 - MARGIN)) & (old > 2.0**-100)
    return torch.where(better, other, first)


def _squared_error(part: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Squared error (n, ceil(K/C)) of each row of blocks, rounded as in `encode`.

    Args:
        part: (n, ceil(K/C), C) float32, absolute values.
        scale: (n, ceil(K/C)) float32.
        dtype: the FP8 dtype.

    Returns:
        float64.
    """
    info = torch.finfo(dtype)
    scale = scale[:, :, None]
    x = part / scale.clamp_min(2.0**-149)  # a float16 scale may have become 0
    x.clamp_(max=info.max)
    # The spacing of numbers is eps at 1 and doubles with every binade. Adding and
    # subtracting a number with 2**23 times that spacing rounds to it, half to even.
    lowest = int(math.log2(info.smallest_normal)) + 127
    lift = 23 + int(math.log2(info.eps))
    power = x.view(torch.int32).bitwise_and(0x7F800000)
    power.clamp_(min=lowest << 23).add_(lift << 23)
    magic = power.view(torch.float32)
    x.add_(magic).sub_(magic).mul_(scale).sub_(part)
    norm: Tensor = torch.linalg.vector_norm(x, dim=2)
    return norm.double().square_()


def _store(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast float32 scales, which are exact in the dtype."""
    if dtype not in POWER_DTYPES:
        return scale.to(dtype)
    return (scale.view(torch.int32) >> 23).to(torch.uint8).view(dtype)


# -- rounding --------------------------------------------------------------------------


def encode(
    weight: Tensor,
    scale: Tensor,
    size: tuple[int, int],
    out: Tensor,
    random: torch.Generator | None,
) -> None:
    """Quantize a weight with given scales.

    Args:
        weight: (N, K) floating point.
        scale: (ceil(N/R), ceil(K/C)).
        size: (R, C), the block size.
        out: (N, K) of an FP8 dtype.
        random: source of stochastic rounding; None rounds to nearest.
    """
    row = torch.arange(len(weight), device=weight.device) // size[0]
    step = _step(weight)
    pieces = zip(
        torch.split(weight, step),
        torch.split(scale.float()[row], step),
        torch.split(out, step),
        strict=True,
    )
    for part, factor, target in pieces:
        target.copy_(_quantize_rows(part, factor, size[1], out.dtype, random))


def _step(weight: Tensor) -> int:
    """The number of rows of a chunk of (N, K)."""
    return max(_chunk(weight) // weight.shape[1], 1)


def _chunk(weight: Tensor) -> int:
    return CHUNK if weight.device.type == "cpu" else DEVICE_CHUNK


def _blocks(weight: Tensor, cols: int) -> Tensor:
    """(n, K) as (n, ceil(K/C), C); a short block is padded with zeros."""
    short = -weight.shape[1] % cols
    if short:
        weight = F.pad(weight, (0, short))
    return weight.view(weight.shape[0], -1, cols)


def _quantize_rows(
    weight: Tensor,
    scale: Tensor,
    cols: int,
    dtype: torch.dtype,
    random: torch.Generator | None,
) -> Tensor:
    """Quantize a few rows (n, K) with scales (n, ceil(K/C)) float32."""
    largest = torch.finfo(dtype).max
    scaled = _blocks(weight, cols).float() / scale[:, :, None]  # (n, ceil(K/C), C)
    # a float16 scale may be 0: then 0/0 becomes 0, x/0 the largest number
    scaled = scaled.nan_to_num_(0.0).clamp_(-largest, largest)
    if random is not None:
        scaled = _round_stochastic(scaled, dtype, random)
    return scaled.flatten(1)[:, : weight.shape[1]].to(dtype)


def _round_stochastic(x: Tensor, dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """Round up or down to FP8, with probabilities that make it unbiased.

    Args:
        x: float32, within the range of ``dtype``.
        dtype: the FP8 dtype.
        random: source of random numbers.
    """
    info = torch.finfo(dtype)
    exponent = torch.frexp(x).exponent - 1
    lowest = torch.frexp(torch.tensor(info.smallest_normal)).exponent - 1
    # the spacing of numbers: eps at 1, doubled or halved with every binade
    step = torch.ldexp(torch.full_like(x, info.eps), exponent.clamp_min(int(lowest)))
    steps = x / step  # exact: the step is a power of two
    below = steps.floor()
    up = torch.rand(x.shape, generator=random, device=x.device) < steps - below
    return (below + up) * step
