"""Multiply some rows with a weight in bfloat16, where the processor does it in pairs.

An instruction of AVX-512 adds the products of pairs of bfloat16 to sums in float32. A
few rows of the weight are decoded for a piece of the columns, which stays in the first
cache, and multiplied with all rows of the input there; so each code is read and decoded
once.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from llvmlite import ir
from torch import Tensor

from schemes._kernels import buffers
from schemes._kernels.cpu import threads
from schemes._kernels.cpu.decoding import (
    Source,
    code_numbers,
    convert_scales,
    pair_of_scales,
)
from schemes._kernels.cpu.dot import whole_step
from schemes._kernels.cpu.llvm import host, kernel
from schemes._kernels.cpu.vectors import (
    BF16,
    E4M3_BOOST,
    F32,
    I16,
    WIDTH,
    Function,
    vector,
)

#: Numbers in a vector of bfloat16.
PAIRED = 2 * WIDTH
#: Rows of the weight that are decoded together, and of a square of products.
GROUP = 8
SQUARE = 4
#: Columns that are decoded together.
CHUNK = 512


class Spec(NamedTuple):
    """What a kernel is specialised for; see `schemes._kernels.cpu.dot.Spec`."""

    code: str
    scale: str
    step: int
    pair: bool

    @property
    def packed(self) -> bool:
        """Whether two codes are in a byte."""
        return self.code in ("low", "high")


def can_pair(x: Tensor, source: Source) -> bool:
    """Whether the processor multiplies pairs, and the weight is made of vectors."""
    return (
        x.dtype == torch.bfloat16
        and host().bf16
        and source.n >= GROUP
        and whole_step(source) >= PAIRED
    )


def multiply(x: Tensor, source: Source, out: Tensor) -> None:
    """Products with all rows of a weight, in float32.

    Args:
        x: (M, K) bfloat16.
        source: an (N, K) weight; `can_pair` holds.
        out: (M, N) float32, contiguous.
    """
    m, k = x.shape
    padded = -(-m // SQUARE) * SQUARE
    if source.table or padded != m or not x.is_contiguous():
        inputs = buffers.shared("inputs", padded * k, x.dtype, x.device).view(padded, k)
        inputs[m:].zero_()
        if source.table:  # even and odd places apart, as codes are
            split = x.reshape(m, -1, WIDTH, 2).transpose(2, 3)
            inputs[:m].view(split.shape).copy_(split)
        else:
            inputs[:m].copy_(x)
    else:
        inputs = x
    run = kernel(
        build, Spec(source.code, source.scale, whole_step(source), source.pair)
    )
    addresses = (inputs.data_ptr(), padded, out.data_ptr(), 4 * source.n)
    arguments = (
        *(*source.arguments, *addresses, m, source.table, source.n),
        source.factor,
    )
    threads.run(run, arguments, slice(0, source.n), k, _scratch_bytes(k, padded))


# -- the kernel ------------------------------------------------------------------------


def build(spec: Spec) -> Function:
    """Products of all rows of x with rows ``first`` to ``last`` of the weight.

    Groups of rows start at multiples of `GROUP` after ``first``; the last one starts
    earlier if the weight ends before it, and computes some products again.
    """
    f = Function(
        "pairs",
        "codes codes_stride scales scales_stride rows cols k "
        "x padded out out_stride m table n",
        "factor",
    )
    b = f.b
    table = f.load_table(f["table"]) if spec.packed else []
    steps = b.sdiv(f["k"], f.integer(spec.step // (2 if spec.pair else 1)))
    layout = _layout(f, steps)
    with f.loop(f["first"], f["last"], GROUP) as group:
        row = f.least(group.index, f.add(f["n"], -GROUP))
        with f.loop(0, f.integer(GROUP)) as r:
            _spread_scales(f, spec, row, r.index, steps, layout)
        zero = f.constant(0.0, vector(F32))
        with f.loop(0, f.mul(f["padded"], GROUP)) as at:
            f.store(zero, f.add(layout.sums, f.mul(at.index, 4 * WIDTH)))
        with f.loop(0, f["k"], CHUNK) as chunk:
            stop = f.least(f.add(chunk.index, CHUNK), f["k"])
            with f.loop(0, f.integer(GROUP)) as r:
                span = (chunk.index, stop)
                _decode(f, spec, row, r.index, span, steps, layout, table)
            with (
                f.loop(0, f["padded"], SQUARE) as top,
                f.loop(0, f.integer(GROUP), SQUARE) as left,
            ):
                _square(f, top.index, left.index, chunk.index, stop, layout)
        with (
            f.loop(0, f["padded"], SQUARE) as top,
            f.loop(0, f.integer(GROUP), SQUARE) as left,
        ):
            _finish(f, spec, row, top.index, left.index, layout)
    return f.done()


class _Layout(NamedTuple):
    """Addresses in scratch memory.

    Attributes:
        blocks: scales of a row, of each block.
        steps: scales of each row of a group, of each step.
        weight: some columns of each row of a group, bfloat16.
        sums: 16 float32 for each product.
    """

    blocks: ir.Value
    steps: ir.Value
    weight: ir.Value
    sums: ir.Value


def _layout(f: Function, steps: ir.Value) -> _Layout:
    blocks = f["scratch"]
    each = f.add(blocks, f.mul(f.add(f["k"], WIDTH), 4))
    weight = f.add(each, f.mul(f.add(steps, WIDTH), 4 * GROUP))
    return _Layout(blocks, each, weight, f.add(weight, 2 * CHUNK * GROUP))


def _scratch_bytes(k: int, padded: int) -> int:
    """As `_layout` has it."""
    scales = 4 * (k + WIDTH) + 4 * GROUP * (k // WIDTH + WIDTH)
    return scales + GROUP * (2 * CHUNK + 4 * WIDTH * padded)


def _spread_scales(
    f: Function,
    spec: Spec,
    row: ir.Value,
    r: ir.Value,
    steps: ir.Value,
    layout: _Layout,
) -> None:
    """Write the scale of each step of a row, or of each half where they are pairs."""
    b = f.b
    block_row = b.sdiv(f.add(row, r), f["rows"])
    source = f.add(f["scales"], f.mul(block_row, f["scales_stride"]))
    target = f.add(layout.steps, f.mul(f.mul(f.add(steps, WIDTH), 4), r))
    blocks = b.sdiv(f.add(f["k"], f["cols"], -1), f["cols"])
    if spec.pair:
        convert_scales(f, spec.scale, source, blocks, f["factor"], target)
        return
    convert_scales(f, spec.scale, source, blocks, f["factor"], layout.blocks)
    each = b.sdiv(f["cols"], f.integer(spec.step))
    with f.loop(0, blocks) as block:
        scale = f.load(f.add(layout.blocks, f.mul(block.index, 4)), F32)
        start = f.mul(block.index, each)
        with f.loop(start, f.least(f.add(start, each), steps)) as at:
            f.store(scale, f.add(target, f.mul(at.index, 4)))


def _decode(
    f: Function,
    spec: Spec,
    row: ir.Value,
    r: ir.Value,
    span: tuple[ir.Value, ir.Value],
    steps: ir.Value,
    layout: _Layout,
    table: list[ir.Value],
) -> None:
    """Decode some columns of a row; of e4m3, divided by `E4M3_BOOST`."""
    b, (start, stop) = f.b, span
    codes = f.add(f["codes"], f.mul(f.add(row, r), f["codes_stride"]))
    scales = f.add(layout.steps, f.mul(f.mul(f.add(steps, WIDTH), 4), r))
    target = f.add(layout.weight, f.mul(r, 2 * CHUNK))
    # The processor foresees no jumps from row to row: fetch what will be decoded next
    # of this row, or of the one that takes its place.
    shift = f.integer(1 if spec.packed else 0)
    ahead = f.add(codes, f.mul(f["codes_stride"], GROUP))
    more = b.icmp_signed("<", stop, f["k"])
    ahead = b.select(more, f.add(codes, b.ashr(stop, shift)), ahead)
    ahead = b.sub(ahead, b.ashr(start, shift))
    with f.loop(start, stop, spec.step) as at:
        k = at.index
        f.prefetch(f.add(ahead, b.ashr(k, shift)))
        address = f.add(codes, b.ashr(k, shift))
        if spec.pair:
            scale = pair_of_scales(f, scales, k)
        else:
            index = b.sdiv(k, f.integer(spec.step))
            scale = f.splat(f.load(f.add(scales, f.mul(index, 4)), F32))
        numbers = code_numbers(f, spec.code, address, spec.step, table)
        here = f.add(target, f.mul(b.sub(k, start), 2))
        for part, number in enumerate(numbers):
            rounded = f.narrow(b.fmul(number, scale), "bf16", exact=False)
            f.store(rounded, f.add(here, part * 2 * WIDTH))


def _square(
    f: Function,
    top: ir.Value,
    left: ir.Value,
    start: ir.Value,
    stop: ir.Value,
    layout: _Layout,
) -> None:
    """Add the products of some columns: of four rows of x with four of the weight."""
    weight = f.add(layout.weight, f.mul(left, 2 * CHUNK))
    stride = f.mul(f["k"], 2)
    x = f.add(f["x"], f.mul(top, stride), f.mul(start, 2))
    sums = f.add(layout.sums, f.mul(f.add(f.mul(top, GROUP), f.mul(left, SQUARE)), 64))
    addresses = [f.add(sums, at * 4 * WIDTH) for at in range(SQUARE * SQUARE)]
    first = [f.load(address, vector(F32)) for address in addresses]
    pairs = vector(I16, PAIRED)
    inputs = [f.add(x, f.mul(stride, j)) for j in range(SQUARE)]
    with f.loop(0, f.mul(f.b.sub(stop, start), 2), 2 * PAIRED, first) as at:
        numbers = [
            f.load(f.add(weight, r * 2 * CHUNK, at.index), pairs) for r in range(SQUARE)
        ]
        total = list(at.carried)
        for j in range(SQUARE):
            number = f.load(f.add(inputs[j], at.index), pairs)
            for r in range(SQUARE):
                i = j * SQUARE + r
                total[i] = _add_pairs(f, total[i], numbers[r], number)
        at.following = total
    for address, value in zip(addresses, at.carried, strict=True):
        f.store(value, address)


def _add_pairs(f: Function, total: ir.Value, a: ir.Value, b: ir.Value) -> ir.Value:
    """``total`` and the products of 32 bfloat16, two of which go to each sum."""
    kind = vector(BF16, PAIRED)
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    a, b = f.b.bitcast(a, kind), f.b.bitcast(b, kind)
    return f.call(name, total.type, total, a, b)


def _finish(
    f: Function,
    spec: Spec,
    row: ir.Value,
    top: ir.Value,
    left: ir.Value,
    layout: _Layout,
) -> None:
    """Write 16 products."""
    sums = f.add(layout.sums, f.mul(f.add(f.mul(top, GROUP), f.mul(left, SQUARE)), 64))
    total = f.sum_sixteen(sums)
    if spec.code == "e4m3":
        total = f.b.fmul(total, f.constant(E4M3_BOOST, total.type))
    column = f.mul(f.add(row, left), 4)
    for j in range(SQUARE):
        line = f.add(top, j)
        with f.b.if_then(f.b.icmp_signed("<", line, f["m"])):
            target = f.add(f["out"], f.mul(line, f["out_stride"]), column)
            f.store(f.part(total, j * SQUARE, SQUARE), target)
