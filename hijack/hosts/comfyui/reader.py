"""What ComfyUI's file reader gives of a file with quantized layers.

Any loader may ask the reader, of ComfyUI or of another pack, and most know nothing of
scales: they would drop them and take quantized data for weights. So a file with
quantized layers reads as if it were dense. A loader that takes quantized layers opens
the file before it looks, and finds the tensors as they are stored.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import re
import sys
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

import hijack.hosts.comfyui.markers as markers
import hijack.hosts.comfyui.tensor_metadata as tensor_metadata
from hijack.errors import HijackError
from hijack.hosts.comfyui.detection import (
    decode_claimed,
    encode_claimed,
    may_be_quantized,
)
from hijack.hosts.manager import restored
from hijack.quantized import QuantizedTensor
from hijack.safetensors_io.header import join
from hijack.safetensors_io.reader import read_header
from hijack.text import logger

log = logger(__name__)

#: Folder of packs.
PACKS = "custom_nodes"
#: What code has in it that reads scales of weights.
_SCALES = re.compile("scale_weight|weight_scale|scaled_fp8|comfy_quant|dequant")


if TYPE_CHECKING:
    _Dict = dict[str, Any]
else:

    class _Dict(MutableMapping, dict):
        """A dict, all of whose methods go through those that a subclass defines."""


class FileStateDict(_Dict):
    """A state dict whose quantized layers read as dense weights until it is opened.

    Quantized weights decode when they are first read, to the dtype most other tensors
    of the file have; their scales and markers are hidden. What is written into it is
    kept as it is.

    Args:
        tensors: full key to tensor, as the file stores them.
        path: of the file.
        reads_scales: whether its loader may read some quantized layers itself, so that
            those in ComfyUI's own formats, and those that no scheme reads, stay as they
            are stored; else the former are decoded, and the latter refused.
    """

    def __init__(
        self, tensors: Mapping[str, Any], path: str, *, reads_scales: bool
    ) -> None:
        self._stored = dict(tensors)
        self._path, self._native = path, not reads_scales
        self._strict = not reads_scales
        self._layers: dict[str, QuantizedTensor] | None = None  # not looked at yet
        self._hidden: dict[str, str] = {}  # key to the weight it belongs to
        self._dense: dict[str, Tensor] = {}

    def open(self) -> None:
        """Show the tensors as they are stored, from now on."""
        self._native = False
        self._layers, self._hidden, self._dense = {}, {}, {}

    def leave_native(self) -> None:
        """Show ComfyUI's own quantized layers as they are stored, from now on."""
        if self._native:
            self._native = False
            self._layers, self._hidden, self._dense = None, {}, {}

    @property
    def name(self) -> str:
        """Name of the file."""
        return Path(self._path).name

    def stored(self) -> dict[str, Any]:
        """A plain state dict of the tensors as they are stored."""
        return dict(self._stored)

    def store(self, tensors: Mapping[str, Any]) -> None:
        """Replace the stored tensors; what was open stays open."""
        self._stored = dict(tensors)

    def _look(self) -> dict[str, QuantizedTensor]:
        """The layers that are to be decoded, by the key of their weight."""
        if self._layers is None:
            try:
                self._layers = self._find_layers()
            except HijackError as error:
                if self._strict:
                    raise
                log.warning("hijack: %s; left to its loader as it is", error)
                self.open()
        return self._layers or {}

    def _find_layers(self) -> dict[str, QuantizedTensor]:
        stored = {k: t for k, t in self._stored.items() if _is_tensor(k, t)}
        shown = dict(stored)
        encode_claimed(
            shown,
            "",
            _metadata(self._path),
            native=self._native,
            fate="decoded, because its loader takes dense weights only",
        )
        layers = {k: t for k, t in shown.items() if isinstance(t, QuantizedTensor)}
        self._hidden = {
            key: _weight_of(key, layers) for key in stored if key not in shown
        }
        return layers

    # -- what a dict does --------------------------------------------------------------

    def __getitem__(self, key: str) -> Any:
        weight = self._look().get(key)
        if key in self._hidden:
            raise KeyError(key)
        if weight is None:
            return self._stored[key]
        if key not in self._dense:
            with torch.no_grad():
                self._dense[key] = weight.value(weight.dtype)
        return self._dense[key]

    def __setitem__(self, key: str, value: Any) -> None:
        self._forget(key)
        self._hidden.pop(key, None)
        self._stored[key] = value

    def __delitem__(self, key: str) -> None:
        if key not in self:
            raise KeyError(key)
        self._forget(key)
        del self._stored[key]

    def _forget(self, key: str) -> None:
        """Stop decoding a layer whose weight is replaced or taken out."""
        if self._look().pop(key, None) is not None:
            self._dense.pop(key, None)
            for name in [name for name, of in self._hidden.items() if of == key]:
                del self._hidden[name]
                del self._stored[name]

    def __iter__(self) -> Iterator[str]:
        self._look()
        return (key for key in self._stored if key not in self._hidden)

    def __len__(self) -> int:
        self._look()
        return len(self._stored) - len(self._hidden)

    def __contains__(self, key: object) -> bool:
        self._look()
        return key not in self._hidden and key in self._stored

    def __repr__(self) -> str:
        return f"FileStateDict({self.name}, {len(self)} tensors)"

    # what dict's own methods would find is nothing
    def copy(self) -> dict[str, Any]:
        return dict(self.items())

    __copy__ = copy

    def __reduce__(self) -> Any:
        # what torch.load takes for safe
        return collections.OrderedDict, (), None, None, iter(self.items())

    def __or__(self, other: Any) -> Any:
        return self.copy() | other

    def __ror__(self, other: Any) -> Any:
        return other | self.copy()

    def __ior__(self, other: Any) -> Any:
        self.update(other)
        return self

    def clear(self) -> None:
        self.open()
        self._stored = {}


def _is_tensor(key: object, value: object) -> bool:
    """Whether it is an entry of a model; a pickle may hold anything."""
    return isinstance(key, str) and isinstance(value, Tensor)


def _weight_of(key: str, layers: Mapping[str, QuantizedTensor]) -> str:
    """The key of the weight that a scale or marker belongs to; "" if of none."""
    layer = key
    while layer:
        layer = layer.rpartition(".")[0]
        if join(layer, "weight") in layers:
            return join(layer, "weight")
    return ""


def _metadata(path: str) -> Mapping[str, str]:
    """A file's header metadata, if it has any."""
    if not path.lower().endswith((".safetensors", ".sft")):
        return {}
    try:
        return read_header(path).metadata
    except (OSError, HijackError):  # ComfyUI has read it, and that is what counts
        return {}


# -- ComfyUI's functions ---------------------------------------------------------------


def make_load_torch_file(original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of ``comfy.utils.load_torch_file``."""

    @functools.wraps(original)
    def load_torch_file(ckpt: Any, *args: Any, **kwargs: Any) -> Any:
        result = original(ckpt, *args, **kwargs)
        state_dict, *rest = result if isinstance(result, tuple) else (result,)
        if type(state_dict) is FileStateDict or not isinstance(state_dict, dict):
            return result  # of a copy of the reader that is patched too
        markers.drop_needless(state_dict, Path(str(ckpt)).name)
        marked = tensor_metadata.tie_markers(state_dict, str(ckpt))
        if not marked and not may_be_quantized(state_dict):
            return result
        tensor_metadata.tie_claims(state_dict, str(ckpt))
        tensor_metadata.tie_name(state_dict, str(ckpt))
        knowing = _knows_scales(_caller())
        file = FileStateDict(state_dict, str(ckpt), reads_scales=knowing)
        return (file, *rest) if isinstance(result, tuple) else file

    return load_torch_file


def make_taking_quantized(original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of a loader of state dicts, which ends in our patches."""

    @functools.wraps(original)
    def load(sd: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(sd, dict):
            open_if_patched(sd, kwargs.get("metadata"))
        return original(sd, *args, **kwargs)

    return load


def make_convert_old_quants(original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of ``comfy.utils.convert_old_quants``.

    Whoever calls it can load ComfyUI's own quantized layers.
    """

    @functools.wraps(original)
    def convert_old_quants(state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(state_dict, FileStateDict):
            result = original(state_dict, *args, **kwargs)
            markers.drop_needless(result[0])
            return result
        converted, *rest = original(state_dict.stored(), *args, **kwargs)
        markers.drop_needless(converted, state_dict.name)
        state_dict.leave_native()
        state_dict.store(converted)
        return (state_dict, *rest)

    return convert_old_quants


def make_detect_layer_quantization(original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of ``comfy.utils.detect_layer_quantization``.

    Whoever calls it can load ComfyUI's own quantized layers.
    """

    @functools.wraps(original)
    def detect_layer_quantization(state_dict: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(state_dict, FileStateDict):
            state_dict.leave_native()
        return original(state_dict, *args, **kwargs)

    return detect_layer_quantization


def open_file(state_dict: Any) -> None:
    """Show the tensors of a state dict as they are stored, if it is one of a file."""
    if isinstance(state_dict, FileStateDict):
        state_dict.open()


def open_if_patched(
    state_dict: dict[str, Any], metadata: Mapping[str, str] | None = None
) -> bool:
    """Open a file for a loader that ends in our patches, or decode its layers.

    Where somebody has taken one of our patches out, quantized layers might get lost on
    the way.

    Returns:
        Whether every patch is there.
    """
    gone = restored("comfyui")
    if not gone:
        open_file(state_dict)
        return True
    if not isinstance(state_dict, FileStateDict):
        decode_claimed(state_dict, "model", metadata)
    log.warning(
        "hijack: somebody took our patch of %s out, so quantized layers are decoded; "
        "hijack.patch() puts it back",
        ", ".join(gone),
    )
    return False


def _caller() -> Path:
    """The file of the code that has called our replacement."""
    frame = sys._getframe(1)
    while frame.f_globals.get("__name__", "").partition(".")[0] == "hijack":
        if frame.f_back is None:
            break
        frame = frame.f_back
    return Path(frame.f_code.co_filename)


@functools.cache
def _knows_scales(file: Path) -> bool:
    """Whether a loader is of a pack that names scales of weights in its code.

    ComfyUI's own loaders say so when they run: they ask which layers are quantized.
    """
    pack = next((path for path in file.parents if path.parent.name == PACKS), None)
    comfyui = Path(sys.modules["comfy"].__path__[0]).parent
    if pack is None and comfyui in file.parents:
        return False
    for each in [file] if pack is None else pack.rglob("*.py"):
        with contextlib.suppress(OSError):
            if _SCALES.search(each.read_text("utf-8", "replace")):
                return True
    return False
