"""Checks for `loaders_case`: ControlNets, and ComfyUI's own layers beside ours."""

# ruff: noqa: TID253 - ComfyUI is importable only once it is prepared
from __future__ import annotations

import comfy_case
import torch
from comfy_case import comfy, comfy_models, error, found
from loaders_files import (
    encode,
    is_linear,
    is_to_k,
    load_clip,
    mixed_files,
    musubi,
    quantized,
    refusal,
)

# isort: split

import comfy.cldm.cldm
import comfy.controlnet
import comfy.ldm.qwen_image.controlnet

#: ComfyUI's formats; releases have more and more of them.
KINDS = ("float8_e4m3fn", "mxfp8", "nvfp4", "int8_tensorwise")


# -- ControlNets -----------------------------------------------------------------------


def check_controlnets():
    """Each kind of ControlNet there is."""
    check_controlnet()
    check_control_lora()
    check_old_controlnet()


def check_controlnet():
    """A ControlNet's layers stay quantized; others have the dtypes of a dense one."""
    config = {
        "attention_head_dim": 128,
        "num_attention_heads": 2,
        "joint_attention_dim": 192,
    }
    made = comfy.ldm.qwen_image.controlnet.QwenImageControlNetModel(
        in_channels=64,
        num_layers=1,
        dtype=torch.bfloat16,
        device="meta",
        operations=comfy.ops.manual_cast,
        **config,
    )
    shapes = {key: tuple(t.shape) for key, t in made.state_dict().items()}
    dense = comfy_models.make_state_dict(shapes)
    quantized_sd, meant = musubi(dense, is_linear, torch.bfloat16)
    load = comfy.controlnet.load_controlnet_state_dict
    ours, exactly, core = load(dict(quantized_sd)), load(dict(meant)), load(dict(dense))
    found["controlnet"] = {
        "error": error(control(ours), control(exactly)),
        "quantized": quantized(ours.control_model),
        "expected": sum(is_linear(k, t) for k, t in dense.items()),
        "dtypes": [
            key
            for (key, a), (_, b) in zip(
                ours.control_model.named_parameters(),
                core.control_model.named_parameters(),
                strict=True,
            )
            if not is_linear(key, a) and a.dtype != b.dtype
        ],
    }


def control(net):
    """A ControlNet's output for fixed inputs, computed in float32."""
    generator = torch.Generator().manual_seed(6)
    x, hint = torch.randn(2, 1, 16, 1, 8, 8, generator=generator)
    context = torch.randn(1, 7, 192, generator=generator)
    out = net.control_model(x, torch.tensor([0.7]), context, hint=hint)["input"]
    return torch.cat([tensor.flatten() for tensor in out[:1]])


def check_old_controlnet():
    """A ControlNet of Stable Diffusion's kind, with and without ComfyUI's prefix."""
    unet = {
        "image_size": 32,
        "in_channels": 4,
        "model_channels": 32,
        "num_res_blocks": [1, 1],
        "channel_mult": [1, 2],
        "transformer_depth": [1, 1],
        "transformer_depth_middle": 1,
        "context_dim": 64,
        "num_heads": 2,
        "use_spatial_transformer": True,
        "legacy": False,
    }
    sizes = {"context_dim": 64, "model_channels": 32, "adm_in_channels": None}
    comfy.supported_models.SD15.unet_config = sizes
    comfy.supported_models.SD15.unet_extra_config = {"num_heads": 2}
    made = comfy.cldm.cldm.ControlNet(
        hint_channels=3, device="meta", operations=comfy.ops.manual_cast, **unet
    )
    shapes = {key: tuple(t.shape) for key, t in made.state_dict().items()}
    quantized_sd, meant = musubi(comfy_models.make_state_dict(shapes), is_linear)
    result = found["old controlnet"] = {}
    for prefix in ("", "control_model."):
        nets = [
            comfy.controlnet.load_controlnet_state_dict(
                {prefix + key: tensor for key, tensor in state_dict.items()}
            )
            for state_dict in (quantized_sd, meant)
        ]
        result[prefix] = error(*[old_control(net) for net in nets])
        result[f"{prefix} quantized"] = quantized(nets[0].control_model)
    result["expected"] = sum(is_linear(k, t) for k, t in meant.items())


def old_control(net):
    """A Stable Diffusion ControlNet's output for fixed inputs."""
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(1, 4, 8, 8, generator=generator)
    hint = torch.randn(1, 3, 64, 64, generator=generator)
    context = torch.randn(1, 7, 64, generator=generator)
    out = net.control_model(x, hint, torch.tensor([7.0]), context)
    return torch.cat([tensor.flatten() for tensor in (*out["middle"], *out["output"])])


def check_control_lora():
    """ComfyUI does arithmetic with a control LoRA's weights, which are thus decoded."""
    quantized_sd, meant = musubi({"a.weight": torch.randn(8, 128).bfloat16()})
    quantized_sd["lora_controlnet"] = torch.zeros(1)
    made = comfy.controlnet.load_controlnet_state_dict(quantized_sd)
    weight = made.control_weights["a.weight"]
    found["control lora"] = torch.equal(weight, meant["a.weight"])


# -- ComfyUI's own quantized layers beside ours ----------------------------------------


def check_mixed(bf16, dense_t5):
    """Native layers are ComfyUI's, ours are ours, and both are exact."""
    result = found["mixed"] = {}
    bf16 = {k: t for k, t in bf16.items() if "transformer_blocks.1." not in k}
    if not hasattr(comfy.utils, "convert_old_quants"):
        check_mixed_refused(bf16)
        return
    chosen = comfy_models.is_quantized
    found["mixed kinds"] = [k for k in KINDS if k in comfy.quant_ops.QUANT_ALGOS]
    for kind in found["mixed kinds"]:
        files = mixed_files(bf16, kind, chosen, ("to_k", "img_mlp"))
        mixed, reference = [comfy_case.load(dict(file)) for file in files]
        network = mixed.model.diffusion_model
        theirs = network.transformer_blocks[0].attn.to_k
        result[kind] = {
            "error": error(
                comfy_case.first_output(mixed), comfy_case.first_output(reference)
            ),
            "native": f"{type(theirs).__name__} {getattr(theirs, 'quant_format', '')}",
            "quantized": quantized(network),
            "expected": sum(".scale_weight" in k for k in files[0]),
        }
    files = mixed_files(dense_t5, "float8_e4m3fn", is_linear, (".k.", ".wo."))
    clips = [load_clip(file, kind="MOCHI") for file in files]
    found["mixed text encoder"] = {
        "error": error(*[encode(clip) for clip in clips]),
        "quantized": quantized(clips[0].cond_stage_model),
        "expected": sum(".scale_weight" in k for k in files[0]),
    }


def check_mixed_refused(bf16):
    """What neither an old ComfyUI nor hijack reads beside our layers is refused."""
    quantized_sd, _ = comfy_models.musubi(bf16)
    text = b'{"format": "awq_w4a16"}'
    layer = "transformer_blocks.0.attn.to_k"
    del quantized_sd[f"{layer}.scale_weight"]
    quantized_sd[f"{layer}.weight"] = quantized_sd[f"{layer}.weight"].view(torch.int8)
    quantized_sd[f"{layer}.weight_scale"] = torch.tensor(1.0)
    quantized_sd[f"{layer}.comfy_quant"] = torch.tensor(list(text)).byte()
    found["mixed refused"] = refusal(lambda: comfy_case.load(quantized_sd))


def check_native_only(bf16):
    """A file of native layers alone is loaded as if hijack were not there."""
    if not hasattr(comfy.utils, "convert_old_quants"):
        return
    import hijack.hosts

    file, _ = mixed_files(bf16, "float8_e4m3fn", is_to_k, ("to_k",))
    ours = comfy_case.load(dict(file))
    output, config = comfy_case.first_output(ours), vars(ours.model.model_config)
    hijack.hosts.unpatch(force=True)
    core = comfy_case.first_output(comfy_case.load(dict(file)))
    hijack.hosts.patch()
    found["native only"] = {
        "same": torch.equal(output, core),
        "config": "set_inference_dtype" not in config,
    }
