"""Whether a write into a quantized weight is refused, or quantizes what was written."""

from __future__ import annotations

import contextlib
import contextvars
from collections.abc import Iterator

_ASKED: contextvars.ContextVar[bool] = contextvars.ContextVar(
    "hijack_requantizing", default=False
)


@contextlib.contextmanager
def requantizing() -> Iterator[None]:
    """Let writes change quantized weights, which are then quantized as they were.

    Elsewhere a write is refused, because it rounds: what was written is not what is
    read afterwards, and a write that takes it back does not restore the weight. Inside
    the context programs may merge adapters into weights, or initialise adapters from
    them::

        with hijack.requantizing():
            model = peft_model.merge_and_unload()

    `hijack.unwrap` first, for a merge that is exact.
    """
    token = _ASKED.set(True)
    try:
        yield
    finally:
        _ASKED.reset(token)


def is_asked() -> bool:
    """Whether writes requantize in this thread or task."""
    return _ASKED.get()
