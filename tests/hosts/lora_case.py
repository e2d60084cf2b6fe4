"""Run by tests in a fresh process: LoRAs on quantized layers in one real ComfyUI.

Usage: lora_case.py COMFYUI FOLDER

Prints one JSON object: the name of each check, and what was found.
"""

# ruff: noqa: TID253 - ComfyUI is importable only once it is prepared
from __future__ import annotations

import inspect
import json
import os

import comfy_case  # prepares ComfyUI, so it comes first  # isort: skip
import comfy.hooks
import comfy.lora
import comfy.model_management
import comfy_models
import torch
from comfy_case import (
    LAYER,
    error,
    first_output,
    load,
    lora,
    output,
    same,
    snapshot,
    with_lora,
)
from safetensors.torch import load_file

found = {}
NAME = f"diffusion_model.{LAYER}"


def kinds(dense):
    """One file of each kind of adapter, for one layer, small beside its weight."""
    generator = torch.Generator().manual_seed(5)
    weight = dense[f"{LAYER}.weight"]
    n, k = weight.shape

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    def sized(a, b, product):
        """Scale a so that the product is a tenth of the weight."""
        return a * (0.1 * weight.norm() / product.norm()), b

    up, down = draw(n, 4), draw(4, k)
    up, down = sized(up, down, up @ down)
    pair = {f"{NAME}.lora_up.weight": up, f"{NAME}.lora_down.weight": down}
    a, b, c, d = draw(n, 4), draw(4, k), draw(n, 4), draw(4, k)
    a, b = sized(a, b, (a @ b) * (c @ d))
    loha = {"hada_w1_a": a, "hada_w1_b": b, "hada_w2_a": c, "hada_w2_b": d}
    w1, w2 = draw(4, 4), draw(n // 4, k // 4)
    w1, w2 = sized(w1, w2, torch.kron(w1, w2))
    difference, _ = sized(draw(n, k), 0, draw(n, k))
    return {
        "plain": pair,
        "alpha": {**pair, f"{NAME}.alpha": torch.tensor(2.0)},
        "dora": {**pair, f"{NAME}.dora_scale": weight.norm(dim=1, keepdim=True) * 1.1},
        "loha": {f"{NAME}.{name}": t for name, t in loha.items()},
        "lokr": {f"{NAME}.lokr_w1": w1, f"{NAME}.lokr_w2": w2},
        "diff": {f"{NAME}.diff": difference},
        "bias": {f"{NAME}.diff_b": draw(n) / 10, **pair},
        "oft": {f"{NAME}.oft_blocks": draw(4, n // 4, n // 4) / 100},
    }


def check_kinds(patcher, reference, dense):
    """Each kind of adapter has the effect it has on the dense model."""
    plain = first_output(patcher)
    for name, made in kinds(dense).items():
        expected = first_output(with_lora(reference, made))
        changed = with_lora(patcher, made)
        found[name] = {
            "effect": error(expected, plain),
            "error": error(first_output(changed), expected),
            "low vram": error(first_output(changed, 1000), expected),
        }
        changed.detach()


def add(patcher, made, strength):
    """A clone with one more LoRA."""
    return comfy_case.comfy.sd.load_lora_for_models(patcher, None, made, strength, 0)[0]


def check_several(patcher, reference, dense):
    """LoRAs add up, in any order and mixture, of any strength."""
    files = kinds(dense)
    mixtures = {
        "two": [("plain", 0.7), ("alpha", -1.5)],
        "dora last": [("plain", 1.0), ("dora", 0.5)],
        "dora first": [("dora", 0.5), ("plain", -1.0)],
        "none": [("plain", 0.0)],
    }
    for name, mixture in mixtures.items():
        ours, theirs = patcher, reference
        for kind, strength in mixture:
            ours = add(ours, files[kind], strength)
            theirs = add(theirs, files[kind], strength)
        found[name] = error(first_output(ours), first_output(theirs))


def check_slices(patcher, reference, dense):
    """A LoRA for a part of the rows or columns, as fused projections have."""
    key = f"{NAME}.weight"
    adapter = comfy.lora.load_lora(kinds(dense)["plain"], {NAME: key})[key]
    up, down, *rest = adapter.weights
    for name, offset, weights in (
        ("rows", (0, 64, 32), (up[:32], down, *rest)),
        ("columns", (1, 64, 128), (up, down[:, :128], *rest)),
    ):
        part = type(adapter)(set(), weights)
        outputs = []
        for model in (patcher, reference):
            changed = model.clone()
            assert changed.add_patches({(key, offset): part}, 0.8)
            outputs.append(first_output(changed))
        found[f"slice of {name}"] = error(*outputs)


def check_rounds(patcher, quantized_sd, dense):
    """Fifty times on and off, through clones, beside a model of the same tensors."""
    twin = load(quantized_sd)
    before, twin_before = snapshot(patcher), snapshot(twin)
    clean, twin_clean = first_output(patcher), first_output(twin)
    first, second = lora(dense, 0.05), lora(dense, 5.0)
    one, other = with_lora(patcher, first), with_lora(patcher.clone(), second)
    outputs = first_output(one), first_output(other)
    good = True
    for turn in range(50):
        chosen = (one, other)[turn % 2]
        memory = 1000 if turn % 5 == 4 else None
        good &= error(first_output(chosen, memory), outputs[turn % 2]) < 1e-6
        if turn % 3 == 0:
            good &= torch.equal(first_output(patcher), clean)
        if turn % 10 == 0:
            chosen.detach()
    good &= torch.equal(first_output(patcher), clean)
    found["rounds"] = bool(good)
    found["weights restored"] = same(snapshot(patcher), before)
    found["twin untouched"] = same(snapshot(twin), twin_before) and torch.equal(
        first_output(twin), twin_clean
    )


def check_hooks(patcher, reference, dense):
    """LoRA hooks, which ComfyUI writes into parameters, come and go as well."""
    clean = first_output(patcher)
    before = snapshot(patcher)
    results = []
    for model in (patcher, reference):
        changed = model.clone()
        hooks = comfy.hooks.create_hook_lora(lora(dense, 0.5), 1.0, 0.0)
        target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
        changed.register_all_hook_patches(hooks, target)
        comfy.model_management.load_models_gpu([changed])
        changed.patch_hooks(hooks)
        results.append(output(changed))
        changed.patch_hooks(None)
        again = output(changed)
        changed.patch_hooks(hooks)  # from ComfyUI's cache
        results.append(output(changed))
        changed.patch_hooks(None)
        if model is patcher:
            found["hooks removed"] = torch.equal(again, clean)
        changed.detach()
    found["hooks effect"] = error(results[2], clean)
    found["hooks"] = error(results[0], results[2])
    found["hooks cached"] = error(results[1], results[3])
    found["hooks restored"] = same(snapshot(patcher), before)


def check_model_as_lora(patcher, reference, bf16):
    """A hook that makes a model of another one; every step takes the original."""
    other = {f"diffusion_model.{key}": t.flip(0) for key, t in bf16.items()}
    outputs = []
    for model in (patcher, reference):
        changed = model.clone()
        hooks = comfy.hooks.create_hook_model_as_lora(other, None, 0.5, 0.0)
        target = comfy.hooks.create_target_dict(comfy.hooks.EnumWeightTarget.Model)
        changed.register_all_hook_patches(hooks, target)
        comfy.model_management.load_models_gpu([changed])
        clean = output(changed)
        changed.patch_hooks(hooks)
        outputs.append([output(changed) for _ in range(2)])
        changed.patch_hooks(None)
        changed.detach()
    found["model as lora effect"] = error(outputs[1][0], clean)
    found["model as lora"] = [error(*pair) for pair in zip(*outputs, strict=True)]


def check_extracting(patcher, dense):
    """The LoRA that ComfyUI extracts is the difference, as it is of a dense model."""
    from comfy_extras.nodes_lora_extract import LORAType, calc_lora_model

    given = patcher.model_state_dict()[f"{NAME}.weight"].type(torch.float32)
    found["given to compute with"] = error(given, dense[f"{LAYER}.weight"])
    management = comfy.model_management
    changed = with_lora(patcher, lora(dense, 0.5))
    expected = comfy.lora.calculate_weight(
        changed.patches[f"{NAME}.weight"], dense[f"{LAYER}.weight"].clone(), NAME
    )
    load_models = management.load_models_gpu
    if "comfy_patched_weights" in inspect.getsource(calc_lora_model):
        ways = {"full": None, "low vram": 1000}
    else:  # weights are all loaded and patched before they are read
        ways = {"full": None}
    found["extracted"] = {}
    for way, memory in ways.items():
        first_output(changed, memory)
        if memory is not None:
            management.load_models_gpu = lambda *_, **__: None  # as little as there is
        made = calc_lora_model(changed, 8, "", "", {}, LORAType.FULL_DIFF)
        management.load_models_gpu = load_models
        path = str(comfy_case.FOLDER / "extracted.safetensors")
        comfy_case.comfy.utils.save_torch_file(made, path)
        difference = load_file(path)[f"{NAME}.diff"]
        found["extracted"][way] = error(difference.float(), expected)
    changed.detach()


def check_model_merging(patcher, reference, bf16):
    """ModelMergeSimple with an ordinary model, and of two quantized ones."""
    other = {key: tensor.flip(0) for key, tensor in bf16.items()}
    for name, second, expected in (
        ("merged with dense", load(other), load(other)),
        (
            "merged with quantized",
            load(comfy_models.musubi(other)[0]),
            load(comfy_case.exact(comfy_models.musubi(other)[0])),
        ),
    ):
        outputs = []
        for one, two in ((patcher, second), (reference, expected)):
            changed = one.clone()
            patches = two.get_key_patches("diffusion_model.")
            for key in patches:
                changed.add_patches({key: patches[key]}, 0.3, 0.7)
            outputs.append(first_output(changed))
            changed.detach()
        found[name] = error(*outputs)


def check_merging(patcher, reference, dense):
    """On demand the sum is quantized: by environment variable, or patch by patch."""
    from hijack.hosts.comfyui.lora import Merge

    before, clean = snapshot(patcher), first_output(patcher)
    expected = first_output(with_lora(reference, lora(dense, 0.5)))
    marked = with_lora(patcher, lora(dense, 0.5))
    marked.patches = {k: [Merge(p) for p in v] for k, v in marked.patches.items()}
    os.environ["HIJACK_LORA"] = "merge"
    by_environment = with_lora(patcher, lora(dense, 0.5))
    outputs = {"environment": first_output(by_environment)}
    found["merged weights differ"] = not same(snapshot(by_environment), before)
    by_environment.detach()
    outputs["again"] = first_output(by_environment)
    by_environment.detach()
    del os.environ["HIJACK_LORA"]
    outputs["marked"] = first_output(marked.clone())
    marked.detach()
    found["merging"] = {name: error(o, expected) for name, o in outputs.items()}
    found["merging is repeatable"] = all(
        torch.equal(o, outputs["environment"]) for o in outputs.values()
    )
    found["merging removed"] = torch.equal(first_output(patcher), clean)
    found["merging restored"] = same(snapshot(patcher), before)


def main():
    """All checks; what they found is printed as the last line."""
    import schemes.blockwise_fp8  # noqa: F401

    bf16 = comfy_models.make_state_dict(comfy_models.small_qwen_shapes())
    quantized_sd, _ = comfy_models.musubi(bf16)
    dense = comfy_case.exact(quantized_sd)
    patcher, reference = load(quantized_sd), load(dense)
    check_kinds(patcher, reference, dense)
    check_several(patcher, reference, dense)
    check_slices(patcher, reference, dense)
    check_rounds(patcher, quantized_sd, dense)
    check_hooks(patcher, reference, dense)
    check_model_as_lora(patcher, reference, bf16)
    check_extracting(patcher, dense)
    check_model_merging(patcher, reference, bf16)
    check_merging(patcher, reference, dense)


if __name__ == "__main__":
    with torch.inference_mode():  # as ComfyUI runs nodes
        main()
    print(json.dumps(found))
