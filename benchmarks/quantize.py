"""Quantizing a bfloat16 file to FP8 in blocks of 1 x 64, beside musubi-tuner.

Every row runs in fresh processes, which alternate. musubi-tuner's is its reader of
files that quantizes, ``load_safetensors_with_fp8_optimization``, and safetensors'
``save_file``. *Reading and writing* moves the same bytes and computes nothing. Files
are in memory where that is a folder; imports are not counted, and each process
quantizes a small file before.
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

from benchmarks.harness import Benchmark, Missing, Row, Setting
from benchmarks.peers import musubi, no_musubi
from benchmarks.processes import Watch, in_process, place_for, status
from benchmarks.timing import ratio, spread
from hijack.safetensors_io.header import TensorInfo
from hijack.safetensors_io.writer import open_writer, write_checkpoint

#: Blocks of a Qwen-Image's MLPs, four weights each: 1.8 GB.
BLOCKS, SHAPES = 6, ((12288, 3072), (3072, 12288))
QUICK_BLOCKS, QUICK_SHAPES = 1, ((512, 256), (256, 512))
PIECE = 8 << 20
HIJACK, MUSUBI, FLOOR = "hijack", "musubi-tuner", "reading and writing"


def write_source(
    path: Path, blocks: int, shapes: tuple[tuple[int, int], ...] = SHAPES
) -> int:
    """Write a checkpoint, and a small one beside it; answer its bytes."""
    torch.manual_seed(0)
    plan = {}
    for block in range(blocks):
        for part in ("img", "txt"):
            for at, shape in zip((0, 2), shapes, strict=True):
                name = f"transformer_blocks.{block}.{part}_mlp.net.{at}"
                ending = ".proj.weight" if at == 0 else ".weight"
                plan[name + ending] = TensorInfo("BF16", shape)
    data = torch.randn(max(n * k for n, k in shapes)).bfloat16()
    with open_writer(path, plan) as writer:
        for key, info in plan.items():
            writer.write(key, data[: torch.Size(info.shape).numel()].view(info.shape))
    small = {"transformer_blocks.0.a.weight": torch.randn(256, 256).bfloat16()}
    write_checkpoint(path.with_name("small.safetensors"), small)
    return path.stat().st_size


def programs(setting: Setting) -> Iterator[dict[str, Any]]:
    """What is measured: program, threads, and options of hijack's."""
    for threads in setting.threads:
        yield {"program": MUSUBI, "threads": threads}
        yield {"program": HIJACK, "threads": threads}
        yield {"program": HIJACK, "threads": threads, "scale_search": 32}
    threads = max(setting.threads)
    row = {"program": HIJACK, "threads": threads, "block_size": "128x128"}
    yield {**row, "dialect": "deepseek"}
    yield {"program": FLOOR, "threads": 1}


def measure(setting: Setting) -> Iterator[Row | Missing]:
    """A row for each program, after all rounds."""
    blocks, shapes = BLOCKS, SHAPES
    if setting.quick:
        blocks, shapes = QUICK_BLOCKS, QUICK_SHAPES
    count = 4 * blocks * shapes[0][0] * shapes[0][1] * 2
    why, chosen = no_musubi(), list(programs(setting))
    if why is not None:
        yield Missing(MUSUBI, why)
        chosen = [words for words in chosen if words["program"] != MUSUBI]
    found: list[list[dict[str, float]]] = [[] for _ in chosen]
    with tempfile.TemporaryDirectory(dir=place_for(count, setting.folder)) as folder:
        source = Path(folder) / "source.safetensors"
        size = write_source(source, blocks, shapes)
        order = list(range(len(chosen)))
        for _ in range(setting.rounds or (1 if setting.quick else 5)):
            random.shuffle(order)
            for index in order:
                words = {**chosen[index], "source": str(source)}
                found[index].append(in_process("benchmarks.quantize", words))
    yield from rows_of(chosen, found, size)


def rows_of(
    chosen: list[dict[str, Any]], found: list[list[dict[str, float]]], size: int
) -> Iterator[Row]:
    """The rows; ratios are to musubi-tuner with as many threads."""
    seconds = [[each["seconds"] for each in rounds] for rounds in found]
    peers = {
        words["threads"]: each
        for words, each in zip(chosen, seconds, strict=True)
        if words["program"] == MUSUBI
    }
    for words, each, rounds in zip(chosen, seconds, found, strict=True):
        row: dict[str, Any] = {
            "program": words["program"],
            "threads": words["threads"],
            "blocks": ""
            if words["program"] == FLOOR
            else words.get("block_size", "1x64"),
            "candidates": words.get("scale_search", 0),
            "seconds": spread(each),
            "GB/s": spread([size / 1e9 / s for s in each]),
        }
        if words["threads"] in peers:
            row["musubi-tuner / this"] = ratio(peers[words["threads"]], each)
        row["anonymous MB"] = max(each["anonymous"] for each in rounds) / 1e6
        yield row


# -- one process -----------------------------------------------------------------------


def child(words: dict[str, Any]) -> None:
    """Do it once, and print what it took."""
    source, program = Path(words.pop("source")), words.pop("program")
    threads, small = words.pop("threads"), source.with_name("small.safetensors")
    result = source.with_name("result.safetensors")
    run = {HIJACK: run_hijack, MUSUBI: run_musubi, FLOOR: run_floor}[program]
    run(small, result, threads, words)
    remove(result)
    resident = reset_peak()
    watch, start = Watch(), time.perf_counter()
    run(source, result, threads, words)
    seconds = time.perf_counter() - start
    anonymous, peak = watch.stop(), status().get("VmHWM", 0) - resident
    remove(result)
    print(json.dumps({"seconds": seconds, "anonymous": anonymous, "peak": peak}))


def remove(result: Path) -> None:
    """Take away what a run wrote, also if it is several files."""
    for path in result.parent.glob(f"{result.stem}*"):
        path.unlink()


def reset_peak() -> int:
    """Let the peak of resident memory count from here, and say what there is now."""
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        clear.write_text("5")
    return status().get("VmRSS", 0)


def run_hijack(source: Path, result: Path, threads: int, words: dict[str, Any]) -> None:
    """`hijack.quantize_file` with as many workers."""
    import hijack
    import schemes.blockwise_fp8  # noqa: F401 - registers the scheme

    hijack.quantize_file(source, result, workers=threads, **words)


def run_musubi(source: Path, result: Path, threads: int, words: dict[str, Any]) -> None:
    """musubi-tuner's reader that quantizes, and what it gives saved."""
    from safetensors.torch import save_file

    peer = musubi()
    if peer is None:
        raise SystemExit(no_musubi())
    torch.set_num_threads(threads)
    tensors = peer.load_safetensors_with_fp8_optimization(
        [str(source)], "cpu", quantization_mode="block", block_size=64
    )
    save_file(tensors, result)


def run_floor(source: Path, result: Path, threads: int, words: dict[str, Any]) -> None:
    """Read everything, and write half as much."""
    buffer = memoryview(bytearray(PIECE))
    with source.open("rb", buffering=0) as file, result.open("wb", buffering=0) as out:
        while count := file.readinto(buffer):
            out.write(buffer[: count // 2])


BENCHMARK = Benchmark(
    "quantize",
    "Quantizing a bfloat16 file of 1.8 GB to FP8, in fresh processes.",
    measure,
    "musubi-tuner for the ratios, and 4 GB for files",
)

if __name__ == "__main__":
    child(json.loads(sys.argv[2]))
