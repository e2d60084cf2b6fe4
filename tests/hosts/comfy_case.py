"""Run by tests in a fresh process: what hijack does inside one real ComfyUI.

Usage: comfy_case.py COMFYUI FOLDER [--ARGUMENT-OF-COMFYUI ...]

Prints one JSON object: the name of each check, and what was found. Files go to FOLDER.
"""

# ruff: noqa: E402, TID253 - ComfyUI is importable only once it is prepared
from __future__ import annotations

import contextlib
import copy
import inspect
import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "comfyui"), str(HERE)]

import comfy_models
import launch
from safetensors.torch import load_file, save_file

ROOT, FOLDER = sys.argv[1], Path(sys.argv[2])
launch.prepare(ROOT, *(a for a in sys.argv[3:] if a.startswith("--")))

import comfy.model_detection
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.supported_models
import comfy.utils

comfy.supported_models.QwenImage.unet_extra_config = {
    "num_attention_heads": 2,
    "joint_attention_dim": 192,
}
ORIGINAL = comfy.model_detection.model_config_from_unet
FP8 = torch.float8_e4m3fn
PREFIX = "model.diffusion_model."
LAYER = "transformer_blocks.0.attn.to_q"
found = {}


# -- files -----------------------------------------------------------------------------


def exact(quantized_sd):
    """What musubi files mean, in float32: the product of data and scales."""
    dense = {}
    for key, tensor in quantized_sd.items():
        scale = quantized_sd.get(key.replace(".weight", ".scale_weight"))
        if key.endswith(".scale_weight"):
            continue
        if scale is not None and scale is not tensor:
            n, k = tensor.shape
            blocks = scale.shape[1] if scale.ndim > 1 else 1
            grid = scale.float().reshape(-1, blocks, 1)
            tensor = (tensor.float().view(n, blocks, -1) * grid).view(n, k)
        dense[key] = tensor
    return dense


def with_scheme(dense, scheme, **options):
    """The file of an author's scheme, what it means, and its marker."""
    from hijack.formats.matching import marker_of
    from hijack.quantized import QuantizationConfig, QuantizedTensor

    quantized_sd, meant, marked = {}, {}, {}
    config = QuantizationConfig.of(scheme, options, "hijack")
    for key, tensor in dense.items():
        quantized_sd[key] = meant[key] = tensor
        shape = tuple(tensor.shape)
        if not comfy_models.is_quantized(key, tensor):
            continue
        if scheme.declines(shape, **options) is None:
            made = scheme.quantize(tensor.float(), **options)
            weight = QuantizedTensor(*made, config, shape, torch.float32)
            layer = key.removesuffix(".weight")
            quantized_sd |= {
                f"{layer}.{n}": t for n, t in weight.plain_tensors().items()
            }
            meant[key] = weight.dense(torch.float32)
            marked[layer] = marker_of(weight)
    return quantized_sd, meant, marked


# -- ComfyUI ---------------------------------------------------------------------------


def quantized(tensors, config):
    """What the layers that are usually quantized stand for once they are."""
    from hijack.hosts.comfyui.lazy_tensor import quantize_layer
    from hijack.safetensors_io.header import Header
    from hijack.selection import choose

    made = dict(tensors)
    for name in choose(Header.from_state_dict(tensors), (torch.nn.Linear,)).layers:
        key = f"{name}.weight"
        made[key] = quantize_layer(config, tensors[key], key).dense(torch.float32)
    return made


def load(state_dict, prefix="", **options):
    """A ModelPatcher of ComfyUI's own loader of diffusion models."""
    tensors = {prefix + key: tensor for key, tensor in state_dict.items()}
    return comfy.sd.load_diffusion_model_state_dict(tensors, model_options=options)


def first_output(patcher, memory=None):
    """The network's first output, with ``memory`` bytes for weights or no limit."""
    if memory is None:
        comfy.model_management.load_models_gpu([patcher])
    else:
        comfy.model_management.unload_all_models()
        patcher.partially_load(torch.device("cpu"), memory)
    return output(patcher)


def output(patcher):
    """The network's first output, with weights as they are loaded."""
    generator = torch.Generator().manual_seed(1)
    two = getattr(patcher.model.latent_format, "latent_dimensions", 2) == 2
    x = torch.randn((1, 16, 8, 8) if two else (1, 16, 1, 8, 8), generator=generator)
    context = torch.randn((1, 7, 192), generator=generator)
    return patcher.model.apply_model(x, torch.tensor([0.7]), c_crossattn=context)


def error(actual, expected):
    """Relative L2 distance."""
    return float((actual - expected).norm() / expected.norm())


def layer(patcher):
    """One quantized layer."""
    return patcher.get_model_object(f"diffusion_model.{LAYER}")


def lora(state_dict, amplitude, layers=2):
    """A LoRA for a few layers, of that size relative to their weights."""
    generator, made = torch.Generator().manual_seed(3), {}
    for name in (LAYER, f"transformer_blocks.{layers - 1}.attn.to_out.0"):
        weight = state_dict[f"{name}.weight"].float()
        down = torch.randn(4, weight.shape[1], generator=generator)
        up = torch.randn(weight.shape[0], 4, generator=generator)
        up *= amplitude * weight.norm() / (up @ down).norm()
        made[f"diffusion_model.{name}.lora_A.weight"] = down
        made[f"diffusion_model.{name}.lora_B.weight"] = up
    return made


def lora_copies(module):
    """Devices of what a quantized layer's LoRAs keep for the next forward."""
    functions = [
        *getattr(module, "weight_function", ()),
        getattr(module, "_deferred_patch", None),
        getattr(module, "_visible_patch", None),
    ]
    kept = [getattr(function, "hijack_patches", None) for function in functions]
    kept += getattr(module, "_weight_patches", ())
    return {
        device
        for patches in kept
        if patches is not None
        for device in (*patches._moved, *(device for device, _ in patches._ready))
    }


def with_lora(patcher, made):
    """A clone with the LoRA, as the LoRA loader node makes it."""
    return comfy.sd.load_lora_for_models(patcher, None, made, 1.0, 0)[0]


def snapshot(patcher):
    """The model's state dict, as bytes that can be compared bit for bit."""
    state_dict = patcher.model.diffusion_model.state_dict()
    return {k: t.clone().contiguous() for k, t in state_dict.items()}


def same(a, b):
    """Whether two state dicts are bit-identical."""
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype
        and a[k].shape == b[k].shape
        and torch.equal(
            a[k].reshape(-1).view(torch.uint8), b[k].reshape(-1).view(torch.uint8)
        )
        for k in a
    )


# -- checks ----------------------------------------------------------------------------


def check_loading(quantized_sd, dense, reference):
    """Every way in: prefix, weight_dtype, checkpoint loader, a marker that is wrong."""
    ways = {
        "plain": load(quantized_sd),
        "prefixed": load(quantized_sd, PREFIX),
        "weight_dtype fp8": load(quantized_sd, dtype=FP8),
        "weight_dtype fp8 fast": load(quantized_sd, dtype=FP8, fp8_optimizations=True),
        "wrong marker": load({**quantized_sd, "scaled_fp8": torch.empty(0, dtype=FP8)}),
        "wrong marker prefixed": load(
            {**quantized_sd, "scaled_fp8": torch.empty(2, dtype=FP8)}, PREFIX
        ),
        "checkpoint": comfy.sd.load_state_dict_guess_config(
            {PREFIX + key: tensor for key, tensor in quantized_sd.items()},
            output_vae=False,
            output_clip=False,
        )[0],
    }
    found["errors"] = {n: error(first_output(p), reference) for n, p in ways.items()}
    dense_dtypes = {k: t.dtype for k, t in snapshot(load(dense)).items()}
    ours = {k: t.dtype for k, t in snapshot(ways["weight_dtype fp8"]).items()}
    found["other dtypes"] = [
        k
        for k in dense
        if k not in quantized_sd or quantized_sd[k] is dense[k]
        if ours[k] != dense_dtypes[k]
    ]
    found["carrier"] = type(layer(ways["plain"]).weight).__name__
    return ways["plain"]


def check_schemes(dense):
    """A scheme of two methods, whose data may be narrower than the weight."""
    import test_detection

    import hijack

    found["schemes"] = {}
    for scheme in (test_detection.Int8(), test_detection.Nibbles()):
        hijack.default_registry().register(scheme)
        quantized_sd, meant, marked = with_scheme(dense, scheme)
        metadata = {"hijack": hijack.formats.native_marker.write_marker(marked)}
        reference = first_output(load(meant))
        for prefix in ("", PREFIX):
            path = FOLDER / f"{scheme.name}-{len(prefix)}.safetensors"
            named = {prefix + key: t.contiguous() for key, t in quantized_sd.items()}
            layers = {prefix + layer: entry for layer, entry in marked.items()}
            marker = hijack.formats.native_marker.write_marker(layers)
            save_file(named, path, {"hijack": marker})
            output = first_output(comfy.sd.load_diffusion_model(str(path)))
            found["schemes"][f"{scheme.name} {prefix}"] = error(output, reference)
        loader = comfy.sd.load_diffusion_model_state_dict
        if "metadata" in inspect.signature(loader).parameters:
            output = first_output(loader(quantized_sd, metadata=metadata))
            found["schemes"][f"{scheme.name} from memory"] = error(output, reference)


def check_lora(patcher, quantized_sd, dense, reference):
    """A LoRA takes effect, also in low VRAM, and leaves no trace when it is removed."""
    before, clean = snapshot(patcher), first_output(patcher)
    for name, amplitude in (("small", 0.05), ("large", 5.0)):
        made = lora(dense, amplitude)
        expected = first_output(with_lora(load(dense), made))
        changed = with_lora(patcher, made)
        found[f"lora {name}"] = error(first_output(changed), expected)
        found[f"lora {name} low vram"] = error(first_output(changed, 1000), expected)
    changed.detach()
    found["lora removed"] = torch.equal(first_output(patcher), clean)
    found["weights restored"] = same(snapshot(patcher), before)
    found["low vram"] = error(first_output(patcher, 1000), reference)
    patcher.detach()


def check_saving(patcher, quantized_sd, reference):
    """ModelSave's file holds the layers as they came, and loads again."""
    path = str(FOLDER / "saved.safetensors")
    comfy.sd.save_checkpoint(path, patcher)
    saved = load_file(path)
    cut = {key.removeprefix(PREFIX): tensor for key, tensor in saved.items()}
    claimed = {k for k in quantized_sd if "scale_weight" in k}
    claimed |= {k.replace("scale_weight", "weight") for k in claimed}
    found["saved"] = cut.keys() == quantized_sd.keys() and same(
        {k: cut[k] for k in claimed}, {k: quantized_sd[k] for k in claimed}
    )
    again = comfy.sd.load_diffusion_model(path)
    found["saved and loaded"] = error(first_output(again), reference)


def check_inertness(bf16):
    """With hijack on, a model of ordinary weights is built by ComfyUI's own hands."""
    import hijack.hosts

    with_hijack = load(bf16)
    output = first_output(with_hijack)
    config = vars(with_hijack.model.model_config)
    found["config untouched"] = "set_inference_dtype" not in config
    hijack.hosts.unpatch(force=True)
    found["inert"] = torch.equal(output, first_output(load(bf16)))
    hijack.hosts.patch()


def check_errors(quantized_sd):
    """A file that cannot be right is refused with a sentence, before it is built."""
    bad = dict(quantized_sd)
    bad[f"{LAYER}.scale_weight"] = torch.ones(7, 3, 1, dtype=torch.bfloat16)
    try:
        load(bad)
    except Exception as caught:
        found["refused"] = f"{type(caught).__name__}: {caught}"


def check_modules():
    """A Linear stays quantized through copies and casts; an Embedding is decoded."""
    import test_detection

    from hijack.hosts.comfyui.operations import make_operations
    from hijack.quantized import QuantizationConfig, QuantizedTensor

    scheme, dense_ops = test_detection.Int8(), comfy.ops.disable_weight_init
    operations = make_operations(dense_ops, torch.float32)
    qdata, params = scheme.quantize(torch.randn(4, 16))
    weight = QuantizedTensor(qdata, params, QuantizationConfig.of(scheme, {}, "hijack"))
    dense, bias = weight.dense(torch.float32), torch.randn(4)
    linear = operations.Linear(16, 4, dtype=torch.float32)
    linear.load_state_dict({"weight": weight, "bias": bias})
    embedding = operations.Embedding(4, 16, dtype=torch.float32)
    embedding.load_state_dict({"weight": weight})
    x = torch.randn(3, 16)
    expected = torch.nn.functional.linear(x, dense, bias)
    found["modules"] = {
        "linear": torch.equal(linear(x), expected),
        "copy": torch.equal(copy.deepcopy(linear)(x), expected),
        "embedding": torch.equal(embedding.weight, dense),
        "embedding class": type(embedding) is dense_ops.Embedding,
    }
    low = linear.to(torch.bfloat16)  # the bias is cast, quantized data is not
    expected = torch.nn.functional.linear(
        x.bfloat16(), weight.dense(torch.bfloat16), bias.bfloat16()
    )
    found["modules"]["cast"] = torch.equal(low(x.bfloat16()), expected)
    state_dict = low.state_dict()
    found["modules"]["quantized data"] = torch.equal(
        state_dict["weight"], qdata
    ) and torch.equal(state_dict["weight_scale"], params["weight_scale"])
    low.load_state_dict({"weight": dense, "bias": bias})
    found["modules"]["dense again"] = type(low) is dense_ops.Linear


def check_unpatching(patcher, reference):
    """Unpatching refuses while the model lives; forced, the model goes on working."""
    import hijack.hosts

    try:
        hijack.hosts.unpatch()
    except hijack.HijackError as caught:
        found["unpatch refused"] = str(caught)
    hijack.hosts.unpatch(force=True)
    found["restored"] = comfy.model_detection.model_config_from_unet is ORIGINAL
    found["works unpatched"] = error(first_output(patcher), reference)


def main():
    """All checks; what they found is printed as the last line."""
    bf16 = comfy_models.make_state_dict(comfy_models.small_qwen_shapes())
    quantized_sd, _ = comfy_models.musubi(bf16)
    dense = exact(quantized_sd)
    reference = first_output(load(dense))
    with contextlib.suppress(Exception):
        found["without hijack"] = error(first_output(load(quantized_sd)), reference)

    import hijack.hosts
    import schemes.blockwise_fp8  # noqa: F401

    found["status"] = str(hijack.hosts.patch("comfyui"))
    patcher = check_loading(quantized_sd, dense, reference)
    check_lora(patcher, quantized_sd, dense, reference)
    check_saving(patcher, quantized_sd, reference)
    check_schemes(bf16)
    check_inertness(bf16)
    check_errors(quantized_sd)
    check_modules()
    check_unpatching(patcher, reference)


if __name__ == "__main__":
    with torch.inference_mode():  # as ComfyUI runs nodes
        main()
    print(json.dumps(found))
