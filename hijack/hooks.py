"""The contract: which questions hijack asks its plugins, and when.

A plugin is any object whose methods are marked with `hookimpl`. Plugins decide once per
file, module or host. What they answer is bound, so no hook runs in a forward.

In every host the questions about one module come in this order:
``hijack_select_scheme``, ``hijack_create_params``, ``hijack_bind_forward``, and, once
the module has changed, ``hijack_init``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from torch import Tensor, nn

    from hijack.claim import Claim
    from hijack.registry import Registry
    from hijack.safetensors_io.header import Header
    from hijack.scheme import Scheme

__all__ = ["PROJECT", "HookSpecs", "hookimpl", "hookspec"]

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
    def hijack_identify(self, header: Header) -> list[Claim] | None:
        """Claim layers of a checkpoint.

        Called once per file or state dict; every plugin is asked, and all claims are
        weighed against each other and against those of the registered schemes. Tensor
        data must not be read.

        Args:
            header: keys, dtypes, shapes and metadata of the checkpoint.

        Returns:
            One claim for each layer the plugin can read; an empty list for none.
        """

    @hookspec(firstresult=True)
    def hijack_select_scheme(
        self, module: nn.Module, prefix: str, header: Header | None
    ) -> Claim | Scheme | str | None:
        """Say which scheme a module gets, instead of the one that was decided.

        Called once per module that may be quantized, when its scheme is decided: by a
        file, by ``wrap_module`` and ``wrap_model``, by ``building``, or by a host's
        nodes. The first answer other than None wins.

        Args:
            module: the module; its weight may be missing, or on the meta device.
            prefix: the module's key prefix, ending with a dot; "" for a root.
            header: of the file or state dict the layer comes from, as far as the host
                knows it; None where no file decides.

        Returns:
            With a header, a claim to the layer that says how to read it. Without one, a
            scheme or the name of one. None keeps what was decided.
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

        Called whenever a module gets quantized tensors, whatever the trigger: wrapping,
        construction inside ``hijack.building``, ``reset_parameters``, loading a file or
        a state dict.

        Args:
            module: the module. If it is dense, ``module.weight`` has the dense shape;
                it is on meta while the module is being constructed.
            scheme: the scheme that was chosen for it.
            prefix: key prefix in ``state_dict``, ending with a dot; "" for a root.
            state_dict: where the tensors come from; None if from no state dict.

        Returns:
            ``(qdata, {name: tensor})``, or None for the scheme's own answer.
        """

    @hookspec(firstresult=True)
    def hijack_bind_forward(
        self, module: nn.Module, scheme: Scheme
    ) -> Callable[..., Tensor] | None:
        """Choose the forward of a module.

        Called once per module, when it becomes quantized, is copied or unpickled; never
        per call. Not called for a module whose class has a forward of its own: that one
        runs, with the decoded weight.

        Args:
            module: the module, before it changes.
            scheme: its scheme.

        Returns:
            A plain function ``forward(module, input, weight, bias)``, the same object
            for all modules that can share it. ``weight`` is a `QuantizedTensor` with
            what is there now: in a host, what was just moved to the input's device.
            None takes the default, which computes with ``weight.dense(input.dtype)``.
        """

    @hookspec
    def hijack_init(self, module: nn.Module, scheme: Scheme) -> None:
        """See a module that has just become quantized.

        Called once per object, copies and unpickled ones included.

        Args:
            module: the module, with its quantized weight and its forward.
            scheme: its scheme.
        """

    @hookspec(historic=True)
    def hijack_host_patched(self, host: str, version: str) -> None:
        """Learn that a host was patched.

        Called after each successful patch; a plugin registered later is told too.

        Args:
            host: name of the host, such as ``"comfyui"``.
            version: the version found.
        """
