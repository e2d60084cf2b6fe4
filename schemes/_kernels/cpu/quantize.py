"""Quantize a weight in blocks: absmax scale, search for a better one, and codes.

One pass over rows that stay in the cache. The largest bits of a block without their
signs are those of its largest number; they tell NaN and infinity too. Scales and codes
are bit for bit those that torch's operations give: true quotients, rounded to nearest
even.

A search rounds the numbers of a block with every candidate, and takes the one with the
least squared error. Quotients are products with the reciprocal there, so that a number
may be rounded to the other of two neighbours that are equally far within the error of
float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from llvmlite import ir
from torch import Tensor

from schemes._kernels.cpu import threads
from schemes._kernels.cpu.decoding import KINDS
from schemes._kernels.cpu.llvm import kernel
from schemes._kernels.cpu.vectors import (
    F16,
    F32,
    F64,
    I8,
    I16,
    I32,
    INFINITY_BITS,
    SIZES,
    WIDTH,
    Function,
    memory_type,
    vector,
    width_of,
)

#: Numbers whose errors are summed together in a search.
_CHUNK = 64
#: Of codes that are floating point: bits of mantissa, bias of the exponent.
_FLOATS = {"e4m3": (3, 7), "e5m2": (2, 15)}
#: The floors of scales: musubi-tuner's for FP8, comfy-kitchen's for int8.
FP8_LEAST_SCALE = 1e-8
INT8_LEAST_SCALE = 1e-30
#: How much less the squared error must be for FP8, as a part of it: sums of float32 in
#: another order differ by less.
FP8_MARGIN = 2.0**-14
#: Smaller sums of squares lose precision in float32.
_LEAST_ERROR = 2.0**-100


class Spec(NamedTuple):
    """What a kernel is specialised for.

    Attributes:
        dense: dtype of the weight.
        code: dtype of the codes.
        scale: dtype of the scales.
        search: whether other scales than the absmax one are tried.
    """

    dense: str
    code: str
    scale: str
    search: bool


def quantize_fp8(
    matrix: Tensor,
    size: tuple[int, int],
    codes: Tensor,
    scale: Tensor,
    candidates: int,
    parallel: bool,
) -> bool:
    """See `schemes._kernels.cpu.quantize_fp8`."""
    largest = torch.finfo(codes.dtype).max
    if scale.dtype == torch.float8_e8m0fnu:
        table = [0.5] if candidates else []
        limits = (0.0, float("inf"))  # a power of two is no less than 2**-127
    else:
        numbers = torch.arange(candidates, dtype=torch.float32)
        table = torch.exp2(numbers / candidates).to(scale.dtype).float().tolist()
        limits = (FP8_LEAST_SCALE, torch.finfo(scale.dtype).max)
    return _run(
        *(matrix, size, codes, scale, table),
        *(largest, *limits, 1 - FP8_MARGIN, parallel),
    )


def quantize_int8(
    matrix: Tensor,
    size: tuple[int, int],
    codes: Tensor,
    scale: Tensor,
    candidates: int,
    parallel: bool,
) -> bool:
    """See `schemes._kernels.cpu.quantize_int8`."""
    table = [1 - number / (2 * candidates) for number in range(1, candidates + 1)]
    floor = max(INT8_LEAST_SCALE, torch.finfo(scale.dtype).tiny)
    return _run(
        *(matrix, size, codes, scale, table),
        *(127.0, floor, float("inf"), 1.0, parallel),
    )


def _run(
    matrix: Tensor,
    size: tuple[int, int],
    codes: Tensor,
    scale: Tensor,
    candidates: list[float],
    largest: float,
    floor: float,
    cap: float,
    keep: float,
    parallel: bool,
) -> bool:
    """Quantize a weight with absmax scales, or better ones.

    Args:
        matrix: (N, K) float32, bfloat16 or float16.
        size: (R, C), the block size.
        codes: (N, K), dense along columns; written.
        scale: (ceil(N/R), ceil(K/C)), dense along columns; written.
        candidates: other scales to try. For FP8, numbers in [1, 2]: times powers of two
            such that they are not below the absmax scale. For int8, times the absmax
            scale. For scales that are powers of two, half of it, whatever they are.
        largest: the number that the largest of a block becomes.
        floor: least scale.
        cap: largest scale.
        keep: the part of the squared error that a better scale must stay below.
        parallel: whether to use torch's number of threads.
    """
    matrix = matrix.detach()
    if matrix.stride(1) != 1:
        matrix = matrix.contiguous()
    (n, k), (rows, cols) = matrix.shape, size
    kinds = (KINDS[matrix.dtype], KINDS[codes.dtype], KINDS[scale.dtype])
    run = kernel(build, Spec(*kinds, bool(candidates)))
    # the first stands for the absmax scale; vectors are read whole
    table = torch.zeros(-(-(len(candidates) + 1) // WIDTH) * WIDTH)
    if candidates:
        table[1 : len(candidates) + 1] = torch.tensor(candidates)
    floats = (largest, *_rounded_to(scale.dtype, floor, cap), keep)
    scratch = _scratch_bytes(k, cols, len(table))
    arguments = (
        *(matrix.data_ptr(), matrix.stride(0) * matrix.element_size()),
        *(n, k, rows, cols),
        *(codes.data_ptr(), codes.stride(0)),
        *(scale.data_ptr(), scale.stride(0) * scale.element_size()),
        *(table.data_ptr(), len(candidates) + 1),
    )
    return not threads.run(
        *(run, (*arguments, *floats), slice(0, len(scale)), rows * k, scratch),
        parallel=parallel,
    )


def _rounded_to(dtype: torch.dtype, *numbers: float) -> list[float]:
    """Numbers as a dtype of scales has them."""
    if dtype == torch.float8_e8m0fnu:
        return list(numbers)
    rounded: list[float] = torch.tensor(numbers).to(dtype).tolist()
    return rounded


def _scratch_bytes(k: int, cols: int, candidates: int) -> int:
    """As `build` lays it out."""
    blocks = -(-k // cols) + WIDTH
    return 4 * (2 * blocks + cols + 2 * _CHUNK) + candidates * (4 + 4 + 8 + 4 * WIDTH)


# -- the kernel ------------------------------------------------------------------------


class _Scratch(NamedTuple):
    """Addresses of what a kernel keeps while it works.

    Attributes:
        amax: bits of the largest number of each block, int32.
        scales: of each block, float32.
        numbers: a row of a block, float32, filled up with zeros.
        candidates: scales, float32.
        inverse: their reciprocals.
        errors: 16 float32 for each candidate, of one row of a block.
        sums: float64 for each candidate.
    """

    amax: ir.Value
    scales: ir.Value
    numbers: ir.Value
    candidates: ir.Value
    inverse: ir.Value
    errors: ir.Value
    sums: ir.Value


def build(spec: Spec) -> Function:
    """Quantize rows of blocks ``first`` to ``last``; 1 if something is not finite."""
    f = Function(
        "quantize",
        "matrix matrix_stride n k rows cols codes codes_stride "
        "scales scales_stride table count",
        "largest floor cap keep",
    )
    b = f.b
    blocks = b.sdiv(f.add(f["k"], f["cols"], -1), f["cols"])
    room = f.mul(f.add(blocks, WIDTH), 4)
    padded = b.and_(f.add(f["count"], WIDTH - 1), f.integer(-WIDTH))
    at = f["scratch"]
    addresses = []
    for nbytes in (
        *(room, room, f.mul(f.add(f["cols"], 2 * _CHUNK), 4)),
        *(f.mul(padded, 4), f.mul(padded, 4), f.mul(padded, 4 * WIDTH)),
        f.integer(0),
    ):
        addresses.append(at)
        at = f.add(at, nbytes)
    scratch = _Scratch(*addresses)

    with f.loop(f["first"], f["last"]) as block_row:
        start = f.mul(block_row.index, f["rows"])
        stop = f.least(f.add(start, f["rows"]), f["n"])
        with f.loop(0, blocks) as block:
            f.store(ir.Constant(I32, 0), f.add(scratch.amax, f.mul(block.index, 4)))
        with f.loop(start, stop) as row, f.loop(0, blocks) as block:
            _absmax(f, spec, row.index, block.index, scratch)
        _absmax_scales(f, spec, blocks, scratch)
        if spec.search:
            with f.loop(0, blocks) as block:
                _search(f, spec, start, stop, block.index, scratch)
        target = f.add(f["scales"], f.mul(block_row.index, f["scales_stride"]))
        _store_scales(f, spec, blocks, scratch, target)
        with f.loop(start, stop) as row, f.loop(0, blocks) as block:
            _encode(f, spec, row.index, block.index, scratch)
    return f.done()


def _each(
    f: Function,
    start: ir.Value,
    stop: ir.Value,
    width: int,
    carried: list[ir.Value],
    body: Callable[[ir.Value, int, list[ir.Value]], list[ir.Value]],
    join: Callable[[ir.Value], ir.Value],
) -> list[ir.Value]:
    """Run a body on whole vectors, then on single numbers.

    Args:
        f: the kernel.
        start: first index.
        stop: index after the last.
        width: of a vector.
        carried: numbers that the body gets and returns, as vectors.
        body: gets an index and a width.
        join: makes a number of a vector.

    Returns:
        The numbers carried.
    """
    whole = f.add(start, f.b.and_(f.b.sub(stop, start), f.integer(-width)))
    for first, last, size in ((start, whole, width), (whole, stop, 1)):
        with f.loop(first, last, size, [f.splat(v, size) for v in carried]) as at:
            at.following = body(at.index, size, at.carried)
        carried = [join(value) for value in at.carried]
    return carried


def _maximum(f: Function) -> Callable[[ir.Value, ir.Value], ir.Value]:
    return lambda a, b: f.b.select(f.b.icmp_signed(">", a, b), a, b)


def _span(f: Function, block: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The columns of a block."""
    start = f.mul(block, f["cols"])
    return start, f.least(f.add(start, f["cols"]), f["k"])


def _address(f: Function, spec: Spec, row: ir.Value, k: ir.Value) -> ir.Value:
    """Of a number of the weight."""
    start = f.add(f["matrix"], f.mul(row, f["matrix_stride"]))
    return f.add(start, f.mul(k, SIZES[spec.dense]))


def _absmax(
    f: Function, spec: Spec, row: ir.Value, block: ir.Value, scratch: _Scratch
) -> None:
    """Take a row of a block into account, in bits of the weight's dtype."""
    kind, width = (I32, WIDTH) if spec.dense == "f32" else (I16, 2 * WIDTH)
    mask = 0x7FFFFFFF if spec.dense == "f32" else 0x7FFF
    start, stop = _span(f, block)

    def body(k: ir.Value, size: int, carried: list[ir.Value]) -> list[ir.Value]:
        bits = f.load(_address(f, spec, row, k), vector(kind, size))
        bits = f.b.and_(bits, f.constant(mask, bits.type))
        return [_maximum(f)(carried[0], bits)]

    [most] = _each(
        *(f, start, stop, width, [ir.Constant(kind, 0)], body),
        lambda value: f.reduce(value, _maximum(f)),
    )
    if kind is I16:
        most = f.b.zext(most, I32)
    address = f.add(scratch.amax, f.mul(block, 4))
    f.store(_maximum(f)(most, f.load(address, I32)), address)


def _absmax_scales(
    f: Function, spec: Spec, blocks: ir.Value, scratch: _Scratch
) -> None:
    """Scales of a row of blocks as float32; leaves the kernel if one is not finite."""
    b = f.b

    def body(at: ir.Value, size: int, carried: list[ir.Value]) -> list[ir.Value]:
        bits = f.load(f.add(scratch.amax, f.mul(at, 4)), vector(I32, size))
        if spec.dense == "f32":
            amax = f.real(bits)
        elif spec.dense == "bf16":
            amax = f.real(b.shl(bits, f.constant(16, bits.type)))
        else:
            short = b.bitcast(b.trunc(bits, vector(I16, size)), vector(F16, size))
            amax = b.fpext(short, vector(F32, size))
        scale = b.fdiv(amax, f.splat(f["largest"], size))
        if spec.scale == "e8m0":
            scale = _round_up_to_power(f, scale)
        else:
            scale = _round_trip(f, scale, spec.scale)
            scale = _larger(f, scale, f.splat(f["floor"], size))
            scale = _smaller(f, scale, f.splat(f["cap"], size))
        f.store(scale, f.add(scratch.scales, f.mul(at, 4)))
        bits = _maximum(f)(f.bits(amax), f.bits(scale))
        return [_maximum(f)(carried[0], bits)]

    [most] = _each(
        *(f, f.integer(0), blocks, WIDTH, [ir.Constant(I32, 0)], body),
        lambda value: f.reduce(value, _maximum(f)),
    )
    f.leave_if(b.icmp_signed(">=", most, ir.Constant(I32, INFINITY_BITS)), 1)


def _larger(f: Function, a: ir.Value, b: ir.Value) -> ir.Value:
    return f.b.select(f.b.fcmp_ordered(">", a, b), a, b)


def _smaller(f: Function, a: ir.Value, b: ir.Value) -> ir.Value:
    """The lesser; if the first is NaN, the second."""
    return f.b.select(f.b.fcmp_ordered("<", a, b), a, b)


def _round_trip(f: Function, value: ir.Value, kind: str) -> ir.Value:
    """Round to a dtype."""
    return f.widen(f.narrow(value, kind, exact=True), kind)


def _round_up_to_power(f: Function, scale: ir.Value) -> ir.Value:
    """The next power of two up, from 2**-127 on."""
    b, bits = f.b, f.bits(scale)
    kind = bits.type
    exponent = b.lshr(bits, f.constant(23, kind))
    mantissa = b.and_(bits, f.constant(0x7FFFFF, kind))
    # of subnormal numbers, 2**-127 has this mantissa
    subnormal = b.icmp_signed("==", exponent, f.constant(0, kind))
    exact = b.select(subnormal, f.constant(1 << 22, kind), f.constant(0, kind))
    up = b.zext(b.icmp_signed(">", mantissa, exact), kind)
    exponent = b.add(exponent, up)
    least = b.icmp_signed("==", exponent, f.constant(0, kind))
    power = b.shl(exponent, f.constant(23, kind))
    return f.real(b.select(least, f.constant(1 << 22, kind), power))


def _store_scales(
    f: Function, spec: Spec, blocks: ir.Value, scratch: _Scratch, target: ir.Value
) -> None:
    """Write a row of scales, which are exact in their dtype."""

    def body(at: ir.Value, size: int, carried: list[ir.Value]) -> list[ir.Value]:
        scale = f.load(f.add(scratch.scales, f.mul(at, 4)), vector(F32, size))
        if spec.scale == "e8m0":
            bits = f.b.lshr(f.bits(scale), f.constant(23, vector(I32, size)))
            stored = f.b.trunc(bits, vector(I8, size))
        else:
            stored = f.narrow(scale, spec.scale, exact=True)
        f.store(stored, f.add(target, f.mul(at, SIZES[spec.scale])))
        return []

    _each(f, f.integer(0), blocks, WIDTH, [], body, lambda value: value)


# -- codes -----------------------------------------------------------------------------


def _encode(
    f: Function, spec: Spec, row: ir.Value, block: ir.Value, scratch: _Scratch
) -> None:
    """Write the codes of a row of a block."""
    start, stop = _span(f, block)
    scale = f.load(f.add(scratch.scales, f.mul(block, 4)), F32)
    codes = f.add(f["codes"], f.mul(row, f["codes_stride"]))

    def body(k: ir.Value, size: int, carried: list[ir.Value]) -> list[ir.Value]:
        kind = memory_type(spec.dense, size)
        number = f.widen(f.load(_address(f, spec, row, k), kind), spec.dense)
        number = f.b.fdiv(number, f.splat(scale, size))
        code = _round_to_int8 if spec.code == "int8" else _round_to_float
        f.store(code(f, spec.code, number), f.add(codes, k))
        return []

    _each(f, start, stop, WIDTH, [], body, lambda value: value)


def _round_to_int8(f: Function, code: str, number: ir.Value) -> ir.Value:
    """Codes of quotients: half to even, from -128 to 127."""
    size = width_of(number)
    rounded = _whole(f, _clamp(f, number, -128.0, 127.0))
    return f.b.trunc(f.b.fptosi(rounded, vector(I32, size)), vector(I8, size))


def _whole(f: Function, number: ir.Value) -> ir.Value:
    """The nearest whole number, half to even, of small ones."""
    magic = f.constant(1.5 * 2.0**23, number.type)
    return f.b.fsub(f.b.fadd(number, magic), magic)


def _clamp(f: Function, number: ir.Value, least: float, most: float) -> ir.Value:
    number = _larger(f, number, f.constant(least, number.type))
    return _smaller(f, number, f.constant(most, number.type))


def _round_to_float(f: Function, code: str, number: ir.Value) -> ir.Value:
    """FP8 codes of quotients: half to even, clipped; of NaN (0/0), zero."""
    b, size = f.b, width_of(number)
    mantissa, bias = _FLOATS[code]
    wide, shift = vector(I32, size), 23 - mantissa
    nan = b.fcmp_unordered("uno", number, number)
    number = b.select(nan, f.constant(0.0, number.type), number)
    bits = f.bits(number)
    sign = b.and_(b.lshr(bits, f.constant(24, wide)), f.constant(0x80, wide))
    bits = b.and_(bits, f.constant(0x7FFFFFFF, wide))
    number = _smaller(f, f.real(bits), f.splat(f["largest"], size))
    bits = f.bits(number)
    # normal: round away the low bits, and give the exponent its other bias
    odd = b.and_(b.lshr(bits, f.constant(shift, wide)), f.constant(1, wide))
    half = f.constant((1 << (shift - 1)) - 1, wide)
    normal = b.lshr(b.add(b.add(bits, half), odd), f.constant(shift, wide))
    normal = b.sub(normal, f.constant((127 - bias) << mantissa, wide))
    # subnormal: adding a power of two rounds to its last bit, the least code
    magic = f.constant(2.0 ** (23 + 1 - bias - mantissa), number.type)
    subnormal = b.sub(f.bits(b.fadd(number, magic)), f.bits(magic))
    small = b.icmp_signed("<", bits, f.constant((128 - bias) << 23, wide))
    result = b.or_(b.select(small, subnormal, normal), sign)
    return b.trunc(result, vector(I8, size))


# -- search ----------------------------------------------------------------------------


def _search(
    f: Function,
    spec: Spec,
    start: ir.Value,
    stop: ir.Value,
    block: ir.Value,
    scratch: _Scratch,
) -> None:
    """Replace the scale of a block by the candidate with the least squared error."""
    b = f.b
    address = f.add(scratch.scales, f.mul(block, 4))
    first = f.load(address, F32)
    _candidates(f, spec, first, scratch)
    zeros = f.constant(0.0, vector(F64))
    with f.loop(0, f["count"], WIDTH) as at:
        f.store(zeros, f.add(scratch.sums, f.mul(at.index, 8)))
    with f.loop(start, stop) as row:
        _row_errors(f, spec, row.index, block, scratch)
        with f.loop(0, f["count"], WIDTH) as at:
            errors = f.sum_sixteen(f.add(scratch.errors, f.mul(at.index, 4 * WIDTH)))
            sums = f.add(scratch.sums, f.mul(at.index, 8))
            total = b.fadd(f.load(sums, vector(F64)), b.fpext(errors, vector(F64)))
            f.store(total, sums)
    old = f.load(scratch.sums, F64)
    new, best = _least(f, scratch)
    enough = b.fcmp_ordered("<", new, b.fmul(old, b.fpext(f["keep"], F64)))
    large = b.fcmp_ordered(">", old, ir.Constant(F64, _LEAST_ERROR))
    scale = f.load(f.add(scratch.candidates, f.mul(best, 4)), F32)
    f.store(b.select(b.and_(enough, large), scale, first), address)


def _candidates(f: Function, spec: Spec, first: ir.Value, scratch: _Scratch) -> None:
    """Write the scales to try and their reciprocals; the first is the absmax scale."""
    b = f.b
    plain = f.splat(first)
    if spec.code != "int8" and spec.scale == "f16":  # it may have become 0
        base = _larger(f, plain, f.constant(2.0**-24, vector(F32)))
    else:
        base = plain
    bits = f.bits(base)
    power = f.real(b.and_(bits, f.constant(INFINITY_BITS, bits.type)))
    fraction = b.or_(
        b.and_(bits, f.constant(0x7FFFFF, bits.type)),
        f.constant(0x3F800000, bits.type),
    )
    with f.loop(0, f["count"], WIDTH) as at:
        offset = f.mul(at.index, 4)
        ratio = f.load(f.add(f["table"], offset), vector(F32))
        if spec.scale == "e8m0":
            half = b.fmul(base, f.constant(0.5, base.type))
            other = _larger(f, half, f.constant(2.0**-127, base.type))
        elif spec.code == "int8":
            other = _round_trip(f, b.fmul(base, ratio), spec.scale)
        else:  # the octave starts at the absmax scale
            other = b.fmul(ratio, power)
            below = b.fcmp_ordered("<", ratio, f.real(fraction))
            other = b.select(below, b.fadd(other, other), other)
            other = _smaller(f, other, f.splat(f["cap"]))
            other = _round_trip(f, other, spec.scale)
        none = b.fcmp_ordered("==", ratio, f.constant(0.0, ratio.type))
        other = b.select(none, plain, other)
        f.store(other, f.add(scratch.candidates, offset))
        inverse = b.fdiv(f.constant(1.0, other.type), other)
        f.store(inverse, f.add(scratch.inverse, offset))


def _row_errors(
    f: Function, spec: Spec, row: ir.Value, block: ir.Value, scratch: _Scratch
) -> None:
    """Squared errors of a row of a block, 16 sums for each candidate."""
    b = f.b
    start, stop = _span(f, block)
    size = b.sub(stop, start)

    def body(k: ir.Value, width: int, carried: list[ir.Value]) -> list[ir.Value]:
        address = _address(f, spec, row, f.add(start, k))
        value = f.widen(f.load(address, memory_type(spec.dense, width)), spec.dense)
        if spec.code != "int8":
            value = f.absolute(value)
        f.store(value, f.add(scratch.numbers, f.mul(k, 4)))
        return []

    _each(f, f.integer(0), size, WIDTH, [], body, lambda value: value)
    zeros = f.constant(0.0, vector(F32))
    for part in range(0, _CHUNK, WIDTH):
        f.store(zeros, f.add(scratch.numbers, f.mul(f.add(size, part), 4)))
    with f.loop(0, f.mul(f["count"], 4 * WIDTH), 4 * WIDTH) as at:
        f.store(zeros, f.add(scratch.errors, at.index))
    with f.loop(0, size, _CHUNK) as chunk:
        numbers = [
            f.load(f.add(scratch.numbers, f.mul(chunk.index, 4), 4 * at), vector(F32))
            for at in range(0, _CHUNK, WIDTH)
        ]
        with f.loop(0, f["count"]) as at:
            offset = f.mul(at.index, 4)
            scale = f.splat(f.load(f.add(scratch.candidates, offset), F32))
            inverse = f.splat(f.load(f.add(scratch.inverse, offset), F32))
            address = f.add(scratch.errors, f.mul(offset, WIDTH))
            sums = [f.load(address, vector(F32)), zeros]
            for turn, number in enumerate(numbers):
                rounded = _rounded(f, spec, b.fmul(number, inverse))
                minus = b.fsub(f.constant(-0.0, number.type), number)
                error = f.fma(rounded, scale, minus)
                sums[turn % 2] = f.fma(error, error, sums[turn % 2])
            f.store(b.fadd(*sums), address)


def _rounded(f: Function, spec: Spec, number: ir.Value) -> ir.Value:
    """Quotients as their codes have them, as float32; of FP8, without sign."""
    b = f.b
    if spec.code == "int8":
        return _whole(f, _clamp(f, number, -128.0, 127.0))
    mantissa, bias = _FLOATS[spec.code]
    if spec.scale in ("f16", "e8m0"):  # a scale may be less than absmax needs
        number = _smaller(f, number, f.splat(f["largest"]))
    # The spacing of numbers doubles with every binade. Adding and subtracting a number
    # with 2**23 times that spacing rounds to it, half to even.
    bits = b.and_(f.bits(number), f.constant(INFINITY_BITS, vector(I32)))
    bits = _maximum(f)(bits, f.constant((128 - bias) << 23, bits.type))
    magic = f.real(b.add(bits, f.constant((23 - mantissa) << 23, bits.type)))
    return b.fsub(b.fadd(number, magic), magic)


def _least(f: Function, scratch: _Scratch) -> tuple[ir.Value, ir.Value]:
    """The least sum, and the index of its candidate."""
    b = f.b
    lanes = ir.Constant(vector(I32), list(range(WIDTH)))
    none = f.constant(float("inf"), vector(F64))
    count = f.splat(b.trunc(f["count"], I32))

    def lesser(
        a: tuple[ir.Value, ir.Value], c: tuple[ir.Value, ir.Value]
    ) -> tuple[ir.Value, ir.Value]:
        less = b.fcmp_ordered("<", c[0], a[0])
        return b.select(less, c[0], a[0]), b.select(less, c[1], a[1])

    first = [none, f.constant(0, vector(I32))]
    with f.loop(0, f["count"], WIDTH, first) as at:
        index = b.add(f.splat(b.trunc(at.index, I32)), lanes)
        sums = f.load(f.add(scratch.sums, f.mul(at.index, 8)), vector(F64))
        sums = b.select(b.icmp_signed("<", index, count), sums, none)
        at.following = list(lesser((at.carried[0], at.carried[1]), (sums, index)))
    value, index = at.carried
    width = WIDTH
    while width > 1:
        width //= 2
        low, high = range(width), range(width, 2 * width)
        value, index = lesser(
            (f.shuffle(value, value, low), f.shuffle(index, index, low)),
            (f.shuffle(value, value, high), f.shuffle(index, index, high)),
        )
    return value, b.zext(index, f["count"].type)
