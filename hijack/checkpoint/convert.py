"""Convert a quantized checkpoint from one dialect to another, losslessly."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from hijack.checkpoint.config_json import config_of, write_config_beside
from hijack.checkpoint.conversion import Conversion
from hijack.checkpoint.copying import SourceSnapshot, check_output, chunks
from hijack.checkpoint.notes import format_notes
from hijack.errors import CheckpointError, UnconsumedScaleError, printable
from hijack.formats import matching
from hijack.formats.comfyui_markers import needless_markers
from hijack.formats.dialect import Dialect, FormatMetadata
from hijack.formats.identification import Identification, identify
from hijack.metrics import QuantizationError
from hijack.progress import Progress
from hijack.registry import Registry, current_registry
from hijack.safetensors_io.header import Header, TensorInfo, join, merge_metadata
from hijack.safetensors_io.reader import Paths, open_tensors, read_header
from hijack.safetensors_io.shards import destination, parse_size
from hijack.safetensors_io.writer import CheckpointWriter, open_writer

Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class ConvertReport:
    """What `convert_file` did.

    Attributes:
        layers: layer to its new block size.
        reblocked: layers whose scales were repeated or merged; they decode equally.
        requantized: layer to the error of requantizing it.
        unsupported: layer to its format, if no scheme reads that; copied unchanged.
        dropped: keys of tensors that the dialect cannot store.
        lost: what markers say beside the weight and the dialect cannot say, such as
            how a layer computes, to the number of layers.
        bytes_before: size of all tensors of the source.
        bytes_after: size of all tensors of the result.
        notes: human-readable notes on the result.
    """

    layers: Mapping[str, Pair | None]
    reblocked: tuple[str, ...]
    requantized: Mapping[str, QuantizationError]
    unsupported: Mapping[str, str]
    dropped: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    notes: tuple[str, ...] = ()
    lost: Mapping[str, int] = dataclasses.field(default_factory=dict)

    @property
    def foreign(self) -> Mapping[str, str]:
        """Former name of `unsupported`."""
        return self.unsupported

    def __str__(self) -> str:
        lossless = len(self.layers) - len(self.requantized)
        text = f"{lossless} layers converted without loss"
        if self.reblocked:
            text += f" ({len(self.reblocked)} in other blocks)"
        if self.requantized:
            worst, error = min(self.requantized.items(), key=lambda item: item[1].sqnr)
            text += (
                f", {len(self.requantized)} requantized, the worst {worst} with "
                f"{error.sqnr:.1f} dB"
            )
        if self.lost:
            names = [f"{name} of {count} layers" for name, count in self.lost.items()]
            text += f", but what markers say is lost: {', '.join(names)}"
        if self.dropped:
            text += f", {len(self.dropped)} tensors left out"
        if self.unsupported:
            text += f", {len(self.unsupported)} of other formats copied"
        text += f", {self.bytes_before:,} -> {self.bytes_after:,} bytes of tensors"
        return printable(text)


def convert_file(
    src: Paths,
    dst: str | os.PathLike[str],
    dialect: str,
    *,
    requantize: bool = False,
    drop_input_scales: bool = False,
    assume: Sequence[str] = (),
    max_shard_size: int | str | None = None,
    write_config: bool = False,
    progress: Progress | None = None,
    overwrite: bool = False,
    registry: Registry | None = None,
    **options: Any,
) -> ConvertReport:
    """Write the quantized layers of a checkpoint in another dialect.

    Quantized data and scales keep their values; all other tensors, their order and the
    metadata are copied. If the dialect cannot store the blocks of a layer, their scales
    are repeated over smaller blocks, or merged where all are equal.

    Args:
        src: a safetensors file, an index file, or a list of shards.
        dst: the file to write; it appears when it is complete.
        dialect: the dialect to write, such as ``"deepseek"``.
        requantize: whether layers that cannot be converted are requantized.
        drop_input_scales: whether input scales may be left out if the dialect cannot
            store them.
        assume: how to interpret an ambiguous file, as for `identify`.
        max_shard_size: bytes, or text such as ``"5GB"``: write shards of no more, and
            ``dst`` with ``.index.json`` as their index.
        write_config: whether to write ``config.json`` beside ``dst``, for dialects
            whose readers expect one.
        progress: called after each layer.
        overwrite: whether files that exist are replaced; the sources never are.
        registry: whose schemes and plugins are asked; None for the one in force.
        **options: of ``scheme.quantize``, for layers that are requantized; a
            ``block_size`` applies to all layers.

    Returns:
        What became of each layer.

    Raises:
        AmbiguousError: if the format of a layer is ambiguous.
        UnconsumedScaleError: if the file holds a scale that no scheme reads.
        CheckpointError: if nothing in it is quantized; if layers cannot be converted,
            naming them; if ``write_config`` is set and the dialect has no config; if
            the destination exists; or if writing fails.
    """
    header = read_header(src)
    snapshot = SourceSnapshot(header)
    size = max_shard_size if max_shard_size is None else parse_size(max_shard_size)
    output = destination(dst, sharded=size is not None)
    check_output(output, Path(dst), src, header)
    registry = current_registry(registry)
    result = identify(header, registry, assume=assume)
    _refuse_unreadable(result)
    job = _ConversionJob(header, result, dialect, options, requantize, registry)
    job.plan_input_scales(drop_input_scales)
    extra = job.plan_file()
    config = None
    if write_config:
        config = config_of(extra, dialect, header, Path(dst), overwrite)
    metadata = merge_metadata(job.metadata, extra.metadata)
    with open_writer(
        dst, job.tensors, metadata, tuple(job.tensors), size, overwrite=overwrite
    ) as writer:
        job.run(writer, progress)
        for key, tensor in extra.tensors.items():
            writer.write(key, tensor)
        snapshot.check_unchanged()
    if config is not None:
        write_config_beside(Path(dst), header.config, config)
    return job.report(result, tuple(format_notes(extra, dialect, write_config)))


def _refuse_unreadable(result: Identification) -> None:
    if result.unconsumed:
        raise UnconsumedScaleError(
            f"{result.source}: no scheme reads {result.unconsumed[0]}, one of "
            f"{len(result.unconsumed)} such keys; converting would lose its meaning; "
            "see `hijack identify`"
        )
    if not result.claims():
        raise CheckpointError(
            f"{result.source}: no layer is in a format that a scheme reads; expected a "
            "quantized checkpoint; see `hijack identify`, or use `hijack quantize`"
        )


class _ConversionJob:
    """The conversion of a file: the planned tensors, and how each is made.

    Attributes:
        layers: layer to its conversion.
        tensors: key to dtype and shape of every tensor of the result, in file order.
        metadata: of the source, without what its dialects stored there.
    """

    def __init__(
        self,
        header: Header,
        result: Identification,
        dialect: str,
        options: Mapping[str, Any],
        requantize: bool,
        registry: Registry,
    ) -> None:
        self.header, self.dialect = header, dialect
        self.layers = {
            name: Conversion.of(header, claim, dialect, registry.get(claim.scheme))
            for name, claim in result.claims().items()
        }
        self._plan_layers(options, requantize)
        self.owners = {
            key: name
            for name, layer in self.layers.items()
            for key in layer.claim.keys.values()
        }
        self.metadata = dict(header.metadata)
        self.removed = set(needless_markers(header))  # and those that no longer apply
        self.dropped: list[str] = []
        self.errors: dict[str, QuantizationError] = {}
        self.tensors: dict[str, TensorInfo] = {}

    def _plan_layers(self, options: Mapping[str, Any], requantize: bool) -> None:
        """Choose a block size for every layer, or name those without one."""
        refused: dict[str, str] = {}
        for target in {layer.target for layer in self.layers.values()}:
            layers = {n: la for n, la in self.layers.items() if la.target is target}
            shared = target.settle(
                {n: (la.shape, la.claim.block_size) for n, la in layers.items()}
            )
            for name, layer in layers.items():
                reason = layer.plan(self.header, shared, options)
                if reason and requantize:
                    reason = layer.plan_requantize(options)
                if reason:
                    refused[name] = reason
        if refused:
            names = ", ".join(list(refused)[:5]) + (" ..." if len(refused) > 5 else "")
            lossless = "" if requantize else " without loss"
            advice = "pass requantize (--requantize) to do it with loss"
            if requantize:
                advice = "choose another block_size or dialect"
            raise CheckpointError(
                f"{self.header.source}: {len(refused)} of {len(self.layers)} layers "
                f"cannot be converted{lossless}: {names}; "
                f"{next(iter(refused.values()))}; {advice}"
            )

    # -- planning the file -------------------------------------------------------------

    def plan_input_scales(self, drop: bool) -> None:
        """Choose the keys of input scales, or refuse to lose them.

        Raises:
            CheckpointError: if one cannot be stored and must not be dropped.
        """
        tensors = open_tensors(self.header)  # once, so that files are mapped once
        for name, layer in self.layers.items():
            claim = layer.claim
            for role in claim.unused:
                if role not in layer.source.inputs:
                    continue
                if _stands_for_none(layer.source, tensors, claim.keys[role]):
                    continue
                if layer.target.input_written and not layer.inputs:
                    target = join(name, layer.target.input_written)
                    layer.inputs[claim.keys[role]] = target
                elif drop:
                    self.dropped.append(claim.keys[role])
                else:
                    raise CheckpointError(
                        f"{claim.keys[role]}: is an activation scale, which dialect "
                        f"{self.dialect} cannot store; pass drop_input_scales "
                        "(--drop-input-scales) to leave it out"
                    )

    def plan_file(self) -> FormatMetadata:
        """Plan all tensors of the file; returns the metadata of the whole."""
        layers: dict[Dialect, list[str]] = {}
        for name, layer in self.layers.items():
            # any dialect may have left markers, not only the one that is read
            for dialect in matching.dialects_of(layer.scheme):
                layers.setdefault(dialect, []).append(name)
        for dialect, names in layers.items():
            keys = self.header.tensors.keys()
            self.metadata, removed = dialect.unmark(self.metadata, keys, names)
            self.removed |= removed
        self._plan_unused()
        for key, info in self.header.tensors.items():
            for name, planned in self._planned(key, info).items():
                self._add(name, planned)
        others = {
            key: info
            for key, info in self.header.tensors.items()
            if key not in self.owners and key not in self.removed
        }
        target = next(iter(self.layers.values())).target
        encoded = {n: la.encoded for n, la in self.layers.items() if la.encoded}
        extra = target.finish(encoded, others)
        for key, tensor in extra.tensors.items():
            self._add(key, TensorInfo.of(tensor))
        return extra

    def _plan_unused(self) -> None:
        """Name the tensors of layers that are neither written nor markers."""
        for layer in self.layers.values():
            keys = {role: layer.claim.keys[role] for role in layer.claim.unused}
            self.dropped += [
                key
                for role, key in keys.items()
                if role not in layer.source.inputs and key not in self.removed
            ]

    def _planned(self, key: str, info: TensorInfo) -> Mapping[str, TensorInfo]:
        """The tensors that replace one tensor of the source."""
        owner = self.owners.get(key)
        if owner is None:
            return {} if key in self.removed else {key: info}
        layer = self.layers[owner]
        if key in layer.inputs:
            return {layer.inputs[key]: info}
        roles = [role for role, name in layer.claim.keys.items() if name == key]
        qdata, *params = layer.planned.items()
        if roles == ["weight"]:
            return dict([qdata])
        # all parameters replace the first one
        first = next(role for role in layer.claim.keys if role != "weight")
        return dict(params) if roles == [first] else {}

    def _add(self, key: str, info: TensorInfo) -> None:
        if key in self.tensors:
            raise CheckpointError(
                f"{key}: dialect {self.dialect} would write it, but the source has it "
                "already; expected it to be free; rename it in the source"
            )
        self.tensors[key] = info

    # -- writing -----------------------------------------------------------------------

    def run(self, writer: CheckpointWriter, progress: Progress | None) -> None:
        """Copy or convert every tensor, in file order."""
        done = 0
        for key, info in self.header.tensors.items():
            owner = self.owners.get(key)
            layer = None if owner is None else self.layers[owner]
            if layer is None and key not in self.removed:
                writer.write_bytes(key, chunks(info))
            elif layer is not None and key in layer.inputs:
                writer.write_bytes(layer.inputs[key], chunks(info))
            elif layer is not None and key == layer.claim.keys["weight"]:
                self._write_layer(writer, layer)
                done += 1
                if progress is not None:
                    progress(done, len(self.layers), layer.claim.layer)

    def _write_layer(self, writer: CheckpointWriter, layer: Conversion) -> None:
        """Convert one layer; its memory is released on return."""
        converted = layer.read(self.header)
        if layer.requantized:
            self.errors[layer.claim.layer] = layer.error(self.header, converted)
        for key, tensor in layer.encode(*converted).items():
            writer.write(key, tensor)

    def report(self, result: Identification, notes: tuple[str, ...]) -> ConvertReport:
        """What became of each layer."""
        before = sum(info.nbytes for info in self.header.tensors.values())
        return ConvertReport(
            {name: layer.block_size for name, layer in self.layers.items()},
            tuple(
                name
                for name, layer in self.layers.items()
                if layer.block_size != layer.claim.block_size and not layer.requantized
            ),
            self.errors,
            {name: layer.format for name, layer in result.unsupported.items()},
            tuple(self.dropped),
            before,
            sum(info.nbytes for info in self.tensors.values()),
            notes,
            Counter(name for layer in self.layers.values() for name in layer.lost),
        )


def _stands_for_none(dialect: Dialect, tensors: Mapping[str, Tensor], key: str) -> bool:
    """Whether an input scale has the value by which a dialect says it has none."""
    if dialect.absent_input is None or tensors[key].shape not in ((), (1,)):
        return False
    return tensors[key].item() == dialect.absent_input
