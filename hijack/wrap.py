"""Quantize modules in place, build them quantized, and make them dense again."""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from hijack.errors import ModuleError
from hijack.hooks import Layer, Wrapped, dense_weight, wrap_init
from hijack.layers import Quantized, install, quantize_weight, restore
from hijack.registry import default_registry
from hijack.scheme import Scheme

M = TypeVar("M", bound=nn.Module)
Patterns = str | Sequence[str] | None


@dataclasses.dataclass(frozen=True)
class WrapReport:
    """What `wrap_model` did.

    Attributes:
        layers: names of the modules that were quantized, in model order.
        skipped: name of every other target module, and why it was left dense.
        bytes_before: size of the quantized modules' weights before.
        bytes_after: size of their codes and parameters.
    """

    layers: tuple[str, ...]
    skipped: Mapping[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        return (
            f"{len(self.layers)} layers quantized, {len(self.skipped)} left dense, "
            f"{self.bytes_before:,} -> {self.bytes_after:,} bytes"
        )


# -- public operations -----------------------------------------------------------------


def wrap_module(module: M, scheme: str | Scheme, **options: Any) -> M:
    """Quantize one module's weight in place.

    Args:
        module: a module of a type in ``scheme.targets``, with a floating ``weight``.
        scheme: a registered name, or a scheme.
        **options: passed to ``scheme.quantize``, such as ``block_size``.

    Returns:
        The same object; ``weight`` now holds the codes.

    Raises:
        UnknownSchemeError: if nobody registered that name.
        ModuleError: if the module is no target or is wrapped already.
        DTypeError: if the weight is not float16, bfloat16, float32 or float64.
        NonFiniteError: if the weight holds inf or NaN.
        HijackError: whatever else the scheme refuses. The module is then unchanged.
    """
    chosen = default_registry().get(scheme)
    where = type(module).__name__
    reason = _why_not(module, chosen)
    if reason is not None:
        raise ModuleError(f"{where}: cannot be wrapped with {chosen.name}; {reason}")
    weight = _weight(module)
    made = quantize_weight(chosen, weight, options, where)
    _install(module, chosen, weight, made, options)
    return module


def wrap_model(
    model: nn.Module,
    scheme: str | Scheme,
    include: Patterns = None,
    exclude: Patterns = None,
    **options: Any,
) -> WrapReport:
    """Quantize every target layer of a model in place.

    Everything is quantized before anything is changed, so a refusal leaves the model as
    it was; the dense weights are freed at the end. Weights shared by several modules
    stay shared.

    Args:
        model: any module; it may itself be a target.
        scheme: a registered name, or a scheme.
        include: fnmatch patterns on module names; None includes every target.
        exclude: fnmatch patterns on module names to leave dense.
        **options: passed to ``scheme.quantize``.

    Raises:
        ModuleError: if an include pattern matches no target module.
        HijackError: as for `wrap_module`, naming the layer.
    """
    chosen = default_registry().get(scheme)
    include, exclude = _held(include), _held(exclude)
    targets = {n: m for n, m in model.named_modules() if isinstance(m, chosen.targets)}
    fused = _read_by_fast_path(model)
    _check_patterns(include, targets, chosen)
    skipped: dict[str, str] = {}
    quantized: dict[int, Quantized] = {}
    todo: dict[str, nn.Module] = {}
    for name, module in targets.items():
        reason = _left_out(name, include, exclude) or _why_not(module, chosen)
        if reason is None and module in fused:
            reason = (
                "its parent (TransformerEncoderLayer) reads the weight itself; call "
                "torch.backends.mha.set_fastpath_enabled(False) first"
            )
        if reason is not None:
            skipped[name] = reason
            continue
        weight = _weight(module)
        if id(weight) not in quantized:
            qdata, params = quantize_weight(chosen, weight, options, name)
            # one Parameter for all who share the weight, so that they go on sharing
            codes = nn.Parameter(qdata, requires_grad=False)
            quantized[id(weight)] = codes, params
        todo[name] = module
    dense = {id(weight): weight for weight in map(_weight, todo.values())}
    before = sum(_nbytes(weight) for weight in dense.values())
    for module in todo.values():
        weight = _weight(module)
        _install(module, chosen, weight, quantized[id(weight)], options)
    after = sum(_nbytes(q, *params.values()) for q, params in quantized.values())
    return WrapReport(tuple(todo), skipped, before, after)


def unwrap(module: M) -> M:
    """Make a module, or every wrapped module in a model, dense again.

    Class, ``__dict__`` and parameters are then those of a module never wrapped; the
    weight is the dequantized one.

    Args:
        module: a wrapped module, or a model; one without wrapped modules is unchanged.

    Returns:
        The same object.
    """
    dense: dict[int, nn.Parameter] = {}
    for part in list(module.modules()):
        if not isinstance(part, Wrapped):
            continue
        codes = part.weight
        if id(codes) not in dense:
            with torch.no_grad():
                weight = dense_weight(part)
            dense[id(codes)] = nn.Parameter(weight, part._hijack.requires_grad)
        restore(part, dense[id(codes)])
    return module


@contextlib.contextmanager
def building(
    scheme: str | Scheme,
    include: Patterns = None,
    exclude: Patterns = None,
    **options: Any,
) -> Iterator[None]:
    """Construct modules that are quantized from birth.

    Inside the context, modules of the target types are constructed on the meta device,
    so that no dense weight is allocated and initialising code runs for nothing. When it
    ends they get zeroed quantized parameters, ready for a checkpoint; those that
    patterns leave out are initialised by their own class.

    Args:
        scheme: a registered name, or a scheme.
        include: fnmatch patterns on module names, counted from the outermost module
            constructed inside; None includes every target.
        exclude: fnmatch patterns on module names to leave dense.
        **options: passed to ``scheme.quantize``.

    Raises:
        HijackError: whatever the scheme refuses.
    """
    chosen = default_registry().get(scheme)
    nursery = _Nursery(chosen, _held(include), _held(exclude), options)
    with nursery.open():
        yield
    nursery.settle()


def matches(name: str, patterns: Patterns) -> bool:
    """Whether a module name matches any of the fnmatch patterns."""
    listed = [patterns] if isinstance(patterns, str) else patterns or ()
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in listed)


# -- details ---------------------------------------------------------------------------


class _Nursery:
    """The modules constructed inside one ``building`` context."""

    def __init__(
        self,
        scheme: Scheme,
        include: Patterns,
        exclude: Patterns,
        options: dict[str, Any],
    ) -> None:
        self.scheme, self.include, self.exclude = scheme, include, exclude
        self.options = options
        self.modules: list[weakref.ref[nn.Module]] = []
        self.births: dict[
            int, tuple[tuple[Any, ...], dict[str, Any], torch.device]
        ] = {}

    @contextlib.contextmanager
    def open(self) -> Iterator[None]:
        """Patch the constructors of the target types, and that of every module."""
        owners = {_owner(target, "__init__") for target in self.scheme.targets}
        patched = {
            owner: wrap_init(vars(owner)["__init__"], self._applies, self._born)
            for owner in owners
        }
        patched[nn.Module] = self._recording(patched.get(nn.Module, nn.Module.__init__))
        with contextlib.ExitStack() as undo:
            for owner, init in patched.items():
                undo.callback(setattr, owner, "__init__", vars(owner)["__init__"])
                setattr(owner, "__init__", init)  # noqa: B010 - a class is patched
            yield

    def _applies(self, module: nn.Module) -> bool:
        return isinstance(module, self.scheme.targets) and not isinstance(
            module, NonDynamicallyQuantizableLinear | LazyModuleMixin
        )

    def _recording(self, init: Any) -> Any:
        def wrapper(module: nn.Module, *args: Any, **kwargs: Any) -> None:
            self.modules.append(weakref.ref(module))
            init(module, *args, **kwargs)

        return wrapper

    def _born(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        device: torch.device | str | None,
    ) -> None:
        # an empty tensor knows the default of a surrounding context, in every torch
        where = torch.empty(0).device if device is None else torch.device(device)
        self.births[id(module)] = args, kwargs, where
        default_registry().notify_init(module, args, kwargs)

    def settle(self) -> None:
        """Give every module born inside its parameters, by its name in its model."""
        alive = [module for ref in self.modules if (module := ref()) is not None]
        children = {id(c) for m in alive for c in m.children()}
        for root in (m for m in alive if id(m) not in children):
            for name, module in root.named_modules():
                if id(module) in self.births:
                    self._settle_one(name, module)

    def _settle_one(self, name: str, module: nn.Module) -> None:
        args, kwargs, device = self.births.pop(id(module))
        left_out = _left_out(name, self.include, self.exclude)
        if left_out is not None or _why_not(module, self.scheme) is not None:
            _fill_from_fresh(module, args, kwargs)
            return
        where = name or type(module).__name__
        weight = _weight(module)
        made = default_registry().create_params(module, self.scheme)
        if made is None:
            shape = tuple(weight.shape)
            made = self.scheme.create_params(
                shape, weight.dtype, device, **self.options
            )
        elif not weight.is_meta:  # the model put a weight of its own there
            made = quantize_weight(self.scheme, weight, self.options, where)
        _install(module, self.scheme, weight, made, self.options)
        for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
            if tensor is not None and tensor.is_meta and device.type != "meta":
                zeros = torch.zeros_like(tensor, device=device)
                if isinstance(tensor, nn.Parameter):
                    module._parameters[key] = nn.Parameter(zeros, tensor.requires_grad)
                else:
                    module._buffers[key] = zeros


def _fill_from_fresh(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    """Initialise a module that was constructed on meta, keeping what was set on it."""
    fresh = type(module).__new__(type(module))
    fresh.__init__(*args, **kwargs)  # type: ignore[misc]
    for mine, theirs in (
        (module._parameters, fresh._parameters),
        (module._buffers, fresh._buffers),
    ):
        for key, tensor in theirs.items():
            current = mine.get(key)
            if current is not None and current.is_meta:
                mine[key] = tensor  # type: ignore[assignment]


def _owner(cls: type, name: str) -> type:
    """The class in ``cls``'s line that defines ``name`` itself."""
    return next(base for base in cls.__mro__ if name in vars(base))


def _weight(module: nn.Module) -> nn.Parameter:
    weight: nn.Parameter = module._parameters["weight"]  # type: ignore[assignment]
    return weight


def _install(
    module: nn.Module,
    scheme: Scheme,
    weight: nn.Parameter,
    made: Quantized,
    options: Mapping[str, Any],
) -> None:
    layer = Layer(
        scheme=scheme,
        base=type(module),
        shape=tuple(weight.shape),
        dtype=weight.dtype,
        options=dict(options),
        requires_grad=weight.requires_grad,
    )
    install(module, layer, *made)


def _why_not(module: nn.Module, scheme: Scheme) -> str | None:
    """Why a module cannot be wrapped with a scheme, or None."""
    if isinstance(module, Wrapped):
        return (
            f"it is wrapped with {module._hijack.scheme.name} already; unwrap it first"
        )
    if not isinstance(module, scheme.targets):
        names = ", ".join(target.__name__ for target in scheme.targets)
        return f"{type(module).__name__} is no target; expected one of {names}"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "its parent (MultiheadAttention) reads the weight itself; leave it dense"
    if isinstance(module, LazyModuleMixin):
        return "it is lazy; run the model once first"
    if parametrize.is_parametrized(module, "weight"):
        return "its weight is parametrized; remove the parametrization first"
    if module._parameters.get("weight") is None:
        return "it has no parameter named weight"
    return None


def _read_by_fast_path(model: nn.Module) -> set[nn.Module]:
    """Modules whose weight torch's fused encoder layer reads behind their back."""
    if not torch.backends.mha.get_fastpath_enabled():
        return set()
    layers = (m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer))
    return {part for layer in layers for part in (layer.linear1, layer.linear2)}


def _held(patterns: Patterns) -> Patterns:
    """Patterns that can be gone through many times, unlike those of an iterator."""
    if patterns is None or isinstance(patterns, str):
        return patterns
    return list(patterns)


def _left_out(name: str, include: Patterns, exclude: Patterns) -> str | None:
    if include is not None and not matches(name, include):
        return "not included"
    if matches(name, exclude):
        return "excluded"
    return None


def _check_patterns(
    include: Patterns, targets: Mapping[str, nn.Module], scheme: Scheme
) -> None:
    listed = [include] if isinstance(include, str) else include or ()
    for pattern in listed:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in targets):
            some = ", ".join(list(targets)[:5]) or "none"
            raise ModuleError(
                f"include: pattern {pattern!r} matches no module {scheme.name} can "
                f"wrap; the model has {len(targets)}, such as {some}"
            )


def _nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
