"""Checkpoints for tests, written without hijack: they say what is right.

``python comfy_models.py COMFYUI FOLDER`` makes a small Qwen-Image of ComfyUI's own
class and writes it as it is, block-wise FP8 as musubi-tuner would write it, as int8
rows, and exactly dequantized.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

PREFIX = "model.diffusion_model."
FILES = ("bf16", "fp8", "exact", "fp8-prefixed", "int8", "exact-int8")
LARGEST = 448.0
#: Layers that are given another granularity than 1 x 64, so that each one is met.
PER_ROW = "transformer_blocks.0.attn.to_q.weight"
PER_TENSOR = "transformer_blocks.1.img_mlp.net.2.weight"


def is_quantized(key, tensor):
    """Which tensors musubi-tuner quantizes in a Qwen-Image."""
    return (
        "transformer_blocks" in key
        and key.endswith(".weight")
        and "norm" not in key
        and "time_text_embed" not in key
        and tensor.ndim == 2
    )


def quantize(weight, granularity):
    """Codes and scale, with the scale computed and kept in the weight's dtype."""
    n, k = weight.shape
    if granularity == "tensor":
        grouped = weight.reshape(1, 1, n * k)
    elif granularity == "row":
        grouped = weight.reshape(n, 1, k)
    else:
        grouped = weight.reshape(n, k // 64, 64)
    scale = (grouped.abs().amax(-1, keepdim=True) / LARGEST).clamp(min=1e-8)
    codes = (grouped.float() / scale.float()).clamp(-LARGEST, LARGEST)
    codes = codes.to(torch.float8_e4m3fn)
    dense = (codes.float() * scale.float()).reshape(n, k)  # float32 holds it exactly
    shape = {"tensor": (), "row": (n, 1)}.get(granularity, (n, k // 64, 1))
    return codes.reshape(n, k), scale.reshape(shape), dense


def musubi(state_dict):
    """The state dict as block-wise FP8, and with what that means in float32."""
    coded, exact = {}, {}
    for key, tensor in state_dict.items():
        coded[key] = exact[key] = tensor
        if is_quantized(key, tensor):
            special = {PER_ROW: "row", PER_TENSOR: "tensor"}
            granularity = special.get(key, "block")
            scale_key = key.replace(".weight", ".scale_weight")
            coded[key], coded[scale_key], exact[key] = quantize(tensor, granularity)
    return coded, exact


def int8_rows(state_dict):
    """The same layers as int8 codes with one scale a row, and what that means."""
    coded, exact = {}, {}
    for key, tensor in state_dict.items():
        coded[key] = exact[key] = tensor
        if is_quantized(key, tensor):
            scale = tensor.float().abs().amax(1, keepdim=True) / 127
            codes = (tensor.float() / scale).round().to(torch.int8)
            coded[key], coded[f"{key}_scale"] = codes, scale
            exact[key] = codes.float() * scale
    return coded, exact


def make_state_dict(shapes):
    """Random bfloat16 tensors whose sizes keep a random network in range."""
    generator = torch.Generator().manual_seed(7)
    state_dict = {}
    for key, shape in shapes.items():
        tensor = torch.randn(shape, generator=generator)
        if len(shape) > 1:
            tensor *= shape[1] ** -0.5
        elif key.endswith("weight"):
            tensor = 1 + tensor / 10
        else:
            tensor /= 10
        state_dict[key] = tensor.to(torch.bfloat16)
    return state_dict


def write_files(shapes, folder):
    """Write every file of `FILES`."""
    dense = make_state_dict(shapes)
    coded, exact = musubi(dense)
    int8, exact_int8 = int8_rows(dense)
    files = {"bf16": dense, "fp8": coded, "exact": exact}
    for name, tensors in (files | {"int8": int8, "exact-int8": exact_int8}).items():
        save_file(tensors, Path(folder) / f"{name}.safetensors")
        if f"{name}-prefixed" in FILES:
            prefixed = {PREFIX + key: tensor for key, tensor in tensors.items()}
            save_file(prefixed, Path(folder) / f"{name}-prefixed.safetensors")


def small_qwen_shapes():
    """Key to shape of a Qwen-Image of 2 layers and width 256."""
    import comfy.ldm.qwen_image.model as qwen
    import comfy.ops

    model = qwen.QwenImageTransformer2DModel(
        in_channels=64,
        num_layers=2,
        attention_head_dim=128,
        num_attention_heads=2,
        joint_attention_dim=192,
        device="meta",
        dtype=torch.bfloat16,
        operations=comfy.ops.manual_cast,
    )
    return {key: tuple(t.shape) for key, t in model.state_dict().items()}


if __name__ == "__main__":
    import launch

    _, root, folder = sys.argv
    launch.prepare(root)
    write_files(small_qwen_shapes(), folder)
