"""What quantized weights and LoRAs cost in ComfyUI: one step of a Qwen-Image.

Blocks of Qwen-Image at their real width (3072) in the newest ComfyUI that is found:
dense, quantized to blocks of 1 x 64, each also with one and with three LoRAs of rank 32
on every Linear of the blocks, and the same weights in ComfyUI-musubi's own loader. All
take turns in one process. In bfloat16 ComfyUI is told to compute in it, which it does
not choose by itself on a CPU.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.comfyui_case import import_pack
from benchmarks.harness import (
    Benchmark,
    Missing,
    Row,
    Setting,
    comfyui_version,
    first_line,
)
from benchmarks.peers import COMFYUI_MUSUBI
from benchmarks.timing import alternate, milliseconds, ratio

TESTS = Path(__file__).resolve().parents[1] / "tests" / "comfyui"
RANK, TEXT = 32, 128
#: Of the picture.
TOKENS, QUICK_TOKENS = 1024, 64
NAME = "benchmark-musubi.safetensors"


def no_comfyui(setting: Setting) -> str | None:
    """Why it cannot be measured, or None."""
    return None if setting.comfyui else "no ComfyUI was found; name one in --comfyui"


def make_model(quick: bool) -> dict[str, Tensor]:
    """Random weights of one block."""
    import comfy.ops
    from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel

    small = {"num_attention_heads": 2, "joint_attention_dim": 3584} if quick else {}
    model = QwenImageTransformer2DModel(
        in_channels=64,
        num_layers=1,
        device="meta",
        dtype=torch.bfloat16,
        operations=comfy.ops.manual_cast,
        **small,
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


def step(patcher: Any, tokens: int) -> Callable[[int], object]:
    """One step of a model that is loaded."""
    side = int(tokens**0.5) * 2
    x = torch.randn(1, 16, 1, side, side)
    context, sigma = torch.randn(1, TEXT, 3584), torch.tensor([0.7])
    return lambda _: patcher.model.apply_model(x, sigma, c_crossattn=context)


def peer_model(weights: dict[str, Tensor]) -> Any:
    """The weights as musubi-tuner quantizes them, in ComfyUI-musubi's own loader.

    Must be called before hijack patches ComfyUI, which would take the file itself.
    """
    import comfy_models
    import folder_paths
    from safetensors.torch import save_file

    encoded = dict(weights)
    for key, tensor in weights.items():
        if comfy_models.is_quantized(key, tensor):
            codes, scale, _ = comfy_models.quantize(tensor, "block")
            encoded[key] = codes
            encoded[key.replace(".weight", ".scale_weight")] = scale
    with tempfile.TemporaryDirectory() as folder:
        save_file(encoded, Path(folder) / NAME)
        folder_paths.add_model_folder_path("diffusion_models", folder)
        pack = import_pack(Path(os.environ[COMFYUI_MUSUBI]))
        loader = pack.NODE_CLASS_MAPPINGS["MusubiUNETLoader"]()
        return loader.load_unet(NAME, "fp8_e4m3fn")[0]


def models(weights: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Any]:
    """Name to a model: dense and quantized, with no LoRA, one, and three."""
    import comfy.sd

    from hijack.hosts.comfyui import quantize as online
    from hijack.quantized import QuantizationConfig
    from hijack.registry import default_registry

    scheme = default_registry().get("blockwise_fp8")
    recipe = QuantizationConfig.of(scheme, {"block_size": (1, 64)})
    lora = make_lora(weights)

    def make(kind: str) -> Any:
        options = {"dtype": dtype} if dtype == torch.bfloat16 else {}
        model = comfy.sd.load_diffusion_model_state_dict(
            dict(weights), model_options=options
        )
        return online.quantize_model(model, recipe) if kind == "quantized" else model

    found = {}
    for kind in ("dense", "quantized"):
        found[kind] = make(kind)
        for count in (1, 3):
            model = make(kind)
            for _ in range(count):
                model = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0)[0]
            found[f"{kind}, {count} LoRA{'s' * (count > 1)}"] = model
    return found


@torch.inference_mode()
def measure(setting: Setting) -> Iterator[Row | Missing]:
    """A row for each dtype and model."""
    root = setting.comfyui[-1]
    sys.path.insert(0, str(TESTS))
    import launch

    launch.prepare(root)
    import comfy.supported_models

    if setting.quick:
        comfy.supported_models.QwenImage.unet_extra_config = {
            "num_attention_heads": 2,
            "joint_attention_dim": 3584,
        }
    weights, peer = make_model(setting.quick), None
    if os.environ.get(COMFYUI_MUSUBI):
        try:
            peer = peer_model(weights)
        except Exception as failure:  # of another program, whatever it is
            yield Missing("ComfyUI-musubi", first_line(failure))
    else:
        why = f"no ComfyUI-musubi; set {COMFYUI_MUSUBI} to a checkout"
        yield Missing("ComfyUI-musubi", why)
    import schemes.blockwise_fp8  # noqa: F401 - registers the scheme, patches ComfyUI

    torch.set_num_threads(max(setting.threads))
    tokens = QUICK_TOKENS if setting.quick else TOKENS
    for dtype in (torch.float32, torch.bfloat16):
        patchers = models(weights, dtype)
        if peer is not None:
            patchers["ComfyUI-musubi"] = peer
        yield from _rows(patchers, dtype, tokens, comfyui_version(root), setting)


def _rows(
    patchers: dict[str, Any],
    dtype: torch.dtype,
    tokens: int,
    version: str,
    setting: Setting,
) -> Iterator[Row | Missing]:
    runs = {}
    for name, patcher in patchers.items():
        patcher.set_model_compute_dtype(dtype)
        patcher.patch_model(torch.device("cpu"))
        run = step(patcher, tokens)
        try:
            run(0)
        except Exception as failure:
            yield Missing(f"{name}, {str(dtype)[6:]}", first_line(failure))
        else:
            runs[name] = run
    times = alternate(runs, setting.rounds_or(9))
    for name, seconds in times.items():
        plain = name.partition(",")[0]
        row: dict[str, Any] = {
            "ComfyUI": version,
            "dtype": str(dtype)[6:],
            "tokens": tokens,
            "model": name,
            "ms": milliseconds(seconds),
            "over dense": ratio(seconds, times["dense"]),
        }
        if name != plain:
            row["over the same without"] = ratio(seconds, times[plain])
        if name in ("quantized", "ComfyUI-musubi") and "ComfyUI-musubi" in times:
            row["ComfyUI-musubi / this"] = ratio(times["ComfyUI-musubi"], seconds)
        yield row


BENCHMARK = Benchmark(
    "comfyui",
    "A step of one block of Qwen-Image in ComfyUI on the CPU.",
    measure,
    "a ComfyUI and its dependencies; ComfyUI-musubi for its rows",
    no_comfyui,
)
