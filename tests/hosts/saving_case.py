"""Run by tests in a fresh process: what ComfyUI's save nodes write of quantized layers.

Usage: saving_case.py COMFYUI FOLDER

Prints one JSON object: the name of each check, and what was found.
"""

# ruff: noqa: TID253 - ComfyUI is importable only once it is prepared
from __future__ import annotations

import contextlib
import json

import comfy_case  # prepares ComfyUI, so it comes first  # isort: skip
import comfy.sd
import comfy_models
import safetensors
import test_detection
import torch
from comfy_case import (
    FOLDER,
    PREFIX,
    error,
    first_output,
    load,
    lora,
    snapshot,
    with_lora,
)
from safetensors.torch import load_file

found = {}
INFORMATION = {"prompt": "{}", "modelspec.title": "small"}


def save(patcher, name, memory=None):
    """The tensors and metadata that ``ModelSave`` writes, prefix cut off."""
    first_output(patcher, memory)
    path = str(FOLDER / f"{name}.safetensors")
    comfy.sd.save_checkpoint(path, patcher, metadata=dict(INFORMATION))
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = {k.removeprefix(PREFIX): t for k, t in load_file(path).items()}
    return path, tensors, metadata


def check_saving(name, patcher, quantized_sd, reference):
    """Full load and low VRAM write the file's own bytes; the metadata is kept."""
    claimed = [
        k for k in quantized_sd if "scale" in k or quantized_sd[k].element_size() == 1
    ]
    result = found[name] = {}
    for way, memory in (("full", None), ("low vram", 1000)):
        path, tensors, metadata = save(patcher, f"{name}-{way[:3]}", memory)
        result[way] = tensors.keys() == quantized_sd.keys() and comfy_case.same(
            {k: tensors[k] for k in claimed}, {k: quantized_sd[k] for k in claimed}
        )
        result[f"{way} metadata"] = all(
            metadata.get(k) == v for k, v in INFORMATION.items()
        )
        again = comfy.sd.load_diffusion_model(path)
        result[f"{way} reloaded"] = error(first_output(again), reference)
        again.detach()


def check_lora(name, patcher, dense):
    """A LoRA on the model is in the file, in data and scales that go together."""
    made = lora(dense, 0.5)
    expected = first_output(with_lora(load(dense), made))
    plain = first_output(patcher)
    before = snapshot(patcher)
    result = found[name]
    result["lora effect"] = error(expected, plain)
    files = []
    for way, memory in (("full", None), ("low vram", 1000)):
        changed = with_lora(patcher, made)
        path, tensors, _ = save(changed, f"{name}-lora-{way[:3]}", memory)
        files.append(tensors)
        changed.detach()
        result[f"lora {way}"] = error(
            first_output(comfy.sd.load_diffusion_model(path)), expected
        )
    result["lora same file"] = comfy_case.same(*files)
    first_output(patcher)
    result["weights untouched"] = comfy_case.same(snapshot(patcher), before)


def check_cancelling(patcher):
    """Saving tells how far it is; what that raises leaves no file behind."""
    from hijack.hosts.comfyui.saving import save_model

    class Cancelled(BaseException):
        pass

    def steps_until(cancel_at):
        steps = []

        def progress(done, total, name):
            steps.append((done, total))
            if len(steps) == cancel_at:
                raise Cancelled

        with contextlib.suppress(Cancelled):
            save_model(patcher, path, progress=progress)
        return steps

    path = FOLDER / "cancelled.safetensors"
    first_output(patcher)
    steps = steps_until(None)
    total = len(steps)
    layers = steps[0][1]
    expected = [(n + 1, layers) for n in range(layers)]
    found["told"] = steps == expected + [
        (n + 1, total - layers) for n in range(total - layers)
    ]
    path.unlink()
    for cancel_at in (3, total - 3):
        steps_until(cancel_at)
        left = [p.name for p in FOLDER.iterdir() if "cancelled" in p.name]
        found.setdefault("cancelled", []).append(left)


def main():
    """All checks; what they found is printed as the last line."""
    import hijack
    import schemes.blockwise_fp8  # noqa: F401

    bf16 = comfy_models.make_state_dict(comfy_models.small_qwen_shapes())
    quantized_sd, _ = comfy_models.musubi(bf16)
    dense = comfy_case.exact(quantized_sd)
    patcher = load(quantized_sd)
    check_saving("blockwise_fp8", patcher, quantized_sd, first_output(load(dense)))
    check_lora("blockwise_fp8", patcher, dense)
    check_cancelling(patcher)
    hijack.register(test_detection.Int8())
    quantized_sd, dense, _ = comfy_case.with_scheme(bf16, test_detection.Int8())
    patcher = load(quantized_sd)
    check_saving("plugin", patcher, quantized_sd, first_output(load(dense)))
    check_lora("plugin", patcher, dense)


if __name__ == "__main__":
    with torch.inference_mode():  # as ComfyUI runs nodes
        main()
    print(json.dumps(found))
