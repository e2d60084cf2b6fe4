"""Run by tests in a fresh process: models that are quantized inside ComfyUI.

Usage: online_case.py COMFYUI FOLDER

Prints one JSON object: the name of each check, and what was found.
"""

# ruff: noqa: TID253 - ComfyUI is importable only once it is prepared
from __future__ import annotations

import gc
import json
import os
import weakref

import comfy_case  # prepares ComfyUI, so it comes first  # isort: skip
import comfy.lora
import comfy.model_management
import comfy.sd
import comfy_models
import torch
from comfy_case import (
    error,
    first_output,
    layer,
    load,
    lora,
    quantized,
    same,
    snapshot,
    with_lora,
)
from safetensors.torch import save_file

found = {}


def merged(patcher, tensors):
    """The tensors with a patcher's LoRAs added, in float32, by ComfyUI's own code."""
    made = {}
    for key, tensor in tensors.items():
        patches = patcher.patches.get(f"diffusion_model.{key}", [])
        dense = tensor.float()
        made[key] = comfy.lora.calculate_weight(patches, dense.clone(), key)
    return made


def check_loras(dense, tensors, config, online):
    """LoRA then quantize, quantize then LoRA, and one of each."""
    first, second = lora(tensors, 0.5), lora(tensors, 5.0)
    changed = with_lora(dense, first)
    meant = quantized(merged(changed, tensors), config)
    plain = quantized({k: t.float() for k, t in tensors.items()}, config)
    made = online.quantize_model(changed, config)
    exact = load(meant)
    found["lora then quantize"] = error(first_output(made), first_output(exact))
    found["patches gone"] = not made.patches
    ours = first_output(with_lora(made, second))
    found["and another"] = error(ours, first_output(with_lora(exact, second)))
    after = with_lora(online.quantize_model(dense, config), first)
    expected = first_output(with_lora(load(plain), first))
    found["quantize then lora"] = error(first_output(after), expected)


def check_patcher(dense, made):
    """The result is a ModelPatcher like one loaded from a file."""
    found["dtypes"] = [
        str(made.model.get_dtype()) == str(dense.model.get_dtype()),
        str(made.model.manual_cast_dtype) == str(dense.model.manual_cast_dtype),
    ]
    found["sizes"] = [made.model_size(), dense.model_size()]
    found["devices"] = [
        made.load_device == dense.load_device,
        made.offload_device == dense.offload_device,
    ]
    clone = made.clone()
    found["clone"] = clone.is_clone(made) and not made.is_clone(dense)
    found["options kept"] = made.model_options.get("hijack_test") == [1]
    found["object patches"] = [
        made.get_model_object("model_sampling") == "another sampling",
        "diffusion_model.forward" not in made.object_patches,
    ]
    layers = [m for m in made.model.modules() if type(m).__name__ == "QuantizedLinear"]
    found["layers"] = len(layers)


def check_again(made, config, online):
    """Quantizing a quantized model again changes nothing; saved, it loads."""
    twice = online.quantize_model(made, config)
    found["again"] = error(first_output(twice), first_output(made))
    path = str(comfy_case.FOLDER / "online.safetensors")
    comfy.sd.save_checkpoint(path, made)
    back = comfy.sd.load_diffusion_model(path)
    found["saved"] = error(first_output(back), first_output(made))
    found["saved weights"] = same(snapshot(back), snapshot(made))


def check_progress(dense, config, online):
    """Progress counts every layer once; an interruption leaves the original alone."""
    steps = []
    online.quantize_model(dense, config, progress=lambda *done: steps.append(done))
    counts = [(done, total) for done, total, _ in steps]
    found["progress"] = counts == [(n + 1, len(steps)) for n in range(len(steps))]
    before = snapshot(dense)

    def interrupt(*done):
        raise KeyboardInterrupt

    try:
        online.quantize_model(dense, config, progress=interrupt)
    except KeyboardInterrupt:
        found["interrupted"] = same(snapshot(dense), before)
    try:
        online.quantize_model(dense, config, include="no.such.layer")
    except Exception as caught:
        found["nothing chosen"] = f"{type(caught).__name__}: {caught}"


def check_sampling(tensors, config, online):
    """A branch of the workflow has another sampling than the one that is quantized."""
    import comfy.model_sampling as sampling

    class Sampling(sampling.ModelSamplingDiscreteFlow, sampling.CONST):
        pass

    dense = load(tensors)
    clean = dense.model.model_sampling.sigmas.clone()
    branch = dense.clone()
    shifted = Sampling(branch.model.model_config)
    shifted.set_parameters(shift=9.0)
    branch.add_object_patch("model_sampling", shifted)
    comfy.model_management.load_models_gpu([branch])
    made = online.quantize_model(dense, config)
    found["sampling"] = [
        torch.equal(dense.model.model_sampling.sigmas, shifted.sigmas),
        torch.equal(made.model.model_sampling.sigmas, clean),
    ]


def check_bypass(dense, tensors, config, online):
    """A LoRA in bypass mode is refused before the model, and works after it."""
    load_bypass = getattr(comfy.sd, "load_bypass_lora_for_models", None)
    if load_bypass is None:
        return
    made = lora(tensors, 2.0)
    try:
        online.quantize_model(load_bypass(dense, None, made, 1.0, 0)[0], config)
    except Exception as caught:
        found["bypass"] = f"{type(caught).__name__}: {caught}"
    quantized = online.quantize_model(dense, config)
    expected = first_output(with_lora(quantized, made))
    after = load_bypass(quantized, None, made, 1.0, 0)[0]
    found["bypass after"] = error(first_output(after), expected)


def check_native(tensors, config, online):
    """ComfyUI's own scaled FP8, with scales of inputs, is quantized like any other."""
    file, meant = {"scaled_fp8": torch.empty(2, dtype=comfy_case.FP8)}, {}
    for key, tensor in tensors.items():
        file[key] = tensor
        if comfy_models.is_quantized(key, tensor):
            layer_name = key.removesuffix(".weight")
            scale = tensor.float().abs().max() / 448
            file[key] = (tensor.float() / scale).to(comfy_case.FP8)
            file[f"{layer_name}.scale_weight"] = scale
            file[f"{layer_name}.scale_input"] = torch.tensor(1.0)
            meant[key] = file[key].float() * scale
    made = online.quantize_model(load(file, fp8_optimizations=True), config)
    key = f"{comfy_case.LAYER}.weight"
    weight = online.read_weight(made, f"diffusion_model.{key}")
    from hijack.hosts.comfyui.lazy_tensor import quantize_layer

    expected = quantize_layer(config, meant[key], key).dense(torch.float32)
    found["native"] = error(weight, expected)
    found["native works"] = bool(first_output(made).isfinite().all())


def check_memory(tensors, config, online):
    """The original model goes when nothing but the quantized one is left."""
    dense = load(tensors)
    original = weakref.ref(dense.model)
    made = online.quantize_model(with_lora(dense, lora(tensors, 0.5)), config)
    first_output(made)
    del dense
    comfy.model_management.unload_all_models()
    gc.collect()
    found["original gone"] = original() is None
    found["still works"] = bool(first_output(made).isfinite().all())


def check_replaced(tensors, config, online):
    """A file that is replaced or written to while it is read gives no model."""
    dense = {key: tensor.contiguous() for key, tensor in tensors.items()}
    other = {key: tensor.flip(0).contiguous() for key, tensor in dense.items()}
    path, spare = (comfy_case.FOLDER / f"{name}.safetensors" for name in "ab")

    def replace():
        save_file(other, spare)
        os.replace(spare, path)

    def cut():
        os.truncate(path, 8)

    for name, change in (("replaced", replace), ("cut", cut)):
        save_file(dense, path)

        def progress(done, *_, change=change):
            if done == 3:
                change()

        try:
            online.load_quantized(str(path), config, progress=progress)
        except Exception as caught:
            found[name] = f"{type(caught).__name__}: {caught}"
    save_file(dense, path)
    kept = online.load_quantized(str(path), config)
    plain = online.quantize_model(load(tensors), config)
    found["kept"] = error(first_output(kept), first_output(plain))


def main():
    """All checks; what they found is printed as the last line."""
    import hijack
    import schemes.blockwise_fp8  # noqa: F401
    from hijack.hosts.comfyui import quantize as online
    from hijack.quantized import QuantizationConfig

    config = QuantizationConfig.of(
        hijack.schemes()["blockwise_fp8"], {"block_size": (1, 64)}
    )
    tensors = comfy_models.make_state_dict(comfy_models.small_qwen_shapes())
    dense = load(tensors)
    before = first_output(dense)
    check_loras(dense, tensors, config, online)
    check_progress(dense, config, online)
    found["original untouched"] = torch.equal(first_output(dense), before)
    plain = online.quantize_model(dense, config)
    found["class"] = type(layer(plain)).__name__
    check_again(plain, config, online)
    changed = dense.clone()
    changed.model_options["hijack_test"] = [1]
    changed.add_object_patch("model_sampling", "another sampling")
    changed.add_object_patch("diffusion_model.forward", "of the other model")
    check_patcher(dense, online.quantize_model(changed, config))
    check_memory(tensors, config, online)
    check_sampling(tensors, config, online)
    check_bypass(dense, tensors, config, online)
    check_native(tensors, config, online)
    check_replaced(tensors, config, online)


if __name__ == "__main__":
    torch.set_num_threads(1)  # for tensors this small, others would only wait
    with torch.inference_mode():  # as ComfyUI runs nodes
        main()
    print(json.dumps(found))
