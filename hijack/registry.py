"""The typed façade over pluggy, and the only user of ``pm.hook``."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import logging
import os
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import pluggy
from torch import Tensor, nn

from hijack.errors import (
    DuplicateSchemeError,
    PluginError,
    SchemeError,
    UnknownSchemeError,
)
from hijack.formats.claim import Claim
from hijack.hooks import PROJECT, HookSpecs
from hijack.safetensors_io.header import Header
from hijack.scheme import Scheme

log = logging.getLogger(__name__)

_T = TypeVar("_T")


def strict() -> bool:
    """Whether ``HIJACK_STRICT`` asks for errors instead of log lines."""
    return os.environ.get("HIJACK_STRICT", "") not in ("", "0")


def disabled(name: str) -> bool:
    """Whether ``HIJACK_DISABLE`` (a comma list, or ``*``) names a host or scheme."""
    names = {part.strip() for part in os.environ.get("HIJACK_DISABLE", "").split(",")}
    return "*" in names or name in names


@dataclasses.dataclass(frozen=True)
class Problem:
    """A plugin that failed, and how; shown by ``hijack doctor``."""

    plugin: str
    doing: str
    error: Exception

    def __str__(self) -> str:
        kind = type(self.error).__name__
        return f"plugin {self.plugin}: {self.doing}: {kind}: {self.error}"


class Registry:
    """Schemes and plugins, and the questions asked of them.

    Make one with `create_registry`; applications use `default_registry`.
    """

    def __init__(self, *, entry_points: bool = False) -> None:
        self._pm = pluggy.PluginManager(PROJECT)
        self._pm.add_hookspecs(HookSpecs)
        self._schemes: dict[str, Scheme] = {}
        self._pending_entry_points = entry_points
        self.problems: list[Problem] = []

    # -- registration ------------------------------------------------------------------

    def register(self, scheme: Scheme, origin: str | None = None) -> Scheme:
        """Add a scheme and return it.

        Args:
            scheme: an instance of a `Scheme` subclass.
            origin: where it comes from, for people; default is its module.

        Raises:
            SchemeError: if it is not a scheme, or has no usable name.
            DuplicateSchemeError: if the name is taken.
        """
        _check_scheme(scheme)
        self.load_entry_points()
        taken = self._schemes.get(scheme.name)
        if taken is not None:
            raise DuplicateSchemeError(
                f"scheme {scheme.name!r} of {type(scheme).__module__} is already "
                f"registered from {taken.origin}; unregister that one first, or give "
                "yours another name"
            )
        scheme.origin = origin or type(scheme).__module__
        self._schemes[scheme.name] = scheme
        if not disabled(
            scheme.name
        ):  # a disabled scheme can be used, but claims nothing
            self._pm.register(scheme, name=f"scheme:{scheme.name}")
        return scheme

    def unregister(self, name: str) -> Scheme:
        """Remove a scheme and return it; modules already wrapped with it keep working.

        Raises:
            UnknownSchemeError: if no scheme has that name.
        """
        scheme = self.get(name)
        if self._pm.is_registered(scheme):
            self._pm.unregister(scheme)
        del self._schemes[name]
        return scheme

    def add_plugin(self, plugin: object, name: str) -> None:
        """Add a plugin object and let it register its schemes.

        Raises:
            PluginError: if pluggy refuses it or a scheme it registers is refused;
                nothing of it stays behind.
        """
        before = set(self._schemes)
        try:
            self._pm.register(plugin, name=name)
            self._pm.check_pending()
            for impl in self._pm.hook.hijack_register_schemes.get_hookimpls():
                if impl.plugin is plugin:
                    impl.function(*(self for _ in impl.argnames))
        except Exception as error:
            for scheme_name in set(self._schemes) - before:
                self.unregister(scheme_name)
            if self._pm.has_plugin(name):
                self._pm.unregister(name=name)
            raise PluginError(
                f"plugin {name}: cannot be added; {type(error).__name__}: {error}"
            ) from error

    def load_entry_points(self) -> None:
        """Load the plugins of installed distributions, once, each in its own try."""
        if not self._pending_entry_points:
            return
        self._pending_entry_points = False
        # all before the first is loaded: what it imports may change how the rest are
        # found; and once, where a folder is on the path under two names
        found = {
            (entry.name, entry.value): entry
            for dist in list(importlib.metadata.distributions())
            for entry in dist.entry_points
            if entry.group == PROJECT and not disabled(entry.name)
        }
        for entry in found.values():
            if not self._pm.has_plugin(entry.name):
                self._guard(entry.name, "loading", self._load_entry_point, entry)

    def _load_entry_point(self, entry: importlib.metadata.EntryPoint) -> None:
        plugin = entry.load()
        if isinstance(plugin, type) and issubclass(plugin, Scheme):
            plugin = plugin()
        if isinstance(plugin, Scheme):
            self.register(plugin, origin=f"entry point {entry.name} = {entry.value}")
        else:
            self.add_plugin(plugin, entry.name)

    # -- look-up -----------------------------------------------------------------------

    def get(self, scheme: str | Scheme) -> Scheme:
        """The scheme of that name; a scheme itself is returned as it is.

        Raises:
            UnknownSchemeError: listing the names that are known.
        """
        if isinstance(scheme, Scheme):
            return scheme
        self.load_entry_points()
        try:
            return self._schemes[scheme]
        except KeyError:
            known = ", ".join(sorted(self._schemes)) or "none"
            raise UnknownSchemeError(
                f"unknown scheme {scheme!r}; registered are: {known}; import the "
                "module that registers it, or install the plugin"
            ) from None

    def schemes(self) -> dict[str, Scheme]:
        """Name to scheme; each scheme's ``origin`` says where it came from."""
        self.load_entry_points()
        return dict(self._schemes)

    # -- decisions ---------------------------------------------------------------------

    def identify(self, header: Header) -> list[Claim]:
        """All claims of all plugins to the layers of a checkpoint."""
        self.load_entry_points()
        claims: list[Claim] = []
        for impl in self._pm.hook.hijack_identify.get_hookimpls():
            answer = self._guard(
                impl.plugin_name, "identify", impl.function, header=header
            )
            claims.extend(answer if isinstance(answer, list) else ())
        return claims

    def select_scheme(
        self, module: nn.Module, prefix: str, state_dict: Mapping[str, Tensor]
    ) -> Claim | None:
        """The claim to one module's tensors, or None."""
        self.load_entry_points()
        claim: Claim | None = self._pm.hook.hijack_select_scheme(
            module=module, prefix=prefix, state_dict=state_dict
        )
        return claim

    def notify_init(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        """Tell plugins of a module constructed inside ``building``."""
        self._pm.hook.hijack_init(module=module, args=args, kwargs=kwargs)

    def create_params(
        self,
        module: nn.Module,
        scheme: Scheme,
        prefix: str = "",
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]] | None:
        """A plugin's quantized tensors for a module, or None for the scheme's own."""
        made: tuple[Tensor, dict[str, Tensor]] | None = (
            self._pm.hook.hijack_create_params(
                module=module, scheme=scheme, prefix=prefix, state_dict=state_dict
            )
        )
        if made is None and not self._pm.is_registered(scheme):
            made = scheme.hijack_create_params(module, scheme, prefix, state_dict)
        return made

    def bind_forward(
        self, module: nn.Module, scheme: Scheme
    ) -> Callable[..., Tensor] | None:
        """The forward a plugin chose for a module, or None for the default."""
        bound: Callable[..., Tensor] | None = self._pm.hook.hijack_bind_forward(
            module=module, scheme=scheme
        )
        if bound is None and not self._pm.is_registered(scheme):
            bound = scheme.bind_forward(module)
        return bound

    def host_patched(self, host: str, version: str) -> None:
        """Tell all plugins, present and future, that a host was patched."""
        self._pm.hook.hijack_host_patched.call_historic(
            kwargs={"host": host, "version": version}
        )

    # -- failing plugins ---------------------------------------------------------------

    def _guard(
        self,
        plugin: str,
        doing: str,
        call: Callable[..., _T],
        *args: Any,
        **kwargs: Any,
    ) -> _T | None:
        """Run a plugin's code; a failure is logged and kept, or raised if strict."""
        try:
            return call(*args, **kwargs)
        except Exception as error:
            problem = Problem(plugin, doing, error)
            if strict():
                raise PluginError(str(problem)) from error
            self.problems.append(problem)
            log.warning("hijack: %s", problem)
            return None


def _check_scheme(scheme: object) -> None:
    if isinstance(scheme, type) and issubclass(scheme, Scheme):
        raise SchemeError(
            f"register: got the class {scheme.__name__}, expected an instance; "
            f"write register({scheme.__name__}())"
        )
    if not isinstance(scheme, Scheme):
        raise SchemeError(
            f"register: got {type(scheme).__name__}, expected an instance of a "
            "hijack.Scheme subclass"
        )
    name = getattr(scheme, "name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise SchemeError(
            f"register: {type(scheme).__name__}.name is {name!r}, expected letters, "
            "digits and underscores"
        )


def create_registry(*, entry_points: bool = False) -> Registry:
    """A fresh registry, such as a test makes for itself.

    Args:
        entry_points: whether to load the plugins of installed distributions.
    """
    return Registry(entry_points=entry_points)


@functools.cache
def default_registry() -> Registry:
    """The registry behind ``hijack.register`` and everything that names a scheme."""
    return Registry(entry_points=True)


def register(scheme: Scheme) -> Scheme:
    """Add a scheme to the default registry and return it.

    Raises:
        SchemeError: if it is not a scheme, or has no usable name.
        DuplicateSchemeError: if the name is taken.
    """
    return default_registry().register(scheme)


def unregister(name: str) -> Scheme:
    """Remove a scheme from the default registry and return it.

    Raises:
        UnknownSchemeError: if no scheme has that name.
    """
    return default_registry().unregister(name)


def schemes() -> dict[str, Scheme]:
    """Name to scheme in the default registry; ``scheme.origin`` says where from."""
    return default_registry().schemes()
