"""Run by tests in a fresh process: quantized models in ComfyUI on a real GPU.

Usage: gpu_case.py COMFYUI FOLDER --ARGUMENT-OF-COMFYUI

Prints one JSON object: the name of each check, and what was found. Files go to FOLDER.
"""

# ruff: noqa: E402 - ComfyUI is importable only once it is prepared
from __future__ import annotations

import contextlib
import gc
import itertools
import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "comfyui"), str(HERE)]

DYNAMIC = sys.argv[3] == "--enable-dynamic-vram"
if DYNAMIC:
    import comfy_aimdo.control

    comfy_aimdo.control.init()

import comfy_case as case  # prepares ComfyUI
import comfy_models
from safetensors.torch import load_file, save_file

comfy = case.comfy
management = comfy.model_management
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")
LORAS = {"small": 0.01, "large": 5.0}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
NUMBERS = itertools.count()
found = {}


def enable_dynamic_vram():
    """As ComfyUI's ``main.py`` does."""
    import comfy.memory_management
    import comfy.model_patcher

    try:
        started = comfy_aimdo.control.init_devices([(0, 0)])
    except TypeError:  # before comfy-aimdo 0.4.10
        started = comfy_aimdo.control.init_devices([0])
    assert started, "comfy_aimdo does not run here"
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True


def load(state_dict, **options):
    """A ModelPatcher of ComfyUI's own loader, from a file."""
    path = str(case.FOLDER / f"model-{next(NUMBERS)}.safetensors")
    save_file(state_dict, path)
    return comfy.sd.load_diffusion_model(path, model_options=options)


def output(patcher):
    """The last of three outputs for one input that is always the same."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((1, 16, 1, 8, 8), generator=generator).to(GPU)
    context = torch.randn((1, 7, 192), generator=generator).to(GPU)
    for _ in range(3):
        step = torch.tensor([0.7]).to(GPU)
        made = patcher.model.apply_model(x, step, c_crossattn=context)
    return made.to(CPU)


def whole(patcher):
    """The output with the model loaded as ComfyUI likes."""
    management.load_models_gpu([patcher])
    return output(patcher)


def partly(patcher, memory):
    """The output with so many bytes of weights on the GPU; the rest is streamed."""
    management.unload_all_models()
    patcher.patch_model(GPU, lowvram_model_memory=memory)
    found.setdefault("loaded", []).append(patcher.model.model_loaded_weight_memory)
    made = output(patcher)
    patcher.unpatch_model(CPU)
    return made


def ways(patcher):
    """Each way to have a model's weights on a GPU, with its output."""
    yield "whole", whole(patcher)
    if not DYNAMIC:
        yield "half", partly(patcher, patcher.model_size() // 2)
        yield "none", partly(patcher, 1)


def check(name, quantized_sd, dense, dtype):
    """The exactly dequantized model and the quantized one, with LoRAs and without."""
    exact, patcher = load(dense, dtype=dtype), load(quantized_sd, dtype=dtype)
    found["patcher"] = type(patcher).__name__
    expected = whole(exact)
    found["devices"] = sorted({str(patcher.load_device), str(exact.load_device)})
    for way, made in ways(patcher):
        found[f"{name} plain {way}"] = case.error(made, expected)
    clean = whole(patcher)
    for lora, amplitude in LORAS.items():
        weights = case.lora(dense, amplitude)
        expected_lora = whole(case.with_lora(exact, weights))
        found[f"{name} {lora} effect"] = case.error(expected, expected_lora)
        changed = case.with_lora(patcher, weights)
        for way, made in ways(changed):
            found[f"{name} {lora} {way}"] = case.error(made, expected_lora)
        changed.detach()
        found[f"{name} {lora} removed"] = torch.equal(whole(patcher), clean)
    return patcher


def check_saving(patcher, quantized_sd):
    """ModelSave writes quantized data and scales as they came."""
    whole(patcher)
    path = str(case.FOLDER / "saved.safetensors")
    comfy.sd.save_checkpoint(path, patcher)
    saved = load_file(path)
    cut = {
        key.removeprefix(case.PREFIX): tensor.clone() for key, tensor in saved.items()
    }
    claimed = {key for key in quantized_sd if "scale_weight" in key}
    claimed |= {key.replace("scale_weight", "weight") for key in claimed}
    found["saved"] = case.same(
        {key: cut[key] for key in claimed}, {key: quantized_sd[key] for key in claimed}
    )


def check_unloading(patcher):
    """Unloaded, the model has no tensor on the GPU."""
    management.unload_all_models()
    patcher.detach()
    gc.collect()
    management.soft_empty_cache()
    named = [*patcher.model.named_parameters(), *patcher.model.named_buffers()]
    found["left"] = [name for name, tensor in named if tensor.is_cuda]


def main():
    """All checks; what they found is printed as the last line."""
    bf16 = comfy_models.make_state_dict(comfy_models.small_qwen_shapes())
    quantized_sd, _ = comfy_models.musubi(bf16)
    dense = case.exact(quantized_sd)
    if DYNAMIC:  # from now on, networks are built without parameters
        enable_dynamic_vram()
    import hijack.hosts
    import schemes.blockwise_fp8  # noqa: F401

    found["status"] = str(hijack.hosts.patch("comfyui"))
    for name, dtype in DTYPES.items():
        patcher = check(name, quantized_sd, dense, dtype)
    default = load(quantized_sd)
    found["default"] = case.error(whole(default), whole(load(dense)))
    check_saving(patcher, quantized_sd)
    del default
    check_unloading(patcher)


if __name__ == "__main__":
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    # what ComfyUI prints belongs to the other stream
    with torch.inference_mode(), contextlib.redirect_stdout(sys.stderr):
        main()
    print(json.dumps(found))
