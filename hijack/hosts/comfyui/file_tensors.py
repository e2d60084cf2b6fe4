"""A quantized weight as the tensors of a file, in the dialect it came in."""

from __future__ import annotations

from torch import Tensor

from hijack.formats import matching
from hijack.formats.dialect import Dialect
from hijack.quantized import QuantizedTensor


def dialect_of(weight: QuantizedTensor) -> Dialect:
    """The dialect a weight came in, or the one its scheme writes by default."""
    return matching.dialect_of(weight.scheme, weight.config.dialect)


def file_tensors(weight: QuantizedTensor) -> dict[str, Tensor]:
    """Suffix of a layer's key to tensor, without additions.

    Raises:
        HijackError: if the dialect cannot spell it.
    """
    return dialect_of(weight).encode(weight.qdata, weight.params, weight.options)
