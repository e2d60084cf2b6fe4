"""Which kernels there are for a `BlockScaled` weight, the preferred ones first."""

from __future__ import annotations

import torch
from torch import Tensor

from hijack.kernels import Kernel, KernelTable
from schemes._kernels import cpu, inductor, int_mm, scaled_mm, torch_eager, triton
from schemes._kernels.block_scaled import BlockScaled

#: Devices other than the CPU that torch has operations for.
_ELSEWHERE = ("cuda", "xpu", "mps", "npu", "hpu", "mtia")


def _cpu_refuses(weight: BlockScaled, dtype: torch.dtype) -> str | None:
    """Why not the compiled kernels for CPUs; they take NaN of E4M3 for 480."""
    why = cpu.refuses(weight, dtype)
    if why is not None:
        return why
    e4m3 = torch.float8_e4m3fn
    if weight.codes.dtype == e4m3 and not torch_eager.is_finite(weight.codes):
        return "a code is NaN"
    if weight.scale.dtype.itemsize == 1 and not torch_eager.is_finite(weight.scale):
        return "a scale is NaN"
    return None


def _cpu_quantize(matrix: Tensor, weight: BlockScaled, candidates: int) -> bool:
    """Quantize to FP8 or int8 in one pass over the data."""
    is_int8 = weight.codes.dtype == torch.int8
    quantize = cpu.quantize_int8 if is_int8 else cpu.quantize_fp8
    return quantize(matrix, weight.size, weight.codes, weight.scale, candidates)


def _triton_quantize(
    matrix: Tensor, weight: BlockScaled, candidates: int
) -> bool | None:
    """Quantize to FP8 in one launch; not where scales are searched."""
    if candidates or weight.codes.dtype == torch.int8:
        return None
    from schemes._kernels.triton.quantize import quantize

    damaged = torch.zeros((), dtype=torch.int32, device=matrix.device)
    quantize(matrix, weight.size, weight.codes, weight.scale, damaged)
    return not damaged.item()  # who quantizes waits for it


TABLE = KernelTable(
    Kernel("int_mm", ("cpu", "cuda"), int_mm.refuses, int_mm.linear, opt_in=True),
    Kernel(
        scaled_mm.NAME,
        ("cpu", "cuda"),
        scaled_mm.refuses,
        scaled_mm.linear,
        opt_in=True,
    ),
    Kernel("cpu", ("cpu",), _cpu_refuses, cpu.linear, cpu.decode),
    Kernel("cpu_quantize", ("cpu",), cpu.refuses, quantize=_cpu_quantize),
    Kernel("triton", ("cuda", "xpu"), triton.refuses, triton.linear, triton.decode),
    Kernel(
        "triton_quantize", ("cuda", "xpu"), triton.refuses, quantize=_triton_quantize
    ),
    Kernel(
        "torch_eager",
        ("cpu",),
        torch_eager.refuses,
        torch_eager.linear,
        torch_eager.decode,
    ),
    Kernel(  # compiling takes seconds, and a compiler
        "inductor",
        ("cpu",),
        inductor.refuses,
        inductor.linear,
        inductor.decode,
        on_request=True,
    ),
    Kernel(
        "inductor",
        ("cuda", "xpu"),
        inductor.refuses,
        inductor.linear,
        inductor.decode,
    ),
    Kernel(
        "torch_eager",
        _ELSEWHERE,
        torch_eager.refuses_elsewhere,
        torch_eager.linear_elsewhere,
        torch_eager.decode_elsewhere,
    ),
)
