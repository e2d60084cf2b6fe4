"""ComfyUI's markers in a file: of today, in each layer, and of before, in the file."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable

from hijack.formats.named_only import comfy_layers, comfy_marker
from hijack.formats.named_only_table import LAYER_MARKER
from hijack.formats.native_marker import native_marker
from hijack.safetensors_io.header import Header, TensorInfo, join, signature

#: The tensor that marked a whole file, or one model in it.
FILE_MARKER = "scaled_fp8"
#: What torchao calls the codes of a weight.
WEIGHT_DATA = "_weight_qdata"


def marked(header: Header, layer: str) -> bool:
    """Whether ComfyUI's markers, of today or the older kind, claim the layer."""
    return (
        join(layer, LAYER_MARKER) in header.tensors
        or layer in comfy_layers(header)
        or file_marker(header, layer) is not None
    )


def file_marker(header: Header, layer: str) -> TensorInfo | None:
    """The older marker of the model a layer is in, or None."""
    model = layer.rpartition(".")[0]
    if (FILE_MARKER, model) not in header.memo:
        outer = file_marker(header, model) if model else None
        own = header.tensors.get(join(model, FILE_MARKER))
        header.memo[FILE_MARKER, model] = own if outer is None else outer
    found: TensorInfo | None = header.memo[FILE_MARKER, model]
    return found


def likeness(header: Header, layer: str) -> Hashable | None:
    """A layer's tensors and all that any marker says of it, or None.

    None where the layer's tensors have keys that are not of the layer: musubi-tuner's
    odd ones, and quanto's parts of a weight.
    """
    parts = header.parts.get(layer, {})
    if ".weight" in layer or not ("weight" in parts or WEIGHT_DATA in parts):
        return None
    said: list[object] = []
    if FILE_MARKER in header.owners:
        marker = file_marker(header, layer)
        said.append(None if marker is None else marker.dtype)
    if header.metadata or LAYER_MARKER in parts:
        said += map(repr, (comfy_marker(header, layer), native_marker(header, layer)))
        said.append(header.metadata.get(join(layer, "weight")))  # torchao's
    return signature(parts), *said


def file_markers(keys: Collection[str], layers: Iterable[str]) -> set[str]:
    """Keys of the older markers of the models some layers are in."""
    markers = [key for key in keys if key.rpartition(".")[2] == FILE_MARKER]
    names = list(layers)
    return {
        key
        for key in markers
        if any(name.startswith(key.removesuffix(FILE_MARKER)) for name in names)
    }
