"""A cache key for claims, so that layers that are alike are recognised once."""

from __future__ import annotations

from collections.abc import Hashable

from hijack.formats.comfyui_markers import (
    FILE_MARKER,
    LAYER_MARKER,
    file_marker,
    layer_marker,
)
from hijack.formats.native_marker import native_marker
from hijack.safetensors_io.header import Header, join, signature
from schemes._fp8.dialects.torchao import WEIGHT_DATA


def likeness(header: Header, layer: str) -> Hashable | None:
    """A layer's tensors and everything any marker declares about it, or None.

    None where tensors of the layer are not beside its weight: musubi-tuner's odd keys,
    and quanto's parts of a weight.
    """
    parts = header.parts.get(layer, {})
    if ".weight" in layer or not ("weight" in parts or WEIGHT_DATA in parts):
        return None
    markers: list[object] = []
    if FILE_MARKER in header.owners:
        marker = file_marker(header, layer)
        markers.append(None if marker is None else marker.dtype)
    if header.metadata or LAYER_MARKER in parts:
        entries = (layer_marker(header, layer), native_marker(header, layer))
        markers += map(repr, entries)
        markers.append(header.metadata.get(join(layer, "weight")))  # torchao's
    return signature(parts), *markers
