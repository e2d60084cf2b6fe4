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
from torch.autograd import forward_ad

import hijack
import hijack.hosts
from hijack.errors import (
    CheckpointError,
    DTypeError,
    NonFiniteError,
    SchemeError,
    ShapeError,
)
from hijack.formats.tensor_dialect import likeness
from hijack.modules import linear_forward as default_linear
from hijack.options import Option
from schemes._blocks import (
    SCALE_DTYPES,
    BlockSize,
    Pair,
    as_grid,
    block_size_of,
    check_scales,
    cut,
    embedding_forward,
    grid_shape,
    make_params,
    matrix_shape,
    multiply,
    parse_block_size,
    reblock,
)
from schemes._fp8.decode import are_plain
from schemes._int8_dialects import DIALECTS, NATIVE
from schemes._rotation import (
    ROTATIONS,
    check_rotation,
    rotate,
    rotate_inputs,
    rotation_marker,
    rotation_of,
)

#: The least scale, as in comfy-kitchen.
MIN_SCALE = 1e-30
#: Elements processed at a time: on the CPU what fits the cache, elsewhere enough to
#: hide the launch of operations.
CHUNK = 1 << 20
DEVICE_CHUNK = 1 << 24
#: Elements of an output that are in float32 at a time.
OUTPUT_CHUNK = 1 << 26
#: Most scales that are tried for a block.
MAX_CANDIDATES = 64

# -- the scheme ------------------------------------------------------------------------


class Int8(hijack.Scheme):
    """INT8 codes with a scale for each block, of a weight that may be rotated."""

    name = "int8"
    targets = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    dialects = DIALECTS
    native = NATIVE
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
            "quantized_inputs",
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
        step = max(_chunk(matrix) // (rows * k), 1)  # rows of blocks
        for part, codes, scales in zip(
            torch.split(matrix, step * rows),
            torch.split(qdata.view(n, k), step * rows),
            torch.split(params["weight_scale"], step),
            strict=True,
        ):
            part = part.float()
            if rotation:
                part = rotate(part, rotation)
            scales.copy_(_scale(part, (rows, cols), scale_dtype, scale_search))
            if not scales.isfinite().all():
                raise _not_finite(weight)
            codes.copy_(_codes(part, scales.float(), (rows, cols), random))
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
        codes = qdata.reshape(matrix_shape(tuple(qdata.shape)))
        scale, size = as_grid(params["weight_scale"]), block_size_of(qdata, params)
        rotation = rotation_of(params)
        if not are_plain(qdata, scale):
            return _decode(codes, scale, size, rotation).to(dtype).view(qdata.shape)
        dense = torch.empty(codes.shape, dtype=dtype, device=qdata.device)
        step = max(_chunk(codes) // (size[0] * codes.shape[1]), 1)  # rows of blocks
        for part, scales, target in zip(
            torch.split(codes, step * size[0]),
            torch.split(scale, step),
            torch.split(dense, step * size[0]),
            strict=True,
        ):
            target.copy_(_decode(part, scales, size, rotation))
        return dense.view(qdata.shape)

    def declines(self, shape: tuple[int, ...], **options: Any) -> str | None:
        """Refuse what is empty, or to rotate what is no whole number of groups wide."""
        if 0 in shape:
            return "it has no elements"
        rotation, k = options.get("rotation") or 0, matrix_shape(shape)[1]
        if rotation and k % rotation:
            return f"its {k} columns are no whole groups of {rotation} to rotate"
        return None

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
        if isinstance(module, nn.Linear):
            return linear_forward
        if isinstance(module, nn.Embedding):
            plain = module.max_norm is None and not module.sparse
            return embedding_forward if plain else None
        return None

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


def _decode(codes: Tensor, scale: Tensor, size: Pair, rotation: int) -> Tensor:
    """(n, K) float32 of codes and (ceil(n/R), ceil(K/C)) scales."""
    dense = multiply(codes.float(), scale.float(), size)
    return rotate(dense, rotation) if rotation else dense


def _scale(part: Tensor, size: Pair, dtype: torch.dtype, candidates: int) -> Tensor:
    """(ceil(n/R), ceil(K/C)) scales of (n, K) float32, the absmax scale or a better."""
    amax = _reduce(part.abs(), size, torch.amax)
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
    part: Tensor, scale: Tensor, size: Pair, random: torch.Generator | None
) -> Tensor:
    """(n, K) float32 whole numbers from -128 to 127."""
    codes = part / multiply(torch.ones_like(part), scale, size)
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
    part = F.pad(part, (0, -k % cols, 0, -n % rows))
    blocks = part.view(len(part) // rows, rows, -1, cols)
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


# -- forwards --------------------------------------------------------------------------


def linear_forward(
    module: nn.Module,
    input: Tensor,
    weight: hijack.QuantizedTensor,
    bias: Tensor | None,
) -> Tensor:
    """``F.linear`` with the decoded weight, or in integers if the layer asks for that.

    Where gradients are wanted, and where a row of the weight has several scales, the
    weight is decoded: rounding has no gradient, and an int32 sum has one scale.

    Args:
        module: not used; the weight may be anywhere.
        input: (..., K).
        weight: (N, K).
        bias: (N,), or None.

    Returns:
        (..., N) of ``input``'s dtype.
    """
    if not weight.options.get("quantized_inputs") or not _can_quantize(input, weight):
        return default_linear(module, input, weight, bias)
    rows, _ = block_size_of(weight.qdata, weight.params)
    scale = as_grid(weight.params["weight_scale"])
    if 1 < rows < weight.shape[0]:
        scale = scale[torch.arange(weight.shape[0], device=scale.device) // rows]
    device = input.device.type
    if torch.is_autocast_enabled(device):  # as F.linear would
        input = input.to(torch.get_autocast_dtype(device))
    rotation = rotation_of(weight.params)
    return int8_linear(input, weight.qdata, scale, rotation, bias)


def _can_quantize(input: Tensor, weight: hijack.QuantizedTensor) -> bool:
    return (
        input.dtype in SCALE_DTYPES
        and input.device.type in ("cpu", "cuda")
        and input.shape[-1:] == weight.shape[1:]
        and input.numel() > 0
        and block_size_of(weight.qdata, weight.params)[1] == weight.shape[1]
        and not _is_differentiated(input)
    )


def _is_differentiated(input: Tensor) -> bool:
    """Whether a derivative is wanted; rounding would give zero without a word."""
    if input.requires_grad and torch.is_grad_enabled():
        return True
    if torch.compiler.is_compiling():
        return False
    transformed: bool = torch._C._are_functorch_transforms_active()
    return transformed or forward_ad._current_level >= 0


def int8_linear(
    x: Tensor, codes: Tensor, scale: Tensor, rotation: int, bias: Tensor | None
) -> Tensor:
    """``F.linear`` in integers, with a scale for each token of the input.

    It computes what comfy-kitchen's ``int8_linear`` does, bit for bit if the input is
    float32. An input of 16 bits is divided by its scale in float32 here, and in its own
    dtype there, so that a code may differ by one.

    Args:
        x: (..., K) float32, bfloat16 or float16.
        codes: (N, K) int8.
        scale: (N, 1) or (1, 1).
        rotation: columns of a rotated group, or 0.
        bias: (N,), or None.

    Returns:
        (..., N) of ``x``'s dtype.
    """
    n, k = codes.shape
    tokens = x.reshape(-1, k)  # (M, K)
    step = max(OUTPUT_CHUNK // n, 1)
    whole = torch.compiler.is_compiling() or len(tokens) <= step
    parts = [
        _multiply(part, codes, scale.float().t(), rotation)
        for part in ([tokens] if whole else torch.split(tokens, step))
    ]
    output = parts[0] if whole else torch.cat(parts)
    if bias is not None:
        output = output + bias.to(x.dtype)
    return output.view(*x.shape[:-1], n)


def _multiply(tokens: Tensor, codes: Tensor, scale: Tensor, rotation: int) -> Tensor:
    """(M, N) of ``tokens``' dtype: (M, K) times (N, K) int8 with scales (1, N)."""
    dtype = tokens.dtype
    if rotation:
        tokens = rotate_inputs(tokens, rotation)
    amax = tokens.abs().amax(1, keepdim=True).float()
    token_scale = (amax / amax.new_tensor(127.0)).clamp_min(MIN_SCALE)  # (M, 1)
    tokens = (tokens.float() / token_scale).round_().clamp_(-128, 127).to(torch.int8)
    return (_int_mm(tokens, codes).float() * (token_scale * scale)).to(dtype)


def _int_mm(a: Tensor, b: Tensor) -> Tensor:
    """(M, K) times the transpose of (N, K), both int8, as (M, N) int32.

    cuBLAS takes more than 16 rows and multiples of 8 columns; others are filled with
    zeros.
    """
    (m, k), n = a.shape, len(b)
    if a.is_cuda:
        a = F.pad(a, (0, -k % 8, 0, -m % 32))
        b = F.pad(b, (0, -k % 8, 0, -n % 32))
    return torch._int_mm(a, b.t())[:m, :n]


#: The scheme; it keeps nothing, so that one serves everybody.
SCHEME = Int8()


@hijack.hookimpl
def hijack_register_schemes(registry: hijack.Registry) -> None:
    """Register the scheme with any registry that loads this plugin."""
    registry.register(SCHEME)


hijack.default_registry().register(SCHEME)
hijack.hosts.arm("comfyui")
