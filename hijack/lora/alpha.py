"""What a LoRA is multiplied with: alpha by rank, wherever a trainer wrote it down."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

from hijack.errors import CheckpointError, HeaderError
from hijack.safetensors_io.files import read_json
from hijack.safetensors_io.header import Header, parse_table
from hijack.safetensors_io.reader import open_tensors

#: The table that diffusers writes into a header, and the file that PEFT writes.
_METADATA = "lora_adapter_metadata"
_FILE, _CONFIG = "adapter_model.safetensors", "adapter_config.json"


def alpha_of(source: Header, module: str, key: str | None, rank: int) -> float:
    """What the difference of one LoRA is multiplied with.

    A tensor in the file outweighs what diffusers or PEFT say of the whole; without
    either it is 1.

    Args:
        source: header of the LoRA file.
        module: its name there.
        key: of its alpha, if it has one.
        rank: that alpha is held against; 0 where alpha has no meaning.

    Raises:
        CheckpointError: if alpha is no finite number.
    """
    if rank == 0:
        return 1.0
    if key is not None:
        alpha, divisor = _read(source, key), float(rank)
        where = f"{source.source}: {key}"
    else:
        where = f"{source.source}: {module}"
        config, name = _config(source, module)
        alpha = _listed(config, name, rank)
        divisor = math.sqrt(rank) if config.get("use_rslora") is True else float(rank)
    if not math.isfinite(alpha):
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


def _config(source: Header, module: str) -> tuple[Mapping[str, Any], str]:
    """PEFT's config that counts for a module, and the module's name in it."""
    table = parse_table(source.metadata.get(_METADATA, ""))
    component, _, name = module.partition(".")
    start = f"{component}."
    config = {k.removeprefix(start): v for k, v in table.items() if k.startswith(start)}
    if config:
        return config, name
    if _CONFIG not in source.memo:
        source.memo[_CONFIG] = _beside(source)
    return source.memo[_CONFIG], module.removeprefix("base_model.model.")


def _beside(source: Header) -> Mapping[str, Any]:
    """What PEFT wrote beside a file of its own; empty where it did not.

    Raises:
        HeaderError: if nobody can read it; without it the LoRA's strength is unknown.
    """
    file = next((info.file for info in source.tensors.values()), None)
    if file is None or file.name != _FILE:
        return {}
    path = file.with_name(_CONFIG)
    if not os.path.lexists(path):
        return {}
    config = read_json(path)
    if not isinstance(config, dict):
        raise HeaderError(f"{path}: is no table, expected PEFT's config; get it again")
    return config


def _listed(config: Mapping[str, Any], name: str, rank: int) -> float:
    """Alpha of a module: its own, or that of all; the rank where there is neither."""
    alpha = config.get("lora_alpha", rank)
    patterns = config.get("alpha_pattern")
    for pattern, own in patterns.items() if isinstance(patterns, dict) else ():
        if f".{name}".endswith(f".{pattern}"):
            alpha = own
            break
    try:
        return float(alpha)
    except (TypeError, ValueError, OverflowError):
        return math.nan
