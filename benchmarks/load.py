"""Loading a quantized file: the first call in a process, later ones, and copying it.

*Copying* is safetensors' ``load_file`` and a copy of each tensor, which is what a model
that has memory of its own does; it makes no model. Each round takes fresh processes;
the file is in the page cache, or in memory where that is a folder.
"""

from __future__ import annotations

import json
import random
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.harness import Benchmark, Missing, Row, Setting
from benchmarks.processes import Watch, in_process, place_for
from benchmarks.timing import milliseconds, ratio
from hijack.safetensors_io.header import TensorInfo
from hijack.safetensors_io.writer import open_writer

#: Layers and their shapes in turn: 2.4 GB.
LAYERS, SHAPES = 64, ((12288, 3072), (3072, 12288))
QUICK_LAYERS, QUICK_SHAPES = 4, ((512, 256), (256, 512))
COLS = 64


def shapes_of(quick: bool) -> list[tuple[int, int]]:
    """(N, K) of every layer."""
    count = QUICK_LAYERS if quick else LAYERS
    each = QUICK_SHAPES if quick else SHAPES
    return [each[index % 2] for index in range(count)]


def write_source(path: Path, shapes: list[tuple[int, int]]) -> int:
    """Write random codes and scales as musubi-tuner spells them; answer the bytes."""
    torch.manual_seed(0)
    most = max(n * k for n, k in shapes)
    codes = torch.randn(most).to(torch.float8_e4m3fn)
    scale = torch.rand(most // COLS).add(0.5).bfloat16()
    plan = {}
    for index, (n, k) in enumerate(shapes):
        plan[f"{index}.weight"] = TensorInfo("F8_E4M3", (n, k))
        plan[f"{index}.scale_weight"] = TensorInfo("BF16", (n, k // COLS, 1))
    with open_writer(path, plan) as writer:
        for key, info in plan.items():
            data = codes if info.dtype == "F8_E4M3" else scale
            writer.write(key, data[: torch.Size(info.shape).numel()].view(info.shape))
    return path.stat().st_size


def measure(setting: Setting) -> Iterator[Row | Missing]:
    """One row for each way."""
    shapes = shapes_of(setting.quick)
    size = sum(n * k for n, k in shapes)
    ways = ("hijack", "copying")
    found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
    with tempfile.TemporaryDirectory(dir=place_for(size, setting.folder)) as folder:
        source = Path(folder) / "source.safetensors"
        size = write_source(source, shapes)
        for _ in range(setting.rounds or (1 if setting.quick else 5)):
            for way in random.sample(ways, len(ways)):
                words = {"way": way, "source": str(source), "quick": setting.quick}
                found[way].append(in_process("benchmarks.load", words))
    copying = [each["first"] for each in found["copying"]]
    for name, when in (("first call in a process", "first"), ("later call", "later")):
        ours = [each[when] for each in found["hijack"]]
        anonymous = max(each[f"{when} anonymous"] for each in found["hijack"])
        yield {
            "what": f"hijack.load, {name}",
            "GB": size / 1e9,
            "ms": milliseconds(ours),
            "copying / this": ratio(copying, ours),
            "anonymous MB": anonymous / 1e6,
        }
    most = max(each["first anonymous"] for each in found["copying"]) / 1e6
    row = {"what": "copying", "GB": size / 1e9, "ms": milliseconds(copying)}
    yield {**row, "anonymous MB": most}


# -- one process -----------------------------------------------------------------------


def child(words: dict[str, Any]) -> None:
    """Load once or twice, and print what it took."""
    way, source, quick = words["way"], words["source"], words["quick"]
    run = {"hijack": load_with_hijack, "copying": copy_all}[way]
    prepare = {"hijack": prepare_hijack, "copying": prepare_copying}[way]
    prepare()
    result, keep = {}, []
    for when in ("first", "later")[: 2 if way == "hijack" else 1]:
        model = make_model(shapes_of(quick))
        watch, start = Watch(), time.perf_counter()
        keep.append(run(model, source))
        result[when] = time.perf_counter() - start
        result[f"{when} anonymous"] = watch.stop()
    print(json.dumps(result))


def prepare_hijack() -> None:
    """Import what a program that loads has imported."""
    import hijack  # noqa: F401
    import schemes.blockwise_fp8  # noqa: F401 - registers the scheme


def prepare_copying() -> None:
    """Likewise."""
    import safetensors.torch  # noqa: F401


def make_model(shapes: list[tuple[int, int]]) -> nn.Module:
    """Linears without memory."""
    layers = (
        nn.Linear(k, n, bias=False, dtype=torch.bfloat16, device="meta")
        for n, k in shapes
    )
    return nn.ModuleList(layers)


def load_with_hijack(model: nn.Module, source: str) -> Any:
    """`hijack.load` into a model without memory."""
    import hijack

    hijack.load(model, source)
    return model


def copy_all(model: nn.Module, source: str) -> Any:
    """Every tensor, copied."""
    from safetensors.torch import load_file

    return {key: tensor.clone() for key, tensor in load_file(source).items()}


BENCHMARK = Benchmark(
    "load",
    "Loading a file of FP8 weights, 2.4 GB in 64 layers, in fresh processes.",
    measure,
    "3 GB for files and as much memory",
)

if __name__ == "__main__":
    child(json.loads(sys.argv[2]))
