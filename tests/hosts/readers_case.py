"""Run by tests in a fresh process: what each caller of ComfyUI's file reader gets.

Usage: readers_case.py COMFYUI FOLDER

Prints one JSON object: the name of each check, and what was found. Files go to FOLDER.
"""

# ruff: noqa: TID253 - ComfyUI is importable only once it is prepared
from __future__ import annotations

import ast
import copy
import importlib
import json
import logging
import types
from pathlib import Path

import comfy_case
import torch
from comfy_case import FOLDER, ROOT, comfy, comfy_models, error, found
from loaders_files import (
    Log,
    coded_vae,
    decode,
    is_linear,
    load_clip,
    musubi,
    native,
    pooled,
    quantized,
    text_encoder,
    vae_weights,
)
from safetensors.torch import load_file, save_file
from torch import nn

# isort: split

import comfy.clip_model
import comfy.clip_vision

READER = "load_torch_file"
#: What has a loader of quantized layers behind it, which opens the file.
DOORS = {
    "comfy.sd.load_checkpoint_guess_config",
    "comfy.sd.load_clip",
    "comfy.sd.load_diffusion_model",
    "comfy.controlnet.load_controlnet",
}
SMALL_VISION = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_attention_heads": 2,
    "projection_dim": 32,
    "image_size": 28,
    "patch_size": 14,
}


# -- every call in a release -----------------------------------------------------------


class Calls(ast.NodeVisitor):
    """The calls of the reader in one module, and the functions they are in."""

    def __init__(self):
        self.scope, self.found = [], []

    def visit(self, node):
        scoped = hasattr(node, "body") and hasattr(node, "name")
        if scoped:
            self.scope.append(node.name)
        if isinstance(node, ast.Call):
            name = node.func
            if READER in (getattr(name, "attr", ""), getattr(name, "id", "")):
                self.found.append((".".join(self.scope), node))
        self.generic_visit(node)
        if scoped:
            self.scope.pop()


def callers():
    """Module, function and call of every call of the reader in this release."""
    for path in sorted(Path(ROOT).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        text = path.read_text("utf-8")
        if READER not in text or parts[0] in ("custom_nodes", "tests", "tests-unit"):
            continue
        calls = Calls()
        tree = ast.parse(text)
        calls.visit(tree)
        for function, call in calls.found:
            yield path, ".".join(parts), tree, function, call


def names_of(module, tree):
    """A module's names; of one that cannot be imported here those it imports."""
    try:
        return vars(importlib.import_module(module))
    except Exception:
        names = {"__name__": module, "__package__": module.rpartition(".")[0]}
        for node in tree.body:
            imports = isinstance(node, ast.Import | ast.ImportFrom)
            if imports and "comfy" in ast.unparse(node):
                try:
                    exec(ast.unparse(node), names)
                except Exception:
                    logging.debug("%s: %s", module, ast.unparse(node))
        return names


def call_as(path, names, call, file):
    """What a call gives when it is made from where it stands, for another file."""
    call = copy.deepcopy(call)
    call.args[:1] = [ast.Constant(str(file))]
    safe = ("safe_load", "return_metadata")
    call.keywords = [keyword for keyword in call.keywords if keyword.arg in safe]
    code = ast.fix_missing_locations(ast.Expression(call))
    result = eval(compile(code, str(path), "eval"), names)
    return result[0] if isinstance(result, tuple) else result


def check_callers(files, meant):
    """Each gets dense weights; those with a door behind them can open the file."""
    for path, module, tree, function, call in callers():
        names = names_of(module, tree)
        state_dict = call_as(path, names, call, files["both"])
        name = f"{module}.{function}"
        got = "dense" if same(state_dict, meant) else sorted(state_dict)
        if isinstance(state_dict, dict) and hasattr(state_dict, "open"):
            state_dict.open()
            stored = load_file(files["both"])
            if name in DOORS and same(state_dict, stored):
                got = "as stored"
        plain = call_as(path, names, call, files["plain"])
        found["callers"][name] = [got, type(plain).__name__]


def same(state_dict, expected):
    """Whether two state dicts have the same keys, dtypes and values."""
    return sorted(state_dict) == sorted(expected) and all(
        state_dict[key].dtype == tensor.dtype and torch.equal(state_dict[key], tensor)
        for key, tensor in expected.items()
    )


# -- loaders that nobody watches -------------------------------------------------------


def vision_init(self, json_config, original=comfy.clip_vision.ClipVisionModel.__init__):
    """ComfyUI's model of CLIP vision, with small sizes."""
    path = FOLDER / "vision.json"
    config = {**json.loads(Path(json_config).read_text()), **SMALL_VISION}
    path.write_text(json.dumps(config))
    original(self, str(path))


def vision_weights():
    """Random weights of ComfyUI's ViT-L, with small sizes."""
    comfy.clip_vision.ClipVisionModel.__init__ = vision_init
    config = Path(ROOT, "comfy", "clip_vision_config_vitl.json").read_text()
    model = comfy.clip_model.CLIPVisionModelProjection(
        {**json.loads(config), **SMALL_VISION},
        torch.bfloat16,
        "meta",
        comfy.ops.manual_cast,
    )
    shapes = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    return comfy_models.make_state_dict(shapes)


def see(path):
    """What *CLIP Vision Encode* gives."""
    image = torch.rand(1, 28, 28, 3, generator=torch.Generator().manual_seed(2))
    output = comfy.clip_vision.load(str(path)).encode_image(image)
    return output["last_hidden_state"].float()


def check_clip_vision():
    """*Load CLIP Vision*, of our layers and of ComfyUI's own."""
    dense = vision_weights()
    ours, meant = musubi(dense, is_linear, torch.bfloat16)
    theirs, exactly = {}, {}
    for key, tensor in dense.items():
        theirs[key] = exactly[key] = tensor
        if is_linear(key, tensor):
            theirs.update(native(key, tensor, "float8_e4m3fn"))
            scale = theirs[key.replace(".weight", ".weight_scale")]
            exactly[key] = theirs[key].float() * scale
    for name, file, reference in (
        ("ours", ours, meant),
        ("comfy_quant", theirs, exactly),
    ):
        # a file of bfloat16 says that weights are of no higher precision
        reference = {key: tensor.bfloat16() for key, tensor in reference.items()}
        outputs = [see(write(f"vision-{name}", sd)) for sd in (file, reference)]
        found["clip vision"][name] = error(*outputs)
    damaged = {**ours}
    layer = "vision_model.encoder.layers.0.mlp.fc1"
    damaged[f"{layer}.scale_weight"] = torch.ones(7, 3, 1)
    try:
        see(write("vision-damaged", damaged))
    except Exception as caught:
        found["clip vision"]["damaged"] = f"{type(caught).__name__}: {caught}"


def check_small_vae():
    """The VAE loader's small VAE, which is read in two places."""
    coded, meant = coded_vae(vae_weights())
    outputs = []
    for name, sd in (("coded", coded), ("meant", meant)):
        path = write(f"taesd-{name}", sd)
        outputs.append(decode(comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(path)))))
    found["vae"] = error(*outputs)


NEW_LOADER = """
from comfy.utils import load_torch_file

def load(model, path):
    state_dict = load_torch_file(path)
    return model.load_state_dict(dict(state_dict.items()), strict=False)
"""


def loader_of(file):
    """A loader written tomorrow, in one of ComfyUI's files or a pack's."""
    module = types.ModuleType(Path(file).stem)
    exec(compile(NEW_LOADER, str(Path(ROOT, file)), "exec"), vars(module))
    return module.load


def write_pack(name, text):
    """A pack whose other file has a text; gives its loader's file."""
    pack = FOLDER / "custom_nodes" / name
    pack.mkdir(parents=True, exist_ok=True)
    (pack / "other.py").write_text(text)
    return pack / "loader.py"


def check_new_loaders(files, meant):
    """Loaders that nobody has written yet load what the file means."""
    model = nn.Module()
    model.ours, model.theirs = nn.Linear(128, 8, dtype=torch.bfloat16), nn.Linear(64, 8)
    loaders = {
        "comfyui": "comfy_extras/nodes_new.py",
        "ignorant pack": write_pack("ignorant", "upscale = 2"),
        "knowing pack": write_pack("knowing", "suffix = '.scale_weight'"),
    }
    for name, file in loaders.items():
        _, unexpected = loader_of(file)(model, str(files["both"]))
        found["new"][name] = {
            "ours": torch.equal(model.ours.weight, meant["ours.weight"]),
            "theirs": torch.equal(model.theirs.weight, meant["theirs.weight"].float()),
            "unexpected": sorted(set(unexpected) - set(meant)),
        }
    found["own formats"] = hasattr(comfy.utils, "convert_old_quants")
    files["awq"] = write(
        "awq",
        {
            "theirs.weight": torch.ones(8, 64, dtype=torch.int8),
            "theirs.weight_scale": torch.ones(8, 1),
            "theirs.comfy_quant": torch.tensor(list(b'{"format": "awq_w4a16"}')).byte(),
        },
    )
    try:
        loader_of("comfy_extras/nodes_new.py")(model, str(files["awq"]))
    except Exception as caught:
        found["unreadable"] = f"{type(caught).__name__}: {caught}"


# -- the state dict --------------------------------------------------------------------


def check_manners(files, meant):
    """A file that was not opened behaves as the dict of a dense file."""
    read = comfy.utils.load_torch_file
    path, result = str(files["ours"]), found["manners"]
    expected = {k: t for k, t in meant.items() if not k.startswith("theirs")}
    file = read(path)
    result["copies"] = all(
        same(each, expected)
        for each in (
            dict(file),
            {**file},
            {} | file,
            file | {},
            file.copy(),
            copy.copy(file),
            copy.deepcopy(file),
            dict(zip(file.keys(), file.values(), strict=True)),
        )
    )
    result["is a dict"] = isinstance(file, dict) and len(file) == len(expected)
    result["hidden"] = "ours.scale_weight" in file, file.get("ours.scale_weight", 0)
    renamed = comfy.utils.state_dict_prefix_replace(read(path), {"ours.": "new."})
    result["renamed"] = torch.equal(renamed["new.weight"], meant["ours.weight"])
    renamed.open()
    result["renamed, opened"] = sorted(renamed)
    file["ours.weight"] = torch.zeros(1)
    file.open()
    result["written, opened"] = sorted(file), file["ours.weight"].numel()
    with Log() as log:
        read(path)["norm.weight"]
    result["log"] = [line for line in log.lines if "decoded" in line]
    copied = FOLDER / "copied.safetensors"
    comfy.utils.save_torch_file(read(path), str(copied))
    result["copied file"] = same(load_file(copied), load_file(path))
    opened = read(path)
    opened.open()
    result["opened"] = same(opened, load_file(path))
    with torch.device("cpu"):
        torch.save(read(path), FOLDER / "pickled.pt")
    nested = {1: torch.ones(2), "inner": {"a": torch.ones(2)}, "a.weight": codes()}
    torch.save(nested, FOLDER / "nested.pt")
    read_nested = read(str(FOLDER / "nested.pt"))
    result["nested"] = [str(key) for key in read_nested]
    result["pickled"] = same(torch.load(FOLDER / "pickled.pt"), expected)


def check_restored():
    """A model is decoded where somebody took a patch out; patch() puts it back."""
    import hijack.hosts

    bf16 = comfy_models.make_state_dict(comfy_models.small_qwen_shapes())
    coded, _ = comfy_models.musubi(bf16)
    path = str(write("qwen", coded))
    text, said = musubi(text_encoder("clip_l"))
    reference = comfy_case.first_output(comfy_case.load(comfy_case.exact(coded)))
    spoken = pooled(load_clip(said, kind="STABLE_DIFFUSION"))[1]
    detection, load_sd = comfy.model_detection, comfy.sd.CLIP.load_sd.__wrapped__
    detection.model_config_from_unet = detection.model_config_from_unet.__wrapped__
    comfy.sd.CLIP.load_sd = load_sd
    result = found["restored"]
    result["status"] = str(hijack.hosts.status()["comfyui"])
    with Log() as log:
        loaded = {
            "file": comfy.sd.load_diffusion_model(path),
            "state dict": comfy.sd.load_diffusion_model_state_dict(dict(coded)),
        }
        clip = load_clip(text, kind="STABLE_DIFFUSION")
    result["log"] = [line for line in log.lines if "took our patch" in line][:1]
    result["errors"] = {
        name: error(comfy_case.first_output(patcher), reference)
        for name, patcher in loaded.items()
    }
    result["errors"]["text encoder"] = error(pooled(clip)[1], spoken)
    result["healed"] = hijack.hosts.patch("comfyui").patched
    patcher = comfy.sd.load_diffusion_model(path)
    result["quantized"] = quantized(patcher.model)
    result["errors"]["healed"] = error(comfy_case.first_output(patcher), reference)


def codes():
    """A weight that was cast to FP8."""
    return torch.ones(4, 4).to(comfy_case.FP8)


def check_plain(files):
    """A file without quantized layers is ComfyUI's own dict of ComfyUI's tensors."""
    import hijack.hosts

    ours = comfy.utils.load_torch_file(str(files["plain"]), return_metadata=True)
    hijack.hosts.unpatch(force=True)
    theirs = comfy.utils.load_torch_file(str(files["plain"]), return_metadata=True)
    found["plain"] = [
        type(ours[0]) is dict,
        ours[1] == theirs[1],
        same(ours[0], theirs[0]),
        sorted({type(tensor).__name__ for tensor in ours[0].values()}),
    ]
    found["copies restored"] = (
        comfy.clip_vision.load_torch_file is comfy.utils.load_torch_file
    )
    hijack.hosts.patch()


def write(name, tensors, metadata=None):
    """A file of these tensors."""
    path = FOLDER / f"{name}.safetensors"
    save_file({k: t.contiguous() for k, t in tensors.items()}, path, metadata)
    return path


def make_files():
    """Files of one layer each, ours and ComfyUI's own, and what they mean."""
    torch.manual_seed(0)
    rest = {
        "norm.weight": torch.ones(64, dtype=torch.bfloat16),
        "embedding.weight": torch.randn(32, 64).bfloat16(),
        "positions": torch.arange(4)[None],
    }
    ours, meant = musubi(
        {"ours.weight": torch.randn(8, 128).bfloat16()}, dtype=torch.bfloat16
    )
    theirs = native("theirs.weight", torch.randn(8, 64), "float8_e4m3fn")
    files = {
        "both": write("both", {**rest, **ours, **theirs}),
        "ours": write("ours", {**rest, **ours}),
        "plain": write("plain", rest, {"said": "so"}),
    }
    scaled = theirs["theirs.weight"].float() * theirs["theirs.weight_scale"]
    meant = {**meant, "theirs.weight": scaled}
    return files, {**rest, **{key: t.bfloat16() for key, t in meant.items()}}


def main():
    """All checks; what they found is printed as the last line."""
    import hijack.hosts
    import schemes.blockwise_fp8  # noqa: F401

    for name in ("callers", "clip vision", "new", "manners", "restored"):
        found[name] = {}
    found["status"] = str(hijack.hosts.patch("comfyui"))
    files, meant = make_files()
    check_callers(files, meant)
    check_clip_vision()
    check_small_vae()
    check_new_loaders(files, meant)
    check_manners(files, meant)
    check_restored()
    check_plain(files)


if __name__ == "__main__":
    with torch.inference_mode():  # as ComfyUI runs nodes
        main()
    print(json.dumps(found))
