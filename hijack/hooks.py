"""The contract: which questions hijack asks its plugins, and when.

A plugin is any object whose methods are marked with `hookimpl`; a `hijack.Scheme` is one
already. Plugins decide once per file, module or host. What they answer is bound, so no
hook runs in a forward.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import pluggy
from torch import Tensor, nn

if TYPE_CHECKING:
    from hijack.checkpoint.dialect import Claim
    from hijack.checkpoint.header import Header
    from hijack.registry import Registry
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

        Called once per module while a state dict is loaded, by hosts that load module by
        module. The first answer other than None wins.

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
