"""What a file's header says of a layer, tied to the layer's weight.

Packed data is recognised by hijack's own entry in the header alone, and the blocks of
other formats stand in a config. ComfyUI hands headers to some of its loaders and
renames keys on the way, but the tensors it hands on are the ones it read.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from hijack.claim import Claim
from hijack.errors import HijackError
from hijack.formats.dialect import Dialect
from hijack.formats.identification import identify
from hijack.formats.native_marker import METADATA_KEY, marked_layers, write_marker
from hijack.safetensors_io.header import join
from hijack.safetensors_io.reader import read_header

#: Attribute of a weight that holds the header's entry for its layer.
MARKER = "hijack_marker"
#: Attribute of quantized data that holds the claim a config founds.
CLAIM = "hijack_claim"
#: Attribute of every tensor of a file with quantized layers that holds its name.
FILE = "hijack_file"
#: Metadata in which torchao lists the tensors of a file.
TORCHAO = "tensor_names"
#: Longest header to look into; safetensors itself reads none that is longer.
LONGEST = 100_000_000


def tie_markers(state_dict: Mapping[str, Any], path: str) -> bool:
    """Tie hijack's own entries in a file's header to the weights read from it.

    Returns:
        Whether there are any.
    """
    marked = _marked(path)
    for layer, entry in marked.items():
        _tie(state_dict.get(join(layer, "weight")), MARKER, entry)
    return bool(marked)


def tie_claims(state_dict: Mapping[str, Any], path: str) -> None:
    """Tie what a file's config says to the weights that were read from it."""
    for claim in _configured(path):
        _tie(state_dict.get(claim.keys["weight"]), CLAIM, claim)


def tie_name(state_dict: Mapping[str, Any], path: str) -> None:
    """Tie the name of a file to the tensors that were read from it."""
    for tensor in state_dict.values():
        _tie(tensor, FILE, os.path.basename(path))


def name_of(tensors: Mapping[str, Tensor]) -> str:
    """The name of the file that tensors were read from, as far as it is known."""
    names = (getattr(tensor, FILE, None) for tensor in tensors.values())
    return next(filter(None, names), "a state dict")


def metadata_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The header's entry for the layers of a state dict, under the names they have."""
    marked = {
        key.rpartition(".")[0]: getattr(tensor, MARKER)
        for key, tensor in tensors.items()
        if hasattr(tensor, MARKER)
    }
    return {METADATA_KEY: write_marker(marked)} if marked else {}


def claims_of(tensors: Mapping[str, Tensor]) -> dict[str, Claim]:
    """The claims a file's own config founds, under the names the layers have now.

    Args:
        tensors: full key to tensor; a layer some tensors of which were renamed in
            another way than its weight has none.
    """
    found = {}
    for key, tensor in tensors.items():
        claim: Claim | None = getattr(tensor, CLAIM, None)
        if claim is None:
            continue
        cut = len(join(claim.layer, ""))
        weight = claim.keys["weight"][cut:]
        if not key.endswith(weight):
            continue
        layer = key.removesuffix(weight).removesuffix(".")
        keys = {role: join(layer, name[cut:]) for role, name in claim.keys.items()}
        if all(name in tensors for name in keys.values()):
            found[layer] = dataclasses.replace(claim, layer=layer, keys=keys)
    return found


def _tie(tensor: object, name: str, said: object) -> None:
    if isinstance(tensor, Tensor):
        setattr(tensor, name, said)


def _configured(path: str) -> list[Claim]:
    """Claims that stand on what the file says as a whole, or ``config.json`` beside it.

    hijack's own entries have a way of their own; layers whose keys do not begin with
    their name cannot be followed.
    """
    if not path.lower().endswith((".safetensors", ".sft")):
        return []
    try:
        header = read_header(path)
        if not header.quantization and TORCHAO not in header.metadata:
            return []
        claims = identify(header).layers.values()
    except (OSError, HijackError):  # ComfyUI has read it, and that is what counts
        return []
    return [
        claim
        for claim in claims
        if claim.dialect != Dialect.name
        and all(key.startswith(join(claim.layer, "")) for key in claim.keys.values())
    ]


def _marked(path: str) -> Mapping[str, Mapping[str, Any]]:
    """Entries by layer; few files have any, so most headers are not parsed."""
    if not path.lower().endswith((".safetensors", ".sft")):
        return {}
    try:
        with open(path, "rb") as file:
            size = int.from_bytes(file.read(8), "little")
            if size > LONGEST or b'"hijack"' not in file.read(size):
                return {}
        return marked_layers(read_header(path).metadata)
    except (OSError, HijackError):  # ComfyUI has read it, and that is what counts
        return {}
