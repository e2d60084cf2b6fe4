"""Quantizing one weight on a GPU, beside the CPU and musubi-tuner's own quantizer.

::

    HIJACK_PEER_MUSUBI=/path/to/musubi-tuner python -m benchmarks.quantize

A bfloat16 weight of 12288 x 3072, by absmax and with a search for the scales. Times are
medians; ratios are medians of the quotients of runs that alternate in one process.
musubi-tuner's is its function ``quantize_weight``, on the GPU too.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.peers import musubi
from benchmarks.timing import alternate, machine, ratio
from schemes.blockwise_fp8 import BlockwiseFP8

SCHEME = BlockwiseFP8()
SHAPE, ROUNDS = (12288, 3072), 9
BLOCKS = ("1x64", "128x128", "row", "tensor")
MODES = {"1x64": "block", "row": "channel", "tensor": "tensor"}
COUNTS = (0, 32)
Run = Callable[[int], object]


def peer(weight: Tensor, block_size: str) -> Run | None:
    """musubi-tuner's quantizer, where it is there and has such blocks."""
    module, mode = musubi(), MODES.get(block_size)
    if module is None or mode is None:
        return None
    return lambda _: module.quantize_weight(
        "w", weight, torch.float8_e4m3fn, 448.0, -448.0, mode, 64
    )


def ours(weight: Tensor, block_size: str, count: int) -> Run:
    """hijack's, on the device of the weight."""
    return lambda _: SCHEME.quantize(weight, block_size=block_size, scale_search=count)


def main() -> None:
    """Print a Markdown table."""
    print(
        f"> {machine()}, {torch.get_num_threads()} threads\n\n| blocks | candidates | "
        "CPU, ms | GPU, ms | CPU / GPU | musubi on the GPU / hijack |\n"
        "|---|--:|--:|--:|--:|--:|"
    )
    here = torch.randn(SHAPE, generator=torch.Generator().manual_seed(0)).bfloat16()
    there = here.cuda()
    for block_size in BLOCKS:
        for count in COUNTS:
            runs = {
                "cpu": ours(here, block_size, count),
                "gpu": ours(there, block_size, count),
            }
            other = peer(there, block_size) if not count else None
            if other is not None:
                runs["musubi"] = other
            times = alternate(runs, ROUNDS)
            cpu, gpu = (statistics.median(times[n]) * 1e3 for n in ("cpu", "gpu"))
            faster = f"{ratio(times['musubi'], times['gpu']):.2f}" if other else "-"
            print(
                f"| {block_size} | {count} | {cpu:.1f} | {gpu:.2f} | "
                f"{ratio(times['cpu'], times['gpu']):.1f} | {faster} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
