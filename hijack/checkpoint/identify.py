"""What a checkpoint is: which scheme reads each layer, and on what evidence."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from hijack.checkpoint.claim import Certainty, Claim
from hijack.checkpoint.dialect import check_marker
from hijack.checkpoint.header import Header, join
from hijack.checkpoint.marker import marked_layers
from hijack.checkpoint.reader import Paths, read_header
from hijack.checkpoint.text import block_text, table
from hijack.errors import AmbiguousError, CheckpointError

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
    }
)
#: Dtypes that are codes of something, whatever their layer holds.
CODE_DTYPES = frozenset(
    {"F8_E4M3", "F8_E5M2", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "F4"}
)
#: Dtypes of weights that are what they say, whatever a marker says of them.
_PLAIN = frozenset({"F64", "F32", "F16", "BF16"})
#: Keys by which ComfyUI marks layers it reads itself.
NATIVE_MARKER = "comfy_quant"


@dataclasses.dataclass(frozen=True)
class Identification:
    """What `identify` found.

    Attributes:
        source: what the checkpoint is called.
        tensors: number of tensors in it.
        layers: layer to the best founded claim to it.
        ambiguous: layer to the claims of different schemes that are founded equally.
        native: layers that ComfyUI's own marker claims.
        orphans: keys of scales that no claimed or native layer owns.
        unscaled: layers whose weight is codes without any scale: plain casts, or codes
            that nobody knows.
        contradictions: layer to what its tensors have against the metadata.
        unknown: layer to the scheme its metadata names, which is not registered.
    """

    source: str
    tensors: int
    layers: Mapping[str, Claim]
    ambiguous: Mapping[str, tuple[Claim, ...]] = dataclasses.field(default_factory=dict)
    native: tuple[str, ...] = ()
    orphans: tuple[str, ...] = ()
    unscaled: tuple[str, ...] = ()
    contradictions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unknown: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def clear(self) -> bool:
        """Whether nothing stands against reading the checkpoint."""
        return not (
            self.ambiguous or self.orphans or self.contradictions or self.unknown
        )

    def claims(self) -> dict[str, Claim]:
        """The claim to each layer.

        Raises:
            AmbiguousError: naming a layer that several schemes claim equally.
            CheckpointError: naming a layer whose tensors contradict its metadata.
        """
        for layer, reason in self.contradictions.items():
            raise CheckpointError(
                f"{self.source}: {layer}: metadata and tensors contradict each other; "
                f"{reason}; get the file again, or quantize the original"
            )
        for layer, claims in self.ambiguous.items():
            names = ", ".join(sorted({claim.scheme for claim in claims}))
            raise AmbiguousError(
                f"{self.source}: {layer}: claimed equally by {names}; expected one "
                "scheme; disable the others with HIJACK_DISABLE"
            )
        return dict(self.layers)

    def groups(self) -> list[tuple[str, str, str, int]]:
        """Scheme, dialect, block size and number of layers of each kind."""
        kinds = Counter(
            (claim.scheme, claim.dialect, block_text(claim.block_size))
            for claim in self.layers.values()
        )
        return [(*kind, count) for kind, count in sorted(kinds.items())]

    def as_table(self, *, verbose: bool = False) -> str:
        """Everything found, for people to read.

        Args:
            verbose: whether to name every layer, with the evidence.
        """
        lines = [f"{self.source}: {self.tensors} tensors"]
        rows = [[s, d, b, str(n)] for s, d, b, n in self.groups()]
        if rows:
            lines.append(table(["scheme", "dialect", "block", "layers"], rows))
        else:
            lines.append("no layer is claimed by a scheme")
        if verbose and rows:
            rows = [
                [name, c.scheme, block_text(c.block_size), "; ".join(c.evidence)]
                for name, c in self.layers.items()
            ]
            lines.append(table(["layer", "scheme", "block", "evidence"], rows))
        return "\n".join([*lines, *self._notes()])

    def _notes(self) -> Iterator[str]:
        """One line for each thing that is not a plain claim."""
        if self.native:
            yield f"{len(self.native)} layers are marked for ComfyUI's own reader"
        if self.unscaled:
            yield (
                f"{len(self.unscaled)} layers hold codes that no scheme reads, such as "
                f"{self.unscaled[0]}"
            )
        for layer, claims in self.ambiguous.items():
            names = ", ".join(claim.scheme for claim in claims)
            yield f"ambiguous: {layer}: claimed equally by {names}"
        for layer, reason in self.contradictions.items():
            yield f"contradiction: {layer}: {reason}"
        for scheme, count in sorted(Counter(self.unknown.values()).items()):
            yield f"unknown: {count} layers are {scheme}, which is not registered"
        for key in self.orphans:
            yield f"orphan: {key}: a scale that no scheme reads"

    def to_json(self) -> str:
        """Everything found, as JSON."""
        return json.dumps(
            {
                "source": self.source,
                "tensors": self.tensors,
                "layers": {name: _claim_json(c) for name, c in self.layers.items()},
                "ambiguous": {
                    name: [_claim_json(c) for c in claims]
                    for name, claims in self.ambiguous.items()
                },
                "native": list(self.native),
                "orphans": list(self.orphans),
                "unscaled": list(self.unscaled),
                "contradictions": dict(self.contradictions),
                "unknown": dict(self.unknown),
            },
            indent=1,
        )


def identify(
    source: Paths | Header, registry: Registry | None = None
) -> Identification:
    """Find out from the header alone which scheme reads which layer.

    Args:
        source: a path, a list of shards, or a header already read.
        registry: whose schemes are asked; default is the default registry.

    Returns:
        Claims with their evidence, and what nobody claims.

    Raises:
        HeaderError: if a file is malformed.
    """
    from hijack.registry import default_registry

    header = source if isinstance(source, Header) else read_header(source)
    registry = default_registry() if registry is None else registry
    claims = registry.identify(header)
    layers, ambiguous = _weigh(claims)
    weights = {layer: join(layer, "weight") for layer in header.layers()}
    contradictions, unknown = _doubt(header, registry, layers)
    native = tuple(n for n in weights if join(n, NATIVE_MARKER) in header.tensors)
    claimed = layers.keys() | ambiguous.keys()
    return Identification(
        source=header.source,
        tensors=len(header.tensors),
        layers=layers,
        ambiguous=ambiguous,
        native=native,
        orphans=_orphans(header, claims, set(native)),
        unscaled=tuple(
            layer
            for layer, key in weights.items()
            if header.tensors[key].dtype in CODE_DTYPES
            and layer not in claimed
            and layer not in native
        ),
        contradictions=contradictions,
        unknown=unknown,
    )


def _weigh(
    claims: Iterable[Claim],
) -> tuple[dict[str, Claim], dict[str, tuple[Claim, ...]]]:
    """The best founded claim to each layer, and the layers where that is undecided."""
    by_layer: dict[str, list[Claim]] = {}
    for claim in claims:
        by_layer.setdefault(claim.layer, []).append(claim)
    layers: dict[str, Claim] = {}
    ambiguous: dict[str, tuple[Claim, ...]] = {}
    for layer, rivals in by_layer.items():
        best = max(claim.certainty for claim in rivals)
        top = [claim for claim in rivals if claim.certainty == best]
        if len({claim.scheme for claim in top}) > 1:
            ambiguous[layer] = tuple(top)
        else:
            layers[layer] = top[0]
    return layers, ambiguous


def _doubt(
    header: Header, registry: Registry, layers: Mapping[str, Claim]
) -> tuple[dict[str, str], dict[str, str]]:
    """Marked layers whose tensors say otherwise, and those of unknown schemes.

    Keys that only one dialect has outweigh a marker: some tool kept the metadata.
    """
    schemes = registry.schemes()
    contradictions: dict[str, str] = {}
    unknown: dict[str, str] = {}
    for layer, marker in marked_layers(header.metadata).items():
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
        weight.dtype not in _PLAIN
        or any(join(layer, str(name)) in header.tensors for name in listed)
    )


def _orphans(
    header: Header, claims: Iterable[Claim], native: set[str]
) -> tuple[str, ...]:
    """Scales of no layer that anybody reads; activations' scales may go unused."""
    used = {key for claim in claims for key in claim.keys.values()}
    claimed = {claim.layer for claim in claims}
    found = []
    for key in header.tensors:
        layer, _, name = key.rpartition(".")
        if name not in SCALE_NAMES or key in used or layer in native:
            continue
        if layer in claimed and "input" in name:
            continue
        found.append(key)
    return tuple(found)


def _claim_json(claim: Claim) -> dict[str, Any]:
    return {
        "scheme": claim.scheme,
        "dialect": claim.dialect,
        "block_size": claim.block_size,
        "certainty": claim.certainty.name.lower(),
        "keys": dict(claim.keys),
        "evidence": list(claim.evidence),
    }
