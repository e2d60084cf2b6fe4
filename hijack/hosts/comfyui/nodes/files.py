"""Nodes for files: write a quantized one, and say what a file is."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from hijack.checkpoint.convert import convert_file
from hijack.checkpoint.quantize import quantize_file
from hijack.errors import HijackError
from hijack.formats import matching
from hijack.formats.identification import identify
from hijack.hosts.comfyui import saving
from hijack.hosts.comfyui.nodes.models import file_state, lora_states
from hijack.hosts.comfyui.nodes.options import (
    ALIASES,
    AUTO,
    BLOCK_SIZE,
    DETAILS,
    LORAS,
    PATTERNS,
    RULES,
    SCHEME,
    device_of,
    find_loras,
    lines_of,
    logged,
    make_config,
    progress_bar,
    scheme_names,
)
from hijack.hosts.comfyui.nodes.spec import Input, Node, Output, Result
from hijack.hosts.diagnostics import diagnose
from hijack.options import Option, parse_options
from hijack.registry import current_registry
from hijack.safetensors_io.reader import read_header

#: Folders of ComfyUI's that hold checkpoints.
FOLDERS = ("diffusion_models", "checkpoints", "text_encoders", "vae", "loras")
#: Of those, the ones with other names below its output folder.
OUTPUT_NAMES = {"text_encoders": "clip"}
#: The choice of no other scheme than that of each layer.
KEEP = "keep"
#: Layers named in the text of *Convert File*.
SHOWN = 10


def dialects() -> list[str]:
    """Every dialect a registered scheme can be written in."""
    schemes = current_registry().schemes().values()
    known = {dialect for scheme in schemes for dialect in matching.dialects_of(scheme)}
    return [AUTO, *sorted({dialect.name for dialect in known if dialect.writes})]


def save_quantized(
    model: Any,
    filename_prefix: str,
    dialect: str,
    prompt: Any = None,
    extra_pnginfo: Any = None,
) -> Result:
    """Run *Save Quantized Model*."""
    path = _new_file(filename_prefix)
    metadata = _workflow(prompt, extra_pnginfo)
    chosen = None if dialect == AUTO else dialect
    count = saving.save_model(model, path, chosen, metadata, progress_bar())
    return Result((str(path),), f"{count} quantized layers, {_written(path)}")


def _new_file(filename_prefix: str) -> Path:
    """A file of ComfyUI's output folder that is not there yet."""
    folder_paths = sys.modules["folder_paths"]
    folder, name, counter, *_ = folder_paths.get_save_image_path(
        filename_prefix, folder_paths.get_output_directory()
    )
    return Path(folder) / f"{name}_{counter:05}_.safetensors"


def _written(path: Path) -> str:
    """Size and place of a file, for the page."""
    output = Path(sys.modules["folder_paths"].get_output_directory())
    size = path.stat().st_size / 1e6
    return f"{size:,.1f} MB\n{os.path.relpath(path, output.parent)}"


def quantize_to_file(
    file: str,
    scheme: str,
    block_size: str,
    dialect: str,
    filename_prefix: str = "",
    include: str = "",
    exclude: str = "",
    rules: str = "",
    loras: str = "",
    ignore_unmatched: bool = False,
    device: str = "cpu",
    **details: Any,
) -> Result:
    """Run *Quantize File*."""
    config = make_config(scheme, block_size, **details)
    path = _new_file(filename_prefix.strip() or _beside(file, scheme))
    report = quantize_file(
        full_path(file),
        path,
        config.scheme,
        dialect=None if dialect == AUTO else dialect,
        loras=find_loras(loras),
        include=include.split() or None,
        exclude=exclude.split() or None,
        rules=lines_of(rules),
        ignore_unmatched=ignore_unmatched,
        device=device_of(device),
        progress=progress_bar(),
        **dict(config.options),
    )
    model = report.model_text("include names others")
    text = logged(file, [model, str(report), *report.notes])
    return Result((str(path),), f"{text}\n{_written(path)}")


def _beside(file: str, word: str) -> str:
    """The prefix of a file that ComfyUI lists where it lists another."""
    folder, _, name = file.partition("/")
    return f"{OUTPUT_NAMES.get(folder, folder)}/{Path(name).stem}_{word}"


def convert_to_file(
    file: str,
    scheme: str,
    dialect: str,
    options: str = "",
    filename_prefix: str = "",
    include: str = "",
    exclude: str = "",
    assume: str = "",
    allow_loss: bool = False,
    drop_input_scales: bool = False,
) -> Result:
    """Run *Convert File*."""
    given = lines_of(options)
    declared: tuple[Option, ...] = ()
    if scheme != KEEP:
        declared = current_registry().get(scheme).declared_options()
    word = scheme if scheme != KEEP else dialect
    path = _new_file(filename_prefix.strip() or _beside(file, word))
    report = convert_file(
        full_path(file),
        path,
        None if dialect == AUTO else dialect,
        requantize=allow_loss if scheme == KEEP else scheme,
        include=include.split() or None,
        exclude=exclude.split() or None,
        drop_input_scales=drop_input_scales,
        assume=lines_of(assume),
        progress=progress_bar(),
        **parse_options(declared, given, scheme),
    )
    worst = sorted(report.requantized.items(), key=lambda item: item[1].sqnr)[:SHOWN]
    lines = [f"{layer}: SQNR {error.sqnr:.1f} dB" for layer, error in worst]
    lines += [f"kept: {layer}: {why}" for layer, why in report.kept.items()][:SHOWN]
    text = logged(file, [str(report), *lines, *report.notes])
    return Result((str(path),), f"{text}\n{_written(path)}")


def _quantized(file: str, loras: str = "") -> str:
    """What *Quantize File* depends on: the files."""
    return "\n".join([file_state(full_path(file)), *lora_states(loras)])


def _workflow(prompt: Any, extra_pnginfo: Any) -> dict[str, str]:
    """What ComfyUI's own save nodes write of the workflow."""
    arguments = getattr(sys.modules.get("comfy.cli_args"), "args", None)
    if getattr(arguments, "disable_metadata", False):
        return {}
    metadata = {}
    if prompt is not None:  # without what ComfyUI notes in it while it runs
        nodes = {
            name: {key: value for key, value in node.items() if key != "is_changed"}
            for name, node in prompt.items()
        }
        metadata["prompt"] = json.dumps(nodes)
    for key, value in (extra_pnginfo or {}).items():
        metadata[key] = json.dumps(value)
    return metadata


def inspect_checkpoint(file: str) -> Result:
    """Run *Inspect Checkpoint*."""
    path = full_path(file)
    found = identify(read_header(path))
    # The first line names the file by its path on the server, which says less here.
    rest = found.as_table().partition("\n")[2]
    size = os.path.getsize(path) / 1e6
    text = f"{file}: {found.tensors} tensors, {size:,.1f} MB\n\n{rest}"
    return Result((text,), text)


def _inspected(file: str) -> str:
    """What a node that reads one file depends on: the file of that name."""
    return file_state(full_path(file))


def _always() -> float:
    """Never equal to what it was."""
    return float("nan")


def show_status() -> Result:
    """Run *hijack Status*."""
    text = str(diagnose())
    return Result((text,), text)


def model_files() -> list[str]:
    """The files of `checkpoint_files` that are no LoRAs."""
    return [file for file in checkpoint_files() if not file.startswith("loras/")]


def checkpoint_files() -> list[str]:
    """Safetensors files in ComfyUI's model folders, as ``folder/name``."""
    folder_paths = sys.modules["folder_paths"]
    return [
        f"{folder}/{name}"
        for folder in FOLDERS
        if folder in folder_paths.folder_names_and_paths
        for name in folder_paths.get_filename_list(folder)
        if name.endswith((".safetensors", ".sft"))
    ]


def full_path(file: str) -> str:
    """The path of one of `checkpoint_files`."""
    folder, _, name = file.partition("/")
    path: str | None = sys.modules["folder_paths"].get_full_path(folder, name)
    if path is None:
        raise HijackError(
            f"{file}: is not in ComfyUI's model folders; expected a file of the list; "
            "reload the page if it was added just now"
        )
    return path


DIALECT = Input(
    "dialect",
    "COMBO",
    "How the file spells codes and scales: as the program that is to read it does. "
    "auto keeps the spelling the model came in, or takes the scheme's first.",
    options=dialects,
    default=AUTO,
)

NODES = (
    Node(
        "HijackSaveQuantized",
        "Save Quantized Model",
        "Writes a quantized diffusion model, LoRAs included, in the spelling of the "
        "program that is to read it. The file appears only when it is complete.",
        ("save fp8", "export", "quantized checkpoint", "musubi", "save model"),
        (
            Input("model", "MODEL", "A model with quantized layers."),
            Input(
                "filename_prefix",
                "STRING",
                "Folder and name below the output folder; a number is added.",
                default="diffusion_models/quantized",
            ),
            DIALECT,
        ),
        (Output("STRING", "path", "The file that was written."),),
        save_quantized,
        terminal=True,
    ),
    Node(
        "HijackQuantizeFile",
        "Quantize File",
        "Quantizes a file into a new file, a few layers at a time: a diffusion model, "
        "a text encoder or a whole checkpoint, whether or not it would fit in memory. "
        "It is the command hijack quantize as a node.",
        (*ALIASES, "text encoder", "checkpoint", "convert", "clip", "t5"),
        (
            Input(
                "file",
                "COMBO",
                "A full-precision safetensors file in one of ComfyUI's model folders.",
                options=model_files,
            ),
            SCHEME,
            BLOCK_SIZE,
            DIALECT,
            Input(
                "filename_prefix",
                "STRING",
                "Folder and name below the output folder; a number is added. Empty: "
                "such that ComfyUI lists the new file where it lists the old one.",
                default="",
                optional=True,
            ),
            *PATTERNS,
            RULES,
            LORAS,
            Input(
                "ignore_unmatched",
                "BOOLEAN",
                "Lose what LoRAs change in layers that the file lacks, instead of "
                "refusing such LoRAs.",
                default=False,
                optional=True,
                advanced=True,
            ),
            *DETAILS,
        ),
        (Output("STRING", "path", "The file that was written."),),
        quantize_to_file,
        terminal=True,
        fingerprint=_quantized,
    ),
    Node(
        "HijackConvertFile",
        "Convert File",
        "Writes a quantized file in the spelling of another program without loss, or "
        "in another weight format, a layer at a time. It is the command hijack convert "
        "as a node.",
        (*ALIASES, "convert", "requantize", "dialect", "int8", "checkpoint"),
        (
            Input(
                "file",
                "COMBO",
                "A quantized safetensors file in one of ComfyUI's model folders.",
                options=model_files,
            ),
            Input(
                "scheme",
                "COMBO",
                "The weight format of the new file. keep leaves every layer in its own "
                "and costs nothing; of any other, layers in other formats and plain "
                "FP8 casts are quantized to it, and the loss is shown.",
                options=lambda: (KEEP, *scheme_names()),
                default=KEEP,
            ),
            DIALECT,
            Input(
                "options",
                "STRING",
                "Options of the scheme, NAME=VALUE, one a line. The node Options of "
                "the scheme says what they are and makes such a text.",
                default="",
                multiline=True,
                optional=True,
            ),
            Input(
                "filename_prefix",
                "STRING",
                "Folder and name below the output folder; a number is added. Empty: "
                "such that ComfyUI lists the new file where it lists the old one.",
                default="",
                optional=True,
            ),
            Input(
                "include",
                "STRING",
                "Layers that become layers of the scheme, as patterns such as "
                "*.mlp.*, one a line. Empty: all.",
                default="",
                multiline=True,
                optional=True,
            ),
            Input(
                "exclude",
                "STRING",
                "Layers that stay in their own format, as patterns, one a line.",
                default="",
                multiline=True,
                optional=True,
            ),
            Input(
                "assume",
                "STRING",
                "How to read a file that does not tell: a scheme, a dialect or a block "
                "size, one a line.",
                default="",
                multiline=True,
                optional=True,
                advanced=True,
            ),
            Input(
                "allow_loss",
                "BOOLEAN",
                "Where the dialect cannot store a layer as it is: quantize it again, "
                "instead of refusing.",
                default=False,
                optional=True,
                advanced=True,
            ),
            Input(
                "drop_input_scales",
                "BOOLEAN",
                "Leave out scales of inputs that the new file cannot store, instead of "
                "refusing.",
                default=False,
                optional=True,
                advanced=True,
            ),
        ),
        (Output("STRING", "path", "The file that was written."),),
        convert_to_file,
        terminal=True,
        fingerprint=_inspected,
    ),
    Node(
        "HijackInspectCheckpoint",
        "Inspect Checkpoint",
        "Says what a file is from its header alone: which layers are quantized, in "
        "which format, spelled by which program, and what does not fit together.",
        ("identify", "fp8", "checkpoint info", "metadata", "what is this file"),
        (
            Input(
                "file",
                "COMBO",
                "A safetensors file in one of ComfyUI's model folders.",
                options=checkpoint_files,
            ),
        ),
        (Output("STRING", "report", "The report as text."),),
        inspect_checkpoint,
        terminal=True,
        fingerprint=_inspected,
    ),
    Node(
        "HijackStatus",
        "hijack Status",
        "Says what to put into a bug report: versions, devices, settings, plugins, "
        "what is patched and by whom else, and how each model in memory is quantized.",
        ("doctor", "hijack doctor", "patched", "conflict"),
        (),
        (Output("STRING", "status", "The status as text."),),
        show_status,
        terminal=True,
        fingerprint=_always,
    ),
)
