"""What a file's header says of a layer, tied to the layer's weight.

Packed codes are recognised by hijack's own entry in the header alone. ComfyUI hands
headers to some of its loaders and renames keys on the way, but the tensors it hands on
are the ones it read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from hijack.checkpoint.header import join
from hijack.checkpoint.marker import METADATA_KEY, marked_layers, write_marker
from hijack.checkpoint.reader import read_header
from hijack.errors import HijackError

#: Attribute of a weight that holds the header's entry for its layer.
MARKER = "hijack_marker"
#: Longest header to look into; safetensors itself reads none that is longer.
LONGEST = 100_000_000


def make_load_torch_file(original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of ``comfy.utils.load_torch_file``."""

    @functools.wraps(original)
    def load_torch_file(ckpt: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(ckpt, *args, **kwargs)
        state_dict = result[0] if isinstance(result, tuple) else result
        for layer, entry in _marked(str(ckpt)).items():
            weight = state_dict.get(join(layer, "weight"))
            if isinstance(weight, Tensor):
                setattr(weight, MARKER, entry)
        return result

    return load_torch_file


def metadata_of(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The header's entry for the layers of a state dict, under the names they have."""
    marked = {
        key.rpartition(".")[0]: getattr(tensor, MARKER)
        for key, tensor in tensors.items()
        if hasattr(tensor, MARKER)
    }
    return {METADATA_KEY: write_marker(marked)} if marked else {}


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
