"""``docs/formats.md``, made from ``formats.json`` and the formats in the code.

::

    python scripts/generate_formats_doc.py > docs/formats.md
"""

from __future__ import annotations

import importlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from hijack.formats import matching
from hijack.formats.unsupported import FORMATS

Descriptions = dict[str, Mapping[str, str]]

_HEAD = """\
# Formats

Made by `scripts/generate_formats_doc.py` from `scripts/formats.json` and the code; a
test checks it.

X is the name of a layer, (N, K) the shape of its weight, all but the first dimension
flattened. Blocks are (R, C); where they do not divide the weight, those at the edges
are short, and the scale has ceil(N/R) x ceil(K/C) elements. A scale multiplies, unless
the table says that it divides.

`hijack identify FILE` says which of these a file is, layer by layer, and on what
evidence. Markers are checked against the shapes: where they disagree, the shapes win
and the mismatch is reported. What a file does not say must be given with
`--assume WORD`, the name of a dialect, a block size, or an option as `NAME=VALUE`.
"""
_READ = """
## Read and written

`hijack convert SRC DST --dialect NAME` converts one to another losslessly;
`hijack quantize --dialect NAME` writes one. A dash: it can only be read.
"""
_NAMED_ONLY = """
## Named only

No scheme of hijack reads these; a plugin may. `identify` names them, `load` refuses
them, and `convert` copies them unchanged.
"""
#: Key in ``formats.json`` to the head of the column.
_COLUMNS = {
    "writers": "written by",
    "tensors": "tensors",
    "scale": "scale",
    "blocks": "blocks",
    "marker": "marker",
}


def document() -> str:
    """The whole text."""
    texts: dict[str, Any] = json.loads(
        Path(__file__).with_name("formats.json").read_text()
    )
    columns = list(_COLUMNS.values())
    head = ["dialect", *columns, "hijack writes"]
    read = "".join(
        f"\n### {name}\n{_table(head, _rows(name, readable))}"
        for name, readable in texts["dialects"].items()
    )
    named_only = texts["named_only"]
    _check_names("named_only", named_only, [known.name for known in FORMATS])
    named = [[known.name, *_cells(named_only[known.name])] for known in FORMATS]
    named.append(["GGUF", "llama.cpp, ComfyUI-GGUF", "", "", "", "the letters GGUF"])
    return "".join(
        (
            _HEAD,
            _READ,
            read,
            _NAMED_ONLY,
            _table(["format", *columns], named),
        )
    )


def _rows(name: str, readable: Descriptions) -> list[list[str]]:
    """What is said of each dialect of a scheme."""
    scheme = importlib.import_module(f"schemes.{name}").SCHEME
    dialects = matching.dialects_of(scheme)
    _check_names(name, readable, [dialect.name for dialect in dialects])
    return [
        [
            f"`{dialect.name}`",
            *_cells(readable[dialect.name]),
            readable[dialect.name]["written"] if dialect.writes else "-",
        ]
        for dialect in dialects
    ]


def _check_names(table: str, texts: Descriptions, names: Iterable[str]) -> None:
    """Refuse a format without a text, and a text without a format."""
    if wrong := texts.keys() ^ set(names):
        raise SystemExit(
            f"formats.json: {table}: {sorted(wrong)} are in the code or here alone"
        )


def _cells(text: Mapping[str, str]) -> list[str]:
    return [text[column] for column in _COLUMNS]


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(document(), end="")
