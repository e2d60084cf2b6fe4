"""Dtypes that a dense weight may have."""

from __future__ import annotations

import torch

#: Dtypes of dense weights: what models compute in. Anything else is quantized data.
DENSE_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
