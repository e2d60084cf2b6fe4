"""How programs store NVFP4 in files.

They differ in the order of two codes in a byte, in the order of the scales, and in
whether the scale of the whole weight multiplies or divides. ComfyUI's files and
ModelOpt's have the same names, dtypes and, if 128 divides the rows and 64 the columns,
the same shapes: without a marker or a config the user has to say which they are.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from hijack.claim import Certainty, Claim
from hijack.formats.comfy_quant import ComfyQuantDialect
from hijack.formats.comfyui_markers import (
    FULL_PRECISION,
    is_marked,
    pads,
    unpadded_shape,
    wrong_format,
)
from hijack.formats.configured import ConfiguredFiles
from hijack.formats.dialect import EncodedLayer, FormatMetadata
from hijack.formats.native_marker import native_marker
from hijack.formats.tensor_dialect import Reading, TensorDialect
from hijack.safetensors_io.header import (
    Header,
    TensorInfo,
    join,
    parse_table,
)
from hijack.scheme import Scheme
from schemes import _fp4
from schemes._tiles import from_tiles, tiled_shape, to_tiles, torchao_shape

#: Columns that share a scale.
COLS = 16
#: ComfyUI pads the sides of a weight to multiples of this.
_PAD = (16, 16)
_NAMES = {
    name: (name,)
    for name in ("weight", "weight_scale", "weight_scale_2", "pre_quant_scale")
}
_DTYPES = {
    "weight": ("U8",),
    "weight_scale": ("F8_E4M3",),
    "weight_scale_2": ("F32",),
    "pre_quant_scale": ("F32", "BF16", "F16"),
}


class ComfyNVFP4Dialect(ComfyQuantDialect):
    """ComfyUI's: scales in tiles, the even column in the high bits, sides padded."""

    writes = True
    stores = (FULL_PRECISION,)
    names = _NAMES
    dtypes: ClassVar = {**_DTYPES, "weight_scale": ("F8_E4M3", "U8")}
    optional = ("pre_quant_scale",)
    input_written = "input_scale"
    formats = ("nvfp4",)
    known = ("group_size", FULL_PRECISION)
    told = ("weight_columns",)

    def marked(
        self, marker: Mapping[str, Any], infos: Mapping[str, TensorInfo]
    ) -> Iterable[Reading]:
        """Scales in tiles, as the marker says."""
        if _is_tiled(infos):
            full = {FULL_PRECISION: "true"} if marker.get(FULL_PRECISION) else {}
            yield Reading(Certainty.MARKED, options=full, block_size=(1, COLS))

    def unmarked(
        self,
        marker: Mapping[str, Any] | None,
        header: Header,
        layer: str,
        infos: Mapping[str, TensorInfo],
    ) -> Iterable[Reading]:
        """Scales in tiles; a guess where plain order has the same shape."""
        problem = "" if marker is None else wrong_format(header, layer, marker)
        if not _is_tiled(infos) or (marker is not None and not problem):
            return
        certainty = Certainty.UNIQUE
        if marker is None:
            if header.quantization or native_marker(header, layer) is not None:
                return
            if _is_plain(infos) and not _is_padded(header, layer, infos):
                certainty = Certainty.GUESS
        yield Reading(
            certainty,
            "scales in tiles of 128 x 4",
            block_size=(1, COLS),
            mismatch=problem and f"{layer}: {problem}",
        )

    def readings(self, scheme: Scheme, header: Header, layer: str) -> Iterator[Claim]:
        """As in the base class, with the true shape of a padded weight."""
        for claim in super().readings(scheme, header, layer):
            stored = _stored(header.tensors[claim.keys["weight"]])
            shape = unpadded_shape(header, layer, stored, _PAD)
            yield dataclasses.replace(claim, padded=_PAD, shape=shape)

    def decode(
        self, claim: Claim, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Turn the bytes; undo tiles and padding."""
        packed, params = super().decode(claim, tensors)
        n, k = packed.shape[0], 2 * packed.shape[1]
        if claim.shape is not None and pads(claim.shape, (n, k), _PAD):
            n, k = claim.shape[0], claim.shape[1]
        if k % COLS:
            params["weight_columns"] = packed.new_empty((k, 0))
        tiles = params["weight_scale"].view(torch.float8_e4m3fn)  # maybe bytes
        params["weight_scale"] = from_tiles(tiles, (n, packed.shape[1] // 8))
        params["weight_scale_2"] = params["weight_scale_2"].view(())
        return _fp4.swap(packed[:n]), params

    def store(self, qdata: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Turn the bytes; pad the rows, and put the scales into tiles."""
        n = len(qdata)
        packed = qdata.new_zeros((n + -n % _PAD[0], qdata.shape[1]))
        packed[:n] = _fp4.swap(qdata)
        tiles = to_tiles(params["weight_scale"])
        return super().store(packed, {**params, "weight_scale": tiles})

    def entry(
        self,
        quantized: Mapping[str, TensorInfo],
        stored: Mapping[str, TensorInfo],
        options: Mapping[str, str],
    ) -> dict[str, object]:
        """The format, and what is padded."""
        entry: dict[str, object] = {"format": "nvfp4"}
        n, k = _stored(quantized["weight"])
        if "weight_columns" in quantized:
            k = quantized["weight_columns"].shape[0]
        if (n, k) != _stored(stored["weight"]):
            entry["orig_shape"] = [n, k]
        if options.get(FULL_PRECISION, "").lower() == "true":
            entry[FULL_PRECISION] = True
        return entry


class ModelOptNVFP4Dialect(ConfiguredFiles, TensorDialect):
    """ModelOpt's and Black Forest Labs': plain order, the even column in the low bits.

    ModelOpt writes a config, Black Forest Labs do not.
    """

    name = "modelopt"
    writes = True
    names = _NAMES
    dtypes = _DTYPES
    optional = ("pre_quant_scale",)
    inputs = ("input_scale",)
    input_written = "input_scale"

    def interpret(
        self, header: Header, layer: str, infos: Mapping[str, TensorInfo]
    ) -> Iterable[Reading]:
        """Scales in plain order; a guess where tiles have the same shape."""
        method = str(header.quantization.get("quant_method", "modelopt"))
        low_rank = join(layer, "svdquant_lora_a") in header.tensors
        marked = is_marked(header, layer) or native_marker(header, layer) is not None
        if marked or low_rank or "modelopt" not in method or not _is_plain(infos):
            return
        if header.quantization:
            algorithm = header.quantization.get("quant_algo")
            evidence = f"config says {algorithm or method}"
            yield Reading(Certainty.MARKED, evidence, block_size=(1, COLS))
        elif not _is_padded(header, layer, infos):
            certainty = Certainty.GUESS if _is_tiled(infos) else Certainty.UNIQUE
            yield Reading(certainty, "scales in plain order", block_size=(1, COLS))

    def decode(
        self, claim: Claim, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As they are stored; the scale of the weight may have one dimension."""
        qdata, params = super().decode(claim, tensors)
        return qdata, {**params, "weight_scale_2": params["weight_scale_2"].view(())}

    def finish(
        self, layers: Mapping[str, EncodedLayer], others: Mapping[str, TensorInfo]
    ) -> FormatMetadata:
        """The config that ModelOpt writes; inputs are quantized if they have scales."""
        if not layers:
            return FormatMetadata()
        weights = {"dynamic": False, "num_bits": 4, "type": "float", "group_size": COLS}
        group: dict[str, object] = {"weights": weights, "targets": ["Linear"]}
        static = all(join(layer, "input_scale") in others for layer in layers)
        if static:
            group["input_activations"] = weights
        dense = [key.removesuffix(".weight") for key in others if "weight" in key]
        config = {
            "quant_method": "modelopt",
            "quant_algo": "NVFP4" if static else "W4A16_NVFP4",
            "config_groups": {"group_0": group},
            "ignore": dense,
        }
        return self.format_metadata(config)


class CompressedTensorsNVFP4Dialect(TensorDialect):
    """compressed-tensors' ``nvfp4-pack-quantized``, of which one scale divides.

    It is only read: few numbers have a reciprocal whose reciprocal they are.
    """

    name = "compressed_tensors"
    names: ClassVar = {
        "weight": ("weight_packed",),
        "weight_scale": ("weight_scale",),
        "weight_scale_2": ("weight_global_scale",),
    }
    dtypes = _DTYPES
    inputs = ("input_global_scale",)

    def interpret(
        self, header: Header, layer: str, infos: Mapping[str, TensorInfo]
    ) -> Iterable[Reading]:
        """Names that no other program has; the config need not be there."""
        method = header.quantization.get("quant_method")
        if method in (None, "compressed-tensors") and _is_plain(infos):
            certainty = Certainty.MARKED if method else Certainty.UNIQUE
            evidence = f"config says {method}" if method else ""
            yield Reading(certainty, evidence, block_size=(1, COLS))

    def decode(
        self, claim: Claim, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The reciprocal of the scale that divides."""
        qdata, params = super().decode(claim, tensors)
        whole = params["weight_scale_2"].view(()).reciprocal()
        return qdata, {**params, "weight_scale_2": whole}


class TorchaoNVFP4Dialect(TensorDialect):
    """torchao's NVFP4Tensor; its metadata says whether the scales are in tiles."""

    name = "torchao"
    names: ClassVar = {
        "weight": ("_weight_qdata",),
        "weight_scale": ("_weight_scale",),
        "weight_scale_2": ("_weight_per_tensor_scale",),
    }
    dtypes = _DTYPES
    optional = ("weight_scale_2",)
    inputs = ("_weight_act_per_tensor_scale",)

    def interpret(
        self, header: Header, layer: str, infos: Mapping[str, TensorInfo]
    ) -> Iterable[Reading]:
        """As the metadata says."""
        entry = parse_table(header.metadata.get(join(layer, "weight"), ""))
        data = entry.get("_data")
        tiles = isinstance(data, dict) and data.get("is_swizzled_scales")
        grid = _grid(infos)
        if grid is not None and tiles:
            grid = torchao_shape(grid)
        fits = infos["weight_scale"].shape == grid
        if entry.get("_type") == "NVFP4Tensor" and fits:
            evidence = "metadata says NVFP4Tensor"
            yield Reading(Certainty.MARKED, evidence, block_size=(1, COLS))

    def decode(
        self, claim: Claim, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Undo tiles; without a scale of the whole weight it is 1."""
        qdata, params = super().decode(claim, tensors)
        scale, grid = params["weight_scale"], (len(qdata), qdata.shape[1] // 8)
        if tuple(scale.shape) != grid:
            scale = from_tiles(scale.reshape(tiled_shape(grid)), grid)
        one = torch.ones((), device=qdata.device)
        return qdata, {"weight_scale_2": one, **params, "weight_scale": scale}

    def unmark(
        self, metadata: Mapping[str, str], keys: Collection[str], layers: Iterable[str]
    ) -> tuple[dict[str, str], set[str]]:
        """Drop the entries of the layers, and the names of all tensors."""
        gone = {"tensor_names", *(join(layer, "weight") for layer in layers)}
        return {k: v for k, v in metadata.items() if k not in gone}, set()


# -- shapes ----------------------------------------------------------------------------


def _stored(weight: TensorInfo) -> tuple[int, int]:
    """Rows and columns of packed codes; (0, 0) if they are none of whole blocks."""
    if len(weight.shape) != 2 or weight.shape[1] % (COLS // 2):
        return 0, 0
    return weight.shape[0], 2 * weight.shape[1]


def _grid(infos: Mapping[str, TensorInfo]) -> tuple[int, int] | None:
    """Shape of the scales in plain order, if the other tensors fit the weight."""
    n, k = _stored(infos["weight"])
    whole, columns = infos.get("weight_scale_2"), infos.get("pre_quant_scale")
    if not n or (whole is not None and whole.shape not in ((), (1,))):
        return None
    if columns is not None and columns.shape != (k,):
        return None
    return n, k // COLS


def _is_plain(infos: Mapping[str, TensorInfo]) -> bool:
    """Whether the scales may be in plain order, judging by their shape."""
    return infos["weight_scale"].shape == _grid(infos)


def _is_tiled(infos: Mapping[str, TensorInfo]) -> bool:
    """Whether the scales may be ComfyUI's tiles, judging by their shape."""
    grid = _grid(infos)
    if grid is None or grid[0] % _PAD[0]:
        return False
    return infos["weight_scale"].shape == tiled_shape(grid)


def _is_padded(header: Header, layer: str, infos: Mapping[str, TensorInfo]) -> bool:
    """Whether the bias says that rows were added, as ComfyUI does."""
    stored = _stored(infos["weight"])
    return unpadded_shape(header, layer, stored, _PAD) not in (None, stored)


DIALECTS = (
    ComfyNVFP4Dialect(),
    ModelOptNVFP4Dialect(),
    CompressedTensorsNVFP4Dialect(),
    TorchaoNVFP4Dialect(),
)
