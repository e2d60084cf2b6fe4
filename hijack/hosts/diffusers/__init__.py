"""diffusers, from 0.35.2 to 0.42.1.

The host is given one tensor for each weight of a file, and its own code renames, splits
and places them: `loading`. What it asks of a quantizer where a config names hijack's is
in `quantizer`, and what it writes is in `saving`.
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import Any

import wrapt

from hijack.hosts.adapter import Probe, imported_version
from hijack.hosts.config import HijackConfig
from hijack.patching import Entry, Patch
from hijack.safetensors_io.header import QUANT_METHOD
from hijack.text import logger

__all__ = ["HijackConfig"]  # what users take from here

log = logger(__name__)

NAME = "diffusers"
#: The host can be patched once this module is imported completely.
MODULE = "diffusers.loaders.single_file_model"
#: First and last version this was tested with.
SUPPORTED = ("0.35.2", "0.42.1")

_MODELS = "diffusers.models.modeling_utils"
_PARTS = "diffusers.models.model_loading_utils"
_FILES = "diffusers.loaders.single_file_utils"
_AUTO = "diffusers.quantizers.auto"

PROBES = (
    Probe(f"{_AUTO}.AUTO_QUANTIZER_MAPPING"),
    Probe(f"{_AUTO}.AUTO_QUANTIZATION_CONFIG_MAPPING"),
    Probe("diffusers.quantizers.base.DiffusersQuantizer"),
    Probe(f"{_AUTO}.DiffusersAutoQuantizer.merge_quantization_configs"),
    Probe(
        f"{_MODELS}.ModelMixin._load_pretrained_model",
        (
            *("model", "state_dict", "resolved_model_file", "loaded_keys"),
            *("hf_quantizer", "device_map", "offload_state_dict"),
        ),
    ),
    Probe(f"{_MODELS}.ModelMixin.save_pretrained", ("save_directory",)),
    Probe(f"{_MODELS}.ModelMixin.get_memory_footprint"),
    Probe(f"{_MODELS}.ModelMixin._fix_state_dict_keys_on_load", ("state_dict",)),
    Probe(f"{_PARTS}.load_model_dict_into_meta", ("model", "state_dict")),
    Probe(f"{_PARTS}._load_state_dict_into_model", ("model_to_load", "state_dict")),
    Probe(f"{_FILES}.load_state_dict", ("checkpoint_file",)),
    Probe(f"{MODULE}.FromOriginalModelMixin.from_single_file"),
)


def _import_rest(_: ModuleType) -> None:
    """Import what there is to patch; some models need only a part of it."""
    try:
        if MODULE not in sys.modules:
            importlib.import_module(MODULE)
    except Exception as error:  # the host's own import must go on
        kind = type(error).__name__
        log.warning("hijack: %s cannot be imported: %s: %s", MODULE, kind, error)


wrapt.register_post_import_hook(_import_rest, _MODELS)


def get_version() -> str:
    """The imported diffusers' version, or "unknown"."""
    return imported_version(NAME)


def patches() -> list[Patch | Entry]:
    """What to patch."""
    from hijack.hosts.diffusers import loading, quantizer, saving
    from hijack.hosts.libraries import make_get_memory_footprint

    auto, parts, files = (sys.modules[name] for name in (_AUTO, _PARTS, _FILES))
    model: Any = sys.modules[_MODELS].ModelMixin
    single: Any = sys.modules[MODULE]
    into_meta = "load_model_dict_into_meta"
    return [
        Entry(auto, "AUTO_QUANTIZER_MAPPING", QUANT_METHOD, quantizer.HijackQuantizer),
        Entry(auto, "AUTO_QUANTIZATION_CONFIG_MAPPING", QUANT_METHOD, HijackConfig),
        Patch(
            auto.DiffusersAutoQuantizer,
            "merge_quantization_configs",
            loading.make_merge_quantization_configs,
        ),
        Patch(model, "_load_pretrained_model", loading.make_load_pretrained_model),
        Patch(parts, into_meta, loading.make_placing),
        Patch(single, into_meta, loading.make_placing, copied=True),
        Patch(files, into_meta, loading.make_placing, copied=True),
        Patch(parts, "_load_state_dict_into_model", loading.make_copying),
        Patch(files, "load_state_dict", loading.make_load_state_dict, copied=True),
        Patch(
            single.FromOriginalModelMixin,
            "from_single_file",
            loading.make_from_single_file,
            copied=True,  # what the host decorates it with is another's
        ),
        Patch(model, "save_pretrained", saving.make_save_pretrained),
        Patch(model, "get_memory_footprint", make_get_memory_footprint),
        *_offloading(),
    ]


def _offloading() -> list[Patch]:
    """What writes to the disk, as far as it is there."""
    from hijack.hosts.diffusers.offloading import make_with_parts

    group: Any = importlib.import_module("diffusers.hooks.group_offloading").ModuleGroup
    names = ("_onload_from_disk", "_offload_to_disk")
    return [Patch(group, n, make_with_parts) for n in names if n in vars(group)]


def live() -> int:
    """How many layers of models that the host loaded hold quantized weights."""
    from hijack.hosts.libraries import count_live

    return count_live(NAME)
