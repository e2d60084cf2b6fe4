"""The conformance kit: proof that a scheme works wherever hijack does.

The author of a scheme says what is to be tested, the kit supplies every assertion::

    class TestInt8Rowwise(hijack.testing.SchemeConformance):
        min_sqnr_db = 30.0

        @pytest.fixture
        def scheme(self):
            return Int8Rowwise()

Only the test on random weights needs hypothesis; it is skipped where that is missing.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors.torch
import torch
from torch import Tensor, nn

import hijack
from hijack.errors import ModuleError, NonFiniteError
from hijack.registry import default_registry
from hijack.scheme import Scheme

if TYPE_CHECKING:
    from hypothesis.strategies import SearchStrategy

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
Subject = tuple[nn.Module, Tensor]


# -- subjects and measures ---------------------------------------------------------------


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
    return torch.randn(*shape, generator=torch.Generator().manual_seed(7))


#: Module type to the subjects it is tested with.
_SUBJECTS: Mapping[type[nn.Module], Sequence[Callable[[], Subject]]] = {
    nn.Linear: (
        lambda: (nn.Linear(96, 40), _floats(3, 96)),
        lambda: (nn.Linear(96, 40, bias=False), _floats(2, 3, 96)),
    ),
    nn.Conv1d: (
        lambda: (nn.Conv1d(8, 12, 3, padding=1, stride=2), _floats(2, 8, 9)),
    ),
    nn.Conv2d: (lambda: (nn.Conv2d(8, 12, 3, padding=1), _floats(2, 8, 5, 5)),),
    nn.Conv3d: (lambda: (nn.Conv3d(4, 6, 2, padding=1), _floats(1, 4, 3, 3, 3)),),
    nn.ConvTranspose2d: (
        lambda: (nn.ConvTranspose2d(8, 12, 3), _floats(2, 8, 5, 5)),
    ),
    nn.Embedding: (
        lambda: (nn.Embedding(50, 32), torch.tensor([[0, 49, 7], [7, 1, 2]])),
    ),
}


class _Parent(nn.Module):
    """Holds the module under test, as models do."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        """Call the inner module between two other operations."""
        result: Tensor = torch.tanh(self.inner(x)) * 2
        return result


class _Foreign(nn.Module):
    """A module with a weight that no scheme has heard of."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(realistic_weight((32, 64)))


# -- the kit -----------------------------------------------------------------------------


class SchemeConformance:
    """Subclass it, name the subclass ``Test…``, give ``scheme`` and ``min_sqnr_db``.

    ``scheme`` is a pytest fixture. Everything else is an attribute with a default.

    Attributes:
        min_sqnr_db: floor of the round trip, for a normal weight and one with outliers.
        options: options of ``scheme.quantize`` to test with.
        weight_shape: shape of the weights used where the shape does not matter.
        odd_shapes: shapes that must work as well.
        block_size: (rows, cols) that share parameters, -1 for the whole dimension; None
            if one value may influence codes anywhere.
        min_idempotence_db: how well a second round trip reproduces the first.
        min_forward_db: how well a module's output agrees with its dequantized twin's.
        magnitudes: least and largest typical value of a weight.
        compile_backend: backend of ``torch.compile``.
        device: where everything runs.
    """

    min_sqnr_db: float
    options: Mapping[str, Any] = {}
    weight_shape: tuple[int, ...] = (48, 128)
    odd_shapes: Sequence[tuple[int, ...]] = (
        (1, 1),
        (1, 64),
        (64, 1),
        (13, 7),
        (31, 127),
        (130, 129),
    )
    block_size: tuple[int, int] | None = None
    min_idempotence_db: float = 100.0
    min_forward_db: float = 80.0
    magnitudes: tuple[float, float] = (1e-4, 1e4)
    compile_backend: str = "aot_eager"
    device: str = "cpu"

    def subjects(self, scheme: Scheme) -> list[Subject]:
        """Dense modules of the scheme's targets, each with an input.

        Override it for targets the kit does not know.
        """
        makers = [make for t in scheme.targets for make in _SUBJECTS.get(t, ())]
        _expect(
            bool(makers),
            f"{scheme.name}: the kit knows no subject of type "
            f"{', '.join(t.__name__ for t in scheme.targets)}; override subjects()",
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            made = [make() for make in makers]
        return [(m.to(self.device), x.to(self.device)) for m, x in made]

    # -- tensors -------------------------------------------------------------------------

    def test_round_trip_keeps_the_floor(self, scheme: Scheme) -> None:
        """A dequantized weight is as close to the dense one as the author promises."""
        for outliers in (False, True):
            weight = self._weight(outliers=outliers)
            got = sqnr_db(weight, self._round_trip(scheme, weight.clone()))
            _expect(
                got >= self.min_sqnr_db,
                f"{scheme.name}: round trip of a weight with outliers={outliers}: got "
                f"{got:.1f} dB, expected at least {self.min_sqnr_db}",
            )

    def test_second_round_trip_changes_nothing(self, scheme: Scheme) -> None:
        """Quantizing a dequantized weight gives the same weight again."""
        once = self._round_trip(scheme, self._weight(outliers=True))
        got = sqnr_db(once, self._round_trip(scheme, once.clone()))
        _expect(
            got >= self.min_idempotence_db,
            f"{scheme.name}: second round trip: got {got:.1f} dB, expected at least "
            f"{self.min_idempotence_db}",
        )

    def test_dtypes_are_those_asked_for(self, scheme: Scheme) -> None:
        """Weights of 16 and 32 bits decode to any of these, in place and shape."""
        for source in DTYPES:
            weight = self._weight(dtype=source)
            exact = self._round_trip(scheme, weight)
            for dtype in DTYPES:
                dense = self._round_trip(scheme, weight, dtype)
                got = (dense.dtype, dense.shape, dense.device)
                expected = (dtype, weight.shape, weight.device)
                _expect(
                    got == expected,
                    f"{scheme.name}: dequantize of a {source} weight to {dtype}: got "
                    f"{got}, expected {expected}",
                )
                _expect(
                    sqnr_db(exact, dense) >= 40,
                    f"{scheme.name}: dequantize to {dtype} differs from float32 by more "
                    "than rounding",
                )

    def test_odd_shapes(self, scheme: Scheme) -> None:
        """Rows, columns, single values and prime sizes come back in shape."""
        for shape in self.odd_shapes:
            weight = self._weight(shape)
            dense = self._round_trip(scheme, weight)
            _expect(
                dense.shape == weight.shape,
                f"{scheme.name}: round trip: got {tuple(dense.shape)}, expected {shape}",
            )
            _expect(
                _never_worse_than_zero(weight, dense),
                f"{scheme.name}: round trip of {shape}: error exceeds the weight itself",
            )

    def test_strided_weight(self, scheme: Scheme) -> None:
        """A view that is not contiguous quantizes like its contiguous copy."""
        view = self._weight((80, 56)).t()
        same = _equal(self._quantize(scheme, view), self._quantize(scheme, view.clone()))
        _expect(same, f"{scheme.name}: quantize of a transposed view: got other codes")

    def test_zeros_stay_zero(self, scheme: Scheme) -> None:
        """Zero rows and a weight of zeros come back as zeros."""
        weight = self._weight()
        weight[::3] = 0
        dense = self._round_trip(scheme, weight)
        _expect(
            not bool(dense[::3].any()), f"{scheme.name}: zero rows: got other values"
        )
        dense = self._round_trip(scheme, torch.zeros_like(weight))
        _expect(not bool(dense.any()), f"{scheme.name}: zeros: got other values")

    def test_random_weights(self, scheme: Scheme) -> None:
        """Whatever the shape and magnitude, no error exceeds the largest value."""
        import pytest

        hypothesis = pytest.importorskip("hypothesis")

        @hypothesis.settings(max_examples=50, deadline=None, database=None)
        @hypothesis.given(weights(magnitudes=self.magnitudes))
        def check(weight: Tensor) -> None:
            weight = weight.to(self.device)
            _expect(
                _never_worse_than_zero(weight, self._round_trip(scheme, weight)),
                f"{scheme.name}: round trip of {tuple(weight.shape)} with largest value "
                f"{float(weight.abs().max()):.3g}: error exceeds the weight itself",
            )

        check()

    def test_blocks_are_independent(self, scheme: Scheme) -> None:
        """A changed value changes nothing outside its block; asked if declared."""
        if self.block_size is None:
            return
        weight = self._weight()
        sizes = (weight.shape[0], weight[0].numel())
        rows, cols = (
            whole if b == -1 else b for b, whole in zip(self.block_size, sizes, strict=True)
        )
        changed = weight.clone()
        changed.view(sizes)[0, 0] = 10.0
        before = self._round_trip(scheme, weight).view(sizes)
        after = self._round_trip(scheme, changed).view(sizes)
        _expect(
            torch.equal(before[rows:], after[rows:])
            and torch.equal(before[:, cols:], after[:, cols:]),
            f"{scheme.name}: changing one value: got changes outside its block of "
            f"{(rows, cols)}",
        )

    def test_arguments_are_left_alone(self, scheme: Scheme) -> None:
        """Neither quantize nor dequantize writes to its arguments."""
        weight = self._weight()
        kept = weight.clone()
        made = self._quantize(scheme, weight)
        _expect(
            torch.equal(weight, kept), f"{scheme.name}: quantize changed the weight"
        )
        copied = copy.deepcopy(made)
        scheme.dequantize(*made, torch.float32)
        _expect(_equal(made, copied), f"{scheme.name}: dequantize changed its arguments")

    def test_same_weight_same_codes(self, scheme: Scheme) -> None:
        """Quantizing one weight twice gives equal tensors."""
        first, second = (self._quantize(scheme, self._weight()) for _ in range(2))
        _expect(_equal(first, second), f"{scheme.name}: quantize twice: got other codes")

    def test_tensors_can_be_kept(self, scheme: Scheme) -> None:
        """Codes and parameters are plain, contiguous tensors that own their memory."""
        qdata, params = self._quantize(scheme, self._weight())
        for name, tensor in {"weight": qdata, **params}.items():
            where = f"{scheme.name}: {name}"
            _expect(type(tensor) is Tensor, f"{where}: got {type(tensor).__name__}")
            _expect(tensor.is_contiguous(), f"{where}: is not contiguous")
            _expect(str(tensor.device) == self.device, f"{where}: is on {tensor.device}")
        places = [t.data_ptr() for t in (qdata, *params.values()) if t.numel()]
        _expect(len(set(places)) == len(places), f"{scheme.name}: tensors share memory")

    def test_shapes_are_known_beforehand(self, scheme: Scheme) -> None:
        """create_params gives what quantize gives, on meta as on a device."""
        for shape in (self.weight_shape, *self.odd_shapes):
            expected = _described(self._quantize(scheme, self._weight(shape)))
            for device in ("meta", self.device):
                made = scheme.create_params(
                    shape, torch.float32, device, **self.options
                )
                _expect(
                    _described(made) == expected,
                    f"{scheme.name}: create_params of {shape} on {device}: got "
                    f"{_described(made)}, expected {expected}",
                )
