"""Turn a quantized checkpoint from one dialect into another, bit for bit."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hijack.checkpoint.config_json import config_of, write_config_beside
from hijack.checkpoint.conversion import Conversion
from hijack.checkpoint.copying import Watch, chunks, refuse_place
from hijack.checkpoint.notes import mark_notes
from hijack.checkpoint.quantize import Progress
from hijack.errors import CheckpointError, UnconsumedScaleError
from hijack.formats.detection import identify
from hijack.formats.dialect import Dialect, FileMarks
from hijack.formats.identification import Identification
from hijack.metrics import Loss
from hijack.safetensors_io.header import Header, TensorInfo, join, parse_table
from hijack.safetensors_io.reader import Paths, read_header
from hijack.safetensors_io.shards import destination, parse_size
from hijack.safetensors_io.writer import CheckpointWriter, open_writer

Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class ConvertReport:
    """What `convert_file` did.

    Attributes:
        layers: layer to the block size it has now.
        reblocked: layers whose scales were repeated or joined; they decode alike.
        requantized: layer to what quantizing it anew lost.
        foreign: layer to its format, of those that no scheme reads; copied as they are.
        dropped: keys of tensors that the dialect has no place for.
        bytes_before: size of all tensors of the source.
        bytes_after: size of all tensors of the result.
        notes: sentences of what people should know of the result.
    """

    layers: Mapping[str, Pair | None]
    reblocked: tuple[str, ...]
    requantized: Mapping[str, Loss]
    foreign: Mapping[str, str]
    dropped: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lossless = len(self.layers) - len(self.requantized)
        text = f"{lossless} layers converted without loss"
        if self.reblocked:
            text += f" ({len(self.reblocked)} in other blocks)"
        if self.requantized:
            worst, loss = min(self.requantized.items(), key=lambda item: item[1].sqnr)
            text += (
                f", {len(self.requantized)} quantized anew, the worst {worst} with "
                f"{loss.sqnr:.1f} dB"
            )
        if self.foreign:
            text += f", {len(self.foreign)} of other formats copied"
        return f"{text}, {self.bytes_before:,} -> {self.bytes_after:,} bytes of tensors"


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
    **options: Any,
) -> ConvertReport:
    """Write the quantized layers of a checkpoint in another dialect.

    Codes and scales stay what they are, bit for bit; all other tensors, their order and
    the metadata stay byte for byte. Where the dialect has no words for the blocks of a
    layer, their scales are repeated over smaller blocks, or joined where all are equal.

    Args:
        src: a safetensors file, an index file, or a list of shards.
        dst: the file to write; replaced only when the new one is whole.
        dialect: the dialect to write, such as ``"deepseek"``.
        requantize: whether layers that cannot be converted are quantized anew.
        drop_input_scales: whether scales of inputs may be left out, where the dialect
            has no place for them.
        assume: how to read what the file does not tell, as for `identify`.
        max_shard_size: bytes, or text such as ``"5GB"``: write shards of no more, and
            ``dst`` with ``.index.json`` as their index.
        write_config: whether to write ``config.json`` beside ``dst``, for dialects
            whose readers expect one.
        progress: called after each layer.
        **options: of ``scheme.quantize``, for layers that are quantized anew; all shall
            have the ``block_size`` among them.

    Returns:
        What became of each layer.

    Raises:
        AmbiguousError: if the file does not tell how to read a layer.
        UnconsumedScaleError: if it holds a scale that nobody reads.
        CheckpointError: if nothing in it is quantized; if layers cannot be converted,
            naming them; if a config is asked for that the dialect does not have; or
            if writing fails.
    """
    header = read_header(src)
    watch = Watch(header)
    size = max_shard_size if max_shard_size is None else parse_size(max_shard_size)
    place = destination(dst, sharded=size is not None)
    refuse_place(place, Path(dst), src, header)
    found = identify(header, assume=assume)
    _refuse_unreadable(found)
    job = _Job(header, found, dialect, options, requantize)
    job.place_inputs(drop_input_scales)
    marks = job.finish()
    config = config_of(marks, dialect, header, Path(dst)) if write_config else None
    metadata = job.metadata(marks.metadata)
    with open_writer(dst, job.plan, metadata, job.order, size) as writer:
        job.run(writer, progress)
        for key, tensor in marks.tensors.items():
            writer.write(key, tensor)
        watch.check()
    if config is not None:
        write_config_beside(Path(dst), header.config, config)
    return job.report(found, tuple(mark_notes(marks, dialect, write_config)))


def _refuse_unreadable(found: Identification) -> None:
    if found.orphans:
        raise UnconsumedScaleError(
            f"{found.source}: no scheme reads {found.orphans[0]}, one of "
            f"{len(found.orphans)} such keys; converting would lose what it is for; "
            "see `hijack identify`"
        )
    if not found.claims():
        raise CheckpointError(
            f"{found.source}: no layer is quantized in a way a scheme reads; expected "
            "a quantized checkpoint; see `hijack identify`, or use `hijack quantize`"
        )


class _Job:
    """One conversion: what the result will hold, and how each part is made."""

    def __init__(
        self,
        header: Header,
        found: Identification,
        dialect: str,
        options: Mapping[str, Any],
        requantize: bool,
    ) -> None:
        self.header, self.dialect = header, dialect
        self.layers = {
            name: Conversion.of(header, claim, dialect)
            for name, claim in found.claims().items()
        }
        self._choose(options, requantize)
        self.owners = {
            key: name
            for name, layer in self.layers.items()
            for key in layer.claim.keys.values()
        }
        self.left: set[str] = set()  # marks that hold no longer
        self.dropped: list[str] = []
        self.losses: dict[str, Loss] = {}
        self.plan: dict[str, TensorInfo] = {}
        self.order: list[str] = []

    def _choose(self, options: Mapping[str, Any], requantize: bool) -> None:
        """Settle on blocks for every layer, or say for which there are none."""
        refused: dict[str, str] = {}
        for target in {layer.target for layer in self.layers.values()}:
            mine = {n: la for n, la in self.layers.items() if la.target is target}
            shapes = {n: (la.shape, la.block_size) for n, la in mine.items()}
            settled = target.settle(shapes)
            for name, layer in mine.items():
                reason = layer.fit(self.header, settled, options)
                if reason and requantize:
                    reason = layer.fit_anew(options)
                if reason:
                    refused[name] = reason
        if refused:
            names = ", ".join(list(refused)[:5]) + (" ..." if len(refused) > 5 else "")
            way = "" if requantize else " without loss"
            help_ = "pass requantize (--requantize) to quantize them anew"
            if requantize:
                help_ = "choose another block_size or dialect"
            raise CheckpointError(
                f"{self.header.source}: {len(refused)} of {len(self.layers)} layers "
                f"cannot be converted{way}: {names}; {next(iter(refused.values()))}; "
                f"{help_}"
            )

    # -- what else is in the file ------------------------------------------------------

    def place_inputs(self, drop: bool) -> None:
        """Find names for the scales of inputs, or refuse to lose them.

        Raises:
            CheckpointError: if there is no place for one, and it must not be dropped.
        """
        for name, layer in self.layers.items():
            claim = layer.claim
            for role in claim.unused:
                if role not in layer.source.inputs:
                    continue
                if layer.target.input_written and not layer.inputs:
                    target = join(name, layer.target.input_written)
                    layer.inputs[claim.keys[role]] = target
                elif drop:
                    self.dropped.append(claim.keys[role])
                else:
                    raise CheckpointError(
                        f"{claim.keys[role]}: is the scale of an input, for which "
                        f"dialect {self.dialect} has no place; pass drop_input_scales "
                        "(--drop-input-scales) to leave it out"
                    )

    def finish(self) -> FileMarks:
        """Plan the file; returns what it says as a whole."""
        left = self.left
        marking: dict[Dialect, list[str]] = {}
        for name, layer in self.layers.items():
            # any of them may have left a mark, not only the one that is read
            for dialect in layer.scheme.all_dialects():
                marking.setdefault(dialect, []).append(name)
        self._metadata = dict(self.header.metadata)
        for dialect, names in marking.items():
            keys = self.header.tensors.keys()
            self._metadata, gone = dialect.unmark(self._metadata, keys, names)
            left |= gone
        for key, info in self.header.tensors.items():
            for name, planned in self._planned(key, info, left).items():
                self._add(name, planned)
        others = {
            key: info
            for key, info in self.header.tensors.items()
            if key not in self.owners and key not in left
        }
        marks = self._marks(others)
        for key, tensor in marks.tensors.items():
            self._add(key, TensorInfo.of(tensor))
        return marks

    def _planned(
        self, key: str, info: TensorInfo, left: set[str]
    ) -> Mapping[str, TensorInfo]:
        """What takes the place of one tensor of the source."""
        owner = self.owners.get(key)
        if owner is None:
            return {} if key in left else {key: info}
        layer = self.layers[owner]
        if key in layer.inputs:
            return {layer.inputs[key]: info}
        roles = [role for role, name in layer.claim.keys.items() if name == key]
        names = list(layer.planned)
        chosen = names[:1]
        if roles != ["weight"]:  # all the rest stands where the first of it stood
            first = next(role for role in layer.claim.keys if role != "weight")
            chosen = names[1:] if roles == [first] else []
        return {name: layer.planned[name] for name in chosen}

    def _add(self, key: str, info: TensorInfo) -> None:
        if key in self.plan:
            raise CheckpointError(
                f"{key}: dialect {self.dialect} would write it, and the source holds "
                "it already; expected it to be free; rename it in the source"
            )
        self.plan[key] = info
        self.order.append(key)

    def _marks(self, others: Mapping[str, TensorInfo]) -> FileMarks:
        target = next(iter(self.layers.values())).target
        spelled = {name: layer.spelled() for name, layer in self.layers.items()}
        return target.finish(spelled, others)

    def metadata(self, said: Mapping[str, str]) -> dict[str, str]:
        """The source's metadata without its marks, and the new ones."""
        kept = self._metadata
        both = {key: _joined(kept[key], said[key]) for key in said if key in kept}
        return {**kept, **said, **both}

    # -- writing -----------------------------------------------------------------------

    def run(self, writer: CheckpointWriter, progress: Progress | None) -> None:
        """Copy what stays and convert the rest, in file order."""
        done = 0
        for key, info in self.header.tensors.items():
            owner = self.owners.get(key)
            layer = None if owner is None else self.layers[owner]
            if layer is None and key not in self.left:
                writer.write_bytes(key, chunks(info))
            elif layer is not None and key in layer.inputs:
                writer.write_bytes(layer.inputs[key], chunks(info))
            elif layer is not None and key == layer.claim.keys["weight"]:
                self._write_layer(writer, layer)
                done += 1
                if progress is not None:
                    progress(done, len(self.layers), layer.claim.layer)

    def _write_layer(self, writer: CheckpointWriter, layer: Conversion) -> None:
        """Convert one layer; when this returns, none of its memory is held."""
        made = layer.read(self.header)
        if layer.requantized:
            self.losses[layer.claim.layer] = layer.loss(self.header, made)
        for key, tensor in layer.encode(*made).items():
            writer.write(key, tensor)

    def report(self, found: Identification, notes: tuple[str, ...]) -> ConvertReport:
        """What became of each layer."""
        before = sum(info.nbytes for info in self.header.tensors.values())
        return ConvertReport(
            {name: layer.block_size for name, layer in self.layers.items()},
            tuple(
                name
                for name, layer in self.layers.items()
                if layer.block_size != layer.claim.block_size and not layer.requantized
            ),
            self.losses,
            {name: other.format for name, other in found.foreign.items()},
            tuple(self.dropped),
            before,
            sum(info.nbytes for info in self.plan.values()),
            notes,
        )


def _joined(kept: str, said: str) -> str:
    """A new table of layers, with what the old one says of others."""
    old, new = parse_table(kept).get("layers"), parse_table(said)
    if not isinstance(old, dict) or not isinstance(new.get("layers"), dict):
        return said
    return json.dumps({**new, "layers": {**old, **new["layers"]}})
