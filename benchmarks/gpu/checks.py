"""What must be right on a GPU."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu.subjects import LAYERS, make_layer
from benchmarks.harness import Benchmark, Missing, Row, Setting, first_line
from benchmarks.kernels import KINDS, kernels, plain_decode, random_weight

ROOT = Path(__file__).resolve().parents[2]
#: Whole blocks, and ragged ones.
SHAPES = ((256, 512), (300, 520))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
#: Relative error of a product of decoded weights, and of one whose inputs are
#: quantized.
BOUND, QUANTIZED_BOUND = 1e-2, 6e-2


def needs_cuda(setting: Setting) -> str | None:
    """Why a check of CUDA cannot run, or None."""
    if setting.device == "cpu":
        return "it needs a GPU; this is a rehearsal"
    return None if torch.cuda.is_available() else "torch.cuda.is_available() is False"


def usable(setting: Setting) -> str | None:
    """Why nothing can run on the device, or None."""
    return None if setting.device == "cpu" else needs_cuda(setting)


def outcome(check: Callable[[], str]) -> str:
    """``ok``, or what is wrong."""
    try:
        return check() or "ok"
    except Exception as failure:  # the next check must run
        return f"{type(failure).__name__}: {first_line(failure)}"


def same(actual: Tensor, expected: Tensor) -> str:
    """What differs in two tensors, bit for bit; empty if nothing does."""
    if actual.shape != expected.shape or actual.dtype != expected.dtype:
        return f"is {actual.dtype} {tuple(actual.shape)}"
    bits = torch.int32 if actual.element_size() == 4 else torch.int16
    wrong = int((actual.view(bits) != expected.view(bits)).sum())
    return f"{wrong} of {actual.numel()} differ" if wrong else ""


def near(actual: Tensor, expected: Tensor, bound: float) -> str:
    """How far two tensors are apart; empty if within the bound."""
    wide = expected.float()
    error = float((actual.float() - wide).norm() / wide.norm())
    return "" if error < bound else f"differs by {error:.1e}, allowed {bound:.0e}"


# -- steps -----------------------------------------------------------------------------


def environment(setting: Setting) -> Iterator[Row | Missing]:
    """What there is."""
    if setting.device != "cpu":
        properties = torch.cuda.get_device_properties(0)
        capability = ".".join(map(str, torch.cuda.get_device_capability()))
        yield {"what": "device", "is": properties.name}
        yield {"what": "compute capability", "is": capability}
        yield {"what": "memory", "is": f"{properties.total_memory / 1e9:.0f} GB"}
        yield {"what": "CUDA of torch", "is": str(torch.version.cuda)}
    yield {"what": "kernels", "is": ", ".join(kernels(setting.device)) or "none"}


def each_kernel(
    setting: Setting, dtype: torch.dtype
) -> Iterator[tuple[str, Any, str] | Missing]:
    """Name, kernel and kind of weight, of all that go together."""
    found = kernels(setting.device)
    if not found:
        yield Missing("kernels", "there are none")
    refused: dict[tuple[str, str], list[str]] = {}
    for kind in KINDS:
        weight = random_weight(kind, *SHAPES[0], setting.device)
        for name, kernel in found.items():
            why = kernel.refuses(weight, dtype)
            if why is None:
                yield name, kernel, kind
            else:
                refused.setdefault((name, why), []).append(kind)
    for (name, why), kinds in refused.items():
        yield Missing(f"{name}, {str(dtype)[6:]}, {'; '.join(kinds)}", why)


def decode(setting: Setting) -> Iterator[Row | Missing]:
    """Decoded weights are those of the formula, bit for bit."""
    for dtype in DTYPES:
        for each in each_kernel(setting, dtype):
            if isinstance(each, Missing):
                yield each
                continue
            name, kernel, kind = each
            if kernel.decode is None:
                continue

            def check(m: Any = kernel, k: str = kind, d: torch.dtype = dtype) -> str:
                return "; ".join(filter(None, _decoded(m, k, d, setting.device)))

            row = {"kernel": name, "weight": kind, "dtype": str(dtype)[6:]}
            yield {**row, "result": outcome(check)}


def _decoded(kernel: Any, kind: str, dtype: torch.dtype, device: str) -> Iterator[str]:
    for n, k in SHAPES:
        weight = random_weight(kind, n, k, device)
        expected = plain_decode(weight, dtype)
        out = torch.empty((n, k), dtype=dtype, device=device)
        kernel.decode(weight, out)
        yield same(out, expected)


def linear(setting: Setting) -> Iterator[Row | Missing]:
    """Products are those of the formula's weight, within rounding."""
    dtype = torch.bfloat16
    for each in each_kernel(setting, dtype):
        if isinstance(each, Missing):
            yield each
            continue
        name, kernel, kind = each
        bound = QUANTIZED_BOUND if kernel.opt_in else BOUND

        def check(m: Any = kernel, k: str = kind, b: float = bound) -> str:
            return "; ".join(filter(None, _multiplied(m, k, dtype, b, setting.device)))

        yield {"kernel": name, "weight": kind, "result": outcome(check)}


def _multiplied(
    kernel: Any, kind: str, dtype: torch.dtype, bound: float, device: str
) -> Iterator[str]:
    for n, k in SHAPES:
        weight = random_weight(kind, n, k, device)
        dense = plain_decode(weight, torch.float32)
        bias = torch.randn(n, device=device).to(dtype)
        for m in (1, 5, 16, 33, 64, 300):
            x = torch.randn(m, k, device=device).to(dtype)
            for added in (None, bias):
                expected = x.float() @ dense.t()
                if added is not None:
                    expected = expected + added.float()
                problem = near(kernel.linear(x, weight, added), expected, bound)
                yield f"{n}x{k}, M = {m}: {problem}" if problem else ""


def shape_of(setting: Setting) -> tuple[int, int]:
    """(N, K) of the layers that are checked."""
    return (512, 256) if setting.quick else (3072, 3072)


def no_sync(setting: Setting) -> Iterator[Row | Missing]:
    """No forward waits for the device."""
    for title, m, layer, x in each_layer(setting):

        def check(layer: Any = layer, x: Tensor = x) -> str:
            layer(x)
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
            try:
                layer(x)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            return ""

        yield {"layer": title, "M": m, "result": outcome(check)}


def graphs(setting: Setting) -> Iterator[Row | Missing]:
    """A captured forward, replayed with another input, gives what it gives eagerly."""
    for title, m, layer, x in each_layer(setting):

        def check(layer: Any = layer, x: Tensor = x) -> str:
            fixed = x.clone()
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(3):
                    layer(fixed)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                result = layer(fixed)
            fixed.copy_(torch.randn_like(x))
            graph.replay()
            torch.cuda.synchronize()
            return near(result, layer(fixed), 1e-3)

        yield {"layer": title, "M": m, "result": outcome(check)}


def streams(setting: Setting) -> Iterator[Row | Missing]:
    """Layers that run on two streams at once do not meet in a buffer."""
    n, k = shape_of(setting)
    for title in LAYERS:

        def check(title: str = title) -> str:
            layers = [make_layer(title, n, k, setting.device) for _ in range(2)]
            x = torch.randn(256, k, dtype=torch.bfloat16, device=setting.device)
            alone = [layer(x).clone() for layer in layers]
            torch.cuda.synchronize()
            lanes = [torch.cuda.Stream() for _ in layers]
            results: list[list[Tensor]] = [[], []]
            for _ in range(20):
                for lane, layer, kept in zip(lanes, layers, results, strict=True):
                    with torch.cuda.stream(lane):
                        kept.append(layer(x))
            torch.cuda.synchronize()
            problems = (
                near(result, expected, 1e-3)
                for kept, expected in zip(results, alone, strict=True)
                for result in kept
            )
            return next(filter(None, problems), "")

        yield {"layer": title, "result": outcome(check)}


def each_layer(setting: Setting) -> Iterator[tuple[str, int, Any, Tensor]]:
    """Title, rows, a layer, and an input of so many rows."""
    n, k = shape_of(setting)
    for title in LAYERS:
        layer = make_layer(title, n, k, setting.device)
        for m in (1, 16, 64, 1024):
            x = torch.randn(m, k, dtype=torch.bfloat16, device=setting.device)
            yield title, m, layer, x


def tests(setting: Setting) -> Iterator[Row | Missing]:
    """tests/test_cuda.py, and those of the kernels, with pytest."""
    if importlib.util.find_spec("pytest") is None:
        yield Missing("tests/test_cuda.py", "pytest is not installed")
        return
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, "tests/test_cuda.py"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    lines = done.stdout.strip().splitlines() or done.stderr.strip().splitlines()
    for line in lines:
        if line.startswith(("FAILED", "ERROR")):
            yield {"test": line[:200], "result": "failed"}
    last = lines[-1] if lines else f"ended with {done.returncode}"
    yield {"test": last, "result": "ok" if done.returncode in (0, 5) else "failed"}


@torch.inference_mode()
def _inferring(
    measure: Callable[[Setting], Iterator[Row | Missing]], setting: Setting
) -> Iterator[Row | Missing]:
    yield from measure(setting)


def inferring(
    measure: Callable[[Setting], Iterator[Row | Missing]],
) -> Callable[[Setting], Iterator[Row | Missing]]:
    """The same in inference mode."""
    return lambda setting: _inferring(measure, setting)


ENVIRONMENT = Benchmark(
    "environment", "Where it ran.", environment, refuses=usable, budget=30
)
DECODE = Benchmark(
    "decode",
    "Every kernel's decoded weights beside the formula's, bit for bit.",
    inferring(decode),
    refuses=usable,
    budget=75,
)
LINEAR = Benchmark(
    "linear",
    "Every kernel's products beside those of the formula's weight.",
    inferring(linear),
    refuses=usable,
    budget=90,
)
NO_SYNC = Benchmark(
    "no_sync",
    "Forwards under torch.cuda.set_sync_debug_mode('error').",
    inferring(no_sync),
    refuses=needs_cuda,
    budget=30,
)
GRAPHS = Benchmark(
    "graphs",
    "Forwards captured in a CUDA graph and replayed.",
    inferring(graphs),
    refuses=needs_cuda,
    budget=30,
)
STREAMS = Benchmark(
    "streams",
    "Forwards on two streams at once.",
    inferring(streams),
    refuses=needs_cuda,
    budget=20,
)
TESTS = Benchmark(
    "tests", "tests/test_cuda.py.", tests, "pytest", needs_cuda, budget=90
)
