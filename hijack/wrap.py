"""Quantize modules in place, build them quantized, and make them dense again."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import threading
import weakref
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear
from torch.nn.utils import parametrize

from hijack.errors import HijackError, ModuleError, SchemeError
from hijack.module_names import adapter_parts, base_name
from hijack.modules import (
    Change,
    Wrapped,
    apply_all,
    dense_weight,
    prepare,
    restore,
    wrap_init,
)
from hijack.offloading import refuse_offloaded
from hijack.quantized import QuantizationConfig, QuantizedTensor, quantize_weight
from hijack.registry import Registry, current_registry
from hijack.resharding import is_gathered, whole
from hijack.safetensors_io.header import Header, join
from hijack.scheme import Scheme
from hijack.selection import (
    Choice,
    Patterns,
    Selection,
    asks_for_default,
    choose,
    listed,
)
from hijack.sharding import shard_of
from hijack.stacked import StackedWeight

M = TypeVar("M", bound=nn.Module)


@dataclasses.dataclass(frozen=True)
class WrapReport:
    """What `wrap_model` did.

    Attributes:
        layers: names of the modules that were quantized, in model order.
        skipped: name of every other target module, and why it was left as it was.
        bytes_before: size of the quantized modules' weights before.
        bytes_after: size of their quantized data and parameters.
    """

    layers: tuple[str, ...]
    skipped: Mapping[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        text = (
            f"{len(self.layers)} layers quantized, {len(self.skipped)} skipped, "
            f"{self.bytes_before:,} -> {self.bytes_after:,} bytes"
        )
        reasons = Counter(self.skipped.values()).most_common(3)
        return text + "".join(f"; {count}: {reason}" for reason, count in reasons)


# -- public operations -----------------------------------------------------------------


def wrap_module(
    module: M,
    scheme: str | Scheme,
    *,
    registry: Registry | None = None,
    **options: Any,
) -> M:
    """Quantize one module's weight in place.

    Args:
        module: a module of a type in ``scheme.targets``, with a floating ``weight``.
        scheme: a registered name, or a scheme.
        registry: whose schemes and plugins are asked; None for the one in force.
        **options: passed to ``scheme.quantize``, such as ``block_size``.

    Returns:
        The same object; ``weight`` is now a `QuantizedTensor`.

    Raises:
        UnknownSchemeError: if nobody registered that name.
        ModuleError: if the module is no target or is wrapped already.
        DTypeError: if the weight is not float16, bfloat16, float32 or float64.
        NonFiniteError: if the weight holds inf or NaN.
        HijackError: whatever else the scheme refuses. The module is then unchanged.
    """
    return wrap_layer(module, "", scheme, registry=registry, **options)


def wrap_layer(
    module: M,
    layer: str,
    scheme: str | Scheme,
    *,
    registry: Registry | None = None,
    **options: Any,
) -> M:
    """`wrap_module`, of a module with a name.

    Args:
        module: as for `wrap_module`.
        layer: its name in its model, for plugins and messages; "" is the root.
        scheme: as for `wrap_module`, as are the others.
        registry: whose schemes and plugins are asked; None for the one in force.
        **options: passed to ``scheme.quantize``.
    """
    registry = current_registry(registry)
    where, prefix = layer or type(module).__name__, f"{layer}." if layer else ""
    asked = registry.get(scheme)
    asked.check_options(options)
    refuse_offloaded(module, "wrap_module")
    chosen = _select(registry, module, prefix, asked)
    options = _options_for(chosen, asked, options)
    reason = _why_not(module, chosen, options)
    if reason is not None:
        raise ModuleError(f"{where}: cannot be wrapped with {chosen.name}; {reason}")
    weight = _quantized(registry, module, chosen, options, prefix, where)
    apply_all([prepare(module, weight, registry)])
    return module


def wrap_model(
    model: nn.Module,
    scheme: str | Scheme,
    include: Patterns = None,
    exclude: Patterns = None,
    *,
    registry: Registry | None = None,
    **options: Any,
) -> WrapReport:
    """Quantize every target layer of a model in place.

    Everything is quantized and every forward is bound before anything is changed, so a
    refusal leaves the model as it was; the dense weights are freed at the end. Weights
    shared by several modules stay shared. Adapters, such as those that PEFT puts around
    layers, are skipped; patterns find the layers inside by the names they had before.

    Args:
        model: any module; it may itself be a target.
        scheme: a registered name, or a scheme.
        include: fnmatch patterns on module names; None includes every target. In both
            lists ``"default"`` stands for what `quantize_file` takes if nothing is
            said: what is usual for the model's family.
        exclude: fnmatch patterns on module names to leave dense.
        registry: whose schemes and plugins are asked; None for the one in force.
        **options: passed to ``scheme.quantize``.

    Returns:
        Which layers were quantized, which were not and why.

    Raises:
        ModuleError: if a pattern of ``include`` matches no target module, or one of
            ``exclude`` no module.
        HijackError: as for `wrap_module`, naming the layer.
    """
    registry = current_registry(registry)
    chosen = registry.get(scheme)
    chosen.check_options(options)
    refuse_offloaded(model, "wrap_model")
    include, exclude = listed(include), listed(exclude)
    usual = _usual_layers(model, chosen, include, exclude, options)
    selection = Selection(include, exclude) if usual is None else Selection()
    targets = {n: m for n, m in model.named_modules() if isinstance(m, chosen.targets)}
    fused = _read_by_fast_path(model)
    where = f"those {chosen.name} can wrap"
    everything = [name for name, _ in model.named_modules()]
    everything += [base_name(name) for name in everything]
    names = [*targets, *map(base_name, targets)]
    vain = selection.unmatched(names, where, noun="module", others=everything)
    if vain is not None:
        raise ModuleError(vain)
    skipped: dict[str, str] = {}
    shared: dict[int, QuantizedTensor] = {}
    dense: dict[int, nn.Parameter] = {}
    changes: dict[str, Change] = {}
    adapters = adapter_parts(model)
    for name, module in targets.items():
        reason, prefix = selection.reason(name, base_name(name)), join(name, "")
        if usual is not None and base_name(name) not in usual.layers:
            reason = usual.skipped.get(base_name(name), "it is not usual for the model")
        if name in adapters:
            reason = f"it is a part of an adapter of {adapters[name]}"
        layer_scheme, given = chosen, options
        if reason is None:
            layer_scheme = _select(registry, module, prefix, chosen)
            given = _options_for(layer_scheme, chosen, options)
            reason = _why_not(module, layer_scheme, given)
        if reason is None and module in fused:
            reason = (
                "its parent (TransformerEncoderLayer) reads the weight itself; call "
                "torch.backends.mha.set_fastpath_enabled(False) first"
            )
        if reason is not None:
            skipped[name] = reason
            continue
        weight = _weight(module)
        if id(weight) not in shared:
            made = _quantized(registry, module, layer_scheme, given, prefix, name)
            # one Parameter for all who share the weight, so that they go on sharing
            parameter: Any = nn.Parameter(made, requires_grad=False)
            shared[id(weight)], dense[id(weight)] = parameter, weight
        changes[name] = prepare(module, shared[id(weight)], registry)
    before = sum(_nbytes(weight) for weight in dense.values())
    apply_all(changes.values())
    after = sum(_nbytes(*w.plain_tensors().values()) for w in shared.values())
    return WrapReport(tuple(changes), skipped, before, after)


def unwrap(module: M) -> M:
    """Make a module, or every wrapped module in a model, dense again.

    Class, ``__dict__`` and parameters are then those of a module never wrapped; the
    weight is the dequantized one.

    Args:
        module: a wrapped module, or a model; one without wrapped modules is unchanged.

    Returns:
        The same object.

    Raises:
        ModuleError: if a weight is sharded over processes, or offloaded by hooks.
    """
    refuse_offloaded(module, "unwrap")
    dense: dict[int, nn.Parameter] = {}
    for name, part in module.named_modules():
        if isinstance(part, Wrapped) and shard_of(part.weight) is not None:
            raise ModuleError(
                f"{name or type(part).__name__}: got a weight that is sharded over "
                "processes, expected a whole one; call hijack.unwrap before sharding"
            )
    for part in list(module.modules()):
        _decode_stacks(part, dense)
        if not isinstance(part, Wrapped):
            continue
        quantized = part.weight
        if id(quantized) not in dense:
            with torch.no_grad():
                weight = dense_weight(part).detach()
            dense[id(quantized)] = nn.Parameter(weight, part._hijack.requires_grad)
        restore(part, dense[id(quantized)])
    return module


def _decode_stacks(module: nn.Module, dense: dict[int, nn.Parameter]) -> None:
    """Make parameters dense that are stacks of quantized weights."""
    for name, stack in list[Any](module._parameters.items()):
        if isinstance(stack, StackedWeight):
            if id(stack) not in dense:
                dense[id(stack)] = nn.Parameter(stack.value().detach())
            module._parameters[name] = dense[id(stack)]


@contextlib.contextmanager
def building(
    scheme: str | Scheme,
    include: Patterns = None,
    exclude: Patterns = None,
    *,
    registry: Registry | None = None,
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
        registry: whose schemes and plugins are asked; None for the one in force.
        **options: passed to ``scheme.quantize``.

    Raises:
        ModuleError: at the end, if modules were constructed and a pattern matches none.
        HijackError: whatever the scheme refuses.
    """
    registry = current_registry(registry)
    chosen = registry.get(scheme)
    chosen.check_options(options)
    include, exclude = listed(include), listed(exclude)
    if asks_for_default(include, exclude):
        raise ModuleError(
            "building: got the pattern 'default', expected patterns on module names; "
            "what is usual for a model is known once it is built: call wrap_model then"
        )
    deferred = _DeferredModules(chosen, registry, Selection(include, exclude), options)
    with deferred.collecting():
        yield
    deferred.materialize()


# -- details ---------------------------------------------------------------------------


#: Where a module that is being built keeps its `_Call`, for copies of it to have it.
_CALL = "_hijack_call"


@dataclasses.dataclass(frozen=True, eq=False)
class _Call:
    """How a module was constructed, and the device it shall be on."""

    module: weakref.ref[nn.Module]
    builder: _DeferredModules
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    device: torch.device

    def __deepcopy__(self, memo: dict[int, Any]) -> _Call:
        copied = weakref.ref(memo[id(self.module())])  # no constructor ran for it
        self.builder.modules.append(copied)
        return dataclasses.replace(self, module=copied)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()  # a file knows of no context


class _DeferredModules:
    """The modules constructed on meta inside one ``building`` context."""

    def __init__(
        self,
        scheme: Scheme,
        registry: Registry,
        selection: Selection,
        options: dict[str, Any],
    ) -> None:
        self.scheme, self.registry = scheme, registry
        self.selection, self.options = selection, options
        self.owners = {_owner(target, "__init__") for target in scheme.targets}
        self.collects = False
        self.modules: list[weakref.ref[nn.Module]] = []

    @contextlib.contextmanager
    def collecting(self) -> Iterator[None]:
        """Collect what is constructed inside, in this thread or task alone.

        Tasks that are started inside inherit the context and may outlive it, and two
        contexts need not end in the order in which they began: what counts is
        ``collects``, and that each context takes out itself alone.
        """
        with _patched_constructors(self.owners | {nn.Module}):
            _BUILDING.set((self, *_active()))
            self.collects = True
            try:
                yield
            except BaseException:
                for _, module in self._named():
                    vars(module).pop(_CALL, None)
                raise
            finally:
                self.collects = False
                _BUILDING.set(_active())

    def applies(self, module: nn.Module) -> bool:
        """Whether a module is to be constructed on meta."""
        return isinstance(module, self.scheme.targets) and not isinstance(
            module, NonDynamicallyQuantizableLinear | LazyModuleMixin
        )

    def constructed(
        self,
        module: nn.Module,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        device: torch.device | str | None,
    ) -> None:
        """Remember how a module was constructed, and where it shall be."""
        # an empty tensor knows the default of a surrounding context, in every torch
        where = torch.empty(0).device if device is None else torch.device(device)
        vars(module)[_CALL] = _Call(weakref.ref(module), self, args, kwargs, where)

    def _named(self) -> list[tuple[str, nn.Module]]:
        """All modules that were constructed, and copies of them, by their names."""
        alive = [module for ref in self.modules if (module := ref()) is not None]
        children = {id(c) for m in alive for c in m.children()}
        roots = [m for m in alive if id(m) not in children]
        return [pair for root in roots for pair in root.named_modules()]

    def materialize(self) -> None:
        """Give every collected module its parameters, by its name in its model."""
        outer = _BUILDING.set(())  # what is constructed here is for no other context
        try:
            self._materialize()
        finally:
            _BUILDING.reset(outer)

    def _materialize(self) -> None:
        named = self._named()
        pending: dict[nn.Module, tuple[str, _Call]] = {}
        for name, module in named:
            call = vars(module).get(_CALL)
            if call is not None and call.builder is self:
                pending.setdefault(module, (name, call))
        vain = self.selection.unmatched(
            [name for name, _ in pending.values()],
            f"those {self.scheme.name} can wrap",
            noun="module",
            others=[name for name, _ in named],
        )
        if pending and vain is not None:
            raise ModuleError(vain)
        # everything is prepared before the first module is changed
        shared = _Shared()
        planned = {
            module: self._change(name, module, call.device, shared)
            for module, (name, call) in pending.items()
        }
        apply_all(change for change in planned.values() if change is not None)
        for module, change in planned.items():
            call = vars(module).pop(_CALL)
            if change is None:
                _fill_from_fresh(module, call, shared)
            elif call.device.type != "meta":
                _fill_with_zeros(module, call.device)

    def _change(
        self, name: str, module: nn.Module, device: torch.device, shared: _Shared
    ) -> Change | None:
        """What makes a module quantized; None if it is left out."""
        prefix, scheme = f"{name}." if name else "", self.scheme
        options = self.options
        left_out = self.selection.reason(name)
        if left_out is None:
            scheme = _select(self.registry, module, prefix, scheme)
            options = _options_for(scheme, self.scheme, options)
            left_out = _why_not(module, scheme, options)
        if left_out is not None:
            return None

        def quantized() -> Any:
            where = name or type(module).__name__
            weight = _quantized(
                self.registry, module, scheme, options, prefix, where, device
            )
            return nn.Parameter(weight, requires_grad=False)

        weight = shared.instead(_weight(module), quantized, "quantized")
        return prepare(module, weight, self.registry)


class _Shared:
    """What takes the place of parameters, once for all modules that share one."""

    def __init__(self) -> None:
        self._made: dict[tuple[int, str], tuple[Tensor, Any]] = {}

    def instead(self, tensor: Tensor, make: Callable[[], Any], kind: str) -> Any:
        """What takes the place of a tensor, made the first time."""
        key = id(tensor), kind
        if key not in self._made:
            self._made[key] = tensor, make()  # a tensor that lives keeps its id
        return self._made[key][1]


#: The contexts of `building` in this thread or task, the innermost first.
_BUILDING: contextvars.ContextVar[tuple[_DeferredModules, ...]] = (
    contextvars.ContextVar("hijack_building", default=())
)
#: Constructors that are patched: the original, and for how many contexts of any thread.
_PATCHED: dict[type, _Patch] = {}
_PATCHING = threading.Lock()


@dataclasses.dataclass
class _Patch:
    """One class's constructor."""

    original: Callable[..., None]
    replacement: Callable[..., None]
    users: int = 0


def _active() -> tuple[_DeferredModules, ...]:
    """The contexts of this thread or task that have not ended."""
    return tuple(builder for builder in _BUILDING.get() if builder.collects)


@contextlib.contextmanager
def _patched_constructors(owners: Collection[type]) -> Iterator[None]:
    """Have constructors ask the contexts of `building` that they are called in."""
    with _PATCHING:
        for owner in owners:
            found, patch = vars(owner)["__init__"], _PATCHED.get(owner)
            if patch is None or not (patch.users or patch.replacement is found):
                patch = _PATCHED[owner] = _Patch(found, _asking(owner, found))
                setattr(owner, "__init__", patch.replacement)  # noqa: B010
            patch.users += 1
    try:
        yield
    finally:
        with _PATCHING:
            for owner in owners:
                patch = _PATCHED[owner]
                patch.users -= 1
                # Another program may have patched it meanwhile, and take its patch out
                # later: ours stays below it, does nothing, and goes the next time.
                if not patch.users and vars(owner)["__init__"] is patch.replacement:
                    setattr(owner, "__init__", patch.original)  # noqa: B010
                    del _PATCHED[owner]


def _asking(owner: type, original: Callable[..., None]) -> Callable[..., None]:
    """What a class's ``__init__`` becomes while models are being built."""

    def builder_of(module: nn.Module) -> _DeferredModules | None:
        fitting = (b for b in _active() if owner in b.owners)
        return next((b for b in fitting if b.applies(module)), None)

    def born(module: nn.Module, *call: Any) -> None:
        builder = builder_of(module)
        if builder is not None:
            builder.constructed(module, *call)

    init = wrap_init(original, lambda m: builder_of(m) is not None, born)
    if owner is not nn.Module:
        return init

    def record(module: nn.Module, *args: Any, **kwargs: Any) -> None:
        for builder in _active():
            builder.modules.append(weakref.ref(module))
        init(module, *args, **kwargs)

    return functools.wraps(original)(record)


def _fill_with_zeros(module: nn.Module, device: torch.device) -> None:
    """Give what a quantized module still has on meta a place, for a checkpoint."""
    for key, tensor in [*module._parameters.items(), *module._buffers.items()]:
        if key == "weight" or tensor is None or not tensor.is_meta:
            continue
        zeros = torch.zeros_like(tensor, device=device)
        if isinstance(tensor, nn.Parameter):
            module._parameters[key] = nn.Parameter(zeros, tensor.requires_grad)
        else:
            module._buffers[key] = zeros


def _fill_from_fresh(module: nn.Module, call: _Call, shared: _Shared) -> None:
    """Initialise a module that was constructed on meta, keeping what was set on it."""
    fresh = type(module).__new__(type(module))
    fresh.__init__(*call.args, **call.kwargs)  # type: ignore[misc]
    for mine, theirs in (
        (module._parameters, fresh._parameters),
        (module._buffers, fresh._buffers),
    ):
        for key in theirs:
            current = mine.get(key)
            if current is not None and current.is_meta:
                fresh_one = functools.partial(theirs.get, key)
                mine[key] = shared.instead(current, fresh_one, "fresh")


def _owner(cls: type, name: str) -> type:
    """The class in ``cls``'s line that defines ``name`` itself."""
    return next(base for base in cls.__mro__ if name in vars(base))


def _weight(module: nn.Module) -> nn.Parameter:
    weight: nn.Parameter = module._parameters["weight"]  # type: ignore[assignment]
    return weight


def _usual_layers(
    model: nn.Module,
    scheme: Scheme,
    include: Patterns,
    exclude: Patterns,
    options: Mapping[str, Any],
) -> Choice | None:
    """The layers that are quantized where a pattern asks for what is usual, else None.

    Raises:
        CheckpointError: if a pattern matches no layer, or no layer is left.
    """
    if not asks_for_default(include, exclude):
        return None
    state = {base_name(key): tensor for key, tensor in model.state_dict().items()}
    return choose(
        Header.from_state_dict(state),
        scheme.targets,
        include,
        exclude,
        declines=lambda shape, own: _declined(scheme, shape, options),
    )


def _select(
    registry: Registry, module: nn.Module, prefix: str, scheme: Scheme
) -> Scheme:
    """The scheme a module gets: what was asked for, unless a plugin says otherwise."""
    answer = registry.select_scheme(module, prefix, None)
    return answer if isinstance(answer, Scheme) else scheme


def _quantized(
    registry: Registry,
    module: nn.Module,
    scheme: Scheme,
    options: Mapping[str, Any],
    prefix: str,
    where: str,
    device: torch.device | None = None,
) -> QuantizedTensor:
    """A module's weight, quantized, or zeroed on a device if it is on meta."""
    weight = whole(_weight(module))
    answer = registry.create_params(module, scheme, prefix)
    if answer is None and weight.is_meta and device is not None:
        scheme.check_options(options)
        answer = scheme.create_params(
            tuple(weight.shape), weight.dtype, device, **options
        )
    if answer is None:
        answer = quantize_weight(scheme, weight, options, where)
    config = QuantizationConfig.of(scheme, options)
    return QuantizedTensor(
        answer[0], answer[1], config, tuple(weight.shape), weight.dtype
    )


def _why_not(
    module: nn.Module, scheme: Scheme, options: Mapping[str, Any]
) -> str | None:
    """Why a module cannot be wrapped with a scheme, or None."""
    if isinstance(module, Wrapped):
        weight: Any = module._parameters["weight"]
        name = weight.scheme.name if isinstance(weight, QuantizedTensor) else "a scheme"
        return f"it is wrapped with {name} already; unwrap it first"
    if not isinstance(module, scheme.targets):
        names = ", ".join(target.__name__ for target in scheme.targets)
        return f"{type(module).__name__} is no target; expected one of {names}"
    if isinstance(module, NonDynamicallyQuantizableLinear):
        return "its parent (MultiheadAttention) reads the weight itself; leave it dense"
    if isinstance(module, LazyModuleMixin):
        return "it is lazy; run the model once first"
    if parametrize.is_parametrized(module, "weight"):
        return "its weight is parametrized; remove the parametrization first"
    weight = module._parameters.get("weight")
    if weight is None:
        return "it has no parameter named weight"
    if is_gathered(module):
        return (
            "FSDP has gathered its weight; call reshard() on the sharded module first"
        )
    return _declined(scheme, tuple(weight.shape), options)


def _declined(
    scheme: Scheme, shape: tuple[int, ...], options: Mapping[str, Any]
) -> str | None:
    """Why a scheme declines a layer, or None."""
    try:
        reason = scheme.declines(shape, **options)
    except HijackError:
        raise
    except Exception as error:
        raise SchemeError(
            f"scheme {scheme.name}: declines cannot be asked about a weight of shape "
            f"{shape} with options {dict(options)}; {type(error).__name__}: {error}"
        ) from error
    if reason is not None and not isinstance(reason, str):
        raise SchemeError(
            f"scheme {scheme.name}: declines gave {reason!r}, expected a reason in "
            "words, or None"
        )
    return reason


def _options_for(
    scheme: Scheme, asked: Scheme, options: dict[str, Any]
) -> dict[str, Any]:
    """The options for a layer; those of another scheme only where both have them."""
    if scheme is asked:
        return options
    known = {option.name for option in scheme.declared_options()}
    return {name: value for name, value in options.items() if name in known}


def _read_by_fast_path(model: nn.Module) -> set[nn.Module]:
    """Modules whose weight torch's fused encoder layer reads behind their back."""
    if not torch.backends.mha.get_fastpath_enabled():
        return set()
    layers = (m for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer))
    return {part for layer in layers for part in (layer.linear1, layer.linear2)}


def _nbytes(*tensors: Tensor) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
