"""What all parts of the conformance kit share: the author's attributes, and weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hijack.errors import HijackError
from hijack.metrics import sqnr_db
from hijack.options import Option
from hijack.quantized import QuantizationConfig, QuantizedTensor
from hijack.scheme import Quantized, Scheme
from hijack.testing.checks import equal, expect
from hijack.testing.subjects import realistic_weight

Shape = tuple[int, ...]

#: One row, one column, single values, prime sizes, and one more or less than the usual
#: sizes of blocks.
ODD_SHAPES: Sequence[Shape] = (
    (1, 1),
    (1, 64),
    (64, 1),
    (13, 7),
    (31, 127),
    (130, 129),
    (17, 33),
    (40, 95),
    (100, 300),
)


class Conformance:
    """What the author of a scheme says of it.

    Attributes:
        min_sqnr_db: floor of the round trip, for a normal weight and one with outliers.
        options: options of ``scheme.quantize`` to test with.
        option_sets: other options to test with, beside those that the kit makes up from
            the scheme's declared options.
        weight_shape: shape of the weights used where the shape does not matter.
        odd_shapes: shapes that must work as well, unless the scheme declines them.
            Those of one more and one less than a block are added unless this is set.
        block_size: (rows, cols) that share parameters, -1 for the whole dimension; None
            if one value may influence codes anywhere.
        min_idempotence_db: how well a second round trip reproduces the first.
        magnitudes: least and largest typical value of a weight.
        max_examples: number of random weights tried.
        device: where everything runs.
        min_forward_db: how well a module's output agrees with that of a module with the
            dequantized weight. A forward that quantizes its input needs less.
        compile_backend: backend of ``torch.compile`` for every module type. Inductor is
            tried besides, on one model.
        inductor: whether to try Inductor, which needs a C++ compiler.
        dialect: dialect of the files written; None for every dialect that is written.
        quick: whether to leave out what takes more than a second each: Inductor for
            every module type, and all but the first two values of an option.
    """

    min_sqnr_db: float
    options: Mapping[str, Any] = {}
    option_sets: Sequence[Mapping[str, Any]] = ()
    weight_shape: Shape = (48, 128)
    odd_shapes: Sequence[Shape] = ODD_SHAPES
    block_size: tuple[int, int] | None = None
    min_idempotence_db: float = 100.0
    magnitudes: tuple[float, float] = (1e-4, 1e4)
    max_examples: int = 50
    device: str = "cpu"
    min_forward_db: float = 80.0
    compile_backend: str = "aot_eager"
    inductor: bool = True
    dialect: str | None = None
    quick: bool = True

    # -- weights -----------------------------------------------------------------------

    def _weight(
        self,
        shape: Sequence[int] | None = None,
        dtype: torch.dtype = torch.float32,
        outliers: bool = False,
        seed: int = 0,
    ) -> Tensor:
        return realistic_weight(
            self.weight_shape if shape is None else shape,
            outliers=outliers,
            dtype=dtype,
            device=self.device,
            seed=seed,
        )

    def _quantize(self, scheme: Scheme, weight: Tensor, **options: Any) -> Quantized:
        with torch.no_grad():
            return scheme.quantize(weight, **{**self.options, **options})

    def _as_weight(
        self, scheme: Scheme, made: Quantized, like: Tensor, **options: Any
    ) -> QuantizedTensor:
        config = QuantizationConfig.of(scheme, {**self.options, **options})
        return QuantizedTensor(*made, config, tuple(like.shape), like.dtype)

    def _decode(
        self,
        scheme: Scheme,
        made: Quantized,
        like: Tensor,
        dtype: torch.dtype = torch.float32,
        **options: Any,
    ) -> Tensor:
        """The dense weight, as modules get it."""
        with torch.no_grad():
            return self._as_weight(scheme, made, like, **options).dense(dtype)

    def _round_trip(
        self, scheme: Scheme, weight: Tensor, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        made = self._quantize(scheme, weight.clone())
        return self._decode(scheme, made, weight, dtype)

    # -- shapes ------------------------------------------------------------------------

    def _shapes(self, scheme: Scheme) -> list[Shape]:
        """The shapes to try, the usual one first, without those the scheme declines."""
        shapes = [self.weight_shape, *self.odd_shapes]
        if self.odd_shapes is ODD_SHAPES:
            shapes += self._shapes_around_a_block(scheme)
        return [s for s in dict.fromkeys(shapes) if self._takes(scheme, s)]

    def _takes(self, scheme: Scheme, shape: Shape) -> bool:
        return scheme.declines(tuple(shape), **self.options) is None

    def _shapes_around_a_block(self, scheme: Scheme) -> Iterator[Shape]:
        size = self.block_size
        if size is None:
            made = self._quantize(scheme, self._weight())
            size = scheme.block_size(*made)
        if size is None or max(size) > 512:
            return
        n, k = self.weight_shape[0], self.weight_shape[1]
        rows = size[0] if 0 < size[0] < n or size[0] == -1 else n
        cols = size[1] if 0 < size[1] < k or size[1] == -1 else k
        heights = [40] if rows in (-1, 1) else [rows - 1, rows + 1]
        widths = [40] if cols in (-1, 1) else [cols - 1, cols + 1, 2 * cols + 1]
        yield from ((height, width) for height in heights for width in widths)

    def _ragged_shape(self, scheme: Scheme) -> Shape:
        """The widest shape that is likely to have short blocks."""
        return max(self._shapes(scheme), key=lambda shape: (shape[-1], shape))

    # -- options -----------------------------------------------------------------------

    def _option_sets(self, scheme: Scheme) -> list[dict[str, Any]]:
        """Options to test with: those given, and others that change what is made."""
        usual = self._quantize(scheme, self._weight())
        found = [dict(options) for options in ({}, *self.option_sets)]
        for option in scheme.declared_options():
            values = [v for v in _values(option) if self._changes(scheme, option, v)]
            made: list[Quantized] = [usual]
            for value in values:
                new = self._quantize(scheme, self._weight(), **{option.name: value})
                if not any(equal(new, old) for old in made):
                    made.append(new)
                    found.append({option.name: value})
                if self.quick and len(made) > 2:
                    break
        return found

    def _changes(self, scheme: Scheme, option: Option, value: Any) -> bool:
        """Whether a value is one that the scheme takes, and repeats itself with."""
        options = {option.name: value}
        try:
            option.check(value)
            weight = self._weight()
            first, second = (
                self._quantize(scheme, weight, **options) for _ in range(2)
            )
            dense = self._decode(scheme, first, weight, **options)
        except (HijackError, ValueError, TypeError, RuntimeError, LookupError):
            return False
        # the kit may have made up a value that makes no sense
        bounded = (option.minimum, option.maximum) != (None, None) or option.choices
        sensible = bool(bounded) or sqnr_db(weight, dense) >= 1
        return sensible and equal(first, second)

    def _expect_floor(
        self, weight: Tensor, dense: Tensor, where: str, floor: float | None = None
    ) -> None:
        """Hold the error of a whole weight, of each row and of each column to a floor.

        What counts is the error against the larger of the part's own values and those
        of the whole weight, so that small rows may be as bad as large ones make them.
        """
        __tracebackhide__ = True
        floor = self.min_sqnr_db if floor is None else floor
        wide, got = weight.double().flatten(1), dense.double()
        same = dense.shape == weight.shape and bool(torch.isfinite(got).all())
        expect(same, f"{where}: got {_told(dense)}, expected {_told(weight)}, finite")
        noise, power = (got.flatten(1) - wide).square(), wide.square()
        allowed = 10 ** (-(floor - min(7.0, 0.4 * floor)) / 10)
        for dim, part in ((1, "row"), (0, "column")):
            if noise.shape[dim] < 16:
                continue
            loudest = power.mean(dim).clamp_min(float(power.mean()))
            bad = (noise.mean(dim) > allowed * loudest).nonzero().flatten().tolist()
            expect(
                not bad,
                f"{where}: got errors in {part} {bad[:8]} of {wide.shape[1 - dim]} "
                f"that are beyond {floor:g} dB, expected that everywhere",
            )


def _told(tensor: Tensor) -> str:
    return f"{tensor.dtype} {tuple(tensor.shape)}"


def _values(option: Option) -> list[Any]:
    """Values other than the default that an option may have."""
    default = option.default
    values: list[Any] = list(option.choices)
    if option.type == "block_size":
        values += [(1, 32), (16, 16), 32, "row", "tensor"]
    elif option.type == "bool" or isinstance(default, bool):
        values += [not default]
    elif isinstance(default, int):
        values += [default * 2, default // 2, default + 1, default - 1]
    elif isinstance(default, float):
        values += [default * 0.9, default * 1.1, default / 2, default * 2]
    elif option.type == "dtype":
        values += [torch.float16, torch.float32, torch.float8_e5m2]
    elif option.type in ("int", "float"):
        bounds = (option.minimum, option.maximum, 8)
        values += [v if v is None else int(v) for v in bounds]
    return [value for value in values if value is not None and value != default]
