"""Forward of a block-wise FP8 Linear, beside a bfloat16 one and other programs' ways.

Every call takes the next of several weights that together are larger than any cache, as
in a model. Other programs' forwards and hijack's kernels get the same codes and scales;
what does not compute the same is not timed. musubi-tuner's forward is its own function
``fp8_linear_forward_patch``; *naive* is a cast, a multiplication and a product.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hijack
import schemes.blockwise_fp8  # noqa: F401 - registers the scheme
from benchmarks.harness import Benchmark, Chart, Missing, Row, Setting
from benchmarks.kernels import block_scaled, kernels
from benchmarks.peers import Run, musubi_forward, naive_forward, no_musubi
from benchmarks.timing import alternate, milliseconds, ratio

#: (K, N) of Linears; weights that together fill this many bytes take turns.
LAYERS, POOL_BYTES = ((3072, 12288), (3072, 3072), (12288, 3072)), 200 << 20
QUICK_LAYERS, QUICK_POOL_BYTES = ((256, 512),), 1 << 20
BLOCKS = ((1, 64), (128, 128))
ROWS, QUICK_ROWS = (1, 16, 64, 256, 1024, 4096), (1, 16)
#: Relative error that rounding may make.
BOUND = 1e-2


@dataclasses.dataclass
class Pool:
    """Layers of one shape, and every way to compute them.

    Attributes:
        dense: weights (N, K) in bfloat16.
        runs: name to a function of the input for each layer.
        missing: what cannot take these layers.
    """

    dense: list[Tensor]
    runs: dict[str, list[Run]]
    missing: list[Missing]

    def call(self, name: str, x: Tensor, turn: int) -> Tensor:
        """One forward, of the layer whose turn it is."""
        each = self.runs[name]
        return each[turn % len(each)](x)


def make_pool(
    n: int, k: int, size: tuple[int, int], pool_bytes: int, device: str = "cpu"
) -> Pool:
    """Layers (N, K) whose codes fill that many bytes, two at least."""
    layers: list[Any] = []
    for _ in range(max(pool_bytes // (n * k), 2)):
        layer = nn.Linear(k, n, False, dtype=torch.bfloat16, device="meta")
        weight = torch.randn(n, k, dtype=torch.bfloat16, device=device)
        layer.weight = nn.Parameter(weight * k**-0.5, requires_grad=False)
        layers.append(layer)
    dense = [layer.weight.detach() for layer in layers]
    for layer in layers:
        hijack.wrap_module(layer, "blockwise_fp8", block_size=size)
        # codes that were not seen before are looked at for NaN, once
        layer(torch.zeros(1, k, dtype=torch.bfloat16, device=device))
    runs: dict[str, list[Run]] = {
        "hijack": [layer.__call__ for layer in layers],
        "bf16": [lambda x, w=weight: F.linear(x, w) for weight in dense],
        "naive": [naive_forward(layer, size) for layer in layers],
    }
    missing = []
    others = [musubi_forward(layer) for layer in layers]
    if all(others):
        runs["musubi-tuner"] = [other for other in others if other]
    elif size[0] == 1:
        missing.append(Missing("musubi-tuner", no_musubi() or "it has no such blocks"))
    weights = [block_scaled(layer) for layer in layers]
    for name, kernel in kernels(dense[0].device.type).items():
        why = kernel.refuses(weights[0], torch.bfloat16)
        if why is None:
            runs[f"kernel {name}"] = [
                lambda x, f=kernel.linear, w=weight: f(x, w, None) for weight in weights
            ]
        else:
            missing.append(Missing(f"kernel {name}", why))
    return Pool(dense, runs, missing)


def check(pool: Pool, x: Tensor) -> Iterator[Missing]:
    """Take out of the pool what fails, or computes something else than the rest."""
    dense = pool.call("naive", x.float(), 0)
    for name in [name for name in pool.runs if name != "bf16"]:
        try:
            actual = pool.call(name, x, 0).float()
        except Exception as failure:
            why = f"{type(failure).__name__}: {failure}"
        else:
            error = float((actual - dense).norm() / dense.norm())
            why = f"differs by {error:.1e}" if not error < BOUND else ""
        if why:
            del pool.runs[name]
            yield Missing(name, f"{why}, with {len(x)} rows")


def measure_pool(
    pool: Pool, head: dict[str, Any], sizes: Sequence[int], setting: Setting
) -> Iterator[Row | Missing]:
    """A row for each number of rows of the input."""
    n, k = pool.dense[0].shape
    for m in sizes:
        x = torch.randn(m, k, dtype=torch.bfloat16, device=pool.dense[0].device)
        yield from check(pool, x)
        calls = {
            name: lambda turn, name=name, x=x: pool.call(name, x, turn)
            for name in pool.runs
        }
        rounds = setting.rounds_or(9 if m < 1024 else 5)
        seconds = alternate(calls, rounds, 20 if x.is_cuda else 2 if m < 1024 else 1)
        bf16, ours = seconds.pop("bf16"), seconds.get("hijack")
        row: dict[str, Any] = {"layer": f"{k} -> {n}", **head, "M": m}
        row["bf16, ms"] = milliseconds(bf16)
        row |= {name: ratio(each, bf16) for name, each in seconds.items()}
        if "musubi-tuner" in seconds and ours:
            row["musubi-tuner / hijack"] = ratio(seconds["musubi-tuner"], ours)
        yield row


@torch.inference_mode()
def measure(setting: Setting) -> Iterator[Row | Missing]:
    """Rows for each layer, block size, number of threads and of rows."""
    layers = QUICK_LAYERS if setting.quick else LAYERS
    room = QUICK_POOL_BYTES if setting.quick else POOL_BYTES
    told = set()
    for k, n in layers:
        for size in BLOCKS:
            pool = make_pool(n, k, size, room)
            block = f"{size[0]}x{size[1]}"
            for threads in setting.threads:
                torch.set_num_threads(threads)
                head = {"block": block, "threads": threads}
                sizes = QUICK_ROWS if setting.quick else ROWS
                yield from measure_pool(pool, head, sizes, setting)
            told |= set(pool.missing)
    yield from sorted(told, key=lambda each: each.what)


BENCHMARK = Benchmark(
    "forward",
    "Time of a Linear with an FP8 weight over the same in bfloat16, on the CPU; "
    "M is the number of rows of the input.",
    measure,
    "musubi-tuner for its column",
    chart=Chart("M", ("layer", "block", "threads"), "time / bfloat16"),
)
