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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

import hijack
from hijack.errors import NonFiniteError
from hijack.hooks import Wrapped
from hijack.layers import Quantized
from hijack.registry import default_registry
from hijack.safetensors_io.header import Header
from hijack.scheme import Scheme
from hijack.testing.subjects import (
    SUBJECTS,
    Foreign,
    Parent,
    Subject,
    realistic_weight,
    sqnr_db,
    weight_shapes,
    weights,
)
from hijack.testing.tensors import TensorConformance, describe, equal, expect

__all__ = [
    "SchemeConformance",
    "realistic_weight",
    "registered",
    "sqnr_db",
    "weight_shapes",
    "weights",
]


@contextlib.contextmanager
def registered(scheme: Scheme) -> Iterator[Scheme]:
    """Have a scheme in the default registry for a while; its name may be taken."""
    registry = default_registry()
    known = registry.schemes().get(scheme.name)
    if known is scheme:
        yield scheme
        return
    if known is not None:
        registry.unregister(known.name)
    registry.register(scheme)
    try:
        yield scheme
    finally:
        registry.unregister(scheme.name)
        if known is not None:
            registry.register(known, origin=known.origin)


class SchemeConformance(TensorConformance):
    """Every test of a scheme.

    Subclass it under a name that starts with ``Test``, give ``min_sqnr_db`` and a
    pytest fixture ``scheme``. The attributes of `TensorConformance` can be set too.

    Attributes:
        min_forward_db: how well a module's output agrees with its dequantized twin's.
        compile_backend: backend of ``torch.compile``.
        dialect: dialect of the files written; None for the scheme's first.
    """

    min_forward_db: float = 80.0
    compile_backend: str = "aot_eager"
    dialect: str | None = None

    def subjects(self, scheme: Scheme) -> list[Subject]:
        """Dense modules of the scheme's targets, each with an input.

        Override it for targets the kit does not know.
        """
        makers = [make for t in scheme.targets for make in SUBJECTS.get(t, ())]
        expect(
            bool(makers),
            f"{scheme.name}: the kit knows no subject of type "
            f"{', '.join(t.__name__ for t in scheme.targets)}; override subjects()",
        )
        with torch.random.fork_rng(devices=[]), torch.device(self.device):
            torch.manual_seed(3)
            made = [make() for make in makers]
        return [(module, x.to(self.device)) for module, x in made]

    # -- one module --------------------------------------------------------------------

    def test_forward_uses_the_dequantized_weight(self, scheme: Scheme) -> None:
        """Every target type computes what it computes with the dequantized weight."""
        for module, twin, x in self._wrapped(scheme):
            self._expect_same(module(x), twin(x), f"{scheme.name}: {_kind(module)}")

    def test_gradient_reaches_the_input(self, scheme: Scheme) -> None:
        """The gradient of the input is that of the dequantized twin."""
        for module, twin, x in self._wrapped(scheme):
            if not x.is_floating_point():
                continue
            where = f"{scheme.name}: {_kind(module)}: gradient"
            x = x.clone().requires_grad_()
            out = module(x)
            expect(out.requires_grad, f"{where}: forward cuts it off")
            ones = torch.ones_like(out)
            (got,) = torch.autograd.grad(out, x, ones)
            (expected,) = torch.autograd.grad(twin(x), x, ones)
            self._expect_same(got, expected, where)

    def test_functional_call(self, scheme: Scheme) -> None:
        """``functional_call`` computes with the tensors it is given."""
        for (module, _, x), (other, _, _) in self._two(scheme):
            state = {**dict(other.named_parameters()), **dict(other.named_buffers())}
            got = torch.func.functional_call(module, state, (x,))
            where = f"{scheme.name}: {_kind(module)}: functional_call"
            self._expect_same(got, other(x), where)

    def test_compile_inside_a_parent(self, scheme: Scheme) -> None:
        """A compiled parent computes what it computes uncompiled, in one graph."""
        for module, _, x in self._wrapped(scheme):
            parent = Parent(module)
            torch.compiler.reset()
            run = torch.compile(parent, fullgraph=True, backend=self.compile_backend)
            with torch.no_grad():
                got = run(x)
                expected = parent(x)
            self._expect_same(got, expected, f"{scheme.name}: {_kind(module)}: compile")

    def test_to_dtype_leaves_codes_alone(self, scheme: Scheme) -> None:
        """``.to(dtype)`` changes the dtype of the output, never codes or parameters."""
        for module, _, x in self._wrapped(scheme):
            before = copy.deepcopy(_quantized(module))
            for dtype in (torch.bfloat16, torch.float64, torch.float16, torch.float32):
                where = f"{scheme.name}: {_kind(module)}: to({dtype})"
                module.to(dtype)
                expect(equal(before, _quantized(module)), f"{where}: got other codes")
                out = module(x.to(dtype) if x.is_floating_point() else x)
                expect(out.dtype == dtype, f"{where}: output is {out.dtype}")

    def test_state_dict_round_trip(self, scheme: Scheme) -> None:
        """A state dict holds weight, parameters and bias, and loads bit for bit."""
        for (module, _, x), (other, _, _) in self._two(scheme):
            where = f"{scheme.name}: {_kind(module)}: state_dict"
            state = {key: tensor.clone() for key, tensor in module.state_dict().items()}
            bias = {"bias"} if getattr(module, "bias", None) is not None else set()
            names = {"weight", *_quantized(module)[1]} | bias
            expect(
                set(state) == names,
                f"{where}: got {sorted(state)}, expected {sorted(names)}",
            )
            other.load_state_dict(module.state_dict())
            expect(
                equal(_quantized(module), _quantized(other)),
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
                same, f"{scheme.name}: {_kind(module)}: safetensors: got other codes"
            )

    def test_deepcopy_is_independent(self, scheme: Scheme) -> None:
        """A copy computes the same, also when the original has changed."""
        for module, _, x in self._wrapped(scheme):
            where = f"{scheme.name}: {_kind(module)}: deepcopy"
            expected, copied = module(x), copy.deepcopy(module)
            for tensor in module.state_dict().values():
                tensor.zero_()
            self._expect_same(copied(x), expected, where)

    def test_torch_save(self, scheme: Scheme) -> None:
        """A whole module survives ``torch.save``."""
        for module, _, x in self._wrapped(scheme):
            file = io.BytesIO()
            torch.save(module, file)
            file.seek(0)
            back = torch.load(file, weights_only=False)
            where = f"{scheme.name}: {_kind(module)}: torch.save"
            self._expect_same(back(x), module(x), where)

    def test_unwrap_leaves_nothing_behind(self, scheme: Scheme) -> None:
        """An unwrapped module is the dequantized twin, and nothing more."""
        for module, twin, _ in self._wrapped(scheme):
            hijack.unwrap(module)
            where = f"{scheme.name}: {_kind(module)}: unwrap"
            got, expected = _anatomy(module), _anatomy(twin)
            expect(got == expected, f"{where}: got {got}, expected {expected}")
            expect(
                torch.equal(_weight(module), _weight(twin)),
                f"{where}: the weight is not the dequantized one",
            )

    def test_non_finite_weight_is_refused(self, scheme: Scheme) -> None:
        """inf and NaN in a weight are an error, and the module stays as it was."""
        for value in (float("inf"), float("nan")):
            for module, _ in self.subjects(scheme):
                before = _anatomy(module)
                with torch.no_grad():
                    _weight(module).view(-1)[0] = value
                refused = False
                try:
                    hijack.wrap_module(module, scheme, **self.options)
                except NonFiniteError:
                    refused = True
                where = f"{scheme.name}: {_kind(module)}: weight with {value}"
                expect(refused, f"{where}: was accepted, expected NonFiniteError")
                expect(_anatomy(module) == before, f"{where}: the module was changed")

    def test_other_modules_are_left_alone(self, scheme: Scheme) -> None:
        """A module that is no target is not wrapped, a dense layer is not claimed."""
        model = self._model(scheme).append(Foreign())
        header = Header.from_state_dict(model.state_dict())
        claimed = [claim.layer for claim in scheme.match(header)]
        expect(not claimed, f"{scheme.name}: match claims the dense layers {claimed}")
        hijack.wrap_model(model, scheme, **self.options)
        kind = type(model[-1])
        expect(kind is Foreign, f"{scheme.name}: targets: wraps every module there is")

    # -- whole models and files --------------------------------------------------------

    def test_file_round_trip(self, scheme: Scheme, tmp_path: Path) -> None:
        """A saved model is recognised by its header, and loads bit for bit."""
        path = tmp_path / "model.safetensors"
        model, fresh = self._model(scheme), self._model(scheme)
        with registered(scheme):
            report = hijack.wrap_model(model, scheme, **self.options)
            hijack.save(model, path, self.dialect)
            claims = hijack.identify(path).claims()
            found = {layer: claim.scheme for layer, claim in claims.items()}
            expected = dict.fromkeys(report.layers, scheme.name)
            expect(
                found == expected,
                f"{scheme.name}: identify: got {found}, expected {expected}",
            )
            hijack.load(fresh, path)
        for part, again in zip(model, fresh, strict=True):
            expect(
                equal(_quantized(part), _quantized(again)),
                f"{scheme.name}: {_kind(part)}: load: got other codes than were saved",
            )

    def test_quantized_file(self, scheme: Scheme, tmp_path: Path) -> None:
        """Quantizing a file gives what quantizing the model gives."""
        src, dst = tmp_path / "dense.safetensors", tmp_path / "quantized.safetensors"
        model, fresh = self._model(scheme), self._model(scheme)
        safetensors.torch.save_file(model.state_dict(), src)
        with registered(scheme):
            report = hijack.wrap_model(model, scheme, **self.options)
            # the native dialect spells every option; others may round them
            options: dict[str, Any] = {"dialect": "hijack", **self.options}
            hijack.quantize_file(src, dst, scheme, include=report.layers, **options)
            hijack.load(fresh, dst)
        for part, again in zip(model, fresh, strict=True):
            expect(
                equal(_quantized(part), _quantized(again)),
                f"{scheme.name}: {_kind(part)}: quantize_file: got other codes than "
                "wrap_model",
            )

    def test_born_quantized(self, scheme: Scheme) -> None:
        """Modules built quantized have wrapped ones' shapes, and load their state."""
        wrapped = self._model(scheme)
        hijack.wrap_model(wrapped, scheme, **self.options)
        with hijack.building(scheme, **self.options):
            born = self._model(scheme)
        for part, again in zip(wrapped, born, strict=True):
            where = f"{scheme.name}: {_kind(part)}: building"
            got, expected = describe(_quantized(again)), describe(_quantized(part))
            expect(got == expected, f"{where}: got {got}, expected {expected}")
            again.load_state_dict(part.state_dict())
            expect(
                equal(_quantized(part), _quantized(again)),
                f"{where}: loads other codes",
            )

    # -- details -----------------------------------------------------------------------

    def _wrapped(
        self, scheme: Scheme, factor: float = 1.0
    ) -> Iterator[tuple[nn.Module, nn.Module, Tensor]]:
        """Wrapped module, dense twin with the dequantized weight, and input."""
        for module, x in self.subjects(scheme):
            weight = _weight(module)
            with torch.no_grad():
                weight.mul_(factor)
            twin = copy.deepcopy(module)
            dense = self._round_trip(scheme, weight.detach())
            twin.register_parameter("weight", nn.Parameter(dense))
            yield hijack.wrap_module(module, scheme, **self.options), twin, x

    def _two(self, scheme: Scheme) -> Any:
        """Pairs of what `_wrapped` gives, of one kind and with other weights."""
        return zip(self._wrapped(scheme), self._wrapped(scheme, -2.0), strict=True)

    def _model(self, scheme: Scheme) -> nn.ModuleList:
        return nn.ModuleList([module for module, _ in self.subjects(scheme)])

    def _expect_same(self, got: Tensor, expected: Tensor, where: str) -> None:
        __tracebackhide__ = True
        agreement = sqnr_db(expected, got)
        expect(
            agreement >= self.min_forward_db,
            f"{where}: got {tuple(got.shape)} at {agreement:.1f} dB, expected "
            f"{tuple(expected.shape)} at {self.min_forward_db} dB or more",
        )


def _weight(module: nn.Module) -> nn.Parameter:
    weight: nn.Parameter = module._parameters["weight"]  # type: ignore[assignment]
    return weight


def _quantized(module: nn.Module) -> Quantized:
    if not isinstance(module, Wrapped):
        raise AssertionError(f"{_kind(module)}: is not quantized")
    params = {n: t for n, t in module.named_buffers() if n in module._hijack.names}
    return _weight(module).detach(), params


def _as_quantized(state: dict[str, Tensor]) -> Quantized:
    return state["weight"], {key: t for key, t in state.items() if key != "weight"}


def _kind(module: nn.Module) -> str:
    kind = module._hijack.base if isinstance(module, Wrapped) else type(module)
    return kind.__name__


def _anatomy(module: nn.Module) -> dict[str, object]:
    """Class, attributes and tensors of a module, to compare with another's."""
    tensors = {**module._parameters, **module._buffers}
    return {
        "class": type(module).__name__,
        "attributes": sorted(vars(module)),
        "tensors": {
            name: None if t is None else (type(t).__name__, t.dtype, t.requires_grad)
            for name, t in tensors.items()
        },
    }
