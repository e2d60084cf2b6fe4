"""A file of two tensors, for tests of how files are written."""

import torch

from hijack.safetensors_io.header import TensorInfo

PLAN = {"a": TensorInfo("F32", (2,)), "b": TensorInfo("F32", (1,))}
TENSORS = {"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([3.0])}


def same(a, b):
    """Equal dtype, shape and bits."""
    return a.dtype == b.dtype and torch.equal(
        a.contiguous().reshape(-1).view(torch.uint8),
        b.contiguous().reshape(-1).view(torch.uint8),
    )


def names(folder):
    """What lies in a folder."""
    return sorted(path.name for path in folder.iterdir())
