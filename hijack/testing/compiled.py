"""The part of the conformance kit that compiles modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from hijack.scheme import Scheme
from hijack.testing.checks import expect, kind_of
from hijack.testing.modules import ROUNDING_DB, ModuleConformance
from hijack.testing.subjects import Parent


class CompiledConformance(ModuleConformance):
    """Tests of what ``torch.compile`` makes of wrapped modules."""

    def test_compile_inside_a_parent(self, scheme: Scheme) -> None:
        """A compiled parent computes what it computes uncompiled, in one graph."""
        for module, _, x in self._wrapped(scheme):
            parent = Parent(module)
            torch.compiler.reset()
            run = torch.compile(parent, fullgraph=True, backend=self.compile_backend)
            where = f"{scheme.name}: {kind_of(module)}: compile"
            with torch.no_grad():
                self._expect_same(run(x), parent(x), where)
                if x.is_floating_point():
                    half = x.bfloat16()
                    self._expect_same(run(half), parent(half), f"{where}, bfloat16")

    def test_compiled_once_for_all(self, scheme: Scheme) -> None:
        """Layers that are alike, and other numbers of tokens, need no new graph."""
        from torch._dynamo.testing import CompileCounterWithBackend

        pairs = [self._linears(scheme, factor) for factor in (1.0, -2.0)]
        for first, second in zip(*pairs, strict=True):
            torch.compiler.reset()
            counter = CompileCounterWithBackend("eager")
            where = f"{scheme.name}: compile with dynamic=True"
            for module in (first, second):
                parent = Parent(module)
                run = torch.compile(
                    parent, fullgraph=True, dynamic=True, backend=counter
                )
                for tokens in (3, 5, 17):
                    x = _tokens(tokens, module)
                    with torch.no_grad():
                        self._expect_same(
                            run(x), parent(x), f"{where}: {tokens} tokens"
                        )
            expect(
                counter.frame_count == 1,
                f"{where}: got {counter.frame_count} graphs for two layers that are "
                "alike, expected 1",
            )

    def test_gradient_through_compiled(self, scheme: Scheme) -> None:
        """The gradient of the input is that of the module that is not compiled."""
        for module in self._linears(scheme, 1.0)[:1]:
            torch.compiler.reset()
            run = torch.compile(
                Parent(module), fullgraph=True, backend=self.compile_backend
            )
            x = _tokens(5, module).requires_grad_()
            (got,) = torch.autograd.grad(run(x).sum(), x)
            (expected,) = torch.autograd.grad(Parent(module)(x).sum(), x)
            self._expect_same(got, expected, f"{scheme.name}: compile: gradient")

    def test_inductor_on_ragged_widths(self, scheme: Scheme) -> None:
        """Code that Inductor generates is right where blocks are short."""
        layers = self._linears(scheme, 1.0)
        if not self.inductor or not layers:
            return
        batches = [nn.ModuleList(layers)]
        if not self.quick:
            batches += [nn.ModuleList([m]) for m, _, _ in self._wrapped(scheme)]
        for batch in batches:
            inputs = [_tokens(5, module) for module in batch]
            wide = [*inputs, *(x.bfloat16() for x in inputs)]
            try:
                outputs = _inductor(batch, wide)
            except BackendCompilerFailed:
                # some of the C++ that it writes for bfloat16 is none, whatever the
                # scheme; that is no wrong result
                outputs = _inductor(batch, inputs)
            for index, (got, expected) in enumerate(outputs):
                module = batch[index % len(batch)]
                where = f"{scheme.name}: Inductor: {module}, {got.dtype}"
                self._expect_same(got, expected, where, ROUNDING_DB)

    # -- details -----------------------------------------------------------------------

    def _linears(self, scheme: Scheme, factor: float) -> list[nn.Module]:
        """Wrapped Linears of ragged shapes, if the scheme is for those at all."""
        if nn.Linear not in scheme.targets:
            return []
        shapes = [s for s in self._shapes(scheme) if len(s) == 2 and min(s) > 1]
        widest = sorted(shapes, key=lambda shape: (shape[1], shape))[-2:]
        made = []
        for n, k in widest:
            module = nn.Linear(k, n, device=self.device)
            with torch.no_grad():
                module.weight.copy_(self._weight((n, k)) * factor)
            made.append(self._wrap(scheme, module))
        return made


class _All(nn.Module):
    """Several modules, each with an input of its own."""

    def __init__(self, parts: nn.ModuleList) -> None:
        super().__init__()
        self.parts = parts

    def forward(self, inputs: list[Tensor]) -> list[Tensor]:
        """The modules in turn, as often as there are inputs."""
        parts = list(self.parts)
        return [
            torch.tanh(parts[index % len(parts)](x)) for index, x in enumerate(inputs)
        ]


def _inductor(
    batch: nn.ModuleList, inputs: list[Tensor]
) -> list[tuple[Tensor, Tensor]]:
    """Outputs of modules compiled by Inductor, and of the same ones not compiled."""
    torch.compiler.reset()
    run = torch.compile(_All(batch), fullgraph=True, backend="inductor")
    with torch.no_grad():
        return list(zip(run(inputs), _All(batch)(inputs), strict=True))


def _tokens(count: int, module: nn.Module) -> Tensor:
    weight: Any = module.weight
    random = torch.Generator().manual_seed(count)
    x = torch.randn(count, weight.shape[-1], generator=random, device="cpu")
    return x.to(weight.device)
