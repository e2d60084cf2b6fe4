"""Mutate checkpoints by the thousand: ``python -m tests.fuzz.fuzz --count 100000``.

Workers are processes of their own, so that a crash or a hang is known by its case. Case
N of seed S is always the same; ``--first N --count 1`` runs it again. What fails is
kept in the folder given by ``--out``.
"""

from __future__ import annotations

import argparse
import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import torch

from tests.fuzz.case import Case
from tests.fuzz.check import Checker, Outcome
from tests.fuzz.mutate import mutate
from tests.fuzz.seeds import seeds

#: Wall-clock seconds without a word, after which a worker hangs.
PATIENCE = 60
#: Files after which it is said how far the run is.
TELLS = 5000
#: Failures kept with the same last line.
KEPT = 3


def make(cases: list[Case], seed: int, number: int) -> tuple[Case, Random]:
    """One case, and the generator that chooses what is done with it."""
    random = Random(f"{seed}:{number}")
    return mutate(random.choice(cases), random), random


def work(seed: int, first: int, step: int, count: int, out: Path) -> None:
    """Run every ``step``-th case and say a line of JSON about each."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    cases = seeds()
    with tempfile.TemporaryDirectory(dir=_memory_folder()) as folder:
        checker = Checker(Path(folder), cases)
        for case in cases:  # once unjudged: the first of each kind brings in code
            checker.run(case, Random(1))
            if problem := checker.run(case, Random(0)).problem:
                raise RuntimeError(f"{case.name}, as it is: {problem}")
        for number in range(first, count, step):
            case, random = make(cases, seed, number)
            outcome = checker.run(case, random)
            if outcome.problem:
                _keep(case, outcome.problem, out / f"{seed}-{number}")
            said = {"number": number, "seed": case.name, **vars(outcome)}
            print(json.dumps(said), flush=True)


def _memory_folder() -> str | None:
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def _keep(case: Case, problem: str, folder: Path) -> None:
    case.write(folder)
    (folder / "problem.txt").write_text(problem, "utf-8", "backslashreplace")


class Run:
    """All workers, and what they said."""

    def __init__(self, seed: int, count: int, out: Path) -> None:
        self.seed, self.count, self.out = seed, count, out
        self.steps: Counter[tuple[str, str]] = Counter()
        self.problems: Counter[str] = Counter()
        self.slowest: list[tuple[float, int, str]] = []
        self.largest: list[tuple[int, int, str]] = []
        self.done = 0

    def run(self, workers: int, first: int = 0) -> None:
        """Run all cases; a worker that dies is replaced behind the case it died of."""
        threads = [
            threading.Thread(target=self._drive, args=(first + number, workers))
            for number in range(workers)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    def _drive(self, first: int, step: int) -> None:
        while first < self.count:
            first = self._one(first, step)

    def _one(self, first: int, step: int) -> int:
        """Run one worker to its end; returns where to go on."""
        arguments = (self.seed, first, step, self.count)
        command = [sys.executable, "-m", "tests.fuzz.fuzz", "--worker"]
        command += [*map(str, arguments), "--out", str(self.out)]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        lines: queue.Queue[str] = queue.Queue()
        assert worker.stdout is not None
        stream = worker.stdout

        def listen() -> None:
            for line in stream:
                lines.put(line)
            lines.put("")

        threading.Thread(target=listen, daemon=True).start()
        started = False
        while True:
            try:
                line = lines.get(timeout=PATIENCE)
            except queue.Empty:
                worker.kill()
                line = ""
            if not line:
                break
            started = True
            said = json.loads(line)
            first = said["number"] + step
            self._count(said)
        code = worker.wait()
        if first >= self.count:
            return first
        if not started and code == 1:
            self.problems["a worker does not start"] += 1
            return self.count
        case, _ = make(seeds(), self.seed, first)
        problem = f"the worker ended with {code}"
        _keep(case, problem, self.out / f"{self.seed}-{first}")
        crash = {"number": first, "seed": case.name, **vars(Outcome(problem=problem))}
        self._count(crash)
        return first + step

    def _count(self, said: dict[str, Any]) -> None:
        self.done += 1
        if self.done % TELLS == 0:
            print(f"{self.done:,} files", file=sys.stderr, flush=True)
        self.steps.update(said["steps"].items())
        where = said["number"], said["seed"]
        self.slowest = sorted([*self.slowest, (said["seconds"], *where)])[-5:]
        self.largest = sorted([*self.largest, (said["memory"], *where)])[-5:]
        if said["problem"]:
            self.problems[_signature(said["problem"])] += 1
            print(f"{self.seed}-{said['number']} ({said['seed']}):", file=sys.stderr)
            print(_signature(said["problem"]), file=sys.stderr)

    def report(self) -> str:
        """The figures, as text."""
        lines = [f"{self.done:,} files, seed {self.seed}"]
        for (step, result), number in sorted(self.steps.items()):
            lines.append(f"  {step:<12} {result:<22} {number:>8,}")
        for seconds, number, name in reversed(self.slowest):
            lines.append(f"  {seconds:.3f} s of CPU: {number} ({name})")
        for memory, number, name in reversed(self.largest):
            lines.append(f"  {memory / 1e6:.2f} MB more: {number} ({name})")
        lines.append(f"  {sum(self.problems.values())} problems")
        for problem, number in self.problems.most_common():
            lines.append(f"  {number} x {problem}")
        return "\n".join(lines)


def _signature(problem: str) -> str:
    """The line of our code that failed last, and with what."""
    lines = problem.strip().splitlines()
    ours = [line.strip() for line in lines if "/hijack/" in line or "/schemes/" in line]
    return f"{ours[-1] if ours else ''} {lines[-1][:150]}"


def main() -> int:
    """Run from the command line; 1 if anything failed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("fuzz-failures"))
    parser.add_argument("--worker", nargs=4, type=int, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker:
        work(*given.worker, given.out)
        return 0
    start, run = time.time(), Run(given.seed, given.first + given.count, given.out)
    run.run(given.workers, given.first)
    print(f"{run.report()}\n  {time.time() - start:.0f} s of wall clock")
    return bool(run.problems)


if __name__ == "__main__":
    sys.exit(main())
