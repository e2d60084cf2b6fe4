"""ComfyUI, from 0.3.64 to 0.33.0.

Diffusion models enter through ``comfy.model_detection.model_config_from_unet``: its
signature is the same in all these releases, and every loader calls it. Text encoders,
VAEs and ControlNets have loaders of their own; where a release lacks one of those, what
would enter there stays ComfyUI's own, and the rest works.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import sys
from pathlib import Path
from types import FunctionType
from typing import Any

from hijack.hosts.adapter import Probe
from hijack.patching import Patch
from hijack.text import logger

NAME = "comfyui"
#: The host can be patched once this module is imported completely.
MODULE = "comfy.sd"
#: First and last version this was tested with.
SUPPORTED = ("0.3.64", "0.33.0")

PROBES = (
    Probe(
        "comfy.model_detection.model_config_from_unet",
        ("state_dict", "unet_key_prefix"),
    ),
    Probe(
        "comfy.supported_models_base.BASE.set_inference_dtype",
        ("dtype", "manual_cast_dtype"),
    ),
    Probe("comfy.supported_models_base.BASE.get_model", ("state_dict",)),
    Probe("comfy.supported_models_base.BASE.process_unet_state_dict", ("state_dict",)),
    Probe("comfy.supported_models_base.BASE.custom_operations"),
    Probe("comfy.supported_models_base.BASE.supported_inference_dtypes"),
    Probe("comfy.lora.calculate_weight", ("patches", "weight", "key")),
    Probe("comfy.utils.copy_to_param", ("obj", "attr", "value")),
    Probe("comfy.utils.save_torch_file", ("sd", "ckpt", "metadata")),
    Probe("comfy.weight_adapter.LoRAAdapter"),
    Probe("comfy.model_patcher.LowVramPatch"),
    Probe("comfy.ops.pick_operations", ("weight_dtype", "compute_dtype")),
    Probe("comfy.ops.cast_bias_weight", ("s", "input")),
    Probe("comfy.ops.disable_weight_init.Linear"),
    Probe("comfy.ops.disable_weight_init.Embedding"),
    Probe("comfy.utils.weight_dtype", ("sd", "prefix")),
    Probe("comfy.utils.calculate_parameters", ("sd", "prefix")),
    Probe(
        "comfy.model_management.unet_dtype",
        ("model_params", "supported_dtypes", "weight_dtype"),
    ),
    Probe(
        "comfy.model_management.unet_manual_cast",
        ("weight_dtype", "inference_device", "supported_dtypes"),
    ),
)

#: What the other loaders need besides.
LOADERS = (
    Probe("comfy.sd.load_text_encoder_state_dicts", ("state_dicts",)),
    Probe("comfy.sd.CLIP.load_sd", ("self", "sd")),
    Probe("comfy.sd.VAE.__init__", ("self", "sd")),
    Probe(
        "comfy.controlnet.load_controlnet_state_dict",
        ("state_dict", "model", "model_options"),
    ),
    Probe("comfy.utils.weight_dtype", ("sd", "prefix")),
    Probe("comfy.model_detection.convert_diffusers_mmdit", ("state_dict",)),
    Probe("comfy.model_detection.model_config_from_diffusers_unet", ("state_dict",)),
    Probe("comfy.utils.load_torch_file", ("ckpt",)),
    Probe("comfy.sd.load_diffusion_model_state_dict", ("sd",)),
    Probe("comfy.sd.load_state_dict_guess_config", ("sd",)),
)

log = logger(__name__)


def get_version() -> str:
    """ComfyUI's version, or "unknown"."""
    version = getattr(sys.modules.get("comfyui_version"), "__version__", None)
    if isinstance(version, str):
        return version
    # A file of one line beside the package; not imported, for that is up to the host.
    for path in getattr(sys.modules.get("comfy"), "__path__", ()):
        file = Path(path).parent / "comfyui_version.py"
        if file.is_file():
            match = re.search(
                r"__version__\s*=\s*['\"]([^'\"]+)", file.read_text("utf-8")
            )
            if match:
                return match[1]
    return "unknown"


def patches() -> list[Patch]:
    """What to patch."""
    from hijack.hosts.comfyui.loaders import make_model_config_from_unet
    from hijack.hosts.comfyui.lora import make_calculate_weight, make_copy_to_param
    from hijack.hosts.comfyui.saving import make_save_torch_file

    detection = sys.modules["comfy.model_detection"]
    found = [
        Patch(detection, "model_config_from_unet", make_model_config_from_unet),
        Patch(sys.modules["comfy.lora"], "calculate_weight", make_calculate_weight),
        Patch(sys.modules["comfy.utils"], "copy_to_param", make_copy_to_param),
        Patch(sys.modules["comfy.utils"], "save_torch_file", make_save_torch_file),
        *_patcher_methods(),
        *_other_loaders(),
        *_native_readers(),
    ]
    return [*_reader_copies(), *found]


def _reader_copies() -> list[Patch]:
    """The same patch where ``from comfy.utils import`` has copied the file reader.

    ComfyUI does so itself, and so do packs that were imported before us.
    """
    from hijack.hosts.comfyui.reader import make_load_torch_file

    utils, name = sys.modules["comfy.utils"], "load_torch_file"
    return [
        Patch(module, copy, make_load_torch_file, copied=True)
        for module in list(sys.modules.values())
        for copy, value in list(getattr(module, "__dict__", {}).items())
        # whoever has replaced the reader did so after some have copied it
        if type(value) is FunctionType
        and value.__globals__ is vars(utils)
        and value.__qualname__ == name
        and module is not utils
        and getattr(module, "__name__", "__main__") != "__main__"
    ]


def _patcher_methods() -> list[Patch]:
    """Where weights are asked for and memory is given back, as far as it is there."""
    from hijack.hosts.comfyui.linear import make_model_state_dict, make_partially_unload

    module = sys.modules["comfy.model_patcher"]
    found = []
    for name, method, make in (
        ("ModelPatcher", "model_state_dict", make_model_state_dict),
        ("ModelPatcherDynamic", "partially_unload", make_partially_unload),
    ):
        owner: Any = getattr(module, name, object)  # dynamic VRAM is new
        if method in vars(owner):
            found.append(Patch(owner, method, make))
    return found


def _other_loaders() -> list[Patch]:
    """The loaders of other models and other spellings, as far as they are there."""
    from hijack.hosts.comfyui import reader, text_encoders
    from hijack.hosts.comfyui.fused_rows import make_convert_diffusers_mmdit
    from hijack.hosts.comfyui.loaders import make_diffusers_unet

    makers = (
        text_encoders.make_load_text_encoders,
        text_encoders.make_load_sd,
        text_encoders.make_vae_init,
        text_encoders.make_load_controlnet,
        text_encoders.make_weight_dtype,
        make_convert_diffusers_mmdit,
        make_diffusers_unet,
        reader.make_load_torch_file,
        reader.make_taking_quantized,
        reader.make_taking_quantized,
    )
    found = []
    with contextlib.suppress(Exception):  # the probe says what is missing
        # Part of a host that is imported already, though maybe not yet this part.
        importlib.import_module("comfy.controlnet")
    for probe, make in zip(LOADERS, makers, strict=True):
        problem = probe.problem()
        if problem is None:
            path, _, attribute = probe.path.rpartition(".")
            found.append(Patch(_owner(path), attribute, make))
        else:
            log.warning("hijack: %s; quantized files are not read there", problem)
    return found


def _native_readers() -> list[Patch]:
    """What loaders of ComfyUI's own quantized layers call, where it is there."""
    from hijack.hosts.comfyui import reader

    utils = sys.modules["comfy.utils"]
    makers = {
        "convert_old_quants": reader.make_convert_old_quants,
        "detect_layer_quantization": reader.make_detect_layer_quantization,
    }
    return [
        Patch(utils, name, make)
        for name, make in makers.items()
        if hasattr(utils, name)
    ]


def _owner(path: str) -> Any:
    """A module, or a class in one."""
    parent, _, name = path.rpartition(".")
    return sys.modules.get(path) or getattr(sys.modules[parent], name)


def live() -> int:
    """How many quantized layers are alive in the host."""
    layers = sys.modules.get("hijack.hosts.comfyui.linear")
    return 0 if layers is None else len(layers.LIVE)


def describe_layers() -> tuple[str, ...]:
    """The quantized layers alive in the host, one sentence for each model."""
    if live() == 0:
        return ()
    from hijack.hosts.comfyui import inventory

    return inventory.describe_layers()
