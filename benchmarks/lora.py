"""What LoRAs of rank 32 beside a quantized weight cost in a Linear.

They are added as in ComfyUI, by `add_low_rank`: all adapters of a weight are one pair
of matrices. What they cost in a whole model of ComfyUI is in the benchmark `comfyui`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

import hijack
import schemes.blockwise_fp8  # noqa: F401 - registers the scheme
from benchmarks.harness import Benchmark, Chart, Missing, Row, Setting
from benchmarks.timing import alternate, milliseconds, ratio
from hijack.hosts.comfyui.linear import add_low_rank
from hijack.hosts.comfyui.lora import Pair, Patches

RANK, COUNTS = 32, (1, 3)
LAYERS, ROWS = ((3072, 12288), (3072, 3072)), (1, 16, 256, 1024, 4096)


def adapter(n: int, k: int, device: str) -> Patches:
    """One LoRA for a weight (N, K), as the host keeps it."""
    words: Any = {"dtype": torch.bfloat16, "device": device}
    patches = Patches((), "weight", (n, k))
    down, up = torch.randn(RANK, k, **words) * k**-0.5, torch.randn(n, RANK, **words)
    patches.pairs.append(Pair(up / 100, down, 1.0, None))
    return patches


def measure_layer(
    layer: nn.Module, n: int, k: int, m: int, device: str, rounds: int, repeat: int
) -> dict[str, Any]:
    """The layer's time, and its time with adapters over that."""
    x = torch.randn(m, k, dtype=torch.bfloat16, device=device)
    patches = {c: [adapter(n, k, device) for _ in range(c)] for c in COUNTS}

    def run(count: int) -> Any:
        return lambda _: add_low_rank(layer(x), x, patches[count])

    calls = {"none": lambda _: layer(x), **{str(c): run(c) for c in COUNTS}}
    seconds = alternate(calls, rounds, repeat)
    cells: dict[str, Any] = {"without, ms": milliseconds(seconds["none"])}
    for count in COUNTS:
        name = f"{count} LoRA{'s' * (count > 1)} / none"
        cells[name] = ratio(seconds[str(count)], seconds["none"])
    return cells


def make_layer(n: int, k: int, device: str) -> nn.Module:
    """A Linear (N, K) of FP8 in blocks of 1 x 64."""
    layer = nn.Linear(k, n, bias=False, dtype=torch.bfloat16, device=device)
    layer.requires_grad_(False)
    return hijack.wrap_module(layer, "blockwise_fp8")


@torch.inference_mode()
def measure(setting: Setting) -> Iterator[Row | Missing]:
    """A row for each layer, number of threads and of rows."""
    for k, n in ((256, 512),) if setting.quick else LAYERS:
        layer = make_layer(n, k, "cpu")
        for threads in setting.threads:
            torch.set_num_threads(threads)
            for m in (1, 16) if setting.quick else ROWS:
                rounds = setting.rounds_or(9 if m < 1024 else 5)
                cells = measure_layer(layer, n, k, m, "cpu", rounds, 2)
                yield {"layer": f"{k} -> {n}", "threads": threads, "M": m, **cells}


BENCHMARK = Benchmark(
    "lora",
    "Time of a Linear with an FP8 weight in blocks of 1x64 and LoRAs of rank 32 beside "
    "it, over the same without.",
    measure,
    chart=Chart(
        *("M", ("layer", "threads"), "time / without"),
        ("1 LoRA / none", "3 LoRAs / none"),
    ),
)
