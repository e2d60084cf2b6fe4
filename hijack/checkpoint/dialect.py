"""Dialects: how a writer of checkpoints spells a scheme's tensors.

A dialect is the only place where the names and shapes of a file meet the names and
shapes of a scheme. The base class is the *native* dialect every scheme has: keys are
the scheme's own names, and header metadata says which scheme wrote each layer.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from hijack.checkpoint.header import Header, join

if TYPE_CHECKING:
    from hijack.scheme import Scheme

#: Header metadata key under which hijack writes which scheme each layer has.
METADATA_KEY = "hijack"


class Certainty(enum.IntEnum):
    """How well a claim is founded; a higher one wins."""

    #: dtypes and shapes are what the scheme would write, but others write the same.
    FITS = 1
    #: key names, dtypes and shapes that only this dialect uses.
    UNIQUE = 2
    #: an explicit marker names the scheme, and the shapes agree.
    MARKED = 3


@dataclasses.dataclass(frozen=True)
class Claim:
    """A scheme's claim to one layer of a checkpoint.

    Attributes:
        layer: module name without a trailing dot; "" is the root.
        scheme: name of the scheme.
        dialect: name of the dialect that recognised it.
        keys: role to full key: ``"weight"`` and the dialect's other tensors.
        block_size: (rows, cols) in elements, or None if the scheme has no blocks.
        certainty: how well founded the claim is.
        evidence: what was seen, for people to read.
    """

    layer: str
    scheme: str
    dialect: str
    keys: Mapping[str, str]
    block_size: tuple[int, int] | None = None
    certainty: Certainty = Certainty.FITS
    evidence: tuple[str, ...] = ()


class Dialect:
    """The native dialect, and the base of all others.

    A subclass overrides `recognise`, `decode` and `encode`. ``recognise`` sees shapes
    and dtypes only; ``decode`` and ``encode`` must not copy tensor data where a view
    will do, and must work on meta tensors, because files are planned with them.
    """

    name = "hijack"

    def recognise(self, scheme: Scheme, header: Header, layer: str) -> Claim | None:
        """Claim ``layer`` for ``scheme``, or None.

        Here: the layer's tensors have exactly the names, dtypes and shapes that
        ``scheme.quantize`` gives for a weight of that shape, or the header's metadata
        names the scheme.
        """
        marker = native_marker(header, layer)
        if marker is None:
            weight = header.tensors[join(layer, "weight")]
            names = scheme.fitting_params(header, layer, weight)
            return None if names is None else native_claim(layer, scheme.name, names)
        names = marker.get("params", ())
        if marker.get("scheme") != scheme.name or not all(
            isinstance(name, str) and join(layer, name) in header.tensors
            for name in names
        ):
            return None
        return native_claim(
            layer, scheme.name, names, marker.get("block_size"), marked=True
        )

    def decode(
        self, claim: Claim, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Turn a file's tensors into ``(qdata, params)``.

        Args:
            claim: what `recognise` gave.
            tensors: role to tensor, with the roles of ``claim.keys``.
        """
        params = {role: t for role, t in tensors.items() if role != "weight"}
        return tensors["weight"], params

    def encode(
        self, qdata: Tensor, params: Mapping[str, Tensor], options: Mapping[str, object]
    ) -> dict[str, Tensor]:
        """Turn ``(qdata, params)`` into a file's tensors, keyed by suffix.

        Args:
            qdata: the codes.
            params: the scheme's other tensors.
            options: the options the layer was quantized with (such as ``block_size``).
        """
        return {"weight": qdata, **params}

    def fit_options(
        self, shape: tuple[int, ...], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The options to quantize a weight with so that `encode` can spell it.

        Args:
            shape: (N, ...) of the dense weight.
            options: the options asked for.
        """
        return dict(options)


def native_claim(
    layer: str,
    scheme: str,
    names: Iterable[str],
    block_size: Sequence[int] | None = None,
    *,
    marked: bool = False,
) -> Claim:
    """A claim to a layer whose keys are the scheme's own names."""
    keys = {name: join(layer, name) for name in ("weight", *names)}
    evidence = f"metadata names {scheme}" if marked else "dtypes and shapes fit"
    block = None if block_size is None else (int(block_size[0]), int(block_size[1]))
    certainty = Certainty.MARKED if marked else Certainty.FITS
    return Claim(layer, scheme, Dialect.name, keys, block, certainty, (evidence,))


def write_marker(layers: Mapping[str, Mapping[str, object]]) -> str:
    """Text for header metadata `METADATA_KEY`; `native_marker` reads it.

    Args:
        layers: layer to ``{"scheme": name, "params": names}``, and ``"block_size"`` if
            there is one.
    """
    return json.dumps({"version": 1, "layers": layers}, sort_keys=True)


def native_marker(header: Header, layer: str) -> Mapping[str, Any] | None:
    """What hijack's own metadata says of a layer, or None."""
    text = header.metadata.get(METADATA_KEY)
    entry = _marked_layers(text).get(layer) if text else None
    return entry if isinstance(entry, dict) else None


@functools.lru_cache(maxsize=4)
def _marked_layers(text: str) -> Mapping[str, object]:
    try:
        layers = json.loads(text)["layers"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return layers if isinstance(layers, dict) else {}
