"""The bases of dialects that ComfyUI's markers name."""

from __future__ import annotations

import abc
import dataclasses
import json
from collections.abc import Collection, Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor

from hijack.formats.comfyui_markers import (
    LAYER_MARKER,
    LAYER_TABLE,
    layer_marker,
    layer_tensor,
    marker_tensor,
)
from hijack.formats.dialect import Dialect, EncodedLayer, FormatMetadata, infos_of
from hijack.formats.tensor_dialect import Reading, TensorDialect
from hijack.safetensors_io.header import Header, TensorInfo, join, parse_table

#: Entries of a marker that say nothing of how the weight is decoded.
INERT = frozenset({"format", "params", "orig_dtype", "orig_shape"})


class MarkedDialect(Dialect, abc.ABC):
    """A dialect whose layers have ComfyUI's marker, and an entry in the header."""

    name = "comfy_quant"

    @abc.abstractmethod
    def entry(
        self,
        quantized: Mapping[str, TensorInfo],
        stored: Mapping[str, TensorInfo],
        options: Mapping[str, str],
    ) -> dict[str, object]:
        """The marker of a layer, as ComfyUI reads it.

        Args:
            quantized: dtype and shape of the scheme's tensors; ``weight`` and others.
            stored: of the tensors in the file, by the ends of their keys.
            options: options of the layer, as texts.
        """

    def marker(
        self,
        qdata: Tensor,
        params: Mapping[str, Tensor],
        stored: Mapping[str, Tensor],
        options: Mapping[str, object],
    ) -> Tensor:
        """The marker of a layer as a tensor: (bytes,) uint8.

        Args:
            qdata: the quantized data.
            params: the scheme's other tensors.
            stored: the tensors in the file, by the ends of their keys.
            options: options of the layer.
        """
        entry = self.entry(
            infos_of({"weight": qdata, **params}),
            infos_of(stored),
            {name: str(value) for name, value in options.items()},
        )
        return marker_tensor(entry, qdata.device)

    def unmark(
        self, metadata: Mapping[str, str], keys: Collection[str], layers: Iterable[str]
    ) -> tuple[dict[str, str], set[str]]:
        """Remove the layers from the header's table, and drop their markers."""
        removed = set(layers)
        remaining = dict(metadata)
        table = parse_table(remaining.get(LAYER_TABLE, ""))
        if table:
            entries = table.get("layers")
            entries = entries if isinstance(entries, dict) else {}
            kept = {name: e for name, e in entries.items() if name not in removed}
            del remaining[LAYER_TABLE]
            if kept or table.keys() - {"format_version", "layers"}:
                remaining[LAYER_TABLE] = json.dumps({**table, "layers": kept})
        markers = {join(layer, LAYER_MARKER) for layer in removed}
        return remaining, markers & set(keys)

    def finish(
        self, layers: Mapping[str, EncodedLayer], others: Mapping[str, TensorInfo]
    ) -> FormatMetadata:
        """The table that ComfyUI's own writers put into the header."""
        if not layers:
            return FormatMetadata()
        table = {
            name: self.entry(layer.quantized, layer.tensors, layer.options)
            for name, layer in layers.items()
        }
        text = json.dumps({"format_version": "1.0", "layers": table})
        return FormatMetadata({LAYER_TABLE: text})


class ComfyQuantDialect(MarkedDialect, TensorDialect):
    """Tensors of a layer that ComfyUI's marker names the format of.

    Attributes:
        formats: values of ``format`` in the marker that are the scheme's.
        known: further entries of the marker that `marked` reads.
        told: names of the scheme's tensors that the marker says instead of the file.
    """

    ignored: ClassVar[tuple[str, ...]] = (LAYER_MARKER,)
    inputs: tuple[str, ...] = ("input_scale",)
    formats: ClassVar[tuple[str, ...]] = ()
    known: ClassVar[Collection[str]] = ()
    told: ClassVar[Collection[str]] = ()

    @abc.abstractmethod
    def marked(
        self, marker: Mapping[str, Any], infos: Mapping[str, TensorInfo]
    ) -> Iterable[Reading]:
        """How a marked layer may be read, from its marker and its tensors.

        Args:
            marker: its entries, with those under ``params`` beside the others.
            infos: role to dtype and shape.
        """

    def unmarked(
        self,
        marker: Mapping[str, Any] | None,
        header: Header,
        layer: str,
        infos: Mapping[str, TensorInfo],
    ) -> Iterable[Reading]:
        """How a layer may be read whose marker names another format, or none.

        Args:
            marker: its entries, or None if there is no marker at all.
            header: of the checkpoint.
            layer: name of the layer.
            infos: role to dtype and shape.
        """
        return ()

    def interpret(
        self, header: Header, layer: str, infos: Mapping[str, TensorInfo]
    ) -> Iterable[Reading]:
        """As the marker says, if it names one of the scheme's formats."""
        marker = layer_marker(header, layer)
        if marker is None or marker.get("format") not in self.formats:
            entries = None if marker is None else flat(marker)
            yield from self.unmarked(entries, header, layer, infos)
            return
        unread = unread_entries(marker, layer_tensor(header, layer) or {}, self.known)
        for reading in self.marked(flat(marker), infos):
            yield dataclasses.replace(
                reading,
                evidence=reading.evidence or f"comfy_quant says {marker['format']}",
                unread=(*reading.unread, *unread),
            )

    def encode(
        self, qdata: Tensor, params: Mapping[str, Tensor], options: Mapping[str, object]
    ) -> dict[str, Tensor]:
        """The tensors as `store` gives them, and the marker.

        Raises:
            CheckpointError: if ComfyUI's format has no place for them.
        """
        tensors = self.store(qdata, params)
        return {**tensors, LAYER_MARKER: self.marker(qdata, params, tensors, options)}

    def store(self, qdata: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors of a file, by the ends of their keys, without the marker.

        Raises:
            CheckpointError: if ComfyUI's format has no place for them.
        """
        stored = {name: t for name, t in params.items() if name not in self.told}
        return super().encode(qdata, stored, {})


def flat(marker: Mapping[str, Any]) -> dict[str, Any]:
    """A marker's entries; older files have some of them under ``params``."""
    nested = marker.get("params")
    return {**(nested if isinstance(nested, dict) else {}), **marker}


def unread_entries(
    marker: Mapping[str, Any], outweighed: Mapping[str, Any], known: Collection[str]
) -> tuple[str, ...]:
    """What a marker says that is not read, or another one says that does not count.

    Args:
        marker: the one that is read.
        outweighed: another of the same layer.
        known: names of entries that are read.
    """
    others = {key for key in outweighed if outweighed[key] != marker.get(key)}
    return tuple(sorted({*(flat(marker).keys() - INERT - set(known)), *others}))
