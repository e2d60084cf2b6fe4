"""Execute a plan on several threads, with bounded memory."""

from __future__ import annotations

import collections
import contextlib
import ctypes
import dataclasses
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait

import torch
from torch import Tensor

from hijack.checkpoint.copying import chunks
from hijack.checkpoint.quantize_plan import QuantizePlan, Step
from hijack.errors import CheckpointError
from hijack.progress import Progress
from hijack.safetensors_io.writer import CheckpointWriter

#: Bytes of tensors in memory at once; only a single larger layer may need more.
MEMORY = 1 << 28
#: Bytes of a layer from which freed memory is returned to the system.
_LARGE = 1 << 24
#: More threads than this only wait for each other.
MAX_WORKERS = 8


@dataclasses.dataclass(frozen=True)
class RunOptions:
    """How to execute a plan.

    Attributes:
        device: where to compute.
        workers: number of threads.
        progress: called after each layer, from the thread that calls `run`.
        memory: bytes of tensors that may be in memory at once.
    """

    device: torch.device
    workers: int = 1
    progress: Progress | None = None
    memory: int = dataclasses.field(default_factory=lambda: MEMORY)


class LayerProgress:
    """Tells of each layer of a plan, once all its parts are written."""

    def __init__(self, plan: QuantizePlan, progress: Progress | None) -> None:
        self._progress = progress
        self._parts = collections.Counter(step.layer for step in plan.steps)
        self._done, self._total = 0, len(plan.options)

    def finished(self, step: Step) -> None:
        """Count a step that was executed."""
        if step.layer is None:
            return
        self._parts[step.layer] -= 1
        if self._parts[step.layer]:
            return
        self._done += 1
        if self._progress is not None:
            self._progress(self._done, self._total, step.layer)


def run(plan: QuantizePlan, writer: CheckpointWriter, options: RunOptions) -> None:
    """Write every tensor of a plan."""
    write_format_tensors(plan, writer)
    progress = LayerProgress(plan, options.progress)
    with contextlib.closing(run_steps(plan, plan.steps, writer, options)) as finished:
        for step in finished:
            progress.finished(step)


def write_format_tensors(plan: QuantizePlan, writer: CheckpointWriter) -> None:
    """Write the tensors that say something of the whole file."""
    for key, tensor in plan.format_metadata.tensors.items():
        writer.write(key, tensor)


def run_steps(
    plan: QuantizePlan,
    steps: Iterable[Step],
    writer: CheckpointWriter,
    options: RunOptions,
) -> Generator[Step]:
    """Execute some steps of a plan, and yield each when it is done."""
    local = threading.local()

    def do(step: Step) -> None:
        if step.part is not None:
            memory = _memory_for(plan, step, local)
            for name, rows, offset in plan.compute_part(step, options.device, memory):
                writer.write_part(name, rows, offset)
            return
        if step.copied:
            writer.write_bytes(step.key, chunks(plan.header.tensors[step.key]))
            return
        _write(plan, step, writer, options.device)
        if step.cost > _LARGE:
            _trim_memory()

    yield from _each(steps, do, options)


def _memory_for(plan: QuantizePlan, step: Step, local: threading.local) -> Tensor:
    """Bytes to read a part into, which each thread uses again for the next one."""
    info, part = plan.header.tensors[step.key], step.part
    rows = info.shape[0] if part is None else part.stop - part.start
    size = rows * (info.nbytes // info.shape[0])
    known: Tensor | None = getattr(local, "memory", None)
    if known is None or known.numel() < size:
        known = local.memory = torch.empty(size, dtype=torch.uint8)
    return known


def _write(
    plan: QuantizePlan, step: Step, writer: CheckpointWriter, device: torch.device
) -> None:
    """Compute and write the tensors of a step; their memory is released on return."""
    for name, tensor in plan.compute(step, device).items():
        writer.write(name, tensor)


def _trim_memory() -> None:
    """Return freed memory to the system.

    glibc keeps some for each thread; that of a few threads is more than a layer.
    """
    with contextlib.suppress(TypeError, AttributeError, OSError):  # another libc
        ctypes.CDLL(None).malloc_trim(0)


def count_workers(workers: int | None, processes: int = 1) -> int:
    """The number of threads to use in each process; None is one for each core.

    Raises:
        CheckpointError: if one of them is not a positive number.
    """
    if type(processes) is not int or processes < 1:
        raise CheckpointError(
            f"processes: got {processes!r}, expected a positive number of processes"
        )
    if workers is None:
        cores = os.cpu_count() or 1
        if hasattr(os, "sched_getaffinity"):
            cores = len(os.sched_getaffinity(0))
        return min(max(cores // processes, 1), MAX_WORKERS)
    if type(workers) is not int or workers < 1:
        raise CheckpointError(
            f"workers: got {workers!r}, expected a positive number of threads, or None "
            "for one on each core"
        )
    return workers


def _each(
    steps: Iterable[Step], do: Callable[[Step], None], options: RunOptions
) -> Generator[Step]:
    """Do every step, and yield each when it is done.

    A step starts when a thread is free and there is enough memory for its cost.
    """
    with _pool(options.workers) as pool:
        running: dict[Future[None], Step] = {}
        for step in steps:
            while running and (
                len(running) >= options.workers
                or step.cost + sum(s.cost for s in running.values()) > options.memory
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
    """A thread pool whose threads use one torch thread each.

    By default torch would split the work of each over threads of its own, which would
    compete. The setting is global for threads that have not computed yet, so it is
    restored as soon as all of ours have taken it over.
    """
    default = torch.get_num_threads()
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
            ready.abort()  # release waiters if the system refused a thread
            torch.set_num_threads(default)
        yield pool
