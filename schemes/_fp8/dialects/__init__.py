"""How files spell FP8 with scales: one dialect for each family of writers."""

from __future__ import annotations

from schemes._fp8.dialects.comfyui import (
    ComfyQuantDialect,
    KijaiDialect,
    ScaledFP8Dialect,
)
from schemes._fp8.dialects.compressed_tensors import CompressedTensorsDialect
from schemes._fp8.dialects.deepseek import DeepSeekDialect
from schemes._fp8.dialects.musubi import MusubiDialect
from schemes._fp8.dialects.mx import PlainMXDialect
from schemes._fp8.dialects.others import (
    NativeFP8Dialect,
    QuantoDialect,
    RowwiseDialect,
    TorchaoDialect,
)
from schemes._fp8.dialects.sdnq import SDNQDialect

#: All but the native one; the first is written by default. Where two claim a layer on
#: equal grounds they decode it alike, and the first gives it its name.
DIALECTS = (
    MusubiDialect(),
    ScaledFP8Dialect(),
    ComfyQuantDialect(),
    KijaiDialect(),
    DeepSeekDialect(),
    CompressedTensorsDialect(),
    PlainMXDialect(),
    RowwiseDialect(),
    TorchaoDialect(),
    QuantoDialect(),
    SDNQDialect(),
)
NATIVE = NativeFP8Dialect()
