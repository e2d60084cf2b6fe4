"""Quantize a checkpoint file, a few layers at a time."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hijack.checkpoint.config_json import config_of, write_config_beside
from hijack.checkpoint.copying import Watch, refuse_place
from hijack.checkpoint.fingerprint import fingerprint
from hijack.checkpoint.notes import mark_notes, refit_notes, replaced_notes
from hijack.checkpoint.quantize_choice import Choice, Patterns, choose
from hijack.checkpoint.quantize_plan import QuantizePlan
from hijack.checkpoint.quantize_run import Progress as Progress
from hijack.checkpoint.quantize_run import Way, count_workers, run
from hijack.errors import CheckpointError
from hijack.formats.detection import identify
from hijack.lora.delta import SUFFIXES
from hijack.lora.files import Loras, Spec, parse_loras
from hijack.registry import default_registry
from hijack.safetensors_io.header import Header, join
from hijack.safetensors_io.layout import lay_out_files
from hijack.safetensors_io.reader import Paths, read_header
from hijack.safetensors_io.shards import Destination, destination, parse_size
from hijack.safetensors_io.writer import open_writer
from hijack.scheme import Scheme
from hijack.text import block_text

#: Endings of keys that only LoRA, LoHa and LoKr have.
_LORA_PARTS = tuple(end for end in SUFFIXES if re.search("lora|hada|lokr", end))


@dataclasses.dataclass(frozen=True)
class QuantizeReport:
    """What `quantize_file` did, or would do.

    Attributes:
        layers: names of the layers that were quantized, in file order.
        skipped: name of every other layer with a 2-D weight or more, and why.
        bytes_before: size of all tensors of the source.
        bytes_after: size of all tensors of the result.
        blocks: block size, as people write it, to the number of layers with it.
        merged: keys of the tensors that LoRAs were merged into.
        unmatched: names in LoRA files of layers that the checkpoint lacks.
        dialect: how the quantized layers are spelled.
        architecture: name of the model's, "" if it is not known.
        files: name to size of each file written, but for the index of shards.
        written: False after a dry run.
        reblocked: layers with other blocks than those asked for, which the dialect
            cannot spell.
        notes: sentences of what people should know of the result.
    """

    layers: tuple[str, ...]
    skipped: Mapping[str, str]
    bytes_before: int
    bytes_after: int
    blocks: Mapping[str, int] = dataclasses.field(default_factory=dict)
    merged: tuple[str, ...] = ()
    unmatched: tuple[str, ...] = ()
    dialect: str = ""
    architecture: str = ""
    files: Mapping[str, int] = dataclasses.field(default_factory=dict)
    written: bool = True
    reblocked: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        done = "quantized" if self.written else "would be quantized"
        text = (
            f"{len(self.layers)} layers {done}, {len(self.skipped)} left dense, "
            f"{self.bytes_before:,} -> {self.bytes_after:,} bytes of tensors, "
            f"dialect {self.dialect}"
        )
        if self.merged:
            text += f", LoRAs merged into {len(self.merged)} tensors"
        if self.unmatched:
            text += f", {len(self.unmatched)} LoRAs of other layers left out"
        return text


def quantize_file(
    src: Paths,
    dst: str | os.PathLike[str],
    scheme: str | Scheme = "blockwise_fp8",
    *,
    block_size: Any = None,
    dialect: str | None = None,
    loras: Spec | Iterable[Spec] = (),
    include: Patterns = None,
    exclude: Patterns = None,
    progress: Progress | None = None,
    rules: str | Sequence[str] = (),
    ignore_unmatched: bool = False,
    device: str | torch.device = "cpu",
    workers: int | None = None,
    max_shard_size: int | str | None = None,
    resume: bool = False,
    write_config: bool = False,
    dry_run: bool = False,
    **options: Any,
) -> QuantizeReport:
    """Quantize the 2-D weights of a safetensors checkpoint.

    Memory is bounded by 256 MB, or by the largest layer if that takes more. Everything
    that is not quantized is copied byte for byte, and metadata is kept.

    Args:
        src: a safetensors file, an index file, or a list of shards.
        dst: the file to write; replaced only when the new one is whole. A link is not
            replaced, but the file it leads to.
        scheme: a registered name, or a scheme.
        block_size: the scheme's block size; None takes the dialect's default.
        dialect: how to spell the quantized layers; None takes the scheme's first, or
            its own where that has no words for the blocks asked for.
        loras: files to merge first, such as ``"style.safetensors:0.8"`` or (path,
            strength); a single one needs no list. They are merged in float32 into all
            tensors they change.
        include: fnmatch patterns on layer names; None is those of the model's
            architecture, or every layer with a 2-D floating weight. Weights of more
            dimensions are quantized only if a pattern given here names them.
        exclude: fnmatch patterns on layer names to leave dense; None is those of the
            architecture, ``()`` none. In both lists ``"default"`` stands for the
            architecture's patterns.
        progress: called after each layer.
        rules: in order, the first that matches a layer counts: ``"PATTERN=128x128"``
            gives a block size, ``"PATTERN=skip"`` leaves dense, ``"PATTERN=bf16"``,
            ``f16`` or ``f32`` leaves dense in that dtype. A pattern that matches a
            module matches the layers in it.
        ignore_unmatched: whether LoRAs of layers that the checkpoint lacks are left
            out; else they are refused.
        device: where to compute, such as ``"cuda"``.
        workers: number of threads; None is one for each core. ``scheme.quantize`` is
            called from several at once, and the result is the same.
        max_shard_size: bytes, or text such as ``"5GB"``: write shards of no more, and
            ``dst`` with ``.index.json`` as their index.
        resume: go on where a run with the same source, options and ``dst`` and with
            ``resume`` was cut off, and if this one is, leave what is done to the next.
        write_config: write ``config.json`` beside ``dst``, with the
            ``quantization_config`` that readers of some dialects expect.
        dry_run: only say what would be done.
        **options: further options of ``scheme.quantize``.

    Returns:
        Which layers were quantized, which not and why, and the sizes.

    Raises:
        CheckpointError: if the source is quantized already, or is a LoRA and
            ``include`` is None; if nothing is left to quantize, a rule or a pattern of
            ``include`` is in vain, a LoRA does not fit, the dialect cannot spell a
            layer, or writing fails.
        NonFiniteError: if a weight holds inf or NaN.
        HijackError: of other kinds, naming the file or the layer.
    """
    chosen, header = default_registry().get(scheme), read_header(src)
    wanted = parse_loras(loras)
    size = max_shard_size if max_shard_size is None else parse_size(max_shard_size)
    place = destination(dst, sharded=size is not None)
    refuse_place(place, Path(dst), src, header, [path for path, _ in wanted])
    _refuse_source(header, include)
    if block_size is not None:
        options["block_size"] = block_size
    choice = choose(header, include, exclude, rules)
    merged = Loras.open(wanted, header, ignore_unmatched)
    plan = _plan(chosen, dialect, choice, options, merged)
    how = Way(_device(device), count_workers(workers), progress)
    config = _config(plan, Path(dst)) if write_config else None
    report = _report(plan, place, size, _notes(plan, write_config), not dry_run)
    if not dry_run:
        _write(plan, Path(dst), size, how, wanted, resume=resume)
        if config is not None:
            write_config_beside(Path(dst), header.config, config)
    return report


def _plan(
    scheme: Scheme,
    dialect: str | None,
    choice: Choice,
    options: Mapping[str, Any],
    loras: Loras,
) -> QuantizePlan:
    """In the dialect asked for; in no one's, in the first of those that can."""
    first = scheme.written(dialect)
    try:
        return QuantizePlan(scheme, first, choice, options, loras)
    except CheckpointError:
        if dialect is not None or first is scheme.native:
            raise
    return QuantizePlan(scheme, scheme.native, choice, options, loras)


def _write(
    plan: QuantizePlan,
    dst: Path,
    size: int | None,
    how: Way,
    loras: Sequence[tuple[Path, float]],
    *,
    resume: bool,
) -> None:
    watch = Watch(plan.header, [path for path, _ in loras])
    job = fingerprint(plan, how.device, loras, watch) if resume else None
    with open_writer(dst, plan.tensors, plan.metadata, None, size, job) as writer:
        run(plan, writer, how)
        watch.check()


def _report(
    plan: QuantizePlan,
    place: Destination,
    size: int | None,
    notes: tuple[str, ...],
    written: bool,
) -> QuantizeReport:
    layouts = lay_out_files(plan.tensors, plan.metadata, None, size)
    sizes = [layout.size for layout in layouts]
    kinds = Counter(block_text(made.block_size) for made in plan.spelled.values())
    known = plan.choice.architecture
    return QuantizeReport(
        tuple(plan.options),
        plan.choice.skipped,
        plan.bytes_before,
        plan.bytes_after,
        dict(kinds.most_common()),
        tuple(key for key in plan.header.tensors if plan.loras.touches(key)),
        plan.loras.unmatched,
        plan.dialect.name,
        "" if known is None else known.name,
        dict(zip(place.names(len(sizes)), sizes, strict=True)),
        written,
        tuple(plan.refitted),
        notes,
    )


def _notes(plan: QuantizePlan, write_config: bool) -> tuple[str, ...]:
    return (
        *replaced_notes(plan.choice),
        *refit_notes(plan.dialect, plan.refitted, len(plan.options)),
        *mark_notes(plan.marks, plan.dialect.name, write_config),
    )


# -- what is refused -------------------------------------------------------------------


def _refuse_source(header: Header, include: Patterns) -> None:
    """Refuse what is no dense checkpoint."""
    if include is None and _is_lora(header):
        raise CheckpointError(
            f"{header.source}: is a LoRA; expected a checkpoint; merge it into one "
            "with loras (--lora), or name its layers with include (--include)"
        )
    found = identify(header)
    claimed = [*found.layers, *found.ambiguous, *found.foreign, *found.unknown]
    if claimed or found.orphans:
        first = claimed[0] if claimed else found.orphans[0]
        raise CheckpointError(
            f"{header.source}: is quantized already ({first}); expected dense weights; "
            "quantize the original, or see `hijack identify`"
        )


def _is_lora(header: Header) -> bool:
    """Whether parts of LoRAs are all the layers a file has."""
    parts = [key for key in header.tensors if key.endswith(_LORA_PARTS)]
    layers = (join(layer, "weight") for layer in header.layers())
    matrices = {key for key in layers if len(header.tensors[key].shape) > 1}
    return bool(parts) and matrices <= set(parts)


def _device(device: str | torch.device) -> torch.device:
    """A device that can be computed on."""
    try:
        found = torch.device(device)
        torch.ones(1, device=found).item()  # what is on no real device has no data
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"device: {device!r} cannot be used; {reason}; expected one such as cpu or "
            "cuda"
        ) from error
    return found


def _config(plan: QuantizePlan, dst: Path) -> Mapping[str, object]:
    return config_of(plan.marks, plan.dialect.name, plan.header, dst)
