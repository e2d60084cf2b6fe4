"""Run by tests in a fresh process: what hijack does under ComfyUI's dynamic VRAM.

Usage: dynamic_case.py COMFYUI FOLDER

The device and comfy_aimdo's native half are doubles; see ``aimdo_double``. Prints one
JSON object: the name of each check, and what was found. Files go to FOLDER.
"""

# ruff: noqa: E402 - ComfyUI is importable only once it is prepared
from __future__ import annotations

import gc
import itertools
import json
import sys
import weakref
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "comfyui"), str(HERE)]

import aimdo_double

aimdo_double.prepare()

import comfy_case as case
import comfy_models
from aimdo_double import MEMORY
from device_double import CPU, DEVICE
from safetensors.torch import load_file, save_file

comfy = case.comfy
#: Whether every weight fits, none, or about half of them, of which some are evicted.
MODES = ("all", "none", "half")
STEPS = 3
#: As on a GPU, where weights keep this dtype; here it is cast at each use.
KEPT = {"dtype": torch.bfloat16}
NUMBERS = itertools.count()
#: Sizes of LoRAs, relative to their weights.
LORAS = {"small": 0.01, "large": 5.0}
found = {}


# -- ComfyUI ---------------------------------------------------------------------------


def load(state_dict, **options):
    """A ModelPatcher of ComfyUI's own loader, from a file."""
    path = str(case.FOLDER / f"model-{next(NUMBERS)}.safetensors")
    save_file(state_dict, path)
    return comfy.sd.load_diffusion_model(path, model_options=options)


def output(patcher):
    """The network's output for one input that is always the same."""
    device = patcher.load_device
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((1, 16, 1, 8, 8), generator=generator).to(device)
    context = torch.randn((1, 7, 192), generator=generator).to(device)
    step = torch.tensor([0.7]).to(device)
    return patcher.model.apply_model(x, step, c_crossattn=context).to(CPU)


def outputs(patcher, mode, steps=STEPS):
    """The outputs of a few steps in a row, beginning with nothing on the device."""
    MEMORY.evict()
    half = patcher.model_size() // 2
    MEMORY.limit = {"all": None, "none": 0, "half": half}[mode]
    MEMORY.log = dict.fromkeys(MEMORY.log, 0)
    comfy.model_management.load_models_gpu([patcher])
    made = []
    for _ in range(steps):
        made.append(output(patcher))
        found["held"] = found.get("held", 0) + MEMORY.pinned()
        if mode == "half":
            MEMORY.evict(every=3)
    return made


def on_cpu(patcher):
    """The output without dynamic VRAM and on the CPU; LoRAs are never merged."""
    comfy.model_management.unload_all_models()
    patcher.partially_load(CPU, 1000)  # too little for a weight
    return output(patcher)


def end_prompt():
    """What ComfyUI does after a prompt."""
    reset = getattr(comfy.model_management, "reset_cast_buffers", None)
    if reset is not None:
        reset()


def errors(made, expected):
    """Relative L2 distance of each output."""
    return [case.error(one, expected) for one in made]


# -- checks ----------------------------------------------------------------------------


def check_double(patcher, reference, made, with_lora):
    """ComfyUI's own layers give under the double what they give without."""
    found["patcher"] = type(patcher).__name__
    found["device"] = str(patcher.load_device)
    found["plain"], found["plain lora"], found["faults"] = {}, {}, {}
    changed = case.with_lora(patcher, made)
    for mode in MODES:
        found["plain"][mode] = errors(outputs(patcher, mode), reference)
        found["faults"][mode] = dict(MEMORY.log)
        found["plain lora"][mode] = errors(outputs(changed, mode), with_lora)
    changed.detach()


def check_forwards(patchers, reference):
    """Resident, streamed and evicted weights give the exact model's output."""
    found["exact"] = {
        f"{name} {mode}": errors(outputs(patcher, mode), reference)
        for name, patcher in patchers.items()
        for mode in MODES
    }


def check_lora(patcher, dense, expected):
    """A LoRA is applied exactly in every step, and removing it leaves no trace."""
    found["lora"], found["removed"] = {}, {}
    for mode in MODES:
        before = outputs(patcher, mode, 1)[0]
        for name, amplitude in LORAS.items():
            changed = case.with_lora(patcher, case.lora(dense, amplitude))
            made = outputs(changed, mode)
            found["lora"][f"{name} {mode}"] = errors(made, expected[name])
            after = outputs(patcher, mode, 2)
            same = all(torch.equal(one, before) for one in after)
            found["removed"][f"{name} {mode}"] = same


def check_forgetting(patcher, dense):
    """A LoRA that is taken away is held by no layer, on no device."""
    made = case.lora(dense, LORAS["large"])
    tensor = weakref.ref(next(iter(made.values())))
    changed = case.with_lora(patcher, made)
    outputs(changed, "all", 1)
    found["LoRA held"] = tensor() is not None
    del changed, made
    outputs(patcher, "all", 1)
    gc.collect()
    found["LoRA forgotten"] = tensor() is None


def check_saving(patcher, quantized_sd):
    """ModelSave writes data and scales as they came, also of evicted weights."""
    found["saved"] = {}
    for mode in MODES:
        outputs(patcher, mode, 2)
        path = str(case.FOLDER / f"saved-{mode}.safetensors")
        try:
            comfy.sd.save_checkpoint(path, patcher)
            saved = load_file(path)
        except Exception as caught:
            found["saved"][mode] = f"{type(caught).__name__}: {caught}"
            continue
        cut = {key.removeprefix(case.PREFIX): saved[key].clone() for key in saved}
        claimed = {key for key in quantized_sd if "scale_weight" in key}
        claimed |= {key.replace("scale_weight", "weight") for key in claimed}
        found["saved"][mode] = cut.keys() == quantized_sd.keys() and case.same(
            {key: cut[key] for key in claimed},
            {key: quantized_sd[key] for key in claimed},
        )


def check_size(patcher, quantized_sd):
    """ComfyUI plans with the bytes of quantized data and scales."""
    sampling = patcher.model.model_sampling.state_dict().values()
    found["sizes"] = [
        patcher.model_size() - sum(tensor.nbytes for tensor in sampling),
        sum(tensor.nbytes for tensor in quantized_sd.values()),
    ]


def check_unloading(patcher, made):
    """Unloaded, a model leaves nothing on the device and nothing in host buffers."""
    patcher = case.with_lora(patcher, made)
    outputs(patcher, "all", 1)
    end_prompt()
    found["loaded"] = MEMORY.resident()
    comfy.model_management.unload_all_models()
    patcher.detach()
    gc.collect()
    found["left"] = {
        "device": MEMORY.resident(),
        "host": MEMORY.host_bytes(),
        "held": MEMORY.pinned(),
        "parameters": [
            name
            for name, tensor in patcher.model.named_parameters()
            if tensor.device == DEVICE
        ],
        "loras": [
            name
            for name, module in patcher.model.named_modules()
            if case.lora_copies(module)
        ],
    }


def main():
    """All checks; what they found is printed as the last line."""
    bf16 = comfy_models.make_state_dict(comfy_models.small_qwen_shapes())
    quantized_sd, _ = comfy_models.musubi(bf16)
    dense = case.exact(quantized_sd)
    large = case.lora(dense, LORAS["large"])
    expected, effects = {}, {}
    exact, plain = load(dense), load(bf16)
    reference, plain_reference = on_cpu(exact), on_cpu(plain)
    for name, amplitude in LORAS.items():
        changed = case.with_lora(exact, case.lora(dense, amplitude))
        expected[name] = on_cpu(changed)
        effects[name] = case.error(reference, expected[name])
    plain_lora = on_cpu(case.with_lora(plain, large))
    found["effects"] = effects
    found["cost"] = case.error(plain_reference, reference)

    aimdo_double.enable()
    check_double(load(bf16, **KEPT), plain_reference, large, plain_lora)
    import hijack.hosts
    import schemes.blockwise_fp8  # noqa: F401

    found["status"] = str(hijack.hosts.patch("comfyui"))
    patchers = {"cast": load(quantized_sd), "kept": load(quantized_sd, **KEPT)}
    check_forwards(patchers, reference)
    patcher = patchers["kept"]
    check_size(patcher, quantized_sd)
    check_lora(patcher, dense, expected)
    check_forgetting(patcher, dense)
    check_saving(patcher, quantized_sd)
    del patchers
    check_unloading(patcher, large)


if __name__ == "__main__":
    torch.set_num_threads(1)  # for tensors this small, others would only wait
    with torch.inference_mode():  # as ComfyUI runs nodes
        main()
    print(json.dumps(found))
