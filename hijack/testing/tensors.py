"""The part of the conformance kit that tests a scheme's tensors, without any module."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hijack.layers import Quantized
from hijack.scheme import Scheme
from hijack.testing.subjects import realistic_weight, sqnr_db, weights

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class TensorConformance:
    """Tests of ``quantize``, ``dequantize`` and ``create_params``.

    Attributes:
        min_sqnr_db: floor of the round trip, for a normal weight and one with outliers.
        options: options of ``scheme.quantize`` to test with.
        weight_shape: shape of the weights used where the shape does not matter.
        odd_shapes: shapes that must work as well.
        block_size: (rows, cols) that share parameters, -1 for the whole dimension; None
            if one value may influence codes anywhere.
        min_idempotence_db: how well a second round trip reproduces the first.
        magnitudes: least and largest typical value of a weight.
        max_examples: number of random weights tried.
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
    magnitudes: tuple[float, float] = (1e-4, 1e4)
    max_examples: int = 50
    device: str = "cpu"

    def test_round_trip_keeps_the_floor(self, scheme: Scheme) -> None:
        """A dequantized weight is as close to the dense one as the author promises."""
        for outliers in (False, True):
            weight = self._weight(outliers=outliers)
            got = sqnr_db(weight, self._round_trip(scheme, weight))
            expect(
                got >= self.min_sqnr_db,
                f"{scheme.name}: round trip of a weight with outliers={outliers}: got "
                f"{got:.1f} dB, expected at least {self.min_sqnr_db}",
            )

    def test_second_round_trip_changes_nothing(self, scheme: Scheme) -> None:
        """Quantizing a dequantized weight gives the same weight again."""
        once = self._round_trip(scheme, self._weight(outliers=True))
        got = sqnr_db(once, self._round_trip(scheme, once))
        expect(
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
                expect(
                    got == expected,
                    f"{scheme.name}: dequantize of a {source} weight to {dtype}: got "
                    f"{got}, expected {expected}",
                )
                expect(
                    sqnr_db(exact, dense) >= 40,
                    f"{scheme.name}: dequantize to {dtype} differs from float32 by "
                    "more than rounding",
                )

    def test_odd_shapes(self, scheme: Scheme) -> None:
        """Rows, columns, single values and prime sizes come back in shape."""
        for shape in self.odd_shapes:
            weight = self._weight(shape)
            dense = self._round_trip(scheme, weight)
            expect(
                dense.shape == weight.shape,
                f"{scheme.name}: round trip of {shape}: got {tuple(dense.shape)}",
            )
            expect(
                _never_worse_than_zero(weight, dense),
                f"{scheme.name}: round trip of {shape}: error exceeds the weight",
            )

    def test_strided_weight(self, scheme: Scheme) -> None:
        """A view that is not contiguous quantizes like its contiguous copy."""
        view = self._weight((80, 56)).t()
        expected = self._round_trip(scheme, view.contiguous())
        expect(
            # sums over strided rows round differently, so the codes may differ a little
            sqnr_db(expected, self._round_trip(scheme, view)) >= 30,
            f"{scheme.name}: quantize of a transposed view: got other codes",
        )

    def test_zeros_stay_zero(self, scheme: Scheme) -> None:
        """Zero rows and a weight of zeros come back as zeros."""
        weight = self._weight()
        weight[::3] = 0
        dense = self._round_trip(scheme, weight)
        expect(
            not bool(dense[::3].any()), f"{scheme.name}: zero rows: got other values"
        )
        dense = self._round_trip(scheme, torch.zeros_like(weight))
        expect(not bool(dense.any()), f"{scheme.name}: zeros: got other values")

    def test_random_weights(self, scheme: Scheme) -> None:
        """Whatever the shape and magnitude, no error exceeds the largest value."""
        import pytest

        hypothesis: Any = pytest.importorskip("hypothesis")
        settings = hypothesis.settings(
            max_examples=self.max_examples,
            deadline=None,
            database=None,
            derandomize=True,
        )
        given = hypothesis.given(weights(magnitudes=self.magnitudes))

        def check(weight: Tensor) -> None:
            weight = weight.to(self.device)
            expect(
                _never_worse_than_zero(weight, self._round_trip(scheme, weight)),
                f"{scheme.name}: round trip of {tuple(weight.shape)} up to "
                f"{float(weight.abs().max()):.3g}: error exceeds the weight",
            )

        settings(given(check))()

    def test_blocks_are_independent(self, scheme: Scheme) -> None:
        """A changed value changes nothing outside its block; asked if declared."""
        if self.block_size is None:
            return
        weight = self._weight()
        sizes = (weight.shape[0], weight[0].numel())
        rows, cols = (
            whole if size == -1 else size
            for size, whole in zip(self.block_size, sizes, strict=True)
        )
        changed = weight.clone()
        changed.view(sizes)[0, 0] = 10.0
        before = self._round_trip(scheme, weight).view(sizes)
        after = self._round_trip(scheme, changed).view(sizes)
        expect(
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
        expect(torch.equal(weight, kept), f"{scheme.name}: quantize changed the weight")
        copied = copy.deepcopy(made)
        scheme.dequantize(*made, torch.float32)
        expect(equal(made, copied), f"{scheme.name}: dequantize changed its arguments")

    def test_same_weight_same_codes(self, scheme: Scheme) -> None:
        """Quantizing one weight twice gives equal tensors."""
        first, second = (self._quantize(scheme, self._weight()) for _ in range(2))
        expect(equal(first, second), f"{scheme.name}: quantize twice: got other codes")

    def test_tensors_can_be_kept(self, scheme: Scheme) -> None:
        """Codes and parameters are plain, contiguous tensors that own their memory."""
        qdata, params = self._quantize(scheme, self._weight())
        for name, tensor in {"weight": qdata, **params}.items():
            where = f"{scheme.name}: {name}"
            expect(type(tensor) is Tensor, f"{where}: got {type(tensor).__name__}")
            expect(tensor.is_contiguous(), f"{where}: is not contiguous")
        places = [t.data_ptr() for t in (qdata, *params.values()) if t.numel()]
        expect(len(set(places)) == len(places), f"{scheme.name}: tensors share memory")

    def test_shapes_are_known_beforehand(self, scheme: Scheme) -> None:
        """create_params gives what quantize gives, on meta as on a device."""
        for shape in (self.weight_shape, *self.odd_shapes):
            expected = describe(self._quantize(scheme, self._weight(shape)))
            for device in ("meta", self.device):
                made = scheme.create_params(
                    shape, torch.float32, device, **self.options
                )
                expect(
                    describe(made) == expected,
                    f"{scheme.name}: create_params of {shape} on {device}: got "
                    f"{describe(made)}, expected {expected}",
                )

    # -- details -----------------------------------------------------------------------

    def _weight(
        self,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        outliers: bool = False,
    ) -> Tensor:
        return realistic_weight(
            self.weight_shape if shape is None else shape,
            outliers=outliers,
            dtype=dtype,
            device=self.device,
        )

    def _quantize(self, scheme: Scheme, weight: Tensor) -> Quantized:
        with torch.no_grad():
            return scheme.quantize(weight, **self.options)

    def _round_trip(
        self, scheme: Scheme, weight: Tensor, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        qdata, params = self._quantize(scheme, weight.clone())
        with torch.no_grad():
            return scheme.dequantize(qdata, params, dtype)


def expect(condition: bool, message: str) -> None:
    """Fail the test with a message; works where pytest does not rewrite assertions."""
    __tracebackhide__ = True
    if not condition:
        raise AssertionError(message)


def equal(first: Quantized, second: Quantized) -> bool:
    """Whether quantized tensors agree in names, dtypes, shapes and every bit."""
    if describe(first) != describe(second):
        return False
    pairs = zip(_tensors(first), _tensors(second), strict=True)
    return all(torch.equal(_bits(a), _bits(b)) for a, b in pairs)


def describe(made: Quantized) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes of quantized tensors."""
    qdata, params = made
    named = {"weight": qdata, **params}
    return {name: (t.dtype, tuple(t.shape)) for name, t in sorted(named.items())}


def _tensors(made: Quantized) -> list[Tensor]:
    return [made[0], *(made[1][name] for name in sorted(made[1]))]


def _bits(tensor: Tensor) -> Tensor:
    # torch compares neither NaN nor every FP8 dtype
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def _never_worse_than_zero(weight: Tensor, dense: Tensor) -> bool:
    return (
        bool(torch.isfinite(dense).all())
        and weight.shape == dense.shape
        and float((weight - dense).abs().max()) <= float(weight.abs().max())
    )
