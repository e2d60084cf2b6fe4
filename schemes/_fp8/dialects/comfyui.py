"""The files ComfyUI reads, and those of tools that mark layers the same way."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hijack.formats.claim import Certainty, Claim
from hijack.formats.dialect import FileMarks, Row, Spelled
from hijack.formats.named_only import FILE_MARKER as LAYER_TABLE
from hijack.formats.named_only import comfy_marker
from hijack.formats.named_only_table import LAYER_MARKER
from hijack.safetensors_io.header import (
    DTYPE_NAMES,
    Header,
    TensorInfo,
    join,
    parse_table,
)
from hijack.scheme import Scheme
from schemes._fp8.blocks import (
    FP8_DTYPES,
    POWER_DTYPES,
    SCALE_DTYPES,
    Pair,
    block_size_of,
    columns_of,
    divides,
    grid_shape,
    matrix_shape,
    parse_block_size,
)
from schemes._fp8.dialects import mx
from schemes._fp8.dialects.base import Found, FP8Dialect, Said, is_power
from schemes._fp8.dialects.markers import file_marker, file_markers

#: ``format`` of a marker to the dtype of its codes.
CODES = {
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
    "float8_e4m3fn_rowwise": torch.float8_e4m3fn,
    "float8_e4m3fn_blockwise": torch.float8_e4m3fn,
    "float8_e4m3fn_block3d": torch.float8_e4m3fn,
    "mxfp8": torch.float8_e4m3fn,
    "hybrid_mxfp8": torch.float8_e4m3fn,
}
_MX = ("mxfp8", "hybrid_mxfp8")
#: ComfyUI pads the sides of an MXFP8 weight to multiples of this.
PAD = (32, 32)


class ScaledFP8Dialect(FP8Dialect):
    """ComfyUI's files of before, which a tensor ``scaled_fp8`` marks as a whole.

    ComfyUI itself reads one scale for a weight. Converters wrote rows and grids under
    the same marker, which it multiplies along the wrong side or not at all.
    """

    name = "scaled_fp8"
    scales = ("scale_weight", "weight_scale")
    ranks = (1, 2, 3)
    inputs = ("scale_input", "input_scale")
    row = Row(
        "ComfyUI up to 0.3; convert_to_quant's older path; Kijai",
        "X.weight, X.scale_weight, X.scale_input; also X.weight_scale, X.input_scale",
        "F32 (); convert_to_quant: (N,), (N/C, K/C) or (N, K/C, 1)",
        "all; convert_to_quant: rows, C x C, 1 x C",
        "a tensor `scaled_fp8`, whose dtype is the codes'",
    )

    def said(self, header: Header, found: Found) -> Said | None:
        """Claim what the marker covers, and grids nobody else writes under the name."""
        own = "scale_weight" in found.keys  # today's name is that of others too
        if join(found.layer, LAYER_MARKER) in header.tensors:
            return None
        if not own and comfy_marker(header, found.layer) is not None:
            return None
        marker = file_marker(header, found.layer)
        if marker is None:
            return Said(Certainty.UNIQUE) if own and _converted(found) else None
        dtype = marker.dtype if marker.dtype.startswith("F8") else "F8_E4M3"
        problem = ""
        if dtype != found.weight.dtype:
            problem = f"scaled_fp8 says {dtype}, the weight is {found.weight.dtype}"
        size = found.shape if found.grid == (1, 1) else None
        return Said(Certainty.MARKED, "scaled_fp8 marks the file", size, problem)

    def unmark(
        self, metadata: Mapping[str, str], keys: Collection[str], layers: Iterable[str]
    ) -> tuple[dict[str, str], set[str]]:
        """Drop the marker of each model whose layers leave."""
        return dict(metadata), file_markers(keys, layers)


def _converted(found: Found) -> bool:
    """Whether scales are convert_to_quant's: one for each row, or for square blocks."""
    (n, k), (rows, cols) = found.shape, found.grid
    if len(found.scale.shape) == 1:
        return rows == n > 1
    square = n % rows == k % cols == 0 and n // rows == k // cols
    return len(found.scale.shape) == 2 and square and found.grid != (1, 1)


class ComfyQuantDialect(FP8Dialect):
    """Layers that ComfyUI marks one by one, ``X.comfy_quant`` or in the header.

    The marker names a format. It is believed as far as the shapes bear it out:
    convert_to_quant marks rows as blocks where its blocks do not divide, and ComfyUI
    marks everything with ``scale_weight`` as one scale of E4M3 when it loads a file.
    """

    name = "comfy_quant"
    scale_dtypes = (*SCALE_DTYPES, *POWER_DTYPES)
    ranks = (1, 2, 3)
    input_written = "input_scale"
    asides = (LAYER_MARKER, "weight_scalar")
    row = Row(
        "ComfyUI, comfy-quants, convert_to_quant",
        "X.weight, X.weight_scale, X.input_scale, X.comfy_quant; hybrid: "
        "X.weight_scalar",
        "F32 (), (N,) or (N/C, K/C); mxfp8: U8 in tiles of 128 x 4",
        "all, rows, C x C or 1 x C; mxfp8: 1 x 32, sides padded to 32",
        "X.comfy_quant, JSON in bytes; metadata `_quantization_metadata`",
        "float8_e4m3fn and float8_e5m2 of one scale, mxfp8",
    )

    def grid(self, scale: tuple[int, ...], shape: Pair) -> Pair | None:
        """As elsewhere, or tiles, which cover (N, K/32)."""
        if scale == mx.tiled_shape(shape) and shape[1] % mx.COLS == 0:
            return mx.plain_shape(shape)
        return super().grid(scale, shape)

    def said(self, header: Header, found: Found) -> Said | None:
        """What the layer's marker says, held against dtype and shape."""
        marker = comfy_marker(header, found.layer)
        if marker is None:
            return self._unmarked(header, found)
        name = str(marker.get("format", ""))
        if name not in CODES or marker.get("convrot"):
            return None  # a rotated weight is another weight
        tiles = mx.is_mx(found) and mx.is_tiled(found)
        if (found.scale.torch_dtype in POWER_DTYPES) != (name in _MX) or (
            name in _MX and not tiles
        ):
            return None  # nobody has seen such a thing; it may be anything
        problem = ""
        if CODES[name] != found.weight.torch_dtype:
            problem = f"comfy_quant says {name}, the weight is {found.weight.dtype}"
        size = _named(name, marker, found.shape)
        experts = found.weight.shape[0] if len(found.weight.shape) == 3 else 0
        if experts and marker.get("num_experts") == experts == found.grid[0]:
            size = (1, found.shape[1])  # a bank of experts, a scale for each
        return Said(Certainty.MARKED, f"comfy_quant says {name}", size, problem)

    def _unmarked(self, header: Header, found: Found) -> Said | None:
        """Tiles of exponents, which nobody else writes; or somebody's plain order.

        Where the two have the same shape it is a guess. With a config it is neither.
        """
        if not mx.is_mx(found) or not mx.is_tiled(found):
            return None
        if header.quantization or file_marker(header, found.layer) is not None:
            return None
        sure = Certainty.GUESS if mx.is_plain(found) else Certainty.UNIQUE
        return Said(sure, "scales in tiles of 128 x 4", (1, mx.COLS))

    def _sizes(self, found: Found, said: Said) -> tuple[list[Pair], bool]:
        """Its writers never cut a block short; they have rows, squares and 1 x C."""
        sizes, sure = super()._sizes(found, said)
        exact = divides(found.shape, found.grid)
        if sure or not exact or columns_of(found.shape, found.grid):
            return sizes, sure
        rows, cols = sizes[-1]
        return (sizes[-1:], True) if rows in (1, cols) else (sizes, sure)

    def readings(self, scheme: Scheme, header: Header, layer: str) -> Iterator[Claim]:
        """As elsewhere; a padded weight's own shape is as the marker or bias says."""
        for claim in super().readings(scheme, header, layer):
            info = header.tensors[claim.keys["weight"]]
            scale = header.tensors[claim.keys["weight_scale"]]
            if scale.torch_dtype not in POWER_DTYPES:
                yield claim
                continue
            shape = _own_shape(header, layer, info.shape)
            yield dataclasses.replace(claim, padded=PAD, shape=shape)

    def decode(
        self, claim: Claim, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """View the scale as the scheme's grid; take tiles and padding apart."""
        weight, params = super().decode(claim, tensors)
        if claim.shape is None or not _pads(claim.shape, tuple(weight.shape)):
            return weight, params
        n, k = claim.shape
        cols = grid_shape(claim.shape, (1, mx.COLS))[1]
        scale = params["weight_scale"][:n, :cols]
        params = {"weight_scale": scale.contiguous()}
        if k % mx.COLS:
            block = scale.new_empty((1, mx.COLS, 0), dtype=torch.uint8)
            params["weight_block_size"] = block
        return weight[:n, :k].contiguous(), params

    def plain(self, scale: Tensor, shape: Pair) -> Tensor:
        """Exponents come in tiles."""
        return mx.from_tiles(scale, shape) if is_power(scale) else scale

    def unmark(
        self, metadata: Mapping[str, str], keys: Collection[str], layers: Iterable[str]
    ) -> tuple[dict[str, str], set[str]]:
        """Take the layers out of the header's table, and drop their own markers."""
        gone = set(layers)
        rest = dict(metadata)
        said = parse_table(rest.get(LAYER_TABLE, ""))
        if said:
            kept = said.get("layers")
            kept = kept if isinstance(kept, dict) else {}
            kept = {name: entry for name, entry in kept.items() if name not in gone}
            del rest[LAYER_TABLE]
            if kept:
                rest[LAYER_TABLE] = json.dumps({**said, "layers": kept})
        markers = {join(layer, LAYER_MARKER) for layer in gone}
        return rest, markers & set(keys)

    # -- writing -----------------------------------------------------------------------

    def encode(
        self, qdata: Tensor, params: Mapping[str, Tensor], options: Mapping[str, object]
    ) -> dict[str, Tensor]:
        """One float32 scale for a weight, or exponents in tiles: what ComfyUI reads.

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
            code = next(n for n, d in CODES.items() if d == qdata.dtype)
            named: dict[str, object] = {"format": code}
            tensors = {"weight": qdata, "weight_scale": scale.view(()).float()}
        elif qdata.ndim == 2 and _is_mx(qdata, scale, size):
            named = _mx_entry(shape)
            codes, plain = _pad(qdata, scale.view(torch.uint8))
            tensors = {"weight": codes, "weight_scale": mx.to_tiles(plain)}
        else:
            raise self.cannot(
                qdata, params, "one floating scale, or float8_e8m0fnu of blocks of 1x32"
            )
        tensors[LAYER_MARKER] = marker_tensor(named, qdata.device)
        return tensors

    def fit_options(
        self, shape: tuple[int, ...], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """One scale for a weight, or MXFP8 if powers of two or its blocks are asked."""
        size = options.get("block_size")
        power = options.get("scale_dtype") in POWER_DTYPES
        block = parse_block_size((1, mx.COLS), matrix_shape(shape))
        asked = parse_block_size(size or block, matrix_shape(shape))
        if asked == block and (size is not None or power):
            mxfp8 = {"block_size": block, "scale_dtype": POWER_DTYPES[0]}
            return {**options, **mxfp8}
        return {"block_size": "tensor", "scale_dtype": torch.float32, **options}

    def blocks(
        self, shape: tuple[int, ...], block_size: Pair, options: Mapping[str, Any]
    ) -> Sequence[Pair]:
        """One for the whole weight; 1 x 32 stays what it is."""
        whole = matrix_shape(shape)
        return [(1, mx.COLS), whole] if block_size == (1, mx.COLS) else [whole]

    def finish(
        self, layers: Mapping[str, Spelled], others: Mapping[str, TensorInfo]
    ) -> FileMarks:
        """The table ComfyUI's own writers put into the header."""
        if not layers:
            return FileMarks()
        table = {layer: _entry(spelled) for layer, spelled in layers.items()}
        text = json.dumps({"format_version": "1.0", "layers": table})
        return FileMarks({LAYER_TABLE: text})


class KijaiDialect(FP8Dialect):
    """One scale for a weight under today's name, and no marker.

    What Kijai's readers accept beside ``scale_weight``, and what tools for vLLM write.
    """

    name = "kijai"
    row = Row(
        "files for Kijai's nodes; AutoFP8, ModelOpt",
        "X.weight, X.weight_scale; X.input_scale",
        "() or (1,)",
        "all",
        "none",
    )

    def said(self, header: Header, found: Found) -> Said | None:
        """Claim single scales that no marker claims; those of a config say more."""
        if comfy_marker(header, found.layer) is not None:
            return None
        single = found.scale.shape in ((), (1,))
        return Said(Certainty.FITS, size=found.shape) if single else None


def marker_tensor(entry: Mapping[str, object], device: torch.device) -> Tensor:
    """A layer's marker: JSON in bytes, (length,) uint8."""
    text = json.dumps(entry).encode()
    if device.type == "meta":
        return torch.empty(len(text), dtype=torch.uint8, device="meta")
    return torch.tensor(list(text), dtype=torch.uint8)


def _named(name: str, marker: Mapping[str, object], shape: Pair) -> Pair | None:
    """The block size a format stands for; of blocks, what the marker says."""
    if name in _MX:
        return 1, mx.COLS
    if name.endswith("_rowwise"):
        return 1, shape[1]
    if name.endswith("_blockwise"):
        nested = marker.get("params")
        size = marker.get("group_size")
        if size is None and isinstance(nested, dict):  # as older files have it
            size = nested.get("group_size")
        if type(size) is int and size > 0:
            return min(size, shape[0]), min(size, shape[1])
        return None
    return None if name.endswith("_block3d") else shape


def _own_shape(header: Header, layer: str, stored: tuple[int, ...]) -> Pair | None:
    """The shape of a padded weight, where the file tells it.

    convert_to_quant writes it into its marker; ComfyUI does not, but a bias has as many
    elements as there are rows.
    """
    said = (comfy_marker(header, layer) or {}).get("orig_shape")
    bias = header.tensors.get(join(layer, "bias"))
    if isinstance(said, list) and all(type(size) is int for size in said):
        shape = tuple(said)
    else:
        shape = stored if bias is None else (*bias.shape, *stored[1:])
    return (shape[0], shape[1]) if _pads(shape, stored) else None


def _pads(shape: tuple[int, ...], stored: tuple[int, ...]) -> bool:
    """Whether a stored shape is a smaller one with its sides padded."""
    return len(shape) == len(stored) == 2 and all(
        0 < size <= there < size + pad
        for size, there, pad in zip(shape, stored, PAD, strict=True)
    )


def _is_mx(qdata: Tensor, scale: Tensor, size: Pair) -> bool:
    block = size == (1, min(mx.COLS, *qdata.shape[1:]))
    return is_power(scale) and block and qdata.dtype == FP8_DTYPES[0]


def _pad(qdata: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and exponents with their sides padded as ComfyUI pads them."""
    (n, k), (rows, cols) = qdata.shape, scale.shape
    high, wide = -(-n // PAD[0]) * PAD[0], -(-k // PAD[1]) * PAD[1]
    if (high, wide) == (n, k):
        return qdata, scale
    codes = qdata.new_zeros((high, wide), dtype=torch.uint8)
    codes[:n, :k] = qdata.view(torch.uint8)
    padded = scale.new_zeros((high, wide // mx.COLS))
    padded[:rows, :cols] = scale
    return codes.view(qdata.dtype), padded


def _entry(spelled: Spelled) -> dict[str, object]:
    """What a layer's own marker says, which ComfyUI replaces by this."""
    if spelled.tensors["weight_scale"].dtype == "U8":
        return _mx_entry(matrix_shape(spelled.shape))
    code = spelled.tensors["weight"].dtype
    names = (name for name, dtype in CODES.items() if DTYPE_NAMES[dtype] == code)
    return {"format": next(names)}


def _mx_entry(shape: Pair) -> dict[str, object]:
    """As convert_to_quant says it; ComfyUI needs the format alone."""
    return {"format": "mxfp8", "group_size": mx.COLS, "orig_shape": list(shape)}
