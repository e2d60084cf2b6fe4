"""``docs/formats.md``, made from the tables in the code.

::

    python scripts/generate_formats_doc.py > docs/formats.md
"""

from __future__ import annotations

import hijack
from hijack.formats.dialect import Row
from hijack.formats.named_only_table import FORMATS

_HEAD = """\
# Formats

Made by `scripts/generate_formats_doc.py` from the tables in the code; a test checks it.

X is the name of a layer, (N, K) the shape of its weight, all but the first dimension
flattened. Blocks are (R, C); where they do not divide the weight, those at the edges
are short, and the scale has ceil(N/R) x ceil(K/C) elements. A scale always multiplies.

`hijack identify FILE` says which of these a file is, layer by layer, and on what
evidence. Markers are held against the shapes: where they disagree the shapes are
believed, and the disagreement is named. What a file does not tell is asked for:
`--assume WORD`, with the name of a dialect or a block size.
"""
_READ = """
## Read and written

`hijack convert SRC DST --dialect NAME` goes from one to another without a change of any
weight; `hijack quantize --dialect NAME` writes one. A dash: it is read only.
"""
_FOREIGN = """
## Named only

No scheme of hijack reads these; a plugin may. `identify` names them, `load` refuses
them, and `convert` carries them along as they are.
"""
_COLUMNS = ("written by", "tensors", "scale", "blocks", "marker")


def document() -> str:
    """The whole text."""
    import schemes.blockwise_fp8  # noqa: F401 - registers itself

    scheme = hijack.schemes()["blockwise_fp8"]
    read = [
        [f"`{dialect.name}`", *_cells(dialect.row), _written(dialect.row)]
        for dialect in scheme.all_dialects()
    ]
    named = [[known.name, *_cells(known.row)] for known in FORMATS]
    named.append(["GGUF", "llama.cpp, ComfyUI-GGUF", "", "", "", "the letters GGUF"])
    return "".join(
        (
            _HEAD,
            _READ,
            _table(["dialect", *_COLUMNS, "hijack writes"], read),
            _FOREIGN,
            _table(["format", *_COLUMNS], named),
        )
    )


def _cells(row: Row) -> list[str]:
    return [row.writers, row.keys, row.scale, row.blocks, row.marker]


def _written(row: Row) -> str:
    return "-" if row.written == "no" else row.written


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n" + "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(document(), end="")
