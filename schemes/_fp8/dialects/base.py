"""What all spellings of FP8 with scales have in common.

A dialect says which names it has for a weight's scale and what the file says of a layer
beside its tensors. The blocks follow from the shapes, here, for all of them: where the
two disagree, the tensors are believed.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from hijack.errors import CheckpointError
from hijack.formats.claim import Certainty, Claim
from hijack.formats.dialect import Dialect
from hijack.safetensors_io.header import Header, TensorInfo, join
from hijack.scheme import Scheme
from hijack.text import block_text
from schemes._fp8.blocks import (
    FP8_DTYPES,
    POWER_DTYPES,
    SCALE_DTYPES,
    Pair,
    block_size_of,
    divides,
    grid_of,
    grid_shape,
    make_params,
    matrix_shape,
    parse_block_size,
    possible_sizes,
)


@dataclasses.dataclass(frozen=True)
class Found:
    """A weight and its scale, as a header has them.

    Attributes:
        layer: name of the layer.
        keys: role to full key.
        weight: the codes.
        scale: the scale.
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
class Said:
    """What a file says of a layer, beside its tensors.

    Attributes:
        certainty: of a claim with whose shapes this agrees.
        evidence: where it says so.
        size: the block size it names.
        contradiction: what of it the tensors prove wrong, apart from the block size.
        rivals: block sizes it names that all give the scales there are.
    """

    certainty: Certainty
    evidence: str = ""
    size: Pair | None = None
    contradiction: str = ""
    rivals: tuple[Pair, ...] = ()


class FP8Dialect(Dialect, abc.ABC):
    """Codes with a multiplying scale.

    Attributes:
        weight: last part of the weight's key.
        scales: last parts a scale's key may have; the first is written.
        scale_dtypes: dtypes a scale may have.
        ranks: numbers of dimensions a scale may have; one of one element is any.
        asides: last parts of other tensors that say nothing of the weight.
        exact: whether its writers never cut a block short.
    """

    weight = "weight"
    scales: tuple[str, ...] = ("weight_scale",)
    scale_dtypes: tuple[torch.dtype, ...] = SCALE_DTYPES
    ranks: tuple[int, ...] = (1, 2)
    inputs: tuple[str, ...] = ("input_scale",)
    asides: tuple[str, ...] = ()
    exact = False

    # -- reading -----------------------------------------------------------------------

    def layers(self, header: Header) -> Iterable[str]:
        """The layers that own a scale of a name the dialect has."""
        owners = [header.owners.get(name, ()) for name in self.scales]
        return owners[0] if len(owners) == 1 else [la for own in owners for la in own]

    @abc.abstractmethod
    def said(self, header: Header, found: Found) -> Said | None:
        """What the file says of a layer, or None if the dialect does not write it."""

    def find(self, header: Header, layer: str) -> Found | None:
        """The layer's codes and their scale, or None."""
        tensors = header.tensors
        known = (pair for pair in self.scale_keys(layer) if pair[1] in tensors)
        name, key = next(known, ("", ""))
        if not name:
            return None
        weight_key = join(layer, self.weight)
        weight, scale = tensors.get(weight_key), tensors[key]
        if weight is None or weight.torch_dtype not in FP8_DTYPES:
            return None
        if scale.torch_dtype not in self.scale_dtypes:
            return None
        shape, grid = _cover(self, weight.shape, scale.shape)
        if grid is None:
            return None
        roles = {"weight": weight_key, name: key}
        for extra in (*self.inputs, *self.asides):
            if (key := join(layer, extra)) in tensors:
                roles[extra] = key
        return Found(layer, roles, weight, scale, shape, grid)

    def scale_keys(self, layer: str) -> Iterable[tuple[str, str]]:
        """Role and key of every place the scale may be in, the likeliest first."""
        return ((name, join(layer, name)) for name in self.scales)

    def grid(self, scale: tuple[int, ...], shape: Pair) -> Pair | None:
        """Rows and columns of a scale as stored, or None if it does not cover."""
        single = all(size == 1 for size in scale)
        return grid_of(scale, shape) if single or len(scale) in self.ranks else None

    def readings(self, scheme: Scheme, header: Header, layer: str) -> Iterator[Claim]:
        """Every block size the layer may have; more than one is a guess."""
        found = self.find(header, layer)
        said = None if found is None else self.said(header, found)
        if found is None or said is None:
            return
        sizes, sure = self._sizes(found, said)
        problem = said.contradiction
        if said.size is not None and sizes != [said.size]:
            problem = problem or _disagreement(found, said.size)
        for size in sizes:
            yield self._claim(scheme, found, said, size, problem, sure)

    def recognise(self, scheme: Scheme, header: Header, layer: str) -> Claim | None:
        """The claim to a layer whose block size is beyond doubt."""
        for claim in self.readings(scheme, header, layer):
            return claim if claim.certainty is not Certainty.GUESS else None
        return None

    def _sizes(self, found: Found, said: Said) -> tuple[list[Pair], bool]:
        if said.rivals:
            return list(said.rivals), False
        if said.size is not None and grid_shape(found.shape, said.size) == found.grid:
            return [said.size], True
        if self.exact:
            if found.shape[0] % found.grid[0] or found.shape[1] % found.grid[1]:
                return [], False
            (n, k), (rows, cols) = found.shape, found.grid
            return [(n // rows, k // cols)], True
        return possible_sizes(found.shape, found.grid)

    def _claim(
        self,
        scheme: Scheme,
        found: Found,
        said: Said,
        size: Pair,
        contradiction: str,
        sure: bool,
    ) -> Claim:
        role = next(role for role in found.keys if role in self.scales)
        evidence = (
            f"{found.weight.dtype} with {role} {found.scale.dtype} "
            f"{list(found.scale.shape)}"
        )
        certainty = said.certainty
        if not sure:
            certainty = Certainty.GUESS
        elif contradiction:
            certainty = min(certainty, Certainty.UNIQUE)
        return Claim(
            found.layer,
            scheme.name,
            self.name,
            found.keys,
            size,
            certainty,
            (said.evidence, evidence) if said.evidence else (evidence,),
            contradiction,
            unused=tuple(found.keys)[2:],
        )

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
        """Refuse; a dialect that is written has an `encode` of its own.

        Raises:
            CheckpointError: always.
        """
        raise CheckpointError(
            f"dialect {self.name}: is read, and never written; see docs/formats.md"
        )

    def cannot(
        self, qdata: Tensor, params: Mapping[str, Tensor], can: str
    ) -> CheckpointError:
        """The error that says what the dialect has no words for."""
        size = block_size_of(qdata, params)
        codes, scale = TensorInfo.of(qdata), TensorInfo.of(params["weight_scale"])
        return CheckpointError(
            f"dialect {self.name}: cannot write blocks of {block_text(size)} with "
            f"{scale.dtype} scales for a weight {codes.dtype} {list(codes.shape)}, "
            f"expected {can}; write it in dialect 'hijack', or choose another "
            "block_size"
        )


@functools.lru_cache(maxsize=1024)
def _cover(
    dialect: FP8Dialect, weight: tuple[int, ...], scale: tuple[int, ...]
) -> tuple[Pair, Pair | None]:
    """The weight as (N, K) and its grid; layers of a model have few shapes."""
    shape = matrix_shape(weight)
    empty = not weight or 0 in weight
    return shape, None if empty else dialect.grid(scale, shape)


def is_power(scale: Tensor) -> bool:
    """Whether scales are exponents of two, a byte each."""
    return scale.dtype in POWER_DTYPES


def whole(shape: Pair, size: Pair) -> bool:
    """Whether one block is the whole weight."""
    return grid_shape(shape, size) == (1, 1)


def rows_of(shape: Pair, size: Pair) -> bool:
    """Whether every block is a whole row."""
    return size[0] == 1 and size[1] >= shape[1]


def even(shape: Pair, size: Pair, sizes: Sequence[Pair]) -> bool:
    """Whether a block size is one of some, and no block is short."""
    return size in sizes and divides(shape, size)


def _disagreement(found: Found, size: Pair) -> str:
    return (
        f"{found.layer}: is said to have blocks of {block_text(size)}, which give "
        f"{list(grid_shape(found.shape, size))} scales; there are "
        f"{list(found.scale.shape)} for a weight {list(found.weight.shape)}"
    )
