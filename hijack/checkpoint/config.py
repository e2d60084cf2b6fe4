"""``config.json``, which readers of some dialects expect beside a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from hijack.checkpoint.dialect import FileMarks
from hijack.checkpoint.header import CONFIG_KEY
from hijack.checkpoint.partial import replace, write_durably
from hijack.checkpoint.reader import read_config
from hijack.errors import CheckpointError


def config_of(marks: FileMarks, dialect: str) -> Mapping[str, object]:
    """What a file in a dialect has to say in ``config.json``.

    Raises:
        CheckpointError: if readers of the dialect expect none.
    """
    if marks.config is None:
        raise CheckpointError(
            f"write_config: dialect {dialect} has no quantization_config; expected one "
            "such as deepseek; leave write_config out"
        )
    return marks.config


def write_config_beside(
    path: Path, source: Mapping[str, object] | None, quantization: Mapping[str, object]
) -> Path:
    """Say in a checkpoint's ``config.json`` how it is quantized.

    What the file says besides stays; where there is none, that of the source is taken.

    Args:
        path: the checkpoint.
        source: the config that lay beside the source, if any.
        quantization: what to put under ``quantization_config``.

    Returns:
        The file written, whole or not at all.

    Raises:
        CheckpointError: if it cannot be written.
    """
    target = path.parent / "config.json"
    kept = read_config(path.parent) or source or {}
    text = json.dumps({**kept, CONFIG_KEY: quantization}, indent=2) + "\n"
    part = target.with_name(".config.json.part")
    try:
        write_durably(part, text.encode())
        replace(part, target)
    except OSError as error:
        part.unlink(missing_ok=True)
        raise CheckpointError(
            f"{target}: cannot be written; {error.strerror}"
        ) from error
    return target
