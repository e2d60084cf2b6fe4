"""Whether operations run at once, on memory: what compiled kernels need."""

from __future__ import annotations

import torch
from torch import Tensor, nn

_PLAIN = (Tensor, nn.Parameter)


def are_plain(*tensors: Tensor) -> bool:
    """Whether operations on these run eagerly, with no mode or transform active."""
    return not torch.compiler.is_compiling() and (
        all(type(tensor) in _PLAIN for tensor in tensors)
        and not torch._C._len_torch_dispatch_stack()
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._is_tracing()
    )
