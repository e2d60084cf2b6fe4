"""Dtypes that a dense weight may have."""

from __future__ import annotations

import torch

#: Dtypes of dense weights: what models compute in. Anything else is quantized data.
DENSE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """What autocast computes products in on a device, or None where it is off."""
    kind = device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        return None
    return torch.get_autocast_dtype(kind)
