"""What people should know of a result, though nothing is wrong with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from hijack.checkpoint.quantize_choice import Choice
from hijack.formats.dialect import Dialect, FileMarks


def replaced_notes(choice: Choice) -> list[str]:
    """That patterns which were given took the place of a known model's."""
    known = choice.architecture
    name = "" if known is None else known.name
    whats = {"include": "quantized in", "exclude": "left out of"}
    return [
        f"{option} (--{option}) replaces what is {whats[option]} {name} by default "
        f"({' '.join(usual)}); add 'default' (--{option} default) to keep that"
        for option, usual in choice.replaced.items()
    ]


def refit_notes(
    dialect: Dialect, layers: Mapping[str, tuple[str, str]], count: int
) -> list[str]:
    """That a dialect gave layers other blocks than those asked for, and why.

    Args:
        dialect: that of the result.
        layers: those layers, to the blocks asked for and the blocks they have.
        count: how many layers are quantized.
    """
    if not layers:
        return []
    first, (asked, given) = next(iter(layers.items()))
    return [
        f"{len(layers)} of {count} layers have other blocks than those asked for, such "
        f"as {first} with {given} instead of {asked}: {dialect.refit}; dialect hijack "
        "(--dialect hijack) has the blocks asked for"
    ]


def mark_notes(marks: FileMarks, dialect: str, write_config: bool) -> Sequence[str]:
    """What a dialect's own readers may miss in a file."""
    if marks.config is None or write_config:
        return marks.notes
    return (
        f"readers of {dialect} look for quantization_config in config.json; "
        "write_config (--write-config) writes it",
        *marks.notes,
    )
