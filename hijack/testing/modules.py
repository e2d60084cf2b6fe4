"""The part of the conformance kit that tests wrapped modules and their forwards."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import hijack
from hijack.errors import NonFiniteError
from hijack.metrics import sqnr_db
from hijack.modules import Wrapped, default_forward
from hijack.quantized import QuantizedTensor
from hijack.scheme import Quantized, Scheme
from hijack.testing.base import Conformance
from hijack.testing.checks import (
    alone,
    anatomy,
    cloned,
    describe,
    equal,
    expect,
    kind_of,
    outcome,
    quantized_of,
    same_bits,
    same_numbers,
    weight_of,
)
from hijack.testing.subjects import (
    SUBJECTS,
    VARIANTS,
    Foreign,
    Subject,
    input_variants,
)
from hijack.testing.tensors import Memory

Makers = Mapping[type[nn.Module], Sequence[Callable[[], Subject]]]

#: Agreement, in dB, of outputs in a dtype that differ by rounding alone.
ROUNDING_DB = {torch.bfloat16: 35.0, torch.float16: 45.0}


class ModuleConformance(Conformance):
    """Tests of modules that were wrapped with the scheme."""

    def subjects(self, scheme: Scheme) -> list[Subject]:
        """Dense modules of the scheme's targets, each with an input.

        Override it for targets the kit does not know.
        """
        made = self._made(scheme, SUBJECTS)
        if not made and nn.Linear in scheme.targets and len(self.weight_shape) == 2:
            n, k = self.weight_shape
            made = self._made(
                scheme, {nn.Linear: [lambda: (nn.Linear(k, n), torch.randn(3, k))]}
            )
        expect(
            bool(made),
            f"{scheme.name}: the kit knows no subject of type "
            f"{', '.join(t.__name__ for t in scheme.targets)}; override subjects()",
        )
        return made

    # -- the forward -------------------------------------------------------------------

    def test_forward_uses_the_dequantized_weight(self, scheme: Scheme) -> None:
        """Every target type computes what it computes with the dequantized weight."""
        for module, twin, x in self._every(scheme):
            self._expect_same(module(x), twin(x), f"{scheme.name}: {kind_of(module)}")

    def test_every_input_is_taken(self, scheme: Scheme) -> None:
        """Inputs of any layout, number of dimensions and dtype are computed with."""
        for module, twin, x in self._every(scheme):
            for what, variant in input_variants(module, x).items():
                where = f"{scheme.name}: {kind_of(module)}: input {what}"
                with torch.no_grad():
                    self._expect_same(module(variant), twin(variant), where)
            for dtype in (torch.bfloat16, torch.float16, torch.float64):
                if not _takes_any_dtype(twin, x):
                    break
                where = f"{scheme.name}: {kind_of(module)}: input {dtype}"
                wanted = outcome(copy.deepcopy(twin).to(dtype), x.to(dtype))
                if isinstance(wanted, Tensor):
                    self._expect_same(module(x.to(dtype)), wanted, where)

    def test_wrong_inputs_are_refused(self, scheme: Scheme) -> None:
        """What the dense module refuses is not computed with."""
        for module, twin, x in self._every(scheme):
            if x.is_floating_point():
                dim = -1 if isinstance(module, nn.Linear) else 1
                size = x.shape[dim]
                wider = torch.cat([x, x.narrow(dim, 0, 1)], dim)
                wrong = {"wider": wider, "narrower": x.narrow(dim, 0, size - 1)}
            else:
                wrong = {"out of range": x + 50, "float": x.float()}
            for what, variant in wrong.items():
                if isinstance(outcome(twin, variant), Tensor):
                    continue
                got = outcome(module, variant)
                expect(
                    isinstance(got, Exception),
                    f"{scheme.name}: {kind_of(module)}: input that is {what}: got an "
                    "output, expected an error, as the dense module gives",
                )

    def test_bias(self, scheme: Scheme) -> None:
        """A bias may be absent, of another dtype, and change; its gradient is right."""
        for module, twin, x in self._every(scheme):
            if getattr(twin, "bias", None) is None or not x.is_floating_point():
                continue
            where = f"{scheme.name}: {kind_of(module)}: bias"
            module(x)
            for part in (module, twin):
                with torch.no_grad():
                    _bias(part).add_(1)
            self._expect_same(module(x), twin(x), f"{where} that changed")
            for part in (module, twin):
                part.zero_grad()
                (part(x) * _ramp(part(x))).sum().backward()
            self._expect_same(_bias(module).grad, _bias(twin).grad, f"{where}: grad")
            for dtype in (torch.bfloat16, torch.float64):
                if not _takes_any_dtype(twin, x):
                    break
                for part in (module, twin):
                    rounded = _bias(part).detach().to(torch.bfloat16)
                    to = dtype if part is module else torch.float32
                    part.bias = nn.Parameter(rounded.to(to))
                self._expect_same(module(x), twin(x), f"{where} {dtype}")
            for part in (module, twin):
                part.register_parameter("bias", None)
            self._expect_same(module(x), twin(x), f"{where} taken away")

    def test_autocast(self, scheme: Scheme) -> None:
        """Under autocast a module computes in the dtype that a dense one does."""
        for module, twin, x in self._every(scheme):
            where = f"{scheme.name}: {kind_of(module)}: autocast"
            with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
                wanted = outcome(twin, x)
                if isinstance(wanted, Tensor):
                    self._expect_same(module(x), wanted, where, ROUNDING_DB)

    def test_forward_is_a_function_of_its_arguments(self, scheme: Scheme) -> None:
        """A bound forward computes with the weight and bias it is given."""
        for (module, _, x), (other, twin, _) in self._two(scheme):
            bound = scheme.bind_forward(twin)
            own = not any(type(twin).forward is t.forward for t in scheme.targets)
            if bound is None or own:
                continue
            where = f"{scheme.name}: {kind_of(module)}: forward"
            module(x)
            weight, bias = other.weight, _bias(other)
            if bias is not None:
                for part in (other, twin):
                    part.bias.data += 1
            got = bound(module, x, weight, bias)
            self._expect_same(got, twin(x), f"{where} with another layer's weight")

    def test_one_forward_for_all(self, scheme: Scheme) -> None:
        """Modules that are alike get one plain function, and are not changed by it."""
        for (module, _), (other, _) in zip(
            self._all_subjects(scheme), self._all_subjects(scheme), strict=True
        ):
            where = f"{scheme.name}: {kind_of(module)}: bind_forward"
            before, kept = anatomy(module), copy.deepcopy(module.state_dict())
            bound = scheme.bind_forward(module)
            same = anatomy(module) == before and all(
                same_bits(t, kept[key]) for key, t in module.state_dict().items()
            )
            expect(same, f"{where}: got a module that it changed, expected none")
            second = scheme.bind_forward(other)
            expect(
                bound is second,
                f"{where}: got {bound!r} and {second!r} for two modules that are "
                "alike, expected one object",
            )
            if bound is None:
                continue
            expect(
                inspect.isfunction(inspect.unwrap(bound)),
                f"{where}: got {type(bound).__name__}, expected a plain function",
            )
            with alone(scheme) as registry:
                for part in (module, other):
                    hijack.wrap_module(part, scheme, registry=registry, **self.options)
            expect(
                type(module) is type(other),
                f"{where}: got two classes for two modules that are alike",
            )

    # -- gradients and modes -----------------------------------------------------------

    def test_gradient_reaches_the_input(self, scheme: Scheme) -> None:
        """The gradient of the input is that of the dequantized twin."""
        for module, twin, x in self._every(scheme):
            if not x.is_floating_point():
                continue
            where = f"{scheme.name}: {kind_of(module)}: gradient"
            x = x.clone().requires_grad_()
            out = module(x)
            expect(out.requires_grad, f"{where}: forward cuts it off")
            ways: dict[str, Callable[[Tensor], Tensor]] = {
                "of a sum": lambda y: y.sum(),
                "of a weighted sum": lambda y: (y * _ramp(y)).sum(),
                "of an input used twice": lambda y, v=x: (
                    y.square().sum()  # type: ignore[misc]
                    + v.square().sum()
                ),
            }
            for what, loss in ways.items():
                (got,) = torch.autograd.grad(loss(module(x)), x)
                (expected,) = torch.autograd.grad(loss(twin(x)), x)
                self._expect_same(got, expected, f"{where} {what}")

    def test_grad_modes(self, scheme: Scheme) -> None:
        """Inference mode and no_grad come first, and leave nothing that hinders."""
        for module, twin, x in self._every(scheme):
            where = f"{scheme.name}: {kind_of(module)}"
            with torch.inference_mode():
                fresh = x.clone()
                self._expect_same(module(fresh), twin(fresh), f"{where}: inference")
            with torch.no_grad():
                out = module(x)
            expect(
                not out.requires_grad, f"{where}: no_grad: got an output with gradient"
            )
            if not x.is_floating_point():
                continue
            x = x.clone().requires_grad_()
            for name in ("afterwards", "once more"):
                (got,) = torch.autograd.grad(module(x).sum(), x)
                (expected,) = torch.autograd.grad(twin(x).sum(), x)
                self._expect_same(got, expected, f"{where}: gradient {name}")

    def test_nothing_requires_a_gradient(self, scheme: Scheme) -> None:
        """Quantized tensors are constants, and the output without a bias as well."""
        for module, _, x in self._every(scheme):
            where = f"{scheme.name}: {kind_of(module)}"
            qdata, params = quantized_of(module)
            for name, tensor in {"weight": qdata, **params}.items():
                expect(
                    not tensor.requires_grad and tensor.grad_fn is None,
                    f"{where}: {name}: got a tensor that requires a gradient",
                )
            if getattr(module, "bias", None) is None:
                expect(
                    not module(x).requires_grad,
                    f"{where}: output: requires a gradient, expected a constant",
                )

    # -- memory ------------------------------------------------------------------------

    def test_forward_leaves_its_arguments_alone(self, scheme: Scheme) -> None:
        """A forward writes to no argument, and its result stays what it was."""
        for (module, _, x), (other, _, _) in self._two(scheme):
            for dtype in (torch.float32, torch.bfloat16):
                where = f"{scheme.name}: {kind_of(module)}: forward {dtype}"
                x = x.to(dtype) if _takes_any_dtype(module, x) else x
                before = cloned(quantized_of(module))
                bias, x0 = _bias(module), x.clone()
                bias0 = None if bias is None else bias.detach().clone()
                with torch.no_grad():
                    out = module(x)
                    same = (
                        same_bits(x, x0)
                        and equal(before, quantized_of(module))
                        and (bias0 is None or same_bits(bias, bias0))
                    )
                    expect(same, f"{where}: got arguments that it changed")
                    out0 = out.clone()
                    other(x)
                    expect(
                        same_bits(out, out0),
                        f"{where}: got an output that another layer's call changes",
                    )
                    out.zero_()
                    again = module(x)
                    expect(
                        same_numbers(again, out0) and same_bits(x, x0),
                        f"{where}: got an output that shares memory with what is kept",
                    )
                    module(2 * x if x.is_floating_point() else x.flip(0))
                    expect(
                        same_numbers(again, out0),
                        f"{where}: got an output that the next call changes",
                    )

    def test_layers_do_not_share(self, scheme: Scheme) -> None:
        """Layers called in turn compute what each computes alone."""
        pairs = [self._every(scheme), self._every(scheme, -2.0)]
        layers = [layer for both in zip(*pairs, strict=True) for layer in both]
        for dtype in (torch.float32, torch.bfloat16):
            for turn in range(2):
                for module, twin, x in layers:
                    if _takes_any_dtype(twin, x):
                        x, twin = x.to(dtype), twin.to(dtype)
                    where = f"{scheme.name}: {kind_of(module)}: turn {turn}, {dtype}"
                    wanted = outcome(twin, x)
                    if isinstance(wanted, Tensor):
                        self._expect_same(module(x), wanted.detach(), where)

    def test_new_tensors_are_seen(self, scheme: Scheme) -> None:
        """No forward goes on with a weight that was written to or replaced."""
        for (module, twin, x), (other, other_twin, _) in self._two(scheme):
            where = f"{scheme.name}: {kind_of(module)}"
            made = [cloned(quantized_of(part)) for part in (module, other)]
            for part in (other, other_twin):  # one bias, for only weights are swapped
                if _bias(part) is not None:
                    part.bias = copy.deepcopy(_bias(module))
            wanted = [twin(x).detach(), other_twin(x).detach()]
            with torch.no_grad():
                for turn in (0, 1, 0):
                    qdata, params = quantized_of(module)
                    qdata.copy_(made[turn][0])
                    for name, tensor in params.items():
                        tensor.copy_(made[turn][1][name])
                    self._expect_same(module(x), wanted[turn], f"{where}: after copy_")
            old: Any = weight_of(module)
            memory = Memory(made[0])
            for turn in (0, 1, 0, 1, 0, 1):
                held = memory.filled(made[turn])
                module._parameters["weight"] = _parameter(
                    old.replace(qdata=held[0], params=held[1])
                )
                del held
                with torch.no_grad():
                    out = module(x)
                module._parameters["weight"] = old
                self._expect_same(
                    out, wanted[turn], f"{where}: weight in another's memory"
                )

    def test_layers_can_be_freed(self, scheme: Scheme) -> None:
        """A layer nobody holds is gone, with its dense weight and its tensors."""
        subjects = self.subjects(scheme)
        while subjects:
            module, x = subjects.pop()
            dense = weakref.ref(weight_of(module))
            self._wrap(scheme, module)
            with torch.no_grad():
                module(x)
            qdata = weakref.ref(quantized_of(module)[0])
            kind, layer = kind_of(module), weakref.ref(module)
            del module
            gc.collect()
            kept = [
                name
                for name, ref in (
                    ("the dense weight", dense),
                    ("the quantized tensors", qdata),
                    ("the module", layer),
                )
                if ref() is not None
            ]
            expect(not kept, f"{scheme.name}: {kind}: keeps {', '.join(kept)} alive")

    # -- manners of a module -----------------------------------------------------------

    def test_functional_call(self, scheme: Scheme) -> None:
        """``functional_call`` computes with the tensors it is given."""
        for (module, _, x), (other, _, _) in self._two(scheme):
            state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
            got = torch.func.functional_call(module, state, (x,))
            where = f"{scheme.name}: {kind_of(module)}: functional_call"
            self._expect_same(got, other(x), where)

    def test_to_dtype_leaves_codes_alone(self, scheme: Scheme) -> None:
        """``.to(dtype)`` changes the dtype of the output, never codes or parameters."""
        for module, _, x in self._wrapped(scheme):
            before = copy.deepcopy(quantized_of(module))
            for dtype in (torch.bfloat16, torch.float64, torch.float16, torch.float32):
                where = f"{scheme.name}: {kind_of(module)}: to({dtype})"
                module.to(dtype)
                expect(equal(before, quantized_of(module)), f"{where}: got other codes")
                out = module(x.to(dtype) if x.is_floating_point() else x)
                expect(out.dtype == dtype, f"{where}: output is {out.dtype}")

    def test_state_dict_round_trip(self, scheme: Scheme) -> None:
        """A state dict holds weight, parameters and bias, and loads bit for bit."""
        for (module, _, x), (other, _, _) in self._two(scheme):
            where = f"{scheme.name}: {kind_of(module)}: state_dict"
            state = {key: tensor.clone() for key, tensor in module.state_dict().items()}
            bias = ["bias"] if _bias(module) is not None else []
            names = sorted(["weight", *quantized_of(module)[1], *bias])
            expect(
                sorted(state) == names,
                f"{where}: got {sorted(state)}, expected {names}",
            )
            other(x)  # so that there is something old
            other.load_state_dict(module.state_dict())
            expect(
                equal(quantized_of(module), quantized_of(other))
                and other.training is module.training,
                f"{where}: got other codes",
            )
            self._expect_same(other(x), module(x), where)

    def test_safetensors_round_trip(self, scheme: Scheme) -> None:
        """safetensors takes the state dict as it is and gives it back."""
        for module, _, _ in self._wrapped(scheme):
            state = module.state_dict()
            back = safetensors.torch.load(safetensors.torch.save(state))
            same = equal(_as_quantized(state), _as_quantized(back))
            expect(
                same, f"{scheme.name}: {kind_of(module)}: safetensors: got other codes"
            )

    def test_deepcopy_is_independent(self, scheme: Scheme) -> None:
        """A copy computes the same, also when the original has changed."""
        for module, _, x in self._wrapped(scheme):
            where = f"{scheme.name}: {kind_of(module)}: deepcopy"
            expected, copied = module(x), copy.deepcopy(module)
            for tensor in module.state_dict().values():
                tensor.zero_()
            self._expect_same(copied(x), expected, where)

    def test_torch_save(self, scheme: Scheme) -> None:
        """A whole module survives ``torch.save``, with a scheme of its own."""
        for module, _, x in self._wrapped(scheme):
            file = io.BytesIO()
            torch.save(module, file)
            file.seek(0)
            back = torch.load(file, weights_only=False)
            where = f"{scheme.name}: {kind_of(module)}: torch.save"
            self._expect_same(back(x), module(x), where)

    def test_unwrap_leaves_nothing_behind(self, scheme: Scheme) -> None:
        """An unwrapped module is the dequantized twin, and nothing more."""
        for module, twin, _ in self._wrapped(scheme):
            hijack.unwrap(module)
            where = f"{scheme.name}: {kind_of(module)}: unwrap"
            got, expected = anatomy(module), anatomy(twin)
            expect(got == expected, f"{where}: got {got}, expected {expected}")
            expect(
                torch.equal(weight_of(module), weight_of(twin)),
                f"{where}: the weight is not the dequantized one",
            )

    def test_non_finite_weight_is_refused(self, scheme: Scheme) -> None:
        """inf and NaN in a weight are an error, and the module stays as it was."""
        for value in (float("inf"), float("nan")):
            for module, _ in self.subjects(scheme):
                before = anatomy(module)
                with torch.no_grad():
                    weight_of(module).view(-1)[0] = value
                refused = False
                try:
                    hijack.wrap_module(module, scheme, **self.options)
                except NonFiniteError:
                    refused = True
                where = f"{scheme.name}: {kind_of(module)}: weight with {value}"
                expect(refused, f"{where}: was accepted, expected NonFiniteError")
                expect(anatomy(module) == before, f"{where}: the module was changed")

    def test_born_quantized(self, scheme: Scheme) -> None:
        """Modules built quantized have wrapped ones' shapes, and load their state."""
        wrapped = self._model(scheme)
        with alone(scheme) as registry:
            hijack.wrap_model(wrapped, scheme, registry=registry, **self.options)
            with hijack.building(scheme, registry=registry, **self.options):
                born = self._model(scheme)
            for part, again in zip(wrapped, born, strict=True):
                where = f"{scheme.name}: {kind_of(part)}: building"
                got, expected = (
                    describe(quantized_of(again)),
                    describe(quantized_of(part)),
                )
                expect(got == expected, f"{where}: got {got}, expected {expected}")
                again.load_state_dict(part.state_dict())
                expect(
                    equal(quantized_of(part), quantized_of(again)),
                    f"{where}: loads other codes",
                )

    def test_other_modules_are_left_alone(self, scheme: Scheme) -> None:
        """Modules that are no target, and shapes that are declined, stay dense."""
        model = self._model(scheme).append(Foreign())
        for shape in (*self.odd_shapes, self.weight_shape):
            if nn.Linear in scheme.targets and len(shape) == 2:
                model.append(nn.Linear(shape[1], shape[0]))
        with alone(scheme) as registry:
            report = hijack.wrap_model(model, scheme, registry=registry, **self.options)
        wrapped = [type(m) for m in model if isinstance(m, Wrapped)]
        expect(
            not any(issubclass(kind, Foreign) for kind in wrapped),
            f"{scheme.name}: targets: wraps every module there is",
        )
        for name, module in model.named_children():
            if isinstance(module, Foreign):
                continue
            shape = tuple(weight_of(module).shape)
            got = report.skipped.get(name)
            wanted = scheme.declines(shape, **self.options)
            expect(
                got == wanted,
                f"{scheme.name}: declines of {shape}: got {wanted!r}, and wrap_model "
                f"said {got!r}, expected one answer",
            )

    # -- details -----------------------------------------------------------------------

    def _made(self, scheme: Scheme, makers: Makers) -> list[Subject]:
        """Subjects of the scheme's targets, without those it declines."""
        wanted = [make for t in scheme.targets for make in makers.get(t, ())]
        with torch.random.fork_rng(devices=[]), torch.device(self.device):
            torch.manual_seed(3)
            made = [make() for make in wanted]
        return [
            (module, x.to(self.device))
            for module, x in made
            if self._takes(scheme, tuple(weight_of(module).shape))
        ]

    def _all_subjects(self, scheme: Scheme) -> list[Subject]:
        return [*self.subjects(scheme), *self._made(scheme, VARIANTS)]

    def _wrap(self, scheme: Scheme, module: nn.Module, **options: Any) -> nn.Module:
        with alone(scheme) as registry:
            return hijack.wrap_module(
                module, scheme, registry=registry, **{**self.options, **options}
            )

    def _pairs(
        self, scheme: Scheme, subjects: list[Subject], factor: float
    ) -> Iterator[tuple[nn.Module, nn.Module, Tensor]]:
        for module, x in subjects:
            weight = weight_of(module)
            with torch.no_grad():
                weight.mul_(factor)
            twin = copy.deepcopy(module)
            dense = self._round_trip(scheme, weight.detach())
            twin.register_parameter("weight", nn.Parameter(dense))
            yield self._wrap(scheme, module), twin, x

    def _wrapped(
        self, scheme: Scheme, factor: float = 1.0
    ) -> Iterator[tuple[nn.Module, nn.Module, Tensor]]:
        """Wrapped module, dense twin with the dequantized weight, and input."""
        return self._pairs(scheme, self.subjects(scheme), factor)

    def _every(
        self, scheme: Scheme, factor: float = 1.0
    ) -> Iterator[tuple[nn.Module, nn.Module, Tensor]]:
        """The same for more modules, with other options, subclasses among them."""
        return self._pairs(scheme, self._all_subjects(scheme), factor)

    def _two(self, scheme: Scheme) -> Any:
        """Pairs of what `_every` gives, of one kind and with other weights."""
        return zip(self._every(scheme), self._every(scheme, -2.0), strict=True)

    def _model(self, scheme: Scheme) -> nn.ModuleList:
        return nn.ModuleList([module for module, _ in self.subjects(scheme)])

    def _expect_same(
        self,
        got: Tensor | None,
        expected: Tensor | None,
        where: str,
        rounding: Mapping[torch.dtype, float] = ROUNDING_DB,
    ) -> None:
        __tracebackhide__ = True
        if got is None or expected is None:
            raise AssertionError(f"{where}: got {got}, expected {expected}")
        floor = min(self.min_forward_db, rounding.get(expected.dtype, 1000.0))
        agreement = sqnr_db(expected.detach(), got.detach())
        expect(
            agreement >= floor and got.dtype == expected.dtype,
            f"{where}: got {got.dtype} {tuple(got.shape)} at {agreement:.1f} dB, "
            f"expected {expected.dtype} {tuple(expected.shape)} at {floor} dB or more",
        )


def _ramp(like: Tensor) -> Tensor:
    """Weights of a loss: a different one for each value."""
    return torch.linspace(-1, 2, like.numel(), device=like.device).view(like.shape)


def _bias(module: nn.Module) -> Any:
    bias = getattr(module, "bias", None)
    return bias if isinstance(bias, Tensor) else None


def _takes_any_dtype(module: nn.Module, x: Tensor) -> bool:
    """Whether a module computes in the input's dtype, whatever its own tensors have.

    One whose class has a forward of its own does what that one does.
    """
    base = module._hijack.base if isinstance(module, Wrapped) else type(module)
    return x.is_floating_point() and default_forward(base) is not None


def _as_quantized(state: dict[str, Tensor]) -> Quantized:
    return state["weight"], {key: t for key, t in state.items() if key != "weight"}


def _parameter(weight: QuantizedTensor) -> Any:
    return nn.Parameter(weight, requires_grad=False)
