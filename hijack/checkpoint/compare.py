"""Compare the weights of two checkpoints, layer by layer."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hijack.claim import Claim
from hijack.errors import CheckpointError, HijackError, ShapeError, printable
from hijack.formats import matching
from hijack.formats.comfyui_markers import needless_markers
from hijack.formats.identification import Identification, identify
from hijack.metrics import QuantizationError, quantization_error
from hijack.naming.resolver import LayerNames, Span
from hijack.progress import Progress
from hijack.registry import Registry, current_registry
from hijack.safetensors_io.header import Header, TensorInfo, join
from hijack.safetensors_io.reader import Paths, open_tensors, read_header
from hijack.text import excerpt, table


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare_files` found.

    Attributes:
        reference: name of the first checkpoint.
        other: name of the second.
        layers: key of each weight in the first, to its error in the second.
        only_reference: weights that only the first has.
        only_other: weights that only the second has.
        skipped: weights that cannot be compared, and why.
    """

    reference: str
    other: str
    layers: Mapping[str, QuantizationError]
    only_reference: tuple[str, ...] = ()
    only_other: tuple[str, ...] = ()
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def same(self) -> bool:
        """Whether all weights are present and equal."""
        exact = all(error.max_abs_error == 0 for error in self.layers.values())
        return exact and not (self.only_reference or self.only_other or self.skipped)

    @property
    def broken(self) -> tuple[str, ...]:
        """Weights with NaN or inf, whose error is NaN."""
        return tuple(k for k, error in self.layers.items() if math.isnan(error.sqnr))

    def worst(self, count: int | None = None) -> list[tuple[str, QuantizationError]]:
        """Weights and their errors, the worst signal-to-noise ratio first."""

        def rank(item: tuple[str, QuantizationError]) -> float:
            return -math.inf if math.isnan(item[1].sqnr) else item[1].sqnr

        return sorted(self.layers.items(), key=rank)[:count]

    def as_table(self, count: int = 20) -> str:
        """The worst layers and a summary, human-readable."""
        changed = [item for item in self.worst() if item[1].max_abs_error != 0]
        lines = [printable(f"{self.other} against {self.reference}")]
        if changed:
            rows = [
                [
                    key,
                    f"{error.rmse:.3e}",
                    f"{error.sqnr:.2f}",
                    f"{error.max_abs_error:.3e}",
                ]
                for key, error in changed[:count]
            ]
            lines.append(table(["weight", "RMSE", "SQNR dB", "largest"], rows))
        if len(changed) > count:
            lines.append(f"... and {len(changed) - count} more that differ")
        equal = len(self.layers) - len(changed)
        lines.append(f"{len(self.layers)} weights compared, {equal} equal")
        for name, keys in (
            (self.reference, self.only_reference),
            (self.other, self.only_other),
        ):
            if keys:
                lines.append(
                    printable(f"only in {name}: {len(keys)}, such as {keys[0]}")
                )
        lines += [
            printable(f"not compared: {key}: {why}")
            for key, why in self.skipped.items()
        ]
        return "\n".join(lines)

    def to_json(self) -> str:
        """Everything found, as JSON; infinite numbers and NaN are null."""
        return json.dumps(
            {
                "reference": self.reference,
                "other": self.other,
                "same": self.same,
                "layers": {
                    key: {
                        "rmse": _finite(error.rmse),
                        "sqnr_db": _finite(error.sqnr),
                        "largest": _finite(error.max_abs_error),
                        "numel": error.numel,
                    }
                    for key, error in self.layers.items()
                },
                "only_reference": list(self.only_reference),
                "only_other": list(self.only_other),
                "skipped": dict(self.skipped),
            },
            indent=1,
        )


def compare_files(
    reference: Paths,
    other: Paths,
    *,
    assume: Sequence[str] = (),
    progress: Progress | None = None,
    registry: Registry | None = None,
) -> Comparison:
    """Decode two checkpoints and measure the error of each weight.

    They may be dense or quantized, in different dialects, with other names, and with
    projections fused in one and apart in the other. One weight and what it is in the
    other file are in memory at a time, in float32.

    Args:
        reference: the checkpoint to compare with, such as the original.
        other: the checkpoint to compare.
        assume: how to interpret an ambiguous file, as for `identify`.
        progress: called after each weight.
        registry: whose schemes and plugins are asked; None for the one in force.

    Raises:
        HeaderError: if a file is malformed.
        AmbiguousError: if the format of a layer is ambiguous.
        CheckpointError: if the two have no weight in common.
    """
    registry = current_registry(registry)
    first = _DenseWeights(reference, assume, registry)
    second = _DenseWeights(other, assume, registry)
    matches, problems = _match(first, second)
    both = [
        key
        for key in first.keys
        if key in matches and all(piece.key in second.keys for piece in matches[key])
    ]
    unreadable = {**first.unreadable, **second.unreadable}
    if not both:
        reasons = "".join(
            f"; {key} {why}"
            for key, why in [*unreadable.items(), *problems.items()][:1]
        )
        raise CheckpointError(
            f"{first.source} and {second.source} have no weight in common; expected "
            f"checkpoints of one model; the first has {first.example()}, the second "
            f"{second.example()}{reasons}"
        )
    layers: dict[str, QuantizationError] = {}
    skipped: dict[str, str] = {}
    for done, key in enumerate(both, 1):
        try:
            layers[key] = _error(first, second, key, matches[key])
        except ShapeError as error:
            skipped[key] = str(error)
        if progress is not None:
            progress(done, len(both), key)
    in_first = {piece.key for pieces in matches.values() for piece in pieces}
    return Comparison(
        first.source,
        second.source,
        layers,
        tuple(key for key in first.keys if key not in matches and key not in problems),
        tuple(key for key in second.keys if key not in in_first),
        {**unreadable, **problems, **skipped},
    )


class _DenseWeights:
    """The weights of a checkpoint as dense tensors, decoded on demand.

    Attributes:
        source: name of the checkpoint.
        keys: of its weights and all other floating tensors except scales.
        unreadable: weights that no scheme reads, and why.
    """

    def __init__(
        self, source: Paths, assume: Sequence[str], registry: Registry
    ) -> None:
        self._header: Header = read_header(source)
        self._registry = registry
        self.source = self._header.source
        result = _identify(self._header, assume, registry)
        claims = result.claims()
        used = {key for claim in claims.values() for key in claim.keys.values()}
        used |= {key for layer in result.unsupported.values() for key in layer.keys}
        used |= set(result.unconsumed) | _markers(self._header, claims, registry)
        self.unreadable = _unreadable(result)
        self._claims: dict[str, Claim] = {
            key: claim
            for layer, claim in claims.items()
            if (key := join(layer, "weight")) not in self.unreadable
        }
        dense = {
            key: None
            for key, info in self._header.tensors.items()
            if key not in used and key not in self.unreadable and _is_floating(info)
        }
        self.keys = {**dict.fromkeys(self._claims), **dense}

    def example(self) -> str:
        """A key, for messages."""
        return next(iter(self.keys), "none")

    def shapes(self) -> dict[str, tuple[int, ...] | None]:
        """Key of each weight to its dense shape; None if it cannot be told."""
        shapes: dict[str, tuple[int, ...] | None] = dict.fromkeys(self.unreadable)
        for key in self.keys:
            claim = self._claims.get(key)
            if claim is None:
                shapes[key] = self._header.tensors[key].shape
            else:
                shapes[key] = claim.shape or self._claimed_shape(claim)
        return shapes

    def _claimed_shape(self, claim: Claim) -> tuple[int, ...] | None:
        scheme = self._registry.get(claim.scheme)
        try:
            weight = matching.read_weight(scheme, claim, open_tensors(self._header))
        except HijackError:  # it is raised again where the weight is read
            return None
        return tuple(weight.shape)

    def padded(self, key: str) -> bool:
        """Whether the file may pad a weight."""
        claim = self._claims.get(key)
        return claim is not None and claim.padded is not None

    def dense(self, key: str) -> Tensor:
        """Read a weight in float32; nothing is cached."""
        tensors = open_tensors(self._header)
        claim = self._claims.get(key)
        if claim is None:
            return tensors[key]
        scheme = self._registry.get(claim.scheme)
        return matching.read_weight(scheme, claim, tensors).dense()


def _markers(
    header: Header, claims: Mapping[str, Claim], registry: Registry
) -> set[str]:
    """Tensors that only describe the format of layers; some are floating."""
    schemes = {claim.scheme for claim in claims.values()}
    marked = {
        key
        for name in schemes
        for dialect in matching.dialects_of(registry.get(name))
        for key in dialect.unmark(header.metadata, header.tensors.keys(), claims)[1]
    }
    return marked.union(needless_markers(header))


def _unreadable(result: Identification) -> dict[str, str]:
    """Weights in an unknown format, and why.

    Without their scale, quantized data would pass for numbers.
    """
    reasons = {
        name: f"is {layer.format}, which no scheme reads"
        for name, layer in result.unsupported.items()
    }
    for name, scheme in result.unknown.items():
        reasons[name] = f"is of scheme {excerpt(scheme)}, which is not registered"
    for key in result.unconsumed:
        layer = key.rpartition(".")[0]
        reasons.setdefault(layer, f"has a scale that no scheme reads, {key}")
    return {join(layer, "weight"): reason for layer, reason in reasons.items()}


def _identify(
    header: Header, assume: Sequence[str], registry: Registry
) -> Identification:
    """Identify, with the assumptions only if the file is ambiguous."""
    result = identify(header, registry)
    if not result.ambiguous:
        return result
    return identify(header, registry, assume=assume)


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Some rows of a tensor of the second file, and those of the first's they are.

    Attributes:
        key: of the tensor.
        rows: of it, in this order; none for all.
        own: rows of the first's tensor; none for all.
        transposed: whether it is the transpose of the first's.
    """

    key: str
    rows: tuple[Span, ...] = ()
    own: tuple[Span, ...] = ()
    transposed: bool = False


def _match(
    first: _DenseWeights, second: _DenseWeights
) -> tuple[dict[str, list[_Piece]], dict[str, str]]:
    """Key in the first file to what it is in the second, and what is ambiguous."""
    keys, others = ({**each.keys, **each.unreadable} for each in (first, second))
    if keys.keys() <= others.keys():
        return {key: [_Piece(key)] for key in keys}, {}
    layers = {_layer(key): shape for key, shape in first.shapes().items()}
    found = LayerNames(second.shapes()).resolve(layers)
    if not found.pieces and not found.problems:
        return _by_prefix(keys, others), {}
    matches: dict[str, list[_Piece]] = {}
    biases: dict[str, list[_Piece]] = {}
    for name, pieces in found.pieces.items():
        key = name if name in keys else join(name, "weight")
        matches[key] = [
            _Piece(piece.layer.key, piece.rows, piece.own, piece.layer.transposed)
            for piece in pieces
        ]
        parts = [_Piece(piece.layer.bias, piece.rows, piece.own) for piece in pieces]
        if all(piece.key in others for piece in parts):
            biases[join(name, "bias")] = parts  # of which rows, only the weight tells
    return (
        {key: parts for key, parts in (matches | biases).items() if key in keys},
        {
            name if name in keys else join(name, "weight"): problem
            for name, problem in found.problems.items()
        },
    )


def _error(
    first: _DenseWeights, second: _DenseWeights, key: str, pieces: Sequence[_Piece]
) -> QuantizationError:
    """The error of one weight against what it is in the other file, without padding.

    Raises:
        ShapeError: if they are of different shapes.
    """
    reference = first.dense(key)
    whole = len(pieces) == 1 and not pieces[0].rows and not pieces[0].own
    if whole:
        other = second.dense(pieces[0].key)
        other = other.t() if pieces[0].transposed else other
    else:
        other = _put_together(second, pieces)
    shape = tuple(map(min, zip(reference.shape, other.shape, strict=False)))
    if first.padded(key):
        reference = _crop(reference, shape)
    if any(second.padded(piece.key) for piece in pieces):
        other = _crop(other, shape)
    if reference.shape != other.shape:
        raise ShapeError(f"has shape {tuple(reference.shape)} and {tuple(other.shape)}")
    return quantization_error(reference, other)


def _put_together(second: _DenseWeights, pieces: Sequence[_Piece]) -> Tensor:
    """Rows of one or more weights in the order of another one."""
    spans: list[tuple[Span, Tensor]] = []
    for piece in pieces:
        dense = second.dense(piece.key)
        if piece.rows:
            dense = torch.cat([dense[start:stop] for start, stop in piece.rows])
        for start, stop in piece.own or [(0, len(dense))]:
            spans.append(((start, stop), dense[: stop - start]))
            dense = dense[stop - start :]
    rows = [rows for _, rows in sorted(spans, key=lambda item: item[0])]
    return torch.cat(rows)


def _crop(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    return weight[: shape[0], : shape[1]] if len(shape) == weight.ndim == 2 else weight


def _by_prefix(
    first: Mapping[str, object], second: Mapping[str, object]
) -> dict[str, list[_Piece]]:
    """Match keys by the prefix that, removed from one file's, matches the most."""
    one, other = next(iter(first), ""), next(iter(second), "")
    pairs = [("", key.removesuffix(one)) for key in second if key.endswith(f".{one}")]
    pairs += [(key.removesuffix(other), "") for key in first if key.endswith(other)]
    best: dict[str, list[_Piece]] = {}
    for cut, add in dict.fromkeys(pairs):
        if (cut or add).endswith("."):
            names = {key: f"{add}{key.removeprefix(cut)}" for key in first}
            matches = {k: [_Piece(n)] for k, n in names.items() if n in second}
            best = max(best, matches, key=len)
    return best


def _layer(key: str) -> str:
    """The layer that a weight belongs to; other tensors have names of their own."""
    return key.removesuffix(".weight")


def _is_floating(info: TensorInfo) -> bool:
    """Whether a tensor holds floating numbers, including plain casts to FP8."""
    dtype = info.torch_dtype
    return info.real and dtype is not None and dtype.is_floating_point


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
