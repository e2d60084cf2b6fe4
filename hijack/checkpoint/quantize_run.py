"""Carry out a plan on several threads, with bounded memory."""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import torch

from hijack.checkpoint.copying import chunks
from hijack.checkpoint.quantize_plan import QuantizePlan, Step
from hijack.errors import CheckpointError
from hijack.safetensors_io.writer import CheckpointWriter

#: Bytes of tensors in memory at once; only a single larger layer may take more.
MEMORY = 1 << 28
#: Bytes a layer takes before what it leaves behind is worth looking after.
_LARGE = 1 << 24
#: More threads than this wait for each other.
MOST_WORKERS = 8

#: Called with layers done, layers in all, and the name of the layer just done.
Progress = Callable[[int, int, str], None]


@dataclasses.dataclass(frozen=True)
class Way:
    """How to carry out a plan.

    Attributes:
        device: where to compute.
        workers: number of threads.
        progress: called after each layer, from the thread that calls `run`.
    """

    device: torch.device
    workers: int = 1
    progress: Progress | None = None


def run(plan: QuantizePlan, writer: CheckpointWriter, how: Way) -> None:
    """Write every tensor of a plan that is still missing."""
    for key, tensor in plan.marks.tensors.items():
        if key in writer.missing:
            writer.write(key, tensor)
    steps = [s for s in plan.steps if not writer.missing.isdisjoint(s.names)]
    total = len(plan.options)
    done = total - sum(step.layer is not None for step in steps)

    def do(step: Step) -> None:
        if step.copied:
            writer.write_bytes(step.key, chunks(plan.header.tensors[step.key]))
            return
        _make(plan, step, writer, how.device)
        if step.cost > _LARGE:
            _give_back()

    with contextlib.closing(_each(steps, do, how.workers)) as finished:
        for step in finished:
            done += step.layer is not None
            if how.progress is not None and step.layer is not None:
                how.progress(done, total, step.layer)


def _make(
    plan: QuantizePlan, step: Step, writer: CheckpointWriter, device: torch.device
) -> None:
    """Make and write what a step is for; nothing of it is held afterwards."""
    for name, tensor in plan.make(step, device).items():
        writer.write(name, tensor)


def _give_back() -> None:
    """Have the system take back memory that was freed.

    glibc keeps some for each thread that ever computed; that of a few together is more
    than a layer.
    """
    with contextlib.suppress(TypeError, AttributeError, OSError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)


def count_workers(asked: int | None) -> int:
    """How many threads to use.

    Raises:
        CheckpointError: if it is no positive number.
    """
    if asked is None:
        cores = os.cpu_count() or 1
        if hasattr(os, "sched_getaffinity"):
            cores = len(os.sched_getaffinity(0))
        return min(cores, MOST_WORKERS)
    if type(asked) is not int or asked < 1:
        raise CheckpointError(
            f"workers: got {asked!r}, expected a positive number of threads, or None "
            "for one on each core"
        )
    return asked


def _each(
    steps: Iterable[Step], do: Callable[[Step], None], workers: int
) -> Generator[Step]:
    """Do every step, and yield each when it is done.

    A step begins when there is a thread for it, and room in memory for what it costs.
    """
    with _pool(workers) as pool:
        running: dict[Future[None], Step] = {}
        for step in steps:
            while running and (
                len(running) >= workers
                or step.cost + sum(s.cost for s in running.values()) > MEMORY
            ):
                yield from _finished(running)
            running[pool.submit(do, step)] = step
        while running:
            yield from _finished(running)


def _finished(running: dict[Future[None], Step]) -> Iterator[Step]:
    done, _ = wait(running, return_when=FIRST_COMPLETED)
    for future in done:
        future.result()
        yield running.pop(future)


@contextlib.contextmanager
def _pool(workers: int) -> Iterator[ThreadPoolExecutor]:
    """Threads each of which computes alone.

    torch would have every one of them share its work with threads of its own, which
    only get in each other's way. Its setting is of the whole process for threads that
    have not computed yet; so it is put back as soon as all of ours have taken it over.
    """
    usual = torch.get_num_threads()
    ready = threading.Barrier(workers + 1)

    def begin() -> None:
        torch.get_num_threads()  # takes over the process's setting, once
        torch.set_num_threads(1)
        ready.wait()

    with ThreadPoolExecutor(workers, "hijack") as pool:
        try:
            started = [pool.submit(begin) for _ in range(workers)]
            ready.wait()
            wait(started)
        finally:
            ready.abort()  # nobody waits for a thread the system refused
            torch.set_num_threads(usual)
        yield pool
