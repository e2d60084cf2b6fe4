"""Scales and FP8 codes of the blocks of a weight: `schemes.blockwise_fp8` as it writes.

Everything goes through the rows in chunks, so that temporaries stay in the cache.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from hijack.errors import NonFiniteError
from schemes._fp8_blocks import matrix_shape

#: musubi-tuner's floor of the scale.
MIN_SCALE = 1e-8
#: Elements quantized at a time.
CHUNK = 1 << 18

# -- scales --------------------------------------------------------------------------


def absmax_scale(
    weight: Tensor, size: tuple[int, int], dtype: torch.dtype, scale_dtype: torch.dtype
) -> Tensor:
    """The scale that puts each block's largest value at the end of the range.

    Args:
        weight: (N, ...) floating point.
        size: (R, C), the block size, no larger than the weight.
        dtype: the FP8 dtype.
        scale_dtype: float32, bfloat16 or float16.

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
    scale = (amax / torch.finfo(dtype).max).to(scale_dtype)
    return scale.clamp(MIN_SCALE, torch.finfo(scale_dtype).max)


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
