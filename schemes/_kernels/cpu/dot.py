"""Multiply a few rows with a weight: dot products that read each code once.

Codes are widened to float32 and multiplied with the input; the sum of a block is
multiplied with its scale. Several rows of the weight are processed together, so that
the input is loaded once for them and their sums do not wait for each other.
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
from schemes._kernels.cpu.llvm import host, kernel
from schemes._kernels.cpu.vectors import E4M3_BOOST, F32, WIDTH, Function, vector

#: Most rows of the input that are multiplied at a time.
MOST_ROWS = 4


class Spec(NamedTuple):
    """What a kernel is specialised for.

    Attributes:
        code: e4m3, e5m2, int8, or low or high: four bits, that one first.
        scale: dtype of the scales.
        step: codes that are multiplied together, 64, 32 or 16.
        pair: whether these are 32 codes with two scales.
        m: rows of the input.
    """

    code: str
    scale: str
    step: int
    pair: bool
    m: int

    @property
    def packed(self) -> bool:
        """Whether two codes are in a byte."""
        return self.code in ("low", "high")


def can_dot(source: Source) -> bool:
    """Whether blocks and rows are whole numbers of vectors."""
    return bool(whole_step(source))


def whole_step(source: Source) -> int:
    """Codes to process together such that rows are whole; 0 if there are none."""
    step = source.step
    least = 2 * WIDTH if source.table else WIDTH
    while step >= least and source.k % step:
        step = 0 if source.pair else step // 2
    return step if step >= least else 0


def dot(x: Tensor, source: Source, out: Tensor) -> None:
    """Products of a few rows, in float32.

    Args:
        x: (M, K) of any floating dtype.
        source: an (N, K) weight for which `can_dot` holds.
        out: (M, N) float32, contiguous.
    """
    m, k = x.shape
    step, pair = whole_step(source), source.pair
    inputs = buffers.shared("inputs", m * k, torch.float32, x.device).view(m, k)
    if source.table:  # even and odd places apart, as codes are
        split = x.reshape(m, -1, WIDTH, 2).transpose(2, 3)
        inputs.view(split.shape).copy_(split)
    else:
        inputs.copy_(x)
    kinds = (source.code, source.scale, step, pair)
    scratch = 4 * source.scratch  # the scales of four rows at a time
    for top in range(0, m, MOST_ROWS):
        run = kernel(build, Spec(*kinds, min(MOST_ROWS, m - top)))
        addresses = (
            inputs.data_ptr() + top * 4 * k,
            out.data_ptr() + top * 4 * source.n,
            4 * source.n,
        )
        arguments = (*source.arguments, *addresses, source.table, source.factor)
        threads.run(run, arguments, slice(0, source.n), k, scratch)


# -- the kernel ------------------------------------------------------------------------


def build(spec: Spec) -> Function:
    """Products of ``m`` rows of x with rows ``first`` to ``last`` of the weight."""
    f = Function(
        "dot",
        "codes codes_stride scales scales_stride rows cols k x out out_stride table",
        "factor",
    )
    group = 4 if host().permute16 else 2
    b = f.b
    table = f.load_table(f["table"]) if spec.packed else []
    count = b.sub(f["last"], f["first"])
    whole = f.add(f["first"], b.sub(count, b.srem(count, f.integer(group))))
    for start, stop, n in ((f["first"], whole, group), (whole, f["last"], 1)):
        with f.loop(start, stop, n) as row:
            _rows(f, spec, row.index, n, table)
    return f.done()


def _rows(
    f: Function, spec: Spec, row: ir.Value, n: int, table: list[ir.Value]
) -> None:
    """The products of ``n`` rows of the weight."""
    b, m = f.b, spec.m
    blocks = b.sdiv(f.add(f["k"], f["cols"], -1), f["cols"])
    codes, scales = [], []
    for r in range(n):
        index = f.add(row, r)
        codes.append(f.add(f["codes"], f.mul(index, f["codes_stride"])))
        source = f.mul(b.sdiv(index, f["rows"]), f["scales_stride"])
        scale = f.add(f["scratch"], f.mul(f.add(blocks, WIDTH), 4 * r))
        source = f.add(f["scales"], source)
        convert_scales(f, spec.scale, source, blocks, f["factor"], scale)
        scales.append(scale)
    zero = f.constant(0.0, vector(F32))

    def multiply(k: ir.Value, sums: list[ir.Value]) -> list[ir.Value]:
        """Add the products of a step; ``sums`` has `chains` for each row of both."""
        sums = list(sums)
        chains = len(sums) // (n * m)
        at = b.ashr(k, f.integer(1)) if spec.packed else k
        for r in range(n):  # the processor foresees no jumps from row to row
            f.prefetch(f.add(codes[r], at, f.mul(f["codes_stride"], n)))
        numbers = [
            code_numbers(f, spec.code, f.add(codes[r], at), spec.step, table)
            for r in range(n)
        ]
        for part in range(spec.step // WIDTH):
            for j in range(m):
                address = f.add(f["x"], f.mul(f.add(f.mul(f["k"], j), k), 4))
                x = f.load(f.add(address, part * WIDTH * 4), vector(F32))
                for r in range(n):
                    chain = (r * m + j) * chains + part % chains
                    sums[chain] = f.fma(numbers[r][part], x, sums[chain])
        return sums

    totals = [zero] * (n * m)
    if spec.pair:
        with f.loop(0, f["k"], spec.step, totals) as at:
            products = multiply(at.index, [zero] * (n * m))
            for r in range(n):
                scale = pair_of_scales(f, scales[r], at.index)
                for j in range(m):
                    i = r * m + j
                    at.following.append(f.fma(products[i], scale, at.carried[i]))
        totals = at.carried
    else:
        chains = 2 if m == 1 and spec.step > WIDTH else 1
        with f.loop(0, blocks, 1, totals) as block:
            start = f.mul(block.index, f["cols"])
            stop = f.least(f.add(start, f["cols"]), f["k"])
            with f.loop(start, stop, spec.step, [zero] * (n * m * chains)) as at:
                at.following = multiply(at.index, at.carried)
            for r in range(n):
                scale = f.splat(f.load(f.add(scales[r], f.mul(block.index, 4)), F32))
                for j in range(m):
                    i = r * m + j
                    product = at.carried[i * chains]
                    if chains == 2:
                        product = b.fadd(product, at.carried[i * chains + 1])
                    block.following.append(f.fma(product, scale, block.carried[i]))
        totals = block.carried
    for r in range(n):
        for j in range(m):
            total = f.reduce(totals[r * m + j], b.fadd)
            if spec.code == "e4m3":
                total = b.fmul(total, f.constant(E4M3_BOOST, F32))
            target = f.add(f["out"], f.mul(f["out_stride"], j), f.mul(f.add(row, r), 4))
            f.store(total, target)
