"""Run by tests in a fresh process: the stock TorchCompileModel node.

Usage: compile_case.py COMFYUI FOLDER [BACKEND]

Prints one JSON object: the name of each check, and what was found.
"""

# ruff: noqa: TID253 - ComfyUI is importable only once it is prepared
from __future__ import annotations

import contextlib
import json
import sys

import comfy_case  # prepares ComfyUI, so it comes first  # isort: skip
import comfy.model_management
import comfy.sample
import comfy.sd
import comfy_models
import contract_schemes
import lora_case
import torch
from comfy_case import error, load, lora, with_lora
from safetensors.torch import save_file
from torch._dynamo.utils import counters

from hijack.formats.native_marker import write_marker

BACKEND = sys.argv[3] if len(sys.argv) > 3 else "aot_eager"
STEPS = 4


def compiled(patcher):
    """The patcher as the stock node gives it, in whichever schema it is written."""
    from comfy_extras.nodes_torch_compile import TorchCompileModel as Node

    if hasattr(Node, "execute"):
        return Node.execute(patcher, BACKEND).args[0]
    return Node().patch(patcher, BACKEND)[0]


def sample(patcher):
    """A latent, and how many graphs were compiled after each step."""
    generator = torch.Generator().manual_seed(1)
    noise = torch.randn((1, 16, 1, 8, 8), generator=generator)
    conditioning = [[torch.randn((1, 7, 192), generator=generator), {}]]
    graphs = []
    latent = comfy.sample.sample(
        patcher,
        noise,
        STEPS,
        1.0,
        "euler",
        "simple",
        conditioning,
        conditioning,
        torch.zeros_like(noise),
        callback=lambda *_: graphs.append(counters["stats"]["unique_graphs"]),
        disable_pbar=True,
        seed=3,
    )
    return latent, graphs


@contextlib.contextmanager
def keeping(memory, patcher):
    """Leave a model the memory it has, which sampling would give more."""
    load_models = comfy.model_management.load_models_gpu
    if memory is not None:
        comfy_case.first_output(patcher, memory)
        comfy.model_management.load_models_gpu = lambda *_, **__: None
    try:
        yield
    finally:
        comfy.model_management.load_models_gpu = load_models


def check(patcher, memory=None):
    """A model compiled and not, twice, and how many graphs that took."""
    with keeping(memory, patcher):
        expected, _ = sample(patcher)
        torch._dynamo.reset()
        counters.clear()
        latent, graphs = sample(compiled(patcher))
        again, later = sample(compiled(patcher))
    patcher.detach()
    return {
        "error": error(latent, expected),
        "again": error(again, expected),
        "graphs": graphs,
        "later": later,
    }


def main():
    """All checks; what they found is printed as the last line."""
    import hijack
    import schemes.blockwise_fp8  # noqa: F401

    # ComfyUI's attention asks for it, and is compiled anew in a step where it changed
    free = 1 << 34
    comfy.model_management.get_free_memory = lambda dev=None, torch_free_too=False: (
        (free, free) if torch_free_too else free
    )
    found = {}
    dense = comfy_models.make_state_dict(comfy_models.small_qwen_shapes(layers=1))
    quantized_sd, _ = comfy_models.musubi(dense)
    plain = load(quantized_sd)
    made = lora(comfy_case.exact(quantized_sd), 0.5, layers=1)
    found["plain"] = check(plain)
    found["lora"] = check(with_lora(plain, made))
    found["lora, low VRAM"] = check(with_lora(plain, made), 1000)
    scheme = hijack.register(contract_schemes.Activation())
    quantized_sd, _, marked = comfy_case.with_scheme(dense, scheme)
    path = str(comfy_case.FOLDER / "activation.safetensors")
    save_file(quantized_sd, path, {"hijack": write_marker(marked)})
    bound = comfy.sd.load_diffusion_model(path)
    found["bound forward"] = check(bound)
    found["bound forward, lora"] = check(with_lora(bound, made))
    dora = lora_case.kinds({k: t.float() for k, t in dense.items()})["dora"]
    found["bound forward, dora"] = check(with_lora(bound, dora))
    print(json.dumps(found))


if __name__ == "__main__":
    with torch.inference_mode():  # as ComfyUI runs nodes
        main()
