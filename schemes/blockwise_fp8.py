"""FP8 with one scale per block of the weight: the reference scheme.

A weight W of shape (N, K) is cut into blocks of R x C elements, which may be short at
the right and lower edge. With m the largest finite number of the FP8 dtype (448 for
e4m3fn, 57344 for e5m2), every block b has the scale and the codes ::

    s_b = max(max_{ij in b} |W_ij| / m, 1e-8)              rounded to the scale's dtype
    Q_ij = fp8(clamp(W_ij / s_b, -m, m))                   the quotient in float32
    W_ij ~ Q_ij * s_b                                      the product in float32

The scale is rounded before it divides, so the codes fit the scale that is stored.
Blocks of (N, K), (1, K), (1, 64) and (128, 128) are per tensor, per row, musubi-tuner's
and DeepSeek's format. Convolutions are seen as (N, product of the other dimensions).

The scale grid alone does not tell the block size where a block is short: 576 rows in 5
blocks may be 4 x 128 + 64 or 4 x 116 + 112. Where the blocks do not divide the weight
exactly, a second tensor ``weight_block_size`` says it: it is empty, and its shape is
(R, C, 0). It costs no bytes and survives ``state_dict``, safetensors, ``.to`` and
``torch.compile``. Where it is absent, the grid must divide the weight.

References: DeepSeek-V3 technical report (arXiv 2412.19437), section 3.3; musubi-tuner,
``fp8_optimization_utils.py``, for format and numerics of the 1 x 64 blocks.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

import hijack
from hijack.errors import (
    CheckpointError,
    DTypeError,
    NonFiniteError,
    SchemeError,
    ShapeError,
)
from hijack.formats.comfyui_markers import FULL_PRECISION
from hijack.options import Option
from schemes._blocks import (
    SCALE_DTYPES,
    BlockSize,
    as_grid,
    block_size_of,
    cut,
    embedding_forward,
    infer_block_size,
    make_params,
    matrix_shape,
    parse_block_size,
    reblock,
)
from schemes._fp8 import quantize
from schemes._fp8.blocks import FP8_DTYPES, POWER_DTYPES, check_scales
from schemes._fp8.dialects import DIALECTS, NATIVE
from schemes._fp8.dialects.base import likeness
from schemes._kernels.block_scaled import BlockScaled
from schemes._kernels.eager import are_plain
from schemes._kernels.forward import decode
from schemes._kernels.scheme import QUANTIZED_INPUTS, BlockScaledScheme
from schemes._kernels.torch_eager import is_finite

#: Codes of a weight that are looked at for NaN and inf: one in 128 codes of a damaged
#: file is one of them.
CHECKED = 1 << 14

# -- the scheme ----------------------------------------------------------------------


class BlockwiseFP8(BlockScaledScheme):
    """FP8 codes with one multiplying scale per block."""

    name = "blockwise_fp8"
    targets = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    dialects = DIALECTS
    native = NATIVE
    claims_unmarked = True
    refuses_non_finite = True
    is_default = True
    options = (
        Option("block_size", "block_size", (1, 64), "elements that share a scale"),
        Option(
            "dtype", "dtype", torch.float8_e4m3fn, "of the codes", choices=FP8_DTYPES
        ),
        Option(
            "scale_dtype",
            "dtype",
            help="of the scales; the weight's own, or what the dialect needs",
            choices=(*SCALE_DTYPES, *POWER_DTYPES[:1]),
        ),
        Option(
            "scale_search",
            "int",
            0,
            "scales to try for each block, for less error; 0 takes the absmax scale",
            minimum=0,
            maximum=quantize.MAX_CANDIDATES,
        ),
        Option("stochastic", "bool", False, "round up or down at random"),
        Option("seed", "int", 0, "of the random numbers"),
        Option(
            FULL_PRECISION,
            "bool",
            False,
            "never multiply the layer in FP8, where a program could",
            forward=True,
        ),
        Option(
            QUANTIZED_INPUTS,
            "bool",
            False,
            "quantize the input of a Linear too, and multiply in FP8 where the device "
            "has a unit for the blocks",
            forward=True,
        ),
    )

    def quantize(  # type: ignore[override]
        self,
        weight: Tensor,
        *,
        block_size: BlockSize = (1, 64),
        dtype: torch.dtype = torch.float8_e4m3fn,
        scale_dtype: torch.dtype | None = None,
        scale_search: int = 0,
        stochastic: bool = False,
        seed: int = 0,
        full_precision_matrix_mult: bool = False,
        quantized_inputs: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cut a weight into blocks and scale each to FP8.

        Args:
            weight: (N, ...) floating point; meta tensors give meta tensors.
            block_size: as for `parse_block_size`; clipped to the weight.
            dtype: float8_e4m3fn or float8_e5m2.
            scale_dtype: float32, bfloat16, float16, or float8_e8m0fnu for powers of
                two, rounded up; None is the weight's own, which gives bit for bit what
                musubi-tuner writes.
            scale_search: how many scales to try for each block, up to 128, to take the
                one with the least squared error; 0 takes the absmax scale, 32 gains 1.6
                to 1.9 dB in blocks of 1 x 64 and takes four times as long.
            stochastic: round up or down at random, without bias, not to nearest. Scales
                are searched as if codes were rounded to nearest.
            seed: of the random numbers; the same seed gives the same codes.
            full_precision_matrix_mult: of the layer that the weight is for; the weight
                is the same.
            quantized_inputs: of the layer too; without effect beside the option above.

        Returns:
            Codes of the weight's shape; ``weight_scale`` (ceil(N/R), ceil(K/C)), and
            ``weight_block_size`` (R, C, 0) uint8 if the blocks do not divide it.

        Raises:
            SchemeError: if an option is wrong.
            DTypeError: if the weight is not floating point.
            NonFiniteError: if the weight holds inf or NaN.
        """
        scale_dtype = _check_options(weight, dtype, scale_dtype, scale_search)
        n, k = matrix_shape(tuple(weight.shape))
        rows, cols = parse_block_size(block_size, (n, k))
        params = _empty_params((n, k), (rows, cols), scale_dtype, weight.device)
        qdata = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        if weight.is_meta or not weight.numel():
            return qdata, params
        random = (
            torch.Generator(weight.device).manual_seed(seed) if stochastic else None
        )
        quantize.quantize(
            weight.detach().reshape(n, k),
            (rows, cols),
            qdata.view(n, k),
            params["weight_scale"],
            candidates=scale_search,
            random=random,
        )
        return qdata, params

    def block_scaled(self, qdata: Tensor, params: Mapping[str, Tensor]) -> BlockScaled:
        """The codes as a matrix, with the grid of scales over it.

        Args:
            qdata: (N, ...) float8_e4m3fn or float8_e5m2.
            params: ``weight_scale`` and, where blocks are short, ``weight_block_size``.

        Raises:
            ShapeError: if the scale does not cover the weight.
        """
        scale = as_grid(params["weight_scale"])
        if scale.dtype == torch.uint8:  # bytes of exponents
            scale = scale.view(torch.float8_e8m0fnu)
        codes = qdata if qdata.ndim == 2 else qdata.reshape(matrix_shape(qdata.shape))
        return BlockScaled(codes, scale, block_size_of(qdata, params))

    def dequantize(
        self, qdata: Tensor, params: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        """Multiply each code by its block's scale.

        The product is formed in float32 and rounded once. With scale and result of one
        16-bit dtype this equals the product in that dtype.

        Args:
            qdata: (N, ...) float8_e4m3fn or float8_e5m2.
            params: ``weight_scale`` and, where blocks are short, ``weight_block_size``.
            dtype: floating dtype of the result.

        Returns:
            (N, ...) of ``dtype``.

        Raises:
            ShapeError: if the scale does not cover the weight.
        """
        return decode(self.block_scaled(qdata, params), dtype).view(qdata.shape)

    def declines(self, shape: tuple[int, ...], **options: Any) -> str | None:
        """Weights without elements, which no block has."""
        return "it has no elements" if 0 in shape else None

    def row_step(self, shape: tuple[int, ...], **options: Any) -> int | None:
        """The rows of a block, unless random numbers are drawn for the weight."""
        if 0 in shape or options.get("stochastic"):
            return None
        size = options.get("block_size", (1, 64))
        return parse_block_size(size, matrix_shape(shape))[0]

    def dense_shape(
        self, qdata: Tensor, params: Mapping[str, Tensor]
    ) -> tuple[int, ...]:
        """The shape of the codes."""
        return tuple(qdata.shape)

    def options_of(self, qdata: Tensor, params: Mapping[str, Tensor]) -> dict[str, Any]:
        """Block size and both dtypes, which the tensors tell."""
        options: dict[str, Any] = {
            "block_size": block_size_of(qdata, params),
            "dtype": qdata.dtype,
        }
        scale = params["weight_scale"].dtype
        if scale in (*SCALE_DTYPES, *POWER_DTYPES[:1]):
            options["scale_dtype"] = scale
        return options

    def options_like(self, dtype: torch.dtype) -> dict[str, Any]:
        """Scales of that dtype, where it is one of theirs."""
        return {"scale_dtype": dtype if dtype in SCALE_DTYPES else torch.float32}

    def requantize(
        self, weight: Tensor, old: hijack.QuantizedTensor, *, seed: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Quantize again with the options the layer has; a seed rounds at random."""
        told = self.options_of(old.qdata, old.params)
        random = {"stochastic": bool(seed), "seed": seed}
        return self.quantize(weight, **{**old.options, **told, **random})

    def likeness(self, header: hijack.Header, layer: str) -> Hashable | None:
        """The layer's tensors, and what the markers of all dialects say of it."""
        return likeness(header, layer)

    def block_size(
        self, qdata: Tensor, params: Mapping[str, Tensor]
    ) -> tuple[int, int]:
        """The block size, which the shapes tell."""
        return block_size_of(qdata, params)

    def reblock(
        self,
        qdata: Tensor,
        params: Mapping[str, Tensor],
        block_size: tuple[int, int],
    ) -> dict[str, Tensor] | None:
        """The parameters of the same codes in other blocks, if the scales allow it.

        Args:
            qdata: (N, ...) codes.
            params: as for `dequantize`.
            block_size: (R', C') asked for.

        Returns:
            Parameters that decode to the same weight bit for bit, or None.
        """
        shape = matrix_shape(tuple(qdata.shape))
        size = block_size_of(qdata, params)
        wanted = parse_block_size(block_size, shape)
        if wanted == size:
            return dict(params)
        scale = reblock(params["weight_scale"], shape, size, wanted)
        return None if scale is None else make_params(scale, shape, wanted)

    def params_of_part(
        self,
        params: Mapping[str, Tensor],
        shape: tuple[int, ...],
        part: tuple[slice, ...],
    ) -> dict[str, Tensor] | None:
        """The scales of a part; blocks that are cut through become narrower ones.

        Args:
            params: as for `dequantize`.
            shape: (N, ...) of the whole weight.
            part: rows and columns; of convolutions, rows.
        """
        whole = matrix_shape(shape)
        if len(shape) > 2 and any(
            s.stop - s.start != size
            for s, size in zip(part[1:], shape[1:], strict=True)
        ):
            return None
        marker = params.get("weight_block_size")
        scale = params["weight_scale"]
        size = infer_block_size(
            shape, tuple(scale.shape), None if marker is None else tuple(marker.shape)
        )
        spans = (part[0], part[1] if len(shape) == 2 else slice(0, whole[1]))
        return cut(scale, whole, size, spans)

    def bind_forward(self, module: nn.Module) -> Callable[..., Tensor] | None:
        """Forwards that decode what they need: a piece of a Linear, rows of a table."""
        if isinstance(module, nn.Embedding):
            plain = module.max_norm is None and not module.sparse
            return embedding_forward if plain else None
        return super().bind_forward(module)

    def validate(self, qdata: Tensor, params: Mapping[str, Tensor], where: str) -> None:
        """Refuse dtypes the scheme has not, and numbers that cannot be.

        A scale must cover the weight and be positive and finite; zero is allowed where
        all codes of the block are. Of a large weight the first codes are looked at, so
        that a file is not read in order to be mapped.
        """
        if qdata.dtype not in FP8_DTYPES:
            raise DTypeError(
                f"{where}: weight is {qdata.dtype}, expected {_names(FP8_DTYPES)}"
            )
        if "weight_scale" not in params:
            raise CheckpointError(f"{where}: weight_scale is missing beside the weight")
        scale = params["weight_scale"]
        if scale.dtype not in (*SCALE_DTYPES, *POWER_DTYPES):
            raise DTypeError(
                f"{where}: weight_scale is {scale.dtype}, expected one of "
                f"{_names((*SCALE_DTYPES, *POWER_DTYPES))}"
            )
        try:
            size = block_size_of(qdata, params)
        except ShapeError as error:
            raise ShapeError(f"{where}: {error}") from error
        if scale.is_meta or qdata.is_meta:
            return
        check_scales(qdata, scale, size, where)
        codes = qdata
        if codes.numel() > CHECKED:
            codes = codes[: max(CHECKED // codes[0].numel(), 1)]
        if are_plain(codes) and not is_finite(codes):
            raise NonFiniteError(
                f"{where}: weight holds NaN or inf, expected finite numbers; the file "
                "is damaged, get it again"
            )


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _check_options(
    weight: Tensor,
    dtype: torch.dtype,
    scale_dtype: torch.dtype | None,
    scale_search: int,
) -> torch.dtype:
    """The dtype of the scale, if everything is as it should be."""
    if not weight.is_floating_point() or weight.element_size() == 1:
        raise DTypeError(
            f"weight is {weight.dtype}, expected a dense floating dtype; dequantize it "
            "first"
        )
    if dtype not in FP8_DTYPES:
        raise SchemeError(f"dtype: got {dtype}, expected one of {_names(FP8_DTYPES)}")
    most = quantize.MAX_CANDIDATES
    if type(scale_search) is not int or not 0 <= scale_search <= most:
        raise SchemeError(
            f"scale_search: got {scale_search!r}, expected how many scales to try, an "
            f"int from 0 to {most}; take 32"
        )
    if scale_dtype is None:
        return weight.dtype if weight.dtype in SCALE_DTYPES else torch.float32
    known = (*SCALE_DTYPES, *POWER_DTYPES[:1])
    if scale_dtype not in known:
        raise SchemeError(
            f"scale_dtype: got {scale_dtype}, expected one of {_names(known)}"
        )
    return scale_dtype


def _empty_params(
    shape: tuple[int, int],
    size: tuple[int, int],
    dtype: torch.dtype,
    device: torch.device,
) -> dict[str, Tensor]:
    (n, k), (rows, cols) = shape, size
    grid = (-(-n // rows), -(-k // cols))
    params = {"weight_scale": torch.empty(grid, dtype=dtype, device=device)}
    if n % rows or k % cols:
        marker = torch.empty((rows, cols, 0), dtype=torch.uint8, device=device)
        params["weight_block_size"] = marker
    return params


#: The scheme; it keeps nothing, so that one serves everybody.
SCHEME = BlockwiseFP8()


@hijack.hookimpl
def hijack_register_schemes(registry: hijack.Registry) -> None:
    """Register the scheme with any registry that loads this plugin."""
    registry.register(SCHEME)


hijack.default_registry().register(SCHEME)
