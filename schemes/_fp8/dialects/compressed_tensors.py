"""Files of compressed-tensors, which llm-compressor writes and vLLM reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

import schemes._fp8.dialects.mx as mx
from hijack.claim import Certainty
from hijack.formats.comfyui_markers import is_marked
from hijack.formats.dialect import EncodedLayer, FormatMetadata
from hijack.safetensors_io.header import Header, TensorInfo
from schemes._blocks import (
    SCALE_DTYPES,
    Pair,
    block_size_of,
    grid_shape,
    matrix_shape,
    parse_block_size,
)
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


class CompressedTensorsDialect(ConfiguredDialect):
    """What llm-compressor writes and vLLM reads: ``X.weight_scale`` and a config.

    Each group of the config declares how its target layers were quantized; the shapes
    show to which group a layer belongs.
    """

    name = "compressed_tensors"
    writes = True

    def declared(self, header: Header, info: QuantizedWeightInfo) -> Declared | None:
        """The group of the config whose scales would have these shapes."""
        config = header.quantization
        if config.get("quant_method") != "compressed-tensors":
            # without its config, only the shape that no other format has
            rows = info.scale.shape == (info.shape[0], 1)
            floating = info.scale.torch_dtype in SCALE_DTYPES
            if config or is_marked(header, info.layer) or not (rows and floating):
                return None
            return Declared(Certainty.FITS, size=(1, info.shape[1]))
        power = info.scale.torch_dtype in POWER_DTYPES
        if power and not (mx.is_mx(info) and mx.is_plain(info)):
            return None
        groups = list(_groups(config, info.shape))
        possible = {
            size: text
            for size, text in reversed(groups)
            if size is not None and grid_shape(info.shape, size) == info.grid
        }
        if len(possible) > 1:
            return Declared(
                Certainty.GUESS, "config has groups", alternatives=(*possible,)
            )
        for size, text in (*possible.items(), *reversed(groups)):
            return Declared(Certainty.MARKED, f"config says {text}", size)
        return Declared(Certainty.UNIQUE)

    # -- writing -----------------------------------------------------------------------

    def encode(
        self, qdata: Tensor, params: Mapping[str, Tensor], options: Mapping[str, object]
    ) -> dict[str, Tensor]:
        """The grid unchanged, (N, 1) or (1,); exponents only in blocks of 1 x 32.

        Raises:
            CheckpointError: if the weight is not 2-D or its dtype is not E4M3.
        """
        size, scale = block_size_of(qdata, params), params["weight_scale"]
        mxfp8 = size == (1, mx.COLS) and qdata.shape[-1] % mx.COLS == 0
        fits = mxfp8 or not is_power(scale)
        if qdata.ndim != 2 or qdata.dtype != FP8_DTYPES[0] or not fits:
            raise self.cannot(
                qdata,
                params,
                "a 2-D weight of float8_e4m3fn; exponents only for blocks of 1x32",
            )
        if is_power(scale):
            scale = scale.view(torch.uint8)
        elif options.get("block_size") == "tensor" or size == tuple(qdata.shape):
            scale = scale.view(1)
        return {"weight": qdata, "weight_scale": scale}

    def fit_options(
        self, shape: tuple[int, ...], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Blocks of 128 x 128 and float32 scales by default."""
        if options.get("scale_dtype") in POWER_DTYPES:
            return {"block_size": (1, mx.COLS), **options}
        return with_defaults(options)

    def finish(
        self, layers: Mapping[str, EncodedLayer], others: Mapping[str, TensorInfo]
    ) -> FormatMetadata:
        """A config with one group for each kind of blocks."""
        if not layers:
            return FormatMetadata()
        kinds: dict[str, list[str]] = {}
        for name, layer in layers.items():
            kinds.setdefault(json.dumps(_arguments(layer, layers)), []).append(name)
        groups = {
            f"group_{number}": {
                "targets": ["Linear"] if len(kinds) == 1 else names,
                "weights": json.loads(kind),
                "input_activations": _activations(json.loads(kind)),
                "output_activations": None,
                "format": _format(kind),
            }
            for number, (kind, names) in enumerate(kinds.items())
        }
        formats = {_format(kind) for kind in kinds}
        return self.format_metadata(
            {
                "quant_method": "compressed-tensors",
                "format": formats.pop() if len(formats) == 1 else "mixed-precision",
                "quantization_status": "compressed",
                "config_groups": groups,
                "ignore": dense_layers(others),
                "kv_cache_scheme": None,
                "global_compression_ratio": None,
            }
        )


# -- configs -------------------------------------------------------------------------


def _groups(
    config: Mapping[str, Any], shape: Pair
) -> Iterator[tuple[Pair | None, str]]:
    """Block size and name of every group of 8-bit floats."""
    groups = config.get("config_groups")
    for group in groups.values() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict) or weights.get("type") != "float":
            continue
        if weights.get("num_bits") != 8:
            continue
        strategy = str(weights.get("strategy"))
        block = weights.get("block_structure")
        columns = weights.get("group_size")
        sizes: dict[str, Pair | None] = {
            "tensor": shape,
            "channel": (1, shape[1]),
            "block": None,
            "group": None,
        }
        size = sizes.get(strategy)
        if strategy == "block" and (pair := block_pair(block)):
            size = parse_block_size(pair, shape)
        if strategy == "group" and type(columns) is int and columns > 0:
            size = (1, min(columns, shape[1]))
        yield size, f"strategy {strategy}"


def _arguments(
    layer: EncodedLayer, layers: Mapping[str, EncodedLayer]
) -> dict[str, object]:
    """The ``QuantizationArgs`` of a layer."""
    shape = matrix_shape(layer.shape)
    rows, cols = layer.block_size or shape
    usual: dict[str, object] = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "dynamic": False,
    }
    scale = layer.tensors["weight_scale"]
    if scale.dtype == "U8":
        extra = {"group_size": mx.COLS, "scale_dtype": "torch.uint8"}
        return {**usual, "strategy": "group", **extra}
    if len(scale.shape) == 1:
        return {**usual, "strategy": "tensor"}
    if rows == 1 and cols >= shape[1]:
        return {**usual, "strategy": "channel"}
    block = _block_structure(layer, layers)
    return {**usual, "strategy": "block", "block_structure": block}


def _activations(weights: Mapping[str, object]) -> dict[str, object] | None:
    """How readers quantize inputs, as in the presets for such weights."""
    usual = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True}
    if weights["strategy"] in ("channel", "tensor"):
        return {**usual, "strategy": "token"}
    if weights["strategy"] == "group":
        columns = {"group_size": mx.COLS, "scale_dtype": "torch.uint8"}
        return {**usual, "strategy": "group", **columns}
    if weights.get("block_structure") == list(BLOCK):
        return {**usual, "strategy": "group", "group_size": BLOCK[1]}
    return None  # no kernel supports inputs in such blocks


def _block_structure(
    layer: EncodedLayer, layers: Mapping[str, EncodedLayer]
) -> list[int]:
    """The declared block size of a layer: the common one, if the grid is the same."""
    sizes = [(matrix_shape(e.shape), e.block_size) for e in layers.values()]
    size, shape = layer.block_size or BLOCK, matrix_shape(layer.shape)
    shared = common_block_size(sizes, max)
    same = grid_shape(shape, size) == grid_shape(shape, shared)
    return list(shared if same else size)


def _format(kind: str) -> str:
    return "mxfp8-quantized" if "uint8" in kind else "float-quantized"
