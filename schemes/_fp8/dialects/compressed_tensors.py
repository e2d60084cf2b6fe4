"""Files of compressed-tensors, which llm-compressor writes and vLLM reads."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hijack.formats.claim import Certainty
from hijack.formats.dialect import FileMarks, Row, Spelled
from hijack.safetensors_io.header import Header, TensorInfo
from schemes._fp8.blocks import (
    FP8_DTYPES,
    POWER_DTYPES,
    SCALE_DTYPES,
    Pair,
    block_size_of,
    grid_shape,
    matrix_shape,
    parse_block_size,
)
from schemes._fp8.dialects import mx
from schemes._fp8.dialects.base import Found, Said, is_power, rows_of
from schemes._fp8.dialects.configured import (
    BLOCK,
    ConfiguredDialect,
    common,
    dense_layers,
    pair,
    with_defaults,
)
from schemes._fp8.dialects.markers import marked


class CompressedTensorsDialect(ConfiguredDialect):
    """What llm-compressor writes and vLLM reads: ``X.weight_scale`` and a config.

    Each group of the config says how the layers it targets were quantized; the shapes
    tell which of the groups a layer is of.
    """

    name = "compressed_tensors"
    row = Row(
        "compressed-tensors, llm-compressor",
        "X.weight, X.weight_scale, X.input_scale",
        "model's dtype (1,), (N, 1) or (ceil(N/R), ceil(K/C)); mxfp8: U8 (N, K/32)",
        "all, rows, 128 x 128 with short edges, or 1 x 32",
        "config.json: quant_method compressed-tensors",
        "block, rows, tensor, mxfp8",
    )

    def said(self, header: Header, found: Found) -> Said | None:
        """What a group of the config says whose scales would have these shapes."""
        config = header.quantization
        if config.get("quant_method") != "compressed-tensors":
            # without its config, what is unlike everybody else's
            plain = found.scale.torch_dtype in SCALE_DTYPES
            fits = found.scale.shape == (found.shape[0], 1)
            lone = not config and not marked(header, found.layer)
            return (
                Said(Certainty.FITS, size=(1, found.shape[1]))
                if (plain and fits and lone)
                else None
            )
        power = found.scale.torch_dtype in POWER_DTYPES
        if power and not (mx.is_mx(found) and mx.is_plain(found)):
            return None
        groups = list(_groups(config, found.shape))
        possible = {
            size: text
            for size, text in reversed(groups)
            if size is not None and grid_shape(found.shape, size) == found.grid
        }
        if len(possible) > 1:
            return Said(Certainty.GUESS, "config has groups", rivals=(*possible,))
        for size, text in (*possible.items(), *reversed(groups)):
            return Said(Certainty.MARKED, f"config says {text}", size)
        return Said(Certainty.UNIQUE)

    # -- writing -----------------------------------------------------------------------

    def encode(
        self, qdata: Tensor, params: Mapping[str, Tensor], options: Mapping[str, object]
    ) -> dict[str, Tensor]:
        """The grid as it is, (N, 1) or (1,); exponents only in blocks of 1 x 32.

        Raises:
            CheckpointError: if the weight is not 2-D or its codes are not E4M3.
        """
        size, scale = block_size_of(qdata, params), params["weight_scale"]
        mxfp8 = size == (1, mx.COLS) and qdata.shape[-1] % mx.COLS == 0
        fits = mxfp8 or not is_power(scale)
        if qdata.ndim != 2 or qdata.dtype != FP8_DTYPES[0] or not fits:
            can = "a 2-D weight of float8_e4m3fn; exponents only for blocks of 1x32"
            raise self.cannot(qdata, params, can)
        if is_power(scale):
            scale = scale.view(torch.uint8)
        elif options.get("block_size") == "tensor" or size == tuple(qdata.shape):
            scale = scale.view(1)
        return {"weight": qdata, "weight_scale": scale}

    def fit_options(
        self, shape: tuple[int, ...], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Blocks of 128 x 128 and float32 scales, if nothing else was asked for."""
        if options.get("scale_dtype") in POWER_DTYPES:
            return {"block_size": (1, mx.COLS), **options}
        return with_defaults(options)

    def finish(
        self, layers: Mapping[str, Spelled], others: Mapping[str, TensorInfo]
    ) -> FileMarks:
        """A config with one group for each kind of blocks."""
        if not layers:
            return FileMarks()
        kinds: dict[str, list[str]] = {}
        for layer, spelled in layers.items():
            kinds.setdefault(json.dumps(_arguments(spelled, layers)), []).append(layer)
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
        return self.marks(
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
        if strategy == "block" and (given := pair(block)):
            size = parse_block_size(given, shape)
        if strategy == "group" and type(columns) is int and columns > 0:
            size = (1, min(columns, shape[1]))
        yield size, f"strategy {strategy}"


def _arguments(spelled: Spelled, layers: Mapping[str, Spelled]) -> dict[str, object]:
    """How a layer was quantized, in the words of compressed-tensors."""
    shape = matrix_shape(spelled.shape)
    size = spelled.block_size or shape
    usual: dict[str, object] = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "dynamic": False,
    }
    scale = spelled.tensors["weight_scale"]
    if scale.dtype == "U8":
        extra = {"group_size": mx.COLS, "scale_dtype": "torch.uint8"}
        return {**usual, "strategy": "group", **extra}
    if len(scale.shape) == 1:
        return {**usual, "strategy": "tensor"}
    if rows_of(shape, size):
        return {**usual, "strategy": "channel"}
    block = _structure(spelled, layers)
    return {**usual, "strategy": "block", "block_structure": block}


def _activations(weights: Mapping[str, object]) -> dict[str, object] | None:
    """How readers shall quantize inputs, as presets for such weights have it."""
    usual = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True}
    if weights["strategy"] in ("channel", "tensor"):
        return {**usual, "strategy": "token"}
    if weights["strategy"] == "group":
        columns = {"group_size": mx.COLS, "scale_dtype": "torch.uint8"}
        return {**usual, "strategy": "group", **columns}
    if weights.get("block_structure") == list(BLOCK):
        return {**usual, "strategy": "group", "group_size": BLOCK[1]}
    return None  # no kernel takes inputs in such blocks


def _structure(spelled: Spelled, layers: Mapping[str, Spelled]) -> list[int]:
    """The block size the file names for a layer: the common one, if that gives it."""
    sizes = [(matrix_shape(s.shape), s.block_size) for s in layers.values()]
    size, shape = spelled.block_size or BLOCK, matrix_shape(spelled.shape)
    shared = common(sizes, max)
    same = grid_shape(shape, size) == grid_shape(shape, shared)
    return list(shared if same else size)


def _format(kind: str) -> str:
    return "mxfp8-quantized" if "uint8" in kind else "float-quantized"
