"""What FP8 adds to the blocks of `schemes._blocks`: scales that are exponents."""

from __future__ import annotations

import torch
from torch import Tensor

from schemes._blocks import Pair, scales_not_finite
from schemes._blocks import check_scales as check_floating_scales

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
_E8M0 = getattr(torch, "float8_e8m0fnu", None)
#: Scales that are powers of two; uint8 holds the exponent's bits.
POWER_DTYPES: tuple[torch.dtype, ...] = () if _E8M0 is None else (_E8M0, torch.uint8)


def decode_scale(scale: Tensor) -> Tensor:
    """A scale as float32; bytes are exponents."""
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.float()


def check_scales(qdata: Tensor, scale: Tensor, size: Pair, where: str) -> None:
    """As `schemes._blocks.check_scales`; of exponents, 255 is NaN and none is zero."""
    if scale.dtype not in POWER_DTYPES:
        check_floating_scales(qdata, scale, size, where)
    elif scale.numel() and int(scale.view(torch.uint8).max()) == 255:
        raise scales_not_finite(where)
