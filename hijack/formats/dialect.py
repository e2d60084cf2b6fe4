"""Dialects: how a writer of checkpoints spells a scheme's tensors.

A dialect is the only place where the names and shapes of a file meet the names and
shapes of a scheme. The base class is the *native* dialect every scheme has: keys are
the scheme's own names, and header metadata says which scheme wrote each layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from hijack.errors import HijackError
from hijack.formats.claim import Certainty, Claim
from hijack.formats.native_marker import (
    METADATA_KEY,
    native_marker,
    without_layers,
    write_marker,
)
from hijack.safetensors_io.header import Header, TensorInfo, join

if TYPE_CHECKING:
    from hijack.scheme import Scheme


@dataclasses.dataclass(frozen=True)
class Row:
    """What ``docs/formats.md`` says of a format, in a few words each.

    Attributes:
        writers: who writes it.
        keys: names of its tensors; X is the layer.
        scale: dtype and shape of the scale, for a weight of (N, K).
        blocks: which blocks share a scale, and what becomes of those that are short.
        marker: how the file says what it is.
        written: what hijack writes of it; "no" if it only reads it.
    """

    writers: str
    keys: str
    scale: str
    blocks: str
    marker: str
    written: str = "no"


@dataclasses.dataclass(frozen=True)
class Spelled:
    """One layer in the tensors of a dialect.

    Attributes:
        scheme: name of the scheme.
        params: names of the scheme's tensors beside the codes.
        shape: shape of the dense weight.
        block_size: (rows, cols), or None if the scheme has no blocks.
        tensors: suffix to dtype and shape, as `Dialect.encode` gave them.
    """

    scheme: str
    params: tuple[str, ...]
    shape: tuple[int, ...]
    block_size: tuple[int, int] | None
    tensors: Mapping[str, TensorInfo]


@dataclasses.dataclass(frozen=True)
class FileMarks:
    """What a file says of itself as a whole in a dialect.

    Attributes:
        metadata: strings for the header.
        tensors: key to tensor, for markers that are tensors.
        config: ``quantization_config`` of the ``config.json`` that readers of the
            dialect expect beside the file.
        notes: sentences for people, of what other readers may not take.
    """

    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tensors: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    config: Mapping[str, object] | None = None
    notes: tuple[str, ...] = ()


class Dialect:
    """The native dialect, and the base of all others.

    A subclass overrides `recognise`, `decode` and `encode`. ``recognise`` sees shapes
    and dtypes only; ``decode`` and ``encode`` must not copy tensor data where a view
    will do, and must work on meta tensors, because files are planned with them.
    """

    name = "hijack"
    #: last parts of keys of the scale of an input, which says nothing of the weight
    inputs: tuple[str, ...] = ()
    #: the one it is written under; empty if the dialect has no place for it
    input_written = ""
    #: why `fit_options` gives other blocks than those asked for, for people
    refit = "it has no words for the blocks asked for"
    row = Row(
        "hijack",
        "X.weight, and the scheme's own names",
        "as the scheme has it; FP8: (ceil(N/R), ceil(K/C))",
        "any; FP8: an empty X.weight_block_size of shape (R, C, 0) where one is short",
        "header metadata `hijack`",
        "everything, of every scheme",
    )

    @property
    def writes(self) -> bool:
        """Whether it is written at all, and not only read."""
        return self.row.written != "no"

    # -- reading -----------------------------------------------------------------------

    def layers(self, header: Header) -> Iterable[str]:
        """Names of the layers the dialect may have something to say about."""
        return header.layers()

    def readings(self, scheme: Scheme, header: Header, layer: str) -> Iterator[Claim]:
        """Every way to read ``layer``; several only where the file does not tell.

        Those of which one must be assumed have the certainty GUESS; the likeliest comes
        first.
        """
        claim = self.recognise(scheme, header, layer)
        if claim is not None:
            yield claim

    def recognise(self, scheme: Scheme, header: Header, layer: str) -> Claim | None:
        """Claim ``layer`` for ``scheme``, or None.

        Here: the layer's tensors have exactly the names, dtypes and shapes that
        ``scheme.quantize`` gives for a weight of that shape, or the header's metadata
        names the scheme.
        """
        weight = header.tensors.get(join(layer, "weight"))
        if weight is None:
            return None
        marker = native_marker(header, layer)
        if marker is None:
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

    def unmark(
        self, metadata: Mapping[str, str], keys: Collection[str], layers: Iterable[str]
    ) -> tuple[dict[str, str], set[str]]:
        """Take back what a file says as a whole, for layers that leave the dialect.

        Args:
            metadata: the header's metadata.
            keys: keys of all tensors.
            layers: the layers that are spelled otherwise from now on.

        Returns:
            The metadata that still holds, and the keys of markers to leave out.
        """
        return without_layers(metadata, layers), set()

    # -- writing -----------------------------------------------------------------------

    def encode(
        self, qdata: Tensor, params: Mapping[str, Tensor], options: Mapping[str, object]
    ) -> dict[str, Tensor]:
        """Turn ``(qdata, params)`` into a file's tensors, keyed by suffix.

        Args:
            qdata: the codes.
            params: the scheme's other tensors.
            options: the options the layer was quantized with (such as ``block_size``).

        Raises:
            CheckpointError: if the dialect cannot spell it.
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

    def settle(
        self, layers: Mapping[str, tuple[tuple[int, ...], tuple[int, int] | None]]
    ) -> dict[str, Any]:
        """Options that all layers of a file must share, to convert it.

        Args:
            layers: layer to shape and block size of what is there.
        """
        return {}

    def blocks(
        self,
        shape: tuple[int, ...],
        block_size: tuple[int, int],
        options: Mapping[str, Any],
    ) -> Sequence[tuple[int, int]]:
        """Block sizes the dialect can spell a quantized weight in, the best first.

        Args:
            shape: (N, ...) of the weight.
            block_size: the blocks it has.
            options: what `settle` gave.
        """
        return [block_size]

    def finish(
        self, layers: Mapping[str, Spelled], others: Mapping[str, TensorInfo]
    ) -> FileMarks:
        """What a file has to say as a whole.

        Args:
            layers: layer to what was encoded of it.
            others: key to dtype and shape of all other tensors of the file.
        """
        marked = {
            layer: {"scheme": spelled.scheme, "params": list(spelled.params)}
            for layer, spelled in layers.items()
        }
        return FileMarks({METADATA_KEY: write_marker(marked)} if marked else {})


def native_claim(
    layer: str,
    scheme: str,
    names: Iterable[str],
    block_size: Sequence[int] | None = None,
    *,
    certainty: Certainty = Certainty.FITS,
) -> Claim:
    """A claim to a layer whose keys are the scheme's own names."""
    keys = {name: join(layer, name) for name in ("weight", *names)}
    evidence = "dtypes and shapes fit"
    if certainty is Certainty.MARKED:
        evidence = f"metadata names {scheme}"
    block = None if block_size is None else (int(block_size[0]), int(block_size[1]))
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
    seen = scheme.native.recognise(scheme, header.bare, layer)
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
        certainty=Certainty.MARKED,
    )
