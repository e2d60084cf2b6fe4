"""Run by tests in a fresh process: layers of quantized files, in one real ComfyUI.

Usage: same_layers_case.py COMFYUI FOLDER

Writes the files to FOLDER, and what the layers give.
"""

# ruff: noqa: E402, TID253 - ComfyUI is importable only once it is prepared
from __future__ import annotations

import json
import sys
from pathlib import Path

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "comfyui"), str(HERE)]

import architectures
import comfy_models
import launch

ROOT, FOLDER = sys.argv[1], Path(sys.argv[2])
launch.prepare(ROOT)

import comfy.sd
import same_layers

import hijack
from hijack.hosts.comfyui import linear

(ARCHITECTURE,) = [a for a in architectures.ARCHITECTURES if a.name == "qwen-image"]


def is_quantized(module):
    """By hijack, or by ComfyUI itself, which reads some files on its own."""
    return type(module.weight).__name__ == "QuantizedTensor" or module in linear.LIVE


hijack.patch("comfyui")
same_layers.write_files(comfy_models.make_state_dict(ARCHITECTURE.shapes()), FOLDER)
for scheme in same_layers.SCHEMES:
    with ARCHITECTURE.detected():
        patcher = comfy.sd.load_diffusion_model(str(FOLDER / f"{scheme}.safetensors"))
    model = patcher.model.diffusion_model
    same_layers.save_outputs(model, FOLDER, "comfyui", scheme, is_quantized)
print(json.dumps({"folder": str(FOLDER)}))
