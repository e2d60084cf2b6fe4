"""How programs store MXFP4 in files.

All of them have the even column in the low bits, and the scales in plain order, but for
torchao's tiles; they differ in names, and in the dtype of a scale's byte.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping
from typing import ClassVar

import torch
from torch import Tensor

from hijack.claim import Certainty, Claim
from hijack.formats.comfyui_markers import is_marked
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
from schemes._tiles import from_tiles, tiled_shape, torchao_shape

#: Columns that share a scale.
COLS = 32


class _MXFP4Dialect(TensorDialect):
    """Packed codes and exponents, whatever the dtypes of their bytes are called."""

    dtypes: ClassVar = {"weight": ("U8",), "weight_scale": ("U8", "F8_E8M0")}

    def decode(
        self, claim: Claim, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The same bytes as plain ones."""
        qdata, params = super().decode(claim, tensors)
        views = {name: tensor.view(torch.uint8) for name, tensor in params.items()}
        return qdata.view(torch.uint8), views


class CompressedTensorsMXFP4Dialect(ConfiguredFiles, _MXFP4Dialect):
    """compressed-tensors' ``mxfp4-pack-quantized``, which vLLM reads."""

    name = "compressed_tensors"
    writes = True
    names: ClassVar = {"weight": ("weight_packed",), "weight_scale": ("weight_scale",)}
    inputs = ("input_global_scale",)

    def interpret(
        self, header: Header, layer: str, infos: Mapping[str, TensorInfo]
    ) -> Iterable[Reading]:
        """Names and dtypes that no other program has; the config need not be there."""
        method = header.quantization.get("quant_method")
        if method in (None, "compressed-tensors") and _fits(infos):
            certainty = Certainty.MARKED if method else Certainty.UNIQUE
            evidence = f"config says {method}" if method else ""
            yield Reading(certainty, evidence, block_size=(1, COLS))

    def finish(
        self, layers: Mapping[str, EncodedLayer], others: Mapping[str, TensorInfo]
    ) -> FormatMetadata:
        """A config with one group; inputs are not quantized."""
        if not layers:
            return FormatMetadata()
        weights = {
            "num_bits": 4,
            "type": "float",
            "strategy": "group",
            "group_size": COLS,
            "symmetric": True,
            "dynamic": False,
            "scale_dtype": "torch.uint8",
        }
        group = {
            "targets": ["Linear"],
            "weights": weights,
            "input_activations": None,
            "output_activations": None,
            "format": "mxfp4-pack-quantized",
        }
        ends = [key.rpartition(".") for key in others]
        config = {
            "quant_method": "compressed-tensors",
            "format": "mxfp4-pack-quantized",
            "quantization_status": "compressed",
            "config_groups": {"group_0": group},
            "ignore": [layer for layer, _, end in ends if end == "weight"],
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }
        return self.format_metadata(config)


class TorchaoMXFP4Dialect(_MXFP4Dialect):
    """torchao's MXTensor of 4-bit floats."""

    name = "torchao"
    names: ClassVar = {"weight": ("_weight_qdata",), "weight_scale": ("_weight_scale",)}

    def interpret(
        self, header: Header, layer: str, infos: Mapping[str, TensorInfo]
    ) -> Iterable[Reading]:
        """As the metadata says, in plain order or in tiles."""
        entry = parse_table(header.metadata.get(join(layer, "weight"), ""))
        data = entry.get("_data")
        if entry.get("_type") != "MXTensor" or not isinstance(data, dict):
            return
        packed = "float4_e2m1fn_x2" in json.dumps(data.get("elem_dtype"))
        tiles = bool(data.get("is_swizzled_scales"))
        if packed and _fits(infos, tiles):
            evidence = "metadata says MXTensor of float4_e2m1fn_x2"
            yield Reading(Certainty.MARKED, evidence, block_size=(1, COLS))

    def decode(
        self, claim: Claim, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Undo tiles."""
        qdata, params = super().decode(claim, tensors)
        scale, grid = params["weight_scale"], (len(qdata), qdata.shape[1] * 2 // COLS)
        if tuple(scale.shape) != grid:
            scale = from_tiles(scale.reshape(tiled_shape(grid)), grid)
        return qdata, {"weight_scale": scale}

    def unmark(
        self, metadata: Mapping[str, str], keys: Collection[str], layers: Iterable[str]
    ) -> tuple[dict[str, str], set[str]]:
        """Drop the entries of the layers, and the names of all tensors."""
        gone = {"tensor_names", *(join(layer, "weight") for layer in layers)}
        return {k: v for k, v in metadata.items() if k not in gone}, set()


class DeepSeekFP4Dialect(_MXFP4Dialect):
    """The experts of DeepSeek V4: bytes with a sign, and a ``scale``."""

    name = "deepseek"
    names: ClassVar = {"weight": ("weight",), "weight_scale": ("scale",)}
    dtypes: ClassVar = {"weight": ("I8",), "weight_scale": ("F8_E8M0", "U8")}

    def interpret(
        self, header: Header, layer: str, infos: Mapping[str, TensorInfo]
    ) -> Iterable[Reading]:
        """Dtypes that no other program has; plain bytes only with DeepSeek's config."""
        method = header.quantization.get("quant_method")
        named = infos["weight_scale"].dtype == "F8_E8M0" or method == "fp8"
        if named and _fits(infos) and not _is_of_another(header, layer):
            declared = (header.config or {}).get("expert_dtype") == "fp4"
            certainty = Certainty.MARKED if declared else Certainty.UNIQUE
            evidence = "config says expert_dtype fp4" if declared else ""
            yield Reading(certainty, evidence, block_size=(1, COLS))


class ModelOptMXFP4Dialect(_MXFP4Dialect):
    """ModelOpt's, which has the scheme's own names."""

    name = "modelopt"
    names: ClassVar = {"weight": ("weight",), "weight_scale": ("weight_scale",)}
    inputs = ("input_scale",)

    def interpret(
        self, header: Header, layer: str, infos: Mapping[str, TensorInfo]
    ) -> Iterable[Reading]:
        """A byte for two columns and one for 32."""
        method = str(header.quantization.get("quant_method", "modelopt"))
        if not _fits(infos) or "modelopt" not in method:
            return
        if _is_of_another(header, layer):
            return
        algorithm = str(header.quantization.get("quant_algo", ""))
        if "MXFP4" in algorithm:
            evidence = f"config says {algorithm}"
            yield Reading(Certainty.MARKED, evidence, block_size=(1, COLS))
        else:
            yield Reading(Certainty.FITS, block_size=(1, COLS))


def _is_of_another(header: Header, layer: str) -> bool:
    """Whether a marker says that the layer is in another format."""
    return is_marked(header, layer) or native_marker(header, layer) is not None


def _fits(infos: Mapping[str, TensorInfo], tiles: bool = False) -> bool:
    """Whether the shapes are those of whole blocks and their scales.

    Args:
        infos: role to dtype and shape.
        tiles: whether the scales are in torchao's tiles, not in plain order.
    """
    weight, scale = infos["weight"].shape, infos["weight_scale"].shape
    if len(weight) != 2 or weight[1] * 2 % COLS:
        return False
    grid = (weight[0], weight[1] * 2 // COLS)
    return scale == (torchao_shape(grid) if tiles else grid)


DIALECTS = (
    CompressedTensorsMXFP4Dialect(),
    TorchaoMXFP4Dialect(),
    DeepSeekFP4Dialect(),
    ModelOptMXFP4Dialect(),
)
