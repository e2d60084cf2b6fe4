"""The dialects of FP8 with scales: one for each family of programs."""

from __future__ import annotations

from schemes._fp8.dialects.comfyui import ComfyQuantDialect, ScaledFP8Dialect
from schemes._fp8.dialects.compressed_tensors import CompressedTensorsDialect
from schemes._fp8.dialects.deepseek import DeepSeekDialect
from schemes._fp8.dialects.musubi import MusubiDialect
from schemes._fp8.dialects.native import NativeFP8Dialect
from schemes._fp8.dialects.read_only import (
    KijaiDialect,
    PlainMXDialect,
    QuantizerDialect,
    QuantoDialect,
    RowwiseDialect,
    SDNQDialect,
)
from schemes._fp8.dialects.torchao import TorchaoDialect

#: All but the native one; the first is written by default. Where two claim a layer with
#: equal certainty, they decode it alike, and the first one's name is shown.
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
    QuantizerDialect(),
    SDNQDialect(),
)
NATIVE = NativeFP8Dialect()
