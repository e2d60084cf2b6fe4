"""Run by tests in a fresh process: weights that stay on the CPU, input on a device.

Usage: offload_case.py COMFYUI FOLDER

The device is a double (see ``device_double``) that mixes with no CPU tensor, as on a
GPU. Prints one JSON object: the name of each check, and what was found.
"""

# ruff: noqa: E402 - ComfyUI is importable only once it is prepared
from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "comfyui"), str(HERE)]

import aimdo_double
import comfy_case as case  # prepares ComfyUI
import comfy_models
import device_double
from device_double import CPU, DEVICE

comfy = case.comfy
management = comfy.model_management
LORAS = {"small": 0.01, "large": 5.0}
found = {}


def output(patcher):
    """Three outputs for one input that is always the same; the last one counts."""
    device = patcher.load_device
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((1, 16, 1, 8, 8), generator=generator).to(device)
    context = torch.randn((1, 7, 192), generator=generator).to(device)
    for _ in range(3):
        step = torch.tensor([0.7]).to(device)
        made = patcher.model.apply_model(x, step, c_crossattn=context)
    return made.to(CPU)


def with_memory(patcher, memory):
    """The output with so many bytes of weights on the device."""
    management.unload_all_models()
    patcher.patch_model(patcher.load_device, lowvram_model_memory=memory)
    found.setdefault("loaded", {})[memory] = patcher.model.model_loaded_weight_memory
    made = output(patcher)
    patcher.unpatch_model(patcher.offload_device)
    return made


def check(patcher, dense, expected):
    """Everything, half and nothing on the device; with LoRAs of several sizes."""
    half = patcher.model_size() // 2
    amounts = {"all": 0, "half": half, "none": 1}  # 0 is no limit, to ComfyUI
    for name, memory in amounts.items():
        made = with_memory(patcher, memory)
        found[f"plain {name}"] = case.error(made, expected["plain"])
        for lora, amplitude in LORAS.items():
            changed = case.with_lora(patcher, case.lora(dense, amplitude))
            made = with_memory(changed, memory)
            found[f"{lora} {name}"] = case.error(made, expected[lora])
    patcher.patch_model(patcher.load_device)
    freed = patcher.partially_unload(CPU, half)
    found["partially unloaded"] = case.error(output(patcher), expected["plain"])
    found["freed"] = freed >= half
    changed = case.with_lora(patcher, case.lora(dense, LORAS["large"]))
    patcher.unpatch_model(CPU)
    changed.patch_model(changed.load_device)
    changed.partially_unload(CPU, half)
    found["lora partially unloaded"] = case.error(output(changed), expected["large"])
    changed.unpatch_model(CPU)


def check_merged(patcher, reference, other):
    """Merged with another model, whose weights ComfyUI has no room for on the device.

    Args:
        patcher: the model.
        reference: the output it has merged.
        other: the other model's state dict.
    """
    changed, second = patcher.clone(), case.load(other)
    for key, patch in second.get_key_patches("diffusion_model.").items():
        changed.add_patches({key: patch}, 0.3, 0.7)
    found["merged"], found["beyond plan"] = {}, {}
    for name, memory in {"all": 0, "none": 1}.items():
        before = bytes_on_device()
        changed.patch_model(changed.load_device, lowvram_model_memory=memory)
        found["merged"][name] = case.error(output(changed), reference)
        kept = bytes_on_device() - before
        found["beyond plan"][name] = kept - changed.model.model_loaded_weight_memory
        changed.unpatch_model(CPU)
    changed.detach()


def bytes_on_device():
    """How much memory the device's tensors take that anybody still holds."""
    gc.collect()
    held = [t for t in gc.get_objects() if type(t) is device_double.OnDevice]
    storages = [tensor.inner.untyped_storage() for tensor in held]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


def check_sizes(patcher, quantized_sd):
    """ComfyUI plans with the bytes of quantized data and scales, all of them."""
    network = patcher.model.diffusion_model.state_dict()
    others = patcher.model.model_sampling.state_dict()
    scales = [key for key in quantized_sd if key.endswith(".scale_weight")]
    found["sizes"] = [
        patcher.model_size(),
        sum(t.nbytes for t in [*network.values(), *others.values()]),
    ]
    found["scales counted"] = all(
        network[f"{key.removesuffix('.scale_weight')}.weight_scale"].nbytes
        == quantized_sd[key].nbytes
        for key in scales
    )


def left_on_device(model):
    """What of a model is on the device: parameters, buffers, and what layers keep."""
    names = [n for n, t in model.named_parameters() if t.device == DEVICE]
    names += [n for n, t in model.named_buffers() if t.device == DEVICE]
    for name, module in model.named_modules():
        if DEVICE in case.lora_copies(module):
            names.append(f"{name} LoRA")
    return names


def main():
    """All checks; what they found is printed as the last line."""
    import schemes.blockwise_fp8  # noqa: F401

    bf16 = comfy_models.make_state_dict(comfy_models.small_qwen_shapes())
    quantized_sd, _ = comfy_models.musubi(bf16)
    dense = case.exact(quantized_sd)
    reference = case.load(dense)
    expected = {"plain": with_memory(reference, 0)}
    for name, amplitude in LORAS.items():
        changed = case.with_lora(reference, case.lora(dense, amplitude))
        expected[name] = with_memory(changed, 0)
    other = {key: tensor.flip(0) for key, tensor in bf16.items()}
    merged, second = reference.clone(), case.load(other)
    for key, patch in second.get_key_patches("diffusion_model.").items():
        merged.add_patches({key: patch}, 0.3, 0.7)
    expected["merged"] = with_memory(merged, 0)
    del reference, changed, merged, second
    device_double.start()
    aimdo_double.prepare_cuda()
    management.get_torch_device = lambda: DEVICE
    management.vram_state = management.VRAMState.NORMAL_VRAM
    patcher = case.load(quantized_sd)
    found["device"] = str(patcher.load_device)
    check_sizes(patcher, quantized_sd)
    check(patcher, dense, expected)
    check_merged(patcher, expected["merged"], other)
    management.unload_all_models()
    gc.collect()
    found["left"] = left_on_device(patcher.model)


if __name__ == "__main__":
    torch.set_num_threads(1)  # for tensors this small, others would only wait
    with torch.inference_mode():  # as ComfyUI runs nodes
        main()
    print(json.dumps(found))
