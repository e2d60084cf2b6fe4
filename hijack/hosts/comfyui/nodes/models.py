"""Nodes that make a quantized model."""

from __future__ import annotations

import os
import sys
from typing import Any

from hijack.formats import preference
from hijack.hosts.comfyui import quantize
from hijack.hosts.comfyui.lora import Merge
from hijack.hosts.comfyui.nodes.options import (
    ALIASES,
    BLOCK_SIZE,
    DETAILS,
    LORAS,
    PATTERNS,
    RULES,
    SCHEME,
    device_of,
    find_loras,
    lines_of,
    logged,
    make_config,
    progress_bar,
)
from hijack.hosts.comfyui.nodes.spec import Input, Node, Output, Result
from hijack.safetensors_io.reader import identity_of


def quantize_model(
    model: Any,
    scheme: str,
    block_size: str,
    include: str = "",
    exclude: str = "",
    rules: str = "",
    device: str = "cpu",
    **details: Any,
) -> Result:
    """Run *Quantize Model*."""
    notes: list[str] = []
    result = quantize.quantize_model(
        model,
        make_config(scheme, block_size, **details),
        include,
        exclude,
        progress_bar(),
        rules=lines_of(rules),
        device=device_of(device),
        notes=notes,
    )
    return Result((result,), logged("Quantize Model", notes))


def load_quantized(
    unet_name: str,
    scheme: str,
    block_size: str,
    include: str = "",
    exclude: str = "",
    rules: str = "",
    loras: str = "",
    device: str = "cpu",
    **details: Any,
) -> Result:
    """Run *Load Diffusion Model (quantize)*."""
    notes: list[str] = []
    result = quantize.load_quantized(
        _model_path(unet_name),
        make_config(scheme, block_size, **details),
        include,
        exclude,
        progress_bar(),
        rules=lines_of(rules),
        loras=find_loras(loras),
        device=device_of(device),
        notes=notes,
    )
    return Result((result,), logged(unet_name, notes))


def _model_path(unet_name: str) -> str:
    folder_paths = sys.modules["folder_paths"]
    path: str = folder_paths.get_full_path_or_raise("diffusion_models", unet_name)
    return path


def file_state(path: str) -> str:
    """What is another once a file is replaced or written to.

    ComfyUI puts it into the workflow that images carry, so it tells no folders.
    """
    return str(identity_of(os.stat(path)))


def lora_states(loras: str) -> list[str]:
    """What is another once one of the LoRAs is replaced or written to."""
    return [file_state(path) for path, _ in find_loras(loras)]


def _loaded(unet_name: str, loras: str = "") -> str:
    """What *Load Diffusion Model (quantize)*'s model depends on: the files."""
    return "\n".join([file_state(_model_path(unet_name)), *lora_states(loras)])


def load_as(unet_name: str, prefer: str) -> Result:
    """Run *Load Diffusion Model (choose format)*."""
    words = [word for line in lines_of(prefer) for word in line.split(",")]
    with preference.prefer([word.strip() for word in words if word.strip()]):
        model = sys.modules["comfy.sd"].load_diffusion_model(_model_path(unet_name))
    return Result((model,))


def _loaded_as(unet_name: str) -> str:
    """What *Load Diffusion Model (choose format)*'s model depends on: the file."""
    return file_state(_model_path(unet_name))


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


NODES = (
    Node(
        "HijackQuantizeModel",
        "Quantize Model",
        "Quantizes a loaded model layer by layer, with its LoRAs merged in first at "
        "full precision. The result takes further LoRAs and can be saved.",
        (*ALIASES, "online quantization", "convert to fp8"),
        (
            Input("model", "MODEL", "The model, with any LoRAs on it."),
            SCHEME,
            BLOCK_SIZE,
            *PATTERNS,
            RULES,
            *DETAILS,
        ),
        (Output("MODEL", "model", "The quantized model."),),
        quantize_model,
    ),
    Node(
        "HijackLoadQuantized",
        "Load Diffusion Model (quantize)",
        "Loads a full-precision diffusion model and quantizes each layer as it is "
        "read, so that the whole model never has to fit in memory. Files that are "
        "quantized already load with the ordinary Load Diffusion Model node.",
        (*ALIASES, "unet loader", "load quantized"),
        (
            Input(
                "unet_name",
                "COMBO",
                "A full-precision file in models/diffusion_models.",
                options=diffusion_models,
            ),
            SCHEME,
            BLOCK_SIZE,
            *PATTERNS,
            RULES,
            LORAS,
            *DETAILS,
        ),
        (Output("MODEL", "model", "The quantized model."),),
        load_quantized,
        fingerprint=_loaded,
    ),
    Node(
        "HijackLoadAs",
        "Load Diffusion Model (choose format)",
        "Loads a quantized file that can be read in several ways, the way you say. "
        "The ordinary Load Diffusion Model node loads every other quantized file, and "
        "names the choices where it cannot.",
        (*ALIASES, "unet loader", "ambiguous", "assume"),
        (
            Input(
                "unet_name",
                "COMBO",
                "A quantized file in models/diffusion_models.",
                options=diffusion_models,
            ),
            Input(
                "prefer",
                "STRING",
                "Schemes, dialects, block sizes or options such as rotation=256, the "
                "first first; a comma between. Empty leaves it to HIJACK_PREFER.",
                default="",
            ),
        ),
        (Output("MODEL", "model", "The model, as the stock node would load it."),),
        load_as,
        fingerprint=_loaded_as,
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
