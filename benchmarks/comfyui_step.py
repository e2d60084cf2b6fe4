"""What quantized weights and LoRAs cost in ComfyUI: one step of a Qwen-Image.

Usage: python -m benchmarks.comfyui_step COMFYUI [--gpu] [--bfloat16] [--tokens N]

Blocks of Qwen-Image at their real width (3072): dense, and quantized to blocks of
1 x 64, without a LoRA and with one of rank 32 on every Linear of the blocks. All take
turns in one process; ratios are medians of the quotients of each round.
"""

# ruff: noqa: E402, TID253 - ComfyUI is importable only once it is prepared
from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "tests" / "comfyui")]

import launch

PARSER = argparse.ArgumentParser(description=__doc__.splitlines()[0])
PARSER.add_argument("comfyui", metavar="COMFYUI")
PARSER.add_argument("--gpu", action="store_true", help="not on the CPU")
PARSER.add_argument("--bfloat16", action="store_true", help="also on the CPU")
PARSER.add_argument("--tokens", type=int, default=1024)
PARSER.add_argument("--layers", type=int, default=1)
PARSER.add_argument("--rounds", type=int, default=9)
ARGS = PARSER.parse_args()
launch.prepare(ARGS.comfyui, *(["--highvram"] if ARGS.gpu else []))

import comfy.model_management
import comfy.ops
import comfy.sd
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

import schemes.blockwise_fp8  # noqa: F401
from benchmarks.timing import alternate, machine, ratio
from hijack.hosts.comfyui import quantize as online
from hijack.quantized import QuantizationConfig
from hijack.registry import default_registry

RANK, TEXT = 32, 128
Runs = dict[str, Callable[[int], object]]


def make_model() -> dict[str, Tensor]:
    """Random weights of a few blocks."""
    model = QwenImageTransformer2DModel(
        in_channels=64,
        num_layers=ARGS.layers,
        device="meta",
        dtype=torch.bfloat16,
        operations=comfy.ops.manual_cast,
    )
    generator = torch.Generator().manual_seed(7)
    tensors = {}
    for key, tensor in model.state_dict().items():
        scale = tensor.shape[1] ** -0.5 if tensor.ndim > 1 else 0.1
        values = torch.randn(tensor.shape, generator=generator) * scale
        tensors[key] = values.to(torch.bfloat16)
    return tensors


def make_lora(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """A LoRA for every Linear of the blocks."""
    generator, tensors = torch.Generator().manual_seed(8), {}
    for key, tensor in weights.items():
        if "transformer_blocks" in key and tensor.ndim == 2:
            name = f"diffusion_model.{key.removesuffix('.weight')}"
            rows, columns = tensor.shape
            down = torch.randn(RANK, columns, generator=generator) / columns**0.5
            up = torch.randn(rows, RANK, generator=generator) / 100
            tensors[f"{name}.lora_A.weight"] = down.to(torch.bfloat16)
            tensors[f"{name}.lora_B.weight"] = up.to(torch.bfloat16)
    return tensors


def step(patcher: Any, device: torch.device) -> Callable[[int], object]:
    """One step of a model that is loaded."""
    side = int(ARGS.tokens**0.5) * 2
    x = torch.randn(1, 16, 1, side, side, device=device)
    context = torch.randn(1, TEXT, 3584, device=device)
    sigma = torch.tensor([0.7], device=device)

    return lambda _: patcher.model.apply_model(x, sigma, c_crossattn=context)


def models() -> dict[str, Any]:
    """Name to a model: dense and quantized, without and with a LoRA."""
    weights = make_model()
    lora = make_lora(weights)
    scheme = default_registry().get("blockwise_fp8")
    recipe = QuantizationConfig.of(scheme, {"block_size": (1, 64)})

    def dense() -> Any:
        options = {"dtype": torch.bfloat16} if ARGS.bfloat16 else {}
        return comfy.sd.load_diffusion_model_state_dict(
            dict(weights), model_options=options
        )

    def quantized() -> Any:
        return online.quantize_model(dense(), recipe)

    patchers = {"dense": dense(), "quantized": quantized()}
    for name, patcher in {"dense": dense(), "quantized": quantized()}.items():
        changed = comfy.sd.load_lora_for_models(patcher, None, lora, 1.0, 0)[0]
        patchers[f"{name}, LoRA"] = changed
    return patchers


def main() -> None:
    """Print the median step of each and their ratios."""
    device = comfy.model_management.get_torch_device()
    runs: Runs = {}
    for name, patcher in models().items():
        if ARGS.bfloat16:  # which ComfyUI does not choose by itself there
            patcher.set_model_compute_dtype(torch.bfloat16)
        patcher.patch_model(device)
        runs[name] = step(patcher, device)
        dtype = patcher.model.get_dtype_inference()
    times = alternate(runs, ARGS.rounds)
    print(
        f"> {machine()}\n\n{ARGS.layers} layers, {ARGS.tokens} tokens, "
        f"{str(dtype)[6:]}, LoRA of rank {RANK}\n\n| model | ms | ratio to dense | "
        "ratio to the same without LoRA |\n|---|--:|--:|--:|"
    )
    for name, seconds in times.items():
        plain = times[name.removesuffix(", LoRA")]
        print(
            f"| {name} | {statistics.median(seconds) * 1e3:.1f} | "
            f"{ratio(seconds, times['dense']):.3f} | {ratio(seconds, plain):.3f} |"
        )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
