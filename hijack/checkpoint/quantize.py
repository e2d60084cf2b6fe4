"""Quantize a checkpoint file, one layer at a time."""

from __future__ import annotations

import dataclasses
import fnmatch
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hijack.checkpoint.copying import chunks, refuse_same_file
from hijack.checkpoint.dialect import Dialect, FileMarks, Spelled
from hijack.checkpoint.header import Header, TensorInfo, join
from hijack.checkpoint.identify import identify
from hijack.checkpoint.marker import METADATA_KEY
from hijack.checkpoint.reader import Paths, open_tensors, read_header
from hijack.checkpoint.writer import CheckpointWriter, open_writer
from hijack.errors import CheckpointError, HijackError
from hijack.layers import DENSE_DTYPES, quantize_weight
from hijack.registry import default_registry
from hijack.scheme import Scheme

#: Called with layers done, layers in all, and the name of the layer just done.
Progress = Callable[[int, int, str], None]
Patterns = str | Sequence[str] | None


@dataclasses.dataclass(frozen=True)
class QuantizeReport:
    """What `quantize_file` did.

    Attributes:
        layers: names of the layers that were quantized, in file order.
        skipped: name of every other layer with a 2-D weight or more, and why.
        bytes_before: size of all tensors of the source.
        bytes_after: size of all tensors of the result.
    """

    layers: tuple[str, ...]
    skipped: Mapping[str, str]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        return (
            f"{len(self.layers)} layers quantized, {len(self.skipped)} left dense, "
            f"{self.bytes_before:,} -> {self.bytes_after:,} bytes"
        )


def quantize_file(
    src: Paths,
    dst: str | os.PathLike[str],
    scheme: str | Scheme = "blockwise_fp8",
    *,
    block_size: Any = None,
    dialect: str | None = None,
    loras: Sequence[Any] = (),
    include: Patterns = None,
    exclude: Patterns = None,
    progress: Progress | None = None,
    **options: Any,
) -> QuantizeReport:
    """Quantize the 2-D weights of a safetensors checkpoint.

    Memory is bounded by the largest layer. Everything that is not quantized is copied
    byte for byte, and metadata is kept.

    Args:
        src: a safetensors file, an index file, or a list of shards.
        dst: the file to write; replaced only when the new one is whole.
        scheme: a registered name, or a scheme.
        block_size: the scheme's block size; None takes the scheme's default.
        dialect: how to spell the quantized layers; None takes the scheme's first.
        loras: LoRAs to merge first; none are supported yet.
        include: fnmatch patterns on layer names; None includes every layer with a 2-D
            floating weight; those of more dimensions only if a pattern names them.
        exclude: fnmatch patterns on layer names to leave dense.
        progress: called after each layer.
        **options: further options of ``scheme.quantize``.

    Returns:
        Which layers were quantized, which not and why, and the sizes.

    Raises:
        CheckpointError: if the source is quantized already, nothing is left to
            quantize, the dialect cannot spell a layer, or writing fails.
        NonFiniteError: if a weight holds inf or NaN.
        HijackError: of other kinds, naming the file or the layer.
    """
    if loras:
        raise CheckpointError(
            f"{dst}: got {len(loras)} LoRAs, merging them is not supported yet; merge "
            "them into the source first"
        )
    chosen = default_registry().get(scheme)
    header = read_header(src)
    refuse_same_file(src, header, Path(dst))
    _refuse_quantized(header)
    if block_size is not None:
        options["block_size"] = block_size
    job = _Job(header, chosen, chosen.dialect(dialect), options, include, exclude)
    with open_writer(dst, job.plan, job.metadata()) as writer:
        job.run(writer, progress)
    after = sum(info.nbytes for info in job.plan.values())
    before = sum(info.nbytes for info in header.tensors.values())
    return QuantizeReport(tuple(job.layers), job.skipped, before, after)


class _Job:
    """One conversion: what the result will hold, and how each part is made."""

    def __init__(
        self,
        header: Header,
        scheme: Scheme,
        dialect: Dialect,
        options: Mapping[str, Any],
        include: Patterns,
        exclude: Patterns,
    ) -> None:
        self.header, self.scheme, self.dialect = header, scheme, dialect
        self.skipped: dict[str, str] = {}
        self.layers: dict[str, dict[str, Any]] = {}
        _check_matched(include, header)
        for layer in header.layers():
            info = header.tensors[join(layer, "weight")]
            reason = _why_not(layer, info, include, exclude)
            if reason is None:
                self.layers[layer] = dialect.fit_options(info.shape, options)
            elif len(info.shape) > 1:
                self.skipped[layer] = reason
        if not self.layers:
            raise CheckpointError(
                f"{header.source}: no layer is left to quantize; it has "
                f"{len(self.skipped)} with weights of two dimensions or more; widen "
                "include or narrow exclude"
            )
        self.spelled: dict[str, Spelled] = {}
        self.plan = self._plan()
        self.marks = self._finish()

    def _plan(self) -> dict[str, TensorInfo]:
        plan: dict[str, TensorInfo] = {}
        for key, info in self.header.tensors.items():
            planned = {key: info}
            layer = self._quantized(key)
            if layer is not None:
                planned = self._plan_layer(layer, info)
            for name in planned.keys() & plan.keys():
                raise CheckpointError(
                    f"{name}: the dialect {self.dialect.name} would write it, and the "
                    "source holds it already; is the source quantized?"
                )
            plan |= planned
        return plan

    def _plan_layer(self, layer: str, info: TensorInfo) -> dict[str, TensorInfo]:
        meta = torch.empty(info.shape, dtype=info.torch_dtype, device="meta")
        made = self._encode(layer, meta)
        return {name: TensorInfo.of(tensor) for name, tensor in made.items()}

    def _quantized(self, key: str) -> str | None:
        """The layer to quantize whose weight a key is, or None."""
        layer = key.removesuffix("weight").removesuffix(".")
        return layer if key == join(layer, "weight") and layer in self.layers else None

    def _encode(self, layer: str, weight: Tensor) -> dict[str, Tensor]:
        options = self.layers[layer]
        qdata, params = quantize_weight(self.scheme, weight, options, layer)
        try:
            tensors = self.dialect.encode(qdata, params, options)
        except HijackError as error:
            raise type(error)(f"{layer}: {error}") from error
        if weight.is_meta:
            self._remember(layer, qdata, params, tensors)
        return {join(layer, suffix): tensor for suffix, tensor in tensors.items()}

    def _remember(
        self,
        layer: str,
        qdata: Tensor,
        params: Mapping[str, Tensor],
        tensors: Mapping[str, Tensor],
    ) -> None:
        """Keep what the dialect must know to say what the file is."""
        self.spelled[layer] = Spelled(
            self.scheme.name,
            tuple(params),
            self.header.tensors[join(layer, "weight")].shape,
            self.scheme.block_size(qdata, params),
            {suffix: TensorInfo.of(tensor) for suffix, tensor in tensors.items()},
        )

    def _finish(self) -> FileMarks:
        """What the file says as a whole; its tensors join the plan."""
        others = [k for k in self.header.tensors if self._quantized(k) is None]
        marks = self.dialect.finish(self.spelled, others)
        self.plan |= {key: TensorInfo.of(t) for key, t in marks.tensors.items()}
        return marks

    def metadata(self) -> dict[str, str]:
        """The source's metadata, and markers where the dialect has any."""
        metadata = dict(self.header.metadata)
        metadata.pop(METADATA_KEY, None)  # of a file that was quantized once
        return {**metadata, **self.marks.metadata}

    def run(self, writer: CheckpointWriter, progress: Progress | None) -> None:
        """Copy what stays and quantize the rest, in file order."""
        done = 0
        for key, info in self.header.tensors.items():
            layer = self._quantized(key)
            if layer is None:
                writer.write_bytes(key, chunks(info))
                continue
            self._write_layer(writer, layer)
            done += 1
            if progress is not None:
                progress(done, len(self.layers), layer)
        for key, tensor in self.marks.tensors.items():
            writer.write(key, tensor)

    def _write_layer(self, writer: CheckpointWriter, layer: str) -> None:
        """Quantize one layer; when this returns, none of its memory is held."""
        # mapped anew for each layer, so that the pages read do not add up
        weight = open_tensors(self.header)[join(layer, "weight")]
        for name, tensor in self._encode(layer, weight).items():
            writer.write(name, tensor)


def _why_not(
    layer: str, info: TensorInfo, include: Patterns, exclude: Patterns
) -> str | None:
    if include is not None and not _matches(layer, include):
        return "not included"
    if _matches(layer, exclude):
        return "excluded"
    if info.torch_dtype not in DENSE_DTYPES:
        return f"dtype {info.dtype}"
    dimensions = len(info.shape)
    if dimensions < 2 or (dimensions > 2 and include is None):
        return f"{dimensions} dimensions"
    return None if 0 not in info.shape else "empty"


def _matches(layer: str, patterns: Patterns) -> bool:
    listed = [patterns] if isinstance(patterns, str) else patterns or ()
    return any(fnmatch.fnmatchcase(layer, pattern) for pattern in listed)


def _check_matched(include: Patterns, header: Header) -> None:
    for pattern in [include] if isinstance(include, str) else include or ():
        if not any(_matches(layer, pattern) for layer in header.layers()):
            some = ", ".join(list(header.layers())[:3]) or "none"
            raise CheckpointError(
                f"include: pattern {pattern!r} matches no layer of {header.source}; "
                f"layers are such as {some}"
            )


def _refuse_quantized(header: Header) -> None:
    found = identify(header)
    claimed = [*found.layers, *found.ambiguous, *found.foreign]
    if claimed or found.orphans:
        first = claimed[0] if claimed else found.orphans[0]
        raise CheckpointError(
            f"{header.source}: is quantized already ({first}); expected dense weights; "
            "quantize the original, or see `hijack identify`"
        )
