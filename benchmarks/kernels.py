"""The kernels there are, by name, and weights to try them on.

They are called directly, so that each is measured whatever the table would choose and
whatever the environment says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hijack.kernels import Kernel
from schemes._kernels.block_scaled import BlockScaled
from schemes._kernels.table import TABLE
from schemes._kernels.tables import E2M1, table_on
from schemes._nf4.tensors import TABLES


def kernels(device: str) -> dict[str, Kernel]:
    """Name to kernel of all that multiply on a type of device unasked."""
    return {
        kernel.name: kernel
        for kernel in TABLE.kernels
        if device in kernel.devices
        and kernel.linear is not None
        and not kernel.on_request
    }


# -- weights ---------------------------------------------------------------------------


def block_scaled(layer: Any) -> BlockScaled:
    """A layer's weight as kernels take it.

    Args:
        layer: of `blockwise_fp8`, `int8` without rotation, `nvfp4` without padding, or
            `nf4` whose runs do not cross rows.
    """
    weight = layer.weight
    operand: BlockScaled = weight.scheme.block_scaled(weight.qdata, weight.params)
    return operand


#: Kind to the dtype of its codes and scales, and its block size.
KINDS: dict[str, tuple[torch.dtype, torch.dtype, tuple[int, int]]] = {
    "e4m3 1x64 bf16": (torch.float8_e4m3fn, torch.bfloat16, (1, 64)),
    "e4m3 128x128 f32": (torch.float8_e4m3fn, torch.float32, (128, 128)),
    "e5m2 1x64 f16": (torch.float8_e5m2, torch.float16, (1, 64)),
    "e4m3 1x32 e8m0": (torch.float8_e4m3fn, torch.float8_e8m0fnu, (1, 32)),
    "int8 row f32": (torch.int8, torch.float32, (1, 1 << 30)),
    "nvfp4 1x16 e4m3": (torch.uint8, torch.float8_e4m3fn, (1, 16)),
    "nf4 1x64 f32": (torch.uint8, torch.float32, (1, 64)),
}


def random_weight(kind: str, n: int, k: int, device: str, seed: int = 0) -> BlockScaled:
    """A weight (N, K) that has every finite code, and scales of usual size.

    Args:
        kind: of `KINDS`.
        n: rows.
        k: columns, even.
        device: where it is.
        seed: of the codes and scales.
    """
    dtype, scale_dtype, (rows, cols) = KINDS[kind]
    generator = torch.Generator().manual_seed(seed)
    rows, cols = min(rows, n), min(cols, k)
    grid = (-(-n // rows), -(-k // cols))
    width = k // 2 if dtype == torch.uint8 else k
    codes = torch.randint(0, 256, (n, width), generator=generator).to(torch.uint8)
    if dtype.is_floating_point:
        last = 0x7E if dtype == torch.float8_e4m3fn else 0x7B
        codes = torch.where((codes & 0x7F) > last, codes & 0x80, codes)
    scale = torch.rand(grid, generator=generator).add(0.5) / 64
    table = factor = None
    if kind.startswith("nvfp4"):
        table = table_on(E2M1, torch.device(device))
        factor = torch.tensor(0.013, device=device)
        scale = scale * 64 * 100
    elif kind.startswith("nf4"):
        table = table_on(TABLES["nf4"], torch.device(device))
    if scale_dtype == torch.float8_e8m0fnu:
        scale = torch.randint(118, 124, grid, generator=generator).to(torch.uint8)
        scale = scale.view(scale_dtype)
    else:
        scale = scale.to(scale_dtype)
    size = (rows, cols)
    return BlockScaled(
        codes.view(dtype).to(device),
        scale.to(device),
        size,
        table,
        kind.startswith("nf4"),
        factor,
    )


def plain_decode(weight: BlockScaled, dtype: torch.dtype) -> Tensor:
    """The weight (N, K) by the formula of `BlockScaled`, written plainly."""
    n, k = weight.shape
    codes = weight.codes
    if weight.table is None:
        numbers = codes.float()
    else:
        pairs = [codes & 15, codes >> 4]
        both = torch.stack(pairs[::-1] if weight.high_first else pairs, -1)
        numbers = weight.table[both.flatten(1).long()]
    scale = weight.scale.float()
    if weight.factor is not None:
        scale = scale * weight.factor
    rows, cols = weight.size
    scale = scale.repeat_interleave(rows, 0)[:n].repeat_interleave(cols, 1)[:, :k]
    return (numbers * scale).to(dtype)
