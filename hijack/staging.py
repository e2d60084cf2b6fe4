"""Dense buffers that quantized weights pass through on their way between devices.

Block swapping copies the weights of a block into buffers made by ``empty_like``, and
from there into those of another block. The buffers are dense, for nothing was known of
what they are for. So a buffer that a quantized weight was copied into is remembered
with the quantized tensors, as long as nobody writes to it, and whoever is written from
it gets these: a swap changes no bit.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from hijack.quantized import QuantizedTensor

#: Buffers that were made like a quantized weight, by their ids.
_buffers: dict[int, weakref.ref[Tensor]] = {}
#: Id of a buffer to it, its version, and what was copied into it.
_copies: dict[int, tuple[weakref.ref[Tensor], int, QuantizedTensor]] = {}


def made_like(buffer: Tensor) -> None:
    """Remember a buffer that was made with the shape and dtype of a weight."""
    key = id(buffer)
    _buffers[key] = weakref.ref(buffer, lambda _: _buffers.pop(key, None))


def copied(buffer: Tensor, weight: QuantizedTensor) -> None:
    """Remember what a dense tensor is a copy of, if it is a buffer.

    Args:
        buffer: dense; the decoded weight has just been written to it.
        weight: the weight, wherever it is.
    """
    known = _buffers.get(id(buffer))
    made = known is not None and known() is buffer
    if not made and buffer.device == weight.device:
        return
    whole = (buffer.shape, buffer.dtype) == (weight.shape, weight.dtype)
    plain = type(buffer) is Tensor and buffer._base is None and not buffer.is_meta
    if not whole or not plain or buffer.requires_grad or buffer.is_inference():
        return
    pinned = buffer.device.type == "cpu" and buffer.is_pinned()
    key = id(buffer)

    def there(tensor: Tensor) -> Tensor:
        held = torch.empty_like(tensor, device=buffer.device, pin_memory=pinned)
        return held.copy_(tensor)

    reference = weakref.ref(buffer, lambda _: _copies.pop(key, None))
    # torch counts the write that it is in the midst of when that has returned
    _copies[key] = reference, buffer._version + 1, weight.map(there)


def original(buffer: Tensor) -> QuantizedTensor | None:
    """What a buffer is a copy of; None if it is none, or was written to since."""
    reference, version, weight = _copies.get(id(buffer), (None, 0, None))
    if weight is None or reference is None:
        return None
    if reference() is not buffer or buffer._version != version:
        return None
    # who writes to ``buffer.data`` is not counted
    return weight if torch.equal(weight.value(buffer.dtype), buffer) else None
