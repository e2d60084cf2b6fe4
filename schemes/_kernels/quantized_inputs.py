"""Quantizers of activations: what matrix units of few bits multiply a weight with.

Each takes an input (M, K) and gives its codes and their scales, computed in float32
from the input itself, without a calibration. They are torch operations that compilers
can look into, and never wait for a device ::

    int8_per_token     s_i  = max(max_j |x_ij| / 127, 1e-30)
    fp8_per_token      s_i  = max(max_j |x_ij| / 448, 1e-30)
    fp8_per_group      s_ig = max(max_{j in g} |x_ij| / 448, 1e-30), g of 128 columns
    mxfp8              s_ig = 2^ceil(log2(max_{j in g} |x_ij| / 448)), g of 32 columns
    nvfp4              s    = max_ij |x_ij| / (6 * 448),
                       s_ig = s * e4m3(max_{j in g} |x_ij| / 6 / s), g of 16 columns

The codes are those of x / s, to the nearest, ties to even; nothing is clipped but by
the rounding of NVFP4's scales.

References: comfy-kitchen, ``backends/eager/quantization.py``, for INT8; DeepSeek-V3
(arXiv 2412.19437), section 3.3, for groups of 128; OCP Microscaling Formats 1.0 for
MXFP8, with scales rounded up as DeepSeek and comfy-kitchen do; NVIDIA (arXiv
2509.25149), appendix B, for NVFP4.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from schemes._kernels import e2m1
from schemes._kernels.eager import are_plain
from schemes._tiles import to_tiles

#: Columns that share a scale.
GROUP, MX_GROUP, FP4_GROUP = 128, 32, 16
#: The least scale, as in comfy-kitchen.
MIN_SCALE = 1e-30
_E4M3, _E8M0 = torch.float8_e4m3fn, torch.float8_e8m0fnu
_MAX = 448.0
#: Where fused versions of these functions are, under the same names.
_FUSED = "schemes._kernels.triton.inputs"


class Quantized(NamedTuple):
    """An input as a matrix unit takes it.

    Attributes:
        codes: (M, K) int8 or float8_e4m3fn; of NVFP4 (M, K/2) uint8, the even column in
            the low bits.
        scales: the scales; of NVFP4 those of the blocks, then the one of the input.
    """

    codes: Tensor
    scales: tuple[Tensor, ...]


Quantizer = Callable[[Tensor], Quantized]


def quantize(quantizer: Quantizer, x: Tensor) -> Quantized:
    """Quantize an input, in one pass over it where there is a fused version.

    Args:
        quantizer: a function of this module.
        x: (M, K) float32, bfloat16 or float16.
    """
    quantizer = getattr(fused(x), quantizer.__name__, quantizer)
    return quantizer(x)


@functools.cache
def _fused() -> Any:
    """The module of fused versions; None where it cannot be imported."""
    try:
        return importlib.import_module(_FUSED)
    except ImportError:
        return None


def fused(x: Tensor) -> Any:
    """The module of kernels for inputs like this one, or None if there is none."""
    if not x.is_cuda or not are_plain(x):  # a compiler fuses by itself
        return None
    return _fused()


def int8_per_token(x: Tensor) -> Quantized:
    """INT8 with a scale for each row.

    Args:
        x: (M, K) floating point.

    Returns:
        (M, K) int8 and (M, 1) float32.
    """
    scale = _divided(x.abs().amax(1, keepdim=True), 127.0).clamp_min(MIN_SCALE)
    codes = (x.float() / scale).round_().clamp_(-128, 127).to(torch.int8)
    return Quantized(codes, (scale,))


def fp8_per_token(x: Tensor) -> Quantized:
    """E4M3 with a scale for each row.

    Args:
        x: (M, K) floating point.

    Returns:
        (M, K) float8_e4m3fn and (M, 1) float32.
    """
    scale = _divided(x.abs().amax(1, keepdim=True), _MAX).clamp_min(MIN_SCALE)
    return Quantized(_fp8(x.float() / scale), (scale,))


def fp8_per_group(x: Tensor) -> Quantized:
    """E4M3 with a scale for each 128 columns of a row.

    Args:
        x: (M, K) floating point; 128 divides K.

    Returns:
        (M, K) float8_e4m3fn and (M, K/128) float32 with the strides (1, M).
    """
    groups = x.reshape(len(x), -1, GROUP)  # (M, K/128, 128)
    scale = _divided(groups.abs().amax(2), _MAX).clamp_min(MIN_SCALE)
    codes = _fp8(groups.float() / scale.unsqueeze(2)).flatten(1)
    return Quantized(codes, (scale.t().contiguous().t(),))


def mxfp8(x: Tensor) -> Quantized:
    """E4M3 with a power of two for each 32 columns of a row.

    Args:
        x: (M, K) floating point; 32 divides K.

    Returns:
        (M, K) float8_e4m3fn and the float8_e8m0fnu scales (M, K/32) in tiles.
    """
    groups = x.reshape(len(x), -1, MX_GROUP)
    bits = _divided(groups.abs().amax(2), _MAX).view(torch.int32)
    # the exponent, and one more where there is a mantissa; at least 2^-126, so that no
    # device takes the scale for zero
    exponent = ((bits + 0x7FFFFF) >> 23).clamp(1, 254)
    scale = (exponent << 23).view(torch.float32)
    codes = _fp8(groups.float() / scale.unsqueeze(2)).flatten(1)
    return Quantized(codes, (to_tiles(exponent.to(torch.uint8).view(_E8M0)),))


def nvfp4(x: Tensor) -> Quantized:
    """E2M1 with an E4M3 scale for each 16 columns of a row, and one for the input.

    Args:
        x: (M, K) floating point; 16 divides K.

    Returns:
        (M, K/2) uint8, the float8_e4m3fn scales (M, K/16) in tiles, and () float32.
    """
    groups = x.reshape(len(x), -1, FP4_GROUP)
    amax = groups.abs().amax(2).float()
    whole = _divided(amax.amax(), e2m1.MAX * _MAX)
    whole = torch.where(whole == 0, 1.0, whole)  # of zeros
    scale = (amax / e2m1.MAX / whole).clamp(max=_MAX).to(_E4M3)
    factor = scale.float() * whole
    zero = factor == 0
    quotient = groups.float() / torch.where(zero, 1.0, factor).unsqueeze(2)
    codes = e2m1.encode(torch.where(zero.unsqueeze(2), 0.0, quotient).flatten(1))
    return Quantized(codes, (to_tiles(scale), whole))


def _divided(amax: Tensor, largest: float) -> Tensor:
    """A quotient in float32.

    By a tensor: a GPU multiplies by a scalar's reciprocal, which rounds twice. The
    tensor is made where it is used, for a copy to a device would wait for it.
    """
    amax = amax.float()
    return amax / amax.new_full((), largest)


def _fp8(quotient: Tensor) -> Tensor:
    return quotient.clamp(-_MAX, _MAX).to(_E4M3)
