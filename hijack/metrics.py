"""How far two weights are apart."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import Tensor

#: Elements looked at at a time.
_PART = 1 << 20


@dataclasses.dataclass(frozen=True)
class Loss:
    """The error of a weight against a reference.

    Attributes:
        rmse: root of the mean squared error, in the weight's units.
        sqnr: energy of the reference over that of the error, in dB; inf if they are
            equal, -inf if only the reference is zero.
        largest: largest absolute error.
        numel: number of elements.
    """

    rmse: float
    sqnr: float
    largest: float
    numel: int


def measure(reference: Tensor, other: Tensor) -> Loss:
    """The error of one weight against another of the same shape.

    Sums are formed in float64, in parts, so that little memory is used besides. NaN or
    infinite errors make all three numbers NaN.

    Args:
        reference: (...) floating point.
        other: of the same shape.
    """
    signal = noise = largest = 0.0
    parts = zip(
        torch.split(reference.reshape(-1), _PART),
        torch.split(other.reshape(-1), _PART),
        strict=True,
    )
    for one, two in parts:
        wide = one.double()
        error = two.double() - wide
        signal += float(wide.square().sum())
        noise += float(error.square().sum())
        most = float(error.abs().max()) if error.numel() else 0.0
        largest = most if most > largest or math.isnan(most) else largest
    count = reference.numel()
    if not math.isfinite(noise):
        return Loss(math.nan, math.nan, math.nan, count)
    return Loss(
        math.sqrt(noise / max(count, 1)), _decibel(signal, noise), largest, count
    )


def _decibel(signal: float, noise: float) -> float:
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal else -math.inf
