"""E2M1, the 4-bit floating numbers of NVFP4 and MXFP4, packed two to a byte.

A code is a sign, two bits of exponent and one of mantissa. The eight magnitudes are
0, 0.5, 1, 1.5, 2, 3, 4 and 6; there is neither inf nor NaN. Of two neighbours in a row
the even one is in the low four bits here, as in OCP's and ModelOpt's files; ComfyUI
stores it in the high ones.

Reference: OCP Microscaling Formats (MX), version 1.0, section 5.3.3.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

import hijack
from hijack.errors import CheckpointError, DTypeError, ShapeError
from hijack.formats.tensor_dialect import likeness
from schemes._kernels.block_scaled import BlockScaled
from schemes._kernels.scheme import BlockScaledScheme
from schemes._kernels.tables import E2M1, table_on

#: Elements that are decoded or encoded at a time: on a CPU so many that they stay in
#: the cache, elsewhere so that what is made on the way is small beside the weight.
PIECE, LARGE_PIECE = 1 << 19, 1 << 24


class FP4Scheme(BlockScaledScheme):
    """What schemes of E2M1 codes with scales of 1 x C blocks have in common.

    Attributes:
        cols: C, columns that share a scale.
    """

    cols: ClassVar[int]

    def empty(self, weight: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Codes of a weight (N, K), and ``weight_columns`` (K, 0) if it is padded.

        Raises:
            ShapeError: if the weight has not two dimensions.
        """
        if weight.dim() != 2:
            raise ShapeError(
                f"{self.name}: weight has shape {tuple(weight.shape)}, expected (rows, "
                "columns); leave the layer dense"
            )
        n, k = weight.shape
        padded = -(-k // self.cols) * self.cols
        qdata = weight.new_empty((n, padded // 2), dtype=torch.uint8)
        if padded == k:
            return qdata, {}
        return qdata, {"weight_columns": weight.new_empty((k, 0), dtype=torch.uint8)}

    def dense_shape(
        self, qdata: Tensor, params: Mapping[str, Tensor]
    ) -> tuple[int, ...]:
        """Two columns for each byte."""
        return qdata.shape[0], 2 * qdata.shape[1]

    def declines(self, shape: tuple[int, ...], **options: Any) -> str | None:
        """Weights that are no matrix, or empty."""
        if len(shape) != 2:
            return "it is no matrix"
        return "it has no elements" if 0 in shape else None

    def block_size(
        self, qdata: Tensor, params: Mapping[str, Tensor]
    ) -> tuple[int, int]:
        """C columns of a row."""
        return 1, self.cols

    def likeness(self, header: hijack.Header, layer: str) -> Hashable | None:
        """The layer's tensors, and what the markers of all dialects say of it."""
        return likeness(header, layer)


def block_scaled(
    packed: Tensor, scale: Tensor, cols: int, factor: Tensor | None = None
) -> BlockScaled:
    """Codes and scales as kernels take them.

    Args:
        packed: (N, K/2) uint8.
        scale: (N, K/C) of a dtype that kernels know.
        cols: C, the columns that share a scale; divides K.
        factor: () float32 that multiplies all scales, or None.
    """
    table = table_on(E2M1, packed.device)
    return BlockScaled(packed, scale, (1, cols), table, factor=factor)


def pieces(matrix: Tensor) -> Iterator[slice]:
    """Rows that are computed at a time; all of them in compiled code.

    Args:
        matrix: (N, K/2) uint8.
    """
    most = PIECE if matrix.device.type == "cpu" else LARGE_PIECE
    rows = max(1, most // max(1, 2 * matrix.shape[1]))
    if torch.compiler.is_compiling() or matrix.is_meta:
        rows = max(1, len(matrix))
    for start in range(0, len(matrix), rows):
        yield slice(start, start + rows)


def swap(packed: Tensor) -> Tensor:
    """The same codes with the other one of each two in the low bits."""
    return (packed << 4) | (packed >> 4)


def check_weight(qdata: Tensor, cols: int, where: str) -> None:
    """Refuse what are no packed codes of whole blocks.

    Args:
        qdata: expected (N, K/2) uint8.
        cols: columns that share a scale.
        where: the layer, for messages.

    Raises:
        DTypeError: if the dtype is another.
        ShapeError: if the shape is another.
    """
    if qdata.dtype != torch.uint8:
        raise DTypeError(f"{where}: weight is {qdata.dtype}, expected torch.uint8")
    if qdata.dim() != 2 or qdata.shape[1] % (cols // 2):
        raise ShapeError(
            f"{where}: weight has shape {tuple(qdata.shape)}, expected rows of "
            f"{cols // 2} bytes for each {cols} columns"
        )


def check_scale(
    params: Mapping[str, Tensor],
    name: str,
    dtypes: tuple[torch.dtype, ...],
    shape: tuple[int, ...],
    where: str,
) -> Tensor:
    """One of the params, if it is what it should be.

    Args:
        params: name to tensor.
        name: of the tensor.
        dtypes: which it may have.
        shape: which it must have.
        where: the layer, for messages.

    Raises:
        CheckpointError: if it is missing.
        DTypeError: if the dtype is another.
        ShapeError: if the shape is another.
    """
    if name not in params:
        raise CheckpointError(f"{where}: {name} is missing beside the weight")
    scale = params[name]
    if scale.dtype not in dtypes:
        expected = " or ".join(str(dtype) for dtype in dtypes)
        raise DTypeError(f"{where}: {name} is {scale.dtype}, expected {expected}")
    if tuple(scale.shape) != shape:
        raise ShapeError(
            f"{where}: {name} has shape {tuple(scale.shape)}, expected {shape}"
        )
    return scale


def check_columns(
    qdata: Tensor, params: Mapping[str, Tensor], cols: int, where: str
) -> None:
    """Refuse a ``weight_columns`` that does not say how many columns are padded.

    Args:
        qdata: (N, K/2) uint8.
        params: name to tensor.
        cols: columns that share a scale.
        where: the layer, for messages.

    Raises:
        ShapeError: if its shape cannot be.
    """
    columns = params.get("weight_columns")
    padded = 2 * qdata.shape[1]
    if columns is None:
        return
    if columns.dim() != 2 or not padded - cols < columns.shape[0] < padded:
        raise ShapeError(
            f"{where}: weight_columns has shape {tuple(columns.shape)}, expected "
            f"(columns, 0) with more than {padded - cols} and less than {padded}"
        )
