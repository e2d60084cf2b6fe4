"""``config.json``, which readers of some dialects expect beside a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from hijack.checkpoint.dialect import FileMarks
from hijack.checkpoint.header import CONFIG_KEY, Header
from hijack.checkpoint.partial import replace, write_durably
from hijack.checkpoint.reader import read_config
from hijack.errors import CheckpointError


def config_of(
    marks: FileMarks, dialect: str, source: Header, path: Path
) -> Mapping[str, object]:
    """What a file in a dialect has to say in ``config.json``.

    Args:
        marks: what it says as a whole.
        dialect: that of the file.
        source: what it is made of.
        path: of the file.

    Raises:
        CheckpointError: if readers of the dialect expect none, or the one in the folder
            is the source's, which would be read by it no longer.
    """
    if marks.config is None:
        raise CheckpointError(
            f"write_config: dialect {dialect} has no quantization_config; expected one "
            "such as deepseek; leave write_config out"
        )
    for info in source.tensors.values():
        if info.file and info.file.parent.resolve() == path.parent.resolve():
            raise CheckpointError(
                f"{path.parent / 'config.json'}: is the source's too, which is not "
                f"quantized so; expected another folder for {path.name}; write it "
                "there, or leave write_config out"
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
