"""Run by tests in a fresh process: LoRA files merged as one real ComfyUI merges them.

Usage: lora_files_case.py COMFYUI FOLDER [NAME ...]

Prints one JSON object: architecture to what was found, or to None where this ComfyUI
has no such model. Files go to FOLDER.
"""

# ruff: noqa: E402, TID253 - ComfyUI is importable only once it is prepared
from __future__ import annotations

import json
import math
import sys
import types
from pathlib import Path

import torch
from safetensors.torch import save_file

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE.parent / "comfyui")]

import architectures
import comfy_models
import launch

ROOT, FOLDER, NAMES = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
launch.prepare(ROOT)

import comfy.ldm.modules.diffusionmodules.openaimodel as openaimodel
import comfy.lora
import comfy.ops
import comfy.sd

from hijack.lora.files import Loras
from hijack.model_families import detect_family
from hijack.naming.resolver import LayerNames
from hijack.safetensors_io.reader import read_header

PREFIX = "model.diffusion_model."
#: SDXL, narrow: the levels and depths that diffusers' names depend on are its own.
SDXL = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 1, 1, 2, 2],
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    "transformer_depth_middle": 2,
    "use_spatial_transformer": True,
    "use_linear_in_transformer": True,
    "context_dim": 48,
    "num_head_channels": 16,
    "num_classes": "sequential",
    "adm_in_channels": 24,
}
RANK = 3
STRENGTH = 0.7


# -- models ----------------------------------------------------------------------------


def sdxl():
    """What ComfyUI looks at of a model, around a UNet."""
    network = openaimodel.UNetModel(**SDXL, operations=comfy.ops.manual_cast)
    state_dict = {f"diffusion_model.{k}": t for k, t in network.state_dict().items()}
    config = types.SimpleNamespace(unet_config=SDXL)
    return types.SimpleNamespace(model_config=config, state_dict=lambda: state_dict)


def loaded(architecture):
    """A model of ComfyUI's own loader; its weights are random."""
    dense = comfy_models.make_state_dict(architecture.shapes())
    with architecture.detected():
        return comfy.sd.load_diffusion_model_state_dict(dense).model


def known_names(model, shapes):
    """Name in LoRA files to the key, rows and function of ComfyUI's own table."""
    known = {}
    for name, target in comfy.lora.model_lora_keys_unet(model, {}).items():
        key, part, change = place(target)
        key = key.removeprefix("diffusion_model.")
        if key in shapes and not (part and mistaken(name, part, shapes[key])):
            known[name] = key, part, change
    return known


def mistaken(name, part, shape):
    """Whether ComfyUI's rows are not those of the layer.

    It takes the MLP of every Flux for that of the first one, while FLUX.2 has no LoRA
    of this name, and the heads of Lumina 2 for as many keys as there are queries.
    """
    if name.endswith("proj_mlp"):
        return part[1] + part[2] != shape[0]
    return name[-4:-1] == "to_" and "attention" in name and 3 * part[2] != shape[0]


def place(target):
    """What ComfyUI maps a name to: key, rows and function."""
    return (
        (*target, None, None)[:3] if isinstance(target, tuple) else (target, None, None)
    )


def rows_of(shape, part, change):
    """The rows a name means, in order, as ComfyUI has them."""
    every = list(range(shape[0] if shape else 0))
    if part is not None:
        return every[part[1] : part[1] + part[2]]
    half = len(every) // 2
    return every[half:] + every[:half] if change else every


# -- files -----------------------------------------------------------------------------


def draw(*shape):
    """Small random numbers, never so small that they vanish beside a weight."""
    return torch.randn(shape, generator=GENERATOR) / math.sqrt(shape[-1] or 1)


def low_rank(shape):
    """A plain LoRA, flat or with the kernel of a convolution."""
    up = draw(shape[0], RANK, *[1] * (len(shape) - 2))
    return {"lora_up.weight": up, "lora_down.weight": draw(RANK, *shape[1:])}


def kinds(shape):
    """Each kind of LoRA for a weight of this shape."""
    n, flat = shape[0], math.prod(shape[1:])
    alpha = {"alpha": torch.tensor(2.0)}
    plain = {"lora_B.weight": draw(n, RANK), "lora_A.weight": draw(RANK, flat)}
    loha = {f"hada_w{i}_a": draw(n, RANK) for i in (1, 2)}
    loha |= {f"hada_w{i}_b": draw(RANK, flat) for i in (1, 2)}
    made = {
        "plain": plain,
        "alpha": {**low_rank(shape), **alpha},
        "dora": {**low_rank(shape), **alpha, "dora_scale": 1 + draw(1, shape[1]).abs()},
        "loha": {**loha, **alpha},
        "diff": {"diff": draw(*shape)},
    }
    if len(shape) > 2:
        made["dora"]["dora_scale"] = made["dora"]["dora_scale"].view(
            1, shape[1], *[1] * (len(shape) - 2)
        )
    # of five dimensions ComfyUI puts the factors together in another order
    if n % 2 == 0 and shape[1] % 2 == 0 and len(shape) < 5:
        half = (n // 2, shape[1] // 2, *shape[2:])
        made["lokr"] = {"lokr_w1": draw(2, 2), "lokr_w2": draw(*half), **alpha}
        factors = {"lokr_w1_a": draw(2, 1), "lokr_w1_b": draw(1, 2)}
        pair = {"lokr_w2_a": draw(half[0], RANK)}
        pair["lokr_w2_b"] = draw(RANK, math.prod(half[1:]))
        if len(shape) == 2:
            made["lokr low"] = {**factors, **pair, **alpha}
    if len(shape) == 4:
        core = {"lora_mid.weight": draw(RANK, RANK, *shape[2:])}
        outer = {"lora_up.weight": draw(n, RANK, 1, 1)}
        outer["lora_down.weight"] = draw(RANK, shape[1], 1, 1)
        made["mid"] = {**core, **outer, **alpha}
        tucker = {f"hada_t{i}": draw(RANK, RANK, *shape[2:]) for i in (1, 2)}
        tucker |= {f"hada_w{i}_a": draw(RANK, n) for i in (1, 2)}
        tucker |= {f"hada_w{i}_b": draw(RANK, shape[1]) for i in (1, 2)}
        made["loha core"] = {**tucker, **alpha}
    return made


def lora_file(known, shapes, turn):
    """Tensors of a file with one LoRA for each piece of each weight, kinds in turn."""
    tensors, taken, used = {}, {}, {}
    for number, (name, (key, part, change)) in enumerate(reversed(known.items())):
        rows = set(rows_of(shapes[key], part, change))
        if rows & taken.setdefault(key, set()):
            continue  # a second name for the same
        taken[key] |= rows
        shape = (len(rows), *shapes[key][1:])
        if len(shape) > 1 and key.endswith(".weight"):
            made = kinds(shape)
            if change:
                del made["dora"]  # ComfyUI takes the rows' lengths in another order
            kind = list(made)[(number + turn) % len(made)]
            parts = made[kind]
        else:
            kind, parts = "vector", {"diff": draw(*shapes[key])}
        used[kind] = used.get(kind, 0) + 1
        tensors |= {f"{name}.{part}": tensor for part, tensor in parts.items()}
        bias = key.removesuffix("weight") + "bias"
        whole = part is None and change is None and key.endswith(".weight")
        if whole and bias in shapes and bias not in taken:
            tensors[f"{name}.diff_b"] = draw(*shapes[bias])
            taken[bias] = set(range(*shapes[bias]))
    return tensors, used


def merged_by_comfyui(tensors, known, base):
    """The weights with a LoRA in them, computed by ComfyUI in float32."""
    names = {
        name: key if part is None and not change else (key, part, change)
        for name, (key, part, change) in known.items()
    }
    merged = {}
    for target, patch in comfy.lora.load_lora(tensors, names).items():
        key, part, change = place(target)
        weight = merged.get(key, base[key]).clone()
        patches = [(STRENGTH, patch, 1.0, part, change)]
        merged[key] = comfy.lora.calculate_weight(patches, weight, key)
    return merged


# -- checks ----------------------------------------------------------------------------


def check_names(known, shapes):
    """Names that ComfyUI knows and hijack does not, or takes for something else."""
    names = LayerNames({PREFIX + key: shape for key, shape in shapes.items()})
    wrong = []
    for name, (key, part, change) in known.items():
        shape = shapes[key]
        expected = rows_of(shape, part, change)
        size = (len(expected), *shape[1:]) if shape else shape
        found = names.resolve({name: size}).pieces.get(name, ())
        rows = [
            row
            for piece in found
            for start, stop in piece.rows or [(0, shape[0] if shape else 0)]
            for row in range(start, stop)
        ]
        if [piece.layer.key for piece in found] != [PREFIX + key] or rows != expected:
            wrong.append([name, key, [piece.layer.key for piece in found]])
    return wrong


def check_numbers(known, shapes, folder):
    """Largest distance of a merged weight to ComfyUI's, relative to what was added."""
    base = {key: draw(*shape) for key, shape in shapes.items()}
    save_file({PREFIX + k: t for k, t in base.items()}, folder / "base.safetensors")
    header, worst, used = read_header(folder / "base.safetensors"), 0.0, {}
    for turn in range(9):
        tensors, counts = lora_file(known, shapes, turn)
        used = {k: used.get(k, 0) + counts.get(k, 0) for k in used | counts}
        path = folder / f"lora-{turn}.safetensors"
        save_file(tensors, path)
        loras = Loras.open([(path, STRENGTH)], header)
        expected = merged_by_comfyui(tensors, known, base)
        assert {key.removeprefix(PREFIX) for key in loras.keys} == expected.keys()
        for key, weight in expected.items():
            ours = loras.merge(PREFIX + key, base[key])
            added = (weight - base[key]).norm()
            assert added > 0, key
            worst = max(worst, float((ours - weight).norm() / added))
    return worst, used


def selected(header, shapes):
    """The matrices that are usually quantized, by hijack's list."""
    from hijack.selection import choose

    chosen = choose(header, (torch.nn.Linear,)).layers
    return {f"{layer.removeprefix(PREFIX)}.weight" for layer in chosen}


def check(name, model, architecture):
    """Everything of one architecture."""
    state_dict = model.state_dict()
    shapes = {
        key.removeprefix("diffusion_model."): tuple(tensor.shape)
        for key, tensor in state_dict.items()
        if key.startswith("diffusion_model.")
    }
    known = known_names(model, shapes)
    folder = FOLDER / name
    folder.mkdir()
    worst, used = check_numbers(known, shapes, folder)
    header = read_header(folder / "base.safetensors")
    detected = detect_family(header.tensors)
    found = {
        "names": len(known),
        "wrong": check_names(known, shapes),
        "worst": worst,
        "kinds": used,
        "architecture": detected and detected.name,
        "source": detected and detected.source,
    }
    if architecture is not None and detected is not None:
        usual = {
            key
            for key, shape in shapes.items()
            if len(shape) == 2 and architecture.is_quantized(key)
        }
        found["differently quantized"] = sorted(selected(header, shapes) ^ usual)
    return found


def main():
    """All architectures this ComfyUI has."""
    models = {"sdxl": (lambda _: sdxl(), None)}
    models |= {a.name: (loaded, a) for a in architectures.ARCHITECTURES}
    found = {}
    for name, (make, architecture) in models.items():
        if NAMES and name not in NAMES:
            continue
        there = architecture is None or architecture.network_class() is not None
        found[name] = check(name, make(architecture), architecture) if there else None
    return found


if __name__ == "__main__":
    GENERATOR = torch.Generator().manual_seed(11)
    torch.set_num_threads(1)  # the models are too small for more to be faster
    with torch.inference_mode():  # as ComfyUI runs nodes
        print(json.dumps(main()))
