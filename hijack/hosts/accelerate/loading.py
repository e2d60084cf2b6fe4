"""accelerate's reading of checkpoints, where they or the model are quantized."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hijack.errors import CheckpointError
from hijack.formats.identification import identify
from hijack.hosts.libraries import without_disk
from hijack.loading import load
from hijack.modules import Wrapped
from hijack.quantized import QuantizedTensor
from hijack.safetensors_io.header import Header, join
from hijack.safetensors_io.reader import read_header
from hijack.text import logger

log = logger(__name__)

#: The names of whole checkpoints in folders.
_WHOLE, _PICKLED = "model.safetensors", "pytorch_model.bin"


def make_load_checkpoint_in_model(original: Callable[..., Any]) -> Callable[..., Any]:
    """The function that has `hijack.load` read what is quantized."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def load_checkpoint_in_model(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        source = _source(given["checkpoint"])
        if source is None:
            _refuse_pickled(Path(given["checkpoint"]))
        if source is None or not _is_quantized(given["model"], source):
            return original(*args, **kwargs)
        _load(source=source, **given)
        return None

    return load_checkpoint_in_model


def _source(checkpoint: Any) -> Path | None:
    """The file, or the index, that accelerate would read; None if it is pickled."""
    path = Path(checkpoint)
    if path.is_dir():
        if (path / _PICKLED).is_file():
            return None
        indices = list(path.glob("*.index.json"))
        whole = path / _WHOLE
        if not whole.is_file() and len(indices) != 1:
            return None
        path = whole if whole.is_file() else indices[0]
    readable = path.suffix in (".safetensors", ".json") and path.is_file()
    return path if readable and not path.name.endswith(".bin.index.json") else None


def _refuse_pickled(path: Path) -> None:
    """Refuse pickled files with quantized layers, which would be taken for weights.

    Raises:
        CheckpointError: naming the file.
    """
    files = sorted(path.glob("*.bin")) if path.is_dir() else [path]
    tensors: dict[str, Tensor] = {}
    for file in files:
        if file.suffix == ".bin" and file.is_file():
            tensors |= torch.load(file, map_location="meta", weights_only=True)
    header = Header.from_state_dict(
        {key: t for key, t in tensors.items() if isinstance(t, Tensor)}
    )
    found = identify(header)
    if found.claims() or found.unconsumed:
        raise CheckpointError(
            f"{path}: got pickled files with quantized layers, expected safetensors; "
            "save the tensors with safetensors.torch.save_file first"
        )


def _is_quantized(model: nn.Module, source: Path) -> bool:
    """Whether a checkpoint or a model has quantized layers."""
    if any(isinstance(module, Wrapped) for module in model.modules()):
        return True
    found = identify(read_header(source))
    if not found.claims():
        return False
    found.check()
    return True


def _load(
    model: nn.Module,
    source: Path,
    device_map: Mapping[str, Any] | None,
    offload_folder: Any,
    dtype: str | torch.dtype | None,
    strict: bool,
    keep_in_fp32_modules: Any = None,
    broadcast_from_rank0: bool = False,
    **_: Any,
) -> None:
    """Load as accelerate would: in the dtype asked for, or that of the model.

    Modules for the disk are loaded to the CPU, where they stay in the file;
    accelerate itself moves them when it dispatches the model.
    """
    if broadcast_from_rank0:
        raise CheckpointError(
            f"{source}: got broadcast_from_rank0=True for quantized layers, expected "
            "every process to read the file; pass broadcast_from_rank0=False"
        )
    index = Path(offload_folder or ".", "index.json")
    if "disk" in (device_map or {}).values() and index.is_file():
        raise CheckpointError(
            f"{index}: got weights that were offloaded before, which would take the "
            "place of these, expected an empty offload_folder; remove it first"
        )
    devices = None if device_map is None else without_disk(device_map)
    before = dict(model.named_parameters(remove_duplicate=False))
    report = load(model, source, strict=strict, device_map=devices)
    if report.unexpected:
        log.warning("hijack: %s: not in the model: %s", source, report.unexpected)
    wanted = _dtype(dtype)
    fp32 = tuple(keep_in_fp32_modules or ()) if wanted == torch.float16 else ()
    cast: dict[int, nn.Parameter] = {}  # modules go on sharing
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            if parameter is None or not parameter.is_floating_point():
                continue
            full = join(name, key)
            quantized = isinstance(parameter, QuantizedTensor)
            goal = wanted or (parameter if quantized else before[full]).dtype
            if any(f"{word}." in full or word == full for word in fp32):
                goal = torch.float32
            if parameter.dtype != goal and id(parameter) not in cast:
                changed: Any = parameter.detach().to(goal)
                cast[id(parameter)] = nn.Parameter(changed, parameter.requires_grad)
            module._parameters[key] = cast.get(id(parameter), parameter)


def _dtype(dtype: str | torch.dtype | None) -> torch.dtype | None:
    if isinstance(dtype, str):
        named: torch.dtype = getattr(torch, dtype.removeprefix("torch."))
        return named
    return dtype
