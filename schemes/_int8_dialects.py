"""How programs store INT8 weights: the names of their tensors, and what marks them."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from hijack.claim import Certainty, Claim
from hijack.errors import CheckpointError
from hijack.formats.comfy_quant import ComfyQuantDialect
from hijack.formats.comfyui_markers import FULL_PRECISION, LAYER_MARKER, wrong_format
from hijack.formats.configured import ConfiguredFiles
from hijack.formats.dialect import Dialect, EncodedLayer, FormatMetadata
from hijack.formats.tensor_dialect import Reading, TensorDialect
from hijack.safetensors_io.header import (
    Header,
    TensorInfo,
    join,
    parse_table,
)
from hijack.scheme import Scheme
from hijack.text import block_text, excerpt
from schemes._blocks import (
    Pair,
    block_size_of,
    grid_of,
    grid_shape,
    make_params,
    matrix_shape,
    parse_block_size,
    possible_sizes,
    sized,
)
from schemes._fp8.dialects.configured import block_pair, dense_layers
from schemes._fp8.dialects.torchao import without_entries
from schemes._rotation import ROTATIONS, rotation_marker
from schemes._sdnq import EXTRA, asks_for

#: Roles of tensors to ends of keys, or to dtypes.
Ends = Mapping[str, tuple[str, ...]]
#: The option of layers whose inputs are quantized too.
INPUTS = "quantized_inputs"
#: Entries of a marker that say whether a weight is rotated.
_TELLING = frozenset({"convrot", "per_row"})
#: Tensors of weights that are more than codes times scales.
_OFFSETS = frozenset({"weight_zero_point", "weight_offset", "weight_g_idx"})

# -- what all have in common -----------------------------------------------------------


class NativeInt8(Dialect):
    """The scheme's own names."""

    needs = ("weight_scale",)

    def recognise(self, scheme: Scheme, header: Header, layer: str) -> Claim | None:
        """As in the base class, with the size of the blocks."""
        claim = super().recognise(scheme, header, layer)
        return None if claim is None else sized(claim, header)


class Int8Dialect(TensorDialect):
    """Codes and scales that multiply them; the shapes tell the blocks."""

    names: ClassVar[Ends] = {"weight": ("weight",), "weight_scale": ("weight_scale",)}
    dtypes: ClassVar[Ends] = {"weight": ("I8",), "weight_scale": ("F32", "BF16", "F16")}
    inputs: tuple[str, ...] = ("input_scale",)

    def decode(
        self, claim: Claim, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """View the scale as the scheme's grid, and say how the weight is rotated.

        Raises:
            CheckpointError: if no weight is rotated so.
        """
        weight, scale = tensors["weight"], tensors["weight_scale"]
        shape = matrix_shape(tuple(weight.shape))
        size = parse_block_size(claim.block_size or "tensor", shape)
        rotation = claim.options.get("rotation", "0")
        if rotation not in map(str, ROTATIONS):
            raise CheckpointError(
                f"{claim.layer}: is marked as rotated in groups of {rotation}, "
                f"expected one of {', '.join(map(str, ROTATIONS[1:]))}; get the file "
                "again"
            )
        params = make_params(scale, shape, size)
        return weight, params | rotation_marker(int(rotation), weight.device)


def sizes_of(
    infos: Mapping[str, TensorInfo], declared: Pair | None = None
) -> tuple[list[Pair], bool, str]:
    """The blocks a layer may have, whether they are certain, and what is wrong.

    Args:
        infos: role to dtype and shape.
        declared: the size that a marker names.
    """
    weight, scale = infos["weight"].shape, infos["weight_scale"].shape
    while len(scale) > 2 and scale[-1] == 1:
        scale = scale[:-1]
    shape = matrix_shape(weight)
    grid = None if 0 in weight else grid_of(scale, shape)
    if grid is None:
        return [], False, ""
    if declared is not None and grid_shape(shape, declared) == grid:
        return [declared], True, ""
    wrong = ""
    if declared is not None:
        wrong = (
            f"is declared to have blocks of {block_text(declared)}, which give "
            f"{list(grid_shape(shape, declared))} scales; there are {list(grid)}"
        )
    return *possible_sizes(shape, grid), wrong


def readings_of(
    infos: Mapping[str, TensorInfo],
    certainty: Certainty,
    evidence: str = "",
    declared: Pair | None = None,
    options: Mapping[str, str] | None = None,
) -> Iterator[Reading]:
    """A reading for each size the blocks may have; of several, all are guesses."""
    sizes, certain, wrong = sizes_of(infos, declared)
    for size in sizes:
        yield Reading(
            certainty if certain else Certainty.GUESS,
            evidence,
            options or {},
            size,
            mismatch=wrong,
        )


# -- ComfyUI ---------------------------------------------------------------------------


class ComfyInt8(ComfyQuantDialect, Int8Dialect):
    """ComfyUI's ``int8_tensorwise``, and convert_to_quant's ``int8_blockwise``.

    ComfyUI has one scale for the weight or one for each row, and quantizes inputs
    unless the marker says ``full_precision_matrix_mult``. INT8-Fast and comfy-quants
    leave ``format`` out. Without any marker nothing tells whether a weight is rotated.
    """

    writes = True
    stores = (INPUTS,)
    inputs: tuple[str, ...] = ()
    ignored = (LAYER_MARKER, "input_scale")  # inputs have the scales of their tokens
    formats = ("int8_tensorwise", "int8_blockwise")
    known = (
        *("convrot", "convrot_groupsize", "per_row", "group_size", "num_experts"),
        FULL_PRECISION,
    )

    def marked(
        self, marker: Mapping[str, Any], infos: Mapping[str, TensorInfo]
    ) -> Iterable[Reading]:
        """What the marker says; the shapes win where they do not match it."""
        shape = matrix_shape(infos["weight"].shape)
        if marker.get("format") == "int8_blockwise":
            size = marker.get("group_size")
            options = _rotation(marker)
            if type(size) is not int or size < 1:
                return readings_of(infos, Certainty.MARKED, options=options)
            block = (min(size, shape[0]), min(size, shape[1]))
            return readings_of(infos, Certainty.MARKED, "", block, options)
        sizes = [(1, shape[1]), shape]
        weight = infos["weight"].shape
        if weight[:1] == (marker.get("num_experts"),):
            sizes.append((1, weight[-1]))  # rows of each expert
        fitting = (size for size in sizes if not sizes_of(infos, size)[2])
        size = next(fitting, sizes[0])
        # as many as there are rows, but in a row: blocks of columns, or transposed
        odd = infos["weight_scale"].shape == (1, shape[0]) != (1, 1)
        certainty = Certainty.GUESS if odd and shape[0] > 1 else Certainty.MARKED
        return readings_of(infos, certainty, "", size, _options(marker))

    def unmarked(
        self,
        marker: Mapping[str, Any] | None,
        header: Header,
        layer: str,
        infos: Mapping[str, TensorInfo],
    ) -> Iterable[Reading]:
        """Certain if a marker without ``format`` says whether the weight is rotated."""
        wrong = "" if marker is None else wrong_format(header, layer, marker)
        if marker is not None and not wrong:
            return  # another scheme's
        if _OFFSETS & header.parts[layer].keys() or _has_dialect(header):
            return
        possible: list[dict[str, str]] = [
            {"rotation": str(rotation)} for rotation in _possible_rotations(infos)
        ]
        certainty = Certainty.GUESS
        if marker and not marker.get("format") and _TELLING & marker.keys():
            certainty, possible = Certainty.UNIQUE, [_options(marker)]
        for options in possible:
            for reading in readings_of(infos, certainty, options=options):
                mismatch = f"{layer}: {wrong}" if wrong else ""
                yield dataclasses.replace(reading, mismatch=mismatch)

    def store(self, qdata: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One float32 scale for the weight, or (N, 1).

        Raises:
            CheckpointError: if the scales are of other blocks, or the weight is no
                matrix.
        """
        size, scale = block_size_of(qdata, params), params["weight_scale"].float()
        if qdata.ndim != 2 or size not in (tuple(qdata.shape), (1, qdata.shape[1])):
            raise CheckpointError(
                f"dialect {self.name}: cannot write blocks of {block_text(size)} for a "
                f"weight {list(qdata.shape)}, expected rows or one scale for a matrix; "
                "write it in dialect 'hijack', or choose another block_size"
            )
        if size == tuple(qdata.shape) and qdata.shape[0] > 1:
            scale = scale.view(())
        return {"weight": qdata, "weight_scale": scale}

    def entry(
        self,
        quantized: Mapping[str, TensorInfo],
        stored: Mapping[str, TensorInfo],
        options: Mapping[str, str],
    ) -> dict[str, object]:
        """The marker, as ComfyUI writes it."""
        entry: dict[str, object] = {"format": "int8_tensorwise"}
        if options.get(INPUTS, "").lower() != "true":
            entry[FULL_PRECISION] = True
        if "weight_rotation" in quantized:
            entry["convrot"] = True
            entry["convrot_groupsize"] = quantized["weight_rotation"].shape[0]
        return entry

    def fit_options(
        self, shape: tuple[int, ...], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Inputs quantized too unless something else is asked for, as in ComfyUI."""
        return {INPUTS: True, **options}

    def blocks(
        self, shape: tuple[int, ...], block_size: Pair, options: Mapping[str, Any]
    ) -> Sequence[Pair]:
        """One scale for the weight if there is one, or rows."""
        whole = matrix_shape(shape)
        rows = (1, whole[1])
        return [whole, rows] if block_size == whole else [rows]


def _has_dialect(header: Header) -> bool:
    """Whether the config names a program with a dialect of its own here."""
    method = header.quantization.get("quant_method")
    return method in ("compressed-tensors", "modelopt", "sdnq")


def _options(marker: Mapping[str, Any]) -> dict[str, str]:
    """Rotation and kind of product, as ComfyUI reads them."""
    full = bool(marker.get(FULL_PRECISION))
    return {INPUTS: "false" if full else "true", **_rotation(marker)}


def _rotation(marker: Mapping[str, Any]) -> dict[str, str]:
    """Rotation; a text that no rotation is where it cannot be known."""
    rotated = marker.get("convrot")
    if isinstance(rotated, str) and rotated.lower() == "true":
        rotated = True
    if rotated is None or rotated is False or rotated == 0:
        return {}
    if rotated is not True and rotated != 1:  # ComfyUI takes "false" for true
        return {"rotation": f"convrot {excerpt(repr(rotated))}"}
    return {"rotation": str(marker.get("convrot_groupsize", 256))}


def _possible_rotations(infos: Mapping[str, TensorInfo]) -> list[int]:
    """None first, then ComfyUI's usual 256, then others that divide the columns."""
    columns = matrix_shape(infos["weight"].shape)[1]
    groups = [group for group in (256, 64, 16, 1024) if columns % group == 0]
    return [0, *groups] if len(infos["weight"].shape) == 2 else [0]


# -- others ----------------------------------------------------------------------------


class CompressedTensorsInt8(ConfiguredFiles, Int8Dialect):
    """compressed-tensors, as its config describes the groups of layers.

    Where inputs are not quantized (W8A16) it packs four columns into an int32, the
    first in the low bits, and adds 128 to each.
    """

    name = "compressed_tensors"
    writes = True
    stores = (INPUTS,)
    names: ClassVar[Ends] = {
        "weight": ("weight", "weight_packed"),
        "weight_scale": ("weight_scale",),
        "weight_shape": ("weight_shape",),
    }
    dtypes: ClassVar[Ends] = {**Int8Dialect.dtypes, "weight": ("I8", "I32")}
    optional = ("weight_shape",)

    def interpret(
        self, header: Header, layer: str, infos: Mapping[str, TensorInfo]
    ) -> Iterable[Reading]:
        """The group of the config whose scales would have these shapes."""
        config = header.quantization
        if config.get("quant_method") != "compressed-tensors":
            return
        if _OFFSETS & header.parts[layer].keys():
            return  # asymmetric, or in another order
        packed = infos["weight"].dtype == "I32"
        if packed:
            infos = {**infos, "weight": _unpacked(infos["weight"])}
        shape = matrix_shape(infos["weight"].shape)
        groups = config.get("config_groups")
        possible: dict[Pair, Reading] = {}
        for group in groups.values() if isinstance(groups, dict) else ():
            weights = group.get("weights") if isinstance(group, dict) else None
            if not isinstance(weights, dict) or weights.get("type") != "int":
                continue
            form = group.get("format")
            if form is not None and (form == "pack-quantized") != packed:
                continue
            if packed and weights.get("num_bits") != 8:
                return  # other integers, whose shapes may be the same
            if weights.get("num_bits") != 8 or weights.get("symmetric") is False:
                continue
            size = _strategy_size(weights, shape)
            inputs = group.get("input_activations")
            options = {INPUTS: "true"} if _per_token(inputs) else {}
            evidence = f"config says int8, strategy {weights.get('strategy')}"
            sizes, certain, wrong = sizes_of(infos, size)
            if size is None or not certain or wrong:
                continue
            if size in possible and possible[size].options != options:
                options = {}  # the groups name their layers, which shapes do not tell
            possible[size] = Reading(
                Certainty.MARKED, evidence, options, sizes[0], shape
            )
        if len(possible) > 1:
            for size in possible:
                yield Reading(Certainty.GUESS, "config has groups", {}, size, shape)
        else:
            yield from possible.values()

    def decode(
        self, claim: Claim, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Unpack the codes, if they are packed.

        Raises:
            CheckpointError: if the weight has another shape than its codes.
        """
        weight, stored = tensors["weight"], tensors.get("weight_shape")
        if weight.dtype == torch.int32:
            weight = (weight.contiguous().view(torch.uint8) ^ 128).view(torch.int8)
        shape = list(weight.shape)
        if stored is not None and not stored.is_meta and stored.tolist() != shape:
            raise CheckpointError(
                f"{claim.layer}: weight_shape is {stored.tolist()}, expected that of "
                f"the packed codes, {shape}; dequantize it with compressed-tensors"
            )
        return super().decode(claim, {**tensors, "weight": weight})

    def encode(
        self, qdata: Tensor, params: Mapping[str, Tensor], options: Mapping[str, object]
    ) -> dict[str, Tensor]:
        """The grid unchanged, or (1,).

        Raises:
            CheckpointError: if the weight is rotated, no matrix, or has short blocks.
        """
        if qdata.ndim != 2:
            raise CheckpointError(
                f"dialect {self.name}: cannot write a weight {list(qdata.shape)}, "
                "expected a matrix; write it in dialect 'hijack'"
            )
        tensors = super().encode(qdata, params, options)
        whole = block_size_of(qdata, params) == tuple(qdata.shape)
        if whole and qdata.shape[0] > 1:
            tensors["weight_scale"] = params["weight_scale"].view(1)
        return tensors

    def fit_options(
        self, shape: tuple[int, ...], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Inputs quantized too unless something else is asked for, as in its preset."""
        return {INPUTS: True, **options}

    def finish(
        self, layers: Mapping[str, EncodedLayer], others: Mapping[str, TensorInfo]
    ) -> FormatMetadata:
        """A config with one group for each kind of blocks and of inputs."""
        if not layers:
            return FormatMetadata()
        kinds: dict[str, list[str]] = {}
        for name, layer in layers.items():
            kinds.setdefault(json.dumps(_group(layer)), []).append(name)
        groups = {
            f"group_{number}": {
                **json.loads(kind),
                "targets": ["Linear"] if len(kinds) == 1 else names,
                "output_activations": None,
                "format": "int-quantized",
            }
            for number, (kind, names) in enumerate(kinds.items())
        }
        config = {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "config_groups": groups,
            "ignore": dense_layers(others),
            "kv_cache_scheme": None,
            "global_compression_ratio": None,
        }
        return self.format_metadata(config)


def _unpacked(packed: TensorInfo) -> TensorInfo:
    """What int32 of four columns each are unpacked to."""
    shape = (*packed.shape[:-1], 4 * packed.shape[-1]) if packed.shape else ()
    return dataclasses.replace(packed, dtype="I8", shape=shape)


def _group(layer: EncodedLayer) -> dict[str, object]:
    """How a layer and its inputs are quantized, as compressed-tensors says it."""
    usual = {"num_bits": 8, "type": "int", "symmetric": True}
    shape = matrix_shape(layer.shape)
    rows, cols = layer.block_size or shape
    weights: dict[str, object] = {**usual, "dynamic": False, "strategy": "channel"}
    if len(layer.tensors["weight_scale"].shape) == 1:
        weights["strategy"] = "tensor"
    elif rows > 1:
        weights |= {"strategy": "block", "block_structure": [rows, cols]}
    elif cols < shape[1]:
        weights |= {"strategy": "group", "group_size": cols}
    asked = layer.options.get(INPUTS, "").lower() == "true"
    token = {**usual, "dynamic": True, "strategy": "token"} if asked else None
    return {"weights": weights, "input_activations": token}


def _strategy_size(weights: Mapping[str, Any], shape: Pair) -> Pair | None:
    """The block size that a group of the config declares, or None."""
    strategy, columns = weights.get("strategy"), weights.get("group_size")
    if strategy == "tensor":
        return shape
    if strategy == "channel":
        return 1, shape[1]
    if strategy == "group" and type(columns) is int and columns > 0:
        return 1, min(columns, shape[1])
    return (
        _clipped(weights.get("block_structure"), shape) if strategy == "block" else None
    )


def _clipped(block: object, shape: Pair) -> Pair | None:
    """A declared block size, no larger than the weight; None if it is none."""
    pair = block_pair(block)
    return None if pair is None else (min(pair[0], shape[0]), min(pair[1], shape[1]))


def _per_token(inputs: object) -> bool:
    """Whether inputs are quantized as the scheme does."""
    usual = {"num_bits": 8, "type": "int", "strategy": "token", "dynamic": True}
    return isinstance(inputs, dict) and usual.items() <= inputs.items()


class TorchaoInt8(Int8Dialect):
    """torchao's Int8Tensor, of which the header's metadata has the arguments.

    It always stores zero points, which are zero unless it was quantized otherwise. An
    IntxUnpackedToInt8Tensor is the same, of codes that may have fewer bits.
    """

    name = "torchao"
    names: ClassVar[Ends] = {
        "weight": ("_weight_qdata",),
        "weight_scale": ("_weight_scale",),
        "zero_point": ("_weight_zero_point",),
    }
    optional = ("zero_point",)
    inputs: tuple[str, ...] = ()

    def interpret(
        self, header: Header, layer: str, infos: Mapping[str, TensorInfo]
    ) -> Iterable[Reading]:
        """The ``block_size`` in the layer's entry."""
        others = {"_weight_act_pre_scale", "_weight_act_quant_scale"}
        if others & header.parts[layer].keys():
            return
        entry = parse_table(header.metadata.get(join(layer, "weight"), ""))
        kind, data = entry.get("_type"), entry.get("_data")
        if kind not in (None, "Int8Tensor", "IntxUnpackedToInt8Tensor"):
            return
        data = data if isinstance(data, dict) else {}
        block, shape = data.get("block_size"), matrix_shape(infos["weight"].shape)
        size = _clipped(block, shape)
        certainty = Certainty.MARKED if kind else Certainty.UNIQUE
        evidence = f"metadata says {kind}, block_size {block}" if kind else ""
        options = {INPUTS: "true"} if data.get("act_quant_kwargs") else {}
        yield from readings_of(infos, certainty, evidence, size, options)

    def decode(
        self, claim: Claim, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """As in the base class; zero points must be zero.

        Raises:
            CheckpointError: if one is not.
        """
        refuse_nonzero(claim, tensors, "zero_point", "zero points")
        return super().decode(claim, tensors)

    def unmark(
        self, metadata: Mapping[str, str], keys: Collection[str], layers: Iterable[str]
    ) -> tuple[dict[str, str], set[str]]:
        """Drop the names and entries of all tensors; they describe the whole file."""
        return without_entries(metadata, layers), set()


def refuse_nonzero(
    claim: Claim, tensors: Mapping[str, Tensor], role: str, what: str
) -> None:
    """Refuse a layer with numbers that the scheme has not.

    Raises:
        CheckpointError: if any is not zero.
    """
    tensor = tensors.get(role)
    if tensor is not None and not tensor.is_meta and bool(tensor.any()):
        raise CheckpointError(
            f"{claim.layer}: {role} is not zero, expected a weight without {what}; "
            "dequantize it with the program that wrote it"
        )


class ModelOptInt8(Int8Dialect):
    """ModelOpt's export, whose config names the algorithm; it rotates no weight.

    SmoothQuant's factors of the columns, ``pre_quant_scale``, are not supported.
    """

    name = "modelopt"

    def interpret(
        self, header: Header, layer: str, infos: Mapping[str, TensorInfo]
    ) -> Iterable[Reading]:
        """Layers of a file of the program, as the shapes of their scales tell."""
        config = header.quantization
        others = _OFFSETS | {"pre_quant_scale"}
        if config.get("quant_method") == "modelopt" and not (
            others & header.parts[layer].keys()
        ):
            evidence = f"config says {excerpt(str(config.get('quant_algo')))}"
            yield from readings_of(infos, Certainty.MARKED, evidence)


class QuantoInt8(Int8Dialect):
    """optimum-quanto's qint8: ``X.weight._data`` and ``X.weight._scale``."""

    name = "quanto"
    names: ClassVar[Ends] = {
        "weight": ("weight._data",),
        "weight_scale": ("weight._scale",),
    }
    inputs: tuple[str, ...] = ("input_scale", "output_scale")

    def interpret(
        self, header: Header, layer: str, infos: Mapping[str, TensorInfo]
    ) -> Iterable[Reading]:
        """Nobody else uses these names."""
        return readings_of(infos, Certainty.UNIQUE)


class BitsandbytesInt8(Int8Dialect):
    """bitsandbytes' LLM.int8: ``SCB`` has the largest magnitude of each row.

    ``weight_format`` is 0 where rows are in order; others are of former versions.
    """

    name = "bitsandbytes"
    names: ClassVar[Ends] = {
        "weight": ("weight",),
        "weight_scale": ("SCB",),
        "weight_format": ("weight_format",),
    }
    dtypes: ClassVar[Ends] = {"weight": ("I8",), "weight_scale": ("F32",)}
    optional = ("weight_format",)
    inputs: tuple[str, ...] = ()

    def interpret(
        self, header: Header, layer: str, infos: Mapping[str, TensorInfo]
    ) -> Iterable[Reading]:
        """Nobody else uses the name."""
        weight = infos["weight"].shape
        if len(weight) == 2 and infos["weight_scale"].shape == (weight[0],):
            yield from readings_of(infos, Certainty.UNIQUE, declared=(1, weight[1]))

    def decode(
        self, claim: Claim, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Magnitudes are 127 codes.

        Raises:
            CheckpointError: if the rows are in another order.
        """
        refuse_nonzero(claim, tensors, "weight_format", "columns in another order")
        scale = tensors["weight_scale"] / 127
        return super().decode(claim, {**tensors, "weight_scale": scale})


class SDNQInt8(Int8Dialect):
    """SDNQ's int8: ``X.weight``, ``X.scale``, and a config with its own options.

    Groups of columns are a dimension of the weight, (N, K/C, C). A Linear that SDNQ
    multiplies in integers is stored transposed, (K, N), with its scale. Its rotation is
    another one than ConvRot's; that, a low-rank part and zero points are not supported.
    """

    name = "sdnq"
    names: ClassVar[Ends] = {"weight": ("weight",), "weight_scale": ("scale",)}
    inputs: tuple[str, ...] = ()

    def interpret(
        self, header: Header, layer: str, infos: Mapping[str, TensorInfo]
    ) -> Iterable[Reading]:
        """Layers whose weight is codes times scales; guesses without a config."""
        method = header.quantization.get("quant_method")
        config = header.quantization
        if EXTRA & header.parts[layer].keys() or method not in (None, "sdnq"):
            return
        if asks_for(config, "use_hadamard") or asks_for(config, "use_codebook"):
            return
        weight, scale = infos["weight"].shape, infos["weight_scale"].shape
        certainty = Certainty.GUESS if method is None else Certainty.MARKED
        evidence = "" if method is None else "config says sdnq"
        matmul = asks_for(config, "use_quantized_matmul")
        options = {INPUTS: "true"} if matmul else {}
        if len(weight) == 3 and scale == (*weight[:2], 1):
            size, shape = (1, weight[2]), (weight[0], weight[1] * weight[2])
        elif len(weight) == 2 and scale == (weight[0], 1) != (1, 1):
            size, shape = (1, weight[1]), (weight[0], weight[1])
        elif len(weight) == 2 and scale == (1, weight[1]) != (1, 1):
            size, shape = (1, weight[0]), (weight[1], weight[0])
        elif len(weight) == 2 and scale == (1, 1) and not matmul:
            size = shape = (weight[0], weight[1])
        else:
            return  # of one scale nothing tells whether it is transposed
        yield Reading(certainty, evidence, options, size, shape)

    def decode(
        self, claim: Claim, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Flatten groups of columns, or undo the transposition."""
        weight, scale = tensors["weight"], tensors["weight_scale"]
        if weight.ndim == 3:
            weight = weight.flatten(1)
        elif scale.shape[0] < scale.shape[1]:  # (1, N)
            weight, scale = weight.t().contiguous(), scale.t()
        return super().decode(
            claim, {**tensors, "weight": weight, "weight_scale": scale}
        )


NATIVE = NativeInt8()
#: The first is written by default.
DIALECTS: tuple[Dialect, ...] = (
    ComfyInt8(),
    CompressedTensorsInt8(),
    TorchaoInt8(),
    ModelOptInt8(),
    QuantoInt8(),
    BitsandbytesInt8(),
    SDNQInt8(),
)
