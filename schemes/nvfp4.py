"""NVFP4: 4-bit floats with an FP8 scale for 16 columns and one scale for the weight.

A weight W of shape (N, K) is cut into blocks of 1 x 16, the last of a row padded with
zeros. With m the largest |W_ij| of the weight and m_b that of a block ::

    s   = m / (6 * 448)                      in the dtype of the weight, then float32
    s_b = e4m3(min(m_b / 6 / s, 448))        the largest scale is 448
    Q_ij = e2m1(clamp(W_ij / (s * s_b), -6, 6))
    W_ij ~ Q_ij * (s * s_b)                  the product in float32

The tensors are ``weight`` (N, K/2) uint8, two codes a byte, the even column in the low
four bits; ``weight_scale`` (N, K/16) float8_e4m3fn in plain order; ``weight_scale_2``
() float32; and where 16 does not divide K, ``weight_columns``, which is empty and of
shape (K, 0). Codes and scales are bit for bit those of comfy-kitchen.

Files of ModelOpt may have ``pre_quant_scale`` (K,) from AWQ: the program multiplies the
input by it, so that here it multiplies the columns of the weight.

References: comfy-kitchen, ``backends/eager/quantization.py``; NVIDIA, "Pretraining
Large Language Models with NVFP4" (arXiv 2509.25149), appendix B; Cook et al., "Four
Over Six" (arXiv 2512.02010), for scales that are larger than the largest element asks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

import hijack
from hijack.errors import NonFiniteError
from hijack.formats.comfyui_markers import FULL_PRECISION
from hijack.options import Option
from schemes import _fp4
from schemes._kernels import e2m1
from schemes._kernels.block_scaled import BlockScaled
from schemes._kernels.forward import decode
from schemes._kernels.scheme import QUANTIZED_INPUTS
from schemes._nvfp4_dialects import COLS, DIALECTS

_E4M3 = torch.float8_e4m3fn
#: Largest E4M3 number.
_SCALE_MAX = 448.0
#: Bits of it.
_SCALE_MAX_BITS = 0x7E
#: Scales to try, the most useful first: how many E4M3 numbers after the absmax scale.
_STEPS = (5, -1, 4, 1, 6, 3, -2)


class NVFP4(_fp4.FP4Scheme):
    """E2M1 codes, E4M3 scales of 1 x 16 blocks, and one float32 scale."""

    name = "nvfp4"
    cols = COLS
    dialects = DIALECTS
    claims_unmarked = True
    options = (
        Option(
            "scale_search",
            "int",
            0,
            "scales to try for each block, for less error; 0 takes the absmax scale",
            minimum=0,
            maximum=len(_STEPS),
        ),
        Option(
            FULL_PRECISION,
            "bool",
            False,
            "never multiply the layer in FP4, where a program could",
            forward=True,
        ),
        Option(
            QUANTIZED_INPUTS,
            "bool",
            False,
            "quantize the input of a Linear too, and multiply in FP4 where the device "
            "has a unit for the blocks",
            forward=True,
        ),
    )

    def quantize(  # type: ignore[override]
        self,
        weight: Tensor,
        *,
        scale_search: int = 0,
        full_precision_matrix_mult: bool = False,
        quantized_inputs: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cut a weight into blocks and scale each to E2M1.

        Args:
            weight: (N, K) floating point; meta tensors give meta tensors.
            scale_search: how many scales to try for each block, to take the one with
                the least squared error; 0 takes the absmax scale. 2 gain 0.9 dB, 7 gain
                1.0 to 1.3 dB and take eight times as long.
            full_precision_matrix_mult: of the layer that the weight is for; the weight
                is the same.
            quantized_inputs: of the layer too; without effect beside the option above.

        Returns:
            Codes (N, ceil(K/16) * 8) uint8; ``weight_scale`` (N, ceil(K/16)),
            ``weight_scale_2`` (), and perhaps ``weight_columns`` (K, 0).

        Raises:
            SchemeError: if an option is wrong.
            ShapeError: if the weight has not two dimensions.
        """
        self.check_options({"scale_search": scale_search})
        qdata, columns = self.empty(weight)
        n, blocks = weight.shape[0], -(-weight.shape[1] // COLS)
        scale = weight.new_empty((n, blocks), dtype=_E4M3)
        whole = weight.new_zeros((), dtype=torch.float32)
        params = {"weight_scale": scale, "weight_scale_2": whole, **columns}
        if weight.is_meta or not weight.numel():
            return qdata, params
        weight = weight.detach()
        whole.copy_(_scale_of(weight))
        for rows in _fp4.pieces(qdata):
            piece = F.pad(weight[rows], (0, -weight.shape[1] % COLS))
            piece = piece.float().contiguous().view(-1, blocks, COLS)
            scale[rows] = _scales_of(piece, whole)
            if scale_search:
                scale[rows] = _search(piece, scale[rows], whole, scale_search)
            codes = _scaled(piece, scale[rows].float() * whole)
            qdata[rows] = e2m1.encode(codes.view(-1, blocks * COLS))
        return qdata, params

    def dequantize(
        self, qdata: Tensor, params: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        """Multiply each code by its block's scale and the weight's.

        Args:
            qdata: (N, K/2) uint8.
            params: ``weight_scale`` (N, K/16), ``weight_scale_2`` (), and perhaps
                ``pre_quant_scale`` (K,).
            dtype: floating dtype of the result.

        Returns:
            (N, K) of ``dtype``.
        """
        weight, columns = self._codes(qdata, params), params.get("pre_quant_scale")
        if columns is None:
            return decode(weight, dtype)
        return (decode(weight, torch.float32) * columns.float()).to(dtype)

    def block_scaled(
        self, qdata: Tensor, params: Mapping[str, Tensor]
    ) -> BlockScaled | None:
        """The codes with both scales; None if the columns have factors too.

        Args:
            qdata: (N, K/2) uint8.
            params: as for `dequantize`.
        """
        return None if "pre_quant_scale" in params else self._codes(qdata, params)

    def _codes(self, qdata: Tensor, params: Mapping[str, Tensor]) -> BlockScaled:
        scale, whole = params["weight_scale"], params["weight_scale_2"]
        return _fp4.block_scaled(qdata, scale, COLS, whole)

    def requantize(
        self, weight: Tensor, old: hijack.QuantizedTensor, *, seed: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Quantize again; what multiplies the columns stays what it is."""
        columns = old.params.get("pre_quant_scale")
        if columns is None:
            return self.quantize(weight, **old.options)
        qdata, params = self.quantize(weight / columns.float(), **old.options)
        return qdata, {**params, "pre_quant_scale": columns.clone()}

    def validate(self, qdata: Tensor, params: Mapping[str, Tensor], where: str) -> None:
        """Refuse shapes and dtypes that do not fit, and scales that cannot be.

        Block scales have no sign: a matrix unit would not see it.
        """
        _fp4.check_weight(qdata, COLS, where)
        (n, half), dense = qdata.shape, (torch.float32, torch.bfloat16, torch.float16)
        grid = (n, half // (COLS // 2))
        scale = _fp4.check_scale(params, "weight_scale", (_E4M3,), grid, where)
        whole = _fp4.check_scale(params, "weight_scale_2", dense[:1], (), where)
        columns = None
        if "pre_quant_scale" in params:
            shape = (2 * half,)
            columns = _fp4.check_scale(params, "pre_quant_scale", dense, shape, where)
        _fp4.check_columns(qdata, params, COLS, where)
        if qdata.is_meta or scale.is_meta or whole.is_meta:
            return
        if scale.numel() and int(scale.view(torch.uint8).max()) > _SCALE_MAX_BITS:
            raise NonFiniteError(
                f"{where}: weight_scale holds NaN or a negative number, expected 0 to "
                "448; the file is damaged, or in a format with the same names"
            )
        if not 0 <= float(whole) < math.inf:
            raise NonFiniteError(
                f"{where}: weight_scale_2 is {float(whole)}, expected a positive "
                "number; the file is damaged, get it again"
            )
        if columns is not None and not (columns.isfinite() & (columns != 0)).all():
            raise NonFiniteError(
                f"{where}: pre_quant_scale holds 0, inf or NaN, expected finite "
                "numbers; the file is damaged, get it again"
            )


# -- numerics --------------------------------------------------------------------------


def _scale_of(weight: Tensor) -> Tensor:
    """The scale of a whole weight: () float32.

    It is rounded to the weight's dtype, as comfy-kitchen does; but not to a subnormal
    number of float16, which may be zero.
    """
    most = weight.abs().amax()
    scale = (most / (e2m1.MAX * _SCALE_MAX)).float()
    if weight.dtype == torch.float16:
        least = torch.finfo(torch.float16).tiny
        scale = torch.where(
            scale < least, most.float() / (e2m1.MAX * _SCALE_MAX), scale
        )
    return torch.where(scale == 0, 1.0, scale)  # of a weight of zeros


def _scales_of(blocks: Tensor, whole: Tensor) -> Tensor:
    """The absmax scales of (N, blocks, 16) float32: (N, blocks) E4M3."""
    scale = blocks.abs().amax(2) / e2m1.MAX / whole
    return scale.clamp(max=_SCALE_MAX).to(_E4M3)


def _scaled(blocks: Tensor, scale: Tensor) -> Tensor:
    """(N, blocks, 16) float32 divided by (N, blocks) scales; zero where those are."""
    zero = scale == 0
    quotient = blocks / torch.where(zero, 1.0, scale).unsqueeze(2)
    return torch.where(zero.unsqueeze(2), 0.0, quotient)


def _search(blocks: Tensor, scale: Tensor, whole: Tensor, count: int) -> Tensor:
    """The scales with the least squared error, among the absmax scale and others.

    Five numbers above it is one and a half of it: a block in which several elements are
    nearly the largest is better off if that becomes 4 and not 6, because there is a 3
    between 2 and 4, and nothing between 4 and 6.
    """
    bits = scale.view(torch.uint8).int()
    best, least = bits, _error(blocks, scale, whole)
    for step in _STEPS[:count]:
        tried = (bits + step).clamp(0, _SCALE_MAX_BITS)
        error = _error(blocks, tried.to(torch.uint8).view(_E4M3), whole)
        best = torch.where(error < least, tried, best)
        least = torch.minimum(error, least)
    return best.to(torch.uint8).view(_E4M3)


def _error(blocks: Tensor, scale: Tensor, whole: Tensor) -> Tensor:
    """Squared error of (N, blocks, 16) with these scales: (N, blocks)."""
    codes = e2m1.encode(_scaled(blocks, scale.float() * whole).flatten(1))
    decoded = decode(_fp4.block_scaled(codes, scale, COLS, whole), torch.float32)
    return (decoded.view(blocks.shape) - blocks).square().sum(2)


#: The scheme; it keeps nothing, so that one serves everybody.
SCHEME = NVFP4()


@hijack.hookimpl
def hijack_register_schemes(registry: hijack.Registry) -> None:
    """Register the scheme with any registry that loads this plugin."""
    registry.register(SCHEME)


hijack.default_registry().register(SCHEME)
