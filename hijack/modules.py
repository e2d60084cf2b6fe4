"""The generic wrapping of any module: its parameters, its forward, its construction.

A wrapped module keeps its object and gets a generated class. Its ``weight`` is a
`QuantizedTensor`, its forward a plain function of the class, because that alone
survives ``torch.compile``, export, deepcopy, ``torch.save`` and spawn, and costs
nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hijack.offloading  # noqa: F401 - weights that move to meta remember themselves
from hijack.claim import Claim
from hijack.collectives import distributed_data, load_shard
from hijack.dtypes import DENSE_DTYPES, autocast_dtype
from hijack.errors import (
    CheckpointError,
    DTypeError,
    HijackError,
    ModuleError,
    PluginError,
    SchemeError,
)
from hijack.formats import matching
from hijack.formats.dialect import native_claim
from hijack.formats.native_marker import METADATA_KEY, write_marker
from hijack.quantized import (
    QuantizationConfig,
    QuantizedTensor,
    check_shape,
    quantize_weight,
)
from hijack.recompute import is_wanted, recomputing
from hijack.registry import current_registry
from hijack.resharding import replace_weight
from hijack.safetensors_io.header import Header
from hijack.scheme import Scheme
from hijack.sharding import QuantizedShard, shard_of
from hijack.stored import StoredWeight, plain, recalled, refuse_raw

if TYPE_CHECKING:
    from hijack.registry import Registry

#: A bound forward: ``forward(module, input, weight, bias)``.
Forward = Callable[..., Any]


# -- what a wrapped module is ----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Origin:
    """What a wrapped module was before, kept as ``module._hijack``.

    Attributes:
        base: its class.
        requires_grad: whether its dense weight required a gradient.
    """

    base: type[nn.Module]
    requires_grad: bool = True


class Wrapped(nn.Module):
    """Mixed into the class of a module whose weight is quantized."""

    _hijack: Origin
    #: what was bound; None is the default, or the forward of the class itself
    _bound_forward: ClassVar[Forward | None] = None
    weight: nn.Parameter

    @property
    def compute_dtype(self) -> torch.dtype:
        """The dtype the module computes in; PEFT makes adapters of it."""
        return self.weight.dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move the quantized tensors with the module, but never cast them.

        torch would swap the old weight for the new one, which it refuses where the
        module was compiled.
        """
        weight: Any = self._parameters.get("weight")
        if not isinstance(weight, QuantizedTensor):
            return super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        moved = _moved(weight, fn)
        with _without_weight(self):
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self._parameters["weight"] = moved
        return self

    def _save_to_state_dict(
        self, destination: Any, prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight: Any = self._parameters.get("weight")
        shard = shard_of(weight)
        if shard is not None:
            data, weight = distributed_data(weight), shard.weight
        elif isinstance(weight, QuantizedTensor):
            data = StoredWeight.of(weight)
        else:
            return
        tensors = {**weight.plain_tensors(), "weight": data}
        for name, tensor in tensors.items():
            destination[prefix + name] = tensor if keep_vars else tensor.detach()
        # a state dict carries the marker a file would carry in its header
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:
            metadata[prefix[:-1]]["hijack"] = matching.marker_of(weight)

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """Take quantized tensors in any of the scheme's dialects, or a dense weight."""
        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        marker = local_metadata.get("hijack")
        try:
            rest, found = _take_weight(self, state_dict, prefix, assign, marker)
        except PluginError:
            raise
        except HijackError as error:
            error_msgs.append(str(error))
            return
        if not found and strict:
            missing_keys.append(f"{prefix}weight")
        with _without_weight(self):
            super()._load_from_state_dict(
                rest,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )

    def extra_repr(self) -> str:
        """The module's own description and its scheme."""
        own = super().extra_repr()
        weight = _quantized(self.__dict__["_parameters"].get("weight"))
        if weight is None:
            return own
        return f"{own}, scheme={weight.scheme.name}".removeprefix(", ")

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the generated class cannot be found by name, so pickle the way to make it
        reduced = super().__reduce_ex__(protocol)
        return (_unbound, (self._hijack.base,), *reduced[2:])

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        weight: Any = self._parameters.get("weight")
        kind, registry = _wrapped_class(self._hijack.base, None, ()), current_registry()
        if isinstance(weight, QuantizedTensor):
            kind = _class_for(self, self._hijack.base, weight, registry)
        self.__class__ = kind  # type: ignore[assignment]
        if isinstance(weight, QuantizedTensor):
            registry.notify_init(self, weight.scheme)


# -- becoming quantized, and dense again -----------------------------------------------


@dataclasses.dataclass(frozen=True)
class Change:
    """A module that is about to become quantized: all that can fail is done.

    Attributes:
        module: still as it was.
        origin: what it was before it was ever wrapped.
        weight: its weight to be, a Parameter.
        kind: its class to be.
        registry: whose plugins are told; None if they know the module already.
    """

    module: nn.Module
    origin: Origin
    weight: QuantizedTensor
    kind: type[nn.Module]
    registry: Registry | None

    def apply(self) -> Callable[[], None]:
        """Make the module quantized; nothing here is expected to fail.

        Returns:
            What makes the module again what it was.
        """
        module = self.module
        kind, origin = type(module), module.__dict__.get("_hijack")
        parameter: Any = self.weight
        old_weight = replace_weight(module, parameter)
        module.__dict__["_hijack"] = self.origin
        module.__class__ = self.kind

        def undo() -> None:
            old_weight()
            module.__class__ = kind
            if origin is None:
                module.__dict__.pop("_hijack", None)
            else:
                module.__dict__["_hijack"] = origin

        return undo

    def notify(self) -> None:
        """Tell plugins of the module.

        Raises:
            PluginError: if one fails and ``HIJACK_STRICT`` is set.
        """
        if self.registry is not None:
            self.registry.notify_init(self.module, self.weight.scheme)


def apply_all(changes: Iterable[Change], *, keep: bool = True) -> None:
    """Make modules quantized and tell plugins; if that fails, none has changed.

    Args:
        changes: made one after another, so that each may move its weight only then.
        keep: whether to keep the old weights until all is done, which undoing needs.
    """
    done: list[Change] = []
    undo: list[Callable[[], None]] = []
    try:
        for change in changes:
            restore = change.apply()
            done.append(change)
            if keep:
                undo.append(restore)
        for change in done:
            change.notify()
    except BaseException:
        for restore_one in reversed(undo):
            restore_one()
        raise


def prepare(
    module: nn.Module, weight: QuantizedTensor, registry: Registry | None = None
) -> Change:
    """Bind a forward for a module, without changing the module.

    Args:
        module: dense or wrapped, with a parameter ``weight``.
        weight: its quantized weight; a Parameter is shared as it is.
        registry: whose plugins choose the forward; None for the one in force.

    Raises:
        SchemeError: if the weight has a tensor whose name the module uses already.
        PluginError: if a plugin fails and ``HIJACK_STRICT`` is set.
    """
    registry = current_registry(registry)
    old: Any = module._parameters["weight"]
    is_quantized = isinstance(old, QuantizedTensor)
    # a host has put a quantized weight where the dense one would have been trainable
    origin = Origin(type(module), is_quantized or old.requires_grad)
    if isinstance(module, Wrapped):
        origin = module._hijack
    _check_names(module, origin.base, weight)
    if not isinstance(weight, nn.Parameter):
        weight = weight.as_parameter()
    if isinstance(module, Wrapped) and is_quantized and old.scheme is weight.scheme:
        kind = _wrapped_class(origin.base, _bound(module), tuple(weight.params))
        return Change(module, origin, weight, kind, None)
    kind = _class_for(module, origin.base, weight, registry)
    return Change(module, origin, weight, kind, registry)


def _check_names(
    module: nn.Module, base: type[nn.Module], weight: QuantizedTensor
) -> None:
    """Refuse tensors that would take the place of what the module has in files."""
    own = (module.__dict__, module._parameters, module._buffers, module._modules)
    for name in weight.params:
        ours = hasattr(Wrapped, name) or name.startswith("_hijack")
        if ours or hasattr(base, name) or any(name in names for names in own):
            raise SchemeError(
                f"scheme {weight.scheme.name} has a tensor named {name}, which "
                f"{base.__name__} has already; expected another name"
            )


def restore(module: nn.Module, weight: nn.Parameter) -> None:
    """Make a wrapped module dense, with ``weight`` as its weight."""
    origin: Origin = module.__dict__.pop("_hijack")
    module._parameters["weight"] = weight
    module.__class__ = origin.base


def dense_weight(module: nn.Module, dtype: torch.dtype | None = None) -> Tensor:
    """The decoded weight of a wrapped module.

    Args:
        module: a wrapped module.
        dtype: dtype of the result; default is that of the weight before it was wrapped.

    Returns:
        A tensor of the dense weight's shape, on the module's device.
    """
    weight: Any = module.weight
    if not isinstance(weight, QuantizedTensor):
        return weight if dtype is None else weight.to(dtype)  # type: ignore[no-any-return]
    return weight.dense(dtype)


def recreate(module: nn.Module) -> None:
    """Initialise a wrapped module anew, as its class initialises a dense one."""
    old: Any = module._parameters["weight"]
    base = module.__dict__["_hijack"].base
    answer = current_registry().create_params(module, old.scheme)
    if answer is None:
        blank = torch.empty(old.shape, dtype=old.dtype, device=old.device)
        standin: Any = _standin(module, base, nn.Parameter(blank))
        standin.reset_parameters()
        answer = quantize_weight(
            old.scheme, standin.weight.detach(), old.options, base.__name__
        )
    _set_quantized(module, old.replace(qdata=answer[0], params=answer[1]))


# -- classes ---------------------------------------------------------------------------


def _unbound(base: type[nn.Module]) -> nn.Module:
    """An empty module that becomes a wrapped one when its state is set."""
    return object.__new__(_wrapped_class(base, None, ()))


def _class_for(
    module: nn.Module,
    base: type[nn.Module],
    weight: QuantizedTensor,
    registry: Registry,
) -> type[nn.Module]:
    """The class of a module with a quantized weight: its forward is bound here."""
    bound = None
    if _runs_torch_forward(base, weight.scheme):
        bound = registry.bind_forward(module, weight.scheme)
    return _wrapped_class(base, bound, tuple(weight.params))


def _runs_torch_forward(base: type[nn.Module], scheme: Scheme) -> bool:
    """Whether a class does nothing in its forward but what a target type does."""
    if base.forward in _DEFAULTS:
        return True
    return any(
        issubclass(base, target) and base.forward is target.forward
        for target in scheme.targets
    )


_CLASSES: dict[Any, type[nn.Module]] = {}


def _wrapped_class(
    base: type[nn.Module], bound: Forward | None, names: tuple[str, ...]
) -> type[nn.Module]:
    key = base, bound, names
    if key not in _CLASSES:
        namespace: dict[str, Any] = {
            "forward": _make_forward(base, bound),
            "_bound_forward": None if bound is None else staticmethod(bound),
            "__module__": base.__module__,
            "__qualname__": base.__qualname__,
            # PEFT makes parts of adapters by ``type(layer)(...)``, which are dense
            "__new__": lambda cls, *args, **kwargs: base(*args, **kwargs),
        }
        if hasattr(base, "reset_parameters"):
            namespace["reset_parameters"] = recreate
        for name in names:  # for reading only; they are not attributes of the module
            if name.isidentifier() and not hasattr(base, name):
                namespace[name] = property(
                    functools.partial(_param, name), functools.partial(_keep, name)
                )
        # trainers look for layers by the name of their class
        kind = type(base.__name__, (Wrapped, base), namespace)
        return _CLASSES.setdefault(key, kind)
    return _CLASSES[key]


def _bound(module: Any) -> Forward | None:
    """The forward that was bound for a wrapped module, or None."""
    bound: Forward | None = module._bound_forward
    return bound


def _param(name: str, module: Any) -> Tensor:
    weight = _quantized(module._parameters.get("weight"))
    if weight is None:
        raise AttributeError(f"{type(module).__name__} has no attribute {name!r}")
    return weight.params[name]


def quantized_weight(module: nn.Module) -> QuantizedTensor | None:
    """The quantized weight of a module, or None if it has none."""
    return _quantized(module._parameters.get("weight"))


def _quantized(weight: Any) -> QuantizedTensor | None:
    """The quantized weight that a parameter is, is the data of, or is a shard of."""
    shard = shard_of(weight)
    weight = recalled(weight) if shard is None else shard.weight
    return weight if isinstance(weight, QuantizedTensor) else None


def _keep(name: str, module: Any, value: Tensor) -> None:
    """Accept what is there already: ``functional_call`` sets a whole state dict."""
    weight = _quantized(module._parameters.get("weight"))
    held = None if weight is None else weight.params.get(name)
    if held is None or not torch.equal(_bytes(held), _bytes(value)):
        raise ModuleError(
            f"{type(module).__name__}.{name}: cannot be set; it is a part of weight, "
            "expected another QuantizedTensor as weight, or load_state_dict"
        )


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


# -- forwards --------------------------------------------------------------------------


def _make_forward(base: type[nn.Module], bound: Forward | None) -> Forward:
    """The forward of a generated class.

    It hands the weight to the function that was bound. A weight that somebody made
    dense, such as by ``functional_call``, goes to the module's own forward.
    """
    chosen = _DEFAULTS.get(base.forward) if bound is None else bound
    own = base.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        weight = self.weight
        if not isinstance(weight, QuantizedTensor):
            weight = recalled(weight)
        if isinstance(weight, QuantizedTensor):
            if is_wanted(*args, *kwargs.values()):
                with recomputing():
                    return _standin_forward(self, weight, *args, **kwargs)
            return _standin_forward(self, weight, *args, **kwargs)
        return own(_checked_dense(self, weight), *args, **kwargs)

    def bound_forward(self: Any, input: Tensor, *args: Any, **kwargs: Any) -> Any:
        parameters = self._parameters  # torch looks there last, and takes its time
        weight = parameters.get("weight")
        if not isinstance(weight, QuantizedTensor):
            weight = recalled(self.weight)
        if isinstance(weight, QuantizedTensor):
            bias = parameters.get("bias")
            if bias is None:
                bias = getattr(self, "bias", None)
            if is_wanted(input):
                with recomputing():
                    return chosen(self, input, weight, bias, *args, **kwargs)  # type: ignore[misc]
            return chosen(self, input, weight, bias, *args, **kwargs)  # type: ignore[misc]
        return own(_checked_dense(self, weight), input, *args, **kwargs)

    return functools.wraps(own)(forward if chosen is None else bound_forward)


def _checked_dense(module: Any, weight: Tensor) -> Any:
    if weight.dtype not in DENSE_DTYPES:
        raise DTypeError(
            f"{type(module).__name__}: got a weight of {weight.dtype}, which is "
            "quantized data without its scheme, expected a QuantizedTensor or a dense "
            "weight; load it with load_state_dict or hijack.load"
        )
    return module


def default_forward(base: type[nn.Module]) -> Forward | None:
    """What a module computes if nothing else is bound, or None.

    Args:
        base: a class of modules.

    Returns:
        ``forward(module, input, weight, bias)``; None for a class with a forward of its
        own, which runs with the decoded weight.
    """
    return _DEFAULTS.get(base.forward)


def _input_dtype(input: Tensor, weight: Tensor) -> torch.dtype:
    """The dtype to decode a weight to, for a product with an input.

    Under autocast it is the one that autocast would cast the decoded weight to.
    """
    if not input.is_floating_point():
        return weight.dtype
    if input.dtype not in DENSE_DTYPES:
        raise DTypeError(
            f"forward: got an input of {input.dtype}, expected a dense floating dtype; "
            "cast it first"
        )
    cast = None if input.dtype == torch.float64 else autocast_dtype(input.device)
    return cast or input.dtype


def _in_dtype(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return bias if bias is None or bias.dtype == dtype else bias.to(dtype)


def linear_forward(
    module: Any, input: Tensor, weight: QuantizedTensor, bias: Tensor | None
) -> Tensor:
    """``F.linear`` with the decoded weight, in the input's dtype."""
    dtype = _input_dtype(input, weight)
    return F.linear(input, weight.dense(dtype), _in_dtype(bias, dtype))


def _conv_forward(
    module: Any, input: Tensor, weight: QuantizedTensor, bias: Tensor | None
) -> Tensor:
    dtype = _input_dtype(input, weight)
    result: Tensor = module._conv_forward(
        input, weight.dense(dtype), _in_dtype(bias, dtype)
    )
    return result


def _embedding_forward(
    module: Any, input: Tensor, weight: QuantizedTensor, bias: None
) -> Tensor:
    return F.embedding(
        input,
        weight.dense(),
        module.padding_idx,
        module.max_norm,
        module.norm_type,
        module.scale_grad_by_freq,
        module.sparse,
    )


def _standin_forward(
    module: Any, weight: QuantizedTensor, *args: Any, **kwargs: Any
) -> Any:
    """Run the module's own forward on a stand-in that holds the decoded weight.

    For modules whose forward hijack does not know. The stand-in shares everything else
    with the module, and two threads may call the module at once.
    """
    first = next((a for a in args if isinstance(a, Tensor)), None)
    dtype = weight.dtype if first is None else _input_dtype(first, weight)
    base = module._hijack.base
    return base.forward(_standin(module, base, weight.dense(dtype)), *args, **kwargs)


def _standin(module: Any, base: type[nn.Module], weight: Tensor) -> nn.Module:
    standin = base.__new__(base)
    standin.__dict__.update(module.__dict__)
    standin.__dict__["_parameters"] = {**module._parameters, "weight": weight}
    return standin


#: A module's own forward to one that takes the weight as it is now.
_DEFAULTS: dict[Forward, Forward] = {
    nn.Linear.forward: linear_forward,
    nn.Conv1d.forward: _conv_forward,
    nn.Conv2d.forward: _conv_forward,
    nn.Conv3d.forward: _conv_forward,
    nn.Embedding.forward: _embedding_forward,
}


# -- moving and loading ----------------------------------------------------------------


@contextlib.contextmanager
def _without_weight(module: nn.Module) -> Iterator[None]:
    """Have torch pass over the weight; it keeps its place among the parameters."""
    if "weight" not in module._parameters:  # it is parametrized
        yield
        return
    weight = module._parameters["weight"]
    module._parameters["weight"] = None
    try:
        yield
    finally:
        module._parameters["weight"] = weight


#: The function that is applied to a model, to old and new weight by the old one's id.
#: References are weak: a function that stays, such as ``torch.clone``, keeps no weight.
_MOVES: weakref.WeakKeyDictionary[Any, dict[int, tuple[Any, Any]]] = (
    weakref.WeakKeyDictionary()
)


def _moved(weight: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """The Parameter that takes a weight's place when a function is applied to it.

    Modules that share a weight go on sharing, for the function is the same for all.
    """
    known = _MOVES.setdefault(fn, {})
    old, new = known.get(id(weight), (None, None))
    if old is not None and old() is weight and new() is not None:
        return new()
    dtype = fn(torch.empty(0, dtype=weight.dtype, device=weight.device)).dtype
    if dtype not in DENSE_DTYPES:  # a cast to store it; it is small already
        dtype = weight.dtype
    changed = weight.map(fn)
    inner = zip(
        changed.plain_tensors().values(), weight.plain_tensors().values(), strict=True
    )
    if dtype == weight.dtype and all(new is old for new, old in inner):
        return weight
    moved = _parameter(changed.replace(dtype=dtype))
    known[id(weight)] = weakref.ref(weight), weakref.ref(moved)
    return moved


def _take_weight(
    module: Wrapped,
    state_dict: Mapping[str, Tensor],
    prefix: str,
    assign: bool,
    marker: Mapping[str, object] | None,
) -> tuple[dict[str, Tensor], bool]:
    """Load the weight of one wrapped module from a state dict.

    Args:
        module: the module; its weight may be replaced by one of another size.
        state_dict: full keys; the weight in any dialect of the scheme, dense, or none.
        prefix: the module's prefix, ending with a dot; "" for a root.
        assign: whether to take tensors as they are instead of copying.
        marker: what the state dict itself says of the layer, as `marker_of` gave it.

    Returns:
        The state dict without what was taken, and whether there was a weight.

    Raises:
        HijackError: if the tensors do not fit the module or each other.
    """
    if "weight" not in module._parameters:  # it is parametrized
        return dict(state_dict), True
    others = {prefix + name for name in (*module._parameters, *module._buffers)}
    others.discard(f"{prefix}weight")
    if all(key in others or not key.startswith(prefix) for key in state_dict):
        return dict(state_dict), False
    old: Any = module._parameters["weight"]
    shard = shard_of(old)
    if shard is not None:
        return _take_shard(shard, state_dict, prefix)
    if not isinstance(old, QuantizedTensor):  # somebody made it dense
        return _take_dense(module, state_dict, prefix, assign)
    scheme, where = old.scheme, prefix[:-1] or "weight"
    if isinstance(state_dict.get(f"{prefix}weight"), QuantizedTensor):
        return _take_quantized(module, state_dict, prefix, assign)
    refuse_raw({f"{prefix}weight": state_dict.get(f"{prefix}weight")})
    state_dict = {key: plain(tensor) for key, tensor in state_dict.items()}
    claim = _claim_to(old, state_dict, prefix, marker)
    key = prefix + "weight" if claim is None else claim.keys["weight"]
    weight = state_dict.get(key)
    if weight is None:
        return dict(state_dict), False
    if _is_dense(weight, old):
        beside = [name for name in old.params if prefix + name in state_dict]
        if beside:
            raise CheckpointError(
                f"{where}: got a dense weight ({weight.dtype}) beside {beside[0]} of a "
                "quantized one, expected one or the other; was something added to the "
                "quantized data? call hijack.unwrap first, then change the weight"
            )
        claim = None
    used = {key}
    answer = current_registry().create_params(module, scheme, prefix, state_dict)
    if answer is not None:
        quantized = answer
        used |= {prefix + name for name in answer[1]}
    elif claim is None:
        quantized = quantize_weight(scheme, weight, old.options, where)
    else:
        claim = claim.cropped(tuple(old.shape))
        used = set(claim.keys.values())
        quantized = matching.decode(scheme, claim, state_dict)
    config = old.config
    if claim is not None or answer is not None:
        stored = None if claim is None else claim.shape
        check_shape(scheme, quantized, tuple(old.shape), where, stored)
        options = {} if claim is None else matching.options_of(claim, scheme, quantized)
        config = QuantizationConfig.of(
            scheme, {**old.options, **options}, config.dialect
        )
    new = old.replace(qdata=quantized[0], params=quantized[1], config=config)
    if assign:
        module._parameters["weight"] = _parameter(new)
    else:
        _set_quantized(module, new)
    return {k: value for k, value in state_dict.items() if k not in used}, True


def _take_quantized(
    module: Wrapped, state_dict: Mapping[str, Tensor], prefix: str, assign: bool
) -> tuple[dict[str, Tensor], bool]:
    """Take a weight that is one tensor already; quantized anew it would be another."""
    rest = dict(state_dict)
    old: Any = module._parameters["weight"]
    new: Any = rest.pop(f"{prefix}weight")
    where = prefix[:-1] or "weight"
    if not old.scheme.is_like(new.scheme):
        raise CheckpointError(
            f"{where}: got tensors of scheme {new.scheme.name}, expected "
            f"{old.scheme.name}; use hijack.load, which changes the scheme"
        )
    if new.shape != old.shape:
        raise CheckpointError(
            f"{where}: got shape {tuple(new.shape)}, expected {tuple(old.shape)}; is "
            "this the right model for the file?"
        )
    new = new.for_module().replace(dtype=old.dtype)
    if assign:
        module._parameters["weight"] = _parameter(new)
    else:
        _set_quantized(module, new)
    return rest, True


def _take_shard(
    shard: QuantizedShard, state_dict: Mapping[str, Tensor], prefix: str
) -> tuple[dict[str, Tensor], bool]:
    names = ["weight", *shard.weight.params]
    tensors = {n: state_dict[prefix + n] for n in names if prefix + n in state_dict}
    if "weight" in tensors:
        load_shard(shard, tensors, prefix[:-1] or "weight")
    used = {prefix + name for name in names}
    rest = {key: tensor for key, tensor in state_dict.items() if key not in used}
    return rest, "weight" in tensors


def _claim_to(
    old: QuantizedTensor,
    state_dict: Mapping[str, Tensor],
    prefix: str,
    marker: Mapping[str, object] | None,
) -> Claim | None:
    """The claim of a layer's scheme to the tensors a state dict has for it.

    Raises:
        CheckpointError: if the state dict says they are another scheme's.
    """
    layer, scheme, metadata = prefix[:-1], old.scheme, {}
    weight = state_dict.get(f"{prefix}weight")
    if marker is not None and weight is not None and not _is_dense(weight, old):
        if marker.get("scheme") != scheme.name:
            raise CheckpointError(
                f"{layer or 'weight'}: got tensors of scheme {marker.get('scheme')}, "
                f"expected {scheme.name}; use hijack.load, which changes the scheme"
            )
        metadata = {METADATA_KEY: write_marker({layer: marker})}
    header = Header.from_state_dict(state_dict, metadata)
    claim = matching.recognise(scheme, header, layer)
    if claim is not None or any(prefix + name not in state_dict for name in old.params):
        return claim
    alike = all(
        state_dict[prefix + name].shape == tensor.shape
        for name, tensor in old.plain_tensors().items()
        if prefix + name in state_dict
    )
    # tensors like those that are here decode to a weight like the one that is here
    shape = tuple(old.shape) if alike else None
    return native_claim(layer, scheme.name, old.params, shape=shape)


def _is_dense(weight: Tensor, old: QuantizedTensor) -> bool:
    return weight.dtype in DENSE_DTYPES and weight.dtype != old.qdata.dtype


def _take_dense(
    module: Wrapped, state_dict: Mapping[str, Tensor], prefix: str, assign: bool
) -> tuple[dict[str, Tensor], bool]:
    rest = dict(state_dict)
    weight = rest.pop(f"{prefix}weight", None)
    if weight is None:
        return rest, False
    old: Any = module._parameters["weight"]
    if tuple(weight.shape) != tuple(old.shape):
        raise CheckpointError(
            f"{prefix}weight: got shape {tuple(weight.shape)}, expected "
            f"{tuple(old.shape)}; is this the right model for the file?"
        )
    if assign:
        module._parameters["weight"] = nn.Parameter(weight, old.requires_grad)
    else:
        with torch.no_grad():
            old.copy_(weight)
    return rest, True


def _set_quantized(module: nn.Module, new: QuantizedTensor) -> None:
    """Write into the tensors a module has, or replace them by some that fit."""
    old: Any = module._parameters["weight"]
    mine, theirs = old.plain_tensors(), new.plain_tensors()
    fits = mine.keys() == theirs.keys() and all(
        mine[name].shape == tensor.shape and mine[name].dtype == tensor.dtype
        for name, tensor in theirs.items()
    )
    if fits and not old.is_meta:
        with torch.no_grad():
            for name, tensor in theirs.items():
                mine[name].copy_(tensor)
        old.config = new.config
        return
    device = old.device
    moved = new.map(lambda tensor: tensor.detach().to(device, copy=True))
    module._parameters["weight"] = _parameter(moved)
    bound = new.params.keys() == old.params.keys()
    if not bound:  # the class has a property for each
        base = module.__dict__["_hijack"].base
        module.__class__ = _wrapped_class(base, _bound(module), tuple(new.params))


def _parameter(weight: QuantizedTensor) -> Any:
    return nn.Parameter(weight, requires_grad=False)


# -- construction ----------------------------------------------------------------------


def wrap_init(
    init: Callable[..., None],
    applies: Callable[[nn.Module], bool],
    born: Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None],
) -> Callable[..., None]:
    """Wrap an ``__init__`` so that modules are constructed on the meta device.

    Args:
        init: the ``__init__`` of the class that defines it.
        applies: whether a module is to be constructed so.
        born: called with module, args, kwargs and the device they asked for, when
            ``init`` has returned; once per object, also where base and subclass are
            both wrapped.

    Returns:
        A plain function to put in ``init``'s place.
    """
    signature = inspect.signature(init)

    @functools.wraps(init)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> None:
        if "_hijack_birth" in self.__dict__ or not applies(self):
            init(self, *args, **kwargs)
            return
        bound = signature.bind(self, *args, **kwargs)
        device = bound.arguments.get("device")
        if "device" in signature.parameters:
            bound.arguments["device"] = "meta"
        self.__dict__["_hijack_birth"] = True
        with torch.device("meta"):
            init(*bound.args, **bound.kwargs)
        del self.__dict__["_hijack_birth"]
        born(self, args, kwargs, device)

    return wrapper
