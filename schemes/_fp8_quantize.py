"""Scales and FP8 codes of the blocks of a weight: `schemes.blockwise_fp8` as it writes.

Everything goes through the rows in chunks, so that temporaries stay in the cache.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hijack.errors import NonFiniteError
from schemes._fp8_blocks import POWER_DTYPES, matrix_shape

#: musubi-tuner's floor of the scale.
MIN_SCALE = 1e-8
#: Elements quantized at a time.
CHUNK = 1 << 18
#: Elements searched at a time: all temporaries of a few rows stay in the cache.
SEARCH_CHUNK = 1 << 16

#: Integers of as many bytes.
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32}

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
        NonFiniteError: if the weight holds inf or NaN.
    """
    rows, cols = size
    matrix = weight.reshape(matrix_shape(tuple(weight.shape)))
    parts = torch.split(matrix, _step(matrix))
    amax = torch.cat([_blocks(part, cols).abs().amax(2) for part in parts])
    _check_finite(amax, weight)  # (N, ceil(K/C))
    amax = F.pad(amax.float(), (0, 0, 0, -len(amax) % rows))
    amax = amax.view(-1, rows, amax.shape[1]).amax(1)
    scale = amax / torch.finfo(dtype).max
    if scale_dtype in POWER_DTYPES:
        return _round_up_to_power(scale)
    scale = scale.to(scale_dtype)
    return scale.clamp(MIN_SCALE, torch.finfo(scale_dtype).max)


def _round_up_to_power(scale: Tensor) -> Tensor:
    """The least power of two that is no smaller, as float8_e8m0fnu; 2**-127 for 0.

    As comfy-kitchen and DeepSeek round; OCP MX rounds down, and clips.
    """
    fraction, exponent = torch.frexp(scale)  # fraction in [0.5, 1), or 0
    exponent = exponent - (fraction == 0.5).int()
    exponent = torch.where(scale > 0, exponent, -127).clamp(-127, 127)
    return (exponent + 127).to(torch.uint8).view(POWER_DTYPES[0])


# -- search --------------------------------------------------------------------------


def search_scale(
    weight: Tensor,
    scale: Tensor,
    size: tuple[int, int],
    dtype: torch.dtype,
    candidates: int,
) -> Tensor:
    """The scale of each block with the least squared error, among some.

    The numbers of a floating format are as dense at 2x as at x, so that all ways to lay
    them over a block are found within one octave above the absmax scale, where nothing
    is clipped. Candidates are spread evenly over its logarithm. Powers of two have but
    one other worth trying, half as large, which clips. A block keeps the absmax scale
    unless another is strictly better, judged with the scale as it will be stored.

    Args:
        weight: (N, K) floating point.
        scale: (ceil(N/R), ceil(K/C)), from `absmax_scale`.
        size: (R, C), the block size.
        dtype: the FP8 dtype.
        candidates: how many scales to try for each block, the given one among them.

    Returns:
        (ceil(N/R), ceil(K/C)) of ``scale``'s dtype.
    """
    power = scale.dtype in POWER_DTYPES
    steps = range(2 if power else candidates)
    factors = [2.0**-j if power else 2.0 ** (j / candidates) for j in steps]
    tried = torch.stack([(scale.float() * f).to(scale.dtype) for f in factors])
    found = []
    group = max(SEARCH_CHUNK // (weight.shape[1] * size[0]), 1)  # rows of the grid
    for start in range(0, len(scale), group):
        rows = weight[start * size[0] : (start + group) * size[0]]
        found.append(_best(rows, tried[:, start : start + group], size, dtype))
    return torch.cat(found)


def _best(
    weight: Tensor, tried: Tensor, size: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """The best of (J, g, ceil(K/C)) scales for (n, K): g rows of blocks."""
    wide = tried.float()
    error = torch.zeros_like(wide, dtype=torch.float64)
    step = max(SEARCH_CHUNK // weight.shape[1], 1)
    for start in range(0, len(weight), step):
        part = _blocks(weight[start : start + step], size[1]).float().abs()
        row = torch.arange(start, start + len(part), device=weight.device) // size[0]
        for j, scale in enumerate(wide):
            error[j].index_add_(0, row, _squared_error(part, scale[row], dtype))
    best, least = tried[0].clone(), error[0]
    for candidate, mine in zip(tried[1:], error[1:], strict=True):
        better = mine < least
        best.view(_BITS[best.element_size()])[better] = candidate.view(
            _BITS[best.element_size()]
        )[better]
        least = torch.where(better, mine, least)
    return best


def _squared_error(part: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Squared error (n, ceil(K/C)) of each row of blocks, as `encode` would round it.

    Args:
        part: (n, ceil(K/C), C) float32, absolute values.
        scale: (n, ceil(K/C)) float32.
        dtype: the FP8 dtype.
    """
    info = torch.finfo(dtype)
    x = part / scale[:, :, None]
    x.clamp_(max=info.max)
    # The distance of neighbours is eps at 1 and doubles with every binade; adding and
    # taking away a number 2**23 times as far from its own rounds to it, half to even.
    lowest, lift = _exponents(dtype)
    power = x.view(torch.int32).bitwise_and(0x7F800000).clamp_(min=lowest).add_(lift)
    magic = power.view(torch.float32)
    rounded = (x + magic).sub_(magic)
    rounded.mul_(scale[:, :, None]).sub_(part)
    return rounded.square_().sum(2).double()


def _exponents(dtype: torch.dtype) -> tuple[int, int]:
    """Bits of the exponent of the smallest normal, and how far above eps is 2**23."""
    info = torch.finfo(dtype)
    smallest = torch.tensor(info.smallest_normal).view(torch.int32)
    mantissa = round(-math.log2(info.eps))
    return int(smallest), (23 - mantissa) << 23


def _check_finite(amax: Tensor, weight: Tensor) -> None:
    if not amax.isfinite().all():  # the largest of anything with a NaN is NaN
        nans, infs = int(weight.isnan().sum()), int(weight.isinf().sum())
        raise NonFiniteError(
            f"weight of shape {tuple(weight.shape)} holds {nans} NaN and {infs} "
            "infinite values, expected finite ones; repair the checkpoint or exclude it"
        )


# -- codes ---------------------------------------------------------------------------


def encode(
    weight: Tensor,
    scale: Tensor,
    size: tuple[int, int],
    out: Tensor,
    random: torch.Generator | None,
) -> None:
    """Write the FP8 codes of a weight.

    Args:
        weight: (N, K) floating point.
        scale: (ceil(N/R), ceil(K/C)).
        size: (R, C), the block size.
        out: (N, K) of an FP8 dtype.
        random: where the random numbers of stochastic rounding come from; None rounds
            to nearest.
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
        target.copy_(_codes(part, factor, size[1], out.dtype, random))


def _step(weight: Tensor) -> int:
    """How many rows (N, K) has in a chunk."""
    return max(CHUNK // weight.shape[1], 1)


def _blocks(weight: Tensor, cols: int) -> Tensor:
    """(n, K) as (n, ceil(K/C), C); a short block is filled up with zeros."""
    short = -weight.shape[1] % cols
    if short:
        weight = F.pad(weight, (0, short))
    return weight.view(weight.shape[0], -1, cols)


def _codes(
    weight: Tensor,
    scale: Tensor,
    cols: int,
    dtype: torch.dtype,
    random: torch.Generator | None,
) -> Tensor:
    """FP8 codes (n, K) of a few rows, scaled by (n, ceil(K/C)) float32."""
    largest = torch.finfo(dtype).max
    codes = _blocks(weight, cols).float() / scale[:, :, None]  # (n, ceil(K/C), C)
    # a float16 scale may have become 0: then 0/0 is code 0, x/0 the largest
    codes = codes.nan_to_num_(0.0).clamp_(-largest, largest)
    if random is not None:
        codes = _round_stochastic(codes, dtype, random)
    return codes.flatten(1)[:, : weight.shape[1]].to(dtype)


def _round_stochastic(x: Tensor, dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """Round to a neighbouring FP8 number, the nearer the likelier, without bias.

    Args:
        x: float32, within the range of ``dtype``.
        dtype: the FP8 dtype.
        random: where the random numbers come from.
    """
    info = torch.finfo(dtype)
    exponent = torch.frexp(x).exponent - 1
    lowest = torch.frexp(torch.tensor(info.smallest_normal)).exponent - 1
    # the distance of neighbours: eps at 1, doubled or halved with every binade
    step = torch.ldexp(torch.full_like(x, info.eps), exponent.clamp_min(int(lowest)))
    steps = x / step  # exact: the step is a power of two
    below = steps.floor()
    up = torch.rand(x.shape, generator=random, device=x.device) < steps - below
    return (below + up) * step
