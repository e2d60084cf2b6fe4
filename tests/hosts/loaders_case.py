"""Run by tests in a fresh process: text encoders, VAE, ControlNet, whole checkpoints.

Usage: loaders_case.py COMFYUI FOLDER

Prints one JSON object: the name of each check, and what was found. Files go to FOLDER.
"""

from __future__ import annotations

import json

import comfy_case
import torch
from comfy_case import FOLDER, FP8, PREFIX, comfy, comfy_models, error, exact, found
from loaders_files import (
    SIZES,
    Log,
    coded_vae,
    decode,
    encode,
    is_linear,
    load_clip,
    musubi,
    pooled,
    quantized,
    refusal,
    text_encoder,
    vae_weights,
)
from loaders_nets import check_controlnets, check_mixed, check_native_only
from safetensors.torch import load_file, save_file

# -- text encoders ---------------------------------------------------------------------


def check_text_encoders(files):
    """CLIPLoader and DualCLIPLoader, each architecture."""
    loads = {
        "clip_l": (("clip_l",), "STABLE_DIFFUSION"),
        "t5": (("t5",), "MOCHI"),
        "qwen": (("qwen",), "OMNIGEN2"),
        "dual": (("clip_l", "t5"), "FLUX"),
    }
    result = found["text encoders"] = {}
    for way, (names, kind) in loads.items():
        pairs = [musubi(files[name]) for name in names]
        clip = load_clip(*[quantized_sd for quantized_sd, _ in pairs], kind=kind)
        reference = load_clip(*[meant for _, meant in pairs], kind=kind)
        expected = sum(
            is_linear(k, t) for name in names for k, t in files[name].items()
        )
        result[way] = {
            "error": error(encode(clip), encode(reference)),
            "quantized": quantized(clip.cond_stage_model),
            "expected": expected,
        }
    return clip, reference


def check_plugin(dense):
    """A scheme of two methods reads a text encoder."""
    import test_detection

    import hijack

    scheme = test_detection.Int8()
    hijack.register(scheme)
    quantized_sd, meant = {}, {}
    for key, tensor in dense.items():
        quantized_sd[key] = meant[key] = tensor.float()
        if is_linear(key, tensor):
            quantized_sd[key], params = scheme.quantize(tensor)
            quantized_sd |= {f"{key[:-6]}{name}": t for name, t in params.items()}
            meant[key] = scheme.dequantize(quantized_sd[key], params, torch.float32)
    clips = [load_clip(file, kind="MOCHI") for file in (quantized_sd, meant)]
    found["plugin"] = {
        "error": error(*[encode(clip) for clip in clips]),
        "quantized": quantized(clips[0].cond_stage_model),
        "expected": sum(is_linear(k, t) for k, t in dense.items()),
    }
    hijack.unregister(scheme.name)


def check_encoder_dtypes(dense):
    """Layers that are not quantized get the dtypes they have in a dense file."""
    quantized_sd, _ = musubi(dense, is_linear, torch.bfloat16)
    ours = load_clip(quantized_sd, kind="MOCHI", dtype=None).cond_stage_model
    core = load_clip(dense, kind="MOCHI", dtype=None).cond_stage_model
    found["encoder dtypes"] = [
        key
        for (key, a), (_, b) in zip(
            ours.named_parameters(), core.named_parameters(), strict=True
        )
        if not is_linear(key, a) and a.dtype != b.dtype
    ]


def check_wrong_markers(dense):
    """ComfyUI's marker of a whole file is read through where it cannot be true."""
    quantized_sd, meant = musubi(dense)
    quantized_sd["scaled_fp8"] = torch.zeros(2, dtype=FP8)
    output = encode(load_clip(quantized_sd, kind="MOCHI"))
    found["wrong marker"] = error(output, encode(load_clip(meant, kind="MOCHI")))


def check_encoder_lora(clip, reference):
    """A LoRA on a text encoder takes effect, and leaves no trace when it is removed."""
    generator, made = torch.Generator().manual_seed(3), {}
    for layer, width in (("q_proj", 128), ("out_proj", 128)):
        name = f"lora_te1_text_model_encoder_layers_1_self_attn_{layer}"
        down = torch.randn(4, width, generator=generator)
        made[f"{name}.lora_down.weight"] = down
        made[f"{name}.lora_up.weight"] = torch.randn(128, 4, generator=generator) / 50
    load = comfy.sd.load_lora_for_models
    before, (_, cond) = encode(clip), pooled(clip)
    _, ours = load(None, clip, made, 1.0, 1.0)
    _, theirs = load(None, reference, made, 1.0, 1.0)
    _, expected = pooled(theirs)
    found["encoder lora"] = {
        "error": error(pooled(ours)[1], expected),
        "effect": error(expected, cond),
        "removed": torch.equal(encode(clip), before),
    }


def check_encoder_saving(clip):
    """The save node's file of a text encoder is quantized, and loads again."""
    tensors = {
        key.removeprefix("t5xxl.transformer."): tensor
        for key, tensor in clip.get_sd().items()
        if key.startswith("t5xxl.transformer.")
    }
    path = str(FOLDER / "saved-t5.safetensors")
    comfy.utils.save_torch_file(tensors, path)
    saved = load_file(path)
    output = encode(load_clip(saved, kind="MOCHI"))
    quantized_sd, meant = musubi(text_encoder("t5"))
    found["encoder saved"] = {
        "error": error(output, encode(load_clip(meant, kind="MOCHI"))),
        "quantized": sum(t.dtype == FP8 for t in saved.values()),
        "expected": sum(
            t.dtype == FP8 for k, t in quantized_sd.items() if "shared" not in k
        ),
    }


# -- whole checkpoints -----------------------------------------------------------------


def check_vae(quantized_sd, meant):
    """A VAE is decoded when it is loaded, and the log says so."""
    with Log() as log:
        vae = comfy.sd.VAE(sd=dict(quantized_sd))
    found["vae"] = {
        "error": error(decode(vae), decode(comfy.sd.VAE(sd=dict(meant)))),
        "log": [line for line in log.lines if "decoded" in line],
        "layers": sum(t.dtype == FP8 for t in quantized_sd.values()),
    }


def check_checkpoint(files, bf16, quantized_sd, meant):
    """CheckpointLoaderSimple: diffusion model, text encoders and VAE of one file."""
    clip_target = comfy.supported_models.Flux.clip_target
    comfy.supported_models.QwenImage.clip_target = clip_target  # its own is large
    parts = {
        PREFIX: comfy_models.musubi(bf16)[0],
        "text_encoders.clip_l.transformer.": musubi(files["clip_l"])[0],
        "text_encoders.t5xxl.transformer.": musubi(files["t5"])[0],
        "vae.": quantized_sd,
    }
    exactly = {
        PREFIX: exact(comfy_models.musubi(bf16)[0]),
        "text_encoders.clip_l.transformer.": musubi(files["clip_l"])[1],
        "text_encoders.t5xxl.transformer.": musubi(files["t5"])[1],
        "vae.": meant,
    }
    outputs = []
    for each in (parts, exactly):
        path = str(FOLDER / "checkpoint.safetensors")
        save_file({p + k: t for p, sd in each.items() for k, t in sd.items()}, path)
        model, clip, decoder, _ = comfy.sd.load_checkpoint_guess_config(
            path, te_model_options={**SIZES, "dtype": torch.float32}
        )
        outputs.append((comfy_case.first_output(model), *pooled(clip), decode(decoder)))
        if each is parts:
            found["checkpoint quantized"] = quantized(clip.cond_stage_model)
    found["checkpoint"] = {
        name: error(*pair)
        for name, *pair in zip(("model", "t5", "clip_l", "vae"), *outputs, strict=True)
    }


# -- errors, and what is not touched ---------------------------------------------------


def check_errors(files, broken_vae):
    """A damaged file is refused by name by each loader."""
    damaged, _ = musubi(files["t5"])
    layer = "encoder.block.1.layer.1.DenseReluDense.wo"
    damaged[f"{layer}.scale_weight"] = torch.ones(7, 3, 1)
    broken_vae["taesd_decoder.1.scale_weight"] = torch.ones(3, 5, 1)
    net = {"a.weight": torch.zeros(8, 128, dtype=FP8), "a.scale_weight": torch.ones(7)}
    net |= musubi({"b.weight": torch.ones(8, 128)})[0]
    load = comfy.controlnet.load_controlnet_state_dict
    found["refused"] = {
        "text encoder": refusal(lambda: load_clip(damaged, kind="MOCHI")),
        "vae": refusal(lambda: comfy.sd.VAE(sd=broken_vae)),
        "controlnet": refusal(lambda: load(net)),
    }


def check_own_operations(dense):
    """Loaders that bring operations of their own get the file as it is."""
    seen = {}

    class Linear(comfy.ops.manual_cast.Linear):
        def _load_from_state_dict(self, state_dict, prefix, *args):
            seen[prefix] = state_dict.get(f"{prefix}scale_weight")
            super()._load_from_state_dict(state_dict, prefix, *args)

    operations = type("Operations", (comfy.ops.manual_cast,), {"Linear": Linear})
    quantized_sd, _ = musubi(dense, is_linear)
    clip = load_clip(quantized_sd, kind="MOCHI", custom_operations=operations)
    found["own operations"] = {
        "scales": sum(scale is not None for scale in seen.values()),
        "expected": sum("scale_weight" in key for key in quantized_sd),
        "quantized": quantized(clip.cond_stage_model),
    }


def check_inertness(files, vae):
    """Plain files are loaded by ComfyUI's own hands, bit for bit."""
    import hijack.hosts

    def outputs():
        clip = load_clip(files["clip_l"], files["t5"], dtype=None)
        return clip, [*pooled(clip), decode(comfy.sd.VAE(sd=dict(vae)))]

    clip, ours = outputs()
    kinds = {type(module).__module__ for module in clip.cond_stage_model.modules()}
    hijack.hosts.unpatch(force=True)
    _, core = outputs()
    hijack.hosts.patch()
    found["inert"] = {
        "same": [torch.equal(a, b) for a, b in zip(ours, core, strict=True)],
        "classes": sorted(kind for kind in kinds if "hijack" in kind),
    }


def main():
    """All checks; what they found is printed as the last line."""
    import schemes.blockwise_fp8  # noqa: F401

    files = {name: text_encoder(name) for name in ("t5", "clip_l", "qwen")}
    bf16 = comfy_models.make_state_dict(comfy_models.small_qwen_shapes())
    vae = vae_weights()
    pair = coded_vae(vae)
    clip, reference = check_text_encoders(files)
    check_encoder_lora(clip, reference)
    check_encoder_saving(clip)
    check_plugin(files["t5"])
    check_encoder_dtypes(files["t5"])
    check_wrong_markers(files["t5"])
    check_vae(*pair)
    check_checkpoint(files, bf16, *pair)
    check_mixed(bf16, files["t5"])
    check_native_only(bf16)
    check_errors(files, dict(pair[0]))
    check_own_operations(files["t5"])
    check_inertness(files, vae)
    check_controlnets()  # last: they change what ComfyUI takes for SD 1.5


if __name__ == "__main__":
    torch.set_num_threads(1)  # for tensors this small, others would only wait
    with torch.inference_mode():  # as ComfyUI runs nodes
        main()
    print(json.dumps(found))
