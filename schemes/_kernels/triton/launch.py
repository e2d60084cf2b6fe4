"""Start a kernel on the device of its tensors."""

from __future__ import annotations

import functools
from typing import Any

import torch

#: AMD's architectures with matrix units that Triton uses, by the start of their names.
_AMD_WITH_MATRIX_UNITS = ("gfx908", "gfx90a", "gfx94", "gfx95", "gfx11", "gfx12")
#: Processors of a device that does not say: of a large one.
_PROCESSORS = 128


def launch(
    kernel: Any, programs: int, device: torch.device, *arguments: Any, **options: Any
) -> None:
    """Start some programs of a kernel; it does not wait for them.

    Args:
        kernel: a function under ``triton.jit``.
        programs: how many; none are started for 0.
        device: where the tensors are. Triton itself takes the current device.
        arguments: of the kernel, in its order.
        options: its constants, and Triton's ``num_warps`` and the like.
    """
    if not programs:
        return
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(programs,)](*arguments, **options)
    else:
        kernel[(programs,)](*arguments, **options)


@functools.lru_cache(maxsize=64)
def processors(device: torch.device) -> int:
    """How many multiprocessors a device has."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return _PROCESSORS


@functools.lru_cache(maxsize=64)
def has_matrix_units(device: torch.device) -> bool:
    """Whether Triton multiplies matrices of 16-bit numbers in matrix units there.

    On Turing (sm 75) it does not, though the GPU has them.
    """
    if device.type != "cuda":
        return True
    if torch.version.hip is not None:
        name = torch.cuda.get_device_properties(device).gcnArchName
        return name.startswith(_AMD_WITH_MATRIX_UNITS)
    return torch.cuda.get_device_capability(device) >= (8, 0)
