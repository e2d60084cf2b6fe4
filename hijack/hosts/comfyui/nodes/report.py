"""A node that draws how far quantized weights are from the original ones."""

from __future__ import annotations

import dataclasses
import statistics
import sys
from typing import Any

import torch
from torch import Tensor

from hijack.errors import HijackError
from hijack.hosts.comfyui.linear import LIVE
from hijack.hosts.comfyui.nodes.spec import Input, Node, Output, Result
from hijack.hosts.comfyui.quantize import NETWORK, read_weight
from hijack.metrics import quantization_error
from hijack.text import table

#: Layers named in the text and the plot.
WORST = 10


@dataclasses.dataclass(frozen=True)
class Distance:
    """How far one layer's weight is from the original.

    Attributes:
        layer: its name.
        sqnr_db: power of the original over power of the difference, in decibels.
        largest: the largest difference, relative to the largest weight.
    """

    layer: str
    sqnr_db: float
    largest: float


def measure(quantized: Any, original: Any) -> list[Distance]:
    """Compare every quantized layer of a model with the same layer of another.

    Args:
        quantized: a ModelPatcher with quantized layers.
        original: a ModelPatcher of the same architecture.

    Raises:
        HijackError: if nothing is quantized, or the models do not match.
    """
    network = getattr(quantized.model, NETWORK)
    layers = [name for name, module in network.named_modules() if module in LIVE]
    if not layers:
        raise HijackError(
            "model: has no layer that hijack quantized; connect a quantized model"
        )
    found = []
    for layer in layers:
        key = f"{NETWORK}.{layer}.weight"
        reference, actual = _weight(original, key), _weight(quantized, key)
        if reference.shape != actual.shape:
            raise HijackError(
                f"{layer}: is {tuple(actual.shape)} in the quantized model and "
                f"{tuple(reference.shape)} in the original; connect the same model"
            )
        found.append(_distance(layer, reference, actual))
        sys.modules[
            "comfy.model_management"
        ].throw_exception_if_processing_interrupted()
    return found


def _weight(patcher: Any, key: str) -> Tensor:
    try:
        return read_weight(patcher, key).float()
    except AttributeError as error:
        raise HijackError(
            f"{key}: the original model has no such weight; connect the model that was "
            "quantized"
        ) from error


def _distance(layer: str, reference: Tensor, actual: Tensor) -> Distance:
    error = quantization_error(reference, actual)
    peak = float(reference.abs().max()) or 1.0
    return Distance(layer, error.sqnr, error.max_abs_error / peak)


def describe(distances: list[Distance]) -> str:
    """The worst layers, and the middle of all."""
    ordered = sorted(distances, key=lambda distance: distance.sqnr_db)
    middle = statistics.median(distance.sqnr_db for distance in ordered)
    count = len(ordered)
    rows = [
        (d.layer, f"{d.sqnr_db:.1f}", f"{100 * d.largest:.2f}") for d in ordered[:WORST]
    ]
    head = ("layer", "SQNR dB", "largest error %")
    return (
        f"{count} quantized layers, median SQNR {middle:.1f} dB, worst first:\n\n"
        f"{table(head, rows)}"
    )


def plot(distances: list[Distance]) -> Tensor:
    """SQNR of every layer, the worst ones named; (1, H, W, 3) float32, 0 to 1.

    Raises:
        HijackError: if matplotlib is not installed.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise HijackError(
            f"Quantization Report: matplotlib is missing; run: {sys.executable} -m pip "
            "install matplotlib"
        ) from error
    values = [min(distance.sqnr_db, 200.0) for distance in distances]
    worst = sorted(range(len(values)), key=values.__getitem__)[:WORST]
    figure = Figure(figsize=(12, 5), dpi=110, layout="constrained")
    axes, names = figure.subplots(1, 2, width_ratios=(7, 4))
    axes.plot(values, ".", color="#0072B2")
    axes.plot(worst, [values[i] for i in worst], "D", color="#D55E00", label="worst")
    axes.axhline(statistics.median(values), color="black", lw=0.8, label="median")
    axes.set_ylim(min(values) - 1, max(values) + 1)
    axes.set_xlabel("quantized layer, in the model's order")
    axes.set_ylabel("weight SQNR (dB), higher is better")
    axes.set_title("Quantized weights against the original")
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    names.axis("off")
    listed = "\n".join(f"{values[i]:5.1f}  {distances[i].layer[-42:]}" for i in worst)
    names.text(0, 1, f"   dB  worst layers\n\n{listed}", va="top", family="monospace")
    canvas: Any = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    width, height = canvas.get_width_height()
    return pixels.view(1, height, width, 4)[..., :3].float() / 255


def quantization_report(model: Any, original: Any) -> Result:
    """Run *Quantization Report*."""
    distances = measure(model, original)
    text = describe(distances)
    return Result((plot(distances), text), text)


NODES = (
    Node(
        "HijackQuantizationReport",
        "Quantization Report",
        "Draws how far each quantized layer's weight is from the original one, and "
        "names the worst layers.",
        ("error", "sqnr", "compare", "quality", "fp8", "plot"),
        (
            Input("model", "MODEL", "The quantized model."),
            Input("original", "MODEL", "The model it was quantized from."),
        ),
        (
            Output("IMAGE", "plot", "Signal-to-noise ratio of every layer."),
            Output("STRING", "report", "The worst layers as text."),
        ),
        quantization_report,
        terminal=True,
    ),
)
