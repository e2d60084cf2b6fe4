"""Convert a quantized checkpoint to another dialect, or to another scheme."""

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
from hijack.checkpoint.notes import adjusted_block_notes, format_notes
from hijack.checkpoint.requantize import (
    PLAIN_CAST,
    Target,
    plain_casts,
    reasons_against,
)
from hijack.claim import Claim
from hijack.errors import CheckpointError, UnconsumedScaleError, printable
from hijack.formats import matching
from hijack.formats.comfyui_markers import needless_markers
from hijack.formats.dialect import Dialect, EncodedLayer, FormatMetadata
from hijack.formats.identification import Identification, identify
from hijack.metrics import QuantizationError
from hijack.progress import Progress
from hijack.registry import Registry, current_registry
from hijack.safetensors_io.header import (
    FRAMEWORK,
    Header,
    TensorInfo,
    join,
    merge_metadata,
)
from hijack.safetensors_io.reader import Paths, open_tensors, read_header
from hijack.safetensors_io.shards import destination, parse_size
from hijack.safetensors_io.writer import CheckpointWriter, open_writer
from hijack.scheme import Scheme
from hijack.selection import Patterns

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
        schemes: layer to the scheme it is in now.
        kept: layer that does not become one of the scheme or the dialect asked for, and
            why; it stays in its own scheme, or a plain cast.
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
    schemes: Mapping[str, str] = dataclasses.field(default_factory=dict)
    kept: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def foreign(self) -> Mapping[str, str]:
        """Former name of `unsupported`."""
        return self.unsupported

    def __str__(self) -> str:
        changed = self.layers.keys() - self.kept.keys() - self.requantized.keys()
        text = f"{len(changed)} layers converted without loss"
        if self.reblocked:
            text += f" ({len(self.reblocked)} in other blocks)"
        if self.requantized:
            worst, error = min(self.requantized.items(), key=lambda item: item[1].sqnr)
            text += (
                f", {len(self.requantized)} requantized, the worst {worst} with "
                f"{error.sqnr:.1f} dB"
            )
        if self.kept:
            text += f", {len(self.kept)} kept as they were"
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
    dialect: str | None = None,
    *,
    requantize: bool | str | Scheme = False,
    include: Patterns = None,
    exclude: Patterns = None,
    drop_input_scales: bool = False,
    assume: Sequence[str] = (),
    max_shard_size: int | str | None = None,
    write_config: bool = False,
    progress: Progress | None = None,
    overwrite: bool = False,
    registry: Registry | None = None,
    **options: Any,
) -> ConvertReport:
    """Write the quantized layers of a checkpoint in another dialect or scheme.

    Quantized data and scales keep their values; all other tensors, their order and the
    metadata are copied. If the dialect cannot store the blocks of a layer, their scales
    are repeated over smaller blocks, or merged where all are equal. Layers of a scheme
    that does not have the dialect stay as they are, unless all do.

    What may be quantized again, with loss, says ``requantize``: nothing, what cannot be
    converted otherwise, or whatever is not in a certain scheme yet.

    Args:
        src: a safetensors file, an index file, or a list of shards.
        dst: the file to write; it appears when it is complete.
        dialect: the dialect to write, such as ``"deepseek"``. None is that of
            ``requantize``: the scheme's first, or its native one if that cannot store
            a layer.
        requantize: True: layers that cannot be converted are requantized in their own
            scheme. A scheme, or the name of one: all layers become layers of it, and
            plain FP8 casts that `quantize_file` would choose by default. Those of that
            scheme with the requested options are converted without loss. Those that it
            declines stay in their own scheme, in the same dialect if that can be
            written.
        include: fnmatch patterns on names of the layers that a scheme requantizes; None
            is every quantized one.
        exclude: patterns on names of layers that it leaves.
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
            ``block_size`` applies to all layers, but not to those that a scheme
            declines.

    Returns:
        What became of each layer.

    Raises:
        AmbiguousError: if the format of a layer is ambiguous.
        UnconsumedScaleError: if the file holds a scale that no scheme reads.
        SchemeError: if there is no such scheme or option.
        CheckpointError: if nothing in it is quantized; if layers cannot be converted,
            naming them; if no layer can become one of the scheme; if what two dialects
            say of the file cannot both be said; if ``write_config`` is set and the
            dialect has no config; if the destination exists; or if writing fails.
    """
    registry = current_registry(registry)
    target = None
    if not isinstance(requantize, bool):
        target = Target(registry.get(requantize), options, include, exclude)
        target.scheme.check_options(options)
    elif include is not None or exclude is not None:
        raise CheckpointError(
            "include: says which layers a scheme requantizes, and none is named; name "
            "it (--requantize SCHEME), or leave out include and exclude"
        )
    elif dialect is None:
        raise CheckpointError(
            "dialect: got none, expected one to convert to; name it, or the scheme to "
            "requantize to"
        )
    header = read_header(src)
    snapshot = SourceSnapshot(header)
    size = max_shard_size if max_shard_size is None else parse_size(max_shard_size)
    output = destination(dst, sharded=size is not None)
    check_output(output, Path(dst), src, header)
    result = identify(header, registry, assume=assume)
    job = _job(
        header,
        result,
        registry,
        _Request(dialect, target, options, requantize is not False),
    )
    job.plan_input_scales(drop_input_scales)
    extra = job.plan_file()
    written = job.request.dialect or ""
    config = None
    if write_config:
        config = config_of(extra, written, header, Path(dst), overwrite)
    metadata = merge_metadata(FRAMEWORK | job.metadata, extra.metadata)
    with open_writer(
        dst, job.tensors, metadata, tuple(job.tensors), size, overwrite=overwrite
    ) as writer:
        job.run(writer, progress)
        for key, tensor in extra.tensors.items():
            writer.write(key, tensor)
        snapshot.check_unchanged()
    if config is not None:
        write_config_beside(Path(dst), header.config, config)
    notes = (*job.notes(), *format_notes(extra, written, write_config))
    return job.report(result, notes)


def _refuse_unreadable(result: Identification) -> None:
    if result.unconsumed:
        raise UnconsumedScaleError(
            f"{result.source}: no scheme reads {result.unconsumed[0]}, one of "
            f"{len(result.unconsumed)} such keys; converting would lose its meaning; "
            "see `hijack identify`"
        )


@dataclasses.dataclass(frozen=True)
class _Request:
    """What the layers of a file are to become.

    Attributes:
        dialect: the dialect; None is the scheme's first.
        target: the scheme, and which layers; None is that of each layer.
        options: of ``scheme.quantize``.
        lossy: whether what cannot be converted otherwise is requantized.
    """

    dialect: str | None
    target: Target | None
    options: Mapping[str, Any]
    lossy: bool


def _job(
    header: Header, result: Identification, registry: Registry, request: _Request
) -> _ConversionJob:
    """The job in the requested dialect; without one, in the first that works.

    Raises:
        HijackError: if layers cannot be read or cannot become what is requested.
    """
    _refuse_unreadable(result)
    claims = {n: (c, registry.get(c.scheme)) for n, c in result.claims().items()}
    left: dict[str, str] = {}
    if request.target is not None:
        casts, left = plain_casts(header, result, request.target)
        claims |= {name: (claim, PLAIN_CAST) for name, claim in casts.items()}
    if not claims:
        raise CheckpointError(
            f"{result.source}: no layer is in a format that a scheme reads; expected a "
            "quantized checkpoint; see `hijack identify`, or use `hijack quantize`"
        )
    if request.target is None or request.dialect is not None:
        return _ConversionJob(header, claims, left, request)
    scheme = request.target.scheme
    first, native = matching.written_dialect(scheme), matching.native_of(scheme)
    try:
        return _ConversionJob(
            header, claims, left, dataclasses.replace(request, dialect=first.name)
        )
    except CheckpointError:
        if first is native:
            raise
    request = dataclasses.replace(request, dialect=native.name)
    return _ConversionJob(header, claims, left, request)


class _ConversionJob:
    """The conversion of a file: the planned tensors, and how each is made.

    Args:
        header: of the source.
        claims: layer to how it is read, and by which scheme.
        left: layers beside those that stay as they are, and why.
        request: what they are to become.

    Attributes:
        layers: layer to its conversion.
        kept: layers that stay in their scheme, or plain casts, and why.
        tensors: key to dtype and shape of every tensor of the result, in file order.
        metadata: of the source, without what its dialects stored there.
    """

    def __init__(
        self,
        header: Header,
        claims: Mapping[str, tuple[Claim, Scheme]],
        left: Mapping[str, str],
        request: _Request,
    ) -> None:
        self.header, self.request = header, request
        self.layers = {
            name: Conversion.of(header, claim, scheme)
            for name, (claim, scheme) in claims.items()
        }
        self.kept = dict(left)
        self._choose_targets()
        self._plan_layers()
        self._plan_kept()
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

    # -- planning the layers -----------------------------------------------------------

    def _choose_targets(self) -> None:
        """Give every layer the scheme and the dialect it is to be in, or keep it."""
        dialect, target = self.request.dialect, self.request.target
        wanted, lacking = None, None
        if target is not None:
            wanted = target.scheme
            layers = self.layers.items()
            shapes = {name: layer.shape for name, layer in layers}
            schemes = {name: layer.scheme.name for name, layer in layers}
            self.kept |= reasons_against(self.header, shapes, schemes, target)
        for name, layer in self.layers.items():
            if name in self.kept:
                continue
            try:
                written = matching.written_dialect(wanted or layer.scheme, dialect)
            except CheckpointError as error:
                lacking = lacking or error
                self.kept[name] = str(error)
                continue
            layer.result, layer.target = wanted or layer.scheme, written
        if lacking is not None and (wanted or self.layers.keys() <= self.kept.keys()):
            raise lacking
        if wanted is not None and self.layers.keys() <= self.kept.keys():
            name, reason = next(iter(self.kept.items()))
            raise CheckpointError(
                f"{self.header.source}: none of its {len(self.layers)} layers can "
                f"become one of scheme {wanted.name}; {name}: {reason}; choose another "
                "scheme or other options"
            )

    def _plan_layers(self) -> None:
        """Choose a block size for every layer, or name those without one."""
        refused: dict[str, str] = {}
        for layers in _by_target(
            {n: la for n, la in self.layers.items() if n not in self.kept}
        ):
            shared = _settle(layers)
            for name, layer in layers.items():
                reason = self._plan_layer(layer, shared)
                if reason:
                    refused[name] = reason
        if refused:
            names = ", ".join(list(refused)[:5]) + (" ..." if len(refused) > 5 else "")
            lossless = "" if self.request.lossy else " without loss"
            advice = "pass requantize (--requantize) to do it with loss"
            if self.request.lossy:
                advice = "choose another block_size or dialect"
            raise CheckpointError(
                f"{self.header.source}: {len(refused)} of {len(self.layers)} layers "
                f"cannot be converted{lossless}: {names}; "
                f"{next(iter(refused.values()))}; {advice}"
            )

    def _plan_layer(self, layer: Conversion, shared: Mapping[str, Any]) -> str:
        """Plan a layer; if it cannot become what is requested, say why."""
        options = self.request.options
        if layer.crosses:
            return layer.plan_requantize({**shared, **options})
        if self.request.target is not None and not layer.has_format(
            self.header, options
        ):
            return layer.plan_requantize({**shared, **options})
        reason = layer.plan(self.header, shared, options)
        if reason and self.request.lossy:
            reason = layer.plan_requantize(options)
        return reason

    def _plan_kept(self) -> None:
        """Plan to write the layers that are kept, in a dialect that can store them.

        That is the requested one if their scheme has it, else the one they are in, else
        what `save` would choose.
        """
        waiting = {n: la for n, la in self.layers.items() if n in self.kept}
        for layer in list(waiting.values()):
            if layer.scheme is PLAIN_CAST:  # there is nothing to write anew
                del self.layers[layer.claim.layer], waiting[layer.claim.layer]
        rank = 0
        while waiting:
            for layer in waiting.values():
                layer.target = self._dialects_for(layer)[rank]
            for layers in _by_target(waiting):
                shared = _settle(layers)
                for name, layer in layers.items():
                    reason = layer.plan(self.header, shared, {})
                    if not reason:
                        del waiting[name]
                    elif layer.target is matching.native_of(layer.scheme):
                        raise CheckpointError(
                            f"{self.header.source}: {name} cannot be kept in "
                            f"{layer.scheme.name}; {reason}"
                        )
            rank += 1

    def _dialects_for(self, layer: Conversion) -> list[Dialect]:
        """Dialects to write a kept layer in, the best first."""
        known = matching.dialects_of(layer.scheme)
        asked = [dialect for dialect in known if dialect.name == self.request.dialect]
        writable = [d for d in (*asked, layer.source, known[0]) if d.writes]
        return [*writable, matching.native_of(layer.scheme)]

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
                fits = layer.target.input_written and not layer.crosses
                if fits and not layer.inputs:
                    target = join(name, layer.target.input_written)
                    layer.inputs[claim.keys[role]] = target
                elif drop:
                    self.dropped.append(claim.keys[role])
                else:
                    raise CheckpointError(
                        f"{claim.keys[role]}: is an activation scale, which "
                        f"{_place(layer)} cannot store; pass drop_input_scales "
                        "(--drop-input-scales) to leave it out"
                    )

    def plan_file(self) -> FormatMetadata:
        """Plan all tensors of the file; returns the metadata of the whole."""
        layers: dict[Dialect, set[str]] = {}
        for name, layer in self.layers.items():
            # any dialect may have left markers, not only the one that is read
            for scheme in (layer.scheme, layer.result):
                for dialect in matching.dialects_of(scheme):
                    layers.setdefault(dialect, set()).add(name)
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
        encoded: dict[Dialect, dict[str, EncodedLayer]] = {}
        for name, layer in self.layers.items():
            if layer.encoded is not None:
                encoded.setdefault(layer.target, {})[name] = layer.encoded
        extra = matching.file_metadata(encoded, others)
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
        unused = layer.claim.unused
        qdata, *params = layer.planned.items()
        # all parameters replace the first one, or follow a weight that has none
        first = next(
            (r for r in layer.claim.keys if r != "weight" and r not in unused), "weight"
        )
        planned = dict([qdata]) if roles == ["weight"] else {}
        return planned | (dict(params) if roles == [first] else {})

    def _add(self, key: str, info: TensorInfo) -> None:
        if key in self.tensors:
            raise CheckpointError(
                f"{key}: dialect {self.request.dialect} would write it, but the source "
                "has it already; expected it to be free; rename it in the source"
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
        converted, error = layer.read(self.header)
        if error is not None:
            self.errors[layer.claim.layer] = error
        for key, tensor in layer.encode(*converted).items():
            writer.write(key, tensor)

    def notes(self) -> list[str]:
        """A note that layers have other blocks than requested, if some have."""
        adjusted: dict[Dialect, dict[str, tuple[str, str]]] = {}
        for name, layer in self.layers.items():
            sizes = layer.adjusted(self.request.options)
            if sizes is not None:
                adjusted.setdefault(layer.target, {})[name] = sizes
        return [
            note
            for dialect, layers in adjusted.items()
            for note in adjusted_block_notes(dialect, layers, len(self.layers))
        ]

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
            {name: layer.result.name for name, layer in self.layers.items()},
            self.kept,
        )


def _by_target(layers: Mapping[str, Conversion]) -> list[dict[str, Conversion]]:
    """Layers that are to be in one dialect."""
    groups: dict[Dialect, dict[str, Conversion]] = {}
    for name, layer in layers.items():
        groups.setdefault(layer.target, {})[name] = layer
    return list(groups.values())


def _settle(layers: Mapping[str, Conversion]) -> dict[str, Any]:
    """The options that layers of one dialect must share, as far as these tell."""
    known = {
        name: (layer.shape, layer.claim.block_size)
        for name, layer in layers.items()
        if not layer.crosses
    }
    return next(iter(layers.values())).target.settle(known) if known else {}


def _place(layer: Conversion) -> str:
    """What a layer will be in, for messages."""
    scheme = f" of scheme {layer.result.name}" if layer.crosses else ""
    return f"dialect {layer.target.name}{scheme}"


def _stands_for_none(dialect: Dialect, tensors: Mapping[str, Tensor], key: str) -> bool:
    """Whether an input scale has the value by which a dialect says it has none."""
    if dialect.absent_input is None or tensors[key].shape not in ((), (1,)):
        return False
    return tensors[key].item() == dialect.absent_input
