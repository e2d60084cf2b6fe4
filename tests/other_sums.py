"""A pytest plugin: every matrix product on the CPU sums in another order.

``pytest -p tests.other_sums`` stands in for processors that are not at hand. Each call
of ``mm`` and ``addmm`` cuts the sums into chunks of another length, begins at either
end, and holds partial sums in float32 as processors do. A test that compares the bits
of two products fails then, and would fail on some machine.
"""

from __future__ import annotations

import itertools
import random
import warnings

import torch
from torch import Tensor

LIBRARY = torch.library.Library("aten", "IMPL")
CALLS = itertools.count()


def product(a: Tensor, b: Tensor) -> Tensor:
    """(M, K) times (K, N), in float32 where the operands have 16 bits."""
    (m, k), (rows, n) = a.shape, b.shape
    if k != rows:
        raise RuntimeError(
            f"mat1 and mat2 shapes cannot be multiplied ({m}x{k} and {rows}x{n})"
        )
    if a.dtype != b.dtype:
        raise RuntimeError(f"expected one dtype, got {a.dtype} and {b.dtype}")
    dtype = torch.float32 if a.dtype.itemsize == 2 else a.dtype
    a, b = a.to(dtype), b.to(dtype)
    order = random.Random(next(CALLS))
    length = order.randint(1, 8 if k < 64 else 64)
    starts = list(range(0, k, length))
    total = torch.zeros((m, n), dtype=dtype)
    for start in starts if order.random() < 0.5 else reversed(starts):
        part = slice(start, start + length)
        total += torch.bmm(a[None, :, part], b[None, part])[0]
    return total


def mm(a: Tensor, b: Tensor) -> Tensor:
    return product(a, b).to(a.dtype)


def mm_out(a: Tensor, b: Tensor, *, out: Tensor) -> Tensor:
    return write(out, mm(a, b))


def addmm(
    c: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1
) -> Tensor:
    total = product(a, b)
    if alpha != 1:
        total = total * alpha
    if beta != 0:
        total = total + c.to(total.dtype) * beta
    return total.to(a.dtype)


def addmm_out(
    c: Tensor,
    a: Tensor,
    b: Tensor,
    *,
    beta: float = 1,
    alpha: float = 1,
    out: Tensor,
) -> Tensor:
    return write(out, addmm(c, a, b, beta=beta, alpha=alpha))


def write(out: Tensor, result: Tensor) -> Tensor:
    if out.shape != result.shape:
        out.resize_(result.shape)
    return out.copy_(result)


with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that torch's own kernels are replaced
    LIBRARY.impl("mm", mm, "CPU")
    LIBRARY.impl("mm.out", mm_out, "CPU")
    LIBRARY.impl("addmm", addmm, "CPU")
    LIBRARY.impl("addmm.out", addmm_out, "CPU")
