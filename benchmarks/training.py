"""A training step of LoRAs over a frozen base: its time, and the memory it needs.

The base is a row of Linears as in the feed-forward part of a transformer, with a LoRA
around each, as trainers do it: beside the layer, whose own forward it calls. Every base
gets the same input and the same adapters. musubi-tuner's is its own FP8 forward,
``fp8_linear_forward_patch``, on the codes and scales that hijack has.

Memory is what torch allocates on the CPU, as its profiler sees it: *kept* is what is
alive when the forward has returned and was not before, activations among it; *peak* is
the most at one time of the step. Both have the weights of the base in them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import hijack
from benchmarks.harness import Benchmark, Missing, Row, Setting
from benchmarks.peers import musubi, no_musubi
from benchmarks.timing import alternate, milliseconds, ratio

#: Width, hidden width, blocks; rows of the input.
SIZE, QUICK_SIZE = (1024, 4096, 8), (128, 256, 2)
ROWS, QUICK_ROWS = (64, 512), (8,)
RANK = 16
SCHEMES = ("blockwise_fp8", "int8", "nf4", "nvfp4")


class Block(nn.Module):
    """Two frozen layers, each with a LoRA beside it.

    Args:
        width: of the input and the output.
        hidden: between the layers.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = _frozen(width, hidden), _frozen(hidden, width)
        self.adapters = nn.ModuleList(
            nn.Sequential(
                nn.Linear(k, RANK, bias=False, dtype=torch.bfloat16),
                nn.Linear(RANK, n, bias=False, dtype=torch.bfloat16),
            )
            for k, n in ((width, hidden), (hidden, width))
        )

    def forward(self, x: Tensor) -> Tensor:
        """(M, width) to (M, width)."""
        first, second = self.adapters
        hidden = nn.functional.gelu(self.up(x) + first(x))
        output: Tensor = x + self.down(hidden) + second(hidden)
        return output


def _frozen(k: int, n: int) -> nn.Linear:
    layer = nn.Linear(k, n, dtype=torch.bfloat16)
    nn.init.normal_(layer.weight, std=k**-0.5)
    return layer.requires_grad_(False)


def model_of(size: tuple[int, int, int]) -> nn.Sequential:
    """The base in bfloat16, with its adapters."""
    torch.manual_seed(0)
    width, hidden, blocks = size
    return nn.Sequential(*(Block(width, hidden) for _ in range(blocks)))


def base_layers(model: nn.Module) -> list[Any]:
    """The frozen layers."""
    return [
        layer
        for block in model.modules()
        if isinstance(block, Block)
        for layer in (block.up, block.down)
    ]


def patch_with_musubi(model: nn.Module, peer: Any) -> None:
    """Give the layers musubi-tuner's forward, over an FP8 weight and its scales."""
    for layer in base_layers(model):
        bias = layer.bias
        hijack.wrap_module(layer, "blockwise_fp8", block_size=(1, 64))
        codes, scale = layer.weight.qdata, layer.weight_scale
        held = SimpleNamespace(
            weight=nn.Parameter(codes, requires_grad=False),
            scale_weight=scale.to(torch.bfloat16)[:, :, None],
            bias=bias,
        )
        hijack.unwrap(layer)
        layer.weight = held.weight
        layer.scale_weight = held.scale_weight
        layer.forward = lambda x, held=held: peer.fp8_linear_forward_patch(held, x)


def weight_bytes(model: nn.Module) -> int:
    """Bytes of the weights of the base, with their scales."""
    total = 0
    for layer in base_layers(model):
        weight = layer.weight
        parts = [weight, getattr(layer, "scale_weight", None)]
        if hasattr(weight, "plain_tensors"):
            parts = list(weight.plain_tensors().values())
        total += sum(p.numel() * p.element_size() for p in parts if p is not None)
    return total


def allocated(call: Callable[[], object]) -> tuple[int, int]:
    """Bytes that a call leaves allocated, and the most at one time."""
    call()  # buffers that stay are there after the first time
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        held = call()
    events: Any = profiler.profiler
    now = most = 0
    for event in sorted(events.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            now += event.nbytes()
            most = max(most, now)
    del held
    return now, most


def step_of(model: nn.Module, x: Tensor) -> Callable[[], None]:
    """A forward and a backward; the gradients are taken away afterwards."""

    def step() -> None:
        model(x).float().square().mean().backward()
        model.zero_grad()

    return step


def bases(size: tuple[int, int, int]) -> Iterator[tuple[str, nn.Module | Missing]]:
    """Each base by its name, or why it is not there."""
    yield "bf16", model_of(size)
    for scheme in SCHEMES:
        model = model_of(size)
        for layer in base_layers(model):
            hijack.wrap_module(layer, scheme)
        yield f"hijack {scheme}", model
    peer = musubi()
    if peer is None:
        yield "musubi-tuner", Missing("musubi-tuner", no_musubi() or "not there")
        return
    model = model_of(size)
    patch_with_musubi(model, peer)
    yield "musubi-tuner fp8", model


def measure(setting: Setting) -> Iterator[Row | Missing]:
    """A row for each base, number of rows and of threads."""
    size = QUICK_SIZE if setting.quick else SIZE
    models: dict[str, nn.Module] = {}
    for name, model in bases(size):
        if isinstance(model, Missing):
            yield model
        else:
            models[name] = model
    for threads in setting.threads:
        torch.set_num_threads(threads)
        for rows in QUICK_ROWS if setting.quick else ROWS:
            yield from _measure(models, rows, threads, setting)


def _measure(
    models: dict[str, nn.Module], rows: int, threads: int, setting: Setting
) -> Iterator[Row]:
    width = base_layers(models["bf16"])[0].in_features
    x = torch.randn(rows, width, dtype=torch.bfloat16, requires_grad=True)
    steps = {name: step_of(model, x) for name, model in models.items()}
    calls = {name: lambda _, step=step: step() for name, step in steps.items()}
    seconds = alternate(calls, setting.rounds_or(7))
    memory: dict[str, tuple[int, int, int]] = {}
    for name, model in models.items():
        weights = weight_bytes(model)
        kept, _ = allocated(lambda model=model: model(x))
        _, peak = allocated(steps[name])
        memory[name] = weights, weights + kept, weights + peak
    for name in models:
        row: dict[str, Any] = {"base": name, "M": rows, "threads": threads}
        row["step, ms"] = milliseconds(seconds[name])
        row["step / bf16"] = ratio(seconds[name], seconds["bf16"])
        musubi_seconds = seconds.get("musubi-tuner fp8")
        row["musubi-tuner / step"] = None
        if musubi_seconds is not None:
            row["musubi-tuner / step"] = ratio(musubi_seconds, seconds[name])
        for at, what in enumerate(("weights", "kept", "peak")):
            row[f"{what}, MB"] = memory[name][at] / 1e6
            row[f"{what} / bf16"] = memory[name][at] / memory["bf16"][at]
        yield row


BENCHMARK = Benchmark(
    "training",
    "A training step of LoRAs over a frozen base on the CPU: its time, and the memory "
    "of the weights, of these and what the forward keeps, and at the peak.",
    measure,
    "musubi-tuner for its row",
    budget=240,
)
