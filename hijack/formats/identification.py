"""The result of `identify`, as data, text and JSON."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from hijack.claim import Claim
from hijack.errors import AmbiguousError, CheckpointError, printable
from hijack.formats.unsupported import UnsupportedLayer
from hijack.safetensors_io.header import TensorInfo, join
from hijack.text import block_text, excerpt, table

#: Notes of one kind that are printed, unless verbose.
MAX_NOTES = 3


@dataclasses.dataclass(frozen=True)
class Identification:
    """What `identify` found.

    Attributes:
        source: name of the checkpoint.
        tensors: number of tensors in it.
        layers: layer to the most certain claim to it.
        ambiguous: layer to the claims of which one must be assumed.
        unsupported: layer to its format, which no registered scheme reads.
        unconsumed: keys of scales that no scheme reads.
        unscaled: layers whose weight is quantized data without any scale: plain casts,
            or an unknown format.
        mismatches: layer to where its tensors do not match its metadata.
        unknown: layer to the scheme its metadata names, which is not registered.
        container: what the file is instead of safetensors, such as GGUF; else "".
        infos: key to dtype and shape of every tensor.
    """

    source: str
    tensors: int
    layers: Mapping[str, Claim]
    ambiguous: Mapping[str, tuple[Claim, ...]] = dataclasses.field(default_factory=dict)
    unsupported: Mapping[str, UnsupportedLayer] = dataclasses.field(
        default_factory=dict
    )
    unconsumed: tuple[str, ...] = ()
    unscaled: tuple[str, ...] = ()
    mismatches: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unknown: Mapping[str, str] = dataclasses.field(default_factory=dict)
    container: str = ""
    infos: Mapping[str, TensorInfo] = dataclasses.field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def foreign(self) -> Mapping[str, UnsupportedLayer]:
        """Former name of `unsupported`."""
        return self.unsupported

    @property
    def orphans(self) -> tuple[str, ...]:
        """Former name of `unconsumed`."""
        return self.unconsumed

    @property
    def contradictions(self) -> Mapping[str, str]:
        """Former name of `mismatches`."""
        return self.mismatches

    @property
    def clear(self) -> bool:
        """True if the checkpoint can be loaded without errors."""
        return not (
            self.ambiguous
            or self.unsupported
            or self.unconsumed
            or self.mismatches
            or self.unknown
            or self.container
            or self._lacks_scales()
        )

    def _lacks_scales(self) -> bool:
        """Whether any unscaled data is not a plain cast.

        Integers never are. FP8 is not if other layers of the file have scales.
        """
        infos = (self.infos.get(join(layer, "weight")) for layer in self.unscaled)
        dtypes = {info.dtype for info in infos if info is not None}
        weights = (next(iter(claim.keys.values())) for claim in self.layers.values())
        if any(not dtype.startswith("F8") for dtype in dtypes):
            return True
        return bool(dtypes) and any(self.infos[key].dtype in dtypes for key in weights)

    def claims(self) -> dict[str, Claim]:
        """The claim to each layer.

        Raises:
            AmbiguousError: naming an ambiguous layer and its interpretations.
            CheckpointError: naming a layer whose tensors do not match its metadata, or
                what the file is if it is not safetensors.
        """
        if self.container:
            raise CheckpointError(
                f"{self.source}: is {self.container}, expected safetensors"
            )
        for layer, reason in self.mismatches.items():
            raise CheckpointError(
                f"{self.source}: {layer}: metadata and tensors do not match; "
                f"{excerpt(reason)}; get the file again, or quantize the original"
            )
        for layer, claims in self.ambiguous.items():
            raise AmbiguousError(f"{self.source}: {layer}: {_choice(claims)}")
        return dict(self.layers)

    def groups(self) -> list[tuple[str, str, str, int]]:
        """Scheme, dialect, block size and number of layers of each kind."""
        return self._kinds(lambda claim: block_text(claim.block_size))

    def _kinds(self, block: Callable[[Claim], str]) -> list[tuple[str, str, str, int]]:
        kinds = Counter(
            (claim.scheme, claim.dialect, block(claim))
            for claim in self.layers.values()
        )
        return [(*kind, count) for kind, count in sorted(kinds.items())]

    def _block(self, claim: Claim) -> str:
        """The block size, or ``row`` or ``tensor`` if a block is a whole one."""
        weight = self.infos.get(next(iter(claim.keys.values()), ""))
        if claim.block_size is None or weight is None or not weight.shape:
            return block_text(claim.block_size)
        rows, cols = claim.block_size
        if cols < math.prod(weight.shape[1:]) or 1 < rows < weight.shape[0]:
            return block_text(claim.block_size)
        return "tensor" if rows >= weight.shape[0] else "row"

    # -- text --------------------------------------------------------------------------

    def as_table(self, *, verbose: bool = False) -> str:
        """Everything found, human-readable.

        Args:
            verbose: whether to list every layer, with the evidence.
        """
        lines = [printable(f"{self.source}: {self.tensors} tensors")]
        rows = [[s, d, b, str(n)] for s, d, b, n in self._kinds(self._block)]
        formats = Counter(layer.format for layer in self.unsupported.values())
        rows += [["-", name, "-", str(n)] for name, n in sorted(formats.items())]
        if rows:
            lines.append(table(["scheme", "dialect", "block", "layers"], rows))
        elif not self.container:
            lines.append(self._without_layers())
        if verbose and rows:
            head = ["layer", "scheme", "dialect", "block", "evidence"]
            lines.append(table(head, list(self._layer_rows())))
        notes = Counter[str]()
        for note in map(printable, self._notes()):
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

    def _without_layers(self) -> str:
        """A line for a checkpoint without a layer in a known format."""
        if self.unscaled or self.unconsumed or self.ambiguous or self.unknown:
            return "no layer is claimed by a scheme"
        dtypes = Counter(info.dtype for info in self.infos.values()).most_common(4)
        counts = ", ".join(f"{name} {count}" for name, count in dtypes)
        return f"not quantized: {counts or 'empty'}"

    def _layer_rows(self) -> Iterator[list[str]]:
        for name, claim in self.layers.items():
            block, evidence = block_text(claim.block_size), "; ".join(claim.evidence)
            yield [name, claim.scheme, claim.dialect, block, excerpt(evidence)]
        for name, layer in self.unsupported.items():
            yield [name, "-", layer.format, "-", excerpt(layer.evidence)]

    def _notes(self) -> Iterator[str]:
        """One line for each finding that is not a plain claim."""
        if self.container:
            yield f"this is {self.container}"
        if self.unsupported:
            first = next(iter(self.unsupported)) or "weight"
            yield f"unreadable: {len(self.unsupported)} layers, such as {first}"
        for name, layer in self.unsupported.items():
            if layer.alternatives:
                yield f"ambiguous: {name}: {' or '.join(layer.alternatives)}"
        scaled = {key.rpartition(".")[0] for key in self.unconsumed}
        unscaled = [layer for layer in self.unscaled if layer not in scaled]
        if unscaled:
            kind = "plain casts or an unknown format"
            if self._lacks_scales():
                kind = "unlike others, or no plain casts"
            yield (
                f"{len(unscaled)} layers hold quantized data without a scale, {kind}, "
                f"such as {unscaled[0] or 'weight'}"
            )
        for name, claims in self.ambiguous.items():
            yield f"ambiguous: {name}: {_choice(claims)}"
        for name, reason in self.mismatches.items():
            yield f"mismatch: {name}: {excerpt(reason)}"
        for claim in self.layers.values():  # read by their shapes
            if claim.contradiction:
                block = block_text(claim.block_size)
                yield f"wrong marker: {excerpt(claim.contradiction)}; read as {block}"
        for scheme, count in sorted(Counter(self.unknown.values()).items()):
            name = excerpt(scheme)
            yield f"unknown: {count} layers are {name}, which is not registered"
        for key in self.unconsumed:
            if key.rpartition(".")[0] not in self.unknown:
                yield f"unconsumed: {key}: no scheme reads it{self._about(key)}"

    def _about(self, key: str) -> str:
        """Dtype and shape of a scale, and of the weight beside it."""
        layer = key.rpartition(".")[0]
        scale, weight = self.infos.get(key), self.infos.get(join(layer, "weight"))
        if scale is None:
            return ""
        beside = "" if weight is None else f" beside a weight {_info_text(weight)}"
        return f"; {_info_text(scale)}{beside}"

    # -- JSON --------------------------------------------------------------------------

    def to_json(self) -> str:
        """Everything found, as JSON; its keys do not change with the attributes."""
        return json.dumps(
            {
                "source": self.source,
                "container": self.container or "safetensors",
                "clear": self.clear,
                "tensors": self.tensors,
                "layers": {name: self._claim(c) for name, c in self.layers.items()},
                "ambiguous": {
                    name: [self._claim(c) for c in claims]
                    for name, claims in self.ambiguous.items()
                },
                "foreign": {
                    name: _unsupported(layer)
                    for name, layer in self.unsupported.items()
                },
                "orphans": list(self.unconsumed),
                "unscaled": list(self.unscaled),
                "contradictions": dict(self.mismatches),
                "unknown": dict(self.unknown),
            },
            indent=1,
        )

    def _claim(self, claim: Claim) -> dict[str, Any]:
        infos = {role: self.infos.get(key) for role, key in claim.keys.items()}
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
        }


def _unsupported(layer: UnsupportedLayer) -> dict[str, Any]:
    fields = dataclasses.asdict(layer)
    fields["rivals"] = fields.pop("alternatives")  # the key that scripts know
    return fields


def _info_text(info: TensorInfo) -> str:
    return f"{info.dtype} {list(info.shape)}"


def names_of(claim: Claim) -> tuple[str, ...]:
    """The words that assume a claim: its scheme, dialect and block size."""
    return claim.scheme, claim.dialect, block_text(claim.block_size)


def _choice(claims: Iterable[Claim]) -> str:
    """The interpretations of a layer, and how to choose one."""
    claims = list(claims)
    if len({claim.scheme for claim in claims}) > 1:
        names = ", ".join(sorted({claim.scheme for claim in claims}))
        return (
            f"claimed equally by {names}; expected one scheme; assume one of them, or "
            "disable the others with HIJACK_DISABLE"
        )
    candidates = [f"{c.dialect} {block_text(c.block_size)}" for c in claims]
    # in the order claimed: a scheme yields the likeliest first
    _, dialects, blocks = map(dict.fromkeys, zip(*map(names_of, claims), strict=True))
    choice = [next(iter(names)) for names in (dialects, blocks) if len(names) > 1]
    choice = choice or [names_of(claims[0])[2]]
    arguments = " ".join(f"--assume {word}" for word in choice)
    return (
        f"the format is ambiguous; it may be {' or '.join(candidates)}; choose with "
        f"assume={choice}, or store the choice in a copy: "
        f"`hijack convert FILE COPY --dialect hijack {arguments}`"
    )
