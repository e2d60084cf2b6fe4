"""Run by tests in a fresh process: the stock TorchCompileModel node.

Usage: compile_case.py COMFYUI FOLDER [BACKEND]

Prints one JSON object: the name of each check, and what was found.
"""

# ruff: noqa: TID253 - ComfyUI is importable only once it is prepared
from __future__ import annotations

import json
import sys

import comfy_case  # prepares ComfyUI, so it comes first  # isort: skip
import comfy.sample
import comfy_models
import torch
from comfy_case import error, load, lora, with_lora
from torch._dynamo.utils import counters

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


def main():
    """All checks; what they found is printed as the last line."""
    import schemes.blockwise_fp8  # noqa: F401

    dense = comfy_models.make_state_dict(comfy_models.small_qwen_shapes(layers=1))
    coded, _ = comfy_models.musubi(dense)
    plain = load(coded)
    changed = with_lora(plain, lora(comfy_case.exact(coded), 0.5, layers=1))
    found = {}
    for name, patcher in (("plain", plain), ("lora", changed)):
        expected, _ = sample(patcher)
        counters.clear()
        latent, graphs = sample(compiled(patcher))
        again, later = sample(compiled(patcher))
        found[name] = {
            "error": error(latent, expected),
            "again": error(again, expected),
            "graphs": graphs,
            "later": later,
        }
    print(json.dumps(found))


if __name__ == "__main__":
    with torch.inference_mode():  # as ComfyUI runs nodes
        main()
