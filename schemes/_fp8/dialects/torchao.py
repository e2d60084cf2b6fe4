"""torchao's files: ``X._weight_qdata``, ``X._weight_scale``, and metadata."""

from __future__ import annotations

import dataclasses
import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import schemes._fp8.dialects.mx as mx
from hijack.claim import Certainty
from hijack.formats.dialect import EncodedLayer, FormatMetadata
from hijack.safetensors_io.header import Header, TensorInfo, join, parse_table
from schemes._blocks import (
    SCALE_DTYPES,
    Pair,
    block_size_of,
    divides,
    matrix_shape,
    parse_block_size,
)
from schemes._fp8.blocks import POWER_DTYPES
from schemes._fp8.dialects.base import (
    TORCHAO_DATA,
    Declared,
    FP8Dialect,
    QuantizedWeightInfo,
    is_power,
)
from schemes._tiles import from_tiles, torchao_shape

#: Name of the scale of a weight.
_SCALE = "_weight_scale"


class TorchaoDialect(FP8Dialect):
    """torchao's Float8Tensor: ``X._weight_qdata``, ``X._weight_scale``, and metadata.

    The header's metadata has ``tensor_names`` and, for each of these, JSON with the
    tensor's class and the arguments of its constructor, including ``block_size``.
    """

    name = "torchao"
    writes = True
    weight = TORCHAO_DATA
    scales = (_SCALE,)
    scale_dtypes = (*SCALE_DTYPES, *POWER_DTYPES)
    ranks = (1, 2, 3)
    inputs = ()

    def grid(self, scale: tuple[int, ...], shape: Pair) -> Pair | None:
        """As in the base class, or tiles, which may have more rows than the weight."""
        tiles = scale == torchao_shape(mx.plain_shape(shape))
        return super().grid(scale, shape) or (mx.plain_shape(shape) if tiles else None)

    def weight_info(self, header: Header, layer: str) -> QuantizedWeightInfo | None:
        """As in the base class; exponents in tiles cover (N, K/32)."""
        info = super().weight_info(header, layer)
        if info is None or not mx.is_tiled_by_torchao(info):
            return info
        if info.scale.torch_dtype in POWER_DTYPES:
            return dataclasses.replace(info, grid=mx.plain_shape(info.shape))
        covered = super().grid(info.scale.shape, info.shape)
        return None if covered is None else info

    def plain(self, scale: Tensor, shape: Pair) -> Tensor:
        """Exponents may be stored in tiles."""
        grid = mx.plain_shape(shape)
        if not is_power(scale) or tuple(scale.shape) != torchao_shape(grid):
            return scale
        return from_tiles(scale.reshape(mx.tiled_shape(shape)), grid)

    def declared(self, header: Header, info: QuantizedWeightInfo) -> Declared | None:
        """The ``block_size`` in the layer's entry."""
        entry = parse_table(header.metadata.get(join(info.layer, "weight"), ""))
        kind, data = entry.get("_type"), entry.get("_data")
        data = data if isinstance(data, dict) else {}
        if info.scale.torch_dtype in POWER_DTYPES:
            tiles = bool(data.get("is_swizzled_scales"))
            fits = mx.is_tiled_by_torchao if tiles else mx.is_plain
            if kind != "MXTensor" or not mx.is_mx(info) or not fits(info):
                return None
            return Declared(Certainty.MARKED, "metadata says MXTensor", (1, mx.COLS))
        if kind is None:
            return Declared(Certainty.UNIQUE)
        if kind != "Float8Tensor":
            return None
        block = data.get("block_size")
        if not block or not isinstance(block, list) or not all(_positive(block)):
            return Declared(Certainty.MARKED, "metadata says Float8Tensor")
        size = parse_block_size((block[0], math.prod(block[1:])), info.shape)
        return Declared(Certainty.MARKED, f"metadata says block_size {block}", size)

    def unmark(
        self, metadata: Mapping[str, str], keys: Collection[str], layers: Iterable[str]
    ) -> tuple[dict[str, str], set[str]]:
        """Drop the names and entries of all tensors; they describe the whole file."""
        return without_entries(metadata, layers), set()

    # -- writing -----------------------------------------------------------------------

    def encode(
        self, qdata: Tensor, params: Mapping[str, Tensor], options: Mapping[str, object]
    ) -> dict[str, Tensor]:
        """The grid in float32, of the rank of the weight.

        Raises:
            CheckpointError: if a block is short, scales are exponents, or the weight
                is not 2-D.
        """
        shape, size = matrix_shape(tuple(qdata.shape)), block_size_of(qdata, params)
        scale = params["weight_scale"]
        if qdata.ndim != 2 or is_power(scale) or not divides(shape, size):
            supported = "floating scales of blocks that divide a 2-D weight"
            raise self.cannot(qdata, params, supported)
        return {TORCHAO_DATA: qdata, _SCALE: scale.float()}

    def fit_options(
        self, shape: tuple[int, ...], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """One float32 scale per row by default."""
        return {"block_size": "row", "scale_dtype": torch.float32, **options}

    def blocks(
        self, shape: tuple[int, ...], block_size: Pair, options: Mapping[str, Any]
    ) -> Sequence[Pair]:
        """The current blocks, or finer ones that divide the weight."""
        n, k = matrix_shape(shape)
        finer = (math.gcd(block_size[0], n), math.gcd(block_size[1], k))
        return [block_size] if finer == block_size else [finer]

    def finish(
        self, layers: Mapping[str, EncodedLayer], others: Mapping[str, TensorInfo]
    ) -> FormatMetadata:
        """The entries of all tensors, and their names."""
        if not layers:
            return FormatMetadata()
        metadata = {
            key: json.dumps({"_type": "Tensor"}) for key in others if "." in key
        }
        for name, layer in layers.items():
            entry = _float8_tensor(layer, _dense_dtype(name, others))
            metadata[join(name, "weight")] = json.dumps(entry)
        names = json.dumps(list(metadata))
        return FormatMetadata({**metadata, "tensor_names": names})


def without_entries(
    metadata: Mapping[str, str], layers: Iterable[str]
) -> dict[str, str]:
    """Metadata without torchao's entries of all tensors.

    Args:
        metadata: of the header.
        layers: layers that have an entry, in case they are not listed.
    """
    names = parse_list(metadata.get("tensor_names", ""))
    gone = {"tensor_names", *names, *(join(layer, "weight") for layer in layers)}
    return {k: v for k, v in metadata.items() if k not in gone}


def parse_list(text: str) -> list[str]:
    """The strings in a JSON list; empty if the text is not one."""
    try:
        names = json.loads(text)
    except (ValueError, RecursionError):
        return []
    listed = names if isinstance(names, list) else []
    return [name for name in listed if isinstance(name, str)]


def _positive(sizes: Sequence[object]) -> Iterator[bool]:
    return (type(size) is int and size > 0 for size in sizes)


def _dense_dtype(layer: str, others: Mapping[str, TensorInfo]) -> torch.dtype:
    """The dtype a layer computes in: its bias's, else that of most other tensors."""
    bias = others.get(join(layer, "bias"))
    infos = [bias] if bias is not None else others.values()
    count = Counter(info.torch_dtype for info in infos)
    dense = [d for d, _ in count.most_common() if d in SCALE_DTYPES]
    return next((d for d in dense if d is not None), torch.bfloat16)


def _float8_tensor(layer: EncodedLayer, dense: torch.dtype) -> dict[str, object]:
    """The arguments of torchao's constructor; inputs are not quantized."""
    rows, cols = layer.block_size or layer.shape
    name = str(dense).removeprefix("torch.")
    dtype = {"_type": "torch.dtype", "_data": name}
    return {
        "_type": "Float8Tensor",
        "_data": {
            "block_size": [rows, cols],
            "mm_config": None,
            "act_quant_kwargs": None,
            "kernel_preference": {"_type": "KernelPreference", "_data": "AUTO"},
            "dtype": dtype,
        },
        "_tensor_data_names": ["qdata", "scale"],
    }
