"""GGUF files: recognised, so that a user learns what the file is. They are not read.

A file begins with the letters GGUF, its version, and the numbers of tensors and of
entries of metadata, all little-endian. Reference: ggml, ``docs/gguf.md``.
"""

from __future__ import annotations

import dataclasses
import os
import struct

MAGIC = b"GGUF"
_COUNTS = struct.Struct("<IQQ")


@dataclasses.dataclass(frozen=True)
class GGUF:
    """What the first bytes say.

    Attributes:
        version: of the format.
        tensors: how many the file holds.
        entries: how many entries of metadata.
    """

    version: int
    tensors: int
    entries: int

    def __str__(self) -> str:
        return (
            f"a GGUF file, version {self.version}, of {self.tensors} tensors; ComfyUI "
            "reads it with ComfyUI-GGUF"
        )


def read_gguf(path: str | os.PathLike[str]) -> GGUF | None:
    """The first bytes of a GGUF file, or None if it is none or cannot be read."""
    try:
        if not os.path.isfile(path):
            return None
        with open(path, "rb") as file:
            head = file.read(len(MAGIC) + _COUNTS.size)
    except (OSError, ValueError):  # a path with a zero byte
        return None
    if not head.startswith(MAGIC) or len(head) < len(MAGIC) + _COUNTS.size:
        return None
    version, tensors, entries = _COUNTS.unpack_from(head, len(MAGIC))
    return GGUF(version, tensors, entries)
