"""Files that ``config.json`` explains: of transformers, DeepSeek and vLLM."""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hijack.checkpoint.claim import Certainty
from hijack.checkpoint.dialect import FileMarks, Row, Spelled
from hijack.checkpoint.header import CONFIG_KEY, Header
from hijack.errors import CheckpointError
from schemes._fp8_blocks import (
    FP8_DTYPES,
    POWER_DTYPES,
    SCALE_DTYPES,
    Pair,
    block_size_of,
    grid_shape,
    matrix_shape,
    parse_block_size,
)
from schemes._fp8_dialects import mx
from schemes._fp8_dialects.base import Found, FP8Dialect, Said, is_power, rows_of
from schemes._fp8_dialects.markers import marked

#: DeepSeek's blocks, and everybody's after it.
BLOCK = (128, 128)
Layers = Mapping[str, tuple[tuple[int, ...], Pair | None]]


class ConfiguredDialect(FP8Dialect):
    """A dialect whose files say how they were quantized in ``quantization_config``.

    It stands in ``config.json``. Since that is easily lost, hijack also writes it into
    the header's metadata, and reads it there first.
    """

    scale_dtypes = (*SCALE_DTYPES, *POWER_DTYPES)

    def unmark(
        self, metadata: Mapping[str, str], keys: Collection[str], layers: Iterable[str]
    ) -> tuple[dict[str, str], set[str]]:
        """Drop the config: it is of the whole file."""
        return {k: v for k, v in metadata.items() if k != CONFIG_KEY}, set()

    def marks(self, config: Mapping[str, object]) -> FileMarks:
        """The config, for both places."""
        return FileMarks({CONFIG_KEY: json.dumps(config)}, config=config)


class DeepSeekDialect(ConfiguredDialect):
    """What DeepSeek and transformers' FineGrainedFP8 write: ``X.weight_scale_inv``.

    In spite of its name it multiplies. All layers of a file have blocks of one size,
    which the config says; those at the edges may be short.
    """

    name = "deepseek"
    scales = ("weight_scale_inv", "scale", "qscale_weight")
    inputs = ("activation_scale", "input_scale", "qscale_act")
    row = Row(
        "DeepSeek, transformers (FineGrainedFP8), Qwen, MiniMax, Mistral",
        "X.weight, X.weight_scale_inv; also X.scale, X.qscale_weight; "
        "X.activation_scale",
        "F32, or U8 or F8_E8M0 exponents, (ceil(N/R), ceil(K/C)) or ()",
        "128 x 128; edge blocks are short",
        "config.json: quant_method fp8, weight_block_size",
        "yes",
    )

    def said(self, header: Header, found: Found) -> Said | None:
        """The config's block size, or all if it says there are none."""
        config = header.quantization
        if config.get("quant_method") not in (None, "fp8", "deepseek_fp8"):
            return None
        if "weight_block_size" not in config:
            size = found.shape if found.grid == (1, 1) else None
            return Said(Certainty.UNIQUE, size=size)
        size = found.shape
        given = config["weight_block_size"]
        pair = _pair(given)
        if given is not None and pair is None:
            problem = f"weight_block_size is {given!r}, expected two positive integers"
            return Said(Certainty.UNIQUE, contradiction=problem)
        if pair is not None:
            size = parse_block_size(pair, found.shape)
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
        return _with_defaults(options)

    def settle(self, layers: Layers) -> dict[str, Any]:
        """The largest blocks that divide everybody's, or none if all are whole."""
        sizes = [(matrix_shape(shape), size) for shape, size in layers.values()]
        if all(size in (None, shape) for shape, size in sizes):
            return {"block_size": "tensor"}
        return {"block_size": _common(sizes, math.gcd)}

    def blocks(
        self, shape: tuple[int, ...], block_size: Pair, options: Mapping[str, Any]
    ) -> Sequence[Pair]:
        """The file's block size."""
        size = options.get("block_size", block_size)
        return [parse_block_size(size, matrix_shape(shape))]

    def finish(
        self, layers: Mapping[str, Spelled], others: Collection[str]
    ) -> FileMarks:
        """The config of transformers' FineGrainedFP8Config.

        Raises:
            CheckpointError: if the layers have blocks that no one size gives.
        """
        if not layers:
            return FileMarks()
        scales = [spelled.tensors["weight_scale_inv"] for spelled in layers.values()]
        scalar = [not scale.shape for scale in scales]
        powers = {scale.torch_dtype in POWER_DTYPES for scale in scales}
        size = None if all(scalar) else self._one_size(layers)
        if len(powers) > 1 or (any(scalar) and not all(scalar)):
            raise CheckpointError(
                "dialect deepseek: the layers have scales of several kinds; expected "
                "all float or all exponents, all with blocks or all without; quantize "
                "all with the same options"
            )
        return self.marks(
            {
                "quant_method": "fp8",
                "fmt": "e4m3",
                "activation_scheme": "dynamic",
                "weight_block_size": None if size is None else list(size),
                **({"scale_fmt": "ue8m0"} if True in powers else {}),
                "modules_to_not_convert": _dense_layers(others),
            }
        )

    def _one_size(self, layers: Mapping[str, Spelled]) -> Pair:
        """The block size that gives every layer the blocks it has."""
        sizes = {
            layer: (matrix_shape(spelled.shape), spelled.block_size)
            for layer, spelled in layers.items()
        }
        common = _common(sizes.values(), max)
        for layer, (shape, size) in sizes.items():
            if size and grid_shape(shape, size) != grid_shape(shape, common):
                raise CheckpointError(
                    f"{layer}: has blocks of {size[0]}x{size[1]}, others need "
                    f"{common[0]}x{common[1]}; dialect deepseek has one block_size for "
                    "a file; quantize all layers with the same"
                )
        return common


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
        named = None
        for size, text in _groups(config, found.shape):
            named = Said(Certainty.MARKED, f"config says {text}", size)
            if size is not None and grid_shape(found.shape, size) == found.grid:
                return named
        return named or Said(Certainty.UNIQUE)

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
        return _with_defaults(options)

    def finish(
        self, layers: Mapping[str, Spelled], others: Collection[str]
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
                "ignore": _dense_layers(others),
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
        if strategy == "block" and (pair := _pair(block)):
            size = parse_block_size(pair, shape)
        if strategy == "group" and type(columns) is int and columns > 0:
            size = (1, min(columns, shape[1]))
        yield size, f"strategy {strategy}"


def _arguments(spelled: Spelled, layers: Mapping[str, Spelled]) -> dict[str, object]:
    """How a layer was quantized, in the words of compressed-tensors."""
    shape = matrix_shape(spelled.shape)
    size = spelled.block_size or shape
    common: dict[str, object] = {
        "num_bits": 8,
        "type": "float",
        "symmetric": True,
        "dynamic": False,
    }
    scale = spelled.tensors["weight_scale"]
    if scale.dtype == "U8":
        extra = {"group_size": mx.COLS, "scale_dtype": "torch.uint8"}
        return {**common, "strategy": "group", **extra}
    if len(scale.shape) == 1:
        return {**common, "strategy": "tensor"}
    if rows_of(shape, size):
        return {**common, "strategy": "channel"}
    block = _structure(spelled, layers)
    return {**common, "strategy": "block", "block_structure": block}


def _activations(weights: Mapping[str, object]) -> dict[str, object] | None:
    """How readers shall quantize inputs, as presets for such weights have it."""
    common = {"num_bits": 8, "type": "float", "symmetric": True, "dynamic": True}
    if weights["strategy"] in ("channel", "tensor"):
        return {**common, "strategy": "token"}
    if weights["strategy"] == "group":
        columns = {"group_size": mx.COLS, "scale_dtype": "torch.uint8"}
        return {**common, "strategy": "group", **columns}
    if weights.get("block_structure") == list(BLOCK):
        return {**common, "strategy": "group", "group_size": BLOCK[1]}
    return None  # no kernel takes inputs in such blocks


def _structure(spelled: Spelled, layers: Mapping[str, Spelled]) -> list[int]:
    """The block size the file names for a layer: the common one, if that gives it."""
    sizes = [(matrix_shape(s.shape), s.block_size) for s in layers.values()]
    size, shape = spelled.block_size or BLOCK, matrix_shape(spelled.shape)
    common = _common(sizes, max)
    same = grid_shape(shape, size) == grid_shape(shape, common)
    return list(common if same else size)


def _format(kind: str) -> str:
    return "mxfp8-quantized" if "uint8" in kind else "float-quantized"


def _common(sizes: Iterable[tuple[Pair, Pair | None]], choose: Any) -> Pair:
    """One block size for many layers, each side chosen among those that matter.

    A side as long as the weight's says nothing, except that the result must not be
    shorter. Where nobody says anything it is DeepSeek's, or longer.
    """
    known = [(shape, size) for shape, size in sizes if size is not None]
    sides = []
    for axis in (0, 1):
        real = {size[axis] for shape, size in known if size[axis] < shape[axis]}
        longest = max((shape[axis] for shape, _ in known), default=0)
        side = 0
        for one in sorted(real):
            side = choose(side, one)
        sides.append(side or max(BLOCK[axis], longest))
    return sides[0], sides[1]


def _with_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    return {"block_size": BLOCK, "scale_dtype": torch.float32, **options}


def _exponents(scale: Tensor) -> Tensor:
    """Exponents under their own dtype, as transformers expects them."""
    return scale.view(POWER_DTYPES[0]) if is_power(scale) else scale


def _dense_layers(others: Collection[str]) -> list[str]:
    """Layers whose weights stay dense, which readers would else expect codes of."""
    return [key.removesuffix(".weight") for key in others if key.endswith(".weight")]


def _pair(given: object) -> Pair | None:
    """Two positive integers, or None."""
    if not isinstance(given, list | tuple) or len(given) != 2:
        return None
    if not all(type(size) is int and size > 0 for size in given):
        return None
    return given[0], given[1]
