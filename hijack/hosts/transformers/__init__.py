"""transformers, from 4.57.6 to 5.24.0.

A model enters through ``PreTrainedModel._load_pretrained_model``, which every
``from_pretrained`` calls with the files: there the host is given one tensor for each
weight, and its own code renames, merges, casts and places them. The quantizer that is
registered says what the host asks of one; `HijackConfig` is how a user asks for it.
"""

from __future__ import annotations

import sys
from typing import Any

from hijack.hosts.adapter import Probe, imported_version
from hijack.hosts.config import HijackConfig
from hijack.patching import Entry, Patch
from hijack.safetensors_io.header import QUANT_METHOD

NAME = "transformers"
#: The host can be patched once this module is imported completely.
MODULE = "transformers.modeling_utils"
#: First and last version this was tested with.
SUPPORTED = ("4.57.6", "5.24.0")

_MODEL = f"{MODULE}.PreTrainedModel"
PROBES = (
    Probe("transformers.quantizers.auto.AUTO_QUANTIZER_MAPPING"),
    Probe("transformers.quantizers.auto.AUTO_QUANTIZATION_CONFIG_MAPPING"),
    Probe("transformers.quantizers.base.HfQuantizer"),
    Probe(f"{MODULE}.get_hf_quantizer", ("config", "quantization_config")),
    Probe(f"{MODULE}.get_state_dict_dtype", ("state_dict",)),
    Probe(f"{MODULE}._get_resolved_checkpoint_files", ("variant",)),
    Probe(
        f"{_MODEL}._load_pretrained_model", ("model", "state_dict", "checkpoint_files")
    ),
    Probe(f"{_MODEL}.save_pretrained", ("save_directory", "variant")),
    Probe(f"{_MODEL}.get_memory_footprint", ("return_buffers",)),
)


def get_version() -> str:
    """The imported transformers' version, or "unknown"."""
    return imported_version(NAME)


def patches() -> list[Patch | Entry]:
    """What to patch."""
    from hijack.hosts.transformers import loading, saving
    from hijack.hosts.transformers.quantizer import HijackQuantizer

    host, auto = sys.modules[MODULE], sys.modules["transformers.quantizers.auto"]
    model: Any = host.PreTrainedModel
    files = "_get_resolved_checkpoint_files"
    found: list[Patch | Entry] = [
        Entry(auto, "AUTO_QUANTIZER_MAPPING", QUANT_METHOD, HijackQuantizer),
        Entry(auto, "AUTO_QUANTIZATION_CONFIG_MAPPING", QUANT_METHOD, HijackConfig),
        Patch(host, "get_hf_quantizer", loading.make_get_hf_quantizer, copied=True),
        Patch(host, "get_state_dict_dtype", loading.make_get_state_dict_dtype),
        Patch(host, files, loading.make_get_resolved_checkpoint_files),
        Patch(model, "_load_pretrained_model", loading.make_load_pretrained_model),
        Patch(model, "save_pretrained", saving.make_save_pretrained),
        *_footprint(model),
    ]
    if hasattr(model, "_finalize_model_loading"):  # since transformers 5
        make = loading.make_finalize_model_loading
        found.append(Patch(model, "_finalize_model_loading", make))
    return found


def _footprint(model: Any) -> list[Patch]:
    from hijack.hosts.libraries import make_get_memory_footprint

    name = "get_memory_footprint"
    owner = next(base for base in model.__mro__ if name in vars(base))
    return [Patch(owner, name, make_get_memory_footprint)]


def live() -> int:
    """How many layers of models that the host loaded hold quantized weights."""
    from hijack.hosts.libraries import count_live

    return count_live(NAME)
