"""How long it takes to find out what a file of 50 GB is, once its header is read.

Writes sparse files of 50 GB, of a diffusion model's layers and of a mixture of experts'
many small ones, in several spellings. Reading and checking the header, identifying,
and the least any reader does, `json.loads` of the same header, are timed in turn.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import schemes.blockwise_fp8  # noqa: F401 - registers the scheme
from benchmarks.harness import Benchmark, Missing, Row, Setting
from benchmarks.timing import alternate, milliseconds, ratio
from hijack.errors import HijackError
from hijack.formats.identification import identify
from hijack.safetensors_io.header import bytes_of
from hijack.safetensors_io.reader import read_header

ROUNDS = 7
#: Name to number of layers and shape of their weights; 50 GB each.
MODELS = {"diffusion": (1350, (12288, 3072)), "experts": (18000, (2048, 1408))}
#: Spelling to the tensors beside an (N, K) weight: last part, dtype, shape.
Parts = list[tuple[str, str, tuple[int, ...]]]
MARKER = b'{"format": "float8_e4m3fn"}'
SPELLINGS = ("dense", "musubi", "deepseek", "comfy_quant", "compressed_tensors")
CONFIGS = {
    "deepseek": {"quant_method": "fp8", "weight_block_size": [128, 128]},
    "compressed_tensors": {
        "quant_method": "compressed-tensors",
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": {"num_bits": 8, "type": "float", "strategy": "channel"},
            }
        },
    },
}


def parts(spelling: str, n: int, k: int) -> Parts:
    """The tensors of a layer."""
    weight = ("weight", "BF16" if spelling == "dense" else "F8_E4M3", (n, k))
    scales: dict[str, Parts] = {
        "dense": [("bias", "BF16", (n,))],
        "musubi": [("scale_weight", "BF16", (n, k // 64, 1))],
        "deepseek": [("weight_scale_inv", "F32", (-(-n // 128), -(-k // 128)))],
        "comfy_quant": [
            ("weight_scale", "F32", ()),
            ("comfy_quant", "U8", (len(MARKER),)),
        ],
        "compressed_tensors": [("weight_scale", "BF16", (n, 1))],
    }
    return [weight, *scales[spelling]]


def write(folder: Path, spelling: str, model: str) -> Path:
    """A file that is all header; its tensors are holes, but for the markers."""
    layers, (n, k) = MODELS[model]
    if spelling == "dense":
        layers //= 2
    header: dict[str, object] = {}
    at, markers = 0, []
    for layer in range(layers):
        name = f"transformer_blocks.{layer // 20}.mlp.experts.{layer % 20}.proj"
        for part, dtype, shape in parts(spelling, n, k):
            size = bytes_of(dtype, shape) or 0
            info = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
            header[f"{name}.{part}"] = info
            if part == "comfy_quant":
                markers.append(at)
            at += size
    text = json.dumps(header).encode()
    path = folder / spelling / f"{model}.safetensors"
    path.parent.mkdir(exist_ok=True)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for begin in markers:
            file.seek(8 + len(text) + begin)
            file.write(MARKER)
        file.truncate(8 + len(text) + at)
    if spelling in CONFIGS:
        config = {"quantization_config": CONFIGS[spelling]}
        (path.parent / "config.json").write_text(json.dumps(config))
    return path


def parse(path: Path) -> None:
    """The header as JSON, and nothing more."""
    with path.open("rb") as file:
        json.loads(file.read(int.from_bytes(file.read(8), "little")))


def measure_file(path: Path, rounds: int) -> dict[str, Any]:
    """The cells of one file."""
    header = read_header(path)
    fresh = [dataclasses.replace(header) for _ in range(rounds + 1)]  # nothing cached
    gc.collect()
    seconds = alternate(
        {
            "header": lambda _: read_header(path),
            "identify": lambda turn: identify(fresh[turn]),
            "json": lambda _: parse(path),
        },
        rounds,
    )
    return {
        "tensors": len(header.tensors),
        **{f"{name}, ms": milliseconds(each) for name, each in seconds.items()},
        "identify / json": ratio(seconds["identify"], seconds["json"]),
        "claimed": len(identify(header).layers),
    }


def measure(setting: Setting) -> Iterator[Row | Missing]:
    """A row for each model in each spelling."""
    for model in list(MODELS)[: 1 if setting.quick else None]:
        for spelling in SPELLINGS:
            with tempfile.TemporaryDirectory(dir=setting.folder) as name:
                path = write(Path(name), spelling, model)
                try:
                    cells = measure_file(path, setting.rounds_or(ROUNDS))
                except HijackError as error:
                    why = str(error).replace(f"{path}", "the file")
                    yield Missing(f"{model}, {spelling}", why)
                    continue
            yield {"layers of": model, "spelling": spelling, **cells}


BENCHMARK = Benchmark(
    "identify",
    "Finding out what a file of 50 GB is, once its header is read; *json* is parsing "
    "that header and nothing more.",
    measure,
    "a file system with sparse files",
)
