"""A checkpoint as bytes, apart from any folder, and taken apart into tensors."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path

MODEL = "model.safetensors"


@dataclasses.dataclass
class Case:
    """The files of one folder.

    Attributes:
        name: of the seed it comes from.
        files: name to content; a str is where a link leads.
        main: the name of what is read.
        kind: ``"model"`` or ``"lora"``.
    """

    name: str
    files: dict[str, bytes | str]
    main: str = MODEL
    kind: str = "model"

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(len(content) for content in self.files.values())

    def write(self, folder: Path) -> Path:
        """Put the files into a folder; returns the path of the main one."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in self.files.items():
            if isinstance(content, str):
                (folder / name).symlink_to(content)
            else:
                (folder / name).write_bytes(content)
        return folder / self.main

    @classmethod
    def read(cls, folder: Path) -> Case:
        """The case that `write` put into a folder."""
        files: dict[str, bytes | str] = {
            path.name: str(path.readlink()) if path.is_symlink() else path.read_bytes()
            for path in sorted(folder.iterdir())
            if path.suffix in (".safetensors", ".json", ".gguf")
        }
        indexed = [name for name in files if name.endswith(".index.json")]
        kind = "lora" if folder.name.startswith("lora") else "model"
        main = indexed[0] if indexed else MODEL
        return cls(folder.name, files, main, kind)


@dataclasses.dataclass
class Entry:
    """One tensor, its place in the file left open."""

    key: str
    dtype: str
    shape: list[int]
    data: bytes


@dataclasses.dataclass
class Parts:
    """A safetensors file taken apart."""

    metadata: dict[str, str]
    entries: list[Entry]

    @classmethod
    def of(cls, content: bytes) -> Parts:
        """Take a whole file apart."""
        start = 8 + int.from_bytes(content[:8], "little")
        table = json.loads(content[8:start])
        metadata = table.pop("__metadata__", {})
        entries = []
        for key, info in table.items():
            begin, end = (start + offset for offset in info["data_offsets"])
            data = content[begin:end]
            entries.append(Entry(key, info["dtype"], list(info["shape"]), data))
        return cls(metadata, entries)

    @classmethod
    def attempt(cls, content: bytes) -> Parts | None:
        """Take a file apart that may be damaged already, if that can be done."""
        try:
            parts = cls.of(content)
            return parts if parts._usual() else None
        except (ValueError, LookupError, TypeError, AttributeError):
            return None
        except (RecursionError, OverflowError):
            return None

    def _usual(self) -> bool:
        """Whether mutations find the types they expect."""
        said = self.metadata.values() if isinstance(self.metadata, dict) else [None]
        return all(isinstance(text, str) for text in said) and all(
            isinstance(entry.dtype, str) and all(type(n) is int for n in entry.shape)
            for entry in self.entries
        )

    def table(self) -> list[tuple[str, object]]:
        """The header as pairs, in which a key may be twice."""
        pairs: list[tuple[str, object]] = []
        if self.metadata:
            pairs.append(("__metadata__", self.metadata))
        end = 0
        for entry in self.entries:
            begin, end = end, end + len(entry.data)
            place = {"shape": entry.shape, "data_offsets": [begin, end]}
            pairs.append((entry.key, {"dtype": entry.dtype, **place}))
        return pairs

    def pack(self, header: bytes | None = None) -> bytes:
        """The file, with a header of its own or one that is given."""
        if header is None:
            header = join_pairs(self.table())
        data = b"".join(entry.data for entry in self.entries)
        return len(header).to_bytes(8, "little") + header + data


def join_pairs(pairs: list[tuple[str, object]]) -> bytes:
    """A JSON object of pairs; what UTF-8 cannot hold is escaped."""
    inner = ", ".join(f"{json.dumps(k)}: {json.dumps(v)}" for k, v in pairs)
    return f"{{{inner}}}".encode()


#: Bytes of an element, for the dtypes that mutations choose from.
WIDTHS = {
    "F64": 8,
    "I64": 8,
    "U64": 8,
    "C64": 8,
    "F32": 4,
    "I32": 4,
    "U32": 4,
    "BF16": 2,
    "F16": 2,
    "I16": 2,
    "U16": 2,
    "F8_E4M3": 1,
    "F8_E5M2": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "F8_E8M0": 1,
    "U8": 1,
    "I8": 1,
    "BOOL": 1,
    "F4": 0.5,
    "F6_E2M3": 0.75,
    "F6_E3M2": 0.75,
}


def resize(entry: Entry) -> None:
    """Give an entry as many bytes as its dtype and shape ask for, if they are few."""
    size = math.ceil(math.prod(entry.shape) * WIDTHS.get(entry.dtype, 1))
    if 0 <= size <= 1 << 14:
        times = -(-size // max(len(entry.data), 1))
        entry.data = ((entry.data or b"\x38") * max(times, 1))[:size].ljust(size, b"8")
