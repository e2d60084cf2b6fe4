"""``config.json``, which readers of some dialects expect beside a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path

from hijack.errors import CheckpointError
from hijack.formats.dialect import FileMarks
from hijack.safetensors_io.atomic import Partial, leftovers, replace, write_durably
from hijack.safetensors_io.files import read_config
from hijack.safetensors_io.header import CONFIG_KEY, Header

_NAME = "config.json"


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
        CheckpointError: if readers of the dialect expect none, it would lie beside the
            source, which would be read by it no longer, or the one there cannot be
            read.
    """
    if marks.config is None:
        raise CheckpointError(
            f"write_config: dialect {dialect} has no quantization_config; expected one "
            "such as deepseek; leave write_config out"
        )
    for info in source.tensors.values():
        if info.file and info.file.parent.resolve() == path.parent.resolve():
            raise CheckpointError(
                f"{path.parent / _NAME}: would lie beside the source too, and describe "
                f"it wrongly; expected another folder for {path.name}; write it there, "
                "or leave write_config out (--write-config)"
            )
    target = path.parent / _NAME
    if os.path.lexists(target) and read_config(path.parent) is None:
        raise CheckpointError(
            f"{target}: is no table of JSON that can be read, and would be lost; "
            "expected a config to add to; move it away, or leave write_config out"
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
    target = path.parent / _NAME
    kept = read_config(path.parent) or source or {}
    text = json.dumps({**kept, CONFIG_KEY: quantization}, indent=2) + "\n"
    for left in leftovers(target):
        left.remove()
    try:
        partial = Partial.create(target)  # another process may be at the same file
        try:
            write_durably(partial.folder / _NAME, text.encode())
            replace(partial.folder / _NAME, target)
        finally:
            partial.remove()
    except OSError as error:
        raise CheckpointError(
            f"{target}: cannot be written; {error.strerror}"
        ) from error
    return target
