"""What `identify` found, as text and JSON."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from hijack.claim import Claim
from hijack.errors import printable
from hijack.safetensors_io.header import TensorInfo, join
from hijack.text import block_text, excerpt, table

if TYPE_CHECKING:
    from hijack.formats.identification import Identification

#: Notes of one kind that are printed, unless verbose.
MAX_NOTES = 3


def groups(
    found: Identification, block: Callable[[Claim], str]
) -> list[tuple[str, str, str, int]]:
    """Scheme, dialect, block size as text and number of layers of each kind."""
    kinds = Counter(
        (claim.scheme, claim.dialect, block(claim)) for claim in found.layers.values()
    )
    return [(*kind, count) for kind, count in sorted(kinds.items())]


def block_word(found: Identification, claim: Claim) -> str:
    """The block size of a layer, or ``row`` or ``tensor`` if a block is a whole one.

    Args:
        found: what holds the layer.
        claim: to the layer.
    """
    weight = found.infos.get(next(iter(claim.keys.values()), ""))
    if claim.block_size is None or weight is None or not weight.shape:
        return block_text(claim.block_size)
    rows, cols = claim.block_size
    if cols < math.prod(weight.shape[1:]) or 1 < rows < weight.shape[0]:
        return block_text(claim.block_size)
    return "tensor" if rows >= weight.shape[0] else "row"


def as_table(found: Identification, verbose: bool) -> str:
    """Everything found, human-readable.

    Args:
        found: what to describe.
        verbose: whether to list every layer, with the evidence.
    """
    lines = [printable(f"{found.source}: {found.tensors} tensors")]
    rows = [
        [s, d, b, str(n)]
        for s, d, b, n in groups(found, functools.partial(block_word, found))
    ]
    formats = Counter(layer.format for layer in found.unsupported.values())
    rows += [["-", name, "-", str(n)] for name, n in sorted(formats.items())]
    if rows:
        lines.append(table(["scheme", "dialect", "block", "layers"], rows))
    elif not found.container:
        lines.append(_without_layers(found))
    if verbose and rows:
        head = ["layer", "scheme", "dialect", "block", "evidence"]
        lines.append(table(head, list(_layer_rows(found))))
    notes = Counter[str]()
    for note in map(printable, _notes(found)):
        kind = note.partition(":")[0]
        notes[kind] += 1
        if verbose or notes[kind] <= MAX_NOTES:
            lines.append(note)
    if not verbose:
        lines += [
            f"{kind}: {count - MAX_NOTES} more, see -v"
            for kind, count in notes.items()
            if count > MAX_NOTES
        ]
    return "\n".join(lines)


def _without_layers(found: Identification) -> str:
    """A line for a checkpoint without a layer in a known format."""
    if found.unscaled or found.unconsumed or found.ambiguous or found.unknown:
        return "no layer is claimed by a scheme"
    dtypes = Counter(info.dtype for info in found.infos.values()).most_common(4)
    counts = ", ".join(f"{name} {count}" for name, count in dtypes)
    return f"not quantized: {counts or 'empty'}"


def _layer_rows(found: Identification) -> Iterator[list[str]]:
    for name, claim in found.layers.items():
        block, evidence = block_word(found, claim), "; ".join(claim.evidence)
        yield [name, claim.scheme, claim.dialect, block, excerpt(evidence)]
    for name, layer in found.unsupported.items():
        yield [name, "-", layer.format, "-", excerpt(layer.evidence)]


def _notes(found: Identification) -> Iterator[str]:
    """One line for each finding that is not a plain claim."""
    if found.container:
        yield f"this is {found.container}"
    if found.unsupported:
        first = next(iter(found.unsupported)) or "weight"
        yield f"unreadable: {len(found.unsupported)} layers, such as {first}"
    scaled = {key.rpartition(".")[0] for key in found.unconsumed}
    unscaled = [layer for layer in found.unscaled if layer not in scaled]
    if unscaled:
        kind = "plain casts or an unknown format"
        if found.lacks_scales():
            kind = "unlike others, or no plain casts"
        yield (
            f"{len(unscaled)} layers hold quantized data without a scale, {kind}, "
            f"such as {unscaled[0] or 'weight'}"
        )
    for name, claims in found.ambiguous.items():
        yield f"ambiguous: {name}: {choice(claims)}"
    for name, reason in found.mismatches.items():
        yield f"mismatch: {name}: {excerpt(reason)}"
    for claim in found.layers.values():  # read by their shapes
        if claim.contradiction:
            block = block_text(claim.block_size)
            yield f"wrong marker: {excerpt(claim.contradiction)}; read as {block}"
    chosen = Counter(
        (claim.chosen, claim.scheme, claim.dialect)
        for claim in found.layers.values()
        if claim.chosen
    )
    for (why, scheme, dialect), count in sorted(chosen.items()):
        yield f"chosen: {count} layers are read as {scheme} {dialect}, {excerpt(why)}"
    if found.needless:
        yield (
            f"needless: {len(found.needless)} dense layers have a marker of quantized "
            f"ones, such as {found.needless[0]}; they are read as dense"
        )
    for scheme, count in sorted(Counter(found.unknown.values()).items()):
        name = excerpt(scheme)
        yield f"unknown: {count} layers are {name}, which is not registered"
    for key in found.unconsumed:
        if key.rpartition(".")[0] not in found.unknown:
            yield f"unconsumed: {key}: no scheme reads it{_about(found, key)}"


def _about(found: Identification, key: str) -> str:
    """Dtype and shape of a scale, and of the weight beside it."""
    layer = key.rpartition(".")[0]
    scale, weight = found.infos.get(key), found.infos.get(join(layer, "weight"))
    if scale is None:
        return ""
    beside = "" if weight is None else f" beside a weight {_info_text(weight)}"
    return f"; {_info_text(scale)}{beside}"


def to_json(found: Identification) -> str:
    """Everything found, as JSON; its keys do not change with the attributes."""
    return json.dumps(
        {
            "source": found.source,
            "container": found.container or "safetensors",
            "clear": found.clear,
            "tensors": found.tensors,
            "layers": {name: _claim(found, c) for name, c in found.layers.items()},
            "ambiguous": {
                name: [_claim(found, c) for c in claims]
                for name, claims in found.ambiguous.items()
            },
            "foreign": {
                name: dataclasses.asdict(layer)
                for name, layer in found.unsupported.items()
            },
            "orphans": list(found.unconsumed),
            "unscaled": list(found.unscaled),
            "contradictions": dict(found.mismatches),
            "unknown": dict(found.unknown),
            "needless": list(found.needless),
        },
        indent=1,
    )


def _claim(found: Identification, claim: Claim) -> dict[str, Any]:
    infos = {role: found.infos.get(key) for role, key in claim.keys.items()}
    return {
        "scheme": claim.scheme,
        "dialect": claim.dialect,
        "block_size": claim.block_size,
        "certainty": claim.certainty.name.lower(),
        "keys": dict(claim.keys),
        "tensors": {
            role: {"dtype": info.dtype, "shape": list(info.shape)}
            for role, info in infos.items()
            if info is not None
        },
        "evidence": list(claim.evidence),
        "contradiction": claim.contradiction,
        "unused": list(claim.unused),
        "options": dict(claim.options),
        "chosen": claim.chosen,
    }


def _info_text(info: TensorInfo) -> str:
    return f"{info.dtype} {list(info.shape)}"


def choice(claims: Iterable[Claim]) -> str:
    """The interpretations of a layer, and how to choose one."""
    claims = list(claims)
    if len({claim.scheme for claim in claims}) > 1:
        names = ", ".join(sorted({claim.scheme for claim in claims}))
        return (
            f"claimed equally by {names}; expected one scheme; assume one of them, "
            "name it in HIJACK_PREFER, or disable the others with HIJACK_DISABLE"
        )
    words = [claim.words() for claim in claims]
    # in the order claimed: a scheme yields the likeliest first
    kinds = dict.fromkeys(kind for each in words for kind in each)
    differing = [kind for kind in kinds if len({w.get(kind) for w in words}) > 1]
    first = [words[0][kind] for kind in differing if kind in words[0]]
    first = first or [words[0]["block size"]]
    shown = dict.fromkeys(("dialect", "block size", *differing))
    candidates = dict.fromkeys(
        " ".join(each[kind] for kind in shown if kind in each) for each in words
    )
    arguments = " ".join(f"--assume {word}" for word in first)
    return (
        f"the format is ambiguous; it may be {' or '.join(candidates)}; choose with "
        f"assume={first} or HIJACK_PREFER, or store the choice in a copy: "
        f"`hijack convert FILE COPY --dialect hijack {arguments}`"
    )
