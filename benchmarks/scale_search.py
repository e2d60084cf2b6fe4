"""What the search for scales costs, and what it gains.

::

    python -m benchmarks.scale_search

For each block size: time of quantizing a 3072 x 3072 bfloat16 weight by absmax, with
the search, and with the same search written plainly (a cast to FP8 for each candidate);
and the signal-to-noise ratio of each, for normal and for Laplace weights.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from benchmarks.timing import alternate, machine, ratio
from schemes.blockwise_fp8 import BlockwiseFP8

SCHEME = BlockwiseFP8()
SIZE, ROUNDS = 3072, 5
BLOCKS = {"1x64": (1, 64), "1x128": (1, 128), "128x128": (128, 128), "row": (1, SIZE)}
COUNTS = (8, 16, 32)


def plain_search(weight: Tensor, block: tuple[int, int], candidates: int) -> Tensor:
    """The scales a direct implementation finds, (N/R, K/C)."""
    (n, k), (rows, cols) = weight.shape, block
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


def decibel(weight: Tensor, block: tuple[int, int], candidates: int) -> float:
    """Signal-to-noise ratio of a weight that is quantized."""
    options = {"block_size": block, "scale_search": candidates}
    quantized = SCHEME.quantize(weight, scale_dtype=torch.float32, **options)
    wide = weight.double()
    noise = SCHEME.dequantize(*quantized, torch.float32).double() - wide
    return float(10 * torch.log10(wide.square().sum() / noise.square().sum()))


def main() -> None:
    """Print two tables."""
    print(machine(), file=sys.stderr)
    normal = torch.randn(SIZE, SIZE).mul_(0.02).bfloat16()
    laplace = torch.distributions.Laplace(0.0, 0.02).sample((SIZE, SIZE)).bfloat16()
    print("| blocks | candidates | search / absmax | plain search / search |")
    print("|---|---:|---:|---:|")
    for name, block in BLOCKS.items():
        for count in COUNTS:
            seconds = alternate(
                {
                    "absmax": lambda _, b=block: SCHEME.quantize(normal, block_size=b),
                    "search": lambda _, b=block, c=count: SCHEME.quantize(
                        normal, block_size=b, scale_search=c
                    ),
                    "plain": lambda _, b=block, c=count: plain_search(normal, b, c),
                },
                ROUNDS,
            )
            cost = ratio(seconds["search"], seconds["absmax"])
            gain = ratio(seconds["plain"], seconds["search"])
            print(f"| {name} | {count} | {cost:.1f} | {gain:.2f} |", flush=True)
    print("\n| blocks | candidates | normal, dB | Laplace, dB |")
    print("|---|---:|---:|---:|")
    for name, block in BLOCKS.items():
        for count in (0, *COUNTS):
            found = [decibel(weight, block, count) for weight in (normal, laplace)]
            print(f"| {name} | {count} | {found[0]:.2f} | {found[1]:.2f} |")


if __name__ == "__main__":
    main()
