"""How far the weights of two checkpoints are apart, layer by layer."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hijack.checkpoint.quantize import Progress
from hijack.errors import CheckpointError, ShapeError, printable
from hijack.formats.claim import Claim
from hijack.formats.detection import identify
from hijack.formats.identification import Identification
from hijack.metrics import Loss, measure
from hijack.registry import default_registry
from hijack.safetensors_io.header import Header, TensorInfo, join
from hijack.safetensors_io.reader import Paths, open_tensors, read_header
from hijack.text import shown, table


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What `compare_files` found.

    Attributes:
        reference: what the first checkpoint is called.
        other: what the second is called.
        layers: key of each weight, as the first calls it, to the error of the second.
        only_reference: weights that only the first has.
        only_other: weights that only the second has.
        skipped: weights that cannot be compared, and why.
    """

    reference: str
    other: str
    layers: Mapping[str, Loss]
    only_reference: tuple[str, ...] = ()
    only_other: tuple[str, ...] = ()
    skipped: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def same(self) -> bool:
        """Whether all weights are there and equal."""
        exact = all(loss.largest == 0 for loss in self.layers.values())
        return exact and not (self.only_reference or self.only_other or self.skipped)

    @property
    def broken(self) -> tuple[str, ...]:
        """Weights that hold NaN or inf, so that their error is no number."""
        return tuple(k for k, loss in self.layers.items() if math.isnan(loss.sqnr))

    def worst(self, count: int | None = None) -> list[tuple[str, Loss]]:
        """Weights and their errors, the worst signal-to-noise ratio first."""

        def rank(item: tuple[str, Loss]) -> float:
            return -math.inf if math.isnan(item[1].sqnr) else item[1].sqnr

        return sorted(self.layers.items(), key=rank)[:count]

    def as_table(self, count: int = 20) -> str:
        """The worst layers and a summary, for people to read."""
        changed = [item for item in self.worst() if item[1].largest != 0]
        lines = [printable(f"{self.other} against {self.reference}")]
        if changed:
            rows = [
                [key, f"{loss.rmse:.3e}", f"{loss.sqnr:.2f}", f"{loss.largest:.3e}"]
                for key, loss in changed[:count]
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
                some = printable(f"{name}: {len(keys)}, such as {keys[0]}")
                lines.append(f"only in {some}")
        lines += [
            printable(f"not compared: {key}: {why}")
            for key, why in self.skipped.items()
        ]
        return "\n".join(lines)

    def to_json(self) -> str:
        """Everything found, as JSON; what is infinite or no number is null."""
        return json.dumps(
            {
                "reference": self.reference,
                "other": self.other,
                "same": self.same,
                "layers": {
                    key: {
                        "rmse": _finite(loss.rmse),
                        "sqnr_db": _finite(loss.sqnr),
                        "largest": _finite(loss.largest),
                        "numel": loss.numel,
                    }
                    for key, loss in self.layers.items()
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
) -> Comparison:
    """Decode two checkpoints and measure how far their weights are apart.

    Any two that hijack reads: dense, quantized, in different dialects, and with
    different prefixes before the names of layers. One pair of weights is in memory at a
    time, in float32.

    Args:
        reference: the checkpoint the other is held against, such as the original.
        other: the other.
        assume: how to read what a file does not tell, as for `identify`.
        progress: called after each weight.

    Raises:
        HeaderError: if a file is malformed.
        AmbiguousError: if a file does not tell how to read a layer.
        CheckpointError: if the two have no weight in common.
    """
    one, two = _Weights(reference, assume), _Weights(other, assume)
    cut, add = _prefixes(one.keys, two.keys)
    names = {key: f"{add}{key.removeprefix(cut)}" for key in one.keys}
    both = [key for key, name in names.items() if name in two.keys]
    unreadable = {**one.unreadable, **two.unreadable}
    if not both:
        reasons = "".join(f"; {key} {why}" for key, why in list(unreadable.items())[:1])
        raise CheckpointError(
            f"{one.source} and {two.source} have no weight in common; expected "
            f"checkpoints of one model; the first has such as {one.some()}, the second "
            f"{two.some()}{reasons}"
        )
    layers: dict[str, Loss] = {}
    skipped: dict[str, str] = {}
    for done, key in enumerate(both, 1):
        try:
            layers[key] = _measure(one, two, key, names[key])
        except ShapeError as error:
            skipped[key] = str(error)
        if progress is not None:
            progress(done, len(both), key)
    first = {*names.values(), *(f"{add}{k.removeprefix(cut)}" for k in one.unreadable)}
    second = {*two.keys, *two.unreadable}
    return Comparison(
        one.source,
        two.source,
        layers,
        tuple(key for key in one.keys if names[key] not in second),
        tuple(key for key in two.keys if key not in first),
        {**unreadable, **skipped},
    )


class _Weights:
    """The weights of a checkpoint as dense tensors, each when asked for.

    Attributes:
        source: what it is called.
        keys: of its weights and all other floating tensors that are no scales.
        unreadable: layers no scheme reads, and their format.
    """

    def __init__(self, source: Paths, assume: Sequence[str]) -> None:
        self._header: Header = read_header(source)
        self.source = self._header.source
        found = _identify(self._header, assume)
        claims = found.claims()
        used = {key for claim in claims.values() for key in claim.keys.values()}
        used |= {key for other in found.foreign.values() for key in other.keys}
        used |= set(found.orphans) | _markers(self._header, claims)
        self.unreadable = _unreadable(found)
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

    def some(self) -> str:
        """A key, for messages."""
        return next(iter(self.keys), "none")

    def padded(self, key: str) -> bool:
        """Whether the file may hold more of a weight than there is."""
        claim = self._claims.get(key)
        return claim is not None and claim.padded is not None

    def dense(self, key: str) -> Tensor:
        """A weight in float32, read now; nothing of it is kept."""
        tensors = open_tensors(self._header)
        claim = self._claims.get(key)
        if claim is None:
            return tensors[key]
        scheme = default_registry().get(claim.scheme)
        return scheme.dequantize(*scheme.decode(claim, tensors), torch.float32)


def _markers(header: Header, claims: Mapping[str, Claim]) -> set[str]:
    """Tensors that only say how the layers are quantized; some are floating."""
    schemes = {claim.scheme for claim in claims.values()}
    return {
        key
        for name in schemes
        for dialect in default_registry().get(name).all_dialects()
        for key in dialect.unmark(header.metadata, header.tensors.keys(), claims)[1]
    }


def _unreadable(found: Identification) -> dict[str, str]:
    """Weights of which nobody knows what they are, and why.

    Codes without the scale they need would pass for numbers.
    """
    reasons = {
        layer: f"is {other.format}, which no scheme reads"
        for layer, other in found.foreign.items()
    }
    for layer, scheme in found.unknown.items():
        reasons[layer] = f"is of scheme {shown(scheme)}, which is not registered"
    for key in found.orphans:
        layer = key.rpartition(".")[0]
        reasons.setdefault(layer, f"has a scale that no scheme reads, {key}")
    return {join(layer, "weight"): reason for layer, reason in reasons.items()}


def _identify(header: Header, assume: Sequence[str]) -> Identification:
    """Identify with those assumptions that say something of this file."""
    found = identify(header)
    if not found.ambiguous:
        return found
    return identify(header, assume=assume)


def _measure(one: _Weights, two: _Weights, key: str, name: str) -> Loss:
    """The error of one weight against another; what a file pads is cut off.

    Raises:
        ShapeError: if they are of different shapes.
    """
    reference, other = one.dense(key), two.dense(name)
    shape = tuple(map(min, zip(reference.shape, other.shape, strict=False)))
    if one.padded(key):
        reference = _crop(reference, shape)
    if two.padded(name):
        other = _crop(other, shape)
    if reference.shape != other.shape:
        raise ShapeError(f"has shape {tuple(reference.shape)} and {tuple(other.shape)}")
    return measure(reference, other)


def _crop(weight: Tensor, shape: tuple[int, ...]) -> Tensor:
    return weight[: shape[0], : shape[1]] if len(shape) == weight.ndim == 2 else weight


def _prefixes(one: Mapping[str, None], two: Mapping[str, None]) -> tuple[str, str]:
    """What to cut off the keys of one, and put before them, to have those of two."""
    best, choice = sum(key in two for key in one), ("", "")
    if best == len(one):
        return choice
    for (cut, add), keys in (((False, True), one), ((True, False), two)):
        others = two if add else one
        key = next(iter(keys), "")
        for other in others:
            if key and other.endswith(f".{key}"):
                prefix = other[: -len(key)]
                pair = (prefix, "") if cut else ("", prefix)
                found = sum(f"{pair[1]}{k.removeprefix(pair[0])}" in two for k in one)
                if found > best:
                    best, choice = found, pair
    return choice


def _is_floating(info: TensorInfo) -> bool:
    """Whether a tensor holds numbers of its own, plain casts to FP8 among them."""
    dtype = info.torch_dtype
    return info.real and dtype is not None and dtype.is_floating_point


def _finite(number: float) -> float | None:
    return number if math.isfinite(number) else None
