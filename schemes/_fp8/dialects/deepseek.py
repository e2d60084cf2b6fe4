"""Files of DeepSeek, and of transformers, which writes what DeepSeek began with."""

from __future__ import annotations

import bisect
import dataclasses
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from hijack.errors import CheckpointError
from hijack.formats.claim import Certainty
from hijack.formats.dialect import FileMarks, Row, Spelled
from hijack.safetensors_io.header import Header, TensorInfo
from schemes._fp8.blocks import (
    FP8_DTYPES,
    POWER_DTYPES,
    Pair,
    columns_of,
    grid_shape,
    matrix_shape,
    parse_block_size,
)
from schemes._fp8.dialects.base import Found, Said, is_power
from schemes._fp8.dialects.configured import (
    BLOCK,
    ConfiguredDialect,
    common,
    dense_layers,
    pair,
    with_defaults,
)
from schemes._fp8.dialects.markers import marked

Layers = Mapping[str, tuple[tuple[int, ...], Pair | None]]

_NOTE = (
    "most readers of deepseek only take blocks of 128x128; for them quantize the "
    "original with block_size 128x128 (--block-size 128x128)"
)


class DeepSeekDialect(ConfiguredDialect):
    """What DeepSeek and transformers' FineGrainedFP8 write: ``X.weight_scale_inv``.

    In spite of its name it multiplies. All layers of a file have blocks of one size,
    which the config says; those at the edges may be short.
    """

    name = "deepseek"
    scales = ("weight_scale_inv", "scale", "qscale_weight", "weight_scale")
    inputs = ("activation_scale", "input_scale", "qscale_act")
    row = Row(
        "DeepSeek, transformers (FineGrainedFP8), Qwen, MiniMax, Mistral",
        "X.weight, X.weight_scale_inv; also X.scale, X.qscale_weight, with a "
        "config X.weight_scale; X.activation_scale",
        "F32, or U8 or F8_E8M0 exponents, (ceil(N/R), ceil(K/C)) or ()",
        "128 x 128; edge blocks are short",
        "config.json: quant_method fp8, weight_block_size",
        "yes",
    )

    def said(self, header: Header, found: Found) -> Said | None:
        """The config's block size, or all if it says there are none."""
        config = header.quantization
        method = config.get("quant_method")
        if method not in (None, "fp8", "deepseek_fp8", "mxfp8"):
            return None
        if "weight_scale" in found.keys and (
            method not in ("fp8", "deepseek_fp8")
            or config.get("weight_block_size") is None
            or marked(header, found.layer)
        ):
            return None  # the name is that of many
        if "weight_block_size" not in config:
            size = found.shape if found.grid == (1, 1) else None
            if "scale" not in found.keys:
                return Said(Certainty.UNIQUE, size=size)
            if columns_of(found.shape, found.grid):
                return None  # SDNQ's rows, lying down
            # SDNQ's rows and single scales look the same, and may be rotated
            one = found.grid in ((found.shape[0], 1), (1, 1))
            return Said(Certainty.GUESS if one else Certainty.UNIQUE, size=size)
        size = found.shape
        given = config["weight_block_size"]
        block = pair(given)
        if given is not None and block is None:
            problem = f"weight_block_size is {given!r}, expected two positive integers"
            return Said(Certainty.UNIQUE, contradiction=problem)
        if block is not None:
            size = parse_block_size(block, found.shape)
        return Said(Certainty.MARKED, f"config says weight_block_size {given}", size)

    # -- writing -----------------------------------------------------------------------

    def encode(
        self, qdata: Tensor, params: Mapping[str, Tensor], options: Mapping[str, object]
    ) -> dict[str, Tensor]:
        """The grid as it is, or one number for a whole weight if that was asked for.

        Raises:
            CheckpointError: if the weight is not 2-D or its codes are not E4M3.
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
        """DeepSeek's blocks and float32 scales, if nothing else was asked for."""
        return with_defaults(options)

    def settle(self, layers: Layers) -> dict[str, Any]:
        """The largest blocks that divide everybody's, or none if all are whole."""
        sizes = [(matrix_shape(shape), size) for shape, size in layers.values()]
        if all(size in (None, shape) for shape, size in sizes):
            return {"block_size": "tensor"}
        return {"block_size": common(sizes, math.gcd)}

    def blocks(
        self, shape: tuple[int, ...], block_size: Pair, options: Mapping[str, Any]
    ) -> Sequence[Pair]:
        """The file's block size."""
        size = options.get("block_size", block_size)
        return [parse_block_size(size, matrix_shape(shape))]

    def finish(
        self, layers: Mapping[str, Spelled], others: Mapping[str, TensorInfo]
    ) -> FileMarks:
        """The config of transformers' FineGrainedFP8Config.

        Raises:
            CheckpointError: if the layers have blocks that no one size gives.
        """
        if not layers:
            return FileMarks()
        scales = {la: made.tensors["weight_scale_inv"] for la, made in layers.items()}
        kinds = {_kind(scale): layer for layer, scale in scales.items()}
        if len(kinds) > 1:
            found = ", ".join(f"{layer} has {kind}" for kind, layer in kinds.items())
            raise CheckpointError(
                f"dialect deepseek: {found}; expected scales of one kind in a file; "
                "quantize all layers with the same options"
            )
        scale = next(iter(scales.values()))
        size = self._one_size(layers) if scale.shape else None
        marks = self.marks(
            {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": None if size is None else list(size),
                **({"scale_fmt": "ue8m0"} if scale.torch_dtype in POWER_DTYPES else {}),
                "modules_to_not_convert": _patterns(dense_layers(others), layers),
            }
        )
        return marks if size == BLOCK else dataclasses.replace(marks, notes=(_NOTE,))

    def _one_size(self, layers: Mapping[str, Spelled]) -> Pair:
        """The block size that gives every layer the blocks it has."""
        sizes = {
            layer: (matrix_shape(spelled.shape), spelled.block_size)
            for layer, spelled in layers.items()
        }
        shared = common(sizes.values(), max)
        for layer, (shape, size) in sizes.items():
            if size and grid_shape(shape, size) != grid_shape(shape, shared):
                raise CheckpointError(
                    f"{layer}: has blocks of {size[0]}x{size[1]}, others need "
                    f"{shared[0]}x{shared[1]}; dialect deepseek has one block_size for "
                    "a file; quantize all layers with the same"
                )
        return shared


def _patterns(dense: Iterable[str], quantized: Iterable[str]) -> list[str]:
    """Names as transformers matches them: as they are, or whole where need be.

    It takes a name for everything below it and for every end of a longer one; dense
    ``proj_out`` would keep it from reading the codes of ``blocks.0.proj_out``.
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
    """Whether one of some sorted names begins so."""
    at = bisect.bisect_left(names, start)
    return at < len(names) and names[at].startswith(start)


def _kind(scale: TensorInfo) -> str:
    """What all scales of a file must have in common, in words."""
    numbers = "exponents" if scale.torch_dtype in POWER_DTYPES else "floats"
    return f"{numbers} for blocks" if scale.shape else f"{numbers} without blocks"


def _exponents(scale: Tensor) -> Tensor:
    """Exponents under their own dtype, as transformers expects them."""
    return scale.view(POWER_DTYPES[0]) if is_power(scale) else scale
