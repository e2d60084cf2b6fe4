"""hijack's own marker: header metadata that says which scheme wrote which layer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from hijack.safetensors_io.header import Header, layers_in

#: Header metadata key under which hijack writes which scheme each layer has.
METADATA_KEY = "hijack"


def write_marker(layers: Mapping[str, Mapping[str, object]]) -> str:
    """Text for header metadata `METADATA_KEY`; `native_marker` reads it.

    Args:
        layers: layer to ``{"scheme": name, "params": names}``, and ``"block_size"`` if
            there is one.
    """
    return json.dumps({"version": 1, "layers": layers}, sort_keys=True)


def native_marker(header: Header, layer: str) -> Mapping[str, Any] | None:
    """What hijack's own metadata says of a layer, or None."""
    return header.said_of_layers(METADATA_KEY).get(layer)


def marked_layers(metadata: Mapping[str, str]) -> Mapping[str, Mapping[str, Any]]:
    """What hijack's own metadata says, by layer."""
    return layers_in(metadata.get(METADATA_KEY, ""))


def without_layers(
    metadata: Mapping[str, str], layers: Iterable[str]
) -> dict[str, str]:
    """Metadata whose marker says nothing of some layers any more."""
    rest = dict(metadata)
    marked = dict(marked_layers(metadata))
    for layer in layers:
        marked.pop(layer, None)
    if marked:
        rest[METADATA_KEY] = write_marker(marked)
    else:
        rest.pop(METADATA_KEY, None)
    return rest
