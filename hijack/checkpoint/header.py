"""What a checkpoint says about itself before any tensor data is read."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

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


@dataclasses.dataclass(frozen=True, slots=True)
class TensorInfo:
    """Dtype, shape and place of one tensor of a checkpoint.

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
    def torch_dtype(self) -> torch.dtype | None:
        """The dtype as torch knows it, or None."""
        return DTYPES.get(self.dtype)


class _TensorView(Mapping[str, TensorInfo]):
    """TensorInfo of a state dict's tensors, made when asked for."""

    def __init__(self, state_dict: Mapping[str, Tensor]) -> None:
        self._state_dict = state_dict

    def __getitem__(self, key: str) -> TensorInfo:
        tensor = self._state_dict[key]
        dtype = getattr(tensor, "dtype", None)
        name = DTYPE_NAMES.get(dtype, str(dtype)) if dtype is not None else "None"
        return TensorInfo(name, tuple(getattr(tensor, "shape", ())))

    def __contains__(self, key: object) -> bool:
        return key in self._state_dict

    def __iter__(self) -> Iterator[str]:
        return iter(self._state_dict)

    def __len__(self) -> int:
        return len(self._state_dict)


@dataclasses.dataclass(frozen=True, slots=True)
class Header:
    """Everything known of a checkpoint from its header alone.

    Attributes:
        tensors: key to TensorInfo, over all shards.
        metadata: the ``__metadata__`` table; strings to strings.
        config: the ``config.json`` beside the file, if there is one.
        source: what to call the checkpoint in messages.
    """

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    config: Mapping[str, object] | None = None
    source: str = "state dict"

    @classmethod
    def from_state_dict(
        cls, state_dict: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
    ) -> Header:
        """View a state dict as a header; tensors are looked at only when asked for."""
        return cls(_TensorView(state_dict), dict(metadata or {}))

    def layers(self) -> Iterator[str]:
        """Names of the layers that own a ``weight``, in file order; "" is the root."""
        for key in self.tensors:
            if key == "weight":
                yield ""
            elif key.endswith(".weight"):
                yield key[: -len(".weight")]


def join(layer: str, suffix: str) -> str:
    """Key of a layer's tensor: ``join("a.b", "weight")`` is ``"a.b.weight"``."""
    return f"{layer}.{suffix}" if layer else suffix
