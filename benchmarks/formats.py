"""Forward of other formats than FP8 blocks, and of other libraries' layers.

Each layer is made of the same dense weights; formats differ in error and size, so only
those of one name compare.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hijack
import schemes
from benchmarks.harness import Benchmark, Chart, Missing, Row, Setting, first_line
from benchmarks.kernels import block_scaled, kernels
from benchmarks.peers import LIBRARIES, Run, is_installed
from benchmarks.timing import alternate, milliseconds, ratio

#: Format to the scheme and its options, and the error it may have on normal weights.
FORMATS: dict[str, tuple[str, dict[str, Any], float]] = {
    "int8": ("int8", {"block_size": "row"}, 0.05),
    "fp8": ("blockwise_fp8", {"block_size": "row"}, 0.06),
    "nvfp4": ("nvfp4", {}, 0.2),
    "nf4": ("nf4", {}, 0.2),
}
LAYERS = ((3072, 12288), (3072, 3072))
ROWS = (1, 16, 256, 1024)
POOL_BYTES = 200 << 20


def make_runs(form: str, weights: list[Tensor]) -> Iterator[tuple[str, Any]]:
    """Program and, for each weight, a function of the input; or why there is none."""
    scheme, options, _ = FORMATS[form]
    layers = []
    for weight in weights:
        layer = nn.Linear(*weight.shape[::-1], False, dtype=weight.dtype, device="meta")
        layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
        layers.append(hijack.wrap_module(layer, scheme, **options))
        # codes that were not seen before are looked at for NaN, once
        layers[-1](weight.new_zeros(1, weight.shape[1]))
    yield "hijack", [layer.__call__ for layer in layers]
    ours = [block_scaled(layer) for layer in layers]
    for name, kernel in kernels("cpu").items():
        reason = kernel.refuses(ours[0], weights[0].dtype)
        yield (
            f"kernel {name}",
            reason
            or [lambda x, f=kernel.linear, w=weight: f(x, w, None) for weight in ours],
        )
    for name, (package, forms, make) in LIBRARIES.items():
        if form not in forms:
            continue
        if not is_installed(package):
            yield name, f"{package} is not installed"
            continue
        try:
            yield name, [make(weight, form) for weight in weights]
        except Exception as failure:  # another program's, whatever it is
            yield name, f"{type(failure).__name__}: {first_line(failure)}"


def error_of(run: Run, x: Tensor, weight: Tensor) -> float:
    """Relative distance from the dense product."""
    dense = F.linear(x, weight).float()
    return float((run(x).float() - dense).norm() / dense.norm())


@torch.inference_mode()
def measure(setting: Setting) -> Iterator[Row | Missing]:
    """A row for each layer, format, number of threads and of rows."""
    schemes.register_all()
    for k, n in ((256, 512),) if setting.quick else LAYERS:
        count = 2 if setting.quick else max(POOL_BYTES // (2 * n * k), 2)
        weights = [torch.randn(n, k).mul_(k**-0.5).bfloat16() for _ in range(count)]
        dense: list[Run] = [lambda x, w=w: F.linear(x, w) for w in weights]
        for form, (_, _, bound) in FORMATS.items():
            runs: dict[str, list[Run]] = {"bf16": dense}
            for name, made in make_runs(form, weights):
                if isinstance(made, str):
                    yield Missing(f"{form}, {name}", made)
                else:
                    runs[name] = made
            for threads in setting.threads:
                torch.set_num_threads(threads)
                for m in (1, 16) if setting.quick else ROWS:
                    x = torch.randn(m, k).bfloat16()
                    yield from _check(form, runs, x, weights[0], bound)
                    head = {"layer": f"{k} -> {n}", "format": form, "threads": threads}
                    yield {**head, "M": m, **_timed(runs, x, setting)}


def _check(
    form: str, runs: dict[str, list[Run]], x: Tensor, weight: Tensor, bound: float
) -> Iterator[Missing]:
    """Take out what fails or errs more than its format may."""
    for name in [name for name in runs if name != "bf16"]:
        try:
            error = error_of(runs[name][0], x, weight)
            why = f"differs by {error:.1e}" if not error < bound else None
        except Exception as failure:
            why = f"{type(failure).__name__}: {first_line(failure)}"
        if why:
            del runs[name]
            yield Missing(f"{form}, {name}", f"{why}, with {len(x)} rows")


def _timed(runs: dict[str, list[Run]], x: Tensor, setting: Setting) -> dict[str, Any]:
    calls = {
        name: lambda turn, each=each: each[turn % len(each)](x)
        for name, each in runs.items()
    }
    seconds = alternate(calls, setting.rounds_or(7), 2 if len(x) < 1024 else 1)
    bf16 = seconds.pop("bf16")
    cells: dict[str, Any] = {"bf16, ms": milliseconds(bf16)}
    return cells | {name: ratio(each, bf16) for name, each in seconds.items()}


BENCHMARK = Benchmark(
    "formats",
    "Time of a Linear over the same in bfloat16 for int8 and fp8 with a scale for each "
    "row, nvfp4 and nf4, beside layers of other libraries.",
    measure,
    "torchao, comfy-kitchen, bitsandbytes, SDNQ for their columns",
    chart=Chart("M", ("layer", "format", "threads"), "time / bfloat16"),
)
