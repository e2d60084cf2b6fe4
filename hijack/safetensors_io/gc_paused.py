"""Pause Python's garbage collector while many objects are created."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Pause the collector, and restore its state at the end.

    The records of a header have no reference cycles. While tens of thousands of them
    are created, the collector would traverse all objects of the process several times,
    including torch's, and free nothing.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
