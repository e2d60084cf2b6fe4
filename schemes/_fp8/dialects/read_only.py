"""Formats that hijack can read but not write."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from torch import Tensor

import schemes._fp8.dialects.mx as mx
from hijack.claim import Certainty, Claim
from hijack.formats.comfyui_markers import is_marked, layer_marker
from hijack.safetensors_io.header import Header
from schemes._blocks import Pair
from schemes._fp8.blocks import POWER_DTYPES
from schemes._fp8.dialects.base import (
    WEIGHT_QUANTIZER,
    Declared,
    FP8Dialect,
    QuantizedWeightInfo,
)
from schemes._sdnq import EXTRA, asks_for


class KijaiDialect(FP8Dialect):
    """One scale for the whole weight as ``weight_scale``, and no marker.

    Kijai's nodes accept it beside ``scale_weight``; tools for vLLM write it.
    """

    name = "kijai"

    def declared(self, header: Header, info: QuantizedWeightInfo) -> Declared | None:
        """Match single scales of layers without a marker."""
        marked = layer_marker(header, info.layer) is not None
        if marked or info.scale.shape not in ((), (1,)):
            return None
        return Declared(Certainty.FITS, size=info.shape)


class RowwiseDialect(FP8Dialect):
    """Black Forest Labs' fp8r: one scale per row, and no marker.

    FBGEMM's has one dimension more, a config, and an upper bound of input scales.
    """

    name = "fp8r"
    inputs = ("input_scale", "input_scale_ub")

    def declared(self, header: Header, info: QuantizedWeightInfo) -> Declared | None:
        """Match one scale per row of layers without a marker."""
        if is_marked(header, info.layer):
            return None
        (n, k), scale = info.shape, info.scale.shape
        if header.quantization.get("quant_method") == "fbgemm_fp8":
            declared = Declared(Certainty.MARKED, "config says fbgemm_fp8", (1, k))
            return declared if info.grid == (n, 1) else None
        return Declared(Certainty.FITS, size=(1, k)) if scale == (n,) != (1,) else None


class QuantoDialect(FP8Dialect):
    """optimum-quanto's qfloat8: ``X.weight._data`` and ``X.weight._scale``."""

    name = "quanto"
    weight = "weight._data"
    scales = ("weight._scale",)
    inputs = ("input_scale", "output_scale")

    def grid(self, scale: tuple[int, ...], shape: Pair) -> Pair | None:
        """One scale per row, with as many dimensions as the weight."""
        rows = (shape[0], *[1] * (len(scale) - 1))
        return (shape[0], 1) if scale == rows else super().grid(scale, shape)

    def declared(self, header: Header, info: QuantizedWeightInfo) -> Declared | None:
        """Match every layer that has the two tensors."""
        return Declared(Certainty.UNIQUE)


class QuantizerDialect(FP8Dialect):
    """ModelOpt's and Quark's scales, where ``X.weight_quantizer`` still has them.

    ModelOpt calls it ``_scale`` there, ``weight_scale`` in its exports, and
    ``weights_scaling_factor`` in those for TensorRT-LLM; Quark calls it ``scale``. For
    blocks ModelOpt's has four dimensions, (N/R, 1, K/C, 1). All multiply.
    """

    name = "modelopt"
    scales = (
        f"{WEIGHT_QUANTIZER}._scale",
        f"{WEIGHT_QUANTIZER}.scale",
        "weights_scaling_factor",
        "weight_scale",
    )
    ranks = (1, 2, 4)
    inputs = (
        "input_quantizer._scale",
        "input_quantizer.scale",
        "activation_scaling_factor",
        "input_scale",
    )
    ignored_keys = (f"{WEIGHT_QUANTIZER}._amax", "input_quantizer._amax")

    def grid(self, scale: tuple[int, ...], shape: Pair) -> Pair | None:
        """As in the base class; of four dimensions two are 1."""
        if len(scale) == 4:
            rows, cols = scale[0], scale[2]
            return (rows, cols) if scale[1] == scale[3] == 1 else None
        return super().grid(scale, shape)

    def declared(self, header: Header, info: QuantizedWeightInfo) -> Declared | None:
        """Match names and shapes that only these programs use."""
        blocks = len(info.scale.shape) == 4
        if "weight_scale" in info.keys and not blocks:
            return None
        size = (min(128, info.shape[0]), min(128, info.shape[1])) if blocks else None
        if header.quantization.get("quant_algo") == "FP8_PB_WO":
            evidence = "config says FP8_PB_WO"
            return Declared(Certainty.MARKED, evidence, size)
        return Declared(Certainty.UNIQUE, size=size)


class PlainMXDialect(FP8Dialect):
    """MXFP8 with scales in plain order, and no marker.

    If 128 divides the number of rows and 4 that of columns of the scale, ComfyUI's
    tiles have the same shape. Then both are guesses, unless a config names a method
    without tiles.
    """

    name = "mxfp8"
    scale_dtypes = POWER_DTYPES

    def grid(self, scale: tuple[int, ...], shape: Pair) -> Pair | None:
        """The grid of plain order, or None."""
        return mx.plain_shape(shape) if scale == mx.plain_shape(shape) else None

    def declared(self, header: Header, info: QuantizedWeightInfo) -> Declared | None:
        """Match MXFP8 without a marker or config of another method."""
        method = header.quantization.get("quant_method")
        if not mx.is_mx(info) or is_marked(header, info.layer):
            return None
        if method not in (None, "mxfp8", "modelopt"):
            return None
        tiles = method is None and mx.is_tiled(info)
        certainty = Certainty.GUESS if tiles else Certainty.UNIQUE
        return Declared(certainty, "scales in plain order", (1, mx.COLS))


class SDNQDialect(FP8Dialect):
    """SDNQ's FP8: ``X.weight``, ``X.scale``, and a config with its own options.

    Groups of columns are a dimension of the weight, (N, K/C, C). A Linear that SDNQ
    will multiply in FP8 is stored transposed, (K, N), with its scale. A weight that is
    rotated or has a low-rank part is not supported. Without a config that shows it is
    not rotated, every interpretation is a guess.
    """

    name = "sdnq"
    scales = ("scale",)
    ranks = (2, 3)
    inputs = ()
    exact = True

    def weight_info(self, header: Header, layer: str) -> QuantizedWeightInfo | None:
        """The layer's quantized data and scale; shapes as if not transposed."""
        info = super().weight_info(header, layer)
        if info is None:
            return None
        weight, scale = info.weight.shape, info.scale.shape
        if len(scale) == 3:
            return info if (*weight[:2], 1) == scale else None
        if len(weight) != 2:
            return None
        if scale == (1, weight[1]) != (1, 1):
            shape, grid = info.shape[::-1], info.grid[::-1]
            return dataclasses.replace(info, shape=shape, grid=grid)
        return info if scale in ((weight[0], 1), (1, 1)) else None

    def declared(self, header: Header, info: QuantizedWeightInfo) -> Declared | None:
        """Match layers whose weight is quantized data times a scale."""
        method = header.quantization.get("quant_method")
        extra = EXTRA & header.parts[info.layer].keys()
        if extra or method not in (None, "sdnq"):
            return None
        if method is None:  # it may be rotated, or another program's
            return Declared(Certainty.GUESS)
        if asks_for(header.quantization, "use_hadamard"):
            return None
        single = info.grid == (1, 1) and info.shape[0] > 1
        if single and asks_for(header.quantization, "use_quantized_matmul"):
            return None  # it may be transposed or not
        return Declared(Certainty.MARKED, "config says sdnq")

    def decode(
        self, claim: Claim, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Flatten groups of columns, or undo the transposition."""
        weight, scale = tensors["weight"], tensors["scale"]
        if weight.ndim == 3:
            weight = weight.flatten(1)
        elif scale.shape[0] < scale.shape[1]:  # (1, N)
            weight, scale = weight.t().contiguous(), scale.t()
        return super().decode(claim, {**tensors, "weight": weight, "scale": scale})
