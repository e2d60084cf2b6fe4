"""MXFP4: 4-bit floats with a power of two for 32 columns.

A weight W of shape (N, K) is cut into blocks of 1 x 32, the last of a row padded with
zeros. With m_b the largest |W_ij| of a block ::

    e_b  = floor(log2(m_b)) - 2              2 is the exponent of 6, the largest code
    Q_ij = e2m1(W_ij / 2^e_b)                what exceeds 6 becomes 6
    W_ij ~ Q_ij * 2^e_b                      the product in float32

The tensors are ``weight`` (N, K/2) uint8, two codes a byte, the even column in the low
four bits; ``weight_scale`` (N, K/32) uint8, which are e_b + 127, because safetensors
cannot read float8_e8m0fnu everywhere; and where 32 does not divide K,
``weight_columns``, which is empty and of shape (K, 0). Exponents and codes are bit for
bit those of torchao's MXTensor in its mode FLOOR, as the standard has them. Others
round m_b before: compressed-tensors as in its mode EVEN, ModelOpt and cuBLAS as RCEIL.

Reference: OCP Microscaling Formats (MX), version 1.0, section 6.3.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import hijack
from hijack.errors import NonFiniteError
from hijack.options import Option
from schemes import _fp4
from schemes._kernels import e2m1
from schemes._kernels.block_scaled import BlockScaled
from schemes._kernels.forward import decode
from schemes._mxfp4_dialects import COLS, DIALECTS

#: Powers of two in a byte, with a bias of 127.
_E8M0 = torch.float8_e8m0fnu
#: Exponent of the largest code.
_CODE_EXPONENT = 2
#: Bits of the mantissa of float32.
_MANTISSA = 23


class MXFP4(_fp4.FP4Scheme):
    """E2M1 codes, and a power of two for each 1 x 32 block."""

    name = "mxfp4"
    cols = COLS
    dialects = DIALECTS
    claims_unmarked = True
    options = (
        Option(
            "scale_search",
            "int",
            0,
            "other powers of two to try for each block, for less error",
            minimum=0,
            maximum=1,
        ),
    )

    def quantize(  # type: ignore[override]
        self, weight: Tensor, *, scale_search: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cut a weight into blocks and scale each to E2M1.

        Args:
            weight: (N, K) floating point; meta tensors give meta tensors.
            scale_search: 1 also tries the next larger power of two for each block, and
                takes the one with the least squared error.

        Returns:
            Codes (N, ceil(K/32) * 16) uint8; ``weight_scale`` (N, ceil(K/32)), and
            perhaps ``weight_columns`` (K, 0).

        Raises:
            SchemeError: if an option is wrong.
            ShapeError: if the weight has not two dimensions.
        """
        self.check_options({"scale_search": scale_search})
        qdata, columns = self.empty(weight)
        n, blocks = weight.shape[0], -(-weight.shape[1] // COLS)
        scale = weight.new_empty((n, blocks), dtype=torch.uint8)
        params = {"weight_scale": scale, **columns}
        if weight.is_meta:
            return qdata, params
        weight = weight.detach()
        for rows in _fp4.pieces(qdata):
            piece = F.pad(weight[rows], (0, -weight.shape[1] % COLS))
            piece = piece.float().contiguous().view(-1, blocks, COLS)
            scale[rows] = _exponents(piece)
            if scale_search:
                more = (scale[rows] + 1).clamp(1, 254)
                worse = _error(piece, scale[rows]) <= _error(piece, more)
                scale[rows] = torch.where(worse, scale[rows], more)
            codes = _scaled(piece, scale[rows])
            qdata[rows] = e2m1.encode(codes.view(-1, blocks * COLS))
        return qdata, params

    def row_step(self, shape: tuple[int, ...], **options: Any) -> int | None:
        """One: each block is a part of a row."""
        return None if 0 in shape else 1

    def block_scaled(self, qdata: Tensor, params: Mapping[str, Tensor]) -> BlockScaled:
        """The codes, with their powers of two.

        Args:
            qdata: (N, K/2) uint8.
            params: ``weight_scale`` (N, K/32).
        """
        return _fp4.block_scaled(qdata, params["weight_scale"].view(_E8M0), COLS)

    def validate(self, qdata: Tensor, params: Mapping[str, Tensor], where: str) -> None:
        """Refuse shapes and dtypes that do not fit, and NaN."""
        _fp4.check_weight(qdata, COLS, where)
        grid = (len(qdata), 2 * qdata.shape[1] // COLS)
        scale = _fp4.check_scale(params, "weight_scale", (torch.uint8,), grid, where)
        _fp4.check_columns(qdata, params, COLS, where)
        if scale.is_meta or not scale.numel():
            return
        if int(scale.max()) == 0xFF:
            raise NonFiniteError(
                f"{where}: weight_scale holds NaN, expected powers of two; the file is "
                "damaged, get it again"
            )


# -- numerics --------------------------------------------------------------------------


def _exponents(blocks: Tensor) -> Tensor:
    """The powers of two for (N, blocks, 32) float32: (N, blocks) uint8, with bias 127.

    0, which is 2^-127 and subnormal, is only for blocks of zeros.
    """
    most = blocks.abs().amax(2)
    biased = (most.view(torch.int32) >> _MANTISSA) - _CODE_EXPONENT
    return torch.where(most == 0, 0, biased.clamp(1, 254)).to(torch.uint8)


def _scaled(blocks: Tensor, exponents: Tensor) -> Tensor:
    """(N, blocks, 32) float32 divided by (N, blocks) powers of two."""
    return blocks / exponents.clamp_min(1).view(_E8M0).float().unsqueeze(2)


def _error(blocks: Tensor, exponents: Tensor) -> Tensor:
    """Squared error of (N, blocks, 32) with these powers of two: (N, blocks)."""
    codes = e2m1.encode(_scaled(blocks, exponents).flatten(1))
    weight = _fp4.block_scaled(codes, exponents.view(_E8M0), COLS)
    decoded = decode(weight, torch.float32)
    return (decoded.view(blocks.shape) - blocks).square().sum(2)


#: The scheme; it keeps nothing, so that one serves everybody.
SCHEME = MXFP4()


@hijack.hookimpl
def hijack_register_schemes(registry: hijack.Registry) -> None:
    """Register the scheme with any registry that loads this plugin."""
    registry.register(SCHEME)


hijack.default_registry().register(SCHEME)
