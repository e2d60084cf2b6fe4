"""How far two weights are apart."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

#: Elements looked at at a time.
_PART = 1 << 20


@dataclasses.dataclass(frozen=True)
class QuantizationError:
    """The error of a weight against a reference; a result, not an exception.

    Attributes:
        rmse: root of the mean squared error, in the weight's units.
        sqnr: energy of the reference over that of the error, in dB; inf if they are
            equal, -inf if only the reference is zero.
        max_abs_error: largest absolute error.
        numel: number of elements.
    """

    rmse: float
    sqnr: float
    max_abs_error: float
    numel: int


def quantization_error(reference: Tensor, other: Tensor) -> QuantizationError:
    """The error of one weight against another of the same shape.

    Sums are formed in float64, in parts, so that little memory is used besides. NaN or
    infinite errors make all three numbers NaN.

    Args:
        reference: (...) floating point.
        other: of the same shape.
    """
    signal = noise = largest = 0.0
    parts = zip(
        torch.split(reference.detach().reshape(-1), _PART),
        torch.split(other.detach().reshape(-1), _PART),
        strict=True,
    )
    for exact, approximate in parts:
        wide = exact.double()
        error = approximate.double() - wide
        signal += float(wide.square().sum())
        noise += float(error.square().sum())
        if error.numel():
            largest = max(largest, float(error.abs().max()))
    count = reference.numel()
    if not math.isfinite(noise):
        return QuantizationError(math.nan, math.nan, math.nan, count)
    rmse = math.sqrt(noise / max(count, 1))
    return QuantizationError(rmse, _decibels(signal, noise), largest, count)


def sqnr_db(reference: Tensor, actual: Tensor) -> float:
    """Signal to quantization noise ratio.

    Args:
        reference: the exact tensor, of any shape and dtype.
        actual: the approximation, of the same shape.

    Returns:
        Decibels; inf if both are equal, -inf if shapes differ or ``actual`` is not
        finite.
    """
    if reference.shape != actual.shape:
        return -math.inf
    ratio = quantization_error(reference, actual).sqnr
    return -math.inf if math.isnan(ratio) else ratio


def _decibels(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
