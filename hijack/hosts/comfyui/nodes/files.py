"""Nodes for files: save a quantized model, and say what a file is."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from hijack.errors import HijackError
from hijack.formats import matching
from hijack.formats.identification import identify
from hijack.hosts.comfyui import saving
from hijack.hosts.comfyui.nodes.models import AUTO, file_state
from hijack.hosts.comfyui.nodes.spec import Input, Node, Output, Result
from hijack.hosts.diagnostics import diagnose
from hijack.registry import current_registry
from hijack.safetensors_io.reader import read_header

#: Folders of ComfyUI's that hold checkpoints.
FOLDERS = ("diffusion_models", "checkpoints", "text_encoders", "vae", "loras")


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
    folder_paths = sys.modules["folder_paths"]
    folder, name, counter, *_ = folder_paths.get_save_image_path(
        filename_prefix, folder_paths.get_output_directory()
    )
    path = Path(folder) / f"{name}_{counter:05}_.safetensors"
    metadata = _workflow(prompt, extra_pnginfo)
    chosen = None if dialect == AUTO else dialect
    count = saving.save_model(model, path, chosen, metadata)
    size = path.stat().st_size / 1e6
    shown = os.path.relpath(path, Path(folder_paths.get_output_directory()).parent)
    text = f"{count} quantized layers, {size:,.1f} MB\n{shown}"
    return Result((str(path),), text)


def _workflow(prompt: Any, extra_pnginfo: Any) -> dict[str, str]:
    """What ComfyUI's own save nodes write of the workflow."""
    arguments = getattr(sys.modules.get("comfy.cli_args"), "args", None)
    if getattr(arguments, "disable_metadata", False):
        return {}
    metadata = {} if prompt is None else {"prompt": json.dumps(prompt)}
    for key, value in (extra_pnginfo or {}).items():
        metadata[key] = json.dumps(value)
    return metadata


def inspect_checkpoint(file: str) -> Result:
    """Run *Inspect Checkpoint*."""
    path = _full_path(file)
    found = identify(read_header(path))
    # The first line names the file by its path on the server, which says less here.
    rest = found.as_table().partition("\n")[2]
    size = os.path.getsize(path) / 1e6
    text = f"{file}: {found.tensors} tensors, {size:,.1f} MB\n\n{rest}"
    return Result((text,), text)


def _inspected(file: str) -> str:
    """What *Inspect Checkpoint*'s report depends on: the file of that name."""
    return file_state(_full_path(file))


def _always() -> float:
    """Never equal to what it was."""
    return float("nan")


def show_status() -> Result:
    """Run *hijack Status*."""
    text = str(diagnose())
    return Result((text,), text)


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


def _full_path(file: str) -> str:
    folder, _, name = file.partition("/")
    path: str | None = sys.modules["folder_paths"].get_full_path(folder, name)
    if path is None:
        raise HijackError(
            f"{file}: is not in ComfyUI's model folders; expected a file of the list; "
            "reload the page if it was added just now"
        )
    return path


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
            Input(
                "dialect",
                "COMBO",
                "How the file spells codes and scales: as the program that is to read "
                "it does. auto keeps the spelling the model came in.",
                options=dialects,
                default=AUTO,
            ),
        ),
        (Output("STRING", "path", "The file that was written."),),
        save_quantized,
        terminal=True,
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
