"""What a LoRA costs in ComfyUI: one step of a quantized Qwen-Image, with and without.

Usage: python -m benchmarks.comfyui_lora COMFYUI [TOKENS]

One block of Qwen-Image at its real width (3072), quantized to blocks of 1 x 64, with a
LoRA of rank 32 on every Linear of the block. Both models take turns in one process;
the ratio is of medians.
"""

# ruff: noqa: E402, TID253 - ComfyUI is importable only once it is prepared
from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests" / "comfyui")]

import launch

TOKENS = int(sys.argv[2]) if len(sys.argv) > 2 else 1024
launch.prepare(sys.argv[1])

import comfy.model_management
import comfy.ops
import comfy.sd
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

import schemes.blockwise_fp8  # noqa: F401
from benchmarks.timing import alternate, machine, ratio
from hijack.hosts.comfyui import online
from hijack.hosts.comfyui.lazy import Recipe
from hijack.registry import default_registry

RANK, ROUNDS = 32, 9


def make_model() -> dict[str, torch.Tensor]:
    """Random weights of one block."""
    model = QwenImageTransformer2DModel(
        in_channels=64,
        num_layers=1,
        device="meta",
        dtype=torch.bfloat16,
        operations=comfy.ops.manual_cast,
    )
    generator = torch.Generator().manual_seed(7)
    made = {}
    for key, tensor in model.state_dict().items():
        scale = tensor.shape[1] ** -0.5 if tensor.ndim > 1 else 0.1
        values = torch.randn(tensor.shape, generator=generator) * scale
        made[key] = values.to(torch.bfloat16)
    return made


def make_lora(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A LoRA for every Linear of the block."""
    generator, made = torch.Generator().manual_seed(8), {}
    for key, tensor in weights.items():
        if "transformer_blocks" in key and tensor.ndim == 2:
            name = f"diffusion_model.{key.removesuffix('.weight')}"
            rows, columns = tensor.shape
            down = torch.randn(RANK, columns, generator=generator) / columns**0.5
            up = torch.randn(rows, RANK, generator=generator) / 100
            made[f"{name}.lora_A.weight"] = down.to(torch.bfloat16)
            made[f"{name}.lora_B.weight"] = up.to(torch.bfloat16)
    return made


def main() -> None:
    """Print the median step of each and their ratio."""
    side = int(TOKENS**0.5) * 2
    weights = make_model()
    scheme = default_registry().get("blockwise_fp8")
    recipe = Recipe(scheme, {"block_size": (1, 64)})
    dense = comfy.sd.load_diffusion_model_state_dict(dict(weights))
    plain = online.quantize_model(dense, recipe)
    twin = online.quantize_model(dense, recipe)
    del dense
    changed = comfy.sd.load_lora_for_models(twin, None, make_lora(weights), 1.0, 0)[0]
    for patcher in (plain, changed):
        patcher.patch_model(torch.device("cpu"))
    x = torch.randn(1, 16, 1, side, side)
    context = torch.randn(1, 128, 3584)

    def step(patcher: Any) -> Callable[[int], object]:
        return lambda _: patcher.model.apply_model(
            x, torch.tensor([0.7]), c_crossattn=context
        )

    times = alternate({"without": step(plain), "with": step(changed)}, ROUNDS)
    medians = {name: statistics.median(values) for name, values in times.items()}
    dtype = plain.model.get_dtype_inference()
    print(
        f"{TOKENS} tokens, {str(dtype)[6:]}: {medians['without']:.2f} s without, "
        f"{medians['with']:.2f} s with a rank-{RANK} LoRA, ratio "
        f"{ratio(times['with'], times['without']):.3f}; {machine()}"
    )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
