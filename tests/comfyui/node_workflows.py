"""Workflows with hijack's nodes, in the form the server takes, and LoRAs for them."""

import comfy_harness
import torch
from safetensors.torch import load_file, save_file

#: Names of the LoRA files that `write_loras` makes.
LORAS = ("one", "two")
LAYERS = ("attn.to_q", "img_mlp.net.2", "txt_mlp.net.0.proj")


def write_loras(models, folder):
    """Write two LoRAs of rank 4, each about a third of the weights it is added to."""
    weights = load_file(models / "bf16.safetensors")
    for seed, name in enumerate(LORAS):
        generator = torch.Generator().manual_seed(seed)
        tensors = {}
        for layer in LAYERS:
            key = f"transformer_blocks.{seed}.{layer}"
            n, k = weights[f"{key}.weight"].shape
            up = torch.randn(n, 4, generator=generator)
            down = torch.randn(4, k, generator=generator)
            size = weights[f"{key}.weight"].float().norm() / (up @ down).norm() / 3
            tensors[f"diffusion_model.{key}.lora_up.weight"] = up * size
            tensors[f"diffusion_model.{key}.lora_down.weight"] = down
        save_file(tensors, folder / f"{name}.safetensors")


def write_float32(models):
    """Write the unquantized model in float32, which every release loads as it is."""
    target = models / "float32.safetensors"
    if not target.exists():
        weights = load_file(models / "bf16.safetensors")
        save_file({key: weight.float() for key, weight in weights.items()}, target)


def load(model):
    """The stock loader."""
    return "UNETLoader", {
        "unet_name": f"{model}.safetensors",
        "weight_dtype": "default",
    }


def load_quantized(model, **inputs):
    """Load Diffusion Model (quantize)."""
    return "HijackLoadQuantized", {**load(model)[1], **recipe(**inputs)}


def quantize(**inputs):
    """Quantize Model."""
    return "HijackQuantizeModel", recipe(**inputs)


def recipe(**inputs):
    """The inputs both quantizing nodes have, as the page gives them."""
    given = {"scheme": "blockwise_fp8", "block_size": "auto"}
    return {**given, "include": "", "exclude": "", **inputs}


def quantize_file(file, **inputs):
    """Quantize File."""
    given = {"file": file, "scheme": "blockwise_fp8", "block_size": "auto"}
    return "HijackQuantizeFile", {**given, "dialect": "auto", **inputs}


def lora(name, strength=1.0):
    """The stock LoRA node for diffusion models."""
    inputs = {"lora_name": f"{name}.safetensors", "strength_model": strength}
    return "LoraLoaderModelOnly", inputs


def save(prefix="diffusion_models/quantized", dialect="auto"):
    """Save Quantized Model."""
    return "HijackSaveQuantized", {"filename_prefix": prefix, "dialect": dialect}


def chain(*stages):
    """Nodes that hand a model on, each to the next; the last one's name is ``last``."""
    nodes, before = {}, None
    for number, (kind, inputs) in enumerate(stages, 1):
        name = "last" if number == len(stages) else f"stage-{number}"
        given = {**inputs, **({"model": [before, 0]} if before else {})}
        nodes[name] = {"class_type": kind, "inputs": given}
        before = name
    return nodes


def sample(server, *stages):
    """Sample with the model a chain of nodes makes; give the latent."""
    asked = comfy_harness.workflow("bf16")
    del asked["unet"]
    asked.update(chain(*stages))
    asked["sampler"]["inputs"]["model"] = ["last", 0]
    # Under a name of its own, saving is never cached.
    asked["save"]["inputs"]["filename_prefix"] = f"nodes/{next(server.numbers)}"
    (saved,) = server.run(asked)["outputs"]["save"]["latents"]
    path = server.base / "output" / saved["subfolder"] / saved["filename"]
    return load_file(path)["latent_tensor"]
