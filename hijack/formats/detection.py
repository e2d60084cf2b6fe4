"""What a checkpoint is: which scheme reads each layer, and on what evidence."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from hijack.errors import CheckpointError
from hijack.formats.claim import Certainty, Claim
from hijack.formats.dialect import check_marker
from hijack.formats.gguf import read_gguf
from hijack.formats.identification import Identification, words
from hijack.formats.named_only import Foreign, find_foreign
from hijack.formats.native_marker import METADATA_KEY
from hijack.safetensors_io.gc_paused import uncollected
from hijack.safetensors_io.header import PLAIN_DTYPES, Header, join
from hijack.safetensors_io.reader import Paths, read_header

if TYPE_CHECKING:
    from hijack.registry import Registry

#: Last parts of keys that hold a scale of a weight or of an input, in any format known.
SCALE_NAMES = frozenset(
    {
        "scale_weight",
        "weight_scale",
        "weight_scale_inv",
        "weight_scale_2",
        "weight_global_scale",
        "qscale_weight",
        "scale_input",
        "input_scale",
        "activation_scale",
        "_weight_scale",
    }
)
#: Dtypes that are codes of something, whatever their layer holds.
CODE_DTYPES = frozenset(
    {"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "F4"}
)
#: Words in the names of tensors without which codes beside them are not what they are.
_DECODING = ("scale", "zero_point", "svd_")
#: Last parts of keys of scales of what a layer or its attention puts out.
_OUTPUTS = frozenset({"output_scale", "q_scale", "k_scale", "v_scale"})


@uncollected()
def identify(
    source: Paths | Header,
    registry: Registry | None = None,
    *,
    assume: Sequence[str] = (),
) -> Identification:
    """Find out from the header alone which scheme reads which layer.

    Args:
        source: a path, a list of shards, or a header already read.
        registry: whose schemes are asked; default is the default registry.
        assume: names of schemes or dialects, or block sizes such as ``"128x128"``, to
            choose by where the file does not tell. They change nothing elsewhere.

    Returns:
        Claims with their evidence, and what nobody claims.

    Raises:
        HeaderError: if a file is malformed.
        CheckpointError: if an assumption has nothing to choose.
    """
    from hijack.registry import default_registry

    if isinstance(source, str | os.PathLike) and (gguf := read_gguf(source)):
        return Identification(str(source), gguf.tensors, {}, container=str(gguf))
    header = source if isinstance(source, Header) else read_header(source)
    registry = default_registry() if registry is None else registry
    claims = registry.identify(header)
    layers, ambiguous = _weigh(claims)
    layers, ambiguous = _assume(header.source, layers, ambiguous, assume)
    contradictions, unknown = _doubt(header, registry, layers)
    known = {*layers, *ambiguous, *contradictions, *unknown}
    foreign = find_foreign(header, known)
    unscaled = _unscaled(header, known.union(foreign))
    return Identification(
        source=header.source,
        tensors=len(header.tensors),
        layers=layers,
        ambiguous=ambiguous,
        foreign=foreign,
        orphans=_orphans(header, claims, foreign, unscaled),
        unscaled=unscaled,
        contradictions=contradictions,
        unknown=unknown,
        infos=header.tensors,
    )


def _weigh(
    claims: Iterable[Claim],
) -> tuple[dict[str, Claim], dict[str, tuple[Claim, ...]]]:
    """The best founded claim to each layer, and the layers where that is undecided."""
    first: dict[str, Claim] = {}
    contested: dict[str, list[Claim]] = {}
    for claim in claims:
        known = first.setdefault(claim.layer, claim)
        if known is not claim:
            contested.setdefault(claim.layer, [known]).append(claim)
    layers: dict[str, Claim] = {}
    ambiguous: dict[str, tuple[Claim, ...]] = {}
    for layer, claim in first.items():
        top = [claim]
        if layer in contested:
            best = max(claim.certainty for claim in contested[layer])
            top = [claim for claim in contested[layer] if claim.certainty == best]
        guessed = top[0].certainty is Certainty.GUESS
        if guessed or (len(top) > 1 and len({claim.scheme for claim in top}) > 1):
            ambiguous[layer] = tuple(top)
        else:
            layers[layer] = top[0]
    return layers, ambiguous


def _assume(
    source: str,
    layers: dict[str, Claim],
    ambiguous: dict[str, tuple[Claim, ...]],
    assume: Sequence[str],
) -> tuple[dict[str, Claim], dict[str, tuple[Claim, ...]]]:
    """Choose among the claims to a layer by what the user says of the file."""
    given = [assume] if isinstance(assume, str) else list(assume)
    useless = set(given)
    left: dict[str, tuple[Claim, ...]] = {}
    for layer, claims in ambiguous.items():
        rest = claims
        for word in given:
            chosen = tuple(claim for claim in rest if word in words(claim))
            if chosen:
                useless.discard(word)
                rest = chosen
        if (
            len({claim.reading() for claim in rest}) == 1
            and given
            and _said(rest, given)
        ):
            said = f"assumed: {', '.join(given)}"
            evidence = (*rest[0].evidence, said)
            layers[layer] = dataclasses.replace(rest[0], evidence=evidence)
        else:
            left[layer] = rest
    if useless:
        raise CheckpointError(
            f"assume: {sorted(useless)[0]!r} chooses nothing in {source}; expected the "
            "name of a scheme or dialect, or a block size, that a layer is ambiguous "
            "about; see `hijack identify`"
        )
    return layers, left


def _said(claims: Sequence[Claim], given: Iterable[str]) -> bool:
    return any(word in words(claims[0]) for word in given)


def _doubt(
    header: Header, registry: Registry, layers: Mapping[str, Claim]
) -> tuple[dict[str, str], dict[str, str]]:
    """Marked layers whose tensors say otherwise, and those of unknown schemes.

    Keys that only one dialect has outweigh a marker: some tool kept the metadata.
    """
    schemes = registry.schemes()
    contradictions: dict[str, str] = {}
    unknown: dict[str, str] = {}
    for layer, marker in header.said_of_layers(METADATA_KEY).items():
        claim = layers.get(layer)
        settled = claim is not None and claim.certainty > Certainty.FITS
        if settled or not _holds_codes(header, layer, marker):
            continue
        name = str(marker.get("scheme"))
        if name not in schemes:
            unknown[layer] = name
        elif reason := check_marker(schemes[name], header, layer):
            contradictions[layer] = reason
    return contradictions, unknown


def _holds_codes(header: Header, layer: str, marker: Mapping[str, Any]) -> bool:
    """Whether a marked layer is still quantized, and not made dense since."""
    weight, names = header.tensors.get(join(layer, "weight")), marker.get("params")
    listed = names if isinstance(names, list) else []
    return weight is not None and (
        weight.dtype not in PLAIN_DTYPES
        or any(join(layer, str(name)) in header.tensors for name in listed)
    )


def _unscaled(header: Header, known: set[str]) -> tuple[str, ...]:
    """Layers whose weight is codes that nobody has anything to say about."""
    return tuple(
        layer
        for layer, parts in header.parts.items()
        if "weight" in parts
        and parts["weight"].dtype in CODE_DTYPES
        and layer not in known
    )


def _orphans(
    header: Header,
    claims: Iterable[Claim],
    foreign: Mapping[str, Foreign],
    unscaled: Iterable[str],
) -> tuple[str, ...]:
    """Scales that nobody reads, also those of names nobody knows beside codes.

    A layer that is claimed may have more than its dialect knows, such as a scale that
    its inputs are multiplied by; without it the weight would be another one.
    """
    used = {key for claim in claims for key in claim.keys.values()}
    used |= {key for found in foreign.values() for key in found.keys}
    coded = {claim.layer for claim in claims}.union(unscaled)
    decoding = {n for n in header.owners if any(word in n for word in _DECODING)}
    found = []
    for key in header.tensors:
        if key in used:
            continue
        layer, _, name = key.rpartition(".")
        if name in _OUTPUTS:
            continue
        if name in SCALE_NAMES or (name in decoding and layer in coded):
            found.append(key)
    return tuple(found)
