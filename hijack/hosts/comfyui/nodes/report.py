"""Nodes that say and draw how far quantized weights are from the original ones."""

from __future__ import annotations

import dataclasses
import io
import statistics
import sys
from typing import Any

import torch
from torch import Tensor

from hijack.checkpoint.compare import Comparison, compare_files
from hijack.errors import HijackError
from hijack.hosts.comfyui.linear import LIVE
from hijack.hosts.comfyui.nodes.files import checkpoint_files, full_path
from hijack.hosts.comfyui.nodes.models import file_state
from hijack.hosts.comfyui.nodes.options import lines_of, progress_bar
from hijack.hosts.comfyui.nodes.spec import Input, Node, Output, Result
from hijack.hosts.comfyui.quantize import NETWORK, read_weight
from hijack.metrics import quantization_error

#: Layers named in the text.
WORST = 10


def measure(quantized: Any, original: Any) -> Comparison:
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
    found, advance = {}, progress_bar()
    for done, layer in enumerate(layers, 1):
        key = f"{NETWORK}.{layer}.weight"
        reference, actual = _weight(original, key), _weight(quantized, key)
        if reference.shape != actual.shape:
            raise HijackError(
                f"{layer}: is {tuple(actual.shape)} in the quantized model and "
                f"{tuple(reference.shape)} in the original; connect the same model"
            )
        found[layer] = quantization_error(reference, actual)
        advance(done, len(layers), layer)
    return Comparison("the original", "the quantized model", found)


def _weight(patcher: Any, key: str) -> Tensor:
    try:
        return read_weight(patcher, key).float()
    except AttributeError as error:
        raise HijackError(
            f"{key}: the original model has no such weight; connect the model that was "
            "quantized"
        ) from error


def picture(comparison: Comparison) -> Tensor:
    """The plot of a comparison; (1, H, W, 3) float32, 0 to 1.

    Raises:
        HijackError: if matplotlib is not installed.
    """
    try:
        from PIL import Image

        from hijack.checkpoint.plot import draw_comparison
    except ImportError as error:
        raise HijackError(
            f"the plot: {error.name} is missing; run: {sys.executable} -m "
            "pip install matplotlib"
        ) from error
    file = io.BytesIO()
    draw_comparison(comparison, file)
    image = Image.open(file).convert("RGB")
    pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
    return pixels.view(1, image.height, image.width, 3).float() / 255


def quantization_report(model: Any, original: Any) -> Result:
    """Run *Quantization Report*."""
    comparison = measure(model, original)
    middle = statistics.median(error.sqnr for error in comparison.layers.values())
    text = (
        f"{len(comparison.layers)} quantized layers, median SQNR {middle:.1f} dB, "
        f"worst first:\n\n{comparison.as_table(WORST)}"
    )
    return Result((picture(comparison), text), text)


def compare_two(reference: str, other: str, assume: str = "") -> Result:
    """Run *Compare Files*."""
    comparison = compare_files(
        full_path(reference),
        full_path(other),
        assume=lines_of(assume),
        progress=progress_bar(),
    )
    # by the names in ComfyUI's lists, for paths on the server say less here
    comparison = dataclasses.replace(comparison, reference=reference, other=other)
    text = comparison.as_table(WORST)
    return Result((picture(comparison), text), text)


def _compared(reference: str, other: str) -> str:
    """What *Compare Files* depends on: the files."""
    return "\n".join(file_state(full_path(file)) for file in (reference, other))


_OUTPUTS = (
    Output("IMAGE", "plot", "Signal-to-noise ratio of every layer."),
    Output("STRING", "report", "The worst layers as text."),
)
_ALIASES = ("error", "sqnr", "compare", "quality", "fp8", "plot")

NODES = (
    Node(
        "HijackQuantizationReport",
        "Quantization Report",
        "Draws how far each quantized layer's weight is from the original one, and "
        "names the worst layers.",
        _ALIASES,
        (
            Input("model", "MODEL", "The quantized model."),
            Input("original", "MODEL", "The model it was quantized from."),
        ),
        _OUTPUTS,
        quantization_report,
        terminal=True,
    ),
    Node(
        "HijackCompareFiles",
        "Compare Files",
        "Says and draws how far each weight of a file is from the same weight of "
        "another. It loads no model, so that a text encoder, a VAE or a whole "
        "checkpoint will do, quantized or not.",
        (*_ALIASES, "diff", "difference", "checkpoint"),
        (
            Input(
                "reference",
                "COMBO",
                "The file to compare with, such as the original.",
                options=checkpoint_files,
            ),
            Input(
                "other",
                "COMBO",
                "The file to compare, such as a quantized one.",
                options=checkpoint_files,
            ),
            Input(
                "assume",
                "STRING",
                "How to read a file that does not tell: a scheme, a dialect or a block "
                "size, one a line.",
                default="",
                multiline=True,
                optional=True,
            ),
        ),
        _OUTPUTS,
        compare_two,
        terminal=True,
        fingerprint=_compared,
    ),
)
