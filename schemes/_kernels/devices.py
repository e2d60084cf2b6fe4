"""What a device can do that torch does not say: its generation."""

from __future__ import annotations

import functools

import torch

from hijack.kernels import constant


@constant
def capability(device: torch.device) -> tuple[int, int]:
    """CUDA's compute capability, such as (8, 9); (0, 0) for what is not NVIDIA's."""
    return _capability(device)


@constant
def amd_architecture(device: torch.device) -> str:
    """AMD's name of the generation, such as ``gfx950``; "" for what is not AMD's."""
    return _amd_architecture(device)


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    if not _is_there(device) or torch.version.hip is not None:
        return (0, 0)
    return torch.cuda.get_device_capability(device)


@functools.cache
def _amd_architecture(device: torch.device) -> str:
    if not _is_there(device) or torch.version.hip is None:
        return ""
    name: str = torch.cuda.get_device_properties(device).gcnArchName
    return name.partition(":")[0]


def _is_there(device: torch.device) -> bool:
    """Whether it is a GPU that exists; a fake tensor's may not."""
    return device.type == "cuda" and torch.cuda.is_available()
