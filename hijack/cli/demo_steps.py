"""``hijack demo``: quantize a small transformer, load it back, show the error.

Needs no file and no network. The model is random, but its weights have what makes real
ones hard to quantize: heavy tails, and a few input channels far larger than the others.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hijack
from hijack.cli.progress import progress_bar
from hijack.metrics import sqnr_db
from hijack.modules import Wrapped, dense_weight
from hijack.safetensors_io.writer import write_checkpoint
from hijack.text import table

WIDTH, HEADS, BLOCKS, TOKENS = 512, 8, 3, 64
#: Name in table and picture, and options of ``quantize_file``.
FORMATS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("per tensor", {"block_size": "tensor"}),
    ("per row", {"block_size": "row"}),
    ("128x128", {"block_size": (128, 128), "dialect": "hijack"}),
    ("1x64", {"block_size": (1, 64)}),
)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Mix tokens, then channels: (B, T, C) to (B, T, C)."""
        q, k, v = self.qkv(self.norm1(x)).chunk(3, -1)
        split = [t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q, k, v)]
        mixed = F.scaled_dot_product_attention(*split)
        x = x + self.out(mixed.transpose(1, 2).flatten(2))
        result: Tensor = x + self.down(F.gelu(self.up(self.norm2(x))))
        return result


def make_model(seed: int = 0) -> nn.Sequential:
    """A small bfloat16 transformer whose weights have realistic outliers."""
    torch.manual_seed(seed)
    model = nn.Sequential(*(Block(WIDTH, HEADS) for _ in range(BLOCKS)))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            _spread(module.weight)
    return model.to(torch.bfloat16).requires_grad_(False)


@torch.no_grad()
def _spread(weight: Tensor) -> None:
    """Fill with a Student t of 4 degrees of freedom, 1 % of the columns 8 x larger."""
    tails = torch.distributions.StudentT(4.0).sample(weight.shape)
    columns = torch.rand(weight.shape[1]) < 0.01
    weight.copy_(tails * (1 + 7 * columns) / math.sqrt(2 * weight.shape[1]))


@dataclasses.dataclass(frozen=True)
class Row:
    """One layer in one format: signal to noise of its weight and of its output."""

    layer: str
    weight_db: float
    output_db: float
    bytes: int


def run_demo(folder: Path) -> None:
    """Make the model, quantize its file in every format, and print what it costs.

    Args:
        folder: where the checkpoints and the picture go; created if missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    model = make_model()
    x = torch.randn(1, TOKENS, WIDTH, dtype=torch.bfloat16)
    source = folder / "model-bf16.safetensors"
    write_checkpoint(source, model.state_dict())
    print(f"a transformer of {BLOCKS} blocks, width {WIDTH}, bfloat16: {source}")
    results: dict[str, list[Row]] = {}
    summary = [["bfloat16", _megabytes(source), "-", "-"]]
    for name, options in FORMATS:
        path = folder / f"model-{name.replace(' ', '-')}.safetensors"
        with progress_bar(name) as progress:
            hijack.quantize_file(source, path, progress=progress, **options)
        with torch.device("meta"):
            loaded = nn.Sequential(*(Block(WIDTH, HEADS) for _ in range(BLOCKS)))
        hijack.load(loaded, path)
        results[name] = compare(model, loaded, x)
        mean = sum(row.weight_db for row in results[name]) / len(results[name])
        whole = sqnr_db(model(x), loaded(x))
        summary.append([name, _megabytes(path), f"{mean:.2f}", f"{whole:.2f}"])
    print()
    print(_layer_table(results))
    print()
    print(
        table(["format", "MB", "mean weight SQNR dB", "model output SQNR dB"], summary)
    )
    picture = _plot(results, folder / "error-per-layer.png")
    print(
        f"\npicture: {picture}" if picture else "\nno picture: matplotlib is not there"
    )


@torch.no_grad()
def compare(dense: nn.Module, quantized: nn.Module, x: Tensor) -> list[Row]:
    """Compare each wrapped layer with its dense twin, on the dense model's inputs.

    Args:
        dense: the original.
        quantized: the same model with wrapped layers.
        x: (B, T, C) input of both.
    """
    inputs: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, name=name: inputs.__setitem__(name, args[0])
        )
        for name, module in dense.named_modules()
    ]
    dense(x)
    for hook in hooks:
        hook.remove()
    originals = dict(dense.named_modules())
    rows = []
    for name, module in quantized.named_modules():
        if isinstance(module, Wrapped):
            twin = originals[name]
            weight = twin.get_parameter("weight")
            size = sum(t.numel() * t.element_size() for t in _own_tensors(module))
            rows.append(
                Row(
                    name,
                    sqnr_db(weight, dense_weight(module, torch.float32)),
                    sqnr_db(twin(inputs[name]), module(inputs[name])),
                    size,
                )
            )
    return rows


def _own_tensors(module: Wrapped) -> list[Tensor]:
    weight: Any = module.weight
    return list(weight.plain_tensors().values())


def _megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.2f}"


def _layer_table(results: dict[str, list[Row]]) -> str:
    names = list(results)
    head = ["layer", *(f"{name} dB" for name in names), f"{names[-1]} output dB"]
    rows = [
        [
            row.layer,
            *(f"{results[name][i].weight_db:.2f}" for name in names),
            f"{row.output_db:.2f}",
        ]
        for i, row in enumerate(results[names[-1]])
    ]
    return table(head, rows)


def _plot(results: dict[str, list[Row]], path: Path) -> Path | None:
    """Draw weight SQNR of every layer in every format; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 4.5), layout="constrained")
    # Okabe and Ito's colours are told apart by colour-blind readers too
    styles = zip("osD^", ("#0072B2", "#E69F00", "#009E73", "#CC79A7"), strict=True)
    for (name, rows), (marker, colour) in zip(results.items(), styles, strict=True):
        values = [row.weight_db for row in rows]
        axes.plot(values, marker=marker, color=colour, label=name, linewidth=1.2)
    layers = [row.layer for row in next(iter(results.values()))]
    axes.set_xticks(range(len(layers)), layers, rotation=45, ha="right")
    axes.set_xlabel("layer")
    axes.set_ylabel("weight SQNR (dB), higher is better")
    axes.set_title("FP8 e4m3 against the bfloat16 weight, by scale block")
    axes.grid(axis="y", alpha=0.3)
    figure.legend(title="block", loc="outside right upper")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
    return path
