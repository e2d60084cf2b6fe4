"""Dtypes: safetensors' names, sizes, and those that a dense weight may have."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch

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
#: Dtypes of dense weights: what models compute in. Anything else is quantized data.
DENSE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
#: The same, by safetensors' names.
DENSE_NAMES = frozenset(DTYPE_NAMES[dtype] for dtype in DENSE_DTYPES)
#: Bits of one element, for dtypes that torch lacks, or packs two to an element.
_BITS: Mapping[str, int] = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E8M0": 8}
#: What fits into the sizes of tensors, and of the file formats themselves.
_MAX_BYTES = 2**63 - 1


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
