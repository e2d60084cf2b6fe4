"""What the result of a run depends on, so that another run can go on with it."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch

from hijack.checkpoint.copying import Watch
from hijack.checkpoint.quantize_plan import QuantizePlan

#: The folders of the core and of the schemes that come with it, side by side.
_ROOT = Path(__file__).parents[2]
_PACKAGES = (_ROOT / "hijack", _ROOT / "schemes")


def fingerprint(
    plan: QuantizePlan,
    device: torch.device,
    loras: Sequence[tuple[Path, float]],
    watch: Watch,
) -> str:
    """What a result depends on, beside the headers it is written with."""
    parts = [
        torch.__version__,
        _code(_PACKAGES),
        _code(_sources(plan)),
        str(device),
        plan.scheme.name,
        plan.dialect.name,
        [(layer, repr(options)) for layer, options in plan.options.items()],
        [(key, repr(info)) for key, info in plan.header.tensors.items()],
        [repr(lora) for lora in loras],
        plan.loras.factors,
        watch.before,
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


@functools.cache
def _code(places: Iterable[Path]) -> str:
    """The version of some code: its text, since a clone has no other that it keeps.

    Args:
        places: files, and folders of packages.
    """
    text = hashlib.sha256()
    for place in places:
        files = sorted(place.rglob("*.py")) if place.is_dir() else [place]
        for file in files:
            data = file.read_bytes() if file.is_file() else b""
            text.update(f"{file.name} {len(data)} ".encode() + data)
    return text.hexdigest()


def _sources(plan: QuantizePlan) -> tuple[Path, ...]:
    """Where the scheme and the dialect come from, if they are plugins."""
    found: dict[Path, None] = {}
    for base in (*type(plan.scheme).__mro__, *type(plan.dialect).__mro__):
        try:
            found[Path(inspect.getfile(base))] = None
        except (TypeError, OSError):  # made by hand, or built in
            continue
    return tuple(found)
