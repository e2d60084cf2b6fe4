"""Quantize a checkpoint file, a few layers at a time."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from hijack.checkpoint.config_json import config_of, write_config_beside
from hijack.checkpoint.copying import SourceSnapshot, check_output
from hijack.checkpoint.notes import (
    adjusted_block_notes,
    declined_notes,
    format_notes,
    replaced_notes,
    unstored_notes,
)
from hijack.checkpoint.processes import run_in_processes
from hijack.checkpoint.quantize_plan import QuantizePlan
from hijack.checkpoint.quantize_run import RunOptions, count_workers, run
from hijack.errors import CheckpointError
from hijack.formats import matching
from hijack.formats.identification import identify
from hijack.lora.delta import is_factor
from hijack.lora.files import Loras, Spec, parse_loras
from hijack.progress import Progress
from hijack.registry import Registry, current_registry
from hijack.safetensors_io.header import Header, TensorInfo
from hijack.safetensors_io.layout import plan_files
from hijack.safetensors_io.reader import Paths, read_header
from hijack.safetensors_io.shards import Destination, destination, parse_size
from hijack.safetensors_io.writer import open_writer
from hijack.scheme import Scheme
from hijack.selection import Choice, Patterns, choose, model_text
from hijack.text import block_text


@dataclasses.dataclass(frozen=True)
class QuantizeReport:
    """What `quantize_file` did, or would do.

    Attributes:
        layers: names of the layers that were quantized, in file order.
        skipped: name of every other layer with a 2-D weight or more, and why.
        bytes_before: size of all tensors of the source.
        bytes_after: size of all tensors of the result.
        blocks: block size as text, such as ``1x64``, to the number of such layers.
        merged: keys of the tensors that LoRAs were merged into.
        unmatched: names in LoRA files of layers that the checkpoint lacks.
        dialect: in which the quantized layers are stored.
        architecture: name of the model's family, "" if it is unknown.
        files: name to size of each file written, but for the index of shards.
        written: False after a dry run.
        reblocked: layers with other blocks than requested, because the dialect cannot
            store those.
        notes: human-readable notes on the result.
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

    def model_text(self, hint: str) -> str:
        """Which model it is, in one line.

        Args:
            hint: how to see or change which layers stay dense on a guess.
        """
        return model_text(self.architecture, self.skipped, hint)

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
    scheme: str | Scheme | None = None,
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
    processes: int = 1,
    max_shard_size: int | str | None = None,
    write_config: bool = False,
    dry_run: bool = False,
    overwrite: bool = False,
    registry: Registry | None = None,
    **options: Any,
) -> QuantizeReport:
    """Quantize the 2-D weights of a safetensors checkpoint.

    Large layers are quantized some rows at a time, if the scheme and the dialect need
    no more of them at once. Memory is bounded by 256 MB, or by the largest layer that
    is quantized whole if that needs more. Everything else is copied byte for byte, and
    metadata is kept.

    Args:
        src: a safetensors file, an index file, or a list of shards.
        dst: the file to write; it appears when it is complete. If it is a link, the
            file it points to is written.
        scheme: a registered name, or a scheme; None is the default one.
        block_size: the scheme's block size; None is the dialect's default.
        dialect: in which to store the quantized layers; None is the scheme's first, or
            its native one if that cannot store the requested blocks.
        loras: files to merge first, such as ``"style.safetensors:0.8"`` or (path,
            strength); a single one needs no list. They are merged in float32 into all
            tensors they target.
        include: fnmatch patterns on layer names; None is those of the model's family,
            or every layer with a 2-D floating weight. Weights of more dimensions are
            quantized only if a pattern here names them. Weights of modules that are
            not targets of the scheme, judging by names and shapes, never are.
        exclude: fnmatch patterns on layer names to leave dense; None is those of the
            family, ``()`` none. In both lists ``"default"`` stands for the family's
            patterns.
        progress: called after each layer.
        rules: the first that matches a layer applies: ``"PATTERN=128x128"`` sets the
            block size, ``"PATTERN=skip"`` leaves it dense, ``"PATTERN=bf16"``, ``f16``
            or ``f32`` leaves it dense in that dtype. A pattern that matches a module
            matches all layers in it.
        ignore_unmatched: whether LoRAs of layers that the checkpoint lacks are left
            out; by default they are refused.
        device: where to compute, such as ``"cuda"``.
        workers: number of threads of each process; None is one for each core.
            ``scheme.quantize`` is called from several at once, and the result is the
            same.
        processes: to share the work, which pays with more cores than eight. A script
            that asks for several calls this under ``if __name__ == "__main__":``.
        max_shard_size: bytes, or text such as ``"5GB"``: write shards of at most this
            size, and ``dst`` with ``.index.json`` as their index.
        write_config: write ``config.json`` beside ``dst``, with the
            ``quantization_config`` that readers of some dialects expect.
        dry_run: only report what would be done.
        overwrite: whether files that exist are replaced; the sources never are.
        registry: whose schemes and plugins are asked; None for the one in force.
        **options: further options of ``scheme.quantize``.

    Returns:
        Which layers were quantized, which not and why, and the sizes.

    Raises:
        CheckpointError: if the source is quantized already, or is a LoRA and
            ``include`` is None; if nothing is left to quantize, a rule or a pattern
            matches no layer, a LoRA does not fit, the dialect cannot store a
            layer, the destination exists, or writing fails.
        NonFiniteError: if a weight holds inf or NaN.
        HijackError: of other kinds, naming the file or the layer.
    """
    registry = current_registry(registry)
    chosen = registry.default_scheme() if scheme is None else registry.get(scheme)
    header = read_header(src)
    wanted = parse_loras(loras)
    size = max_shard_size if max_shard_size is None else parse_size(max_shard_size)
    output = destination(dst, sharded=size is not None)
    lora_files = [path for path, _ in wanted]
    check_output(output, Path(dst), src, header, lora_files)
    _refuse_source(header, include, registry)
    if block_size is not None:
        options["block_size"] = block_size
    chosen.check_options(options)

    def declines(shape: tuple[int, ...], own: Mapping[str, Any]) -> str | None:
        return chosen.declines(shape, **{**options, **own})

    choice = choose(header, chosen.targets, include, exclude, rules, declines)
    merged = Loras.open(wanted, header, ignore_unmatched)
    plan = _plan(chosen, dialect, choice, options, merged)
    run_options = RunOptions(
        _device(device), count_workers(workers, processes), progress
    )
    config = None
    if write_config:
        replace = overwrite or dry_run
        config = config_of(
            plan.format_metadata, plan.dialect.name, header, Path(dst), replace
        )
    report = _report(plan, output, size, _notes(plan, write_config), not dry_run)
    if not dry_run:
        _write(plan, Path(dst), size, run_options, lora_files, overwrite, processes)
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
    """A plan in the requested dialect; without one, in the first that works."""
    first = matching.written_dialect(scheme, dialect)
    try:
        return QuantizePlan(scheme, first, choice, options, loras)
    except CheckpointError:
        if dialect is not None or first is matching.native_of(scheme):
            raise
    return QuantizePlan(scheme, matching.native_of(scheme), choice, options, loras)


def _write(
    plan: QuantizePlan,
    dst: Path,
    size: int | None,
    run_options: RunOptions,
    loras: Sequence[Path],
    overwrite: bool,
    processes: int,
) -> None:
    snapshot = SourceSnapshot(plan.header, loras)
    with open_writer(
        dst, plan.tensors, plan.metadata, None, size, overwrite=overwrite
    ) as writer:
        if processes == 1:
            run(plan, writer, run_options)
        else:
            run_in_processes(plan, writer, run_options, processes)
        snapshot.check_unchanged()


def _report(
    plan: QuantizePlan,
    output: Destination,
    size: int | None,
    notes: tuple[str, ...],
    written: bool,
) -> QuantizeReport:
    layouts = plan_files(plan.tensors, plan.metadata, None, size)
    sizes = [layout.size for layout in layouts]
    kinds = Counter(block_text(layer.block_size) for layer in plan.encoded.values())
    family = plan.choice.family
    return QuantizeReport(
        tuple(plan.options),
        plan.choice.skipped,
        plan.bytes_before,
        plan.bytes_after,
        dict(kinds.most_common()),
        tuple(key for key in plan.header.tensors if plan.loras.touches(key)),
        plan.loras.unmatched,
        plan.dialect.name,
        "" if family is None else family.name,
        dict(zip(output.names(len(sizes)), sizes, strict=True)),
        written,
        tuple(plan.adjusted_blocks),
        notes,
    )


def _notes(plan: QuantizePlan, write_config: bool) -> tuple[str, ...]:
    return (
        *replaced_notes(plan.choice),
        *declined_notes(plan.choice),
        *adjusted_block_notes(plan.dialect, plan.adjusted_blocks, len(plan.options)),
        *unstored_notes(plan.scheme, plan.dialect, plan.requested),
        *format_notes(plan.format_metadata, plan.dialect.name, write_config),
    )


# -- what is refused -------------------------------------------------------------------


def _refuse_source(header: Header, include: Patterns, registry: Registry) -> None:
    """Refuse a source that is not a dense checkpoint."""
    if include is None and is_lora(header.tensors):
        raise CheckpointError(
            f"{header.source}: is a LoRA; expected a checkpoint; merge it into one "
            "with loras (--lora), or name its layers with include (--include)"
        )
    result = identify(header, registry)
    claimed = [
        *result.layers,
        *result.ambiguous,
        *result.unsupported,
        *result.unknown,
    ]
    if claimed or result.unconsumed:
        first = claimed[0] if claimed else result.unconsumed[0]
        raise CheckpointError(
            f"{header.source}: is quantized already ({first}); expected dense weights; "
            "quantize the original, or see `hijack identify`"
        )


def is_lora(tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether all layers of a file are parts of LoRAs.

    Args:
        tensors: key to dtype and shape of each tensor of the file.
    """
    parts = {key for key in tensors if is_factor(key)}
    layers = [key for key in tensors if key.rpartition(".")[2] == "weight"]
    matrices = {key for key in layers if len(tensors[key].shape) > 1}
    return bool(parts) and matrices <= parts


def _device(device: str | torch.device) -> torch.device:
    """A device that works."""
    try:
        usable = torch.device(device)
        torch.ones(1, device=usable).item()  # fails on meta, too
    except Exception as error:
        reason = str(error).splitlines()[0]
        raise CheckpointError(
            f"device: {device!r} cannot be used; {reason}; expected one such as cpu or "
            "cuda"
        ) from error
    return usable
