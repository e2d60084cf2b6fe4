"""What hijack needs to know of a host."""

from __future__ import annotations

import dataclasses
import inspect
import re
import sys
from collections.abc import Sequence
from typing import Any, Protocol

from hijack.patching import Entry, Patch


@dataclasses.dataclass(frozen=True)
class Probe:
    """Something of a host that the adapter relies on.

    Attributes:
        path: dotted name, starting with the module.
        arguments: names of arguments it must accept; None if it is not called.
    """

    path: str
    arguments: tuple[str, ...] | None = None

    def problem(self) -> str | None:
        """What is wrong with it, or None. Imports nothing."""
        try:
            found = self._find()
        except LookupError as error:
            return f"{self.path}: {error}"
        if self.arguments is None:
            return None
        try:
            parameters = inspect.signature(found).parameters
        except (TypeError, ValueError):
            return f"{self.path}: is not a function with a known signature"
        if any(
            p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in parameters.values()
        ):
            return None  # somebody's wrapper, which passes everything on
        missing = [name for name in self.arguments if name not in parameters]
        if missing:
            return (
                f"{self.path}: does not accept {', '.join(missing)}; "
                f"got ({', '.join(parameters)})"
            )
        return None

    def _find(self) -> Any:
        parts = self.path.split(".")
        for length in range(len(parts), 0, -1):
            found: Any = sys.modules.get(".".join(parts[:length]))
            if found is not None:
                break
        else:
            raise LookupError(f"module {parts[0]} is not imported")
        for part in parts[length:]:
            if not hasattr(found, part):
                raise LookupError("does not exist")
            found = getattr(found, part)
        return found


class Adapter(Protocol):
    """A host: a module with these names.

    Attributes:
        NAME: what users call the host.
        MODULE: the module that, once imported, leaves nothing missing to patch.
        SUPPORTED: first and last version the adapter was tested with.
        PROBES: what must be there, whatever the version says.
    """

    NAME: str
    MODULE: str
    SUPPORTED: tuple[str, str]
    PROBES: tuple[Probe, ...]

    def get_version(self) -> str:
        """The imported host's version."""

    def patches(self) -> Sequence[Patch | Entry]:
        """What to patch; the host is imported and the probes have passed."""

    def live(self) -> int:
        """How many modules of the host hold quantized weights."""


def imported_version(name: str) -> str:
    """The version that an imported module says it has, or "unknown"."""
    version = getattr(sys.modules.get(name), "__version__", None)
    return version if isinstance(version, str) else "unknown"


def version_key(version: str) -> tuple[int, ...]:
    """A version's leading numbers; of anything else nothing is known."""
    match = re.match(r"\d+(?:\.\d+)*", version)
    return tuple(int(part) for part in match[0].split(".")) if match else ()


def tested(version: str, supported: tuple[str, str]) -> bool:
    """Whether a version lies in a range, ends included."""
    first, last = map(version_key, supported)
    return first <= version_key(version) <= last
