"""What was found out about a checkpoint, for programs and for people."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from hijack.errors import AmbiguousError, CheckpointError, printable
from hijack.formats.claim import Claim
from hijack.formats.named_only import Foreign
from hijack.safetensors_io.header import TensorInfo, join
from hijack.text import block_text, shown, table

#: Notes of one kind that are shown unless all are asked for.
FEW = 3


@dataclasses.dataclass(frozen=True)
class Identification:
    """What `identify` found.

    Attributes:
        source: what the checkpoint is called.
        tensors: number of tensors in it.
        layers: layer to the best founded claim to it.
        ambiguous: layer to the claims of which one must be assumed.
        foreign: layer to the format it is in, which no registered scheme reads.
        orphans: keys of scales that nobody reads.
        unscaled: layers whose weight is codes without any scale: plain casts, or codes
            that nobody knows.
        contradictions: layer to what its tensors have against the metadata.
        unknown: layer to the scheme its metadata names, which is not registered.
        container: what the file is instead of safetensors, such as GGUF; else "".
        infos: key to dtype and shape of every tensor.
    """

    source: str
    tensors: int
    layers: Mapping[str, Claim]
    ambiguous: Mapping[str, tuple[Claim, ...]] = dataclasses.field(default_factory=dict)
    foreign: Mapping[str, Foreign] = dataclasses.field(default_factory=dict)
    orphans: tuple[str, ...] = ()
    unscaled: tuple[str, ...] = ()
    contradictions: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unknown: Mapping[str, str] = dataclasses.field(default_factory=dict)
    container: str = ""
    infos: Mapping[str, TensorInfo] = dataclasses.field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def clear(self) -> bool:
        """Whether nothing stands against reading the checkpoint."""
        return not (
            self.ambiguous
            or self.foreign
            or self.orphans
            or self.contradictions
            or self.unknown
            or self.container
            or self._lone()
        )

    def _lone(self) -> bool:
        """Whether codes have no scale, and are no plain cast.

        Integers never are. FP8 is none where other layers of the file have scales.
        """
        infos = (self.infos.get(join(layer, "weight")) for layer in self.unscaled)
        dtypes = {info.dtype for info in infos if info is not None}
        coded = (next(iter(claim.keys.values())) for claim in self.layers.values())
        if any(not dtype.startswith("F8") for dtype in dtypes):
            return True
        return bool(dtypes) and any(self.infos[key].dtype in dtypes for key in coded)

    def claims(self) -> dict[str, Claim]:
        """The claim to each layer.

        Raises:
            AmbiguousError: naming a layer that may be read in several ways, with them.
            CheckpointError: naming a layer whose tensors contradict its metadata, or
                what the file is if it holds none.
        """
        if self.container:
            raise CheckpointError(
                f"{self.source}: is {self.container}, expected safetensors"
            )
        for layer, reason in self.contradictions.items():
            raise CheckpointError(
                f"{self.source}: {layer}: metadata and tensors contradict each other; "
                f"{shown(reason)}; get the file again, or quantize the original"
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
        """The block size, or ``row`` or ``tensor`` if it is all of one."""
        weight = self.infos.get(next(iter(claim.keys.values()), ""))
        if claim.block_size is None or weight is None or not weight.shape:
            return block_text(claim.block_size)
        rows, cols = claim.block_size
        if cols < math.prod(weight.shape[1:]) or 1 < rows < weight.shape[0]:
            return block_text(claim.block_size)
        return "tensor" if rows >= weight.shape[0] else "row"

    # -- for people --------------------------------------------------------------------

    def as_table(self, *, verbose: bool = False) -> str:
        """Everything found, for people to read.

        Args:
            verbose: whether to name every layer, with the evidence.
        """
        lines = [f"{self.source}: {self.tensors} tensors"]
        rows = [[s, d, b, str(n)] for s, d, b, n in self._kinds(self._block)]
        formats = Counter(found.format for found in self.foreign.values())
        rows += [["-", name, "-", str(n)] for name, n in sorted(formats.items())]
        if rows:
            lines.append(table(["scheme", "dialect", "block", "layers"], rows))
        elif not self.container:
            lines.append(self._plain())
        if verbose and rows:
            head = ["layer", "scheme", "dialect", "block", "evidence"]
            lines.append(table(head, list(self._layer_rows())))
        notes = Counter[str]()
        for note in map(printable, self._notes()):
            kind = note.partition(":")[0]
            notes[kind] += 1
            if verbose or notes[kind] <= FEW:
                lines.append(note)
        if not verbose:
            more = {kind: count - FEW for kind, count in notes.items() if count > FEW}
            lines += [f"{kind}: {count} more, see -v" for kind, count in more.items()]
        return "\n".join(lines)

    def _plain(self) -> str:
        """What is there where no layer is quantized in a way that anybody knows."""
        if self.unscaled or self.orphans or self.ambiguous or self.unknown:
            return "no layer is claimed by a scheme"
        dtypes = Counter(info.dtype for info in self.infos.values()).most_common(4)
        counts = ", ".join(f"{name} {count}" for name, count in dtypes)
        return f"not quantized: {counts or 'empty'}"

    def _layer_rows(self) -> Iterator[list[str]]:
        for name, claim in self.layers.items():
            block, seen = block_text(claim.block_size), "; ".join(claim.evidence)
            yield [name, claim.scheme, claim.dialect, block, shown(seen)]
        for name, found in self.foreign.items():
            yield [name, "-", found.format, "-", shown(found.evidence)]

    def _notes(self) -> Iterator[str]:
        """One line for each thing that is not a plain claim."""
        if self.container:
            yield f"this is {self.container}"
        if self.foreign:
            first = next(iter(self.foreign))
            name = first or "weight"
            yield f"unreadable: {len(self.foreign)} layers, such as {name}"
        for layer, found in self.foreign.items():
            if found.rivals:
                yield f"ambiguous: {layer}: {' or '.join(found.rivals)}"
        scaled = {key.rpartition(".")[0] for key in self.orphans}
        bare = [layer for layer in self.unscaled if layer not in scaled]
        if bare:
            what = "plain casts or unknown"
            if self._lone():
                what = "unlike others, or no plain casts"
            yield (
                f"{len(bare)} layers hold codes without a scale, {what}, such as "
                f"{bare[0] or 'weight'}"
            )
        for layer, claims in self.ambiguous.items():
            yield f"ambiguous: {layer}: {_choice(claims)}"
        for layer, reason in self.contradictions.items():
            yield f"contradiction: {layer}: {shown(reason)}"
        yield from self._misled()
        for scheme, count in sorted(Counter(self.unknown.values()).items()):
            name = shown(scheme)
            yield f"unknown: {count} layers are {name}, which is not registered"
        for key in self.orphans:
            if key.rpartition(".")[0] not in self.unknown:
                yield f"orphan: {key}: a scale that no scheme reads{self._about(key)}"

    def _about(self, key: str) -> str:
        """Dtype and shape of an orphan, and of the weight it lies beside."""
        layer = key.rpartition(".")[0]
        scale, weight = self.infos.get(key), self.infos.get(join(layer, "weight"))
        if scale is None:
            return ""
        beside = "" if weight is None else f" beside a weight {_info_text(weight)}"
        return f"; {_info_text(scale)}{beside}"

    def _misled(self) -> Iterator[str]:
        """Markers that the shapes prove wrong; layers are read by their shapes."""
        for claim in self.layers.values():
            if claim.contradiction:
                block = block_text(claim.block_size)
                yield f"wrong marker: {shown(claim.contradiction)}; read as {block}"

    # -- for programs ------------------------------------------------------------------

    def to_json(self) -> str:
        """Everything found, as JSON."""
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
                    name: dataclasses.asdict(found)
                    for name, found in self.foreign.items()
                },
                "orphans": list(self.orphans),
                "unscaled": list(self.unscaled),
                "contradictions": dict(self.contradictions),
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


def _info_text(info: TensorInfo) -> str:
    return f"{info.dtype} {list(info.shape)}"


def words(claim: Claim) -> tuple[str, ...]:
    """What an assumption may call a claim: its scheme, dialect or block size."""
    return claim.scheme, claim.dialect, block_text(claim.block_size)


def _choice(claims: Iterable[Claim]) -> str:
    """The ways to read a layer, and how to choose one."""
    claims = list(claims)
    if len({claim.scheme for claim in claims}) > 1:
        names = ", ".join(sorted({claim.scheme for claim in claims}))
        return (
            f"claimed equally by {names}; expected one scheme; assume one of them, or "
            "disable the others with HIJACK_DISABLE"
        )
    readings = [f"{c.dialect} {block_text(c.block_size)}" for c in claims]
    # in the order claimed: a scheme yields the likeliest reading first
    differing = [
        dict.fromkeys(texts[at] for texts in map(words, claims)) for at in (1, 2)
    ]
    choice = [next(iter(names)) for names in differing if len(names) > 1]
    choice = choice or [words(claims[0])[2]]
    said = " ".join(f"--assume {word}" for word in choice)
    return (
        f"the file does not tell how to read it; it may be {' or '.join(readings)}; "
        f"say which with assume={choice}, or in a copy that says it itself: "
        f"`hijack convert FILE COPY --dialect hijack {said}`"
    )
