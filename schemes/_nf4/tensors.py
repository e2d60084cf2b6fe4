"""The tensors of an NF4 or FP4 weight, and what they tell of it."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hijack.errors import CheckpointError, DTypeError, ShapeError

#: The numbers of each table, by code; FP4's are in twelfths.
TABLES = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
        *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ),
    "fp4": tuple(
        sign * twelfths / 12
        for sign in (1.0, -1.0)
        for twelfths in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0)
    ),
}
#: Elements that may share a scale; where several fit, the first is meant.
BLOCK_SIZES = (64, 32, 128, 256, 512, 1024, 2048, 4096)
#: Scales that share a scale of their own.
NESTED = 256
#: What bitsandbytes decodes to.
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def shape_of(
    params: Mapping[str, Tensor], where: str = "weight"
) -> tuple[str, tuple[int, ...]]:
    """The table and the shape of the weight.

    Raises:
        CheckpointError: if nothing or two tensors say it.
    """
    found = [name for name in TABLES if f"{name}_shape" in params]
    if len(found) != 1:
        raise CheckpointError(
            f"{where}: has {len(found)} of nf4_shape and fp4_shape beside it, expected "
            "one; get the file again"
        )
    return found[0], tuple(params[f"{found[0]}_shape"].shape[:-1])


def block_size_of(params: Mapping[str, Tensor], where: str = "weight") -> int:
    """How many elements share a scale; where one has all, it may be any that large.

    Raises:
        ShapeError: if the scales do not cover the weight.
    """
    _, shape = shape_of(params, where)
    numel, count = math.prod(shape), len(params["absmax"])
    for size in BLOCK_SIZES:
        if -(-numel // size) == count:
            return size
    raise ShapeError(
        f"{where}: absmax has {count} scales for {numel} elements, expected one for "
        "each run of 32 to 4096; get the file again"
    )


def check(qdata: Tensor, params: Mapping[str, Tensor], where: str) -> None:
    """Refuse tensors that are not those of one weight."""
    name, shape = shape_of(params, where)
    if "absmax" not in params:
        raise CheckpointError(f"{where}: absmax is missing beside the weight")
    absmax, numel = params["absmax"], math.prod(shape)
    nested = "nested_absmax" in params
    runs = -(-absmax.numel() // NESTED)
    expected = {
        "weight": (qdata, torch.uint8, (-(-numel // 2), 1)),
        "absmax": (absmax, torch.uint8 if nested else torch.float32, (absmax.numel(),)),
        f"{name}_shape": (params[f"{name}_shape"], None, (*shape, 0)),
    }
    sizes = {"nested_absmax": (runs,), "nested_quant_map": (256,), "nested_offset": ()}
    for key, size in sizes.items() if nested else ():
        if key not in params:
            raise CheckpointError(f"{where}: {key} is missing beside the weight")
        expected[key] = (params[key], torch.float32, size)
    for key, (tensor, dtype, size) in expected.items():
        if dtype not in (None, tensor.dtype):
            raise DTypeError(f"{where}: {key} is {tensor.dtype}, expected {dtype}")
        if tuple(tensor.shape) != tuple(size):
            raise ShapeError(
                f"{where}: {key} has the shape {tuple(tensor.shape)}, expected "
                f"{tuple(size)} for a weight of {shape}; get the file again"
            )
    block_size_of(params, where)
