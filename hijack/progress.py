"""How long-running jobs say how far they are."""

from __future__ import annotations

from collections.abc import Callable

#: Called with layers done, layers in all, and the name of the layer just done.
Progress = Callable[[int, int, str], None]
