"""Which layers are quantized unless the user says otherwise."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable

#: What stands for the usual patterns, as on the command line.
DEFAULT = "default"
#: Given a layer's name, whether it is to be quantized.
Choice = Callable[[str], bool]

#: Layers to leave dense, by the name of ComfyUI's model config, as musubi-tuner does.
EXCLUDED: dict[str, tuple[str, ...]] = {
    "QwenImage": ("*norm*", "*time_text_embed*"),
    "Flux": ("*norm*", "*mod*"),
    "FluxSchnell": ("*norm*", "*mod*"),
    "FluxInpaint": ("*norm*", "*mod*"),
    "WAN21_T2V": ("*norm*", "*embedding*", "*projection*", "*head*", "*modulation*"),
    "Lumina2": ("*norm*", "*_modulation*"),
    "ZImage": ("*norm*", "*_modulation*"),
}
#: The same for any other: what shifts, embeds or ends is small and sensitive.
ELSEWHERE = ("*norm*", "*emb*", "*mod*", "*head*", "*time*", "*guidance*")


def choose(config: str, include: str = "", exclude: str = "") -> Choice:
    """Decide by patterns, or where there are none by what the model is.

    Args:
        config: name of the class of ComfyUI's model config.
        include: fnmatch patterns on layer names, separated by spaces or lines; empty
            for every layer in a repeated block, which has a number in its name.
        exclude: patterns of layers to leave dense; ``default`` among them stands for
            what is usual for the model, and so does nothing at all.
    """
    included = include.split()
    excluded = [
        pattern
        for word in exclude.split() or [DEFAULT]
        for pattern in (EXCLUDED.get(config, ELSEWHERE) if word == DEFAULT else [word])
    ]

    def chosen(layer: str) -> bool:
        inside = (
            _matches(layer, included)
            if included
            else any(part.isdigit() for part in layer.split("."))
        )
        return inside and not _matches(layer, excluded)

    return chosen


def _matches(layer: str, patterns: list[str]) -> bool:
    return any(fnmatch.fnmatchcase(layer, pattern) for pattern in patterns)
