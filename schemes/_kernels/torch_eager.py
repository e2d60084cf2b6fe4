"""Decode with torch's own operations, faster than its cast and multiplication.

On the CPU, FP8 is decoded by integer operations. torch casts FP8 to bfloat16 one
element at a time, which takes longer than the matrix product it is for. But the bits of
an FP8 number, shifted, are those of a float32 number with another exponent bias ::

    e4m3      s eeee mmm                (-1)^s * 2^(e-7)   * 1.mmm
    float32   s 0000eeee mmm0000...     (-1)^s * 2^(e-127) * 1.mmm

so sign extension, a shift, a mask and a multiplication by scale * 2^(127-7) decode it,
subnormal numbers and zeros as well. It fails for inf and NaN, for scales so large that
the power of two overflows, and where the processor flushes subnormal numbers to zero;
`refuses` says so. Each thread reuses its buffers between calls, and a weight is never
dense as a whole.

On other devices it is a cast into a buffer and one multiplication in place: two
launches, and no memory that is not there already. Codes of four bits are looked up in
pieces.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from schemes._kernels import buffers, decoded, plain
from schemes._kernels.block_scaled import DENSE, BlockScaled

#: FP8 dtype to (left shift within 32 bits, 127 - bias of the exponent, first byte that
#: is not a finite number).
FLOAT8_LAYOUTS = {
    torch.float8_e4m3fn: (20, 120, 0x7F),
    torch.float8_e5m2: (21, 112, 0x7C),
}
#: Bytes decoded between two products where that fits the cache: one thread, few rows.
TILE_BYTES = 1 << 22
TILE_ROWS = 128
#: Bytes decoded between two products otherwise.
PIECE_BYTES = 1 << 25
#: Elements an operation may have before torch splits it over its threads, and waits.
GRAIN = 1 << 15
#: Elements decoded at a time on one thread.
CHUNK = 1 << 19
#: Elements of a table's numbers that exist at a time on a device.
DEVICE_CHUNK = 1 << 24
#: Narrower blocks have too many scales to be worth it.
MIN_COLS = 8

_SUBNORMAL = 5e-324
_CPU = torch.device("cpu")
#: Tensors that were looked at: id to the tensor, its version, its memory, the verdict.
_seen: dict[int, tuple[weakref.ref[Tensor], tuple[int, int], bool]] = {}


# -- what can be decoded ---------------------------------------------------------------


def refuses(weight: BlockScaled, dtype: torch.dtype) -> str | None:
    """Why a weight on the CPU cannot be decoded here to a dtype, or None.

    Codes and scales are looked at once for each content of a tensor.

    Args:
        weight: (N, K).
        dtype: of the result.
    """
    if dtype not in DENSE:
        return f"decodes to float32, bfloat16 and float16, not to {dtype}"
    if weight.size[1] < MIN_COLS:
        return f"blocks of {weight.size[1]} columns have too many scales"
    if not weight.codes.numel():
        return "the weight has no elements"
    if weight.codes.dtype not in FLOAT8_LAYOUTS:
        return None
    if _SUBNORMAL * 1.0 == 0.0:
        return "the processor flushes subnormal numbers to zero"
    if weight.factor is not None or not _once(weight.scale, _scale_fits):
        return "a scale is too large, or not a number"
    if not is_finite(weight.codes):
        return "a code is inf or NaN"
    return None


def refuses_elsewhere(weight: BlockScaled, dtype: torch.dtype) -> str | None:
    """Why a weight on a GPU cannot be decoded here to a dtype, or None."""
    if dtype not in DENSE:
        return f"decodes to float32, bfloat16 and float16, not to {dtype}"
    return None if weight.codes.numel() else "the weight has no elements"


def is_finite(codes: Tensor) -> bool:
    """Whether no element is NaN or infinite; checked once per content of a tensor.

    Args:
        codes: float8_e4m3fn, float8_e5m2 or float8_e8m0fnu, of any shape.
    """
    return _once(codes, _codes_are_finite)


def _once(tensor: Tensor, check: Callable[[Tensor], bool]) -> bool:
    """What a check says of a tensor, asked again only when its content may differ."""
    base = tensor._base
    if base is not None and base.numel() == tensor.numel():  # a view made a moment ago
        tensor = base
    # inference tensors have no version; hijack writes only finite data into them
    version = -1 if tensor.is_inference() else tensor._version
    now = (version, tensor.data_ptr())
    key = id(tensor)
    known = _seen.get(key)
    if known is not None and known[0]() is tensor and known[1] == now:
        return known[2]
    verdict = check(tensor)
    _seen[key] = (weakref.ref(tensor, lambda _: _seen.pop(key, None)), now, verdict)
    return verdict


def _scale_fits(scale: Tensor) -> bool:
    if scale.dtype == torch.float8_e8m0fnu:
        return int(scale.view(torch.uint8).max()) < 127 + 7
    least, most = scale.detach().float().aminmax()
    return float(least) > -128 and float(most) < 128  # False for NaN


def _codes_are_finite(codes: Tensor) -> bool:
    data = codes.detach().view(torch.uint8).reshape(-1)
    if not len(data):
        return True
    if codes.dtype == torch.float8_e8m0fnu:  # has no sign
        return int(data.max()) < 0xFF
    limit = FLOAT8_LAYOUTS[codes.dtype][2] * 2
    shifted = data.new_empty(min(len(data), CHUNK))  # memory anew costs ten times more
    for part in torch.split(data, CHUNK):
        without_sign = torch.mul(part, 2, out=shifted[: len(part)])
        if int(without_sign.max()) >= limit:
            return False
    return True


# -- on the CPU ------------------------------------------------------------------------


def decode(weight: BlockScaled, out: Tensor, rows: slice = slice(None)) -> None:
    """Write rows of the dense weight, in steps that stay in the cache.

    Args:
        weight: (N, K), on the CPU.
        out: (n, K) float32, bfloat16 or float16, as many rows as are asked for.
        rows: which rows; all by default.
    """
    start, stop, _ = rows.indices(weight.shape[0])
    step = max(GRAIN // weight.scale.shape[1], 1)
    for part in _pieces(stop - start, step):
        _decode_part(weight, slice(start + part.start, start + part.stop), out[part])


def linear(x: Tensor, weight: BlockScaled, bias: Tensor | None) -> Tensor:
    """``F.linear`` with a weight on the CPU that is decoded in pieces.

    Args:
        x: (M, K) float32, bfloat16 or float16.
        weight: (N, K).
        bias: (N,) of ``x``'s dtype, or None.

    Returns:
        (M, N) of ``x``'s dtype.
    """
    n, k = weight.shape
    x, out = x.detach(), x.new_empty((len(x), n))
    tiled = torch.get_num_threads() == 1 and len(x) <= TILE_ROWS
    limit = (TILE_BYTES if tiled else PIECE_BYTES) // (k * x.element_size())
    step = min(max(limit, 1), n)
    buffer = buffers.shared("weight", step * k, x.dtype, _CPU).view(step, k)
    for rows in _pieces(n, step):
        dense = buffer[: rows.stop - rows.start]  # (n', K)
        decode(weight, dense, rows)
        if bias is None:
            torch.mm(x, dense.t(), out=out[:, rows])
        else:
            torch.addmm(bias.detach()[rows], x, dense.t(), out=out[:, rows])
    return out


def _decode_part(weight: BlockScaled, rows: slice, out: Tensor) -> None:
    """`decode` for few rows, whose scales are converted at once.

    The product is in float32 whatever the dtypes: torch multiplies bfloat16 by scales
    that are spread over their blocks an eighth as fast.
    """
    codes = weight.codes.detach()
    n, k = out.shape
    step = min(_chunk_rows(k), n)
    dense = out
    if out.dtype != torch.float32:  # for one step
        dense = buffers.shared("wide", step * k, torch.float32, _CPU).view(step, k)
    factor = _factor(weight, rows)  # (n, ceil(K/C))
    numbers = _Numbers(weight)
    # split once, outside the loop
    source = torch.split(codes[rows], step)
    targets = torch.split(dense, step)
    blocks = [
        (torch.split(block, step), torch.split(scales, step))
        for block, scales in _blocks(dense, factor, weight.size[1])
    ]
    for at, data in enumerate(source):
        if dense is out:
            target, parts = targets[at], [(b[at], s[at]) for b, s in blocks]
        else:
            here = slice(0, len(data))
            target, parts = targets[0][here], [(b[0][here], s[at]) for b, s in blocks]
        numbers.write(data, target)
        for block, scales in parts:
            block.mul_(scales)
        if dense is not out:
            out[at * step : at * step + len(data)] = dense[: len(data)]


class _Numbers:
    """Writes what codes stand for; of FP8, less a power of two."""

    def __init__(self, weight: BlockScaled) -> None:
        self.pairs: Tensor | None = None
        self.layout = FLOAT8_LAYOUTS.get(weight.codes.dtype)
        if self.layout is not None:
            shift = self.layout[0]
            self.times = torch.tensor(1 << shift, dtype=torch.int32, device=_CPU)
            # sign, exponent and mantissa
            mask = (0x7F << shift) + torch.iinfo(torch.int32).min
            self.mask = torch.tensor(mask, dtype=torch.int32, device=_CPU)
        elif weight.table is not None:
            byte = torch.arange(256, device=_CPU)
            first, second = plain.nibbles(byte, weight.high_first)
            self.pairs = weight.table[torch.stack([first, second], 1)]  # (256, 2)

    def write(self, codes: Tensor, target: Tensor) -> None:
        """Codes of some rows as float32 numbers."""
        if self.layout is not None:
            bits = target.view(torch.int32)
            bits.copy_(codes.view(torch.int8))  # extends the sign
            bits.mul_(self.times)  # shifts; torch vectorises this, not the shift
            bits.bitwise_and_(self.mask)
        elif self.pairs is not None:
            index = codes.reshape(-1).int()
            pairs = target.view(-1, 2)
            torch.index_select(self.pairs, 0, index, out=pairs)
        else:
            target.copy_(codes)


def _factor(weight: BlockScaled, rows: slice) -> Tensor:
    """Scales of some rows, times what FP8 numbers lack: a new (n, ceil(K/C)) float32.

    The latter is a power of two, so that products stay exact.
    """
    height = weight.size[0]
    first, last = rows.start // height, (rows.stop - 1) // height
    part = weight.scale.detach()[first : last + 1].float()
    if weight.factor is not None:
        part = part * weight.factor
    layout = FLOAT8_LAYOUTS.get(weight.codes.dtype)
    if layout is not None:
        part = part * 2.0 ** layout[1]
    if height == 1:
        return part
    index = torch.arange(rows.start, rows.stop, device=_CPU) // height - first
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


# -- elsewhere -------------------------------------------------------------------------


def decode_elsewhere(weight: BlockScaled, out: Tensor) -> None:
    """Write the dense weight where memory traffic is the bottleneck.

    Every FP8 and int8 number is exact in the 16-bit dtypes. A GPU multiplies mixed
    dtypes without copies, in float32, and rounds once.

    Args:
        weight: (N, K).
        out: (N, K) float32, bfloat16 or float16, contiguous.
    """
    (n, k), scale = weight.shape, weight.scale
    if scale.dtype != out.dtype or weight.factor is not None:
        scale = plain.scales(weight)
    if weight.table is None:
        out.copy_(weight.codes)
    else:
        step = max(DEVICE_CHUNK // (k * weight.size[0]), 1) * weight.size[0]
        for rows in _pieces(n, step):
            out[rows] = plain.decode(weight.part(rows), out.dtype)
        return
    for rows, up, r in _spans(n, weight.size[0]):
        for cols, along, c in _spans(k, weight.size[1]):
            factor = scale[up, along][:, None, :, None]
            blocks = out[rows, cols].view(len(factor), r, -1, c)
            blocks.mul_(factor)


def linear_elsewhere(x: Tensor, weight: BlockScaled, bias: Tensor | None) -> Tensor:
    """``F.linear`` with the decoded weight; shapes are those of `decoded.linear`."""
    return decoded.linear(decode_elsewhere, x, weight, bias)


def _spans(length: int, block: int) -> Iterator[tuple[slice, slice, int]]:
    """Whole blocks, then the short one: elements, scales, size of a block."""
    whole = length // block if length else 0
    if whole:
        yield slice(whole * block), slice(whole), block
    if whole * block < length:
        yield slice(whole * block, None), slice(whole, None), length - whole * block
