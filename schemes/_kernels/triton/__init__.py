"""Kernels for GPUs in Triton, which has to be installed: torch for CUDA brings it.

Triton is imported when a function is first used, so that this module is always there.

- `decode`: any weight into dense memory, one launch, one byte read and two written for
  each weight of eight bits.
- `linear`: at most 4 inputs by `gemv`, at most 64 by `gemm`, which read codes and
  nothing else; more by one launch of `decode` and torch's product.
- `rotate`, `inputs`: what products with quantized inputs need, one launch each.
- `quantize`: a weight to FP8 in blocks.

Numbers are decoded by integer arithmetic. So nothing here needs a GPU that knows FP8:
kernels build for NVIDIA's from Turing (sm 75) on, and for AMD's.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from schemes._kernels.block_scaled import CODES, DENSE, SCALES, BlockScaled

_DEVICES = ("cuda", "xpu")
#: The oldest NVIDIA GPUs that Triton builds for.
_OLDEST = (7, 5)


def decode(weight: BlockScaled, out: Tensor, rows: slice | None = None) -> None:
    """Write rows of the dense weight, each element rounded once to nearest even.

    Args:
        weight: (N, K), which `refuses` does not refuse.
        out: (n, K) float32, bfloat16 or float16, on the same device.
        rows: the n rows, without a step; None for all.
    """
    from schemes._kernels.triton._decode import decode

    decode(weight, out, rows)


def linear(x: Tensor, weight: BlockScaled, bias: Tensor | None) -> Tensor:
    """``F.linear`` with a weight that is decoded for it.

    Args:
        x: (M, K) float32, bfloat16 or float16.
        weight: (N, K), on the same device, which `refuses` does not refuse.
        bias: (N,) of ``x``'s dtype, or None.

    Returns:
        (M, N) of ``x``'s dtype.
    """
    from schemes._kernels.triton._linear import linear

    return linear(x, weight, bias)


def refuses(weight: BlockScaled, dtype: torch.dtype) -> str | None:
    """Why these kernels cannot take a weight with inputs of a dtype; None if they can.

    Args:
        weight: (N, K), on any device.
        dtype: of the inputs.
    """
    device = weight.codes.device
    if device.type not in _DEVICES:
        return f"the weight is on {device.type}; Triton's kernels run on GPUs"
    if dtype not in DENSE:
        return f"inputs are {dtype}; expected float32, bfloat16 or float16"
    return _refuses_weight(weight) or _refuses_machine(device)


def _refuses_weight(weight: BlockScaled) -> str | None:
    codes, scale = weight.codes.dtype, weight.scale.dtype
    if codes not in CODES and (weight.table is None or codes != torch.uint8):
        return f"codes are {codes}; expected FP8, int8 or two codes of four bits a byte"
    if scale not in SCALES:
        return f"scales are {scale}; expected {', '.join(map(str, SCALES))}"
    if weight.table is not None and weight.size[1] % 2 and weight.scale.shape[1] > 1:
        return f"blocks are {weight.size[1]} columns wide; a byte has two codes"
    return None


@functools.lru_cache(maxsize=64)
def _refuses_machine(device: torch.device) -> str | None:
    try:
        import triton  # noqa: F401
    except ImportError as error:
        return f"triton cannot be imported ({error}); install triton"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < _OLDEST:
            return f"the GPU is sm {capability[0]}{capability[1]}; Triton needs sm 75"
    return None
