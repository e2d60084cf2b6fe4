"""Python's garbage collector, out of the way where records are made in bulk."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def uncollected() -> Iterator[None]:
    """Pause the collector; it is as it was before when the block ends.

    The records of a header hold no cycles. Making tens of thousands of them would have
    the collector walk all objects of the process several times, torch's among them,
    and free nothing.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
