"""The header of a checkpoint: everything known before tensor data is read."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hijack.dtypes import DENSE_DTYPES

#: safetensors' names of dtypes, with torch's; names torch lacks map to None.
DTYPES: Mapping[str, torch.dtype | None] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": getattr(torch, "float8_e8m0fnu", None),
    "F4": getattr(torch, "float4_e2m1fn_x2", None),
}
DTYPE_NAMES: Mapping[torch.dtype, str] = {
    dtype: name for name, dtype in DTYPES.items() if dtype is not None
}
#: The same, by safetensors' names.
DENSE_NAMES = frozenset(DTYPE_NAMES[dtype] for dtype in DENSE_DTYPES)
#: Bits of one element, for dtypes that torch lacks, or packs two to an element.
_BITS: Mapping[str, int] = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8}
#: What fits into the sizes of tensors, and of the file formats themselves.
_MAX_BYTES = 2**63 - 1
#: Key of the quantization config, in ``config.json`` and in header metadata.
CONFIG_KEY = "quantization_config"
#: What a ``quantization_config`` of hijack's own calls its method.
QUANT_METHOD = "hijack"
#: Bytes of the largest tensor that may be a marker.
MAX_MARKER = 1 << 16


def bits_of(dtype: str) -> int | None:
    """Bits an element of a safetensors dtype takes; None if it is unknown."""
    known = DTYPES.get(dtype)
    return _BITS.get(dtype) or (known.itemsize * 8 if known is not None else None)


def bytes_of(dtype: str, shape: tuple[int, ...]) -> int | None:
    """Bytes a tensor takes in a file; None if its elements end within a byte.

    Also None where a program could not hold the shape, although the tensor is empty:
    ``(2**62, 2**62, 0)`` has strides no integer has room for.
    """
    bits = bits_of(dtype)
    if bits is None or math.prod(n or 1 for n in shape) * bits // 8 > _MAX_BYTES:
        return None
    size, rest = divmod(math.prod(shape) * bits, 8)
    return None if rest else size


#: Device, inode, size in bytes and time of the last change in nanoseconds.
FileIdentity = tuple[int, int, int, int]


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """Dtype, shape and file offsets of one tensor of a checkpoint.

    Attributes:
        dtype: safetensors' name of the dtype, such as ``"F8_E4M3"``.
        shape: dimensions as stored.
        file: the file that holds it; None for a state dict in memory.
        begin: first byte, counted from the start of the file's data section.
        end: one past the last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    file: Path | None = None
    begin: int = 0
    end: int = 0

    @property
    def nbytes(self) -> int:
        """Size of the tensor in a file, in bytes; 0 if the dtype is unknown."""
        return bytes_of(self.dtype, self.shape) or 0

    @property
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype as torch knows it, or None."""
        return DTYPES.get(self.dtype)

    @property
    def real(self) -> bool:
        """Whether each element is one real number in torch.

        Packed sub-byte elements are not: torch holds two of them as one element.
        """
        dtype = self.torch_dtype
        whole = (bits_of(self.dtype) or 0) >= 8
        return whole and dtype is not None and not dtype.is_complex

    @property
    def torch_shape(self) -> tuple[int, ...]:
        """The shape of the torch tensor, where two 4-bit numbers are one element."""
        if self.dtype == "F4" and self.shape:
            return (*self.shape[:-1], self.shape[-1] // 2)
        return self.shape

    @classmethod
    def of(cls, tensor: Tensor) -> TensorInfo:
        """The entry a file would have for a tensor.

        A dtype that safetensors has no name for keeps torch's.
        """
        name = DTYPE_NAMES.get(tensor.dtype, str(tensor.dtype))
        shape = tuple(tensor.shape)
        if name == "F4" and shape:
            shape = (*shape[:-1], shape[-1] * 2)
        return cls(name, shape)


class _TensorView(Mapping[str, TensorInfo]):
    """TensorInfo of a state dict's tensors, made when asked for."""

    def __init__(self, state_dict: Mapping[str, Tensor]) -> None:
        self._state_dict = state_dict

    def __getitem__(self, key: str) -> TensorInfo:
        tensor = self._state_dict[key]
        # a state dict may hold a module's extra state, which is anything
        known = getattr(tensor, "dtype", None) is not None
        return TensorInfo.of(tensor) if known else TensorInfo("None", ())

    def __contains__(self, key: object) -> bool:
        return key in self._state_dict

    def __iter__(self) -> Iterator[str]:
        return iter(self._state_dict)

    def __len__(self) -> int:
        return len(self._state_dict)


@dataclasses.dataclass(frozen=True)
class Header:
    """Everything known of a checkpoint from its header alone.

    Attributes:
        tensors: key to TensorInfo, over all shards.
        metadata: the ``__metadata__`` table; strings to strings.
        config: the ``config.json`` beside the file, if there is one.
        source: what to call the checkpoint in messages.
        reader: gives the bytes of a tensor, or None; only for `marker`.
        files: each file of the checkpoint, to what tells it from one that took its
            place: device, inode, size and time of the last change.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    config: Mapping[str, object] | None = None
    source: str = "state dict"
    reader: Callable[[str], bytes | None] | None = None
    files: Mapping[Path, FileIdentity] = dataclasses.field(default_factory=dict)

    @functools.cached_property
    def quantization(self) -> Mapping[str, Any]:
        """The ``quantization_config``: of the header's metadata, else of the config."""
        quantization: object = parse_table(self.metadata.get(CONFIG_KEY, ""))
        config = self.config or {}
        # a model made of several has it in the config of the one that is quantized
        parts = (part for part in config.values() if isinstance(part, dict))
        for table in (config, *parts):
            quantization = quantization or table.get(CONFIG_KEY)
        return quantization if isinstance(quantization, dict) else {}

    @functools.cached_property
    def parts(self) -> Mapping[str, Mapping[str, TensorInfo]]:
        """Layer to the last parts of its keys, in file order; "" is the root."""
        parts: dict[str, dict[str, TensorInfo]] = {}
        for key, info in self.tensors.items():
            layer, dot, name = key.rpartition(".")
            if layer or not dot:  # ".weight" is of no layer: the root's is "weight"
                parts.setdefault(layer, {})[name] = info
        return parts

    @functools.cached_property
    def owners(self) -> Mapping[str, Sequence[str]]:
        """Last part of a key to the layers with such a tensor, in file order."""
        owners: dict[str, list[str]] = {}
        for layer, parts in self.parts.items():
            for name in parts:
                owners.setdefault(name, []).append(layer)
        return owners

    @functools.cached_property
    def bare(self) -> Header:
        """The header without its metadata."""
        return dataclasses.replace(self, metadata={})

    @functools.cached_property
    def _layer_tables(self) -> dict[str, Mapping[str, Mapping[str, Any]]]:
        """Cache of `layer_metadata`, which is asked for again for every layer."""
        return {}

    def layer_metadata(self, name: str) -> Mapping[str, Mapping[str, Any]]:
        """The entries under ``layers`` in a JSON table of the metadata, by layer."""
        if name not in self._layer_tables:
            self._layer_tables[name] = layers_in(self.metadata.get(name, ""))
        return self._layer_tables[name]

    def marker(self, key: str) -> Mapping[str, Any] | None:
        """The JSON table in a small tensor of bytes, as ComfyUI marks layers with.

        Returns:
            The table, empty if it cannot be read; None if there is no such tensor.
        """
        info = self.tensors.get(key)
        if info is None:
            return None
        if info.dtype not in ("U8", "I8") or info.nbytes > MAX_MARKER:
            return {}
        text = None if self.reader is None else self.reader(key)
        return _parse_marker(text or b"")

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> Header:
        """View a state dict as a header; tensors are inspected lazily."""

        def read(key: str) -> bytes | None:
            tensor = state_dict[key]
            if tensor.is_meta:
                return None
            return bytes(tensor.detach().view(torch.uint8).flatten().tolist())

        return cls(_TensorView(state_dict), dict(metadata or {}), reader=read)

    def layers(self) -> Iterator[str]:
        """Names of the layers that own a ``weight``, in file order; "" is the root."""
        for key in self.tensors:
            if key == "weight":
                yield ""
            elif key.endswith(".weight") and key != ".weight":
                yield key[: -len(".weight")]


def signature(parts: Mapping[str, TensorInfo]) -> tuple[object, ...]:
    """Equal for layers whose tensors have equal names, dtypes and shapes."""
    return tuple([(name, info.dtype, info.shape) for name, info in parts.items()])


def join(layer: str, suffix: str) -> str:
    """Key of a layer's tensor: ``join("a.b", "weight")`` is ``"a.b.weight"``."""
    return f"{layer}.{suffix}" if layer else suffix


def layers_in(text: str) -> dict[str, dict[str, Any]]:
    """The entries under ``layers`` in a JSON table; only those that are tables."""
    layers = parse_table(text).get("layers") if text else None
    if not isinstance(layers, dict):
        return {}
    return {name: entry for name, entry in layers.items() if isinstance(entry, dict)}


#: What transformers, diffusers and accelerate want a file's metadata to say.
FRAMEWORK = {"format": "pt"}


def merge_metadata(
    metadata: Mapping[str, str], more: Mapping[str, str]
) -> dict[str, str]:
    """Metadata of two shards or dialects; tables of layers are merged."""
    merged = {**metadata, **more}
    for name in metadata.keys() & more.keys():
        if metadata[name] == more[name]:
            continue
        table, more_table = parse_table(metadata[name]), parse_table(more[name])
        if "layers" in table and "layers" in more_table:
            layers = {**layers_in(metadata[name]), **layers_in(more[name])}
            merged[name] = json.dumps({**table, **more_table, "layers": layers})
    return merged


def configured_metadata(config: Mapping[str, object] | None) -> dict[str, str]:
    """Metadata in a ``config.json``, where a library wrote the files beside it.

    Libraries write what they please into the headers of files.

    Args:
        config: the ``config.json``; a ``quantization_config`` of hijack's counts.
    """
    quantization = (config or {}).get(CONFIG_KEY)
    if not isinstance(quantization, dict):
        return {}
    metadata = quantization.get("metadata")
    if quantization.get("quant_method") != QUANT_METHOD or not isinstance(
        metadata, dict
    ):
        return {}
    return {key: text for key, text in metadata.items() if isinstance(text, str)}


def metadata_clash(metadata: Mapping[str, str], more: Mapping[str, str]) -> str | None:
    """A key of which `merge_metadata` can keep only one of two texts, or None."""
    for name in metadata.keys() & more.keys():
        tables = parse_table(metadata[name]), parse_table(more[name])
        if metadata[name] != more[name] and not all("layers" in t for t in tables):
            return name
    return None


@functools.lru_cache(maxsize=256)
def _parse_marker(text: bytes) -> Mapping[str, Any]:
    """`parse_table`, cached: most layers of a file have the same marker."""
    return parse_table(text)


def parse_table(text: str | bytes) -> dict[str, Any]:
    """A JSON object, or an empty table where there is none."""
    try:
        table = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return table if isinstance(table, dict) else {}


@contextlib.contextmanager
def gc_paused() -> Iterator[None]:
    """Pause the collector, and restore its state at the end.

    The records of a header have no reference cycles. While tens of thousands of them
    are created, the collector would traverse all objects of the process several times,
    including torch's, and free nothing.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()
