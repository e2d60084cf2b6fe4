"""GGUF files: recognised so that a user learns what the file is, but not read.

A file begins with the letters GGUF, its version, and the number of tensors and of
metadata entries, all little-endian. Reference: ggml, ``docs/gguf.md``.
"""

from __future__ import annotations

import dataclasses
import os
import struct

MAGIC = b"GGUF"
_COUNTS = struct.Struct("<IQQ")


@dataclasses.dataclass(frozen=True)
class GGUF:
    """The counts at the start of a file.

    Attributes:
        version: of the format.
        tensors: number of tensors.
        entries: number of metadata entries.
    """

    version: int
    tensors: int
    entries: int

    def __str__(self) -> str:
        return (
            f"a GGUF file, version {self.version}, with {self.tensors} tensors; "
            "ComfyUI-GGUF reads it"
        )


def read_gguf(path: str | os.PathLike[str]) -> GGUF | None:
    """The start of a GGUF file; None if the file is not one or cannot be read."""
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
