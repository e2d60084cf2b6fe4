"""What the conformance kit tests with: weights, modules, and their inputs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

Subject = tuple[nn.Module, Tensor]


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


class OwnForward(nn.Linear):
    """A subclass that does more than its base, as models have them."""

    def forward(self, input: Tensor) -> Tensor:
        """Scale the input and shift the result."""
        return super().forward(2 * input) + 1


class Renamed(nn.Linear):
    """A subclass that does nothing of its own."""


class OwnConv(nn.Conv2d):
    """A subclass that reads its own weight."""

    def forward(self, input: Tensor) -> Tensor:
        """Standardise the weight first."""
        weight = self.weight - self.weight.mean()
        result: Tensor = self._conv_forward(input, weight, self.bias)
        return result


#: Module type to the subjects it is tested with.
SUBJECTS: Mapping[type[nn.Module], Sequence[Callable[[], Subject]]] = {
    nn.Linear: (
        lambda: (nn.Linear(96, 40), _floats(3, 96)),
        lambda: (nn.Linear(96, 40, bias=False), _floats(2, 3, 96)),
    ),
    nn.Conv1d: (lambda: (nn.Conv1d(8, 12, 3, padding=1, stride=2), _floats(2, 8, 9)),),
    nn.Conv2d: (lambda: (nn.Conv2d(8, 12, 3, padding=1), _floats(2, 8, 5, 5)),),
    nn.Conv3d: (lambda: (nn.Conv3d(4, 6, 2, padding=1), _floats(1, 4, 3, 3, 3)),),
    nn.ConvTranspose1d: (lambda: (nn.ConvTranspose1d(8, 12, 3), _floats(2, 8, 9)),),
    nn.ConvTranspose2d: (lambda: (nn.ConvTranspose2d(8, 12, 3), _floats(2, 8, 5, 5)),),
    nn.Embedding: (
        lambda: (nn.Embedding(50, 32), torch.tensor([[0, 49, 7], [7, 1, 2]])),
    ),
}

#: More of each type, for tests that cost little.
VARIANTS: Mapping[type[nn.Module], Sequence[Callable[[], Subject]]] = {
    nn.Linear: (
        lambda: (nn.Linear(127, 33), _floats(4, 127)),
        lambda: (OwnForward(96, 40), _floats(3, 96)),
        lambda: (Renamed(96, 40), _floats(3, 96)),
    ),
    nn.Conv1d: (
        lambda: (nn.Conv1d(8, 12, 3, dilation=2, groups=4), _floats(2, 8, 9)),
        lambda: (
            nn.Conv1d(8, 12, 3, padding=2, padding_mode="circular"),
            _floats(2, 8, 9),
        ),
    ),
    nn.Conv2d: (
        lambda: (
            nn.Conv2d(8, 12, 3, padding=1, padding_mode="reflect", bias=False),
            _floats(2, 8, 5, 5),
        ),
        lambda: (
            nn.Conv2d(8, 12, (3, 1), stride=(2, 1), dilation=(1, 2), groups=2),
            _floats(2, 8, 7, 5),
        ),
        lambda: (nn.Conv2d(8, 12, 3, padding="same"), _floats(2, 8, 5, 5)),
        lambda: (OwnConv(8, 12, 3), _floats(2, 8, 5, 5)),
    ),
    nn.Conv3d: (
        lambda: (nn.Conv3d(4, 6, 2, stride=2, groups=2), _floats(1, 4, 3, 4, 5)),
    ),
    nn.ConvTranspose2d: (
        lambda: (
            nn.ConvTranspose2d(8, 12, 3, stride=2, output_padding=1, groups=4),
            _floats(2, 8, 5, 5),
        ),
    ),
    nn.Embedding: (
        lambda: (nn.Embedding(50, 32, padding_idx=7), torch.tensor([0, 7, 49])),
        lambda: (nn.Embedding(50, 32, max_norm=0.5), torch.tensor([0, 7, 49])),
        lambda: (nn.Embedding(50, 32, sparse=True), torch.tensor([0, 7, 49])),
        lambda: (nn.Embedding(33, 31), torch.tensor([[0], [32]])),
    ),
}


def input_variants(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """The inputs a module may meet beside a plain one, by what is peculiar in them.

    Args:
        module: one of the subjects.
        x: its plain input.
    """
    memory = torch.cat([x.flatten()[:1].expand(5), x.flatten()])
    found = {
        "with a storage offset": memory[5:].view(x.shape),
        "with a step": torch.stack([x, torch.zeros_like(x)], -1)[..., 0],
        "expanded": x[:1].expand(3, *x.shape[1:]),
        "without elements": x[:0],
    }
    if x.dim() > 1:
        found["transposed"] = x.transpose(-1, -2).contiguous().transpose(-1, -2)
    if isinstance(module, nn.Linear):
        last = x.shape[-1]
        found["a vector"] = x.reshape(-1, last)[0].clone()
        found["of 3 dimensions"] = x.reshape(1, -1, last)
        found["of 4 dimensions"] = x.reshape(-1, 1, 1, last)
        found["of 3 dimensions without elements"] = x.new_empty(2, 0, last)
        found["of many tokens"] = x.reshape(-1, last).repeat(200, 1)
    elif x.is_floating_point():
        found["unbatched"] = x[0].clone()
    else:
        found["of int32"] = x.int()
        found["a scalar"] = x.flatten()[0]
    return found


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
