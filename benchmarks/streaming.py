"""How much memory quantizing a checkpoint of 4 GB takes.

Writes a bfloat16 checkpoint of 14 blocks of a Qwen-Image's MLPs, whose tensors are 75
MB each, and quantizes it in a fresh process for each row. What is counted is `VmHWM`,
the most memory the process ever had resident, whatever kind of memory it was, less what
it had when everything was imported and one small file quantized. Beside it stands the
most anonymous memory, which no file backs. hijack reads and writes its files without
mapping them, so both tell the same. Files are in the system's temporary folder.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.harness import Benchmark, Missing, Row, Setting
from benchmarks.processes import in_process
from benchmarks.quantize import (
    HIJACK,
    QUICK_BLOCKS,
    QUICK_SHAPES,
    SHAPES,
    write_source,
)

BLOCKS = 14
#: Title to the options of each row.
CASES: dict[str, dict[str, Any]] = {
    "one thread for each core": {"threads": None},
    "1 thread": {"threads": 1},
    "8 threads": {"threads": 8},
    "blocks of 128 x 128": {
        **{"threads": None, "block_size": "128x128"},
        "dialect": "deepseek",
    },
    "shards of 1 GB": {"threads": None, "max_shard_size": "1GB"},
}


def measure(setting: Setting) -> Iterator[Row | Missing]:
    """A row for each case."""
    blocks, shapes = BLOCKS, SHAPES
    if setting.quick:
        blocks, shapes = QUICK_BLOCKS, QUICK_SHAPES
    with tempfile.TemporaryDirectory(dir=setting.folder) as folder:
        source = Path(folder) / "source.safetensors"
        size = write_source(source, blocks, shapes) / 1e9
        for title, options in list(CASES.items())[: 2 if setting.quick else None]:
            words = {"program": HIJACK, "source": str(source), **options}
            found = in_process("benchmarks.quantize", words)
            peak, anonymous = found["peak"] / 1e6, found["anonymous"] / 1e6
            row = {"GB": size, "VmHWM, MB": peak, "anonymous, MB": anonymous}
            yield {"what": title, **row, "seconds": found["seconds"]}


BENCHMARK = Benchmark(
    "streaming",
    "Memory that quantizing 4.2 GB takes.",
    measure,
    "10 GB for files, and Linux",
)
