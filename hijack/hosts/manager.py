"""One `Control` per host: when to patch it, whether it may be, and what came of it.

Hosts are plugins: every package in this folder is an adapter of one, and so is what
the entry points of group ``hijack.hosts`` of any distribution name.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import pkgutil
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any, cast

import wrapt

from hijack.errors import PatchError
from hijack.hosts.adapter import Adapter, tested
from hijack.imports import initializing, when_initialized
from hijack.patching import PatchSet
from hijack.registry import current_registry, disabled, strict
from hijack.text import logger

log = logger(__name__)


@dataclasses.dataclass(frozen=True)
class HostStatus:
    """Where hijack stands with a host.

    Attributes:
        host: its name.
        version: the version found; None while it is not imported.
        patched: whether hijack's patches are on.
        reason: why not, in one sentence; what is worth knowing if they are.
        foreign: others who patched the same attributes, one sentence each.
        live: modules of the host that hold quantized weights.
        patches: what hijack has replaced, by its name in the host.
    """

    host: str
    version: str | None
    patched: bool
    reason: str
    foreign: tuple[str, ...] = ()
    live: int = 0
    patches: tuple[str, ...] = ()

    def __str__(self) -> str:
        state = "patched" if self.patched else "not patched"
        lines = [f"{self.host} {self.version or ''}".strip() + f": {state}"]
        lines[0] += f" ({self.reason})" if self.reason else ""
        return "\n".join([*lines, *(f"  {sentence}" for sentence in self.foreign)])


class Control:
    """Patches one host, now or when it is imported, and takes the patches out."""

    def __init__(self, name: str, load: Callable[[], Adapter]) -> None:
        self.name = name
        self._load = load
        self._adapter: Adapter | None = None
        self._patches: PatchSet | None = None
        self._armed = False
        self._watching = False
        self._awaited: ModuleType | None = None  # whose import is to end
        self._reason = "not armed; call hijack.patch"
        self._lock = threading.RLock()

    @property
    def adapter(self) -> Adapter:
        """The adapter.

        Raises:
            Exception: whatever its module raises when it is imported.
        """
        if self._adapter is None:
            self._adapter = self._load()
        return self._adapter

    def available(self) -> bool:
        """Whether there is an adapter; what its module raised is kept and logged.

        Raises:
            PluginError: if it raised and ``HIJACK_STRICT`` is set.
        """
        guard = current_registry().guard
        return guard(f"host {self.name}", "loading", lambda: self.adapter) is not None

    def status(self) -> HostStatus:
        """Where hijack stands with the host."""
        if not self.available():
            reason = "its adapter cannot be loaded; see `hijack doctor`"
            return HostStatus(self.name, None, False, reason)
        imported = _imported(self.adapter.MODULE)
        patches, gone = self._patches, self.restored()
        reason = self._reason
        if gone:
            reason = (
                f"{', '.join(gone)}: ours was taken out by somebody; call hijack.patch "
                "to put it back"
            )
        return HostStatus(
            self.name,
            self.adapter.get_version() if imported else None,
            patches is not None and patches.applied and not gone,
            reason,
            tuple(map(str, patches.foreign())) if patches is not None else (),
            self.adapter.live(),
            () if patches is None or not patches.applied else _names(patches),
        )

    def restored(self) -> list[str]:
        """Dotted names of what hijack patched and somebody has restored."""
        return [] if self._patches is None else self._patches.gone()

    def in_force(self, where: str) -> bool:
        """Whether hijack's patch of what has that dotted name is on."""
        return self._patches is not None and self._patches.in_force(where)

    # -- patching ----------------------------------------------------------------------

    def arm(self) -> None:
        """Patch the host now, or as soon as it is imported.

        Raises:
            PatchError: if that fails at once and ``HIJACK_STRICT`` is set.
        """
        with self._lock:
            if disabled(self.name):
                self._reason = "disarmed by HIJACK_DISABLE"
                return
            if not self.available():
                return
            self._armed = True
            module = sys.modules.get(self.adapter.MODULE)
            if module is None:
                self._reason = f"waiting for {self.adapter.MODULE} to be imported"
                self._watch()
            elif initializing(module):
                self._reason = f"waiting until {self.adapter.MODULE} is imported"
                if self._awaited is not module:
                    self._awaited = module
                    when_initialized(module, self._import_ended)
            else:
                self._try_patch()

    def _watch(self) -> None:
        if not self._watching:  # wrapt cannot forget a hook: register it once
            self._watching = True
            wrapt.register_post_import_hook(self._imported, self.adapter.MODULE)

    def _imported(self, module: ModuleType) -> None:
        with self._lock:
            self._awaited = None
            if self._armed:
                self._try_patch()

    def _import_ended(self, succeeded: bool) -> None:
        with self._lock:
            module, self._awaited = self._awaited, None
            if succeeded and module is not None:
                self._imported(module)
            elif self._armed:  # it may be imported again
                self._reason = f"waiting for {self.adapter.MODULE} to be imported"
                self._watch()

    def _try_patch(self) -> None:
        try:
            self._patch()
        except Exception as error:
            known, self._reason = self._reason, f"{error}" or type(error).__name__
            if strict():
                raise
            if self._reason != known:  # said when somebody else armed it
                log.warning("hijack: %s not patched: %s", self.name, self._reason)

    def _patch(self) -> None:
        if self._patches is not None and self._patches.applied and not self.restored():
            return
        problems = [probe.problem() for probe in self.adapter.PROBES]
        version = self.adapter.get_version()
        for problem in problems:
            if problem is not None:
                raise PatchError(f"{self.name} {version}: {problem}")
        if self._patches is None:
            self._patches = PatchSet(())
        if not self._patches.applied:
            self._patches.patches = tuple(self.adapter.patches())
        self._patches.apply()
        self._reason = ""
        if not tested(version, self.adapter.SUPPORTED):
            first, last = self.adapter.SUPPORTED
            self._reason = (
                f"version not tested, which is {first} to {last}; probes passed"
            )
        log.info(
            "hijack %s: %s %s patched%s: %s",
            getattr(sys.modules.get("hijack"), "__version__", ""),
            self.name,
            version,
            f" ({self._reason})" if self._reason else "",
            ", ".join(_names(self._patches)),
        )
        for foreign in self._patches.foreign():
            log.warning("hijack: %s", foreign)
        self._announce(version)

    def _announce(self, version: str) -> None:
        try:
            current_registry().host_patched(self.name, version)
        except Exception as error:  # a plugin's failure must not stop the host
            if strict():
                raise
            log.warning(
                "hijack: hijack_host_patched: %s: %s", type(error).__name__, error
            )

    def disarm(self, force: bool) -> None:
        """Take the patches out, and do not patch when the host is imported.

        Raises:
            PatchError: if the host holds quantized modules, and not ``force``.
        """
        with self._lock:
            live = self.adapter.live()
            if live and not force:
                raise PatchError(
                    f"{self.name}: {live} quantized modules are alive; unload their "
                    "models first, or call unpatch with force=True, which leaves them "
                    "working"
                )
            self._armed = False
            self._reason = "unpatched"
            if self._patches is None:
                return
            for foreign in self._patches.revert():
                self._reason = f"unpatched, but ours stays, off, because {foreign}"
                log.warning("hijack: ours stays, switched off, because %s", foreign)


# -- all hosts -------------------------------------------------------------------------


#: The entry-point group of adapters.
GROUP = "hijack.hosts"

_CONTROLS: dict[str, Control] = {}
_FINDING = threading.Lock()
_found: list[str] = []  # names of all adapters, once they were looked for


def _controls() -> dict[str, Control]:
    """All hosts that hijack knows, by name."""
    with _FINDING:
        if not _found:
            package = importlib.import_module(__package__ or "")
            for module in pkgutil.iter_modules(package.__path__):
                if module.ispkg:
                    _find(module.name, _importing(f"{package.__name__}.{module.name}"))
            for entry in importlib.metadata.entry_points(group=GROUP):
                _find(entry.name, entry.load)
    return _CONTROLS


def _find(name: str, load: Callable[[], Any]) -> None:
    if name in _CONTROLS:
        known = f"host {name!r}: two adapters have this name; the first one is used"
        log.warning("hijack: %s; rename the entry point of the other", known)
        return
    _CONTROLS[name] = Control(name, load)
    _found.append(name)


def _importing(name: str) -> Callable[[], Adapter]:
    return lambda: cast(Adapter, importlib.import_module(name))


def add_host(adapter: Adapter) -> None:
    """Make a host known; an adapter is a module or object like `Adapter`.

    Raises:
        PatchError: if a host of that name is known already.
    """
    if adapter.NAME in _controls():
        raise PatchError(f"host {adapter.NAME!r} is already known; choose another name")
    _CONTROLS[adapter.NAME] = Control(adapter.NAME, lambda: adapter)


def remove_host(host: str) -> None:
    """Forget a host that `add_host` made known.

    Raises:
        PatchError: if the host is unknown, or patched.
    """
    if _control(host).status().patched:
        raise PatchError(f"host {host!r} is patched; call hijack.unpatch({host!r})")
    del _CONTROLS[host]


def patch(host: str = "comfyui") -> HostStatus:
    """Patch a host, or arm it if it is not imported yet; once done, does nothing.

    Args:
        host: its name.

    Returns:
        What came of it; a host that cannot be patched goes on without hijack.

    Raises:
        PatchError: if the host is unknown; or cannot be patched, and ``HIJACK_STRICT``
            is set.
    """
    control = _control(host)
    control.arm()
    return control.status()


#: `patch`, under the name that says what it promises of a host not imported yet.
arm = patch


def arm_all() -> None:
    """Patch every host there is, now or as soon as it is imported."""
    for control in _controls().values():
        control.arm()


def host_adapter(host: str) -> Adapter | None:
    """The adapter of a host, or None if hijack knows no such host."""
    control = _controls().get(host)
    return None if control is None else control.adapter


def unpatch(host: str = "comfyui", force: bool = False) -> HostStatus:
    """Take hijack's patches out of a host: the exact inverse of `patch`.

    Args:
        host: its name.
        force: even if modules of the host hold quantized weights; they go on working.

    Raises:
        PatchError: if the host is unknown, or such modules are alive and not ``force``.
    """
    control = _control(host)
    control.disarm(force)
    return control.status()


def status() -> dict[str, HostStatus]:
    """Where hijack stands with each host it knows, by name."""
    return {name: control.status() for name, control in _controls().items()}


def loaded_layers() -> dict[str, tuple[str, ...]]:
    """The quantized layers in each host's memory, one sentence for each model."""
    found = {}
    for name, control in _controls().items():
        if not control.available():
            continue
        # adapters of others need not have it
        describe = getattr(control.adapter, "describe_layers", tuple)
        found[name] = tuple(describe())
    return found


def restored(host: str = "comfyui") -> list[str]:
    """Dotted names of what hijack patched in a host and somebody has restored."""
    return _control(host).restored()


def in_force(where: str, host: str = "comfyui") -> bool:
    """Whether hijack's patch of what has that dotted name in a host is on."""
    return _control(host).in_force(where)


def _names(patches: PatchSet) -> tuple[str, ...]:
    """What is patched, without modules; copies of a function count as the function."""
    return tuple(
        dict.fromkeys(
            f"{patch.owner.__qualname__}.{patch.attribute}"
            if isinstance(patch.owner, type)
            else patch.attribute
            for patch in patches.patches
            if not patch.copied
        )
    )


def _control(host: str) -> Control:
    if host not in _controls():
        known = ", ".join(sorted(_CONTROLS))
        raise PatchError(f"unknown host {host!r}; known are: {known}")
    return _CONTROLS[host]


# -- imports ---------------------------------------------------------------------------


def _imported(name: str) -> bool:
    module = sys.modules.get(name)
    return module is not None and not initializing(module)
