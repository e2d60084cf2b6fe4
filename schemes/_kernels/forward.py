"""The forward of a Linear, and the decode, of any weight that is a `BlockScaled`."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from hijack.modules import linear_forward as default_linear
from schemes._kernels import plain
from schemes._kernels.block_scaled import DENSE, BlockScaled
from schemes._kernels.eager import are_plain
from schemes._kernels.table import TABLE
from schemes._rotation import rotate, rotate_inputs

if TYPE_CHECKING:
    from hijack.quantized import QuantizedTensor
    from schemes._kernels.scheme import BlockScaledScheme

#: Elements that are rotated at a time: on the CPU what fits the cache, elsewhere enough
#: to hide the launch of operations.
CHUNK, DEVICE_CHUNK = 1 << 20, 1 << 24


def decode(weight: BlockScaled, dtype: torch.dtype) -> Tensor:
    """The dense weight, by the first kernel that takes it.

    Args:
        weight: (N, K).
        dtype: floating dtype of the result.

    Returns:
        (N, K) of ``dtype``, in new memory.
    """
    codes, scale = weight.codes, weight.scale
    if codes.is_meta:  # operations there cost torch seconds of imports
        return torch.empty(weight.shape, dtype=dtype, device="meta")
    eager = are_plain(codes, scale) and codes.numel() > 0
    if weight.rotation:
        return _decode_rotated(weight, dtype, eager)
    if eager and dtype in DENSE:
        out = torch.empty(weight.shape, dtype=dtype, device=codes.device)
        with torch.no_grad():
            if TABLE.decode(weight, out):
                return out
    return plain.decode(weight, dtype)


def _decode_rotated(weight: BlockScaled, dtype: torch.dtype, eager: bool) -> Tensor:
    """The dense weight, rotated in float32 and rounded once."""
    (n, k), height = weight.shape, weight.size[0]
    weight, rotation = weight._replace(rotation=0), weight.rotation
    if not eager:
        return rotate(decode(weight, torch.float32), rotation).to(dtype)
    dense = torch.empty((n, k), dtype=dtype, device=weight.device)
    most = CHUNK if weight.device.type == "cpu" else DEVICE_CHUNK
    step = max(most // (height * k), 1) * height
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        dense[rows] = rotate(decode(weight.part(rows), torch.float32), rotation)
    return dense


def linear_forward(
    module: nn.Module,
    input: Tensor,
    weight: QuantizedTensor,
    bias: Tensor | None,
) -> Tensor:
    """``F.linear`` by the first kernel that takes the weight.

    Compiled code, transforms, and inputs that want a gradient get the default forward,
    which torch can look into; so can it into kernels that quantize the input, for
    layers that ask for them. Those have no gradient, so that the input must want none.

    Args:
        module: not used; the weight may be anywhere.
        input: (..., K).
        weight: (N, K) of a `BlockScaledScheme`.
        bias: (N,), or None.

    Returns:
        (..., N) of ``input``'s dtype, or of autocast's.
    """
    scheme: BlockScaledScheme = weight.scheme  # type: ignore[assignment]
    asks = scheme.quantizes_inputs(weight) and _has_no_gradient(input)
    eager = can_multiply(input, weight, None if asks else bias)
    if eager or asks:
        x, device = input, input.device.type
        # as F.linear would, which leaves float64 alone
        if torch.is_autocast_enabled(device) and input.dtype in DENSE:
            x = input.to(torch.get_autocast_dtype(device))
        if x.dtype in DENSE and _fits(x, weight, bias):
            output = _linear(x, weight, bias, asks=asks, eager=eager)
            if output is not None:
                return output
    return default_linear(module, input, weight, bias)


def _linear(
    input: Tensor,
    weight: QuantizedTensor,
    bias: Tensor | None,
    *,
    asks: bool,
    eager: bool,
) -> Tensor | None:
    """The product, if there is a kernel for it.

    Args:
        input: (..., K).
        weight: (N, K).
        bias: (N,), or None.
        asks: whether kernels that quantize the input are asked for.
        eager: whether others are possible.
    """
    scheme: BlockScaledScheme = weight.scheme  # type: ignore[assignment]
    operand = scheme.block_scaled(weight.qdata, weight.params)
    if operand is None or operand.shape != tuple(weight.shape):
        return None
    if bias is not None and bias.dtype != input.dtype:
        bias = bias.to(input.dtype)
    n, k = weight.shape
    x, rotation = input.reshape(-1, k), operand.rotation
    late: Tensor | None = None  # a bias whose gradient no kernel knows
    if bias is not None and bias.requires_grad and torch.is_grad_enabled():
        bias, late = None, bias
    with torch.no_grad():
        if rotation:  # cheaper than to turn the weight back
            x, operand = _rotated(x, rotation), operand._replace(rotation=0)
        if eager:
            output = TABLE.linear(x, operand, bias, opt_in=asks)
        else:
            output = TABLE.traced(x, operand, bias)
    if output is None:
        return None
    if late is not None:
        output = output + late
    return output.view(*input.shape[:-1], n)


def _rotated(x: Tensor, rotation: int) -> Tensor:
    """Rotate inputs (M, K), by one kernel where there is one for the device."""
    if x.is_cuda and are_plain(x):
        rotate_there = _fused_rotation(x.device)
        if rotate_there is not None:
            return rotate_there(x, rotation)
    return rotate_inputs(x, rotation)


@functools.lru_cache(maxsize=64)
def _fused_rotation(device: torch.device) -> Callable[[Tensor, int], Tensor] | None:
    """The kernel that rotates on a device; None if Triton is missing, or no use."""
    try:
        from schemes._kernels.triton.launch import has_matrix_units
        from schemes._kernels.triton.rotate import rotate as fused
    except ImportError:
        return None
    return fused if has_matrix_units(device) else None


def _has_no_gradient(input: Tensor) -> bool:
    """Whether no derivative is wanted, which rounding would make zero without a word.

    Of a bias it is known.
    """
    if input.requires_grad and torch.is_grad_enabled():
        return False
    if torch.compiler.is_compiling():
        return True
    transformed: bool = torch._C._are_functorch_transforms_active()
    return not transformed and forward_ad._current_level < 0


def _fits(input: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> bool:
    """Whether there is something to multiply, of sizes that match, on one device.

    What does not match is for `F.linear` to refuse: a kernel that failed for it would
    not be used any more.
    """
    return (
        input.layout == torch.strided
        and (torch.compiler.is_compiling() or not input.is_neg())
        and (bias is None or bias.shape == weight.shape[:1])
        and input.device == weight.qdata.device
        and input.shape[-1:] == weight.shape[1:]
        and input.numel() > 0
        and weight.qdata.numel() > 0
    )


def can_multiply(input: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> bool:
    """Whether kernels may see a product: eager and without derivatives."""
    if not are_plain(input, weight.qdata):
        return False
    grad = input.requires_grad or (bias is not None and bias.requires_grad)
    return not (grad and torch.is_grad_enabled()) and forward_ad._current_level < 0
