"""Run by tests: hijack in releases of ComfyUI that do not exist yet.

Usage: future_case.py COMFYUI FOLDER

Each change of `CHANGES` is made to a copy of COMFYUI in FOLDER, and met in a process of
its own, forked from this one. Prints one JSON object: the name of each change, and what
was found with it.
"""

# ruff: noqa: E402 - ComfyUI is importable only once it is prepared
from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import shutil
import sys
import traceback
from pathlib import Path

HERE = Path(__file__).parent
REPOSITORY = HERE.parents[1]
sys.path[:0] = [str(REPOSITORY), str(HERE.parent / "comfyui"), str(HERE)]

import launch

os.environ["HIJACK_DISABLE"] = "comfyui"  # until the pack is loaded
from hijack.testing import host_process

NAME = "model_config_from_unet"
SIGNATURE = rf"def {NAME}\("
CALL = rf"(?<!def )\b{NAME}\("

#: Name to (pattern, replacement, files): what the people of ComfyUI might do one day.
CHANGES: dict[str, list[tuple[str, str, str]]] = {
    "nothing": [],
    "version far ahead": [(r'__version__ = ".*"', '__version__ = "9.9.9"', "*")],
    "detection renamed": [(rf"\b{NAME}\b", "detect_model", "*")],
    "detection with another argument": [
        (SIGNATURE + r"(.*)\):", rf"def {NAME}(\1, *, strict):", "model_detection.py"),
        (CALL + r"(.*)\)\n", rf"{NAME}(\1, strict=True)\n", "*"),
    ],
    "detection with an argument in front": [
        (SIGNATURE, f"def {NAME}(loader, ", "model_detection.py"),
        (CALL, f"{NAME}('stock', ", "*"),
    ],
    "detection with other names": [
        (SIGNATURE + r"state_dict, ", f"def {NAME}(weights, ", "model_detection.py"),
        (rf"({NAME}\(weights, .*:\n)", r"\1    state_dict = weights\n", "*"),
    ],
    "detection returns a pair": [
        (rf"({SIGNATURE}(?:.*\n)*?    return model_config)\n", r"\1, 1\n", "*"),
        (rf"({CALL}.*\))\n", r"\1[0]\n", "*"),
    ],
    "class removed": [(r"\bdisable_weight_init\b", "bare", "*")],
    "custom operations gone": [(r"\bcustom_operations\b", "operations_", "*")],
}  # fmt: skip


def make_copy(root, folder, edits):
    """A ComfyUI with changes; what its library does not need is left out."""
    for name in ("comfy", "comfy_extras", "comfy_api", "comfy_execution", "utils"):
        if (root / name).is_dir():
            ignore = shutil.ignore_patterns("__pycache__", "*.json", "*.txt", "*.model")
            shutil.copytree(root / name, folder / name, ignore=ignore)
    for path in root.glob("*.py"):
        shutil.copyfile(path, folder / path.name)
    changed = {pattern: 0 for pattern, _, _ in edits}
    for path in folder.rglob("*.py") if edits else ():
        text = before = path.read_text("utf-8")
        for pattern, replacement, files in edits:
            if path.match(files):
                text, count = re.subn(pattern, replacement, text)
                changed[pattern] += count
        if text != before:
            path.write_text(text, "utf-8")
    missed = [pattern for pattern, count in changed.items() if not count]
    assert not missed, f"nothing to change: {missed}"


# -- inside one ComfyUI ----------------------------------------------------------------


class Lines(logging.Handler):
    """Keeps what hijack logs."""

    def __init__(self):
        super().__init__(logging.WARNING)
        self.lines = []

    def emit(self, record):
        """Keep one line."""
        self.lines.append(record.getMessage())


def load_pack():
    """Import the repository as ComfyUI imports a node pack, by its folder."""
    spec = importlib.util.spec_from_file_location(
        "node_pack",
        REPOSITORY / "__init__.py",
        submodule_search_locations=[str(REPOSITORY)],
    )
    module = sys.modules["node_pack"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)


def first_output(state_dict):
    """What the stock loader makes of a state dict: the network's first output."""
    import comfy.model_management
    import comfy.sd
    import torch

    patcher = comfy.sd.load_diffusion_model_state_dict(dict(state_dict))
    comfy.model_management.load_models_gpu([patcher])
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((1, 16, 1, 8, 8), generator=generator)
    context = torch.randn((1, 7, 192), generator=generator)
    return patcher.model.apply_model(x, torch.tensor([0.7]), c_crossattn=context)


def meet(root):
    """What hijack does in one ComfyUI."""
    launch.prepare(root)
    import comfy.supported_models
    import comfy_harness
    import comfy_models
    import torch

    import hijack.hosts

    small = {"num_attention_heads": 2, "joint_attention_dim": 192}
    comfy.supported_models.QwenImage.unet_extra_config = small
    lines, found = Lines(), {}
    logging.getLogger().addHandler(lines)
    with torch.inference_mode():
        bf16 = comfy_models.make_state_dict(comfy_models.small_qwen_shapes())
        quantized_sd, exact = comfy_models.musubi(bf16)
        before, reference = first_output(bf16), first_output(exact)
        lines.lines.clear()
        del os.environ["HIJACK_DISABLE"]
        load_pack()
        found["start"] = list(lines.lines)
        found["status"] = str(hijack.hosts.status()["comfyui"])
        found["bf16 as before"] = torch.equal(before, first_output(bf16))
        try:
            output = first_output(quantized_sd)
            found["fp8"] = comfy_harness.relative_error(output, reference)
        except Exception as error:
            found["fp8"] = f"{type(error).__name__}: {error}"
    return found


def meet_in_child(root):
    """The same in a process of its own, which this one's modules make start fast."""
    result = root / "result.json"
    child = os.fork()
    if child == 0:
        try:
            result.write_text(json.dumps(meet(root)))
        except BaseException:
            result.write_text(json.dumps({"died": traceback.format_exc()}))
        os._exit(0)
    os.waitpid(child, 0)
    return json.loads(result.read_text())


def warm_up(root):
    """Import what ComfyUI needs, and nothing that lies in its folder."""
    launch.prepare(root)
    host_process.warm_up("comfy.sd")
    sys.path.remove(str(root))
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "")).startswith(str(root)):
            del sys.modules[name]


def main(root, folder, *names):
    """Every change, or those named."""
    root, found = Path(root), {}
    warm_up(root)
    for place, name in enumerate(names or CHANGES):
        copy = Path(folder) / str(place)
        copy.mkdir()
        make_copy(root, copy, CHANGES[name])
        found[name] = meet_in_child(copy)
    return found


if __name__ == "__main__":
    print(json.dumps(main(*sys.argv[1:])))
