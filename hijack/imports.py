"""Modules that are being imported.

Python has no event for the moment when a module's code has run, and an import hook may
come too late: the module may be in the middle of its import already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def initializing(module: ModuleType) -> bool:
    """Whether a module's code is still running."""
    return bool(getattr(getattr(module, "__spec__", None), "_initializing", False))


def when_initialized(module: ModuleType, ended: Callable[[bool], None]) -> None:
    """Call a function once, when the code of a module that is running has run.

    The import system switches a flag of the module's spec off at the end, so the flag
    becomes a property.

    Args:
        module: one that is `initializing`.
        ended: called with whether the import succeeded.
    """
    spec: Any = module.__spec__
    kind: Any = type(spec)

    class Watched(kind):  # type: ignore[misc]
        @property
        def _initializing(self) -> bool:
            return bool(self.__dict__["_initializing"])

        @_initializing.setter
        def _initializing(self, value: bool) -> None:
            self.__dict__["_initializing"] = value
            if not value:
                spec.__class__ = kind
                ended(sys.modules.get(module.__name__) is module)

    spec.__class__ = Watched
