"""Execute a plan in several processes, which write to the same files.

The threads of one process wait for each other to run Python, which counts where there
are many cores. Workers get the plan once, then a few steps at a time.
"""

from __future__ import annotations

import dataclasses
import itertools
import multiprocessing
import pickle
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool

from hijack.checkpoint.quantize_plan import QuantizePlan, Step
from hijack.checkpoint.quantize_run import (
    LayerProgress,
    RunOptions,
    run_steps,
    write_format_tensors,
)
from hijack.errors import CheckpointError
from hijack.safetensors_io.writer import CheckpointWriter, WriterFiles

#: Bytes of the steps that a worker gets at a time.
BATCH = 1 << 26

#: Indices of steps.
Batch = tuple[int, ...]


def run_in_processes(
    plan: QuantizePlan, writer: CheckpointWriter, options: RunOptions, processes: int
) -> None:
    """Write every tensor of a plan.

    Args:
        plan: what is written.
        writer: its files are written to by the workers too.
        options: of all workers together; the progress is told here.
        processes: how many workers.

    Raises:
        CheckpointError: if a worker dies or cannot begin.
        HijackError: of a worker.
    """
    write_format_tensors(plan, writer)
    progress = LayerProgress(plan, options.progress)
    own = dataclasses.replace(
        options, progress=None, memory=max(options.memory // processes, 1)
    )
    work = _pickled(plan, writer.files, own)
    # a fork would copy locks that threads of this process hold
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(processes, context, _begin, (work,)) as pool:
            running: dict[Future[dict[str, int]], Batch] = {}
            batches = _batches(plan.steps)
            try:
                for batch in itertools.islice(batches, 2 * processes):
                    running[pool.submit(_do, batch)] = batch
                while running:
                    done, _ = wait(running, return_when=FIRST_COMPLETED)
                    for future in done:
                        batch = running.pop(future)
                        for key, size in future.result().items():
                            writer.note(key, size)
                        for index in batch:
                            progress.finished(plan.steps[index])
                        for more in itertools.islice(batches, 1):
                            running[pool.submit(_do, more)] = more
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
    except BrokenProcessPool as error:
        raise CheckpointError(
            f"processes: a worker died; got {error}, expected {processes} workers; "
            "call quantize_file under `if __name__ == '__main__':`, with a scheme that "
            "a module registers when it is imported, or pass processes=1"
        ) from error


def _pickled(plan: QuantizePlan, files: WriterFiles, options: RunOptions) -> bytes:
    """What a worker needs to know."""
    try:
        return pickle.dumps((plan, files, options))
    except Exception as error:  # of many kinds
        raise CheckpointError(
            f"processes: scheme {plan.scheme.name} of {type(plan.scheme).__module__} "
            f"cannot be sent to another process; got {error}, expected a scheme of a "
            "module that can be imported; move it there, or pass processes=1"
        ) from error


def _batches(steps: list[Step]) -> Iterator[Batch]:
    """The indices of all steps, a few at a time."""
    batch, cost = list[int](), 0
    for index, step in enumerate(steps):
        batch.append(index)
        cost += step.cost
        if cost >= BATCH:
            yield tuple(batch)
            batch, cost = [], 0
    if batch:
        yield tuple(batch)


# -- in a worker -----------------------------------------------------------------------


class _WorkerWriter(CheckpointWriter):
    """Remembers what was written, for the process that counts it."""

    def note(self, key: str, size: int) -> None:
        """Count bytes of a tensor that were written."""
        with self._lock:
            self.written[key] = self.written.get(key, 0) + size

    written: dict[str, int]


_worker: tuple[QuantizePlan, _WorkerWriter, RunOptions]


def _begin(work: bytes) -> None:
    global _worker
    plan, files, options = pickle.loads(work)
    _worker = plan, _WorkerWriter(files, create=False), options


def _do(batch: Batch) -> dict[str, int]:
    """Execute steps; the bytes that were written of each tensor."""
    plan, writer, options = _worker
    writer.written = {}
    for _ in run_steps(plan, [plan.steps[i] for i in batch], writer, options):
        pass
    return writer.written
