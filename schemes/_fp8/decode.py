"""Decode FP8 faster than torch's cast and multiplication, with bit-equal results.

On the CPU this uses integer operations. torch casts FP8 to bfloat16 one element at a
time, which takes longer than the matrix product it is for. But the bits of an FP8
number, shifted, are those of a bfloat16 or float32 number with another exponent bias ::

    e4m3       s eeee mmm            (-1)^s * 2^(e-7)   * 1.mmm
    bfloat16   s 0000eeee mmm0000    (-1)^s * 2^(e-127) * 1.mmm

so sign extension, a shift, a mask and a multiplication by scale * 2^(127-7) decode it,
subnormal numbers and zeros as well. It fails for inf and NaN, for scales so large that
the power of two overflows, and where the processor flushes subnormal numbers to zero;
`can_decode` is False for these. Each thread reuses its buffers between calls, and a
weight is never dense as a whole.

On a GPU it is a cast and one multiplication in place, which move a third of the bytes.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from schemes._fp8.blocks import decode_scale

#: FP8 dtype to (left shift within 16 bits, 127 - bias of the exponent, first byte that
#: is not a finite number).
FLOAT8_LAYOUTS = {
    torch.float8_e4m3fn: (4, 120, 0x7F),
    torch.float8_e5m2: (5, 112, 0x7C),
}
#: Scale dtypes that are exact in bfloat16, so that it can hold the product.
BF16_EXACT = (torch.bfloat16, torch.float8_e8m0fnu, torch.uint8)
#: Dtypes that can be decoded to.
DENSE = (torch.float32, torch.bfloat16, torch.float16)
#: Bytes decoded between two products where that fits the cache: one thread, few rows.
TILE_BYTES = 1 << 20
TILE_ROWS = 128
#: Bytes decoded between two products otherwise.
PIECE_BYTES = 1 << 25
#: Elements an operation may have before torch splits it over its threads, and waits.
GRAIN = 1 << 15
#: Elements decoded at a time on one thread.
CHUNK = 1 << 19
#: Narrower blocks have too many scales to be worth it.
MIN_COLS = 8

_SUBNORMAL = 5e-324
_PLAIN = (Tensor, nn.Parameter)
_local = threading.local()
#: Weights without inf and NaN: id to the tensor, its version and its memory.
_clean: dict[int, tuple[weakref.ref[Tensor], int, int]] = {}


def can_decode(qdata: Tensor, scale: Tensor, size: tuple[int, int]) -> bool:
    """Whether the integer decode is available and exact for these tensors.

    Args:
        qdata: (N, ...) float8_e4m3fn or float8_e5m2.
        scale: (ceil(N/R), ceil(K/C)).
        size: (R, C), the block size.
    """
    return (
        are_plain(qdata, scale)
        and qdata.device.type == "cpu" == scale.device.type
        and size[1] >= MIN_COLS
        and qdata.numel() > 0
        and qdata.dtype in FLOAT8_LAYOUTS
        and _SUBNORMAL * 1.0 != 0.0  # subnormal numbers are not flushed to zero
        and _scale_fits(scale)
        and is_finite(qdata)
    )


def are_plain(*tensors: Tensor) -> bool:
    """Whether operations on these run eagerly, with no mode or transform active."""
    return not torch.compiler.is_compiling() and (
        all(type(tensor) in _PLAIN for tensor in tensors)
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._is_tracing()
    )


def _scale_fits(scale: Tensor) -> bool:
    if scale.dtype in (torch.uint8, torch.float8_e8m0fnu):
        return int(scale.view(torch.uint8).max()) < 127 + 7
    least, most = scale.detach().aminmax()
    return float(least) > -128 and float(most) < 128  # False for NaN


def is_finite(qdata: Tensor) -> bool:
    """Whether no element is NaN or infinite; checked once per content of a tensor.

    Args:
        qdata: float8_e4m3fn or float8_e5m2, of any shape.
    """
    # inference tensors have no version; hijack writes only finite data into them
    version = -1 if qdata.is_inference() else qdata._version
    now = (version, qdata.data_ptr())
    known = _clean.get(id(qdata))
    if known is not None and known[0]() is qdata and known[1:] == now:
        return True
    limit = FLOAT8_LAYOUTS[qdata.dtype][2] * 2
    data = qdata.detach().view(torch.uint8).reshape(-1)
    if not len(data):
        return True
    shifted = data.new_empty(min(len(data), CHUNK))  # memory anew costs ten times more
    for part in torch.split(data, CHUNK):
        without_sign = torch.mul(part, 2, out=shifted[: len(part)])
        if int(without_sign.max()) >= limit:
            return False
    key = id(qdata)
    _clean[key] = (weakref.ref(qdata, lambda _: _clean.pop(key, None)), *now)
    return True


def dequantize(
    qdata: Tensor, scale: Tensor, size: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """Quantized data times scales; the product is formed in float32 and rounded once.

    Args:
        qdata: (N, K), for which `can_decode` holds.
        scale: (ceil(N/R), ceil(K/C)).
        size: (R, C), the block size.
        dtype: float32, bfloat16 or float16.

    Returns:
        (N, K) of ``dtype``.
    """
    n, k = qdata.shape
    out = torch.empty((n, k), dtype=dtype, device="cpu")
    _decode(qdata, scale, size, slice(0, n), out)
    return out


def multiply_in_place(
    qdata: Tensor, scale: Tensor, size: tuple[int, int], dtype: torch.dtype
) -> Tensor:
    """`dequantize` for a GPU, where memory traffic is the bottleneck.

    Every FP8 number is exact in the 16-bit dtypes. A GPU multiplies mixed dtypes
    without copies, in float32, and rounds once; a single dtype is faster.

    Args:
        qdata: (N, K), for which `are_plain` holds.
        scale: (ceil(N/R), ceil(K/C)).
        size: (R, C), the block size.
        dtype: floating dtype of the result.

    Returns:
        (N, K) of ``dtype``.
    """
    dense = qdata.to(dtype if dtype in DENSE else torch.float32)
    if scale.dtype != dense.dtype:
        scale = decode_scale(scale)
    for rows, up, r in _spans(qdata.shape[0], size[0]):
        for cols, along, c in _spans(qdata.shape[1], size[1]):
            factor = scale[up, along][:, None, :, None]
            blocks = dense[rows, cols].view(len(factor), r, -1, c)
            blocks.mul_(factor)
    return dense.to(dtype)


def _spans(length: int, block: int) -> Iterator[tuple[slice, slice, int]]:
    """Whole blocks, then the short one: elements, scales, size of a block."""
    whole = length // block if length else 0
    if whole:
        yield slice(whole * block), slice(whole), block
    if whole * block < length:
        yield slice(whole * block, None), slice(whole, None), length - whole * block


def linear(
    x: Tensor, qdata: Tensor, scale: Tensor, size: tuple[int, int], bias: Tensor | None
) -> Tensor:
    """``F.linear`` with an FP8 weight that is decoded in pieces.

    Args:
        x: (..., K) float32, bfloat16 or float16; `can_multiply` holds.
        qdata: (N, K), for which `can_decode` holds.
        scale: (ceil(N/R), ceil(K/C)).
        size: (R, C), the block size.
        bias: (N,) of ``x``'s dtype, or None.

    Returns:
        (..., N) of ``x``'s dtype.
    """
    n, k = qdata.shape
    out = x.new_empty((*x.shape[:-1], n))
    flat_x, flat_out = x.detach().reshape(-1, k), out.view(-1, n)  # (M, K), (M, N)
    tiled = torch.get_num_threads() == 1 and flat_x.shape[0] <= TILE_ROWS
    limit = (TILE_BYTES if tiled else PIECE_BYTES) // (k * x.element_size())
    step = min(max(limit, 1), n)
    buffer = _buffer("weight", step * k, x.dtype).view(step, k)
    for rows in _pieces(n, step):
        dense = buffer[: rows.stop - rows.start]  # (n', K)
        _decode(qdata, scale, size, rows, dense)
        if bias is None:
            torch.mm(flat_x, dense.t(), out=flat_out[:, rows])
        else:
            torch.addmm(bias.detach()[rows], flat_x, dense.t(), out=flat_out[:, rows])
    return out


def can_multiply(x: Tensor, bias: Tensor | None) -> bool:
    """Whether `linear` may be used: eager CPU inference without autocast."""
    if type(x) not in _PLAIN or x.device.type != "cpu" or not x.numel():
        return False
    grad = x.requires_grad or (bias is not None and bias.requires_grad)
    return (
        x.dtype in DENSE
        and not (grad and torch.is_grad_enabled())
        and not torch.is_autocast_enabled("cpu")
        and forward_ad._current_level < 0
    )


def _decode(
    qdata: Tensor, scale: Tensor, size: tuple[int, int], rows: slice, out: Tensor
) -> None:
    """Write some rows of (N, K) qdata times scales to (n, K) ``out``."""
    step = max(GRAIN // scale.shape[1], 1)
    for part in _pieces(out.shape[0], step):
        absolute = slice(rows.start + part.start, rows.start + part.stop)
        _decode_part(qdata, scale, size, absolute, out[part])


def _decode_part(
    qdata: Tensor, scale: Tensor, size: tuple[int, int], rows: slice, out: Tensor
) -> None:
    """`_decode` for few rows, whose scales are converted at once."""
    shift, exponent, _ = FLOAT8_LAYOUTS[qdata.dtype]
    integer, real = torch.int16, torch.bfloat16
    if out.dtype != torch.bfloat16 or scale.dtype not in BF16_EXACT:
        shift, integer, real = shift + 16, torch.int32, torch.float32
    n, k = out.shape
    step = min(_chunk_rows(k), n)
    dense = out
    if out.dtype != real:  # the wider type, for one step
        dense = _buffer("wide", step * k, real).view(step, k)
    factor = _factor(scale, size[0], rows, exponent).to(real)  # (n, ceil(K/C))
    times = torch.tensor(1 << shift, dtype=integer, device="cpu")
    mask = (0x7F << shift) + torch.iinfo(integer).min  # sign, exponent and mantissa
    masks = torch.tensor(mask, dtype=integer, device="cpu")
    # split once, outside the loop
    source = torch.split(qdata.detach()[rows].view(torch.int8), step)
    numbers = torch.split(dense.view(integer), step)
    blocks = [
        (torch.split(block, step), torch.split(scales, step))
        for block, scales in _blocks(dense, factor, size[1])
    ]
    for at, data in enumerate(source):
        if dense is out:
            number, parts = numbers[at], [(b[at], s[at]) for b, s in blocks]
        else:
            here = slice(0, len(data))
            number, parts = numbers[0][here], [(b[0][here], s[at]) for b, s in blocks]
        number.copy_(data)  # extends the sign
        number.mul_(times)  # shifts; torch vectorises this, not the shift
        number.bitwise_and_(masks)
        for block, scales in parts:
            block.mul_(scales)
        if dense is not out:
            out[at * step : at * step + len(data)] = dense[: len(data)]


def _factor(scale: Tensor, block_rows: int, rows: slice, exponent: int) -> Tensor:
    """Scales of some rows times 2**exponent: a new (n, ceil(K/C)), still exact."""
    first, last = rows.start // block_rows, (rows.stop - 1) // block_rows
    part = scale.detach()[first : last + 1]
    if part.dtype == torch.uint8:
        part = part.view(torch.float8_e8m0fnu)
    if part.dtype != torch.bfloat16:
        part = part.float()
    part = part * 2.0**exponent
    if block_rows == 1:
        return part
    index = torch.arange(rows.start, rows.stop, device="cpu") // block_rows - first
    return part[index]


def _blocks(
    dense: Tensor, factor: Tensor, cols: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of (n, K) and (n, ceil(K/C)) to multiply: whole and short blocks."""
    n, k = dense.shape
    whole = k // cols
    if whole:
        block = dense if k % cols == 0 else dense[:, : whole * cols]
        yield block.view(n, whole, cols), factor[:, :whole, None]
    if k % cols:
        yield dense[:, whole * cols :], factor[:, whole:]


def _chunk_rows(k: int) -> int:
    return max((CHUNK if torch.get_num_threads() == 1 else GRAIN) // k, 1)


def _pieces(n: int, step: int) -> Iterator[slice]:
    for start in range(0, n, step):
        yield slice(start, min(start + step, n))


def _buffer(name: str, numel: int, dtype: torch.dtype) -> Tensor:
    """Uninitialised memory of this thread, reused at every call."""
    nbytes = numel * dtype.itemsize
    buffer: Tensor | None = getattr(_local, name, None)
    if buffer is None or buffer.numel() < nbytes:
        with torch.inference_mode(False):  # else it could not be written outside
            buffer = torch.empty(nbytes, dtype=torch.uint8, device="cpu")
        setattr(_local, name, buffer)
    return buffer[:nbytes].view(dtype)
