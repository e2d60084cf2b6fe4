"""``config.json``, which readers of some dialects expect beside a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from hijack.errors import CheckpointError
from hijack.formats.dialect import FormatMetadata
from hijack.safetensors_io.atomic import new_file, refuse_replacing
from hijack.safetensors_io.files import read_config
from hijack.safetensors_io.header import CONFIG_KEY, Header

_NAME = "config.json"


def config_of(
    metadata: FormatMetadata,
    dialect: str,
    source: Header,
    path: Path,
    overwrite: bool,
) -> Mapping[str, object]:
    """The ``quantization_config`` to write beside a file.

    Args:
        metadata: of the file.
        dialect: of the file.
        source: header of the file it is made from.
        path: of the file.
        overwrite: whether an existing ``quantization_config`` is replaced. One that is
            missing is always added, which loses nothing.

    Raises:
        CheckpointError: if the dialect has no config, the config would be beside the
            source, which it does not describe, or the existing one cannot be read or
            must not be replaced.
    """
    if metadata.config is None:
        raise CheckpointError(
            f"write_config: dialect {dialect} has no quantization_config; expected one "
            "such as deepseek; leave out write_config"
        )
    for info in source.tensors.values():
        if info.file and info.file.parent.resolve() == path.parent.resolve():
            raise CheckpointError(
                f"{path.parent / _NAME}: would be beside the source too, which it does "
                f"not describe; expected another folder for {path.name}; write it "
                "there, or leave out write_config (--write-config)"
            )
    target = path.parent / _NAME
    existing = read_config(path.parent)
    if os.path.lexists(target) and existing is None:
        raise CheckpointError(
            f"{target}: is not a JSON object, and would be overwritten; expected a "
            "config to add to; move it away, or leave out write_config"
        )
    if existing and existing.get(CONFIG_KEY, metadata.config) != metadata.config:
        refuse_replacing([target], overwrite=overwrite)
    return metadata.config


def write_config_beside(
    path: Path, source: Mapping[str, object] | None, quantization: Mapping[str, object]
) -> Path:
    """Write a checkpoint's ``quantization_config`` to ``config.json``.

    The rest of an existing file is kept; without one, the source's config is used.

    Args:
        path: the checkpoint.
        source: the config beside the source, if any.
        quantization: the ``quantization_config``.

    Returns:
        The file, which is written atomically.

    Raises:
        CheckpointError: if it cannot be written.
    """
    target = path.parent / _NAME
    with new_file(target, overwrite=True) as part:
        kept = read_config(path.parent) or source or {}
        text = json.dumps({**kept, CONFIG_KEY: quantization}, indent=2) + "\n"
        part.write_text(text, encoding="utf-8")
    return target
