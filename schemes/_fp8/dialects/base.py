"""The base of the dialects for FP8 with scales.

A dialect declares the names of its tensors, and says what a file's metadata declares
about a layer. The block size follows from the shapes, here, for all dialects; where
metadata and shapes do not match, the shapes win.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping

import torch
from torch import Tensor

from hijack.claim import Certainty, Claim
from hijack.errors import CheckpointError
from hijack.formats.comfyui_markers import (
    FILE_MARKER,
    LAYER_MARKER,
    file_marker,
    layer_marker,
)
from hijack.formats.dialect import Dialect
from hijack.formats.native_marker import native_marker
from hijack.safetensors_io.header import Header, TensorInfo, join, signature
from hijack.scheme import Scheme
from hijack.text import block_text
from schemes._blocks import (
    SCALE_DTYPES,
    Pair,
    block_size_of,
    grid_of,
    grid_shape,
    make_params,
    matrix_shape,
    parse_block_size,
    possible_sizes,
)
from schemes._fp8.blocks import FP8_DTYPES, POWER_DTYPES

#: What torchao calls the quantized data of a weight.
TORCHAO_DATA = "_weight_qdata"
#: The module beside a weight in which ModelOpt and Quark keep its scale.
WEIGHT_QUANTIZER = "weight_quantizer"
#: Values of ``quant_method`` whose FP8 weights are quantized data times a scale.
KNOWN_METHODS = frozenset(
    {
        "compressed-tensors",
        "deepseek_fp8",
        "fbgemm_fp8",
        "fp8",
        "modelopt",
        "mxfp8",
        "quanto",
        "sdnq",
        "torchao",
    }
)


@dataclasses.dataclass(frozen=True)
class QuantizedWeightInfo:
    """A weight and its scale, as a header describes them.

    Attributes:
        layer: name of the layer.
        keys: role to full key; the weight's first, the scale's second.
        weight: dtype and shape of the quantized data.
        scale: dtype and shape of the scale.
        shape: (N, K) of the weight.
        grid: rows and columns of the scale.
    """

    layer: str
    keys: Mapping[str, str]
    weight: TensorInfo
    scale: TensorInfo
    shape: Pair
    grid: Pair


@dataclasses.dataclass(frozen=True)
class Declared:
    """What a file declares about a layer, apart from its tensors.

    Attributes:
        certainty: of a claim whose shapes match.
        evidence: where it is declared.
        size: the declared block size.
        mismatch: what does not match the tensors, apart from the block size.
        options: how the layer computes, as `Claim.options`.
        unread: what else the marker says, as `Claim.unread`.
        alternatives: declared block sizes that all match the scales.
    """

    certainty: Certainty
    evidence: str = ""
    size: Pair | None = None
    mismatch: str = ""
    alternatives: tuple[Pair, ...] = ()
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unread: tuple[str, ...] = ()


class FP8Dialect(Dialect, abc.ABC):
    """FP8 data with a scale that multiplies.

    Attributes:
        weight: suffix of the weight's key.
        scales: suffixes a scale's key may have; the first is written.
        scale_dtypes: dtypes a scale may have.
        ranks: numbers of dimensions a scale may have; one element may have any.
        ignored_keys: suffixes of other tensors that do not affect the weight.
        exact: whether its writers never write a short block.
    """

    writes = False
    weight = "weight"
    scales: tuple[str, ...] = ("weight_scale",)
    scale_dtypes: tuple[torch.dtype, ...] = SCALE_DTYPES
    ranks: tuple[int, ...] = (1, 2)
    inputs: tuple[str, ...] = ("input_scale",)
    ignored_keys: tuple[str, ...] = ()
    exact = False

    stores: Collection[str] = ()

    def __init_subclass__(cls) -> None:
        cls.needs = tuple(name.rpartition(".")[2] for name in cls.scales)

    # -- reading -----------------------------------------------------------------------

    def layers(self, header: Header) -> Iterable[str]:
        """The layers that have a scale of a name the dialect uses."""
        for scale in self.scales:
            within, _, name = scale.rpartition(".")
            for owner in header.owners.get(name, ()):
                if not within:
                    yield owner
                elif f".{owner}".endswith(f".{within}"):
                    yield owner.removesuffix(within).removesuffix(".")

    @abc.abstractmethod
    def declared(self, header: Header, info: QuantizedWeightInfo) -> Declared | None:
        """What the file declares about a layer; None if it is of another dialect."""

    def weight_info(self, header: Header, layer: str) -> QuantizedWeightInfo | None:
        """The layer's quantized data and scale, or None."""
        tensors = header.tensors
        present = (pair for pair in self.scale_keys(layer) if pair[1] in tensors)
        name, key = next(present, ("", ""))
        if not name:
            return None
        weight_key = join(layer, self.weight)
        weight, scale = tensors.get(weight_key), tensors[key]
        if weight is None or weight.torch_dtype not in FP8_DTYPES:
            return None
        if scale.torch_dtype not in self.scale_dtypes:
            return None
        shape, grid = _shape_and_grid(self, weight.shape, scale.shape)
        if grid is None:
            return None
        roles = {"weight": weight_key, name: key}
        for extra in (*self.inputs, *self.ignored_keys):
            if (key := join(layer, extra)) in tensors:
                roles[extra] = key
        return QuantizedWeightInfo(layer, roles, weight, scale, shape, grid)

    def scale_keys(self, layer: str) -> Iterable[tuple[str, str]]:
        """Role and key of every possible scale, the likeliest first."""
        return ((name, join(layer, name)) for name in self.scales)

    def grid(self, scale: tuple[int, ...], shape: Pair) -> Pair | None:
        """Rows and columns of a stored scale; None if it cannot cover the weight."""
        single = all(size == 1 for size in scale)
        return grid_of(scale, shape) if single or len(scale) in self.ranks else None

    def readings(self, scheme: Scheme, header: Header, layer: str) -> Iterator[Claim]:
        """Every block size the layer may have; more than one is a guess."""
        info = self.weight_info(header, layer)
        declared = None if info is None else self.declared(header, info)
        if info is None or declared is None:
            return
        sizes, certain = self._sizes(info, declared)
        mismatch = declared.mismatch
        if declared.size is not None and sizes != [declared.size]:
            mismatch = mismatch or _size_mismatch(info, declared.size)
        certainty = declared.certainty
        if not certain or (
            certainty is Certainty.FITS and names_unknown_method(header)
        ):
            certainty = Certainty.GUESS
        elif mismatch:
            certainty = min(certainty, Certainty.UNIQUE)
        role = list(info.keys)[1]
        evidence = (
            f"{info.weight.dtype} with {role} {info.scale.dtype} "
            f"{list(info.scale.shape)}"
        )
        for size in sizes:
            yield Claim(
                layer,
                scheme.name,
                self.name,
                info.keys,
                size,
                certainty,
                (declared.evidence, evidence) if declared.evidence else (evidence,),
                mismatch,
                unused=tuple(info.keys)[2:],
                options=declared.options,
                unread=declared.unread,
            )

    def recognise(self, scheme: Scheme, header: Header, layer: str) -> Claim | None:
        """The claim to a layer whose block size is certain."""
        for claim in self.readings(scheme, header, layer):
            return claim if claim.certainty is not Certainty.GUESS else None
        return None

    def _sizes(
        self, info: QuantizedWeightInfo, declared: Declared
    ) -> tuple[list[Pair], bool]:
        """The block sizes a layer may have, and whether the first is certain."""
        if declared.alternatives:
            return list(declared.alternatives), False
        size = declared.size
        if size is not None and grid_shape(info.shape, size) == info.grid:
            return [size], True
        if self.exact:
            if info.shape[0] % info.grid[0] or info.shape[1] % info.grid[1]:
                return [], False
            (n, k), (rows, cols) = info.shape, info.grid
            return [(n // rows, k // cols)], True
        return possible_sizes(info.shape, info.grid)

    def decode(
        self, claim: Claim, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """View the scale as the scheme's grid."""
        weight = tensors["weight"]
        role = next(role for role in claim.keys if role in self.scales)
        shape = matrix_shape(tuple(weight.shape))
        size = parse_block_size(claim.block_size or "tensor", shape)
        return weight, make_params(self.plain(tensors[role], shape), shape, size)

    def plain(self, scale: Tensor, shape: Pair) -> Tensor:
        """A stored scale with its elements in the order of the grid."""
        return scale

    # -- writing -----------------------------------------------------------------------

    def encode(
        self, qdata: Tensor, params: Mapping[str, Tensor], options: Mapping[str, object]
    ) -> dict[str, Tensor]:
        """Refuse; a dialect that can be written overrides this.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(
            f"dialect {self.name}: can be read, not written; see docs/formats.md"
        )

    def cannot(
        self, qdata: Tensor, params: Mapping[str, Tensor], supported: str
    ) -> CheckpointError:
        """The error for tensors that the dialect cannot store."""
        size = block_size_of(qdata, params)
        weight, scale = TensorInfo.of(qdata), TensorInfo.of(params["weight_scale"])
        return CheckpointError(
            f"dialect {self.name}: cannot write blocks of {block_text(size)} with "
            f"{scale.dtype} scales for a weight {weight.dtype} {list(weight.shape)}, "
            f"expected {supported}; write it in dialect 'hijack', or choose another "
            "block_size"
        )


def names_unknown_method(header: Header) -> bool:
    """Whether the config names a method of which no dialect here knows anything.

    Then shapes that fit are not enough: the weight may be rotated, for example.
    """
    method = header.quantization.get("quant_method")
    return method is not None and method not in KNOWN_METHODS


@functools.lru_cache(maxsize=1024)
def _shape_and_grid(
    dialect: FP8Dialect, weight: tuple[int, ...], scale: tuple[int, ...]
) -> tuple[Pair, Pair | None]:
    """(N, K) of the weight, and its grid; the layers of a model have few shapes."""
    shape = matrix_shape(weight)
    empty = not weight or 0 in weight
    return shape, None if empty else dialect.grid(scale, shape)


def likeness(header: Header, layer: str) -> Hashable | None:
    """A layer's tensors and everything any marker declares about it, or None.

    None where tensors of the layer are not beside its weight: musubi-tuner's odd keys,
    and quanto's parts of a weight.
    """
    parts = header.parts.get(layer, {})
    if ".weight" in layer or not ("weight" in parts or TORCHAO_DATA in parts):
        return None
    markers: list[object] = []
    if FILE_MARKER in header.owners:
        marker = file_marker(header, layer)
        markers.append(None if marker is None else (marker.dtype, marker.shape))
    if header.metadata or LAYER_MARKER in parts:
        entries = (layer_marker(header, layer), native_marker(header, layer))
        markers += map(repr, entries)
        markers.append(header.metadata.get(join(layer, "weight")))  # torchao's
    quantizer = header.parts.get(join(layer, WEIGHT_QUANTIZER), {})
    return signature(parts), signature(quantizer), *markers


def is_power(scale: Tensor) -> bool:
    """Whether scales are exponents of two, a byte each."""
    return scale.dtype in POWER_DTYPES


def _size_mismatch(info: QuantizedWeightInfo, size: Pair) -> str:
    return (
        f"{info.layer}: is declared to have blocks of {block_text(size)}, which give "
        f"{list(grid_shape(info.shape, size))} scales; there are "
        f"{list(info.scale.shape)} for a weight {list(info.weight.shape)}"
    )
