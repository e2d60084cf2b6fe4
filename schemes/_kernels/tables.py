"""The sixteen numbers that codes of four bits stand for, where they are looked up."""

from __future__ import annotations

import torch
from torch import Tensor

#: E2M1 by code: a sign, two bits of exponent, one of mantissa.
E2M1 = (
    *(0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    *(-0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0),
)
#: Whole numbers with a sign, by code.
INT4 = tuple(float(code if code < 8 else code - 16) for code in range(16))

_tables: dict[tuple[tuple[float, ...], torch.device], Tensor] = {}


def table_on(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    """A table on a device, which is copied there once.

    Args:
        numbers: by code.
        device: where.

    Returns:
        (len(numbers),) float32.
    """
    if torch.compiler.is_compiling():
        return _made(numbers, device)
    table = _tables.get((numbers, device))
    if table is None:
        with torch.inference_mode(False):
            table = _made(numbers, device)
        if type(table) is Tensor and not torch._C._len_torch_dispatch_stack():
            _tables[numbers, device] = table
    return table


def _made(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(numbers, dtype=torch.float32, device="cpu").to(device)


def is_e2m1(table: Tensor) -> bool:
    """Whether this is the tensor that `table_on` returns for E2M1.

    What a table on a GPU holds cannot be asked without waiting for the GPU; so it is
    known by its identity, and another one with the same numbers is not.
    """
    return table is _tables.get((E2M1, table.device))
