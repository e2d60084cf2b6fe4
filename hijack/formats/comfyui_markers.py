"""Read and write ComfyUI's markers of quantized layers.

The current ones mark a layer: JSON in a tensor of bytes ``X.comfy_quant``, or an entry
under ``layers`` in the header metadata ``_quantization_metadata``. The older one marks
a model: a tensor ``scaled_fp8`` beside its layers, with the dtype of the weights.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hijack.safetensors_io.header import (
    DENSE_NAMES,
    Header,
    TensorInfo,
    join,
    parse_table,
)
from hijack.text import excerpt

#: Last part of the key of a layer's marker.
LAYER_MARKER = "comfy_quant"
#: Header metadata that marks layers too.
LAYER_TABLE = "_quantization_metadata"
#: A marker's entry of layers that are never multiplied in few bits.
FULL_PRECISION = "full_precision_matrix_mult"
#: Last part of the key of the older marker, of a whole model.
FILE_MARKER = "scaled_fp8"
#: ``format`` of a layer's marker to safetensors' names of the dtypes its weight has.
STORED_AS: Mapping[str, tuple[str, ...]] = {
    "float8_e4m3fn": ("F8_E4M3",),
    "float8_e5m2": ("F8_E5M2",),
    "mxfp8": ("F8_E4M3",),
    "nvfp4": ("U8",),
    "int8_tensorwise": ("I8",),
    "int8_blockwise": ("I8",),
    "convrot_w4a4": ("I8", "U8"),
    "asym_w4a8_int8": ("I8", "U8"),
}


def layer_marker(header: Header, layer: str) -> Mapping[str, object] | None:
    """The marker of a layer: its entry in the header, as in ComfyUI, or its tensor.

    The tensor's where the entry names a format that the weight's dtype rules out, and
    the tensor names one that it does not.

    Returns:
        The marker's entries, none if it cannot be read; None if there is no marker.
    """
    entry, tensor = layer_table(header).get(layer), layer_tensor(header, layer)
    if entry is None or not tensor or not wrong_format(header, layer, entry):
        return tensor if entry is None else entry
    named = str(tensor.get("format")) in STORED_AS
    return tensor if named and not wrong_format(header, layer, tensor) else entry


def wrong_format(header: Header, layer: str, marker: Mapping[str, object]) -> str:
    """What is wrong with the format that a marker names, or "".

    Args:
        header: of the checkpoint.
        layer: whose marker it is.
        marker: its entries.
    """
    weight = header.tensors.get(join(layer, "weight"))
    name = marker.get("format")
    if not isinstance(name, str) or not name:
        return "comfy_quant names no format" if marker else "comfy_quant is unreadable"
    if weight is None or weight.dtype in STORED_AS.get(name, (weight.dtype,)):
        return ""
    return f"comfy_quant says {excerpt(name)}, the weight is {weight.dtype}"


def needless_markers(header: Header) -> tuple[str, ...]:
    """Keys of the markers of layers that are dense, and have no scale either."""
    needless = []
    for layer in header.owners.get(LAYER_MARKER, ()):
        parts = header.parts[layer]
        weight = parts.get("weight")
        rest = parts.keys() - {"weight", "bias", LAYER_MARKER}
        if weight is not None and weight.dtype in DENSE_NAMES and not rest:
            needless.append(join(layer, LAYER_MARKER))
    return tuple(needless)


def layer_tensor(header: Header, layer: str) -> Mapping[str, object] | None:
    """What a layer's own tensor says, which an entry in the header outweighs."""
    return header.marker(join(layer, LAYER_MARKER))


def layer_table(header: Header) -> Mapping[str, Mapping[str, object]]:
    """The entries of the header's metadata, by layer."""
    return header.layer_metadata(LAYER_TABLE)


def file_marker(header: Header, layer: str) -> TensorInfo | None:
    """The older marker of the outermost model a layer is in, or None."""
    if FILE_MARKER not in header.owners:
        return None
    modules = layer.split(".")
    models = (".".join(modules[:depth]) for depth in range(len(modules)))
    markers = (header.tensors.get(join(model, FILE_MARKER)) for model in models)
    return next((marker for marker in markers if marker is not None), None)


def is_marked(header: Header, layer: str) -> bool:
    """Whether any of these markers covers a layer."""
    return (
        join(layer, LAYER_MARKER) in header.tensors
        or layer in layer_table(header)
        or file_marker(header, layer) is not None
    )


def unpadded_shape(
    header: Header, layer: str, stored: tuple[int, ...], multiples: tuple[int, int]
) -> tuple[int, int] | None:
    """The true shape of a weight whose sides ComfyUI pads, if the file shows it.

    convert_to_quant stores it in its marker. ComfyUI does not, but a bias has as many
    elements as there are rows.

    Args:
        header: of the checkpoint.
        layer: name of the layer.
        stored: (rows, columns) of the weight with its padding.
        multiples: of which the sides are.
    """
    original = (layer_marker(header, layer) or {}).get("orig_shape")
    bias = header.tensors.get(join(layer, "bias"))
    if isinstance(original, list) and all(type(size) is int for size in original):
        shape = tuple(original)
    else:
        shape = stored if bias is None else (*bias.shape, *stored[1:])
    return (shape[0], shape[1]) if pads(shape, stored, multiples) else None


def pads(
    shape: tuple[int, ...], stored: tuple[int, ...], multiples: tuple[int, int]
) -> bool:
    """Whether a stored shape is a smaller one with its sides padded.

    Args:
        shape: (rows, columns) of the weight.
        stored: the same with padding.
        multiples: of which the sides are.
    """
    return len(shape) == len(stored) == 2 and all(
        0 < size <= padded < size + multiple
        for size, padded, multiple in zip(shape, stored, multiples, strict=True)
    )


def file_marker_keys(keys: Collection[str]) -> list[str]:
    """The keys that are older markers."""
    return [key for key in keys if key.rpartition(".")[2] == FILE_MARKER]


def file_markers_of(keys: Collection[str], layers: Iterable[str]) -> set[str]:
    """The keys that are older markers of the models that some layers are in."""
    names = list(layers)
    return {
        key
        for key in file_marker_keys(keys)
        if any(name.startswith(key.removesuffix(FILE_MARKER)) for name in names)
    }


def read_marker(marker: Tensor) -> dict[str, Any]:
    """The JSON table in a layer's marker; empty if it cannot be read."""
    return parse_table(bytes(marker.flatten().tolist()))


def marker_tensor(entry: Mapping[str, object], device: torch.device) -> Tensor:
    """A layer's marker: (bytes,) uint8."""
    text = json.dumps(entry).encode()
    if device.type == "meta":
        return torch.empty(len(text), dtype=torch.uint8, device=device)
    return torch.tensor(list(text), dtype=torch.uint8, device=device)
