"""The part of the conformance kit that tests a scheme's tensors, without any module."""

from __future__ import annotations

import copy
import gc
import inspect
import math
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hijack.metrics import sqnr_db
from hijack.scheme import Quantized, Scheme
from hijack.testing.base import Conformance, Shape
from hijack.testing.checks import (
    cloned,
    describe,
    equal,
    expect,
    never_worse_than_zero,
    same_bits,
    second_instance,
)
from hijack.testing.subjects import weights

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class TensorConformance(Conformance):
    """Tests of ``quantize``, ``dequantize``, ``create_params`` and what follows."""

    # -- how exact it is ---------------------------------------------------------------

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

    def test_every_kind_of_weight_keeps_the_floor(self, scheme: Scheme) -> None:
        """Signs, magnitudes, zeros and dtypes cost no row or column its floor."""
        usual = self._weight()
        least, most = (magnitude * 50 for magnitude in self.magnitudes)
        half, beside = usual.clone(), usual.clone()
        half[:, : half.shape[1] // 2] = 0
        beside[1::2] = 0
        kinds = {
            "negative values only": -usual.abs() - 1e-4,
            "positive values only": usual.abs() + 1e-4,
            "zero columns": half,
            "zero rows": beside,
            "small values": usual * least,
            "large values": usual * most,
            **{str(dtype): self._weight(dtype=dtype) for dtype in DTYPES[1:]},
        }
        for what, weight in kinds.items():
            where = f"{scheme.name}: round trip of {what}"
            dense = self._round_trip(scheme, weight.to(self.device), torch.float64)
            self._expect_floor(weight, dense, where)

    def test_every_block_keeps_the_floor(self, scheme: Scheme) -> None:
        """Short blocks at the edges are as exact as whole ones."""
        for shape in self._shapes(scheme):
            where = f"{scheme.name}: round trip of {shape}"
            # many small weights, so that chance does not decide
            seeds = range(max(1, 256 // math.prod(shape)))
            originals = [self._weight(shape, seed=seed) for seed in seeds]
            dense = [self._round_trip(scheme, weight) for weight in originals]
            self._expect_floor(originals[0], dense[0], where, self.min_sqnr_db * 0.5)
            if dense[0].numel() >= 512:
                self._expect_floor(originals[0], dense[0], where)
            got = sqnr_db(
                torch.cat([w.flatten() for w in originals]),
                torch.cat([d.flatten() for d in dense]),
            )
            floor = self.min_sqnr_db - min(7.0, 0.4 * self.min_sqnr_db)
            expect(
                got >= floor,
                f"{where}: got {got:.1f} dB, expected at least {floor:.1f}",
            )

    def test_extreme_values(self, scheme: Scheme) -> None:
        """Values near the ends of a dtype, or one far from all others, stay finite."""
        usual = self._weight()
        outlier, mixed = usual.clone(), usual.clone()
        outlier[3, 5] = -1000 * float(usual.std())
        mixed[::2] *= 1e-38
        half = self._weight(dtype=torch.float16)
        extremes = {
            "a single outlier": outlier,
            "values of 1e-20": usual * 1e-20,
            "subnormal values": usual * 1e-40,
            "subnormal rows beside others": mixed,
            "the largest float16": half / half.abs().max() * 6e4,
            "subnormal float16": half * 2e-5,
        }
        for what, weight in extremes.items():
            dense = self._round_trip(scheme, weight)
            expect(
                never_worse_than_zero(weight.float(), dense),
                f"{scheme.name}: round trip of {what}: got NaN or an error larger than "
                "the weight, expected neither",
            )
        dense = self._round_trip(scheme, outlier)
        got, expected = float(dense[3, 5]), float(outlier[3, 5])
        expect(
            abs(got - expected) <= 0.5 * abs(expected),
            f"{scheme.name}: round trip of a single outlier: got {got:g}, expected "
            f"{expected:g}",
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
        """Weights of every dense dtype decode to any of these, in place and shape."""
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

    def test_strided_weight(self, scheme: Scheme) -> None:
        """A view of any kind quantizes like its contiguous copy."""
        n, k = self.weight_shape[0], math.prod(self.weight_shape[1:])
        transposed = self._weight((k, n)).t()
        wide = self._weight((n + 3, 2 * k + 5))
        views = {
            "transposed": transposed,
            "with an offset": wide[3:, 5 : 5 + k],
            "with a step": wide[:n, : 2 * k : 2],
            "expanded": self._weight((1, k)).expand(n, k),
        }
        for what, view in views.items():
            expected = self._round_trip(scheme, view.contiguous())
            got = self._quantize(scheme, view)
            expect(
                # sums over strided rows round differently, so codes may differ a little
                sqnr_db(expected, self._decode(scheme, got, view)) >= 30,
                f"{scheme.name}: quantize of a view that is {what}: got other codes "
                "than of its contiguous copy",
            )

    def test_zeros_stay_zero(self, scheme: Scheme) -> None:
        """Zero rows and a weight of zeros come back as zeros."""
        weight = self._weight()
        weight[::3] = 0
        dense = self._round_trip(scheme, weight)
        expect(
            float(dense[::3].abs().max()) <= 1e-6 * float(weight.abs().max()),
            f"{scheme.name}: zero rows: got other values",
        )
        dense = self._round_trip(scheme, torch.zeros_like(weight))
        expect(
            float(dense.abs().max()) <= 1e-10,
            f"{scheme.name}: zeros: got other values",
        )

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
            if not self._takes(scheme, tuple(weight.shape)):
                return
            expect(
                never_worse_than_zero(weight, self._round_trip(scheme, weight)),
                f"{scheme.name}: round trip of {tuple(weight.shape)} up to "
                f"{float(weight.abs().max()):.3g}: error exceeds the weight",
            )

        settings(given(check))()

    # -- blocks ------------------------------------------------------------------------

    def test_blocks_are_independent(self, scheme: Scheme) -> None:
        """A changed value changes nothing outside its block; asked if declared."""
        if self.block_size is None:
            return
        for shape in (self.weight_shape, self._ragged_shape(scheme)):
            weight = self._weight(shape)
            sizes = (weight.shape[0], weight[0].numel())
            rows, cols = (
                whole if size == -1 else size
                for size, whole in zip(self.block_size, sizes, strict=True)
            )
            for i, j in ((0, 0), (sizes[0] - 1, sizes[1] - 1)):
                changed = weight.clone()
                changed.view(sizes)[i, j] = 10.0
                before = self._round_trip(scheme, weight).view(sizes)
                after = self._round_trip(scheme, changed).view(sizes)
                other = torch.ones(sizes, dtype=torch.bool, device=self.device)
                top, left = i // rows * rows, j // cols * cols
                other[top : top + rows, left : left + cols] = False
                expect(
                    torch.equal(before[other], after[other]),
                    f"{scheme.name}: changing value {(i, j)} of {sizes}: got changes "
                    f"outside its block of {(rows, cols)}",
                )

    def test_block_size_is_that_of_the_scales(self, scheme: Scheme) -> None:
        """``block_size`` says which part of the weight one scale decodes."""
        for shape in self._shapes(scheme):
            # of one magnitude, so that no code is zero
            weight = self._weight(shape).sign() * 0.02
            made = self._quantize(scheme, weight)
            size = scheme.block_size(*made)
            if size is None:
                continue
            n, k = weight.flatten(1).shape
            said = (min(size[0], n), min(size[1], k))
            found = set(self._footprints(scheme, made, weight))
            expect(
                not found or said in found,
                f"{scheme.name}: block_size of {shape}: got {size}, expected "
                f"{' or '.join(map(str, sorted(found)))}, which a scale decodes",
            )
            metas = {name: t.to("meta") for name, t in made[1].items()}
            on_meta = scheme.block_size(made[0].to("meta"), metas)
            expect(
                on_meta == size,
                f"{scheme.name}: block_size of {shape} on meta: got {on_meta}, "
                f"expected {size}",
            )

    def test_rows_are_quantized_alone(self, scheme: Scheme) -> None:
        """Rows that ``row_step`` cuts out give those of the whole weight, bit for bit.

        Tensors without elements say something of all rows, and are not compared.
        """
        for shape in self._shapes(scheme):
            weight = self._weight(shape)
            step = scheme.row_step(shape, **self.options)
            if step is None or step >= shape[0]:
                continue
            qdata, params = self._quantize(scheme, weight)
            pieces = [
                self._quantize(scheme, piece) for piece in torch.split(weight, step)
            ]
            for name, whole in {"weight": qdata, **params}.items():
                if not whole.numel():
                    continue
                parts = [{"weight": q, **p}.get(name, whole[:0]) for q, p in pieces]
                sizes = [len(part) if part.dim() else 1 for part in parts]
                expect(
                    whole.dim() > 0
                    and sum(sizes) == len(whole)
                    and all(map(same_bits, parts, torch.split(whole, sizes))),
                    f"{scheme.name}: row_step of {shape}: got another {name} of "
                    f"{step} rows at a time than of the whole weight",
                )

    def _footprints(
        self, scheme: Scheme, made: Quantized, weight: Tensor
    ) -> Iterator[tuple[int, int]]:
        """Rows and columns that the first element of each parameter decodes."""
        before = self._decode(scheme, made, weight).flatten(1)
        for name, tensor in made[1].items():
            if not tensor.numel():
                continue
            qdata, params = cloned(made)
            first = params[name].view(-1)[:1]
            if tensor.element_size() == 1:
                first.view(torch.uint8).add_(1)
            else:
                first.mul_(2).add_(1)
            after = self._decode(scheme, (qdata, params), weight).flatten(1)
            changed = (before != after).nonzero()
            if len(changed):
                rows, cols = (int(c.max() - c.min()) + 1 for c in changed.unbind(1))
                yield rows, cols

    # -- memory ------------------------------------------------------------------------

    def test_arguments_are_left_alone(self, scheme: Scheme) -> None:
        """Neither quantize nor dequantize writes to its arguments."""
        for dtype in (torch.float32, torch.bfloat16):
            weight = self._weight(dtype=dtype)
            kept = weight.clone()
            made = self._quantize(scheme, weight)
            expect(
                torch.equal(weight, kept), f"{scheme.name}: quantize changed the weight"
            )
            copied = copy.deepcopy(made)
            for wanted in (torch.float32, torch.bfloat16):
                self._decode(scheme, made, weight, wanted)
                scheme.dequantize(*made, wanted)
            expect(
                equal(made, copied),
                f"{scheme.name}: dequantize changed its arguments",
            )

    def test_results_are_their_own(self, scheme: Scheme) -> None:
        """What a call gave is changed by no other call, and changes none."""
        for dtype in (torch.float32, torch.bfloat16):
            weight = self._weight(dtype=dtype)
            made = self._quantize(scheme, weight)
            kept = cloned(made)
            weight.zero_()
            expect(
                equal(made, kept),
                f"{scheme.name}: quantize: got tensors that change with the weight, "
                "expected copies",
            )
            other = self._quantize(scheme, self._weight(dtype=dtype, seed=1))
            expect(
                equal(made, kept),
                f"{scheme.name}: quantize: got tensors that the next call changes",
            )
            dense = self._decode(scheme, made, weight, dtype)
            first = dense.clone()
            self._decode(scheme, other, weight, dtype)
            expect(
                torch.equal(dense, first),
                f"{scheme.name}: dequantize: got a weight that the next call changes",
            )
            dense.zero_()
            expect(
                torch.equal(first, self._decode(scheme, made, weight, dtype))
                and equal(made, kept),
                f"{scheme.name}: dequantize: got a weight that shares memory with its "
                "arguments or with what the scheme keeps",
            )

    def test_dequantize_sees_what_is_there(self, scheme: Scheme) -> None:
        """Tensors that were written to, or took the memory of others, decode anew."""
        weights = [self._weight(seed=seed) for seed in range(6)]
        contents = [self._quantize(scheme, weight) for weight in weights]
        expected = [
            self._decode(scheme, cloned(m), w)
            for m, w in zip(contents, weights, strict=True)
        ]
        place, memory = cloned(contents[0]), Memory(contents[0])
        for what in ("its tensors were written to", "others lay in the same memory"):
            for content, dense in zip(contents, expected, strict=True):
                if what == "its tensors were written to":
                    place[0].copy_(content[0])
                    for name, tensor in place[1].items():
                        tensor.copy_(content[1][name])
                    got = self._decode(scheme, place, weights[0])
                else:  # new tensors each time, which are gone after it
                    got = self._decode(scheme, memory.filled(content), weights[0])
                expect(
                    torch.equal(got, dense),
                    f"{scheme.name}: dequantize: got an old weight after {what}",
                )

    def test_nothing_is_kept_alive(self, scheme: Scheme) -> None:
        """Neither the dense weight nor the quantized one outlives its users."""
        weight = self._weight()
        made = self._quantize(scheme, weight)
        self._decode(scheme, made, weight)
        watched = {"the dense weight": weakref.ref(weight)}
        del weight
        gc.collect()
        expect(
            watched["the dense weight"]() is None,
            f"{scheme.name}: quantize: keeps the dense weight alive",
        )
        qdata = weakref.ref(made[0])
        del made
        gc.collect()
        expect(
            qdata() is None,
            f"{scheme.name}: dequantize: keeps the quantized tensors alive",
        )

    def test_same_weight_same_codes(self, scheme: Scheme) -> None:
        """Quantizing twice gives equal tensors, whatever the random state."""
        with torch.random.fork_rng(devices=[]):
            made = []
            for seed in (1, 2):
                torch.manual_seed(seed)
                made.append(self._quantize(scheme, self._weight()))
        expect(equal(*made), f"{scheme.name}: quantize twice: got other codes")

    def test_tensors_can_be_kept(self, scheme: Scheme) -> None:
        """Codes and parameters are plain, contiguous tensors that own their memory."""
        weight = self._weight()
        qdata, params = self._quantize(scheme, weight)
        places = [weight.untyped_storage().data_ptr()]
        for name, tensor in {"weight": qdata, **params}.items():
            where = f"{scheme.name}: {name}"
            expect(type(tensor) is Tensor, f"{where}: got {type(tensor).__name__}")
            expect(tensor.is_contiguous(), f"{where}: is not contiguous")
            expect(
                tensor.device == weight.device,
                f"{where}: got it on {tensor.device}, expected {weight.device}",
            )
            size, used = tensor.untyped_storage().nbytes(), tensor.nbytes
            expect(
                size <= 2 * used + 1024,
                f"{where}: got a view of {size} bytes, expected memory of its own of "
                f"{used}",
            )
            if tensor.numel():
                places.append(tensor.untyped_storage().data_ptr())
        expect(len(set(places)) == len(places), f"{scheme.name}: tensors share memory")

    # -- what is known beforehand ------------------------------------------------------

    def test_shapes_are_known_beforehand(self, scheme: Scheme) -> None:
        """create_params gives what quantize gives, on meta as on a device."""
        asked: list[tuple[Shape, torch.dtype, Mapping[str, Any]]] = [
            (shape, dtype, {})
            for shape in self._shapes(scheme)
            for dtype in (torch.float32, torch.bfloat16)
        ]
        asked += [(self.weight_shape, dtype, {}) for dtype in DTYPES[2:]]
        asked += [
            (self.weight_shape, torch.float32, o) for o in self._option_sets(scheme)
        ]
        for shape, dtype, options in asked:
            weight = self._weight(shape, dtype)
            expected = describe(self._quantize(scheme, weight, **options))
            for device in ("meta", self.device):
                made = scheme.create_params(
                    shape, dtype, device, **{**self.options, **options}
                )
                got = describe(made)
                where = {t.device.type for t in (made[0], *made[1].values())}
                expect(
                    got == expected and where == {torch.device(device).type},
                    f"{scheme.name}: create_params of {shape} {dtype} on {device}: got "
                    f"{got} on {where}, expected {expected}",
                )

    def test_dense_shape_is_what_decodes(self, scheme: Scheme) -> None:
        """``dense_shape`` is the shape that ``dequantize`` gives, with data or not."""
        for shape in self._shapes(scheme):
            made = self._quantize(scheme, self._weight(shape))
            metas = {name: t.to("meta") for name, t in made[1].items()}
            decoded = tuple(scheme.dequantize(*made, torch.float32).shape)
            for what, args in (
                ("with data", made),
                ("on meta", (made[0].to("meta"), metas)),
            ):
                got = tuple(scheme.dense_shape(*args))
                expect(
                    got == decoded or (what == "on meta" and got == shape),
                    f"{scheme.name}: dense_shape of {shape} {what}: got {got}, "
                    f"expected {decoded}, as dequantize gives",
                )

    def test_declines_says_why(self, scheme: Scheme) -> None:
        """A shape is declined in words or not at all, and the usual one is taken."""
        shapes = [self.weight_shape, *self.odd_shapes, (7,), (4, 3, 3, 3), (2, 0)]
        asked = [self.options, *self._option_sets(scheme)]
        for shape in shapes:
            for options in asked:
                got = scheme.declines(shape, **{**self.options, **options})
                expect(
                    got is None or (isinstance(got, str) and got != ""),
                    f"{scheme.name}: declines of {shape}: got {got!r}, expected a "
                    "reason or None",
                )
        reason = scheme.declines(self.weight_shape, **self.options)
        expect(
            reason is None,
            f"{scheme.name}: declines weight_shape {self.weight_shape}: {reason}; "
            "expected one that can be tested",
        )

    # -- options -----------------------------------------------------------------------

    def test_options_are_declared(self, scheme: Scheme) -> None:
        """Defaults are defaults, texts stand for values, and typos are refused."""
        usual = self._quantize(scheme, self._weight())
        for option in scheme.declared_options():
            where = f"{scheme.name}: option {option.name}"
            if option.default is not None and option.name not in self.options:
                value = option.parse(option.text(option.default))
                got = self._quantize(scheme, self._weight(), **{option.name: value})
                expect(
                    equal(got, usual),
                    f"{where}: got other codes with its default {option.default!r} "
                    "than without",
                )
        signature = inspect.signature(scheme.quantize).parameters.values()
        if any(p.kind is p.VAR_KEYWORD for p in signature):
            return
        known = {option.name for option in scheme.declared_options()}
        taken = {p.name for p in list(signature)[1:]}
        expect(
            known == taken,
            f"{scheme.name}: options: got {sorted(known)} declared, expected "
            f"{sorted(taken)}, as quantize takes",
        )

    def test_options_are_in_the_tensors_or_told(self, scheme: Scheme) -> None:
        """Tensors made with some options decode alike after others were used."""
        weight = self._weight()
        made, decoded = [], []
        for options in self._option_sets(scheme):
            made.append((self._quantize(scheme, weight, **options), options))
            decoded.append(self._decode(scheme, made[-1][0], weight, **options))
            self._expect_floor(
                weight, decoded[-1], f"{scheme.name}: options {options}", floor=1.0
            )
        instances = {"again": scheme, "by a second instance": second_instance(scheme)}
        for what, instance in instances.items():
            if instance is None:
                continue
            for (tensors, options), expected in zip(made, decoded, strict=True):
                got = self._decode(instance, tensors, weight, **options)
                expect(
                    torch.equal(got, expected),
                    f"{scheme.name}: dequantize {what}, of tensors with options "
                    f"{ {**self.options, **options} }: got another weight than first",
                )

    def test_options_of_reproduce(self, scheme: Scheme) -> None:
        """Quantizing with the options that the tensors tell gives the same tensors."""
        for shape in self._shapes(scheme):
            weight = self._weight(shape)
            sets = [{}] if shape != self.weight_shape else self._option_sets(scheme)
            for options in sets:
                made = self._quantize(scheme, weight, **options)
                told = scheme.options_of(*made)
                scheme.check_options(told)
                again = self._quantize(scheme, weight, **{**options, **told})
                where = f"{scheme.name}: options_of {shape} with {dict(options)}"
                expect(
                    equal(again, made),
                    f"{where}: got {told}, with which quantize gives other tensors",
                )
                metas = {name: t.to("meta") for name, t in made[1].items()}
                on_meta = scheme.options_of(made[0].to("meta"), metas)
                expect(
                    on_meta == told, f"{where} on meta: got {on_meta}, expected {told}"
                )

    def test_requantize_keeps_the_layer(self, scheme: Scheme) -> None:
        """A changed weight is quantized as the layer was; a seed repeats itself."""
        changed = self._weight(outliers=True, seed=5)
        for options in self._option_sets(scheme):
            for dtype in (torch.float32, torch.bfloat16):
                weight = self._weight(dtype=dtype)
                where = f"{scheme.name}: requantize of {dtype} with {options}"
                made = self._quantize(scheme, weight, **options)
                old = self._as_weight(scheme, made, weight, **options)
                with torch.no_grad():
                    same = scheme.requantize(weight, old)
                    runs = [
                        scheme.requantize(changed.to(dtype), old, seed=seed)
                        for seed in (0, 0, 7, 7)
                    ]
                dense = self._decode(scheme, made, weight, **options)
                again = self._decode(scheme, same, weight, **options)
                worse = sqnr_db(weight, dense) - sqnr_db(weight, again)
                expect(  # an option may ask for rounding at random, which a seed does
                    equal(same, made) if not options else worse <= 1,
                    f"{where}: got other tensors for the weight that it was",
                )
                expect(
                    all(describe(run) == describe(made) for run in runs),
                    f"{where}: got {[describe(r) for r in runs]}, expected "
                    f"{describe(made)}",
                )
                expect(
                    equal(*runs[:2]) and equal(*runs[2:]),
                    f"{where}: got other tensors the second time",
                )
                for seed, run in ((0, runs[0]), (7, runs[2])):
                    dense = self._decode(scheme, run, changed, **options)
                    self._expect_floor(changed, dense, f"{where}, seed {seed}", 1.0)


class Memory:
    """Memory that holds one set of quantized tensors after another.

    The tensors are new each time, and their versions with them; addresses stay.
    """

    def __init__(self, like: Quantized) -> None:
        named = {"": like[0], **like[1]}
        self._bytes = {
            name: torch.empty(tensor.nbytes, dtype=torch.uint8, device=tensor.device)
            for name, tensor in named.items()
        }

    def filled(self, content: Quantized) -> Quantized:
        """New tensors in the old memory."""
        named = {"": content[0], **content[1]}
        made: dict[str, Tensor] = {}
        for name, tensor in named.items():
            raw = self._bytes[name]
            raw.copy_(tensor.reshape(-1).view(torch.uint8))
            empty = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
            stride = tensor.contiguous().stride()
            made[name] = empty.set_(raw.untyped_storage(), 0, tensor.shape, stride)
        return made.pop(""), made
