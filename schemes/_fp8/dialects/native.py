"""hijack's own dialect for FP8."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from hijack.claim import Certainty, Claim
from hijack.errors import ShapeError
from hijack.formats.comfyui_markers import is_marked
from hijack.formats.dialect import Dialect, native_claim
from hijack.formats.native_marker import native_marker
from hijack.safetensors_io.header import Header, join
from hijack.scheme import Scheme
from schemes._blocks import (
    SCALE_DTYPES,
    Pair,
    grid_of,
    infer_block_size,
    matrix_shape,
    possible_sizes,
    sized,
)
from schemes._fp8.blocks import FP8_DTYPES
from schemes._fp8.dialects.base import names_unknown_method


class NativeFP8Dialect(Dialect):
    """The scheme's own names, and an empty tensor for the size of short blocks.

    Without hijack's metadata the block size is inferred from the shapes, if they are
    unambiguous; other tools write a ``weight_scale`` too.
    """

    needs = ("weight_scale",)

    def layers(self, header: Header) -> Iterable[str]:
        """The layers with a ``weight_scale``."""
        return header.owners.get("weight_scale", ())

    def readings(self, scheme: Scheme, header: Header, layer: str) -> Iterator[Claim]:
        """Every block size the layer may have; more than one is a guess."""
        claim = self.recognise(scheme, header, layer)
        if claim is not None:
            yield claim
        elif native_marker(header, layer) is None:
            for size in _possible_sizes(header, layer)[0]:
                names = _names(header, layer)
                yield native_claim(
                    layer, scheme.name, names, size, certainty=Certainty.GUESS
                )

    def recognise(self, scheme: Scheme, header: Header, layer: str) -> Claim | None:
        """The claim to a layer whose block size is certain."""
        if native_marker(header, layer) is None:
            sizes, certain = _possible_sizes(header, layer)
            if not certain or names_unknown_method(header):
                return None
            return native_claim(layer, scheme.name, _names(header, layer), sizes[0])
        claim = super().recognise(scheme, header, layer)
        if claim is None or claim.block_size is not None:
            return claim
        return sized(claim, header)


def _names(header: Header, layer: str) -> list[str]:
    """The names of the scheme's parameters that a layer has."""
    names = ("weight_scale", "weight_block_size")
    return [name for name in names if join(layer, name) in header.tensors]


def _possible_sizes(header: Header, layer: str) -> tuple[list[Pair], bool]:
    """The block sizes an unmarked layer may have, and whether the first is certain.

    There are none for scales that are powers of two: without a marker, their order in
    the file is unknown.
    """
    tensors = header.tensors
    weight = tensors.get(join(layer, "weight"))
    scale = tensors.get(join(layer, "weight_scale"))
    if weight is None or scale is None or weight.torch_dtype not in FP8_DTYPES:
        return [], False
    if scale.torch_dtype not in SCALE_DTYPES or is_marked(header, layer):
        return [], False
    if header.quantization.get("quant_method") == "compressed-tensors":
        return [], False  # its own dialect reads all of them
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
