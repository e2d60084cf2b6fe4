"""Files for ComfyUI, and of tools that use the same markers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import schemes._fp8.dialects.mx as mx
from hijack.claim import Certainty, Claim
from hijack.formats.comfy_quant import MarkedDialect, unread_entries
from hijack.formats.comfyui_markers import (
    FULL_PRECISION,
    LAYER_MARKER,
    file_marker,
    file_markers_of,
    layer_marker,
    layer_tensor,
    pads,
    unpadded_shape,
    wrong_format,
)
from hijack.safetensors_io.header import (
    DTYPE_NAMES,
    Header,
    TensorInfo,
    join,
)
from hijack.scheme import Scheme
from schemes._blocks import (
    SCALE_DTYPES,
    Pair,
    block_size_of,
    divides,
    grid_shape,
    matrix_shape,
    parse_block_size,
    transposed,
)
from schemes._fp8.blocks import FP8_DTYPES, POWER_DTYPES
from schemes._fp8.dialects.base import (
    Declared,
    FP8Dialect,
    QuantizedWeightInfo,
    is_power,
)
from schemes._tiles import from_tiles, to_tiles

#: ``format`` of a marker to the dtype of the quantized data.
FORMAT_DTYPES = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "float8_e4m3fn_rowwise": torch.float8_e4m3fn,
    "float8_e4m3fn_blockwise": torch.float8_e4m3fn,
    "float8_e4m3fn_block3d": torch.float8_e4m3fn,
    "mxfp8": torch.float8_e4m3fn,
    "hybrid_mxfp8": torch.float8_e4m3fn,
}
_MX = ("mxfp8", "hybrid_mxfp8")
#: Entries of a marker that are read, or say nothing of the weight.
_KNOWN = ("group_size", "num_experts", "convrot", FULL_PRECISION)
#: ComfyUI pads the sides of an MXFP8 weight to multiples of this.
PAD = (32, 32)


class ScaledFP8Dialect(FP8Dialect):
    """ComfyUI's former format: a tensor ``scaled_fp8`` marks the whole file.

    With two elements it also asks that no layer be multiplied in FP8. An input scale
    of 1 stands for none.

    ComfyUI itself reads one scale per weight. Converters wrote rows and grids under
    the same marker, which ComfyUI multiplies along the wrong axis or refuses.
    """

    name = "scaled_fp8"
    scales = ("scale_weight", "weight_scale")
    ranks = (1, 2, 3)
    inputs = ("scale_input", "input_scale")
    absent_input = 1.0

    def declared(self, header: Header, info: QuantizedWeightInfo) -> Declared | None:
        """Match layers under the marker, and grids that only converters write."""
        former_name = "scale_weight" in info.keys  # the new name is used by others too
        if join(info.layer, LAYER_MARKER) in header.tensors:
            return None
        if not former_name and layer_marker(header, info.layer) is not None:
            return None
        marker = file_marker(header, info.layer)
        if marker is None:
            converted = former_name and _converted(info)
            return Declared(Certainty.UNIQUE) if converted else None
        dtype = marker.dtype if marker.dtype.startswith("F8") else "F8_E4M3"
        problem = ""
        if dtype != info.weight.dtype:
            problem = f"scaled_fp8 says {dtype}, the weight is {info.weight.dtype}"
        size = info.shape if info.grid == (1, 1) else None
        evidence = "scaled_fp8 marks the file"
        full = {FULL_PRECISION: "true"} if math.prod(marker.shape) == 2 else {}
        return Declared(Certainty.MARKED, evidence, size, problem, options=full)

    def unmark(
        self, metadata: Mapping[str, str], keys: Collection[str], layers: Iterable[str]
    ) -> tuple[dict[str, str], set[str]]:
        """Drop the marker of each model with such layers."""
        return dict(metadata), file_markers_of(keys, layers)


def _converted(info: QuantizedWeightInfo) -> bool:
    """Whether scales are convert_to_quant's: one per row or square block."""
    (n, k), (rows, cols) = info.shape, info.grid
    if len(info.scale.shape) == 1:
        return rows == n > 1
    square = n % rows == k % cols == 0 and n // rows == k // cols
    return len(info.scale.shape) == 2 and square and info.grid != (1, 1)


class ComfyQuantDialect(MarkedDialect, FP8Dialect):
    """ComfyUI's current format: each layer has a marker, or an entry in the header.

    The marker names a format, which is trusted only if the shapes match:
    convert_to_quant marks rows as blocks where its blocks do not divide, and ComfyUI
    marks everything with ``scale_weight`` as one scale of E4M3 when it loads a file.
    """

    writes = True
    stores = (FULL_PRECISION,)
    scale_dtypes = (*SCALE_DTYPES, *POWER_DTYPES)
    ranks = (1, 2, 3)
    input_written = "input_scale"
    ignored_keys = (LAYER_MARKER, "weight_scalar")

    def grid(self, scale: tuple[int, ...], shape: Pair) -> Pair | None:
        """As in the base class, or tiles, which cover (N, K/32)."""
        if scale == mx.tiled_shape(shape) and shape[1] % mx.COLS == 0:
            return mx.plain_shape(shape)
        return super().grid(scale, shape)

    def declared(self, header: Header, info: QuantizedWeightInfo) -> Declared | None:
        """What the layer's marker declares, checked against dtypes and shapes."""
        marker = layer_marker(header, info.layer)
        if marker is None:
            return self._unmarked(header, info)
        name = str(marker.get("format", ""))
        if marker.get("convrot"):
            return None  # the weight is rotated
        if name not in FORMAT_DTYPES:
            return self._wrongly_marked(header, info, marker)
        tiles = mx.is_mx(info) and mx.is_tiled(info)
        if (info.scale.torch_dtype in POWER_DTYPES) != (name in _MX) or (
            name in _MX and not tiles
        ):
            return None  # no known program writes this
        problem = ""
        if FORMAT_DTYPES[name] != info.weight.torch_dtype:
            problem = f"comfy_quant says {name}, the weight is {info.weight.dtype}"
        size = _named(name, marker, info.shape)
        experts = info.weight.shape[0] if len(info.weight.shape) == 3 else 0
        if experts and marker.get("num_experts") == experts == info.grid[0]:
            size = (1, info.shape[1])  # stacked experts, one scale each
        full = {FULL_PRECISION: "true"} if marker.get(FULL_PRECISION) else {}
        outweighed = layer_tensor(header, info.layer) or {}
        unread = unread_entries(marker, outweighed, _KNOWN)
        return Declared(
            Certainty.MARKED,
            f"comfy_quant says {name}",
            size,
            problem,
            options=full,
            unread=unread,
        )

    def _unmarked(self, header: Header, info: QuantizedWeightInfo) -> Declared | None:
        """Match tiles of exponents, which only ComfyUI's formats have.

        If plain order has the same shape, it is a guess.
        """
        if not mx.is_mx(info) or not mx.is_tiled(info):
            return None
        if header.quantization or file_marker(header, info.layer) is not None:
            return None
        certainty = Certainty.GUESS if mx.is_plain(info) else Certainty.UNIQUE
        return Declared(certainty, "scales in tiles of 128 x 4", (1, mx.COLS))

    def _wrongly_marked(
        self,
        header: Header,
        info: QuantizedWeightInfo,
        marker: Mapping[str, object],
    ) -> Declared | None:
        """Match what can only be FP8 with scales, whatever its marker says."""
        problem = wrong_format(header, info.layer, marker)
        if not problem:
            return None  # a format of another program
        if info.scale.torch_dtype in POWER_DTYPES:
            declared = self._unmarked(header, info)
        else:
            size = info.shape if info.grid == (1, 1) else None
            declared = Declared(Certainty.UNIQUE, size=size)
        if declared is None:
            return None
        return dataclasses.replace(declared, mismatch=f"{info.layer}: {problem}")

    def _sizes(
        self, info: QuantizedWeightInfo, declared: Declared
    ) -> tuple[list[Pair], bool]:
        """As in the base class; its writers have whole rows, squares and 1 x C."""
        sizes, certain = super()._sizes(info, declared)
        exact = divides(info.shape, info.grid)
        if certain or not exact or transposed(info.shape, info.grid):
            return sizes, certain
        rows, cols = sizes[-1]
        return (sizes[-1:], True) if rows in (1, cols) else (sizes, certain)

    def readings(self, scheme: Scheme, header: Header, layer: str) -> Iterator[Claim]:
        """As in the base class, with the true shape of a padded weight."""
        for claim in super().readings(scheme, header, layer):
            info = header.tensors[claim.keys["weight"]]
            scale = header.tensors[claim.keys["weight_scale"]]
            if scale.torch_dtype not in POWER_DTYPES:
                yield claim
                continue
            shape = unpadded_shape(header, layer, info.shape, PAD)
            yield dataclasses.replace(claim, padded=PAD, shape=shape)

    def decode(
        self, claim: Claim, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """View the scale as the scheme's grid; undo tiles and padding."""
        weight, params = super().decode(claim, tensors)
        shape = claim.shape
        if shape is None or not pads(shape, tuple(weight.shape), PAD):
            return weight, params
        n, k = shape
        cols = grid_shape((n, k), (1, mx.COLS))[1]
        scale = params["weight_scale"][:n, :cols]
        params = {"weight_scale": scale.contiguous()}
        if k % mx.COLS:
            block = scale.new_empty((1, mx.COLS, 0), dtype=torch.uint8)
            params["weight_block_size"] = block
        return weight[:n, :k].contiguous(), params

    def plain(self, scale: Tensor, shape: Pair) -> Tensor:
        """Exponents are stored in tiles."""
        if not is_power(scale):
            return scale
        return from_tiles(scale.view(torch.uint8), mx.plain_shape(shape))

    # -- writing -----------------------------------------------------------------------

    def encode(
        self, qdata: Tensor, params: Mapping[str, Tensor], options: Mapping[str, object]
    ) -> dict[str, Tensor]:
        """One float32 scale per weight, or exponents in tiles, as ComfyUI reads.

        Raises:
            CheckpointError: if the scales are of other blocks, or not 2-D.
        """
        shape = matrix_shape(tuple(qdata.shape))
        size, scale = block_size_of(qdata, params), params["weight_scale"]
        if (
            qdata.ndim == 2
            and grid_shape(shape, size) == (1, 1)
            and not is_power(scale)
        ):
            tensors = {"weight": qdata, "weight_scale": scale.view(()).float()}
        elif qdata.ndim == 2 and _is_mx(qdata, scale, size):
            padded, exponents = _pad(qdata, scale.view(torch.uint8))
            tensors = {"weight": padded, "weight_scale": to_tiles(exponents)}
        else:
            raise self.cannot(
                qdata, params, "one floating scale, or float8_e8m0fnu of blocks of 1x32"
            )
        return {**tensors, LAYER_MARKER: self.marker(qdata, params, tensors, options)}

    def fit_options(
        self, shape: tuple[int, ...], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """One scale per weight, or MXFP8 if its scales or blocks are requested."""
        size = options.get("block_size")
        power = options.get("scale_dtype") in POWER_DTYPES
        block = parse_block_size((1, mx.COLS), matrix_shape(shape))
        requested = parse_block_size(size or block, matrix_shape(shape))
        if requested == block and (size is not None or power):
            mxfp8 = {"block_size": block, "scale_dtype": POWER_DTYPES[0]}
            return {**options, **mxfp8}
        return {"block_size": "tensor", "scale_dtype": torch.float32, **options}

    def blocks(
        self, shape: tuple[int, ...], block_size: Pair, options: Mapping[str, Any]
    ) -> Sequence[Pair]:
        """One block for the whole weight, or 1 x 32."""
        whole = matrix_shape(shape)
        return [(1, mx.COLS), whole] if block_size == (1, mx.COLS) else [whole]

    def entry(
        self,
        quantized: Mapping[str, TensorInfo],
        stored: Mapping[str, TensorInfo],
        options: Mapping[str, str],
    ) -> dict[str, object]:
        """The marker of one scale, or of MXFP8 with what convert_to_quant adds."""
        weight = quantized["weight"]
        if stored["weight_scale"].dtype == "U8":
            shape = list(matrix_shape(weight.shape))
            marker: dict[str, object] = {
                "format": "mxfp8",
                "group_size": mx.COLS,
                "orig_shape": shape,
            }
        else:
            dtypes = FORMAT_DTYPES.items()
            names = (name for name, d in dtypes if DTYPE_NAMES[d] == weight.dtype)
            marker = {"format": next(names)}
        if options.get(FULL_PRECISION, "").lower() == "true":
            marker[FULL_PRECISION] = True
        return marker


def _named(name: str, marker: Mapping[str, object], shape: Pair) -> Pair | None:
    """The block size of a format, for blocks as the marker declares it."""
    if name in _MX:
        return 1, mx.COLS
    if name.endswith("_rowwise"):
        return 1, shape[1]
    if name.endswith("_blockwise"):
        nested = marker.get("params")
        size = marker.get("group_size")
        if size is None and isinstance(nested, dict):  # in older files
            size = nested.get("group_size")
        if type(size) is int and size > 0:
            return min(size, shape[0]), min(size, shape[1])
        return None
    return None if name.endswith("_block3d") else shape


def _is_mx(qdata: Tensor, scale: Tensor, size: Pair) -> bool:
    block = size == (1, min(mx.COLS, *qdata.shape[1:]))
    return is_power(scale) and block and qdata.dtype == FP8_DTYPES[0]


def _pad(qdata: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Quantized data and exponents, padded as ComfyUI pads them."""
    (n, k), (rows, cols) = qdata.shape, scale.shape
    high, wide = -(-n // PAD[0]) * PAD[0], -(-k // PAD[1]) * PAD[1]
    if (high, wide) == (n, k):
        return qdata, scale
    padded = qdata.new_zeros((high, wide), dtype=torch.uint8)
    padded[:n, :k] = qdata.view(torch.uint8)
    exponents = scale.new_zeros((high, wide // mx.COLS))
    exponents[:rows, :cols] = scale
    return padded.view(qdata.dtype), exponents
