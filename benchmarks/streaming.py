"""How much memory quantizing a checkpoint of 4 GB takes.

    python -m benchmarks.streaming [FOLDER]

Writes a bfloat16 checkpoint of 14 blocks of a Qwen-Image's shapes, whose largest tensor
is 75 MB, and quantizes it in a fresh process for each row of the table. What is counted
is `VmHWM`, the most memory the process ever had resident, whatever kind of memory it
was, less what it had when everything was imported and one small file quantized. Beside
it stands the largest `RssAnon` seen, every 5 ms, less the same: memory that no file
backs. hijack reads and writes its files without mapping them, so both tell the same.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import machine
from hijack.safetensors_io.header import TensorInfo
from hijack.safetensors_io.writer import open_writer, write_checkpoint

BLOCKS = 14
WIDTH, HIDDEN = 3072, 12288
GOAL = 400e6
ROWS: dict[str, dict[str, Any]] = {
    "one thread for each core": {},
    "1 thread": {"workers": 1},
    "8 threads": {"workers": 8},
    "blocks of 128 x 128": {"block_size": [128, 128], "dialect": "deepseek"},
    "shards of 1 GB": {"max_shard_size": "1GB"},
}


def main(folder: str | None = None) -> None:
    """Print the table."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name)
        write_source(place)
        size = (place / "source.safetensors").stat().st_size
        print(f"> {machine()}\n\n{size / 1e9:.2f} GB, largest tensor 75.5 MB\n")
        print("| | VmHWM, MB | RssAnon, MB | seconds |\n|---|---:|---:|---:|")
        for row, words in ROWS.items():
            result = measure(place, words)
            cells = [f"{result[key] / 1e6:.0f}" for key in ("peak", "anonymous")]
            print(f"| {row} | {' | '.join(cells)} | {result['seconds']:.0f} |")
            if result["peak"] > GOAL:
                raise SystemExit(f"{row}: more than {GOAL / 1e6:.0f} MB")


def measure(place: Path, words: dict[str, Any]) -> dict[str, float]:
    """Memory and time of one run, in a process of its own."""
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "benchmarks.streaming",
            "--child",
            place,
            json.dumps(words),
        ],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    for path in place.glob("result*"):
        path.unlink()
    result: dict[str, float] = json.loads(done.stdout)
    return result


# -- the checkpoint --------------------------------------------------------------------


def shapes() -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of every tensor."""
    for block in range(BLOCKS):
        start = f"transformer_blocks.{block}"
        for part in ("img", "txt"):
            yield f"{start}.{part}_mlp.net.0.proj.weight", (HIDDEN, WIDTH)
            yield f"{start}.{part}_mlp.net.2.weight", (WIDTH, HIDDEN)
        yield f"{start}.attn.norm_q.weight", (128,)


def write_source(place: Path) -> None:
    """The checkpoint, and a small one like it."""
    torch.manual_seed(0)
    data = torch.randn(WIDTH * HIDDEN).bfloat16()
    plan = {key: TensorInfo("BF16", shape) for key, shape in shapes()}
    with open_writer(place / "source.safetensors", plan) as writer:
        for key, shape in shapes():
            writer.write(key, data[: torch.Size(shape).numel()].view(shape))
    small = {"transformer_blocks.0.a.weight": torch.randn(256, 256).bfloat16()}
    write_checkpoint(place / "small.safetensors", small)


# -- one process -----------------------------------------------------------------------


def child(place: Path, words: dict[str, Any]) -> None:
    """Quantize, and print what it took."""
    import hijack
    import schemes.blockwise_fp8  # noqa: F401 - registers the scheme

    if isinstance(words.get("block_size"), list):
        words["block_size"] = tuple(words["block_size"])
    hijack.quantize_file(place / "small.safetensors", place / "result-small", **words)
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before, watch = status(), Watch()
    start = time.perf_counter()
    hijack.quantize_file(place / "source.safetensors", place / "result", **words)
    seconds = time.perf_counter() - start
    result = {
        "peak": status()["VmHWM"] - before["VmRSS"],
        "anonymous": watch.stop() - before["RssAnon"],
        "seconds": seconds,
    }
    print(json.dumps(result))


def status() -> dict[str, int]:
    """What the system says of this process's memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    pairs = (line.split() for line in lines if line.endswith(" kB"))
    return {name.rstrip(":"): int(size) * 1024 for name, size, _ in pairs}


class Watch:
    """The most anonymous memory there was, as far as is seen every 5 ms."""

    def __init__(self) -> None:
        self.most = 0
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._look)
        self._thread.start()

    def _look(self) -> None:
        while not self._done.wait(0.005):
            self.most = max(self.most, status()["RssAnon"])

    def stop(self) -> int:
        """End, and say how much it was."""
        self._done.set()
        self._thread.join()
        return self.most


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(Path(sys.argv[2]), json.loads(sys.argv[3]))
    else:
        main(*sys.argv[1:])
