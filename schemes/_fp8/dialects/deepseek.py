"""Files of DeepSeek, and of transformers, which writes the same format."""

from __future__ import annotations

import bisect
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from hijack.claim import Certainty
from hijack.errors import CheckpointError
from hijack.formats.comfyui_markers import is_marked
from hijack.formats.dialect import EncodedLayer, FormatMetadata
from hijack.safetensors_io.header import Header, TensorInfo
from schemes._blocks import Pair, grid_shape, matrix_shape, parse_block_size, transposed
from schemes._fp8.blocks import FP8_DTYPES, POWER_DTYPES
from schemes._fp8.dialects.base import Declared, QuantizedWeightInfo, is_power
from schemes._fp8.dialects.configured import (
    BLOCK,
    ConfiguredDialect,
    block_pair,
    common_block_size,
    dense_layers,
    with_defaults,
)

Layers = Mapping[str, tuple[tuple[int, ...], Pair | None]]

_NOTE = (
    "most readers of deepseek only support blocks of 128x128; for them quantize the "
    "original with block_size 128x128 (--block-size 128x128)"
)


class DeepSeekDialect(ConfiguredDialect):
    """What DeepSeek and transformers' FineGrainedFP8 write: ``X.weight_scale_inv``.

    In spite of its name the scale multiplies. All layers of a file have the block size
    that the config declares; blocks at the edges may be short.
    """

    name = "deepseek"
    writes = True
    scales = ("weight_scale_inv", "scale", "qscale_weight", "weight_scale")
    inputs = ("activation_scale", "input_scale", "qscale_act")

    def declared(self, header: Header, info: QuantizedWeightInfo) -> Declared | None:
        """The config's block size; the whole weight if it declares null."""
        config = header.quantization
        method = config.get("quant_method")
        if method not in (None, "fp8", "deepseek_fp8", "mxfp8"):
            return None
        if "weight_scale" in info.keys and (
            method not in ("fp8", "deepseek_fp8")
            or config.get("weight_block_size") is None
            or is_marked(header, info.layer)
        ):
            return None  # many formats use this name
        if "weight_block_size" not in config:
            size = info.shape if info.grid == (1, 1) else None
            if "scale" not in info.keys:
                return Declared(Certainty.UNIQUE, size=size)
            if transposed(info.shape, info.grid):
                return None  # SDNQ's rows, transposed
            # SDNQ's rows and single scales look the same, and may be rotated
            sdnq = info.grid in ((info.shape[0], 1), (1, 1))
            return Declared(Certainty.GUESS if sdnq else Certainty.UNIQUE, size=size)
        size = info.shape
        value = config["weight_block_size"]
        block = block_pair(value)
        if value is not None and block is None:
            problem = f"weight_block_size is {value!r}, expected two positive integers"
            return Declared(Certainty.UNIQUE, mismatch=problem)
        if block is not None:
            size = parse_block_size(block, info.shape)
        return Declared(
            Certainty.MARKED, f"config says weight_block_size {value}", size
        )

    # -- writing -----------------------------------------------------------------------

    def encode(
        self, qdata: Tensor, params: Mapping[str, Tensor], options: Mapping[str, object]
    ) -> dict[str, Tensor]:
        """The grid unchanged, or one number for the whole weight if requested.

        Raises:
            CheckpointError: if the weight is not 2-D or its dtype is not E4M3.
        """
        if qdata.ndim != 2 or qdata.dtype != FP8_DTYPES[0]:
            raise self.cannot(qdata, params, "a 2-D weight of float8_e4m3fn")
        scale = params["weight_scale"]
        if options.get("block_size") == "tensor":
            scale = scale.view(())
        return {"weight": qdata, "weight_scale_inv": _exponents(scale)}

    def fit_options(
        self, shape: tuple[int, ...], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """DeepSeek's blocks and float32 scales by default."""
        return with_defaults(options)

    def settle(self, layers: Layers) -> dict[str, Any]:
        """The largest blocks that divide those of all layers, or "tensor"."""
        sizes = [(matrix_shape(shape), size) for shape, size in layers.values()]
        if all(size in (None, shape) for shape, size in sizes):
            return {"block_size": "tensor"}
        return {"block_size": common_block_size(sizes, math.gcd)}

    def blocks(
        self, shape: tuple[int, ...], block_size: Pair, options: Mapping[str, Any]
    ) -> Sequence[Pair]:
        """The file's block size."""
        size = options.get("block_size", block_size)
        return [parse_block_size(size, matrix_shape(shape))]

    def finish(
        self, layers: Mapping[str, EncodedLayer], others: Mapping[str, TensorInfo]
    ) -> FormatMetadata:
        """The config of transformers' FineGrainedFP8Config.

        Raises:
            CheckpointError: if the layers have blocks that no one size gives.
        """
        if not layers:
            return FormatMetadata()
        scales = {la: e.tensors["weight_scale_inv"] for la, e in layers.items()}
        kinds = {_kind(scale): layer for layer, scale in scales.items()}
        if len(kinds) > 1:
            listed = ", ".join(f"{layer} has {kind}" for kind, layer in kinds.items())
            raise CheckpointError(
                f"dialect deepseek: {listed}; expected scales of one kind in a file; "
                "quantize all layers with the same options"
            )
        scale = next(iter(scales.values()))
        size = self._one_size(layers) if scale.shape else None
        metadata = self.format_metadata(
            {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": None if size is None else list(size),
                **({"scale_fmt": "ue8m0"} if scale.torch_dtype in POWER_DTYPES else {}),
                "modules_to_not_convert": _patterns(dense_layers(others), layers),
            }
        )
        if size == BLOCK:
            return metadata
        return dataclasses.replace(metadata, notes=(_NOTE,))

    def _one_size(self, layers: Mapping[str, EncodedLayer]) -> Pair:
        """The block size that gives every layer its blocks."""
        sizes = {
            name: (matrix_shape(layer.shape), layer.block_size)
            for name, layer in layers.items()
        }
        shared = common_block_size(sizes.values(), max)
        for layer, (shape, size) in sizes.items():
            if size and grid_shape(shape, size) != grid_shape(shape, shared):
                raise CheckpointError(
                    f"{layer}: has blocks of {size[0]}x{size[1]}, others need "
                    f"{shared[0]}x{shared[1]}; dialect deepseek has one block_size for "
                    "a file; quantize all layers with the same"
                )
        return shared


def _patterns(dense: Iterable[str], quantized: Iterable[str]) -> list[str]:
    """Names as transformers matches them, as regular expressions where necessary.

    It matches a name with everything below it and with every longer name that ends in
    it: a dense ``proj_out`` would also exclude ``blocks.0.proj_out``.
    """
    starts = sorted(quantized)
    ends = sorted(name[::-1] for name in starts)
    return [
        f"^{re.escape(name)}$"
        if _begins(starts, f"{name}.") or _begins(ends, name[::-1])
        else name
        for name in dense
    ]


def _begins(names: Sequence[str], start: str) -> bool:
    """Whether one of some sorted names has a prefix."""
    at = bisect.bisect_left(names, start)
    return at < len(names) and names[at].startswith(start)


def _kind(scale: TensorInfo) -> str:
    """The kind of a scale, which all scales of a file must share."""
    numbers = "exponents" if scale.torch_dtype in POWER_DTYPES else "floats"
    return f"{numbers} for blocks" if scale.shape else f"{numbers} without blocks"


def _exponents(scale: Tensor) -> Tensor:
    """Exponents as float8_e8m0fnu, as transformers expects them."""
    return scale.view(POWER_DTYPES[0]) if is_power(scale) else scale
