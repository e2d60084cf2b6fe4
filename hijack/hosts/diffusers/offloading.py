"""Group offloading to the disk: the host writes and reads plain tensors.

A group has a number for each of its tensors, under which the file holds it. While the
host writes or reads, the data of a quantized weight are there in its place.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor

from hijack.quantized import QuantizedTensor

Function = Callable[..., Any]


def make_with_parts(original: Function) -> Function:
    """Have a group write or read the parts of its quantized weights."""

    @functools.wraps(original)
    def with_parts(self: Any, *args: Any, **kwargs: Any) -> Any:
        weights = [t for t in self.tensor_to_key if isinstance(t, QuantizedTensor)]
        if not weights:
            return original(self, *args, **kwargs)
        with _parts_of(self):
            result = original(self, *args, **kwargs)
        for weight in weights:
            weight.data = weight.replace()  # on the device where its data are now
        return result

    return with_parts


@contextlib.contextmanager
def _parts_of(group: Any) -> Iterator[None]:
    whole = group.tensor_to_key, group.key_to_tensor
    parts: dict[Tensor, str] = {}
    for tensor, key in group.tensor_to_key.items():
        if not isinstance(tensor, QuantizedTensor):
            parts[tensor] = key
            continue
        for name, part in tensor.plain_tensors().items():
            parts[part] = f"{key}.{name}"
    group.tensor_to_key = parts
    group.key_to_tensor = {key: part for part, key in parts.items()}
    try:
        yield
    finally:
        group.tensor_to_key, group.key_to_tensor = whole
