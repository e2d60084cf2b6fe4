"""Human-readable text: tables, block sizes, excerpts, lines of logs."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Sequence
from unicodedata import east_asian_width

from hijack.errors import SchemeError, printable

#: Short words for dtypes, to their names in torch.
DTYPE_WORDS = {
    "e4m3": "float8_e4m3fn",
    "e5m2": "float8_e5m2",
    "f32": "float32",
    "bf16": "bfloat16",
    "f16": "float16",
    "e8m0": "float8_e8m0fnu",
}


def block_text(block_size: tuple[int, int] | None) -> str:
    """A block size as text, such as ``1x64``."""
    return "-" if block_size is None else f"{block_size[0]}x{block_size[1]}"


def format_text(scheme: str, dialect: str, block_size: tuple[int, int] | None) -> str:
    """How a layer is quantized, such as ``blockwise_fp8 (musubi, 1x64)``."""
    block = "" if block_size is None else f", {block_text(block_size)}"
    return f"{scheme} ({dialect}{block})"


def parse_block_size(text: str) -> tuple[int, int] | int | str:
    """``1x64`` or ``128x128`` as (rows, cols), ``64`` as an int, ``row``, ``tensor``.

    Raises:
        SchemeError: for anything else.
    """
    text = text.strip().lower()
    if text in ("row", "tensor"):
        return text
    parts = text.split("x")
    if len(parts) > 2 or not all(
        p.isascii() and p.isdecimal() and int(p) > 0 for p in parts
    ):
        raise SchemeError(
            f"got {text!r}, expected ROWSxCOLS such as 1x64 or 128x128, a number of "
            "columns, row, or tensor"
        )
    numbers = [int(part) for part in parts]
    return (numbers[0], numbers[1]) if len(numbers) == 2 else numbers[0]


def bytes_text(count: int) -> str:
    """A number of bytes such as ``20.4 GB``, in powers of 1000 as shard sizes are."""
    return _scaled(count, ("bytes", "kB", "MB", "GB", "TB"))


def count_text(count: int) -> str:
    """A number such as ``12.1 billion``."""
    return _scaled(count, ("", "thousand", "million", "billion", "trillion")).strip()


def _scaled(count: int, units: Sequence[str]) -> str:
    number, unit = float(count), 0
    while number >= 999.95 and unit + 1 < len(units):
        number, unit = number / 1000, unit + 1
    return f"{number:.{1 if unit else 0}f} {units[unit]}"


def excerpt(value: object, max_length: int = 300) -> str:
    """Text from a file for a message: truncated, and printable characters only."""
    text = str(value)
    return printable(text if len(text) <= max_length else f"{text[:max_length]}...")


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """A question to end an error about an unknown word with, or nothing.

    Args:
        word: what somebody typed.
        choices: what would have been right.
    """
    near = difflib.get_close_matches(word, list(choices), n=1)
    return f"; did you mean {near[0]!r}?" if near else ""


def logger(name: str) -> logging.Logger:
    """A logger whose messages are one line of letters that can be printed.

    Names in files and errors of plugins come into messages; raw, they could move a
    terminal's cursor or pass for other lines of the log.
    """
    log = logging.getLogger(name)
    if _escape not in log.filters:
        log.addFilter(_escape)
    return log


def _escape(record: logging.LogRecord) -> bool:
    record.msg, record.args = printable(record.getMessage()), None
    return True


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lay out rows in columns; columns of numbers are aligned to the right."""
    lines = [[excerpt(cell) for cell in cells] for cells in (head, *rows)]
    columns = list(zip(*lines, strict=True))
    widths = [max(map(_width, column)) for column in columns]
    numeric = [_is_numeric(column[1:]) for column in columns]

    def line(cells: Sequence[str]) -> str:
        padded = []
        for cell, width, right in zip(cells, widths, numeric, strict=True):
            space = " " * (width - _width(cell))
            padded.append(space + cell if right else cell + space)
        return "  ".join(padded).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(lines[0]), rule, *map(line, lines[1:])])


def _width(text: str) -> int:
    """Columns of a terminal that a text takes; Chinese letters take two."""
    return len(text) + sum(east_asian_width(letter) in "WF" for letter in text)


def _is_numeric(cells: Sequence[str]) -> bool:
    """Whether a column holds numbers, or dashes for missing ones."""
    numbers = [cell for cell in cells if cell != "-"]
    return bool(numbers) and all(
        cell[:1].isdigit() and "x" not in cell for cell in numbers
    )
