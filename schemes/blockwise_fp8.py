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

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hijack
from hijack.checkpoint.dialect import Certainty, Claim, Dialect
from hijack.checkpoint.header import Header, TensorInfo, join
from hijack.errors import (
    CheckpointError,
    DTypeError,
    NonFiniteError,
    SchemeError,
    ShapeError,
)
from schemes import _fp8_decode

BlockSize = int | str | tuple[int, int]

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Scales that are powers of two: read, never written. uint8 holds the exponent's bits.
POWER_DTYPES = (torch.float8_e8m0fnu, torch.uint8)
#: musubi-tuner's floor of the scale.
MIN_SCALE = 1e-8
#: musubi-tuner's blocks are 1 x 64.
DEFAULT_COLS = 64
#: Elements quantized or decoded at a time, so that temporaries stay in the cache.
CHUNK = 1 << 18


# -- blocks --------------------------------------------------------------------------


def parse_block_size(block_size: BlockSize, shape: tuple[int, int]) -> tuple[int, int]:
    """A block size as (rows, cols), no larger than the weight.

    Args:
        block_size: (rows, cols), an int n for (1, n), ``"1x64"``, ``"row"`` or
            ``"tensor"``.
        shape: (N, K) of the weight.

    Raises:
        SchemeError: if it is none of these or not positive.
    """
    size: Any = block_size
    if isinstance(size, str):
        words = {"row": (1, shape[1]), "tensor": shape}
        size = words.get(size) or tuple(map(_int_or_zero, size.lower().split("x")))
    if isinstance(size, int):
        size = (1, size)
    numbers = isinstance(size, (list, tuple)) and all(type(n) is int for n in size)
    if not numbers or len(size) != 2 or min(size) < 1:
        raise SchemeError(
            f"block_size: got {block_size!r}, expected (rows, cols) of positive ints, "
            "an int n for (1, n), 'ROWSxCOLS', 'row' or 'tensor'"
        )
    return min(size[0], max(shape[0], 1)), min(size[1], max(shape[1], 1))


def block_size_of(qdata: Tensor, params: Mapping[str, Tensor]) -> tuple[int, int]:
    """The block size of quantized tensors, as (rows, cols).

    Args:
        qdata: (N, ...) codes.
        params: ``weight_scale`` and, where blocks are short, ``weight_block_size``.

    Raises:
        ShapeError: if the scale does not cover the weight.
    """
    marker = params.get("weight_block_size")
    marker_shape = None if marker is None else tuple(marker.shape)
    return _block_size(
        tuple(qdata.shape), tuple(params["weight_scale"].shape), marker_shape
    )


def _block_size(
    weight: tuple[int, ...], scale: tuple[int, ...], marker: tuple[int, ...] | None
) -> tuple[int, int]:
    n, k = _matrix(weight)
    grid = _grid(scale)
    if marker is not None:
        if len(marker) != 3 or min(marker[:2]) < 1 or marker[2] != 0:
            raise ShapeError(
                f"weight_block_size: has shape {marker}, expected (rows, cols, 0)"
            )
        rows, cols = marker[0], marker[1]
        if grid != (-(-n // rows), -(-k // cols)):
            raise ShapeError(
                f"weight_scale: is {scale}, expected {(-(-n // rows), -(-k // cols))} "
                f"for weight {weight} and block_size {(rows, cols)}; was it saved with "
                "another block_size?"
            )
        return rows, cols
    if grid is None or 0 in grid or n % grid[0] or k % grid[1]:
        raise ShapeError(
            f"weight_scale: is {scale}, which does not divide weight {weight}; a block "
            "size cannot be inferred from such a grid, expected weight_block_size too"
        )
    return n // grid[0], k // grid[1]


def _int_or_zero(word: str) -> int:
    return int(word) if word.isdecimal() else 0


def _matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """(N, K) of a weight's shape; all but the first dimension are flattened."""
    n = shape[0] if shape else 1
    k = 1
    for size in shape[1:]:
        k *= size
    return n, k


def _grid(scale: tuple[int, ...]) -> tuple[int, int] | None:
    """Rows and columns of a scale; one dimension is one scale per row."""
    rows, cols, *rest = (*scale, 1, 1)[: max(len(scale), 2)]
    return None if rest else (rows, cols)


def _as_grid(scale: Tensor) -> Tensor:
    """Any scale as (ceil(N/R), ceil(K/C)); a view."""
    return scale if scale.ndim == 2 else scale.view((*scale.shape, 1, 1)[:2])


def _decode_scale(scale: Tensor) -> Tensor:
    """A scale as float32; bytes are exponents."""
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.float()


def _expand(scale: Tensor, size: tuple[int, int], shape: tuple[int, int]) -> Tensor:
    """Repeat each scale over its block: (N/R, K/C) to a view or copy of (N, K)."""
    for dim in (0, 1):
        if scale.shape[dim] != 1:
            scale = scale.repeat_interleave(size[dim], dim)[:, : shape[1]]
    return scale[: shape[0]]


# -- files -----------------------------------------------------------------------------


class MusubiDialect(Dialect):
    """What musubi-tuner writes: ``X.weight`` and ``X.scale_weight``, and no marker.

    The scale is (N, K/C, 1) for 1 x C blocks; (N, 1) per row, where C does not divide
    K; and 0-d for a whole weight, where that is not 2-D. A scalar may as well be from
    another writer (Kijai's files have the same keys): it decodes the same.
    """

    name = "musubi"

    def recognise(
        self, scheme: hijack.Scheme, header: Header, layer: str
    ) -> Claim | None:
        """Claim FP8 layers with a ``scale_weight`` of one of the three shapes.

        Layers that ComfyUI's own markers claim stay ComfyUI's, except for 1 x C blocks,
        which ComfyUI cannot read.
        """
        key = join(layer, "weight")
        weight = header.tensors[key]
        # musubi replaces every ".weight", so "a.weight_mod" has its scale elsewhere
        odd = key.replace(".weight", ".scale_weight")
        keys = (k for k in (join(layer, "scale_weight"), odd) if k in header.tensors)
        scale_key = next(keys, None)
        if scale_key is None or weight.torch_dtype not in FP8_DTYPES:
            return None
        scale = header.tensors[scale_key]
        n, k = _matrix(weight.shape)
        shape = scale.shape
        certainty = Certainty.UNIQUE
        if scale.torch_dtype not in SCALE_DTYPES:
            return None
        if len(shape) == 3 and shape[0] == n and shape[2] == 1 and shape[1]:
            if k % shape[1]:
                return None
            block = (1, k // shape[1])
        elif _marked(header, layer):
            return None
        elif shape == (n, 1) and n > 1:
            block = (1, k)
        elif shape in ((), (1,), (1, 1)):
            block, certainty = (n, k), Certainty.FITS
        else:
            return None
        found = f"{weight.dtype} with scale_weight {scale.dtype} {list(shape)}"
        roles = {"weight": key, "scale_weight": scale_key}
        return Claim(layer, scheme.name, self.name, roles, block, certainty, (found,))

    def decode(
        self, claim: Claim, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """View the scale as the scheme's grid."""
        weight, scale = tensors["weight"], tensors["scale_weight"]
        shape = (*scale.shape, 1, 1)[:2]  # (N, K/C, 1), (N, 1), (1,) or ()
        return weight, {"weight_scale": scale.view(shape)}

    def encode(
        self, qdata: Tensor, params: Mapping[str, Tensor], options: Mapping[str, object]
    ) -> dict[str, Tensor]:
        """View the grid as musubi-tuner's scale.

        Raises:
            CheckpointError: if the blocks are not 1 x C with C dividing K, nor a row,
                nor the whole weight.
        """
        n, k = _matrix(tuple(qdata.shape))
        rows, cols = block_size_of(qdata, params)
        scale = params["weight_scale"]
        given = options.get("block_size")
        # a block that is a whole row is a row, unless blocks were asked for
        blocks = cols < k or (cols == DEFAULT_COLS and given != "row")
        if (rows, cols) == (n, k) and (n > 1 or not blocks) and given != "row":
            return {"weight": qdata, "scale_weight": scale.view(())}
        if rows == 1 and "weight_block_size" not in params and qdata.ndim == 2:
            shape = (n, k // cols, 1) if blocks else (n, 1)
            return {"weight": qdata, "scale_weight": scale.view(shape)}
        raise CheckpointError(
            f"dialect musubi: cannot write blocks of {rows}x{cols} for weight "
            f"{tuple(qdata.shape)}, expected 1 x C with C dividing {k}, 'row' or "
            "'tensor'; write it in dialect 'hijack', or choose another block_size"
        )

    def fit_options(
        self, shape: tuple[int, ...], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The options musubi-tuner would use: per row where its blocks do not divide.

        Writers of files ask before they quantize; `encode` refuses what does not fit.

        Args:
            shape: (N, ...) of the dense weight.
            options: as for ``quantize``.
        """
        n, k = _matrix(shape)
        size = options.get("block_size", (1, DEFAULT_COLS))
        rows, cols = parse_block_size(size, (n, k))
        if len(shape) != 2:
            size = "tensor"
        elif rows == 1 and k % cols:
            size = "row"
        return {**options, "block_size": size}


def _marked(header: Header, layer: str) -> bool:
    """Whether ComfyUI's markers, of today or the older kind, claim the layer."""
    parts = layer.split(".")
    prefixes = (".".join(parts[:n]) for n in range(len(parts) + 1))
    return join(layer, "comfy_quant") in header.tensors or any(
        join(prefix, "scaled_fp8") in header.tensors for prefix in prefixes
    )


# -- the scheme ----------------------------------------------------------------------


class BlockwiseFP8(hijack.Scheme):
    """FP8 codes with one multiplying scale per block."""

    name = "blockwise_fp8"
    targets = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Embedding)
    dialects = (MusubiDialect(),)

    def quantize(  # type: ignore[override]
        self,
        weight: Tensor,
        *,
        block_size: BlockSize = (1, 64),
        dtype: torch.dtype = torch.float8_e4m3fn,
        scale_dtype: torch.dtype | None = None,
        stochastic: bool = False,
        seed: int = 0,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Cut a weight into blocks and scale each to FP8.

        Args:
            weight: (N, ...) floating point; meta tensors give meta tensors.
            block_size: as for `parse_block_size`; clipped to the weight.
            dtype: float8_e4m3fn or float8_e5m2.
            scale_dtype: float32, bfloat16 or float16; None is the weight's own, which
                gives bit for bit what musubi-tuner writes.
            stochastic: round up or down at random, without bias, not to nearest.
            seed: of the random numbers; the same seed gives the same codes.

        Returns:
            Codes of the weight's shape; ``weight_scale`` (ceil(N/R), ceil(K/C)), and
            ``weight_block_size`` (R, C, 0) uint8 if the blocks do not divide it.

        Raises:
            SchemeError: if an option is wrong.
            DTypeError: if the weight is not floating point.
            NonFiniteError: if the weight holds inf or NaN.
        """
        scale_dtype = _check_options(weight, dtype, scale_dtype)
        n, k = _matrix(tuple(weight.shape))
        rows, cols = parse_block_size(block_size, (n, k))
        matrix = weight.detach().reshape(n, k)
        grid = (-(-n // rows), -(-k // cols))
        qdata = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        scale = torch.empty(grid, dtype=scale_dtype, device=weight.device)
        params = {"weight_scale": scale}
        if n % rows or k % cols:
            marker = torch.empty((rows, cols, 0), dtype=torch.uint8)
            params["weight_block_size"] = marker.to(weight.device)
        if weight.is_meta or not weight.numel():
            return qdata, params
        _check_finite(weight)
        random = (
            torch.Generator(weight.device).manual_seed(seed) if stochastic else None
        )
        step = max(CHUNK // (k * rows), 1)  # rows of blocks at a time
        for first in range(0, grid[0], step):
            part = slice(first * rows, (first + step) * rows)
            codes, scales = _quantize(
                matrix[part], (rows, cols), dtype, scale_dtype, random
            )
            qdata.view(n, k)[part] = codes
            scale[first : first + step] = scales
        return qdata, params

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
        shape = _matrix(tuple(qdata.shape))
        size = block_size_of(qdata, params)
        codes, scale = qdata.reshape(shape), _as_grid(params["weight_scale"])
        if _fp8_decode.can_decode(codes, scale, size) and dtype in _fp8_decode.DENSE:
            dense = _fp8_decode.dequantize(codes, scale, size, dtype)  # (N, K)
        else:
            factor = _expand(_decode_scale(scale), size, shape)  # (N or 1, K or 1)
            dense = (codes.float() * factor).to(dtype)  # (N, K)
        return dense.view(qdata.shape)

    def bind_forward(self, module: nn.Module) -> Callable[..., Tensor] | None:
        """Forwards that decode what they need: a piece of a Linear, rows of a table."""
        layer = getattr(module, "_hijack", None)
        base = type(module) if layer is None else layer.base
        if base.forward is nn.Linear.forward:
            return linear_forward
        if base.forward is nn.Embedding.forward:
            plain = module.max_norm is None and not module.sparse
            return embedding_forward if plain else None
        return None

    def validate(self, qdata: Tensor, params: Mapping[str, Tensor], where: str) -> None:
        """Refuse dtypes the scheme has not, and scales that do not cover the weight."""
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
            block_size_of(qdata, params)
        except ShapeError as error:
            raise ShapeError(f"{where}: {error}") from error

    # -- checkpoints ------------------------------------------------------------------

    def fitting_params(
        self, header: Header, layer: str, weight: TensorInfo
    ) -> tuple[str, ...] | None:
        """FP8 with a ``weight_scale`` that covers it, of any block size.

        Layers that ComfyUI's own ``comfy_quant`` marks are left to their owner, and
        power-of-two scales to a marker: their order in the file is not known without.
        """
        scale = header.tensors.get(join(layer, "weight_scale"))
        if weight.torch_dtype not in FP8_DTYPES or scale is None:
            return None
        if join(layer, "comfy_quant") in header.tensors:
            return None
        marker = header.tensors.get(join(layer, "weight_block_size"))
        try:
            _block_size(weight.shape, scale.shape, marker.shape if marker else None)
        except ShapeError:
            return None
        if scale.torch_dtype not in SCALE_DTYPES:
            return None
        return ("weight_scale", "weight_block_size")[: 1 if marker is None else 2]

    def recognise(self, header: Header, layer: str) -> Claim | None:
        """The best claim to one layer, with its block size."""
        claim = super().recognise(header, layer)
        if claim is None or claim.block_size is not None:
            return claim
        weight = header.tensors[claim.keys["weight"]]
        scale = header.tensors[claim.keys["weight_scale"]]
        marker = header.tensors.get(claim.keys.get("weight_block_size", ""))
        try:
            size = _block_size(
                weight.shape, scale.shape, marker.shape if marker else None
            )
        except ShapeError:
            return claim
        return dataclasses.replace(claim, block_size=size)


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _check_options(
    weight: Tensor, dtype: torch.dtype, scale_dtype: torch.dtype | None
) -> torch.dtype:
    """The dtype of the scale, if everything is as it should be."""
    if not weight.is_floating_point() or weight.element_size() == 1:
        raise DTypeError(
            f"weight is {weight.dtype}, expected a dense floating dtype; dequantize it "
            "first"
        )
    if dtype not in FP8_DTYPES:
        raise SchemeError(f"dtype: got {dtype}, expected one of {_names(FP8_DTYPES)}")
    if scale_dtype is None:
        return weight.dtype if weight.dtype in SCALE_DTYPES else torch.float32
    if scale_dtype not in SCALE_DTYPES:
        raise SchemeError(
            f"scale_dtype: got {scale_dtype}, expected one of {_names(SCALE_DTYPES)}"
        )
    return scale_dtype


def _check_finite(weight: Tensor) -> None:
    finite = weight.isfinite()
    if not finite.all():
        nans = int(weight.isnan().sum())
        infs = weight.numel() - int(finite.sum()) - nans
        raise NonFiniteError(
            f"weight of shape {tuple(weight.shape)} holds {nans} NaN and {infs} "
            "infinite values, expected finite ones; repair the checkpoint or exclude it"
        )


def _quantize(
    weight: Tensor,
    size: tuple[int, int],
    dtype: torch.dtype,
    scale_dtype: torch.dtype,
    random: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Codes (n, K) and scales of a few whole rows of blocks, (n, K) floating point."""
    n, k = weight.shape
    rows, cols = size
    largest = torch.finfo(dtype).max
    padded = F.pad(weight, (0, -k % cols, 0, -n % rows))
    blocks = padded.view(-(-n // rows), rows, -(-k // cols), cols).float()
    amax = blocks.abs().amax((1, 3))  # (n/R, K/C)
    scale = (amax / largest).to(scale_dtype).clamp_min(MIN_SCALE)
    # a float16 scale may be 0 all the same: then 0/0 is code 0, x/0 the largest code
    codes = blocks / scale.float()[:, None, :, None]
    codes = codes.nan_to_num_(0.0).clamp_(-largest, largest)
    if random is not None:
        codes = _round_stochastic(codes, dtype, random)
    return codes.to(dtype).view(padded.shape)[:n, :k], scale


def _round_stochastic(x: Tensor, dtype: torch.dtype, random: torch.Generator) -> Tensor:
    """Round to a neighbouring FP8 number, the nearer the likelier, without bias.

    Args:
        x: float32, within the range of ``dtype``.
        dtype: the FP8 dtype.
        random: where the random numbers come from.
    """
    info = torch.finfo(dtype)
    exponent = torch.frexp(x).exponent - 1
    lowest = torch.frexp(torch.tensor(info.smallest_normal)).exponent - 1
    # the distance of neighbours: eps at 1, doubled or halved with every binade
    step = torch.ldexp(torch.full_like(x, info.eps), exponent.clamp_min(int(lowest)))
    steps = x / step  # exact: the step is a power of two
    below = steps.floor()
    up = torch.rand(x.shape, generator=random, device=x.device) < steps - below
    return (below + up) * step


# -- forwards --------------------------------------------------------------------------


def linear_forward(self: Any, input: Tensor) -> Tensor:
    """``nn.Linear.forward`` with a weight that is decoded piece by piece.

    Args:
        self: a module with ``weight`` (N, K), ``weight_scale`` and ``bias``.
        input: (..., K).

    Returns:
        (..., N) of ``input``'s dtype.
    """
    weight, scale, bias = self.weight, _as_grid(self.weight_scale), self.bias
    params = _params(self)
    dtype = input.dtype if input.is_floating_point() else self._hijack.dtype
    if bias is not None and bias.dtype != dtype:
        bias = bias.to(dtype)
    if not torch.compiler.is_compiling() and input.shape[-1:] == weight.shape[1:]:
        size = block_size_of(weight, params)
        if _fp8_decode.can_multiply(input, bias) and _fp8_decode.can_decode(
            weight, scale, size
        ):
            return _fp8_decode.linear(input, weight, scale, size, bias)
    return F.linear(input, self._hijack.scheme.dequantize(weight, params, dtype), bias)


def embedding_forward(self: Any, input: Tensor) -> Tensor:
    """``nn.Embedding.forward`` that decodes the rows asked for and no others.

    Args:
        self: a module with ``weight`` (N, K) and ``weight_scale``.
        input: (...) int64 or int32.

    Returns:
        (..., K) of the dense weight's dtype.
    """
    weight, params = self.weight, _params(self)
    rows, cols = block_size_of(weight, params)
    index = input.reshape(-1)  # (M,)
    found = {
        "weight_scale": _as_grid(self.weight_scale)[index // rows],  # (M, K/C)
        "weight_block_size": weight.new_empty((1, cols, 0), dtype=torch.uint8),
    }
    codes = weight.view(torch.uint8)[index].view(weight.dtype)  # (M, K)
    dense = self._hijack.scheme.dequantize(codes, found, self._hijack.dtype)
    result: Tensor = dense.view(*input.shape, weight.shape[1])
    return result


def _params(module: Any) -> dict[str, Tensor]:
    """The scheme's parameters of a module, as they are now."""
    params = {"weight_scale": module.weight_scale}
    marker = getattr(module, "weight_block_size", None)
    return params if marker is None else {**params, "weight_block_size": marker}


hijack.register(BlockwiseFP8())
