"""INT8 with one scale per row, block or weight, also of a rotated weight (ConvRot).

A weight W of shape (N, K) is cut into blocks of R x C elements, one row each by
default. Every block b has the scale and the codes ::

    s_b = max(max_{ij in b} |W_ij| / 127, 1e-30)           in float32
    Q_ij = clamp(round(W_ij / s_b), -128, 127)             half to even
    W_ij ~ Q_ij * s_b                                      the product in float32

With ``rotation`` g, every group of g columns is rotated before: W becomes W H, and the
weight is (Q * s) H^T in float32. H is the regular Hadamard matrix of g = 4^m, which is
symmetric and its own inverse, and spreads an outlier evenly over its group ::

        1  [ 1  1  1 -1]
    H = -  [ 1  1 -1  1]  for g = 4,     H_4g = H_4 (x) H_g
        2  [ 1 -1  1  1]
           [-1  1  1  1]

Which rotation a weight has is a tensor without elements, ``weight_rotation`` of shape
(g, 0): it costs no bytes and survives ``state_dict``, safetensors, ``.to`` and
``torch.compile``. So is the size of short blocks, ``weight_block_size`` of (R, C, 0).

A Linear whose option ``quantized_inputs`` is set multiplies in integers (W8A8): each
token x of the input is rotated as the weight is, and quantized as a row of its own ::

    y = (int8(x H) . Q^T) * (s_x s_w) + bias               the sum in int32

See `schemes._kernels.int_mm`. Where gradients are wanted, and where a row of the weight
has several scales, the weight is decoded.

References: comfy-kitchen, ``backends/eager/quantization.py`` and ``tensor/int8.py``,
which computes in the weight's dtype, here it is always float32; ConvRot (arXiv
2512.03673) for the regular Hadamard matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hijack
from hijack.errors import (
    CheckpointError,
    DTypeError,
    NonFiniteError,
    SchemeError,
    ShapeError,
)
from hijack.formats.tensor_dialect import likeness
from hijack.options import Option
from schemes._blocks import (
    SCALE_DTYPES,
    BlockSize,
    Pair,
    as_grid,
    block_size_of,
    check_scales,
    cut,
    divides,
    embedding_forward,
    grid_shape,
    make_params,
    matrix_shape,
    multiply,
    parse_block_size,
    reblock,
)
from schemes._int8_dialects import DIALECTS, NATIVE
from schemes._kernels.block_scaled import BlockScaled
from schemes._kernels.eager import are_plain
from schemes._kernels.forward import decode
from schemes._kernels.scheme import QUANTIZED_INPUTS, BlockScaledScheme
from schemes._kernels.table import TABLE
from schemes._rotation import (
    ROTATIONS,
    check_rotation,
    rotate,
    rotation_marker,
    rotation_of,
)

#: The least scale, as in comfy-kitchen.
MIN_SCALE = 1e-30
#: Elements processed at a time: on the CPU what fits the cache, elsewhere enough to
#: hide the launch of operations.
CHUNK = 1 << 20
#: The same where neither a product nor random numbers depend on it: a core's cache.
TILE = 1 << 18
#: Most threads that share a tile; more take longer to start than it takes to compute.
MAX_THREADS = 16
DEVICE_CHUNK = 1 << 24
#: Most scales that are tried for a block.
MAX_CANDIDATES = 64

# -- the scheme ------------------------------------------------------------------------


class Int8(BlockScaledScheme):
    """INT8 codes with a scale for each block, of a weight that may be rotated."""

    name = "int8"
    targets = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    dialects = DIALECTS
    native = NATIVE
    refuses_non_finite = True
    options = (
        Option("block_size", "block_size", "row", "elements that share a scale"),
        Option(
            "rotation",
            "int",
            0,
            "columns of a group that are rotated together (ConvRot), 256 as a rule; "
            "0 rotates none",
            choices=ROTATIONS,
        ),
        Option(
            "scale_dtype",
            "dtype",
            torch.float32,
            "of the scales",
            choices=SCALE_DTYPES,
        ),
        Option(
            "scale_search",
            "int",
            0,
            "scales to try for each block, for less error; 0 takes the absmax scale",
            minimum=0,
            maximum=MAX_CANDIDATES,
        ),
        Option("stochastic", "bool", False, "round up or down at random"),
        Option("seed", "int", 0, "of the random numbers"),
        Option(
            QUANTIZED_INPUTS,
            "bool",
            False,
            "quantize the input of a Linear too, and multiply in integers (W8A8)",
            forward=True,
        ),
    )

    def quantize(  # type: ignore[override]
        self,
        weight: Tensor,
        *,
        block_size: BlockSize = "row",
        rotation: int = 0,
        scale_dtype: torch.dtype = torch.float32,
        scale_search: int = 0,
        stochastic: bool = False,
        seed: int = 0,
        quantized_inputs: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Rotate a weight, cut it into blocks and scale each to INT8.

        Args:
            weight: (N, ...) floating point; meta tensors give meta tensors.
            block_size: (rows, cols), an int n for (1, n), ``"row"`` or ``"tensor"``;
                clipped to the weight.
            rotation: columns of a group, a power of 4 that divides K; 0 for none.
            scale_dtype: float32, bfloat16 or float16.
            scale_search: how many scales below the absmax scale to try for each block,
                to take the one with the least squared error.
            stochastic: round up or down at random, without bias, not to nearest.
            seed: of the random numbers; the same seed gives the same codes.
            quantized_inputs: of the layer that the weight is for; the weight is the
                same.

        Returns:
            Codes of the weight's shape; ``weight_scale`` (ceil(N/R), ceil(K/C)),
            ``weight_block_size`` (R, C, 0) uint8 if the blocks do not divide the
            weight, and ``weight_rotation`` (rotation, 0) uint8 if it is rotated.

        Raises:
            SchemeError: if an option is wrong.
            DTypeError: if the weight is not floating point.
            NonFiniteError: if the weight holds inf or NaN.
        """
        self.check_options({"scale_dtype": scale_dtype, "scale_search": scale_search})
        if not weight.is_floating_point() or weight.element_size() == 1:
            raise DTypeError(
                f"weight is {weight.dtype}, expected a dense floating dtype; "
                "dequantize it first"
            )
        n, k = matrix_shape(tuple(weight.shape))
        rows, cols = parse_block_size(block_size, (n, k))
        check_rotation(rotation, k)
        grid = grid_shape((n, k), (rows, cols))
        scale = torch.empty(grid, dtype=scale_dtype, device=weight.device)
        params = make_params(scale, (n, k), (rows, cols)) | rotation_marker(
            rotation, scale.device
        )
        qdata = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        if weight.is_meta or not weight.numel():
            return qdata, params
        matrix = weight.detach().reshape(n, k)
        random = None
        if stochastic:
            random = torch.Generator(weight.device).manual_seed(seed)
        elif not rotation and are_plain(matrix):
            codes, scales = qdata.view(n, k), params["weight_scale"]
            whole = BlockScaled(codes, scales, (rows, cols))
            finite = TABLE.quantize(matrix, whole, scale_search)
            if finite is not None:
                if not finite:
                    raise _not_finite(weight)
                return qdata, params
        room = _chunk(matrix)
        if matrix.device.type == "cpu" and not rotation and random is None:
            room = TILE * min(torch.get_num_threads(), MAX_THREADS)
        step = max(room // (rows * k), 1)  # rows of blocks
        memory = torch.empty(  # once: memory anew costs more than what it is for
            (min(step * rows, n), k), dtype=torch.float32, device=weight.device
        )
        for part, codes, scales in zip(
            torch.split(matrix, step * rows),
            torch.split(qdata.view(n, k), step * rows),
            torch.split(params["weight_scale"], step),
            strict=True,
        ):
            dense = memory[: len(part)].copy_(part)
            if rotation:
                dense = rotate(dense, rotation)
            scales.copy_(_scale(dense, (rows, cols), scale_dtype, scale_search))
            codes.copy_(_codes(dense, scales.float(), (rows, cols), random, dense))
        if not params["weight_scale"].isfinite().all():
            raise _not_finite(weight)
        return qdata, params

    def dequantize(
        self, qdata: Tensor, params: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        """Multiply each code by its block's scale, and undo the rotation.

        Both in float32; the result is rounded once.

        Args:
            qdata: (N, ...) int8.
            params: ``weight_scale``, and ``weight_block_size`` and ``weight_rotation``
                where blocks are short and the weight is rotated.
            dtype: floating dtype of the result.

        Returns:
            (N, ...) of ``dtype``.

        Raises:
            ShapeError: if the scale does not cover the weight.
        """
        return decode(self.block_scaled(qdata, params), dtype).view(qdata.shape)

    def block_scaled(self, qdata: Tensor, params: Mapping[str, Tensor]) -> BlockScaled:
        """The codes as a matrix, with the grid of scales over it.

        Args:
            qdata: (N, ...) int8.
            params: as for `dequantize`.

        Raises:
            ShapeError: if the scale does not cover the weight.
        """
        codes = qdata if qdata.ndim == 2 else qdata.reshape(matrix_shape(qdata.shape))
        scale, size = as_grid(params["weight_scale"]), block_size_of(qdata, params)
        return BlockScaled(codes, scale, size, rotation=rotation_of(params))

    def declines(self, shape: tuple[int, ...], **options: Any) -> str | None:
        """Refuse what is empty, or to rotate what is no whole number of groups wide."""
        if 0 in shape:
            return "it has no elements"
        rotation, k = options.get("rotation") or 0, matrix_shape(shape)[1]
        if rotation and k % rotation:
            return f"its {k} columns are no whole groups of {rotation} to rotate"
        return None

    def row_step(self, shape: tuple[int, ...], **options: Any) -> int | None:
        """The rows of a block, unless random numbers are drawn for the weight.

        Of a rotated weight, as many as are rotated in one product: libraries add in
        another order if there are fewer.
        """
        if 0 in shape or options.get("stochastic"):
            return None
        n, k = matrix_shape(shape)
        rows, _ = parse_block_size(options.get("block_size", "row"), (n, k))
        return max(CHUNK // (rows * k), 1) * rows if options.get("rotation") else rows

    def dense_shape(
        self, qdata: Tensor, params: Mapping[str, Tensor]
    ) -> tuple[int, ...]:
        """The shape of the codes."""
        return tuple(qdata.shape)

    def options_of(self, qdata: Tensor, params: Mapping[str, Tensor]) -> dict[str, Any]:
        """Block size, rotation and the scales' dtype, which the tensors tell."""
        return {
            "block_size": block_size_of(qdata, params),
            "rotation": rotation_of(params),
            "scale_dtype": params["weight_scale"].dtype,
        }

    def options_like(self, dtype: torch.dtype) -> dict[str, Any]:
        """No options: weights of all dtypes have the same parameters."""
        return {}

    def requantize(
        self, weight: Tensor, old: hijack.QuantizedTensor, *, seed: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Quantize again with the options the layer has; a seed rounds at random."""
        told = self.options_of(old.qdata, old.params)
        random = {"stochastic": bool(seed), "seed": seed}
        return self.quantize(weight, **{**old.options, **told, **random})

    def likeness(self, header: hijack.Header, layer: str) -> Hashable | None:
        """The layer's tensors, those of its weight's parts, and all its markers."""
        return likeness(header, layer, "weight")

    def block_size(self, qdata: Tensor, params: Mapping[str, Tensor]) -> Pair:
        """The block size, which the shapes tell."""
        return block_size_of(qdata, params)

    def reblock(
        self, qdata: Tensor, params: Mapping[str, Tensor], block_size: Pair
    ) -> dict[str, Tensor] | None:
        """The parameters of the same codes in other blocks, if the scales allow it."""
        shape = matrix_shape(tuple(qdata.shape))
        size, wanted = block_size_of(qdata, params), parse_block_size(block_size, shape)
        if wanted == size:
            return dict(params)
        scale = reblock(params["weight_scale"], shape, size, wanted)
        if scale is None:
            return None
        return make_params(scale, shape, wanted) | rotation_marker(
            rotation_of(params), scale.device
        )

    def params_of_part(
        self,
        params: Mapping[str, Tensor],
        shape: tuple[int, ...],
        part: tuple[slice, ...],
    ) -> dict[str, Tensor] | None:
        """The scales of a part: of any rows, and of columns in whole rotated groups."""
        n, k = matrix_shape(shape)
        whole = all(
            s.start == 0 and s.stop == size
            for s, size in zip(part[1:], shape[1:], strict=True)
        )
        if len(shape) != 2 and not whole:
            return None
        columns = slice(0, k) if whole else part[1]
        rotation = rotation_of(params)
        if rotation and (columns.start % rotation or columns.stop % rotation):
            return None
        size = block_size_of(torch.empty(shape, device="meta"), params)
        scales = cut(params["weight_scale"], (n, k), size, (part[0], columns))
        return scales | rotation_marker(rotation, params["weight_scale"].device)

    def bind_forward(self, module: nn.Module) -> Callable[..., Tensor] | None:
        """Forwards that multiply in integers if asked to, or decode only some rows."""
        if isinstance(module, nn.Embedding):
            plain = module.max_norm is None and not module.sparse
            return embedding_forward if plain else None
        return super().bind_forward(module)

    def validate(self, qdata: Tensor, params: Mapping[str, Tensor], where: str) -> None:
        """Refuse dtypes the scheme has not, and numbers that cannot be.

        A scale must cover the weight and be positive and finite; zero is allowed where
        all codes of the block are.
        """
        if qdata.dtype != torch.int8:
            raise DTypeError(f"{where}: weight is {qdata.dtype}, expected int8")
        if "weight_scale" not in params:
            raise CheckpointError(f"{where}: weight_scale is missing beside the weight")
        scale = params["weight_scale"]
        if scale.dtype not in SCALE_DTYPES:
            raise DTypeError(
                f"{where}: weight_scale is {scale.dtype}, expected float32, bfloat16 "
                "or float16"
            )
        try:
            size = block_size_of(qdata, params)
            check_rotation(rotation_of(params), matrix_shape(tuple(qdata.shape))[1])
        except (ShapeError, SchemeError) as error:
            raise ShapeError(f"{where}: {error}") from error
        if not scale.is_meta and not qdata.is_meta:
            check_scales(qdata, scale, size, where)


# -- numerics --------------------------------------------------------------------------


def _chunk(matrix: Tensor) -> int:
    return CHUNK if matrix.device.type == "cpu" else DEVICE_CHUNK


def _scale(part: Tensor, size: Pair, dtype: torch.dtype, candidates: int) -> Tensor:
    """(ceil(n/R), ceil(K/C)) scales of (n, K) float32, the absmax scale or a better."""
    # two reductions read what an absolute value would have to write
    high, low = (_reduce(part, size, end) for end in (torch.amax, torch.amin))
    amax = torch.maximum(high.abs_(), low.abs_())
    # divide by a tensor: a GPU multiplies by a scalar's reciprocal, which rounds twice
    scale = (amax / amax.new_tensor(127.0)).to(dtype).float()
    scale = scale.clamp_min(max(MIN_SCALE, torch.finfo(dtype).tiny))
    if not candidates:
        return scale
    best, least = scale, _squared_error(part, scale, size)
    for number in range(1, candidates + 1):  # down to half, which clips the largest
        other = (scale * (1 - number / (2 * candidates))).to(dtype).float()
        error = _squared_error(part, other, size)
        best = torch.where(error < least, other, best)
        least = torch.minimum(error, least)
    return best


def _codes(
    part: Tensor,
    scale: Tensor,
    size: Pair,
    random: torch.Generator | None,
    out: Tensor | None = None,
) -> Tensor:
    """(n, K) float32 whole numbers from -128 to 127, in ``out`` if it is given."""
    (n, k), (rows, cols) = part.shape, size
    codes = torch.empty_like(part) if out is None else out
    if rows > 1:
        scale = scale[torch.arange(n, device=scale.device) // rows]  # (n, ceil(K/C))
    many, whole = k // cols, k // cols * cols  # whole blocks, then the short one
    blocks, target = (
        torch.unflatten(t[:, :whole], 1, (many, cols)) for t in (part, codes)
    )
    torch.div(blocks, scale[:, :many, None], out=target)
    if whole < k:
        torch.div(part[:, whole:], scale[:, many:], out=codes[:, whole:])
    if random is None:
        codes = codes.round_()
    else:
        noise = torch.rand(codes.shape, generator=random, device=codes.device)
        codes = codes.add_(noise).floor_()
    return codes.clamp_(-128, 127)


def _squared_error(part: Tensor, scale: Tensor, size: Pair) -> Tensor:
    """(ceil(n/R), ceil(K/C)) of (n, K) that is quantized with a scale."""
    error = multiply(_codes(part, scale, size, None), scale, size).sub_(part)
    return _reduce(error.square_(), size, torch.sum)


def _reduce(
    part: Tensor, size: Pair, reduction: Callable[[Tensor, list[int]], Tensor]
) -> Tensor:
    """Each block of (n, K) to a number; short blocks are filled with zeros."""
    (n, k), (rows, cols) = part.shape, size
    if not divides((n, k), size):
        part = F.pad(part, (0, -k % cols, 0, -n % rows))
    blocks = part.view(len(part) // rows, rows, -1, cols)
    if rows == 1:
        return reduction(blocks[:, 0], [2])
    return reduction(blocks, [1, 3])


def _not_finite(weight: Tensor) -> NonFiniteError:
    """Why a scale is not finite: the weight is not, or is too large for its dtype."""
    weight = weight.float()  # float64 may become infinite
    nans, infs = int(weight.isnan().sum()), int(weight.isinf().sum())
    return NonFiniteError(
        f"weight of shape {tuple(weight.shape)} holds {nans} NaN and {infs} infinite "
        "values as float32, or a scale of it does not fit its dtype, expected finite "
        "ones; choose scale_dtype float32, repair the checkpoint or exclude it"
    )


#: The scheme; it keeps nothing, so that one serves everybody.
SCHEME = Int8()


@hijack.hookimpl
def hijack_register_schemes(registry: hijack.Registry) -> None:
    """Register the scheme with any registry that loads this plugin."""
    registry.register(SCHEME)


hijack.default_registry().register(SCHEME)
