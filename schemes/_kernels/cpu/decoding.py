"""Decode a weight, bit for bit as `BlockScaled` says.

Scales of a row are converted to float32 once. The codes between two scales are then
loaded, widened, multiplied, rounded and stored, 16 at a time. What is no multiple of
that at the end of a row goes through a few bytes of scratch memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from llvmlite import ir
from torch import Tensor

from schemes._kernels.block_scaled import BlockScaled
from schemes._kernels.cpu import threads
from schemes._kernels.cpu.llvm import host, kernel
from schemes._kernels.cpu.vectors import (
    E4M3_BOOST,
    F32,
    I8,
    I32,
    INFINITY_BITS,
    SIZES,
    SMALLEST_NORMAL_BITS,
    WIDTH,
    Function,
    memory_type,
    vector,
)

#: Names of dtypes in kernels.
KINDS = {
    torch.float32: "f32",
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float8_e8m0fnu: "e8m0",
    torch.float8_e4m3fn: "e4m3",
    torch.float8_e5m2: "e5m2",
    torch.int8: "int8",
}
#: The least code that is not zero, as a power of two.
_LEAST_CODE = {"e4m3": -9, "e5m2": -16, "int8": 0}
#: Scales from here on times `E4M3_BOOST` may be infinite: 2**119.
_LARGE_SCALE_BITS = (119 + 127) << 23
#: Bytes of scratch memory for the end of a row: codes, and numbers.
_TAIL = 64 + 64 * 4
_MOST = 64


class Spec(NamedTuple):
    """What a decode kernel is specialised for.

    Attributes:
        code: e4m3, e5m2, int8, or low or high: four bits, that one first.
        scale: dtype of the scales.
        out: dtype of the result.
        step: codes that have one scale and are decoded together: 64, 32 or 16; 0 if
            blocks are narrower or no multiple of 16: then each code has a scale.
        pair: whether they are 32 codes of four bits with two scales.
    """

    code: str
    scale: str
    out: str
    step: int
    pair: bool

    @property
    def packed(self) -> bool:
        """Whether two codes are in a byte."""
        return self.code in ("low", "high")

    @property
    def stride(self) -> int:
        """Codes that are decoded together."""
        return self.step or 2 * WIDTH


def decode(weight: BlockScaled, out: Tensor, rows: slice = slice(None)) -> None:
    """Write rows of the dense weight, with torch's number of threads.

    Args:
        weight: (N, K), on the CPU.
        out: (n, K) float32, bfloat16 or float16; with any strides.
        rows: which n of the N rows; all without a step.
    """
    n, k = weight.shape
    start, stop, _ = rows.indices(n)
    if stop <= start or not k:
        return
    if out.stride(1) != 1:
        dense = torch.empty(out.shape, dtype=out.dtype)
        decode(weight, dense, rows)
        out.copy_(dense)
        return
    Source.of(weight).decode(out, start, stop)


class Source:
    """A weight as kernels take it: addresses, strides and what it is specialised for.

    Attributes:
        weight: keeps the memory.
        code, scale: names as in `Spec`.
    """

    def __init__(self, weight: BlockScaled, code: str, scale: str) -> None:
        self.weight = weight
        self.code = code
        self.scale = scale
        codes, scales = weight.codes, weight.scale
        self.n, self.k = weight.shape
        self.size = (weight.size[0], min(weight.size[1], self.k))
        self.codes = codes.data_ptr()
        self.codes_stride = codes.stride(0) * codes.element_size()
        self.scales = scales.data_ptr()
        self.scales_stride = scales.stride(0) * scales.element_size()
        self.table = 0 if weight.table is None else weight.table.data_ptr()
        self.factor = 1.0 if weight.factor is None else float(weight.factor)
        #: The first arguments of every kernel.
        self.arguments = (
            self.codes,
            self.codes_stride,
            self.scales,
            self.scales_stride,
            *self.size,
            self.k,
        )

    @classmethod
    def of(cls, weight: BlockScaled) -> Source:
        """Describe a weight; what is not dense along columns is copied."""
        codes, scale = weight.codes, weight.scale
        if codes.stride(1) != 1 or scale.stride(1) != 1:
            weight = weight._replace(
                codes=_dense_columns(codes), scale=_dense_columns(scale)
            )
        if weight.table is None:
            return cls(weight, KINDS[weight.codes.dtype], KINDS[weight.scale.dtype])
        weight = weight._replace(table=weight.table.float().contiguous())
        code = "high" if weight.high_first else "low"
        return cls(weight, code, KINDS[weight.scale.dtype])

    @property
    def pair(self) -> bool:
        """Whether 32 codes of four bits are decoded together with two scales."""
        return bool(self.table) and self.size[1] == WIDTH

    @property
    def step(self) -> int:
        """The most codes that are decoded together, with one scale or a pair; or 0."""
        if self.pair:
            return 2 * WIDTH
        least = 2 * WIDTH if self.table else WIDTH
        # a single block may end anywhere
        cols = _MOST if self.size[1] == self.k else self.size[1]
        step = _MOST
        while step >= least:
            if cols % step == 0:
                return step
            step //= 2
        return 0

    @property
    def scratch(self) -> int:
        """Bytes of scratch memory of a thread: scales, of each code too, and a tail."""
        return 4 * (-(-self.k // self.size[1]) + self.k + 4 * _MOST) + _TAIL

    def decode(self, out: Tensor, start: int, stop: int) -> None:
        """Write rows ``start`` to ``stop``, with torch's number of threads.

        Args:
            out: (stop - start, K) float32, bfloat16 or float16, dense along columns.
        """
        kinds = (self.code, self.scale, KINDS[out.dtype])
        run = kernel(build, Spec(*kinds, self.step, self.pair))
        stride = out.stride(0) * out.element_size()
        origin = out.data_ptr() - start * stride
        arguments = (*self.arguments, origin, stride, self.table, self.factor)
        threads.run(run, arguments, slice(start, stop), self.k, self.scratch)


def _dense_columns(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(1) == 1 else tensor.detach().contiguous()


# -- the kernel ------------------------------------------------------------------------


def build(spec: Spec) -> Function:
    """Decode rows ``first`` to ``last``; scratch is as `Source.scratch` says."""
    f = Function(
        "decode",
        "codes codes_stride scales scales_stride rows cols k out out_stride table",
        "factor",
    )
    b = f.b
    blocks = b.sdiv(f.add(f["k"], f["cols"], -1), f["cols"])
    each = f.add(f["scratch"], f.mul(f.add(blocks, WIDTH), 4))
    tail = f.add(each, f.mul(f.add(f["k"], 2 * _MOST), 4))
    table = f.load_table(f["table"]) if spec.packed else []
    limits = _limits(f, spec, table)

    # blocks of rows, then their rows: scales are converted once
    first_block = b.sdiv(f["first"], f["rows"])
    last_block = b.sdiv(f.add(f["last"], f["rows"], -1), f["rows"])
    with f.loop(first_block, last_block) as block:
        scales = f.add(f["scales"], f.mul(block.index, f["scales_stride"]))
        least, most = convert_scales(
            f, spec.scale, scales, blocks, f["factor"], f["scratch"]
        )
        start = f.mul(block.index, f["rows"])
        above = b.icmp_signed("<", start, f["first"])
        start = b.select(above, f["first"], start)
        stop = f.least(f.mul(f.add(block.index, 1), f["rows"]), f["last"])

        def rows(
            exact: bool, start: ir.Value = start, stop: ir.Value = stop
        ) -> Callable[[], None]:
            def write() -> None:
                if not spec.step:
                    _spread_scales(f, spec, exact, blocks, each)
                with f.loop(start, stop) as row:
                    _decode_row(f, spec, exact, row.index, table, each, tail)

            return write

        if limits is None:
            rows(exact=False)()
        else:
            safe = b.and_(
                b.icmp_signed(">=", least, limits),
                b.icmp_signed("<", most, _large(spec)),
            )
            f.if_else(safe, rows(exact=False), rows(exact=True))
    return f.done()


def _large(spec: Spec) -> ir.Constant:
    bits = _LARGE_SCALE_BITS if spec.code == "e4m3" else INFINITY_BITS + 1
    return ir.Constant(I32, bits)


def _limits(f: Function, spec: Spec, table: list[ir.Value]) -> ir.Value | None:
    """Bits of the least scale that gives no subnormal number; None if all will do."""
    flushes = spec.out == "bf16" and host().bf16
    if not flushes:
        return ir.Constant(I32, 0) if spec.code == "e4m3" else None
    if not spec.packed:
        power = -126 - _LEAST_CODE[spec.code]
        return ir.Constant(I32, (power + 127) << 23)
    # 2**-125 over the least number: once more than needed, for the quotient is rounded
    least = f.reduce(_nonzero_bits(f, f.absolute(table[0])), _minimum(f))
    power = f.real(ir.Constant(I32, 2 * SMALLEST_NORMAL_BITS))
    limit = f.bits(f.b.fdiv(power, f.real(least)))
    return _maximum(f)(limit, ir.Constant(I32, SMALLEST_NORMAL_BITS))


def _minimum(f: Function) -> Callable[[ir.Value, ir.Value], ir.Value]:
    return lambda a, b: f.b.select(f.b.icmp_signed("<", a, b), a, b)


def _maximum(f: Function) -> Callable[[ir.Value, ir.Value], ir.Value]:
    return lambda a, b: f.b.select(f.b.icmp_signed(">", a, b), a, b)


def _nonzero_bits(f: Function, value: ir.Value) -> ir.Value:
    """Bits of numbers that are not negative; of zeros, those of infinity."""
    bits = f.bits(value)
    zero = f.b.icmp_signed("==", bits, f.constant(0, bits.type))
    return f.b.select(zero, f.constant(INFINITY_BITS, bits.type), bits)


def convert_scales(
    f: Function,
    kind: str,
    source: ir.Value,
    count: ir.Value,
    factor: ir.Value,
    target: ir.Value,
) -> tuple[ir.Value, ir.Value]:
    """Write scales times a factor as float32.

    Args:
        f: the kernel.
        kind: dtype of the scales.
        source: address of ``count`` scales.
        count: how many.
        factor: float32.
        target: address of as many float32.

    Returns:
        Bits of the least that is not zero, and of the largest.
    """
    whole = f.b.and_(count, f.integer(-WIDTH))
    least: ir.Value = ir.Constant(I32, INFINITY_BITS)
    most: ir.Value = ir.Constant(I32, 0)
    for start, stop, width in ((f.integer(0), whole, WIDTH), (whole, count, 1)):
        first = [f.splat(value, width) for value in (least, most)]
        with f.loop(start, stop, width, first) as at:
            address = f.add(source, f.mul(at.index, SIZES[kind]))
            value = f.widen(f.load(address, memory_type(kind, width)), kind)
            if kind == "e4m3":
                value = f.b.fmul(value, f.constant(E4M3_BOOST, value.type))
            value = f.b.fmul(value, f.splat(factor, width))
            f.store(value, f.add(target, f.mul(at.index, 4)))
            at.following = [
                _minimum(f)(at.carried[0], _nonzero_bits(f, value)),
                _maximum(f)(at.carried[1], f.bits(value)),
            ]
        least = f.reduce(at.carried[0], _minimum(f))
        most = f.reduce(at.carried[1], _maximum(f))
    return least, most


def _spread_scales(
    f: Function, spec: Spec, exact: bool, blocks: ir.Value, target: ir.Value
) -> None:
    """Write the scale of each code; too many at a time, the next write over them."""
    with f.loop(0, blocks) as block:
        scale = _scale(f, spec, exact, block.index)
        start = f.mul(block.index, f["cols"])
        with f.loop(start, f.add(start, f["cols"]), WIDTH) as at:
            f.store(f.splat(scale), f.add(target, f.mul(at.index, 4)))


def _scale(f: Function, spec: Spec, exact: bool, block: ir.Value) -> ir.Value:
    """The scale of a block; it makes up for what `Function.widen` divides by."""
    scale = f.load(f.add(f["scratch"], f.mul(block, 4)), F32)
    if spec.code == "e4m3" and not exact:
        scale = f.b.fmul(scale, f.constant(E4M3_BOOST, F32))
    return scale


def _decode_row(
    f: Function,
    spec: Spec,
    exact: bool,
    row: ir.Value,
    table: list[ir.Value],
    each: ir.Value,
    tail: ir.Value,
) -> None:
    """Decode one row: whole steps, then what is left."""
    b, step, size = f.b, spec.stride, SIZES[spec.out]
    codes = f.add(f["codes"], f.mul(row, f["codes_stride"]))
    out = f.add(f["out"], f.mul(row, f["out_stride"]))
    whole = b.and_(f["k"], f.integer(-step))

    def write(source: ir.Value, target: ir.Value, scales: list[ir.Value]) -> None:
        numbers = code_numbers(f, spec.code, source, step, table)
        if spec.packed and not spec.step:
            numbers = _interleave(f, numbers)
        if spec.code == "e4m3" and exact:
            numbers = [b.fmul(x, f.constant(E4M3_BOOST, x.type)) for x in numbers]
        numbers = [b.fmul(x, s) for x, s in zip(numbers, scales, strict=True)]
        numbers = [f.narrow(x, spec.out, exact) for x in numbers]
        if spec.packed and spec.step:
            numbers = _interleave(f, numbers)
        for at, value in enumerate(numbers):
            f.store(value, f.add(target, at * WIDTH * size))

    def address(k: ir.Value) -> ir.Value:
        return f.add(codes, b.ashr(k, f.integer(1)) if spec.packed else k)

    def scales_at(k: ir.Value) -> list[ir.Value]:
        if spec.pair:
            return [pair_of_scales(f, f["scratch"], k)] * 2
        if spec.step:
            scale = f.splat(_scale(f, spec, exact, b.sdiv(k, f["cols"])))
            return [scale] * (step // WIDTH)
        at = f.add(each, f.mul(k, 4))
        return [
            f.load(f.add(at, part * 4 * WIDTH), vector(F32))
            for part in range(step // WIDTH)
        ]

    if spec.step and not spec.pair:
        blocks = b.sdiv(f.add(whole, f["cols"], -1), f["cols"])
        with f.loop(0, blocks) as block:
            scale = f.splat(_scale(f, spec, exact, block.index))
            start = f.mul(block.index, f["cols"])
            with f.loop(start, f.least(f.add(start, f["cols"]), whole), step) as at:
                target = f.add(out, f.mul(at.index, size))
                write(address(at.index), target, [scale] * (step // WIDTH))
    else:
        with f.loop(0, whole, step) as at:
            target = f.add(out, f.mul(at.index, size))
            write(address(at.index), target, scales_at(at.index))

    left = b.sub(f["k"], whole)
    with b.if_then(b.icmp_signed(">", left, f.integer(0))):
        nbytes = b.ashr(left, f.integer(1)) if spec.packed else left
        f.copy(address(whole), tail, nbytes)
        numbers = f.add(tail, _MOST)
        write(tail, numbers, scales_at(whole))
        f.copy(numbers, f.add(out, f.mul(whole, size)), f.mul(left, size))


def code_numbers(
    f: Function, code: str, address: ir.Value, count: int, table: list[ir.Value]
) -> list[ir.Value]:
    """The numbers of some codes, as vectors of 16 float32.

    Of e4m3, divided by `E4M3_BOOST`. Of four bits, those at even and odd places in
    turn, which `_interleave` puts in order.
    """
    if code not in ("low", "high"):
        width = min(count, 2 * WIDTH)
        numbers = []
        for start in range(0, count, width):
            part = f.load(f.add(address, start), memory_type(code, width))
            wide = f.widen(part, code)
            numbers += [f.part(wide, at) for at in range(0, width, WIDTH)]
        return numbers
    pairs = []
    for start in range(0, count // 2, WIDTH):
        both = f.b.zext(f.load(f.add(address, start), vector(I8)), vector(I32))
        upper = f.b.lshr(both, f.constant(4, both.type))
        even, odd = (f.lookup(table, index) for index in (both, upper))
        pairs += [odd, even] if code == "high" else [even, odd]
    return pairs


def pair_of_scales(f: Function, scales: ir.Value, k: ir.Value) -> ir.Value:
    """Scales of 32 codes from ``k`` on, for those at even and for those at odd places.

    Args:
        f: the kernel.
        scales: address of a float32 for each 16 codes of the row.
        k: a multiple of 16.
    """
    two = f.load(f.add(scales, f.b.ashr(k, f.integer(2))), vector(F32, 2))
    return f.shuffle(two, two, [0] * (WIDTH // 2) + [1] * (WIDTH // 2))


def _interleave(f: Function, pairs: list[Any]) -> list[ir.Value]:
    """Vectors of even and odd places as vectors in order."""
    ordered = []
    for even, odd in zip(pairs[::2], pairs[1::2], strict=True):
        for start in (0, WIDTH // 2):
            lanes = [
                lane
                for at in range(start, start + WIDTH // 2)
                for lane in (at, WIDTH + at)
            ]
            ordered.append(f.shuffle(even, odd, lanes))
    return ordered
