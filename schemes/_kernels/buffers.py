"""Memory for decoded weights, used again by the next layer.

There is one buffer for each thread, device, stream and use, as large as the largest
layer asked for. Work of one stream runs in order, so that the product with one layer is
done before the next layer is decoded over it.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor


class _Buffers(threading.local):
    """Of one thread: use, device and stream to memory."""

    def __init__(self) -> None:
        self.of: dict[tuple[str, torch.device, int], Tensor] = {}


_buffers = _Buffers()


def shared(
    use: str,
    numel: int,
    dtype: torch.dtype,
    device: torch.device,
    *,
    zeros: bool = False,
) -> Tensor:
    """Memory that the next call with the same ``use`` may get again.

    While a CUDA graph is captured the memory is new: a graph that is replayed writes to
    the addresses it has seen, which a buffer would give back once it grows.

    Args:
        use: what it is for.
        numel: elements.
        dtype: of the elements.
        device: where.
        zeros: whether it holds zeros; whoever writes to it makes them zeros again.

    Returns:
        (numel,) of ``dtype``, uninitialised if not of zeros.
    """
    make = torch.zeros if zeros else torch.empty
    if _is_capturing(device):
        return make(numel, dtype=dtype, device=device)
    nbytes = numel * dtype.itemsize
    key = use, device, _stream(device)
    buffer = _buffers.of.get(key)
    if buffer is None or buffer.numel() < nbytes:
        _buffers.of.pop(key, None)
        del buffer  # given back first, so that both never exist at a time
        with torch.inference_mode(False):  # else it could not be written outside
            buffer = make(nbytes, dtype=torch.uint8, device=device)
        _buffers.of[key] = buffer
    return buffer[:nbytes].view(dtype)


def release() -> None:
    """Give back the buffers of this thread."""
    _buffers.of.clear()


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _stream(device: torch.device) -> int:
    """The current stream of a device, as a number."""
    if device.type == "cuda":
        return torch.cuda.current_stream(device).cuda_stream
    if device.type == "xpu":
        return int(torch.xpu.current_stream(device).sycl_queue)
    return 0
