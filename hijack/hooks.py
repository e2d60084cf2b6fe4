"""The contract: which questions hijack asks its plugins, and when.

A plugin is any object whose methods are marked with `hookimpl`; a `hijack.Scheme` is
one already. Plugins decide once per file, module or host. What they answer is bound, so
no hook runs in a forward.

Below the contract stands the generic wrapping it serves: `Wrapped` is mixed into the
class of any module to take over parameters and forward, `wrap_init` takes over its
construction.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy
import torch
from torch import Tensor, nn

from hijack.errors import HijackError
from hijack.forwards import default_forward, dense_weight

__all__ = [
    "PROJECT",
    "HookSpecs",
    "Layer",
    "Wrapped",
    "bind",
    "dense_weight",
    "hookimpl",
    "hookspec",
    "wrap_init",
]

if TYPE_CHECKING:
    from hijack.formats.claim import Claim
    from hijack.registry import Registry
    from hijack.safetensors_io.header import Header
    from hijack.scheme import Scheme

#: Name of the pluggy project and of the entry-point group.
PROJECT = "hijack"

hookspec = pluggy.HookspecMarker(PROJECT)
hookimpl = pluggy.HookimplMarker(PROJECT)


class HookSpecs:
    """Every hook there is. All are called through `hijack.registry.Registry`."""

    @hookspec
    def hijack_register_schemes(self, registry: Registry) -> None:
        """Register schemes: call ``registry.register(scheme)`` for each.

        Called once per plugin, when the plugin is registered. A distribution implements
        this in the module its entry point names.

        Args:
            registry: the registry the plugin was added to.
        """

    @hookspec
    def hijack_identify(self, header: Header) -> list[Claim]:
        """Claim layers of a checkpoint.

        Called once per file or state dict; every plugin is asked and all claims are
        weighed against each other. Tensor data must not be read.

        Args:
            header: keys, dtypes, shapes and metadata of the checkpoint.

        Returns:
            One claim for each layer the plugin can read; an empty list for none.
        """

    @hookspec(firstresult=True)
    def hijack_select_scheme(
        self, module: nn.Module, prefix: str, state_dict: Mapping[str, Tensor]
    ) -> Claim | None:
        """Say which scheme, if any, reads one module's tensors.

        Called once per module while a state dict is loaded, by hosts that load module
        by module. The first answer other than None wins.

        Args:
            module: the module about to load; its weight may be missing or on meta.
            prefix: the module's key prefix, ending with a dot; "" for a root.
            state_dict: full key to tensor; must not be changed.

        Returns:
            The claim to that layer, or None to let another plugin answer.
        """

    @hookspec
    def hijack_init(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """See a module that was just constructed to be quantized.

        Called once per object, inside ``hijack.building``, after ``__init__`` of the
        class the scheme targets returned; its parameters are on the meta device.

        Args:
            module: the new module.
            args: positional arguments of its ``__init__``, without self.
            kwargs: keyword arguments of its ``__init__``.
        """

    @hookspec(firstresult=True)
    def hijack_create_params(
        self,
        module: nn.Module,
        scheme: Scheme,
        prefix: str,
        state_dict: Mapping[str, Tensor] | None,
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        """Make a module's quantized tensors.

        Called whenever a module needs them, whatever the trigger: construction inside
        ``hijack.building``, ``reset_parameters``, or loading a state dict.

        Args:
            module: the module; ``module.weight`` has the dense shape, and is on meta
                when the module is being constructed.
            scheme: the scheme that was chosen for it.
            prefix: key prefix in ``state_dict``, ending with a dot; "" for a root.
            state_dict: where the tensors come from; None asks for new, zeroed ones.

        Returns:
            ``(qdata, {name: tensor})``, or None for the scheme's own answer.
        """

    @hookspec(firstresult=True)
    def hijack_bind_forward(
        self, module: nn.Module, scheme: Scheme
    ) -> Callable[..., Tensor] | None:
        """Choose the forward of a wrapped module.

        Called once per module, when it is wrapped, copied or unpickled; never per call.

        Args:
            module: the module, with its quantized tensors in place.
            scheme: its scheme.

        Returns:
            A plain function taking the module and forward's own arguments, the same
            object for all modules that can share it; None for the default, which
            dequantizes the weight and runs the module's own forward.
        """

    @hookspec(historic=True)
    def hijack_host_patched(self, host: str, version: str) -> None:
        """Learn that a host was patched.

        Called after each successful patch; a plugin registered later is told too.

        Args:
            host: name of the host, such as ``"comfyui"``.
            version: the version found.
        """


# -- the generic wrapping: parameters and forward --------------------------------------


@dataclasses.dataclass
class Layer:
    """What hijack remembers of one wrapped module, as ``module._hijack``.

    Attributes:
        scheme: how the weight is coded.
        base: the module's class before it was wrapped.
        shape: shape of the dense weight.
        dtype: dtype of the dense weight; follows ``.to(dtype)``.
        names: buffers that hold the scheme's parameters.
        options: options of ``scheme.quantize``.
        dialect: dialect of the file the layer came from, or None.
        requires_grad: whether the dense weight required a gradient.
    """

    scheme: Scheme
    base: type[nn.Module]
    shape: tuple[int, ...]
    dtype: torch.dtype
    names: tuple[str, ...] = ()
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    dialect: str | None = None
    requires_grad: bool = True


class Wrapped(nn.Module):
    """Mixed into the class of a module whose weight is quantized.

    ``weight`` holds the codes, buffers beside it the scheme's other tensors.
    ``forward`` is a plain function of the generated class, because that alone survives
    ``torch.compile``, export, deepcopy, ``torch.save`` and spawn, and costs nothing.
    """

    _hijack: Layer
    weight: nn.Parameter

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        """Move the quantized tensors with the module, but never cast them.

        Codes cast without their scale are garbage, so what ``fn`` would do to them is
        tried on an empty tensor first.
        """
        layer = self._hijack
        weight = self.weight
        own = {id(weight), *(id(self._buffers[name]) for name in layer.names)}

        def guarded(tensor: Tensor) -> Tensor:
            if id(tensor) not in own:
                return fn(tensor)
            probe = fn(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            return (
                fn(tensor) if probe.dtype == tensor.dtype else tensor.to(probe.device)
            )

        dense = fn(torch.empty(0, dtype=layer.dtype, device=weight.device))
        super()._apply(guarded, recurse)  # type: ignore[no-untyped-call]
        layer.dtype = dense.dtype
        return self

    def _save_to_state_dict(
        self, destination: Any, prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # a state dict carries the marker a file would carry in its header
        metadata = getattr(destination, "_metadata", None)
        if metadata is not None:
            layer = self._hijack
            marker = {"scheme": layer.scheme.name, "params": list(layer.names)}
            metadata[prefix[:-1]]["hijack"] = marker

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
        from hijack.layers import take_tensors

        assign = bool(local_metadata.get("assign_to_params_buffers", False))
        try:
            given: dict[str, Any] = take_tensors(self, state_dict, prefix, assign)
        except HijackError as error:
            error_msgs.append(str(error))
            return
        super()._load_from_state_dict(
            given,
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
        return f"{own}, scheme={self._hijack.scheme.name}".removeprefix(", ")

    def __reduce_ex__(self, protocol: Any) -> Any:
        # the generated class cannot be found by name, so pickle the way to make it
        reduced = super().__reduce_ex__(protocol)
        return (_unbound, (self._hijack.base,), *reduced[2:])

    def __setstate__(self, state: Any) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        bind(self)


def _unbound(base: type[nn.Module]) -> nn.Module:
    """An empty module that becomes a wrapped one when its state is set."""
    unbound = _wrapped_class(base, "unbound", base.forward)
    return unbound.__new__(unbound)


def _wrapped_class(
    base: type[nn.Module], scheme_name: str, forward: Callable[..., Any]
) -> type[nn.Module]:
    key = base, scheme_name, forward
    if key not in _CLASSES:
        _CLASSES[key] = _make_class(*key)
    return _CLASSES[key]


_CLASSES: dict[tuple[type, str, Callable[..., Any]], type[nn.Module]] = {}


def _make_class(
    base: type[nn.Module], scheme_name: str, forward: Callable[..., Any]
) -> type[nn.Module]:
    namespace: dict[str, Any] = {"forward": forward, "__module__": __name__}
    if hasattr(base, "reset_parameters"):
        namespace["reset_parameters"] = _reset_parameters
    return type(f"{base.__name__}_{scheme_name}", (Wrapped, base), namespace)


def bind(module: nn.Module) -> None:
    """Give a module with quantized tensors the class that knows their forward."""
    from hijack.registry import default_registry

    layer: Layer = module.__dict__["_hijack"]
    forward = default_registry().bind_forward(module, layer.scheme)
    if forward is None:
        forward = default_forward(layer.base)
    module.__class__ = _wrapped_class(layer.base, layer.scheme.name, forward)


def _reset_parameters(self: Any) -> None:
    """Initialise anew: create quantized parameters as the module's class would."""
    from hijack.layers import recreate

    recreate(self)


# -- the generic wrapping: construction ------------------------------------------------


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
