"""Run by tests in a fresh process: many architectures inside one real ComfyUI.

Usage: architecture_case.py COMFYUI FOLDER [NAME ...]

Prints one JSON object: architecture to naming of its file ("native", "diffusers") to
what was found, or to None where this ComfyUI has no such model. FOLDER is not used.
"""

# ruff: noqa: E402, TID253 - ComfyUI is importable only once it is prepared
from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "comfyui")]

import architectures
import comfy_models
import launch
import small_model

ROOT, NAMES = sys.argv[1], sys.argv[3:]
launch.prepare(ROOT)

import comfy.model_detection
import comfy.sample
import comfy.sd

STEPS = 3

torch.set_num_threads(1)  # the models are too small for more to be faster


class Case:
    """A file of one architecture, and what it is to give."""

    def __init__(self, architecture, state_dict, native):
        """Quantize a state dict; ``native`` says which key of the network each is."""
        self.architecture = architecture
        self.quantized = [k for k in state_dict if architecture.is_quantized(native[k])]
        self.quantized_sd, exact = small_model.musubi(state_dict, self.quantized)
        self.claimed = {native[key] for key in self.quantized}
        self.reference = self.run(exact)[1:]
        self.found = {"scales": self.scales()}
        try:
            self.found["without hijack"] = self.errors(
                *self.run(self.quantized_sd, 1)[1:]
            )
        except Exception as caught:
            self.found["without hijack"] = type(caught).__name__

    def scales(self):
        """How many weights of so many dimensions have scales of so many."""
        count = Counter()
        for key in self.quantized:
            scale = self.quantized_sd[key.replace(".weight", ".scale_weight")]
            count[f"{self.quantized_sd[key].ndim}-D by {scale.ndim}-D"] += 1
        return count

    def load(self, state_dict):
        """A ModelPatcher of ComfyUI's own loader, which empties what it is given."""
        with self.architecture.detected():
            return comfy.sd.load_diffusion_model_state_dict(copied(state_dict))

    def run(self, state_dict, steps=STEPS):
        """The network, its first output, and the latent after steps of the sampler."""
        patcher, outputs = self.load(state_dict), []
        network = patcher.model.diffusion_model
        handle = network.register_forward_hook(lambda *given: outputs.append(given[2]))
        latent = torch.zeros((1, *self.architecture.latent))
        noise = comfy.sample.prepare_noise(latent, 5)
        prompt = self.architecture.prompt()
        given = (steps, 1.0, "euler", "simple", prompt, prompt, latent)
        options = {"disable_pbar": True, "seed": 5}
        latent = comfy.sample.sample(patcher, noise, *given, **options)
        handle.remove()
        return network, outputs[0].float(), latent.float()

    def errors(self, *actual):
        """Relative L2 distance of first output and latent; None if not finite."""
        pairs = zip(actual, self.reference, strict=True)
        distances = [float((a - b).norm() / b.norm()) for a, b in pairs]
        return [d if d < float("inf") else None for d in distances]

    def check(self):
        """With hijack: how far off it is, and how many layers are quantized."""
        from hijack.hosts.comfyui.linear import LIVE

        network, *actual = self.run(self.quantized_sd)
        self.found["errors"] = self.errors(*actual)
        owners = [network.get_submodule(key.rpartition(".")[0]) for key in self.claimed]
        linears = [module for module in owners if hasattr(module, "in_features")]
        self.found["linears"] = len(linears)
        self.found["quantized"] = sum(module in LIVE for module in linears)


def copied(state_dict):
    """A copy: ComfyUI swaps halves of some tensors in place."""
    return {key: tensor.clone() for key, tensor in state_dict.items()}


def cases(architecture):
    """The cases of an architecture by naming."""
    dense = comfy_models.make_state_dict(architecture.shapes())
    made = {"native": Case(architecture, dense, {key: key for key in dense})}
    if architecture.diffusers is not None:
        names = architecture.diffusers_names()
        named, native = small_model.in_diffusers(dense, names)
        convert = comfy.model_detection.convert_diffusers_mmdit
        if convert(copied(named), "") is not None:
            made["diffusers"] = Case(architecture, named, native)
    return made


def main():
    """Everything without hijack first, then with it."""
    chosen = [a for a in architectures.ARCHITECTURES if not NAMES or a.name in NAMES]
    made = {a.name: cases(a) if a.network_class() else None for a in chosen}

    import hijack.hosts
    import schemes.blockwise_fp8  # noqa: F401

    hijack.hosts.patch("comfyui")
    for namings in made.values():
        for case in (namings or {}).values():
            try:
                case.check()
            except Exception as caught:
                case.found["failed"] = f"{type(caught).__name__}: {caught}"
    return {
        name: namings and {naming: case.found for naming, case in namings.items()}
        for name, namings in made.items()
    }


if __name__ == "__main__":
    with torch.inference_mode():  # as ComfyUI runs nodes
        print(json.dumps(main()))
