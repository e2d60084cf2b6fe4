"""Run by tests in a fresh process: everything that must work, for each scheme.

Usage: matrix_case.py COMFYUI FOLDER [dynamic] ROW ...

Judges by a latent after a few steps: relative L2 distance to that of the exactly
dequantized float32 model, with the exact LoRA. With ``dynamic``, under doubles of a
device and of comfy_aimdo's native half. Prints one JSON object, scheme by scheme.
"""

# ruff: noqa: E402 - ComfyUI is importable only once it is prepared
from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "comfyui"), str(HERE)]
sys.path.append(str(HERE.parents[1] / "examples" / "hijack-int8-rowwise"))

DYNAMIC = "dynamic" in sys.argv[3:]
ROWS = [name for name in sys.argv[3:] if name != "dynamic"]
if DYNAMIC:
    import aimdo_double

    aimdo_double.prepare()

import comfy_case as case  # prepares ComfyUI
import comfy_models
from safetensors.torch import save_file

from hijack.formats.native_marker import write_marker

comfy = case.comfy
NUMBERS = itertools.count()
STEPS = 3
#: Row to scheme and options, in its own spelling; that of block-wise FP8 is musubi's.
SCHEMES = {
    "example plugin": ("int8_rowwise", {}),
    "int8": ("int8", {}),
    "int8 ConvRot": ("int8", {"rotation": 64}),
    "nvfp4": ("nvfp4", {}),
    "mxfp4": ("mxfp4", {}),
    "nf4": ("nf4", {}),
    "w4a8": ("w4a8", {}),
    "convrot_w4a4": ("convrot_w4a4", {}),
}
SMALL, LARGE = 0.01, 5.0


def write(tensors, marked=None):
    """A new file with these tensors, and hijack's marker of some layers."""
    path = str(case.FOLDER / f"matrix-{DYNAMIC}-{next(NUMBERS)}.safetensors")
    metadata = {"hijack": write_marker(marked)} if marked else None
    save_file(tensors, path, metadata)
    return path


def latent(patcher, memory=None):
    """What a few steps make of the same noise."""
    device = patcher.load_device
    if memory is None:
        comfy.model_management.load_models_gpu([patcher])
    else:
        comfy.model_management.unload_all_models()
        patcher.partially_load(device, memory)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((1, 16, 1, 8, 8), generator=generator).to(device)
    context = torch.randn((1, 7, 192), generator=generator).to(device)
    for step in range(STEPS):
        sigma = torch.tensor([1 - step / STEPS]).to(device)
        denoised = patcher.model.apply_model(x, sigma, c_crossattn=context)
        x = x + (denoised - x) / (STEPS - step)
    return x.to("cpu")


class Matrix:
    """One scheme's row: what is expected is computed before there is a device."""

    def __init__(self, quantized_sd, exact, dense, config, marked=None):
        self.path, self.exact, self.config = (
            write(quantized_sd, marked),
            exact,
            config,
        )
        self.dense = write(dense)
        wide = {key: tensor.float() for key, tensor in dense.items()}
        reference = load(exact)
        self.expected = {
            "plain": latent(reference),
            "LoRA": latent(self._with_lora(reference, SMALL)),
            "LoRA big": latent(self._with_lora(reference, LARGE)),
            "quantize on load": latent(load(case.quantized(dense, config))),
            # a model in memory is float32 on the CPU, and so are then the scales
            "quantize online": latent(load(case.quantized(wide, config))),
        }
        self.found = {}

    def _with_lora(self, patcher, amplitude):
        return case.with_lora(patcher, case.lora(self.exact, amplitude))

    def _judge(self, cell, actual, expected=None):
        self.found[cell] = case.error(actual, self.expected[expected or cell])

    def run(self):
        """Every cell."""
        patcher = comfy.sd.load_diffusion_model(self.path)
        before = latent(patcher)
        self._judge("plain", before)
        for name, amplitude in (("LoRA", SMALL), ("LoRA big", LARGE)):
            changed = self._with_lora(patcher, amplitude)
            self._judge(name, latent(changed))
            if not DYNAMIC:
                self._judge(f"{name}, partial load", latent(changed, 1000), name)
            changed.detach()
        removed = torch.equal(latent(patcher), before)
        self.found["LoRA removed"] = 0.0 if removed else 1.0
        self._judge("save and reload", latent(self._saved(patcher)), "plain")
        self._judge("quantize on load", latent(self._quantized_on_load()))
        if not DYNAMIC:
            self._judge("partial load", latent(patcher, 1000), "plain")
            self._judge("quantize online", latent(self._quantized()))
        return self.found

    def _quantized_on_load(self):
        from hijack.hosts.comfyui import quantize as online

        return online.load_quantized(self.dense, self.config)

    def _quantized(self):
        from hijack.hosts.comfyui import quantize as online

        dense = comfy.sd.load_diffusion_model(self.dense)
        return online.quantize_model(dense, self.config)

    def _saved(self, patcher):
        path = str(case.FOLDER / f"saved-{DYNAMIC}-{next(NUMBERS)}.safetensors")
        comfy.sd.save_checkpoint(path, patcher)
        return comfy.sd.load_diffusion_model(path)


def load(tensors):
    """A ModelPatcher of ComfyUI's own loader, from a file."""
    return comfy.sd.load_diffusion_model(write(tensors))


def main():
    """All schemes; what they found is printed as the last line."""
    import hijack_int8_rowwise

    import hijack
    from hijack.quantized import QuantizationConfig

    bf16 = comfy_models.make_state_dict(comfy_models.small_qwen_shapes())
    hijack.register(hijack_int8_rowwise.Int8Rowwise())
    registered, matrices = hijack.schemes(), {}
    for name in ROWS:
        scheme, options = SCHEMES.get(name, (name, {"block_size": (1, 64)}))
        config = QuantizationConfig.of(registered[scheme], options)
        marked = None
        if name in SCHEMES:
            file = case.with_scheme(bf16, registered[scheme], **options)
            quantized_sd, meant, marked = file
        else:
            quantized_sd, _ = comfy_models.musubi(bf16)
            meant = case.exact(quantized_sd)
        matrices[name] = Matrix(quantized_sd, meant, bf16, config, marked)
    if DYNAMIC:
        aimdo_double.enable()
    print(json.dumps({name: matrix.run() for name, matrix in matrices.items()}))


if __name__ == "__main__":
    torch.set_num_threads(1)  # for tensors this small, others would only wait
    with torch.inference_mode():  # as ComfyUI runs nodes
        main()
