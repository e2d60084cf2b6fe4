"""Run by tests in a fresh process: the memory that quantizing on load takes.

Usage: memory_case.py COMFYUI FOLDER

Prints one JSON object of sizes in bytes.
"""

# ruff: noqa: E402, TID253 - ComfyUI is importable only once it is prepared
from __future__ import annotations

import gc
import json
import os
import sys
from pathlib import Path

# Memory that is given back is then given back at once, as with tensors of real size.
ALLOCATOR = {"MALLOC_MMAP_THRESHOLD_": "65536"}
if not ALLOCATOR.items() <= os.environ.items():
    os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **ALLOCATOR})

import comfy_case  # prepares ComfyUI, so it comes first  # isort: skip
import comfy.ops
import comfy.supported_models
import comfy_models
import torch
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from safetensors.torch import save_file

#: Large enough that weights outweigh everything else.
HEADS, LAYERS = 10, 2


def shapes():
    """Key to shape of a Qwen-Image of two wide layers."""
    model = QwenImageTransformer2DModel(
        in_channels=64,
        num_layers=LAYERS,
        attention_head_dim=128,
        num_attention_heads=HEADS,
        joint_attention_dim=192,
        device="meta",
        dtype=torch.bfloat16,
        operations=comfy.ops.manual_cast,
    )
    return {key: tensor.shape for key, tensor in model.state_dict().items()}


def memory(name):
    """A figure of this process that Linux keeps, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) * 1024
    raise LookupError(name)


def warm_up(scheme):
    """Load something small, so that what is imported on the way is in memory."""
    from hijack.hosts.comfyui import quantize as online
    from hijack.quantized import QuantizationConfig

    small = comfy_case.FOLDER / "small.safetensors"
    shapes = comfy_models.small_qwen_shapes()
    save_file(comfy_models.make_state_dict(shapes), small)
    wide = comfy.supported_models.QwenImage.unet_extra_config
    comfy.supported_models.QwenImage.unet_extra_config = {
        "num_attention_heads": 2,
        "joint_attention_dim": 192,
    }
    online.load_quantized(
        str(small), QuantizationConfig.of(scheme, {"block_size": (1, 64)})
    )
    comfy.supported_models.QwenImage.unet_extra_config = wide


def main():
    """Load once with each recipe; the figures are printed as the last line."""
    import hijack
    import schemes.blockwise_fp8  # noqa: F401
    from hijack.hosts.comfyui import quantize as online
    from hijack.quantized import QuantizationConfig

    comfy.supported_models.QwenImage.unet_extra_config = {
        "num_attention_heads": HEADS,
        "joint_attention_dim": 192,
    }
    path = str(comfy_case.FOLDER / "wide.safetensors")
    tensors = {key: torch.randn(s).to(torch.bfloat16) for key, s in shapes().items()}
    dense = sum(tensor.nbytes for tensor in tensors.values())
    largest = max(tensor.nbytes for tensor in tensors.values())
    save_file(tensors, path)
    del tensors
    scheme = hijack.schemes()["blockwise_fp8"]
    warm_up(scheme)
    gc.collect()
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    recipe = QuantizationConfig.of(scheme, {"block_size": (1, 64)})
    patcher = online.load_quantized(path, recipe)
    peak = memory("VmHWM") - before
    quantized = sum(p.nbytes for p in patcher.model.state_dict().values())
    print(
        json.dumps(
            {
                "dense": dense,
                "quantized": quantized,
                "largest": largest,
                "peak": peak,
            }
        )
    )


if __name__ == "__main__":
    with torch.inference_mode():  # as ComfyUI runs nodes
        main()
