"""Files of Black Forest Labs, torchao and quanto; and hijack's own."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hijack.errors import ShapeError
from hijack.formats.claim import Certainty, Claim
from hijack.formats.dialect import Dialect, FileMarks, Row, Spelled, native_claim
from hijack.formats.native_marker import METADATA_KEY, native_marker
from hijack.safetensors_io.header import Header, TensorInfo, join, parse_table
from hijack.scheme import Scheme
from schemes._fp8.blocks import (
    FP8_DTYPES,
    POWER_DTYPES,
    SCALE_DTYPES,
    Pair,
    block_size_of,
    divides,
    grid_of,
    infer_block_size,
    matrix_shape,
    parse_block_size,
    possible_sizes,
)
from schemes._fp8.dialects import mx
from schemes._fp8.dialects.base import Found, FP8Dialect, Said, is_power
from schemes._fp8.dialects.markers import WEIGHT_DATA, marked

_SCALE = "_weight_scale"


class RowwiseDialect(FP8Dialect):
    """Black Forest Labs' fp8r: one scale for a row, and nothing that says so.

    FBGEMM's has a dimension more, a config, and a limit for the scales of inputs.
    """

    name = "fp8r"
    inputs = ("input_scale", "input_scale_ub")
    row = Row(
        "Black Forest Labs, read by diffusers; FBGEMM",
        "X.weight, X.weight_scale; FBGEMM: X.input_scale_ub",
        "F32 (N,); FBGEMM: (N, 1)",
        "rows",
        "none; FBGEMM: config.json, quant_method fbgemm_fp8",
    )

    def said(self, header: Header, found: Found) -> Said | None:
        """Claim a scale for each row, where no marker does; a config says more."""
        if marked(header, found.layer):
            return None
        size = 1, found.shape[1]
        if header.quantization.get("quant_method") == "fbgemm_fp8":
            rows = found.grid == (found.shape[0], 1)
            said = Said(Certainty.MARKED, "config says fbgemm_fp8", size)
            return said if rows else None
        rows = found.scale.shape == found.shape[:1] and found.shape[0] > 1
        return Said(Certainty.FITS, size=size) if rows else None


class TorchaoDialect(FP8Dialect):
    """torchao's Float8Tensor: ``X._weight_qdata``, ``X._weight_scale``, and metadata.

    The header's metadata holds ``tensor_names`` and, for each of those, JSON with the
    class of the tensor and what its constructor takes, ``block_size`` among it.
    """

    name = "torchao"
    weight = WEIGHT_DATA
    scales = (_SCALE,)
    scale_dtypes = (*SCALE_DTYPES, *POWER_DTYPES)
    ranks = (1, 2, 3)
    inputs = ()
    row = Row(
        "torchao (Float8Tensor, MXTensor)",
        "X._weight_qdata, X._weight_scale",
        "F32 (N/R, K/C); MXTensor: F8_E8M0 (N, K/32), in plain order",
        "rows, all, or 128 x 128; must divide; MXTensor: 1 x 32",
        "metadata `tensor_names`, and one entry for each",
        "yes",
    )

    def said(self, header: Header, found: Found) -> Said | None:
        """The ``block_size`` of the layer's entry."""
        entry = parse_table(header.metadata.get(join(found.layer, "weight"), ""))
        kind, data = entry.get("_type"), entry.get("_data")
        data = data if isinstance(data, dict) else {}
        if found.scale.torch_dtype in POWER_DTYPES:
            plain = mx.is_mx(found) and mx.is_plain(found)
            if kind != "MXTensor" or not plain or data.get("is_swizzled_scales"):
                return None
            return Said(Certainty.MARKED, "metadata says MXTensor", (1, mx.COLS))
        if kind is None:
            return Said(Certainty.UNIQUE)
        if kind != "Float8Tensor":
            return None
        given = data.get("block_size")
        if not given or not isinstance(given, list) or not all(_positive(given)):
            return Said(Certainty.MARKED, "metadata says Float8Tensor")
        size = parse_block_size((given[0], math.prod(given[1:])), found.shape)
        return Said(Certainty.MARKED, f"metadata says block_size {given}", size)

    def unmark(
        self, metadata: Mapping[str, str], keys: Collection[str], layers: Iterable[str]
    ) -> tuple[dict[str, str], set[str]]:
        """Drop the names and entries of all tensors, which are of the whole file."""
        names = parse_list(metadata.get("tensor_names", ""))
        gone = {"tensor_names", *names, *(join(layer, "weight") for layer in layers)}
        return {k: v for k, v in metadata.items() if k not in gone}, set()

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
            can = "floating scales of blocks that divide a 2-D weight"
            raise self.cannot(qdata, params, can)
        return {WEIGHT_DATA: qdata, _SCALE: scale.float()}

    def fit_options(
        self, shape: tuple[int, ...], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Rows and float32 scales, if nothing else was asked for."""
        return {"block_size": "row", "scale_dtype": torch.float32, **options}

    def blocks(
        self, shape: tuple[int, ...], block_size: Pair, options: Mapping[str, Any]
    ) -> Sequence[Pair]:
        """The blocks there are, or finer ones that divide."""
        n, k = matrix_shape(shape)
        finer = (math.gcd(block_size[0], n), math.gcd(block_size[1], k))
        return [block_size] if finer == block_size else [finer]

    def finish(
        self, layers: Mapping[str, Spelled], others: Mapping[str, TensorInfo]
    ) -> FileMarks:
        """The entries of all tensors, and their names."""
        if not layers:
            return FileMarks()
        metadata = {
            key: json.dumps({"_type": "Tensor"}) for key in others if "." in key
        }
        for layer, spelled in layers.items():
            metadata[join(layer, "weight")] = json.dumps(
                _float8_tensor(spelled, _dense_dtype(layer, others))
            )
        names = json.dumps(list(metadata))
        return FileMarks({**metadata, "tensor_names": names})


class QuantoDialect(FP8Dialect):
    """optimum-quanto's qfloat8: ``X.weight._data`` and ``X.weight._scale``."""

    name = "quanto"
    weight = "weight._data"
    scales = ("weight._scale",)
    inputs = ("input_scale", "output_scale")
    row = Row(
        "optimum-quanto (qfloat8)",
        "X.weight._data, X.weight._scale, X.input_scale, X.output_scale",
        "model's dtype (N, 1)",
        "rows",
        "none in the file; a JSON map apart from it",
    )

    def layers(self, header: Header) -> Iterable[str]:
        """The layers whose weight has a part ``_scale``."""
        owners = header.owners.get("_scale", ())
        return [
            layer.removesuffix("weight").removesuffix(".")
            for layer in owners
            if layer == "weight" or layer.endswith(".weight")
        ]

    def grid(self, scale: tuple[int, ...], shape: Pair) -> Pair | None:
        """A scale for each row, with a dimension for each of the weight's."""
        rows = (shape[0], *[1] * (len(scale) - 1))
        return (shape[0], 1) if scale == rows else super().grid(scale, shape)

    def said(self, header: Header, found: Found) -> Said | None:
        """Claim what has the two parts."""
        return Said(Certainty.UNIQUE)


class NativeFP8Dialect(Dialect):
    """hijack's own: the scheme's names, and a marker of block size where one is short.

    Without hijack's metadata the block size is taken from the shapes, if they leave no
    doubt; other tools write a ``weight_scale`` too.
    """

    def layers(self, header: Header) -> Iterable[str]:
        """The layers with a scale of that name, and those the metadata names."""
        return [
            *header.owners.get("weight_scale", ()),
            *header.said_of_layers(METADATA_KEY),
        ]

    def readings(self, scheme: Scheme, header: Header, layer: str) -> Iterator[Claim]:
        """Every block size the layer may have; more than one is a guess."""
        claim = self.recognise(scheme, header, layer)
        if claim is not None:
            yield claim
        elif native_marker(header, layer) is None:
            for size in _fitting(header, layer)[0]:
                names = ("weight_scale",)
                yield native_claim(
                    layer, scheme.name, names, size, certainty=Certainty.GUESS
                )

    def recognise(self, scheme: Scheme, header: Header, layer: str) -> Claim | None:
        """The claim to a layer whose block size is beyond doubt."""
        if native_marker(header, layer) is None:
            sizes, sure = _fitting(header, layer)
            if not sure:
                return None
            names = [
                name
                for name in ("weight_scale", "weight_block_size")
                if join(layer, name) in header.tensors
            ]
            return native_claim(layer, scheme.name, names, sizes[0])
        claim = super().recognise(scheme, header, layer)
        if claim is None or claim.block_size is not None:
            return claim
        tensors = header.tensors
        block = tensors.get(claim.keys.get("weight_block_size", ""))
        weight = tensors[claim.keys["weight"]]
        try:
            size = infer_block_size(
                weight.shape,
                tensors[claim.keys["weight_scale"]].shape,
                block.shape if block else None,
            )
        except (ShapeError, KeyError):
            return claim
        return native_claim(
            layer, scheme.name, list(claim.keys)[1:], size, certainty=claim.certainty
        )


def _fitting(header: Header, layer: str) -> tuple[list[Pair], bool]:
    """The block sizes of a layer nobody marks, and whether there is no doubt.

    Scales that are powers of two are not among them: their order in the file is not
    known without a marker.
    """
    tensors = header.tensors
    weight = tensors.get(join(layer, "weight"))
    scale = tensors.get(join(layer, "weight_scale"))
    if weight is None or scale is None or weight.torch_dtype not in FP8_DTYPES:
        return [], False
    if scale.torch_dtype not in SCALE_DTYPES or marked(header, layer):
        return [], False
    if header.quantization.get("quant_method") == "compressed-tensors":
        return [], False  # its own dialect reads all of them, and knows more
    block = tensors.get(join(layer, "weight_block_size"))
    shape = matrix_shape(weight.shape)
    try:
        exact = infer_block_size(
            weight.shape, scale.shape, block.shape if block else None
        )
    except ShapeError:
        exact = None
    if block is not None:
        return ([], False) if exact is None else ([exact], True)
    grid = None if 0 in shape or len(scale.shape) > 2 else grid_of(scale.shape, shape)
    if grid is None:
        return ([], False) if exact is None else ([exact], True)
    return possible_sizes(shape, grid)


def parse_list(text: str) -> list[str]:
    """A JSON list of strings, or none."""
    try:
        given = json.loads(text)
    except (ValueError, RecursionError):
        return []
    if not isinstance(given, list):
        return []
    return [name for name in given if isinstance(name, str)]


def _positive(sizes: Sequence[object]) -> Iterator[bool]:
    return (type(size) is int and size > 0 for size in sizes)


def _dense_dtype(layer: str, others: Mapping[str, TensorInfo]) -> torch.dtype:
    """The dtype a layer computes in: its bias's, else that of most other tensors."""
    bias = others.get(join(layer, "bias"))
    found = [bias] if bias is not None else others.values()
    count = Counter(info.torch_dtype for info in found)
    dense = [d for d, _ in count.most_common() if d in SCALE_DTYPES]
    return next((d for d in dense if d is not None), torch.bfloat16)


def _float8_tensor(spelled: Spelled, dense: torch.dtype) -> dict[str, object]:
    """What torchao's constructor takes; weights only, inputs stay as they are."""
    rows, cols = spelled.block_size or spelled.shape
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
