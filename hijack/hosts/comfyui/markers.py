"""ComfyUI's own markers of quantized layers, and where they cannot be true.

Of FP8, ComfyUI reads a Linear with one scale, and MXFP8 in later releases. A file in
another format that carries its marker anyway (people add it to make a file load, and
other programs have formats of their own) is ours to read. From 0.4
on ComfyUI has by then rewritten all keys of such a file, which is undone here.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, MutableMapping
from typing import Any

import torch
from torch import Tensor

from hijack.errors import printable
from hijack.formats.comfyui_markers import (
    FILE_MARKER,
    LAYER_MARKER,
    file_marker,
    file_marker_keys,
    layer_marker,
    needless_markers,
    read_marker,
    wrong_format,
)
from hijack.safetensors_io.header import Header, join
from hijack.text import logger

log = logger(__name__)

#: How files with the old marker spell scales, and what ComfyUI renames them to.
RENAMED = {"scale_weight": "weight_scale", "scale_input": "input_scale"}
#: Tensors that releases ignore which do not list them, although the weight needs them.
_IGNORED = frozenset({"pre_quant_scale"})
FORMATS = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}


def read_through(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as their writer spelled them, without markers that cannot be true.

    Args:
        tensors: full key to tensor, of one model or of several.
    """
    found = dict(tensors)
    layers = [
        key[: -len(LAYER_MARKER) - 1]
        for key in tensors
        if key.endswith(f".{LAYER_MARKER}") and _format(tensors[key]) in FORMATS
    ]
    # ComfyUI marks every layer of a file that carries its old marker. Where that is
    # wrong for one it says nothing of the others, some of which it may not read.
    if any(_contradicts(found, layer) for layer in layers):
        for layer in layers:
            del found[join(layer, LAYER_MARKER)]
            for old, new in RENAMED.items():
                tensor = found.pop(join(layer, new), None)
                if tensor is not None:
                    found[join(layer, old)] = tensor
        for marker in file_marker_keys(
            found
        ):  # 0.4 to 0.7 leave it, and read it no more
            if any(
                name.startswith(marker.removesuffix(FILE_MARKER)) for name in layers
            ):
                del found[marker]
    for marker in file_marker_keys(found):
        prefix = marker.removesuffix(FILE_MARKER)
        if any(_unread(found, key) for key in found if key.startswith(prefix)):
            del found[marker]
    return found


def native(header: Header, layer: str) -> bool:
    """Whether one of ComfyUI's own markers is there, and this release reads it.

    Other programs mark layers the same way, with formats no release knows.
    """
    marker = layer_marker(header, layer)
    if marker is not None:
        apart = join(layer, LAYER_MARKER) in header.tensors
        readable = reads_layers() or not apart
        named = not wrong_format(header, layer, marker)
        return readable and named and _reads(marker, header.parts.get(layer, {}))
    return file_marker(header, layer) is not None


def is_marker(key: str) -> bool:
    """Whether a key is that of one of ComfyUI's own markers."""
    return key.rpartition(".")[2] in (LAYER_MARKER, FILE_MARKER)


def reads_layers() -> bool:
    """Whether this release reads a marker in each layer, and leaves others to us."""
    utils = sys.modules.get("comfy.utils")  # none in a test of this file alone
    return utils is None or hasattr(utils, "convert_old_quants")


def drop_needless(tensors: MutableMapping[str, Any], file: str = "") -> None:
    """Take the markers of dense layers out of a state dict, which are no formats.

    ComfyUI fails at the zeros that some programs write there.

    Args:
        tensors: full key to tensor.
        file: what the tensors are of, for the log.
    """
    if not any(is_marker(key) for key in tensors if isinstance(key, str)):
        return
    known = {
        key: tensor
        for key, tensor in tensors.items()
        if isinstance(key, str) and isinstance(tensor, Tensor)
    }
    keys = needless_markers(Header.from_state_dict(known))
    for key in keys:
        del tensors[key]
    if keys:
        log.warning(
            "hijack: %s: %d dense layers have a marker of quantized ones, such as %s; "
            "they are read as dense",
            file or "state dict",
            len(keys),
            printable(keys[0]),
        )


def _reads(marker: Mapping[str, object], parts: Collection[str]) -> bool:
    """Whether this release reads a layer's format, with all that it needs."""
    if "comfy.utils" not in sys.modules:
        return marker.get("format") in FORMATS
    quant_ops = sys.modules.get("comfy.quant_ops")
    known: Mapping[str, Any] = getattr(quant_ops, "QUANT_ALGOS", {})
    format_ = known.get(str(marker.get("format")))
    if format_ is None:
        return False
    return all(name in format_.get("parameters", ()) for name in _IGNORED & set(parts))


def _contradicts(tensors: Mapping[str, Tensor], layer: str) -> bool:
    weight = tensors.get(join(layer, "weight"))
    scale = tensors.get(join(layer, "weight_scale"))
    dtype = FORMATS.get(_format(tensors[join(layer, LAYER_MARKER)]))
    if weight is None or scale is None or dtype is None:
        return False
    return scale.numel() != 1 or weight.ndim != 2 or weight.dtype != dtype


def _unread(tensors: Mapping[str, Tensor], key: str) -> bool:
    """Whether a key is a scale that ComfyUI does not read under the old marker.

    Under today's name it reads none there, only those with a marker of their own.
    """
    layer, _, name = key.rpartition(".")
    if name == "weight_scale":
        return join(layer, LAYER_MARKER) not in tensors
    weight = tensors.get(join(layer, "weight"))
    single = tensors[key].numel() == 1 and (weight is None or weight.ndim == 2)
    return name == "scale_weight" and not single


def _format(marker: Tensor) -> str:
    return str(read_marker(marker).get("format", ""))
