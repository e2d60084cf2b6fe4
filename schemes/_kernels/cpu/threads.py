"""Run a kernel on parts of its rows, on as many threads as torch uses.

torch's threads wait for work by spinning, for milliseconds. A pool of our own would
compete with them for the processors, so kernels run on these very threads where torch
has GNU's OpenMP: its function that starts a parallel region is called as compiled code
would call it. Elsewhere, and in a process that was forked, whose OpenMP threads are
gone, they run on a small pool.
"""

from __future__ import annotations

import ctypes
import functools
import os
import struct
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from llvmlite import ir

from schemes._kernels import buffers
from schemes._kernels.cpu.llvm import Kernel, kernel
from schemes._kernels.cpu.vectors import I32, I64, Function

#: Elements that are worth waking a thread for.
GRAIN = 1 << 18
#: Scratch memory of two threads shares no line of a cache.
_LINE = 128
_CPU = torch.device("cpu")

_head = struct.Struct("=3q").pack
_result = struct.Struct("=q").unpack_from
_lock = threading.Lock()
_pool: ThreadPoolExecutor | None = None
_workers = 0
_is_forked = False


def run(
    work: Kernel,
    arguments: tuple[Any, ...],
    rows: slice,
    cost: int,
    scratch: int,
    parallel: bool = True,
) -> bool:
    """Run a kernel on all rows, in parallel if that is worth it.

    Args:
        work: what to run.
        arguments: its arguments, without rows and scratch memory.
        rows: from where to where.
        cost: elements of a row.
        scratch: bytes of scratch memory that each thread needs.
        parallel: whether more than one thread may be used.

    Returns:
        Whether the kernel returned another number than 0 for some rows.
    """
    count = rows.stop - rows.start
    parts = 1
    if parallel and count * cost >= 2 * GRAIN:
        parts = min(torch.get_num_threads(), count * cost // GRAIN, count)
    each = -(-scratch // _LINE) * _LINE
    memory = buffers.shared("scratch", parts * each, torch.uint8, _CPU).data_ptr()
    rest = work.pack(*arguments)
    bounds = [rows.start + count * part // parts for part in range(parts + 1)]
    blocks = [
        _head(first, last, memory + each * part) + rest
        for part, (first, last) in enumerate(pairwise(bounds))
    ]
    size = len(blocks[0])
    block = ctypes.create_string_buffer(b"".join(blocks), size * parts)
    address = ctypes.addressof(block)
    if parts == 1:
        work.call(address)
    elif (region := _openmp()) is not None:
        region(work.address, parts, size, address)
    else:
        starts = [address + size * part for part in range(parts)]
        others = [_executor(parts - 1).submit(work.call, at) for at in starts[1:]]
        work.call(starts[0])
        for other in others:
            other.result()
    return any(_result(block, size * part)[0] for part in range(parts))


# -- torch's own threads ---------------------------------------------------------------


def _openmp() -> Callable[[int, int, int, int], None] | None:
    return None if _is_forked else _find_openmp()


@functools.cache
def _find_openmp() -> Callable[[int, int, int, int], None] | None:
    """A function that runs a kernel in a parallel region; None if torch has none.

    It takes the address of a kernel, how many blocks of arguments there are, their size
    and the address of the first.
    """
    if not sys.platform.startswith("linux"):
        return None
    own = sorted(Path(torch.__file__).parent.joinpath("lib").glob("libgomp*.so*"))
    try:
        library = ctypes.CDLL(str(own[0]) if own else None)
        start, most = library.GOMP_parallel, library.omp_get_max_threads
        functions = (library.omp_get_thread_num, library.omp_get_num_threads)
    except (OSError, AttributeError):
        return None
    count = torch.get_num_threads()  # torch sets it for this thread, if it has not
    if most() != count:  # it is not the OpenMP that torch uses
        return None
    number, team = (ctypes.cast(f, ctypes.c_void_p).value for f in functions)
    region = kernel(build_region, number, team).address
    start.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint]
    start.restype = None

    def run(address: int, parts: int, size: int, blocks: int) -> None:
        work = (ctypes.c_int64 * 4)(address, parts, size, blocks)
        # a team of another size would be made anew, by torch again next time
        start(region, ctypes.addressof(work), torch.get_num_threads(), 0)

    return run


def build_region(number: int, team: int) -> Function:
    """What each thread of a region runs: every so many of the blocks of arguments.

    Args:
        number: address of ``omp_get_thread_num``.
        team: address of ``omp_get_num_threads``.
    """
    f = Function("region", "blocks", head="kernel parts size")
    b = f.b
    ask = ir.FunctionType(I32, []).as_pointer()
    first, step = (
        b.sext(b.call(b.inttoptr(f.integer(address), ask), []), I64)
        for address in (number, team)
    )
    work = ir.FunctionType(ir.VoidType(), [I64]).as_pointer()
    with f.loop(first, f["parts"], step) as part:
        block = f.add(f["blocks"], f.mul(part.index, f["size"]))
        b.call(b.inttoptr(f["kernel"], work), [block])
    b.ret_void()  # other threads still read the arguments
    return f


# -- a pool ----------------------------------------------------------------------------


def _executor(workers: int) -> ThreadPoolExecutor:
    global _pool, _workers
    with _lock:
        if _pool is None or _workers < workers:
            # one that is outgrown ends when its last work is done
            _pool = ThreadPoolExecutor(workers, thread_name_prefix="hijack-kernel")
            _workers = workers
        return _pool


def _forget() -> None:
    """In a forked process, whose threads are gone."""
    global _pool, _workers, _lock, _is_forked
    _pool, _workers, _lock, _is_forked = None, 0, threading.Lock(), True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
