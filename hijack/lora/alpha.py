"""The scale of a LoRA, alpha / rank, wherever a trainer stored alpha."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hijack.errors import CheckpointError, HeaderError
from hijack.safetensors_io.files import read_json
from hijack.safetensors_io.header import Header, parse_table
from hijack.safetensors_io.reader import open_tensors

#: The metadata that diffusers writes, and the files that PEFT writes.
_METADATA = "lora_adapter_metadata"
_FILE, _CONFIG = "adapter_model.safetensors", "adapter_config.json"
#: LoRAs are merged in float32, which has no larger number.
_MOST_ALPHA = torch.finfo(torch.float32).max


def alpha_scale(
    source: Header,
    module: str,
    key: str | None,
    rank: int,
    peft_config: Callable[[], Mapping[str, Any]],
) -> float:
    """The factor of one LoRA's difference.

    A tensor in the file outranks the config of diffusers or PEFT; without either the
    factor is 1.

    Args:
        source: header of the LoRA file.
        module: its name there.
        key: of its alpha, if it has one.
        rank: the divisor of alpha; 0 if alpha does not apply.
        peft_config: returns PEFT's config of the file; called if it is needed.

    Raises:
        CheckpointError: if alpha is not a finite number of float32.
    """
    if rank == 0:
        return 1.0
    if key is not None:
        alpha, divisor = _read(source, key), float(rank)
        where = f"{source.source}: {key}"
    else:
        where = f"{source.source}: {module}"
        config, name = _diffusers_config(source, module)
        if not config:
            config, name = peft_config(), module.removeprefix("base_model.model.")
        alpha = _config_alpha(config, name, rank)
        divisor = math.sqrt(rank) if config.get("use_rslora") is True else float(rank)
    if not abs(alpha) <= _MOST_ALPHA:  # NaN is not, either
        raise CheckpointError(
            f"{where}: alpha is {alpha}, expected a finite number; the file is damaged"
        )
    return alpha / divisor


def _read(source: Header, key: str) -> float:
    info = source.tensors[key]
    if not info.real or math.prod(info.shape) != 1:
        raise CheckpointError(
            f"{source.source}: {key}: is {info.dtype} {list(info.shape)}, expected one "
            "number"
        )
    return float(open_tensors(source)[key])


def _diffusers_config(source: Header, module: str) -> tuple[Mapping[str, Any], str]:
    """The entries in a header for a module's component, and the module's name there."""
    table = parse_table(source.metadata.get(_METADATA, ""))
    component, _, name = module.partition(".")
    prefix = f"{component}."
    entries = (item for item in table.items() if item[0].startswith(prefix))
    return {key.removeprefix(prefix): value for key, value in entries}, name


def read_peft_config(source: Header) -> Mapping[str, Any]:
    """The config that PEFT writes beside its own files; empty without one.

    Raises:
        HeaderError: if it cannot be read; without it the LoRA's strength is unknown.
    """
    file = next((info.file for info in source.tensors.values()), None)
    if file is None or file.name != _FILE:
        return {}
    path = file.with_name(_CONFIG)
    if not os.path.lexists(path):
        return {}
    config = read_json(path)
    if not isinstance(config, dict):
        raise HeaderError(
            f"{path}: is not a JSON object, expected PEFT's config; get it again"
        )
    return config


def _config_alpha(config: Mapping[str, Any], name: str, rank: int) -> float:
    """Alpha of a module, else of all modules, else the rank."""
    alpha = config.get("lora_alpha", rank)
    patterns = config.get("alpha_pattern")
    for pattern, value in patterns.items() if isinstance(patterns, dict) else ():
        if f".{name}".endswith(f".{pattern}"):
            alpha = value
            break
    try:
        return float(alpha)
    except (TypeError, ValueError, OverflowError):
        return math.nan
