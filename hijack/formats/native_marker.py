"""hijack's own marker: header metadata that names the scheme of each layer."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from hijack.safetensors_io.header import Header, layers_in

#: Key of the header metadata in which hijack stores the scheme of each layer.
METADATA_KEY = "hijack"


def write_marker(layers: Mapping[str, Mapping[str, object]]) -> str:
    """The text to store under `METADATA_KEY`; `native_marker` reads it.

    Args:
        layers: layer to ``{"scheme": name, "params": names}``, and ``"block_size"`` if
            there is one.
    """
    return json.dumps({"version": 1, "layers": layers}, sort_keys=True)


def native_marker(header: Header, layer: str) -> Mapping[str, Any] | None:
    """hijack's own entry for a layer, or None."""
    return header.layer_metadata(METADATA_KEY).get(layer)


def marked_layers(metadata: Mapping[str, str]) -> Mapping[str, Mapping[str, Any]]:
    """hijack's own entries, by layer."""
    return layers_in(metadata.get(METADATA_KEY, ""))


def without_layers(
    metadata: Mapping[str, str], layers: Iterable[str]
) -> dict[str, str]:
    """Metadata without hijack's own entries for some layers."""
    remaining = dict(metadata)
    marked = dict(marked_layers(metadata))
    for layer in layers:
        marked.pop(layer, None)
    if marked:
        remaining[METADATA_KEY] = write_marker(marked)
    else:
        remaining.pop(METADATA_KEY, None)
    return remaining
