"""Notes on a result: worth knowing, but not errors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from hijack.formats.dialect import Dialect, FormatMetadata
from hijack.scheme import Scheme
from hijack.selection import Choice


def replaced_notes(choice: Choice) -> list[str]:
    """Notes that requested patterns replaced the defaults of a known model."""
    name = "" if choice.family is None else choice.family.name
    effects = {"include": "quantized in", "exclude": "left out of"}
    return [
        f"{option} (--{option}) replaces what is {effects[option]} {name} by default "
        f"({' '.join(usual)}); add 'default' (--{option} default) to keep that"
        for option, usual in choice.replaced.items()
    ]


def declined_notes(choice: Choice) -> list[str]:
    """A note that the scheme declines layers that were chosen, and why."""
    if not choice.declined:
        return []
    layer, total = choice.declined[0], len(choice.declined) + len(choice.layers)
    return [
        f"{len(choice.declined)} of {total} layers stay dense, because the scheme "
        f"declines them, such as {layer}: {choice.skipped[layer]}"
    ]


def adjusted_block_notes(
    dialect: Dialect, layers: Mapping[str, tuple[str, str]], count: int
) -> list[str]:
    """A note that a dialect adjusted the requested block size of layers, and why.

    Args:
        dialect: that of the result.
        layers: each such layer, to its requested and its actual block size.
        count: number of quantized layers.
    """
    if not layers:
        return []
    first, (requested, actual) = next(iter(layers.items()))
    return [
        f"{len(layers)} of {count} layers have other blocks than requested, such as "
        f"{first} with {actual} instead of {requested}: {dialect.refit_reason}; "
        "dialect hijack (--dialect hijack) can store the requested blocks"
    ]


def unstored_notes(
    scheme: Scheme, dialect: Dialect, requested: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Notes that a dialect has no place for how layers are asked to compute.

    Args:
        scheme: that they are quantized with.
        dialect: that of the result.
        requested: each layer, to its options.
    """
    notes = []
    for option in scheme.declared_options():
        name, stores = option.name, dialect.stores
        if not option.forward or stores is None or name in stores:
            continue
        count = sum(
            options.get(name, option.default) != option.default
            for options in requested.values()
        )
        if count:
            notes.append(
                f"dialect {dialect.name} cannot store {name} of {count} layers, which "
                "compute as usual once they are loaded; dialect hijack (--dialect "
                "hijack) can"
            )
    return notes


def format_notes(
    metadata: FormatMetadata, dialect: str, write_config: bool
) -> Sequence[str]:
    """Notes on what the dialect's own readers need or do not support."""
    if metadata.config is None or write_config:
        return metadata.notes
    return (
        f"readers of {dialect} look for quantization_config in config.json; "
        "write_config (--write-config) writes it",
        *metadata.notes,
    )
