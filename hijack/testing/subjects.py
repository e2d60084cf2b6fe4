"""What the conformance kit tests with: weights, modules, and a measure of error."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

Subject = tuple[nn.Module, Tensor]


def sqnr_db(reference: Tensor, actual: Tensor) -> float:
    """Signal to quantization noise ratio.

    Args:
        reference: the exact tensor, of any shape and dtype.
        actual: the approximation, of the same shape.

    Returns:
        Decibels; inf if both are equal, -inf if shapes differ or ``actual`` is not
        finite.
    """
    if reference.shape != actual.shape or not bool(torch.isfinite(actual).all()):
        return -math.inf
    signal = reference.detach().double()
    noise = float((signal - actual.detach().double()).square().sum())
    if noise == 0:
        return math.inf
    power = float(signal.square().sum())
    return 10 * math.log10(power / noise) if power else -math.inf


def realistic_weight(
    shape: Sequence[int],
    *,
    outliers: bool = False,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    seed: int = 0,
) -> Tensor:
    """A weight as training leaves them: normal, rows of different size, a few outliers.

    Args:
        shape: shape of the weight.
        outliers: whether one value in 500 is 8 times as large.
        dtype: dtype of the result.
        device: device of the result.
        seed: of the random numbers.
    """
    random = torch.Generator().manual_seed(seed)
    with torch.device("cpu"):  # where the generator is, whatever is the default
        weight = torch.randn(*shape, generator=random)
        rows = torch.randn(shape[0], generator=random).mul(0.3).exp()
        weight *= 0.02 * rows.view(-1, *[1] * (len(shape) - 1))
        if outliers:
            weight[torch.rand(*shape, generator=random) < 0.002] *= 8
    return weight.to(device, dtype)


def weight_shapes(max_size: int = 80) -> SearchStrategy[tuple[int, int]]:
    """Hypothesis strategy: (N, K), ragged ones among them."""
    from hypothesis import strategies as st

    return st.tuples(st.integers(1, max_size), st.integers(1, max_size))


def weights(
    max_size: int = 80, magnitudes: tuple[float, float] = (1e-4, 1e4)
) -> SearchStrategy[Tensor]:
    """Hypothesis strategy: finite float32 weights of any shape and magnitude.

    Args:
        max_size: the largest N or K.
        magnitudes: how large the typical value may be, (least, most).
    """
    from hypothesis import strategies as st

    def make(
        shape: tuple[int, int], exponent: float, outliers: bool, seed: int
    ) -> Tensor:
        weight = realistic_weight(shape, outliers=outliers, seed=seed)
        return weight * (50 * 10**exponent)

    least, most = (math.log10(magnitude) for magnitude in magnitudes)
    return st.builds(
        make,
        weight_shapes(max_size),
        st.floats(least, most),
        st.booleans(),
        st.integers(0, 2**16),
    )


def _floats(*shape: int) -> Tensor:
    random = torch.Generator().manual_seed(7)
    return torch.randn(*shape, generator=random, device="cpu")


#: Module type to the subjects it is tested with.
SUBJECTS: Mapping[type[nn.Module], Sequence[Callable[[], Subject]]] = {
    nn.Linear: (
        lambda: (nn.Linear(96, 40), _floats(3, 96)),
        lambda: (nn.Linear(96, 40, bias=False), _floats(2, 3, 96)),
    ),
    nn.Conv1d: (lambda: (nn.Conv1d(8, 12, 3, padding=1, stride=2), _floats(2, 8, 9)),),
    nn.Conv2d: (lambda: (nn.Conv2d(8, 12, 3, padding=1), _floats(2, 8, 5, 5)),),
    nn.Conv3d: (lambda: (nn.Conv3d(4, 6, 2, padding=1), _floats(1, 4, 3, 3, 3)),),
    nn.ConvTranspose2d: (lambda: (nn.ConvTranspose2d(8, 12, 3), _floats(2, 8, 5, 5)),),
    nn.Embedding: (
        lambda: (nn.Embedding(50, 32), torch.tensor([[0, 49, 7], [7, 1, 2]])),
    ),
}


class Parent(nn.Module):
    """Holds the module under test, as models do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Call the inner module between two other operations."""
        result: Tensor = torch.tanh(self.inner(x)) * 2
        return result


class Foreign(nn.Module):
    """A module with a weight that no scheme has heard of."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(realistic_weight((32, 64)))
