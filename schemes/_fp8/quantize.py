"""Quantize a weight to FP8 in blocks: choose the scales, and round.

A tile of whole blocks is read, scaled and rounded while it is in the cache, in memory
that all tiles share.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from hijack.errors import NonFiniteError
from schemes._fp8.blocks import POWER_DTYPES, decode_scale
from schemes._kernels.block_scaled import BlockScaled
from schemes._kernels.eager import are_plain
from schemes._kernels.table import TABLE

#: musubi-tuner's floor of the scale.
MIN_SCALE = 1e-8
#: Elements processed at a time: on the CPU what fits the cache of a core, elsewhere
#: enough to hide the launch of operations.
CHUNK = 1 << 18
DEVICE_CHUNK = 1 << 24
#: Elements for which random numbers are drawn at a time. It decides which numbers a
#: seed gives, so it never changes.
RANDOM_CHUNK = 1 << 18
#: Most threads that share a tile; more take longer to start than it takes to compute.
MAX_THREADS = 16
#: Most candidates of a search: as many as bfloat16 has in an octave.
MAX_CANDIDATES = 128
#: Relative error of the sums of squared errors.
MARGIN = 2.0**-14


def quantize(
    matrix: Tensor,
    size: tuple[int, int],
    codes: Tensor,
    scale: Tensor,
    *,
    candidates: int = 0,
    random: torch.Generator | None = None,
) -> None:
    """Quantize a weight; the result does not depend on the size of the tiles.

    Args:
        matrix: (N, K) floating point.
        size: (R, C), the block size, no larger than the weight.
        codes: (N, K) of an FP8 dtype, which is written to.
        scale: (ceil(N/R), ceil(K/C)) float32, bfloat16, float16 or float8_e8m0fnu,
            which is written to; exponents are rounded up, so that nothing is clipped.
        candidates: number of other scales to try for each block, up to 128; 0 takes the
            absmax scale.
        random: source of stochastic rounding; None rounds to nearest.

    Raises:
        NonFiniteError: if the weight holds inf or NaN, also once it is float32.
    """
    if random is None and are_plain(matrix):
        finite = TABLE.quantize(matrix, BlockScaled(codes, scale, size), candidates)
        if finite is not None:
            if not finite:
                raise _not_finite(matrix)
            return
    rows, cols = size
    memory = _Memory(matrix.device)
    search, room = None, _room(matrix)
    if candidates:
        search = _Search(codes.dtype, scale.dtype, candidates, memory)
        room = room * cols // max(cols, candidates)  # an error for each candidate
    amax = torch.empty(scale.shape, dtype=torch.float32, device=scale.device)
    for up, along in _tiles(matrix.shape, size, room):
        span = slice(up.start * rows, up.stop * rows)
        across = slice(along.start * cols, along.stop * cols)
        tile = _Tile(matrix[span, across], size, room, memory)
        amax[up, along] = largest = tile.amax()
        chosen = _absmax_scale(largest, codes.dtype, scale.dtype)
        if search is not None:
            chosen = search.best(tile, chosen)
        scale[up, along] = chosen
        if random is None:
            tile.encode(chosen, codes[span, across])
    if not amax.isfinite().all():  # the largest of anything with a NaN is NaN
        raise _not_finite(matrix)
    if random is not None:
        encode(matrix, scale, size, codes, random)


def encode(
    weight: Tensor,
    scale: Tensor,
    size: tuple[int, int],
    out: Tensor,
    random: torch.Generator | None,
) -> None:
    """Quantize a weight with given scales.

    Args:
        weight: (N, K) floating point.
        scale: (ceil(N/R), ceil(K/C)).
        size: (R, C), the block size.
        out: (N, K) of an FP8 dtype.
        random: source of stochastic rounding; None rounds to nearest.
    """
    room = _room(weight)
    if random is not None and weight.device.type == "cpu":
        room = RANDOM_CHUNK
    _Tile(weight, size, room, _Memory(weight.device)).encode(scale, out, random)


# -- tiles -----------------------------------------------------------------------------


def _room(weight: Tensor) -> int:
    """Elements processed at a time: on the CPU a chunk for each thread of torch's."""
    if weight.device.type != "cpu":
        return DEVICE_CHUNK
    return CHUNK * min(torch.get_num_threads(), MAX_THREADS)


def _tiles(
    shape: tuple[int, ...], size: tuple[int, int], room: int
) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of the grid of scales that are quantized at a time.

    Args:
        shape: (N, K) of the weight.
        size: (R, C), the block size.
        room: elements of a tile, unless a single block has more.
    """
    (n, k), (rows, cols) = shape, size
    high, wide = -(-n // rows), -(-k // cols)
    step = max(room // (rows * k), 1)
    # as wide as the weight if one row of blocks is not too large for that
    across = wide if rows * k <= room else max(room // (rows * cols), 1)
    for top in range(0, high, step):
        for left in range(0, wide, across):
            yield (
                slice(top, min(top + step, high)),
                slice(left, min(left + across, wide)),
            )


class _Memory:
    """Memory of temporaries that is used again: memory anew costs more than they do."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._known: dict[str, Tensor] = {}

    def get(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of any content, which the next one of that name overwrites."""
        size = math.prod(shape)
        known = self._known.get(name)
        if known is None or known.numel() < size:
            known = torch.empty(size, dtype=dtype, device=self.device)
            self._known[name] = known
        return known[:size].view(shape)


class _Tile:
    """Whole blocks of a weight, which are loaded some rows at a time.

    Args:
        weight: (n, K) floating point.
        size: (R, C), the block size.
        room: elements that are loaded at a time, unless a single row has more.
        memory: of temporaries.

    Attributes:
        spans: first and last row of what is loaded at a time.
    """

    def __init__(
        self, weight: Tensor, size: tuple[int, int], room: int, memory: _Memory
    ) -> None:
        self.weight, self.size, self.memory = weight, size, memory
        n, step = len(weight), max(room // weight.shape[1], 1)
        self.spans = [(top, min(top + step, n)) for top in range(0, n, step)]
        self._loaded: tuple[int, int] | None = None

    def load(self, span: tuple[int, int]) -> Tensor:
        """Some rows as blocks (n, ceil(K/C), C) float32; short ones end in zeros.

        The next rows take their memory. Who writes to them calls `forget`.
        """
        n, k, cols = span[1] - span[0], self.weight.shape[1], self.size[1]
        wide = -(-k // cols)
        x = self.memory.get("rows", (n, wide * cols), torch.float32)
        if self._loaded != span:
            x[:, :k].copy_(self.weight[slice(*span)])
            if k < wide * cols:
                x[:, k:].zero_()
            self._loaded = span
        return x.view(n, wide, cols)

    def load_absolute(self, span: tuple[int, int]) -> Tensor:
        """As `load`, without signs."""
        x = self.load(span)
        self.forget()
        return x.abs_()

    def forget(self) -> None:
        """Have rows loaded again."""
        self._loaded = None

    def owners(self, span: tuple[int, int]) -> slice | Tensor:
        """The row of the grid of scales that each of some rows belongs to."""
        if self.size[0] == 1:
            return slice(*span)
        return torch.arange(*span, device=self.weight.device) // self.size[0]

    def amax(self) -> Tensor:
        """The largest absolute value of each block, (ceil(n/R), ceil(K/C)) float32."""
        parts = []
        for span in self.spans:
            x = self.load(span)
            # two reductions read what an absolute value would have to write
            parts.append(torch.maximum(x.amax(2).abs_(), x.amin(2).abs_()))
        amax = parts[0] if len(parts) == 1 else torch.cat(parts)  # (n, ceil(K/C))
        rows = self.size[0]
        if rows == 1:
            return amax
        amax = F.pad(amax, (0, 0, 0, -len(amax) % rows))
        return amax.view(-1, rows, amax.shape[1]).amax(1)

    def encode(
        self, scale: Tensor, out: Tensor, random: torch.Generator | None = None
    ) -> None:
        """Quantize with given scales.

        Args:
            scale: (ceil(n/R), ceil(K/C)).
            out: (n, K) of an FP8 dtype.
            random: source of stochastic rounding; None rounds to nearest.
        """
        most = torch.finfo(out.dtype).max
        factor = decode_scale(scale)
        for span in self.spans:
            x = self.load(span)
            self.forget()
            x.div_(factor[self.owners(span)][:, :, None])
            if scale.dtype not in (torch.float32, torch.bfloat16):
                # one that underflows is 0: then 0/0 becomes 0, x/0 the largest number
                x.nan_to_num_(0.0)
            x.clamp_(-most, most)
            if random is not None:
                x = _round_stochastic(x, out.dtype, random)
            out[slice(*span)].copy_(x.flatten(1)[:, : out.shape[1]])


# -- scales --------------------------------------------------------------------------


def _absmax_scale(amax: Tensor, dtype: torch.dtype, scale_dtype: torch.dtype) -> Tensor:
    """The scale that puts each block's largest value at the end of the range.

    Args:
        amax: (ceil(N/R), ceil(K/C)) float32, the largest absolute values.
        dtype: the FP8 dtype.
        scale_dtype: dtype of the result.
    """
    # divide by a tensor: a GPU multiplies by a scalar's reciprocal, which rounds twice
    scale = amax / amax.new_tensor(torch.finfo(dtype).max)
    if scale_dtype in POWER_DTYPES:
        return _round_up_to_power(scale)
    scale = scale.to(scale_dtype)
    return scale.clamp(MIN_SCALE, torch.finfo(scale_dtype).max)


def _round_up_to_power(scale: Tensor) -> Tensor:
    """The next power of two up, as float8_e8m0fnu; 2**-127 for 0.

    comfy-kitchen and DeepSeek round this way; OCP MX rounds down, and clips.
    """
    fraction, exponent = torch.frexp(scale)  # fraction in [0.5, 1), or 0
    exponent = exponent - (fraction == 0.5).int()
    exponent = torch.where(scale > 0, exponent, -127).clamp(-127, 127)
    return (exponent + 127).to(torch.uint8).view(POWER_DTYPES[0])


def _not_finite(weight: Tensor) -> NonFiniteError:
    """The error that counts what is not finite."""
    nans, infs = 0, 0
    for part in torch.split(weight, max(_room(weight) // weight.shape[1], 1)):
        part = part.float()  # float64 may become infinite
        nans, infs = nans + int(part.isnan().sum()), infs + int(part.isinf().sum())
    return NonFiniteError(
        f"weight of shape {tuple(weight.shape)} holds {nans} NaN and {infs} "
        "infinite values as float32, expected finite ones; repair the checkpoint "
        "or exclude it"
    )


# -- search --------------------------------------------------------------------------


class _Search:
    """The scale of each block with the least squared error, among candidates.

    The numbers of a floating format have the same relative spacing at 2x as at x, so
    one octave above the absmax scale, where nothing is clipped, covers all
    possibilities. The candidates are 2**(j/J) times a power of two, the same for all
    blocks. So an element's error depends only on the candidate and on its first seven
    bits of mantissa, up to a power of two, and is looked up in a table. For scales that
    are powers of two the only other candidate is half as large, which clips.

    The best candidate is then compared with the absmax scale, both as stored, by
    rounding every element. A block keeps the absmax scale unless the candidate is
    better by more than the error of float32.

    Args:
        dtype: the FP8 dtype.
        scale_dtype: dtype of the scales.
        candidates: J, number of other scales to try, 1 to 128.
        memory: of temporaries.
    """

    def __init__(
        self,
        dtype: torch.dtype,
        scale_dtype: torch.dtype,
        candidates: int,
        memory: _Memory,
    ) -> None:
        self.dtype, self.memory = dtype, memory
        self.table = None
        if scale_dtype not in POWER_DTYPES:
            self.table = _ErrorTable(dtype, scale_dtype, candidates, memory)

    def best(self, tile: _Tile, scale: Tensor) -> Tensor:
        """The best scale of each block of a tile.

        Args:
            tile: of a weight.
            scale: (g, ceil(K/C)), its absmax scales.

        Returns:
            (g, ceil(K/C)) of ``scale``'s dtype.
        """
        first = decode_scale(scale)
        if self.table is None:
            other = (first / 2).clamp_min_(2.0**-127)
        else:
            other = self.table.likely(tile, first)
        return _store(self._better(tile, first, other), scale.dtype)

    def _better(self, tile: _Tile, first: Tensor, other: Tensor) -> Tensor:
        """(g, ceil(K/C)) float32: the other scale if its squared error is less."""
        sums = _Sums(tile), _Sums(tile)
        for span in tile.spans:
            x, owners = tile.load_absolute(span), tile.owners(span)
            for scale, error in zip((first, other), sums, strict=True):
                found = _squared_error(x, scale[owners], self.dtype, self.memory)
                error.add(owners, found)
        old, new = (error.total for error in sums)
        # below 2**-100, squares in float32 lose precision
        better = (new < old * (1 - MARGIN)) & (old > 2.0**-100)
        return torch.where(better, other, first)


class _Sums:
    """Sums over the rows of each block of a tile.

    Attributes:
        total: (g, ...), when all rows are in it.
    """

    total: Tensor

    def __init__(self, tile: _Tile) -> None:
        self._rows = -(-len(tile.weight) // tile.size[0])

    def add(self, owners: slice | Tensor, values: Tensor) -> None:
        """Add (n, ...) of some rows; if blocks have one row, all come at once."""
        if isinstance(owners, slice):
            self.total = values
            return
        if not hasattr(self, "total"):
            self.total = values.new_zeros((self._rows, *values.shape[1:]))
        self.total.index_add_(0, owners, values)


class _ErrorTable:
    """Squared errors of elements by exponent and mantissa, for each candidate.

    Row 128 * e + m is for elements of mantissa 1 + m/128. Exponents are relative to the
    absmax scale's, up to the largest possible one; smaller elements than the first row
    count as zero. All candidates are twice the mantissas, even those that will be used
    undoubled. This affects only subnormal FP8 numbers, whose error is small.
    """

    EXPONENTS = 16

    def __init__(
        self,
        dtype: torch.dtype,
        scale_dtype: torch.dtype,
        candidates: int,
        memory: _Memory,
    ) -> None:
        self.scale_dtype, self.memory = scale_dtype, memory
        # on the CPU, so that the table is the same everywhere
        numbers = torch.arange(candidates, dtype=torch.int32, device="cpu")
        # (J,) float32, in [1, 2], as the scale's dtype has them
        mantissas = torch.exp2(numbers.float() / candidates).to(scale_dtype).float()
        # the largest element is less than this power of two times the scale's
        reach = int(math.log2(torch.finfo(dtype).max)) + 2
        # of the first row, less the scale's
        self.lowest = reach - self.EXPONENTS
        row = torch.arange(self.EXPONENTS * 128, device="cpu")[:, None]
        element = torch.ldexp((128 + row % 128).float(), row // 128 + self.lowest - 7)
        scale = 2 * mantissas
        rounded = (element / scale).to(dtype).float() * scale
        errors = (rounded - element).square_()  # (16 * 128, J)
        errors[0] = 0
        self.numbers = numbers.to(memory.device)
        self.mantissas = mantissas.to(memory.device)
        self.errors = errors.to(memory.device)

    def likely(self, tile: _Tile, scale: Tensor) -> Tensor:
        """The candidate with the least error for each block of (g, ceil(K/C)), float32.

        Args:
            tile: of a weight.
            scale: (g, ceil(K/C)) float32, its absmax scales.
        """
        info = torch.finfo(self.scale_dtype)
        # a float16 scale may have become 0
        scale = scale.clamp_min(info.smallest_normal * info.eps)
        fraction, exponent = torch.frexp(scale)  # fraction in [0.5, 1)
        first = (exponent + (126 + self.lowest)).bitwise_left_shift_(7).short()
        sums = _Sums(tile)
        for span in tile.spans:
            x, owners = tile.load_absolute(span), tile.owners(span)
            shape = tuple(x.shape)
            keys = self.memory.get("bits", shape, torch.bfloat16).copy_(x)
            keys = keys.view(torch.int16).sub_(first[owners][:, :, None])
            keys.clamp_(0, len(self.errors) - 1)
            index = self.memory.get("index", shape, torch.int32).copy_(keys)
            found = F.embedding_bag(index.flatten(0, 1), self.errors, mode="sum")
            sums.add(owners, found.view(*shape[:2], -1))
        # argmin is slow: the candidate's number replaces the last bits
        bits = sums.total.view(torch.int32).bitwise_and_(-128).bitwise_or_(self.numbers)
        best: Tensor = self.mantissas[bits.amin(2).bitwise_and_(127)]
        up = (best < 2 * fraction).int()  # the octave starts at the absmax scale
        best = torch.ldexp(best, exponent - 1 + up).clamp_(max=info.max)
        return best.to(self.scale_dtype).float()


def _squared_error(
    part: Tensor, scale: Tensor, dtype: torch.dtype, memory: _Memory
) -> Tensor:
    """Squared error (n, ceil(K/C)) of each row of blocks, rounded as in `encode`.

    Args:
        part: (n, ceil(K/C), C) float32, absolute values.
        scale: (n, ceil(K/C)) float32.
        dtype: the FP8 dtype.
        memory: of temporaries.

    Returns:
        float64.
    """
    info, shape = torch.finfo(dtype), tuple(part.shape)
    scale = scale[:, :, None]
    x = memory.get("scaled", shape, torch.float32)
    # a float16 scale may have become 0
    torch.div(part, scale.clamp_min(2.0**-149), out=x)
    x.clamp_(max=info.max)
    # The spacing of numbers is eps at 1 and doubles with every binade. Adding and
    # subtracting a number with 2**23 times that spacing rounds to it, half to even.
    lowest = int(math.log2(info.smallest_normal)) + 127
    lift = 23 + int(math.log2(info.eps))
    power = memory.get("power", shape, torch.int32)
    torch.bitwise_and(x.view(torch.int32), 0x7F800000, out=power)
    power.clamp_(min=lowest << 23).add_(lift << 23)
    magic = power.view(torch.float32)
    x.add_(magic).sub_(magic).mul_(scale).sub_(part)
    norm: Tensor = torch.linalg.vector_norm(x, dim=2)
    return norm.double().square_()


def _store(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Cast float32 scales, which are exact in the dtype."""
    if dtype not in POWER_DTYPES:
        return scale.to(dtype)
    return (scale.view(torch.int32) >> 23).to(torch.uint8).view(dtype)


# -- rounding --------------------------------------------------------------------------


def _round_stochastic(x: Tensor, dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """Round up or down to FP8, with probabilities that make it unbiased.

    Args:
        x: float32, within the range of ``dtype``.
        dtype: the FP8 dtype.
        random: source of random numbers.
    """
    info = torch.finfo(dtype)
    exponent = torch.frexp(x).exponent - 1
    lowest = torch.frexp(torch.tensor(info.smallest_normal)).exponent - 1
    # the spacing of numbers: eps at 1, doubled or halved with every binade
    step = torch.ldexp(torch.full_like(x, info.eps), exponent.clamp_min(int(lowest)))
    steps = x / step  # exact: the step is a power of two
    below = steps.floor()
    up = torch.rand(x.shape, generator=random, device=x.device) < steps - below
    return (below + up) * step
