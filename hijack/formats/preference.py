"""Which of several readings of a layer the user prefers."""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator, Sequence

#: Environment variable with a comma list of preferred words, the first first.
VARIABLE = "HIJACK_PREFER"

_WORDS: contextvars.ContextVar[tuple[str, ...] | None] = contextvars.ContextVar(
    "hijack_prefer", default=None
)


def preferred() -> tuple[str, ...]:
    """The words of `prefer`, else those of ``HIJACK_PREFER``, the first first.

    A word is the name of a scheme or dialect, a block size such as ``128x128``, or an
    option such as ``rotation=256``, as for ``assume``.
    """
    words = _WORDS.get()
    if words is not None:
        return words
    listed = (word.strip() for word in os.environ.get(VARIABLE, "").split(","))
    return tuple(word for word in listed if word)


@contextlib.contextmanager
def prefer(words: Sequence[str]) -> Iterator[None]:
    """Prefer some readings to others inside, in this thread or task alone.

    Args:
        words: as `preferred` returns them; none leaves it to ``HIJACK_PREFER``.
    """
    token = _WORDS.set(tuple(words) or None)
    try:
        yield
    finally:
        _WORDS.reset(token)
