"""Nodes that make a quantized model."""

from __future__ import annotations

import os
import sys
from typing import Any

from hijack.errors import HijackError, SchemeError
from hijack.hosts.comfyui import quantize
from hijack.hosts.comfyui.lora import Merge
from hijack.hosts.comfyui.nodes.spec import Input, Node, Output, Result
from hijack.progress import Progress
from hijack.quantized import QuantizationConfig
from hijack.registry import current_registry
from hijack.safetensors_io.reader import identity_of
from hijack.text import parse_block_size

AUTO = "auto"


def scheme_names() -> list[str]:
    """Registered schemes; the reference scheme first."""
    return sorted(
        current_registry().schemes(), key=lambda name: (name != "blockwise_fp8", name)
    )


def make_config(scheme: str, block_size: str) -> QuantizationConfig:
    """What the inputs of both quantizing nodes say.

    Raises:
        HijackError: if the scheme is unknown, or the text is no block size.
    """
    chosen = current_registry().get(scheme)
    options: dict[str, Any] = {}
    if block_size.strip().lower() not in ("", AUTO):
        if "block_size" not in {option.name for option in chosen.declared_options()}:
            raise HijackError(
                f"block_size: scheme {scheme} has no blocks; got {block_size!r}, "
                f"expected {AUTO}"
            )
        options["block_size"] = _parsed(block_size)
    return QuantizationConfig.of(chosen, options)


def _parsed(block_size: str) -> tuple[int, int] | int | str:
    try:
        return parse_block_size(block_size)
    except SchemeError as error:
        raise SchemeError(f"block_size: {error}; or write {AUTO}") from error


def progress_bar() -> Progress:
    """ComfyUI's progress bar, in the page and in the terminal."""
    utils = sys.modules["comfy.utils"]
    bars: list[Any] = []

    def advance(done: int, total: int, layer: str) -> None:
        if not bars:
            bars.append(utils.ProgressBar(total))
        bars[0].update_absolute(done, total)

    return advance


def quantize_model(
    model: Any, scheme: str, block_size: str, include: str = "", exclude: str = ""
) -> Result:
    """Run *Quantize Model*."""
    config = make_config(scheme, block_size)
    result = quantize.quantize_model(model, config, include, exclude, progress_bar())
    return Result((result,))


def load_quantized(
    unet_name: str, scheme: str, block_size: str, include: str = "", exclude: str = ""
) -> Result:
    """Run *Load Diffusion Model (quantize)*."""
    folder_paths = sys.modules["folder_paths"]
    path = folder_paths.get_full_path_or_raise("diffusion_models", unet_name)
    config = make_config(scheme, block_size)
    result = quantize.load_quantized(path, config, include, exclude, progress_bar())
    return Result((result,))


def file_state(path: str) -> str:
    """What is another once a file is replaced or written to."""
    return f"{path} {identity_of(os.stat(path))}"


def _loaded(unet_name: str) -> str:
    """What *Load Diffusion Model (quantize)*'s model depends on: the file."""
    folder_paths = sys.modules["folder_paths"]
    path = folder_paths.get_full_path_or_raise("diffusion_models", unet_name)
    return file_state(path)


def merge_loras(model: Any) -> Result:
    """Run *Merge LoRAs into Quantized Weights*."""
    result = model.clone()
    for key, patches in result.patches.items():
        result.patches[key] = [Merge(patch) for patch in patches]
    # ComfyUI takes models of one patches_uuid for the same weights.
    result.patches_uuid = sys.modules["comfy.model_patcher"].uuid.uuid4()
    return Result((result,))


def diffusion_models() -> list[str]:
    """Files of ComfyUI's folder of diffusion models."""
    files: list[str] = sys.modules["folder_paths"].get_filename_list("diffusion_models")
    return files


_HOW = (
    Input(
        "scheme",
        "COMBO",
        "The weight format. blockwise_fp8 is FP8 with one scale for each block; "
        "plugins add others.",
        options=scheme_names,
        default="blockwise_fp8",
    ),
    Input(
        "block_size",
        "STRING",
        "Weights that share a scale: ROWSxCOLUMNS such as 1x64 or 128x128, row, or "
        "tensor. auto is the format's own choice. Smaller blocks are more exact.",
        default=AUTO,
    ),
    Input(
        "include",
        "STRING",
        "Layers to quantize, as patterns such as transformer_blocks.*.img_mlp.*, one "
        "a line. Empty, or the word default: what is usual for this family of models, "
        "or every linear layer of a model that is not known.",
        default="",
        multiline=True,
        optional=True,
    ),
    Input(
        "exclude",
        "STRING",
        "Layers to leave as they are, as patterns, one a line. Empty, or the word "
        "default: what this family of models is sensitive in, such as norms.",
        default="",
        multiline=True,
        optional=True,
    ),
)
_ALIASES = ("fp8", "quantize", "quantization", "block-wise", "musubi", "low vram")

NODES = (
    Node(
        "HijackQuantizeModel",
        "Quantize Model",
        "Quantizes a loaded model layer by layer, with its LoRAs merged in first at "
        "full precision. The result takes further LoRAs and can be saved.",
        (*_ALIASES, "online quantization", "convert to fp8"),
        (Input("model", "MODEL", "The model, with any LoRAs on it."), *_HOW),
        (Output("MODEL", "model", "The quantized model."),),
        quantize_model,
    ),
    Node(
        "HijackLoadQuantized",
        "Load Diffusion Model (quantize)",
        "Loads a full-precision diffusion model and quantizes each layer as it is "
        "read, so that the whole model never has to fit in memory. Files that are "
        "quantized already load with the ordinary Load Diffusion Model node.",
        (*_ALIASES, "unet loader", "load quantized"),
        (
            Input(
                "unet_name",
                "COMBO",
                "A full-precision file in models/diffusion_models.",
                options=diffusion_models,
            ),
            *_HOW,
        ),
        (Output("MODEL", "model", "The quantized model."),),
        load_quantized,
        fingerprint=_loaded,
    ),
    Node(
        "HijackMergeLoras",
        "Merge LoRAs into Quantized Weights",
        "Quantizes the LoRAs applied so far into the weights, with scales of their "
        "own, instead of keeping them beside the weights. Saves a little time in each "
        "step and costs some exactness; LoRAs applied later are kept beside again.",
        ("lora", "merge lora", "bake lora", "fp8"),
        (Input("model", "MODEL", "A quantized model with LoRAs on it."),),
        (Output("MODEL", "model", "The model that merges those LoRAs."),),
        merge_loras,
    ),
)
