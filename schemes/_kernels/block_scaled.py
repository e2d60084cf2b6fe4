"""`BlockScaled`: a quantized weight as kernels take it, whatever scheme it is of."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

#: Dtypes of codes that are one number each.
CODES = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
#: Dtypes of inputs and of decoded weights.
DENSE = (torch.float32, torch.bfloat16, torch.float16)
#: Dtypes of scales.
SCALES = (
    *(torch.float32, torch.bfloat16, torch.float16),
    *(torch.float8_e8m0fnu, torch.float8_e4m3fn),
)


class BlockScaled(NamedTuple):
    """A weight (N, K) of codes, and a scale for each block of them ::

        W[i, j] = number(codes[i, j]) * (scale[i // R, j // C] * factor)

    computed in float32, in this order, and rounded once to the dtype that is asked for.
    Every decode kernel gives these bits. Codes are finite; so are scales, which are not
    negative. Tensors have any strides and offsets.

    Attributes:
        codes: (N, K) float8_e4m3fn, float8_e5m2 or int8; or (N, K/2) uint8 with two
            codes of four bits in a byte.
        scale: (ceil(N/R), ceil(K/C)) float32, bfloat16, float16, float8_e8m0fnu or
            float8_e4m3fn.
        size: (R, C), the block size; blocks at the right and lower edge may be short.
        table: (16,) float32, the numbers of four-bit codes; None for others.
        high_first: whether of two codes in a byte the first is in the high four bits.
        factor: () float32 that multiplies every scale, or None for 1.
        rotation: columns of a group that is rotated after all this, as in
            `schemes._rotation`; 0 rotates none. Kernels do not see it: who calls them
            rotates the result, or the input of a product.
    """

    codes: Tensor
    scale: Tensor
    size: tuple[int, int]
    table: Tensor | None = None
    high_first: bool = False
    factor: Tensor | None = None
    rotation: int = 0

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K) of the weight."""
        n, k = self.codes.shape
        return (n, k) if self.table is None else (n, 2 * k)

    @property
    def device(self) -> torch.device:
        """Where the codes are."""
        return self.codes.device

    def part(self, rows: slice) -> BlockScaled:
        """Some rows of the weight; the first must be the first of a block."""
        height = self.size[0]
        scale = self.scale[rows.start // height : -(-rows.stop // height)]
        return self._replace(codes=self.codes[rows], scale=scale)
