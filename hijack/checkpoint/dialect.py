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

import torch
from torch import Tensor

from hijack.checkpoint.header import Header, join
from hijack.errors import HijackError

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
        if marker.get("scheme") != scheme.name or check_marker(scheme, header, layer):
            return None
        return _marked_claim(scheme, layer, marker)

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


def check_marker(scheme: Scheme, header: Header, layer: str) -> str | None:
    """What the layer's tensors have against hijack's own marker, or None.

    Tensors are compared as the scheme would decode them, without their data.
    """
    marker = native_marker(header, layer) or {}
    names, block = marker.get("params", []), marker.get("block_size")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return f"params are {names!r}, expected a list of names"
    if block is not None and not _is_block(block):
        return f"block_size is {block!r}, expected [rows, columns]"
    lacking = [name for name in names if join(layer, name) not in header.tensors]
    if lacking:
        return f"{lacking[0]} is missing beside the weight"
    claim = _marked_claim(scheme, layer, marker)
    infos = {key: header.tensors[key] for key in claim.keys.values()}
    if any(info.torch_dtype is None for info in infos.values()):
        return None  # a newer torch may tell
    try:
        scheme.decode(
            claim,
            {
                key: torch.empty(
                    info.torch_shape, dtype=info.torch_dtype, device="meta"
                )
                for key, info in infos.items()
            },
        )
    except HijackError as error:
        return str(error).removeprefix(f"{layer or 'weight'}: ")
    except Exception:
        return None  # it looks at data, which is not here; loading will tell
    if block is None:
        return None
    seen = scheme.recognise(dataclasses.replace(header, metadata={}), layer)
    size = None if seen is None else seen.block_size
    if size is None or list(size) == block:
        return None
    return f"block_size is {block}, the shapes give {list(size)}"


def _is_block(block: object) -> bool:
    return (
        isinstance(block, list)
        and len(block) == 2
        and all(type(size) is int and size > 0 for size in block)
    )


def _marked_claim(scheme: Scheme, layer: str, marker: Mapping[str, Any]) -> Claim:
    return native_claim(
        layer,
        scheme.name,
        marker.get("params", ()),
        marker.get("block_size"),
        marked=True,
    )


def write_marker(layers: Mapping[str, Mapping[str, object]]) -> str:
    """Text for header metadata `METADATA_KEY`; `native_marker` reads it.

    Args:
        layers: layer to ``{"scheme": name, "params": names}``, and ``"block_size"`` if
            there is one.
    """
    return json.dumps({"version": 1, "layers": layers}, sort_keys=True)


def native_marker(header: Header, layer: str) -> Mapping[str, Any] | None:
    """What hijack's own metadata says of a layer, or None."""
    return marked_layers(header).get(layer)


def marked_layers(header: Header) -> Mapping[str, Mapping[str, Any]]:
    """What hijack's own metadata says, by layer."""
    text = header.metadata.get(METADATA_KEY)
    return _parse_marker(text) if text else {}


@functools.lru_cache(maxsize=4)
def _parse_marker(text: str) -> Mapping[str, Mapping[str, Any]]:
    try:
        layers = json.loads(text)["layers"]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    if not isinstance(layers, dict):
        return {}
    return {name: entry for name, entry in layers.items() if isinstance(entry, dict)}
