"""Ratios that a busy machine does not spoil."""

from __future__ import annotations

import platform
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch


class Spread(NamedTuple):
    """A figure of several rounds.

    Attributes:
        median: of all rounds.
        low: the first quartile.
        high: the third quartile.
        rounds: how many there were.
    """

    median: float
    low: float
    high: float
    rounds: int

    def __format__(self, spec: str) -> str:
        return format(self.median, spec)

    def __float__(self) -> float:
        return self.median


def spread(values: Sequence[float]) -> Spread:
    """Median and quartiles; of one value, that value three times."""
    low = high = middle = statistics.median(values)
    if len(values) > 1:
        low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(middle, low, high, len(values))


def alternate(
    runs: Mapping[str, Callable[[int], object]], rounds: int, repeat: int = 1
) -> dict[str, list[float]]:
    """Time several functions in turn, in a new order each round.

    Args:
        runs: name to a function of the round's number.
        rounds: how often each is timed, after one round that is not counted.
        repeat: calls in a row that are timed as one.

    Returns:
        Name to the seconds of one call, round by round, so that quotients may be
        formed within each round.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    for turn in range(rounds + 1):
        random.shuffle(names)
        for name in names:
            call = runs[name]
            start = time.perf_counter()
            for again in range(repeat):
                call(turn * repeat + again)
            if torch.cuda.is_initialized():  # what was started must be done
                torch.cuda.synchronize()
            elapsed = (time.perf_counter() - start) / repeat
            if turn:
                seconds[name].append(elapsed)
    return seconds


def ratio(over: Sequence[float], under: Sequence[float]) -> Spread:
    """The quotients of each round."""
    return spread([a / b for a, b in zip(over, under, strict=True)])


def milliseconds(seconds: Sequence[float]) -> Spread:
    """Times in milliseconds."""
    return spread([each * 1e3 for each in seconds])


def machine() -> str:
    """Processor, its features that matter here, the GPU if there is one, and torch."""
    name, flags = platform.processor() or platform.machine(), set[str]()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    has = ", ".join(f"{flag} {'yes' if flag in flags else 'no'}" for flag in known)
    gpu = f"; {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{name} ({has}){gpu}; torch {torch.__version__}"
