"""How the conformance kit fails a test, and how it compares quantized tensors."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from hijack.modules import Wrapped
from hijack.quantized import QuantizedTensor
from hijack.registry import (
    Registry,
    create_registry,
    current_registry,
    use_registry,
)
from hijack.scheme import Quantized, Scheme


def expect(condition: bool, message: str) -> None:
    """Fail the test with a message; works where pytest does not rewrite assertions."""
    __tracebackhide__ = True
    if not condition:
        raise AssertionError(message)


# -- comparing -------------------------------------------------------------------------


def equal(first: Quantized, second: Quantized) -> bool:
    """Whether quantized tensors agree in names, dtypes, shapes and every bit."""
    if describe(first) != describe(second):
        return False
    pairs = zip(_tensors(first), _tensors(second), strict=True)
    return all(same_bits(a, b) for a, b in pairs)


def describe(made: Quantized) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Names, dtypes and shapes of quantized tensors."""
    qdata, params = made
    named = {"weight": qdata, **params}
    return {name: (t.dtype, tuple(t.shape)) for name, t in sorted(named.items())}


def cloned(made: Quantized) -> Quantized:
    """A copy with memory of its own."""
    return made[0].clone(), {name: tensor.clone() for name, tensor in made[1].items()}


def same_bits(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and every bit."""
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    return torch.equal(_bits(first), _bits(second))


def same_numbers(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors agree in dtype, shape and all but the rounding of sums.

    One product need not have the same bits twice: libraries choose how to add up by the
    alignment of memory, and by what else runs.
    """
    if (first.dtype, first.shape) != (second.dtype, second.shape):
        return False
    if same_bits(first, second) or not first.is_floating_point():
        return same_bits(first, second)
    if first.element_size() == 1:
        return False
    difference = (first.detach().double() - second.detach().double()).norm()
    most = max(16 * torch.finfo(first.dtype).eps, 1e-6)
    return bool(difference <= most * first.detach().double().norm())


def _tensors(made: Quantized) -> list[Tensor]:
    return [made[0], *(made[1][name] for name in sorted(made[1]))]


def _bits(tensor: Tensor) -> Tensor:
    # torch compares neither NaN nor every FP8 dtype
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def never_worse_than_zero(weight: Tensor, dense: Tensor) -> bool:
    """Whether no error exceeds the largest value of the weight."""
    return (
        bool(torch.isfinite(dense).all())
        and weight.shape == dense.shape
        and float((weight - dense).abs().max()) <= float(weight.abs().max())
    )


def outcome(call: Callable[..., Any], *arguments: Any) -> Tensor | Exception:
    """The tensor that a call gives, or the error it raises."""
    try:
        result: Tensor = call(*arguments)
        return result
    except Exception as error:
        return error


# -- modules ---------------------------------------------------------------------------


def weight_of(module: nn.Module) -> nn.Parameter:
    """The parameter ``weight`` of a module."""
    weight: nn.Parameter = module._parameters["weight"]  # type: ignore[assignment]
    return weight


def quantized_of(module: nn.Module) -> Quantized:
    """The quantized tensors of a wrapped module, themselves."""
    weight: Any = weight_of(module)
    if not isinstance(weight, QuantizedTensor):
        raise AssertionError(f"{kind_of(module)}: is not quantized")
    return weight.qdata, weight.params


def kind_of(module: nn.Module) -> str:
    """The name of a module's class before it was wrapped."""
    kind = module._hijack.base if isinstance(module, Wrapped) else type(module)
    return kind.__name__


def anatomy(module: nn.Module) -> dict[str, object]:
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


# -- schemes ---------------------------------------------------------------------------


@contextlib.contextmanager
def registered(scheme: Scheme) -> Iterator[Scheme]:
    """Have a scheme in the registry in force for a while; its name may be taken."""
    registry = current_registry()
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


@contextlib.contextmanager
def alone(*schemes: Scheme) -> Iterator[Registry]:
    """A registry in force that holds these schemes and nothing else.

    Fails if any of their hooks or ``bind_forward`` failed meanwhile.
    """
    registry = create_registry()
    origins = {scheme: scheme.origin for scheme in schemes}
    try:
        for scheme in schemes:
            registry.register(scheme, scheme.origin or None)
        with use_registry(registry):
            yield registry
    finally:
        for scheme, origin in origins.items():
            scheme.origin = origin
    expect(
        not registry.problems,
        f"{schemes[0].name}: hooks: got {'; '.join(map(str, registry.problems))}, "
        "expected no failure",
    )


def second_instance(scheme: Scheme) -> Scheme | None:
    """Another instance of the scheme, as another process would make it; None if none.

    An instance whose name depends on what its constructor is given is another scheme.
    """
    try:
        other = type(scheme)()
    except TypeError:
        return None
    return other if other.name == scheme.name else None
