"""accelerate, from 1.6 to 1.15.

Only what reads checkpoints is patched: ``load_checkpoint_in_model``, which
``load_checkpoint_and_dispatch`` calls. Hooks, offloading and device maps work with
quantized layers as they are.
"""

from __future__ import annotations

import sys
from types import FunctionType

from hijack.hosts.adapter import Probe, imported_version
from hijack.patching import Patch

NAME = "accelerate"
#: The host can be patched once this module is imported completely.
MODULE = "accelerate"
#: First and last version this was tested with.
SUPPORTED = ("1.6.0", "1.15.0")

_NAME = "load_checkpoint_in_model"
PROBES = (
    Probe(
        f"accelerate.utils.modeling.{_NAME}",
        ("model", "checkpoint", "device_map", "offload_folder", "dtype", "strict"),
    ),
)


def get_version() -> str:
    """accelerate's version, or "unknown"."""
    return imported_version(NAME)


def patches() -> list[Patch]:
    """What to patch: the function, and where it was imported by name."""
    from hijack.hosts.accelerate.loading import make_load_checkpoint_in_model

    modeling = sys.modules["accelerate.utils.modeling"]
    function = getattr(modeling, _NAME)
    copies = [
        Patch(module, _NAME, make_load_checkpoint_in_model, copied=True)
        for module in list(sys.modules.values())
        if type(function) is FunctionType
        and module is not modeling
        and getattr(module, "__dict__", {}).get(_NAME) is function
        and getattr(module, "__name__", "__main__") != "__main__"
    ]
    return [*copies, Patch(modeling, _NAME, make_load_checkpoint_in_model)]


def live() -> int:
    """No quantized layer needs the patches once it is loaded."""
    return 0
