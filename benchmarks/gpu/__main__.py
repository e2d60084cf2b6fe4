"""All checks and figures of a GPU in at most eight minutes, on a bare machine.

::

    pip install --no-index wheels/*.whl
    HIJACK_PEER_MUSUBI=musubi-tuner python -m benchmarks.gpu --out $OUT

needs torch 2.11 with CUDA and its triton, no network, and these wheels: pluggy, wrapt,
safetensors and, for the last step, pytest with iniconfig, packaging, pluggy, pygments,
pytest-timeout, hypothesis with sortedcontainers; not llvmlite. Of musubi-tuner
``src/musubi_tuner`` is enough: ``modules/fp8_optimization_utils.py`` and ``utils/``.

Steps run in order, the cheapest and most telling first. Each has a budget; one that
fails, hangs or kills its process becomes a line of the result, and the next one runs.
``--out``, or ``$OUT``, gets `gpu.json` and `gpu.md` after each step. ``--device cpu
--quick`` rehearses all of it: what needs a GPU is then named.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import report
from benchmarks.gpu import checks, figures
from benchmarks.harness import (
    Benchmark,
    Missing,
    OutOfTimeError,
    Result,
    Row,
    Run,
    Setting,
    entry,
    new_run,
    result_from_json,
    result_to_json,
    run,
    unfinished,
)

STEPS: tuple[Benchmark, ...] = (
    checks.ENVIRONMENT,
    checks.DECODE,
    checks.LINEAR,
    figures.FORWARD,
    figures.LAUNCHES,
    checks.NO_SYNC,
    checks.GRAPHS,
    checks.STREAMS,
    figures.MODEL,
    figures.FORMATS,
    figures.QUANTIZE,
    figures.KERNELS,
    figures.LORA,
    checks.TESTS,
)
LIMIT = 480
#: Seconds over its budget after which a step's process is killed.
GRACE = 10
ROOT = Path(__file__).resolve().parents[2]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    words = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__)
    words.formatter_class = argparse.RawDescriptionHelpFormatter
    names = [step.name for step in STEPS]
    words.add_argument("names", nargs="*", help=f"steps: {', '.join(names)}")
    words.add_argument("--device", default="cuda")
    words.add_argument("--quick", action="store_true", help="small shapes, to try it")
    default = Path(os.environ.get("OUT", "benchmarks-out"))
    words.add_argument("--out", type=Path, default=default)
    words.add_argument("--limit", type=int, default=LIMIT, help="seconds for all")
    words.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    return words


# -- the process that measures ---------------------------------------------------------


def child(path: Path, names: Sequence[str], setting: Setting) -> None:
    """Run some steps, and write every row as it comes."""
    if setting.device == "cpu":
        torch.set_num_threads(1)  # a rehearsal is in nobody's way
    with path.open("a", encoding="utf-8") as file:

        def put(name: str, kind: str, data: Any) -> None:
            file.write(json.dumps({"name": name, kind: data}) + "\n")
            file.flush()

        for step in (step for step in STEPS if step.name in names):
            put(step.name, "start", None)

            def tell(found: Row | Missing, name: str = step.name) -> None:
                print(report.line(name, found), flush=True)
                for kind, data in entry(found).items():
                    put(name, kind, data)

            with _alarm(step.budget):
                result = run(step, setting, tell)
            put(step.name, "result", result_to_json(result))
            if _is_broken(setting.device):
                raise SystemExit(f"{step.name}: the device no longer answers")


@contextlib.contextmanager
def _alarm(seconds: int) -> Iterator[None]:
    """Raise an `OutOfTimeError` after some seconds, where the system has alarms."""

    def ring(*_: object) -> None:
        raise OutOfTimeError(f"over its {seconds} seconds")

    if not hasattr(signal, "SIGALRM"):
        yield
        return
    before = signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def _is_broken(device: str) -> bool:
    """Whether a kernel has failed so that nothing more runs in this process."""
    if device == "cpu":
        return False
    try:
        torch.cuda.synchronize()
        torch.zeros(1, device=device).item()
    except RuntimeError:
        return True
    return False


# -- the process that watches ----------------------------------------------------------


def run_all(
    names: Sequence[str], words: Sequence[str], limit: float
) -> Iterator[Result]:
    """Every step's result, in order; another process goes on where one has died."""
    end = time.monotonic() + limit
    waiting = [step for step in STEPS if step.name in names]
    while waiting:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "rows"
            path.touch()
            rest = [step.name for step in waiting]
            command = [sys.executable, "-m", "benchmarks.gpu", *rest, *words]
            process = subprocess.Popen([*command, "--child", path], cwd=ROOT)
            try:
                yield from _watch(process, path, waiting, end)
            finally:
                if process.poll() is None:
                    process.kill()
                process.wait()


def _watch(
    process: subprocess.Popen[bytes], path: Path, waiting: list[Benchmark], end: float
) -> Iterator[Result]:
    """Results until all are there, or the process has ended or must be."""
    done, started = 0, time.monotonic()
    while waiting:
        ended, now = process.poll() is not None, time.monotonic()
        entries = [json.loads(line) for line in _whole_lines(path)]
        finished = [each["result"] for each in entries if "result" in each]
        for data in finished[done:]:
            done, started = done + 1, now
            waiting.pop(0)
            yield result_from_json(data)
        if not waiting:
            return
        step = waiting[0]
        why = None
        if now > end:
            why = "no time was left"
        elif now > started + step.budget + GRACE + (0 if done else GRACE):
            why = f"its process was killed after {now - started:.0f} seconds"
        elif ended and len(finished) == done:
            why = f"its process ended with {process.returncode}"
        mine = [each for each in entries if each["name"] == step.name]
        if ended and not mine and done:
            return  # it ended after the step before; the next process takes this one
        if why is not None:
            result = unfinished(waiting.pop(0), mine, why)
            print(report.line(step.name, result.missing[-1]), flush=True)
            yield result
            if now <= end:
                return
            continue
        time.sleep(0.2)


def _whole_lines(path: Path) -> list[str]:
    """What has been written up to the last end of a line."""
    return path.read_text("utf-8").rpartition("\n")[0].splitlines()


def failures(everything: Run) -> list[str]:
    """Checks that failed."""
    return [
        f"{result.name}: {report.line(result.name, row)}"
        for result in everything.results
        for row in result.rows
        if row.get("result", "ok") != "ok"
    ]


def write(everything: Run, folder: Path) -> None:
    """Write what there is so far."""
    folder.mkdir(parents=True, exist_ok=True)
    report.write(everything, folder, "gpu")


def main(words: Sequence[str] | None = None) -> int:
    """Run all steps or those that are named.

    Returns:
        1 if a check failed, else 0.
    """
    args = parser().parse_args(words)
    setting = Setting(args.quick, device=args.device)
    known = [step.name for step in STEPS]
    names = args.names or known
    unknown = [name for name in names if name not in known]
    if unknown:
        parser().error(f"unknown: {', '.join(unknown)}; known: {', '.join(known)}")
    if args.child:
        child(args.child, names, setting)
        return 0
    options = ["--device", args.device, *(["--quick"] if args.quick else [])]
    everything = new_run(args.quick)
    for result in run_all(names, options, args.limit):
        everything.results.append(result)
        write(everything, args.out)
    failed = failures(everything)
    print("\n".join(failed))
    print(f"{len(failed)} checks failed; written: {args.out / 'gpu.md'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
