"""Decode with code that torch's own compiler, Inductor, makes.

It serves devices that Inductor knows and no kernel here does. What it compiles reads
FP8 as integers, so that GPUs without FP8 numbers can run it too. Shapes are symbols in
the compiled code, so that one compilation serves all layers of a kind.
"""

from __future__ import annotations

import functools
import shutil
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from schemes._blocks import divides
from schemes._kernels import decoded
from schemes._kernels.block_scaled import DENSE, BlockScaled
from schemes._kernels.plain import nibbles

#: FP8 dtype to (left shift within 32 bits, mask of sign, exponent and mantissa, what
#: the exponents differ by, first byte that is not a finite number).
_LAYOUTS = {
    torch.float8_e4m3fn: (20, -0x80000000 | 0x7F << 20, 2.0**120, 0x7F),
    torch.float8_e5m2: (21, -0x80000000 | 0x7F << 21, 2.0**112, 0x7C),
}


def refuses(weight: BlockScaled, dtype: torch.dtype) -> str | None:
    """Why a weight cannot be decoded here to a dtype, or None.

    Args:
        weight: (N, K).
        dtype: of the result.
    """
    if dtype not in DENSE:
        return f"decodes to float32, bfloat16 and float16, not to {dtype}"
    if not weight.codes.numel():
        return "the weight has no elements"
    if not divides(weight.shape, weight.size):
        return "blocks at the edge are short, which Inductor has compiled wrongly"
    return _no_compiler(weight.device.type)


@functools.cache
def _no_compiler(device: str) -> str | None:
    """Why Inductor cannot compile for a type of device, as far as can be told."""
    if device == "cpu":
        compilers = (
            ("cl", "clang++") if shutil.which("cl") else ("g++", "clang++", "c++")
        )
        found = any(shutil.which(name) for name in compilers)
        return None if found else "no C++ compiler is installed"
    from torch.utils._triton import has_triton_package

    return None if has_triton_package() else "triton is not installed"


def decode(weight: BlockScaled, out: Tensor) -> None:
    """Write the dense weight.

    Args:
        weight: (N, K).
        out: (N, K) float32, bfloat16 or float16, contiguous.
    """
    codes, layout = weight.codes, _LAYOUTS.get(weight.codes.dtype)
    if layout is not None and weight.device.type != "cpu":
        # on the CPU its own cast is faster than integers that become floats
        codes = codes.view(torch.int8)
    else:
        layout = None
    scale = weight.scale
    if scale.dtype.itemsize == 1:  # no 8-bit float in the compiled code
        scale = scale.float()
    target = out.view(scale.shape[0], weight.size[0], scale.shape[1], weight.size[1])
    kind = (
        *(codes.dtype, scale.dtype, out.dtype, weight.device.type),
        *(weight.table is None, weight.factor is None),
        *(target.shape[1] == 1, target.shape[2] == 1),  # not symbols where they are 1
    )
    with torch.no_grad():
        _compiled(kind)(
            *(codes, scale, weight.table, weight.factor, target),
            *(layout, weight.high_first),
        )


def linear(x: Tensor, weight: BlockScaled, bias: Tensor | None) -> Tensor:
    """``F.linear`` with the decoded weight; shapes are those of `decoded.linear`."""
    return decoded.linear(decode, x, weight, bias)


@functools.cache
def _compiled(kind: tuple[Any, ...]) -> Callable[..., None]:
    """The compiled decode of a kind of weights.

    Each has a code object of its own: Dynamo counts compilations by these, and gives up
    after eight.
    """
    function = types.FunctionType(_decode.__code__.replace(), globals())
    compiled: Callable[..., None] = torch.compile(
        function, fullgraph=True, dynamic=True
    )
    return compiled


def _decode(
    codes: Tensor,
    scale: Tensor,
    table: Tensor | None,
    factor: Tensor | None,
    out: Tensor,
    layout: Any,
    high_first: bool,
) -> None:
    """Write (N/R, R, K/C, C) ``out``; the layout of FP8 if codes are its bytes."""
    if table is not None:
        pair = torch.stack(nibbles(codes, high_first), 2)
        numbers = table[pair.flatten(1).int()]
    elif layout is not None:
        shift, mask, power, limit = layout
        bits = (codes.int() << shift) & mask
        numbers = bits.view(torch.float32) * power
        numbers = torch.where((codes & 0x7F) < limit, numbers, torch.nan)
    else:
        numbers = codes.float()
    scale = scale.float()
    if factor is not None:
        scale = scale * factor
    out.copy_(numbers.view(out.shape) * scale[:, None, :, None])
