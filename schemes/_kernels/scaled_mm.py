"""Products in FP8 and FP4 on matrix units, through torch's ``scaled_mm``.

The input is quantized as the unit wants it, from itself and without a calibration; the
sum is in float32. Which recipe there is depends on the blocks of the weight ::

    recipe    blocks of the weight        input              units
    row       one scale for a row,        a scale for each   NVIDIA from 8.9 on,
              or for the weight           token              AMD gfx950 and gfx12
    1x128     1 x 128, float scales       1 x 128            NVIDIA 9.x
    128x128   128 x 128, float scales     1 x 128            NVIDIA 9.x
    mxfp8     1 x 32, powers of two       1 x 32             NVIDIA from 10.0 on
    nvfp4     1 x 16, E4M3 and a float    1 x 16             NVIDIA from 10.0 on

Larger blocks than those of a recipe repeat their scales. No unit has blocks of 1 x 64,
or takes E5M2 for both operands. Scales of a weight that must be laid out otherwise are
laid out once, and kept as long as the weight.

The processor has the operation for rows too. It is a loop that is slower than the
decoded weight, so it runs only where ``HIJACK_FORWARD`` names it.

Reference: PyTorch, ``aten/src/ATen/native/cuda/ScaledBlas.cpp``, for layouts and units.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from hijack.kernels import forced
from schemes._kernels import devices, quantized_inputs
from schemes._kernels.block_scaled import DENSE, BlockScaled
from schemes._kernels.quantized_inputs import Quantized, Quantizer
from schemes._kernels.tables import E2M1, table_on
from schemes._tiles import to_tiles

#: The kernel's name in the table.
NAME = "scaled_mm"
#: Rows and columns of a weight, and bytes of its address, are multiples of this.
ALIGNMENT = 16

Scales = tuple[Tensor, ...]


@dataclasses.dataclass(frozen=True)
class Recipe:
    """One way to scale both operands that matrix units know.

    Attributes:
        name: for messages.
        quantizer: of the input.
        layout: the scales of a weight as the unit reads them; views where possible.
        inputs: names of ``ScalingType`` for each scale of the input.
        weights: names of ``ScalingType`` for each scale of the weight.
        swizzles: names of ``SwizzleType`` for each scale of either.
        columns: what divides K.
        rows: what divides M; missing rows are filled with zeros.
        takes_bias: whether the unit adds a bias of 16 bits.
    """

    name: str
    quantizer: Quantizer
    layout: Callable[[BlockScaled], Scales]
    inputs: tuple[str, ...]
    weights: tuple[str, ...]
    swizzles: tuple[str, ...] = ("NO_SWIZZLE",)
    columns: int = ALIGNMENT
    rows: int = 1
    takes_bias: bool = True


# -- layouts of a weight's scales ------------------------------------------------------


def _row_scales(weight: BlockScaled) -> Scales:
    """(1, N) float32, contiguous."""
    return (_spread(weight, 1, weight.shape[1]).contiguous().view(1, -1),)


def _narrow_scales(weight: BlockScaled) -> Scales:
    """(N, K/128) float32 with the strides (1, N)."""
    return (_spread(weight, 1, 128).t().contiguous().t(),)


def _square_scales(weight: BlockScaled) -> Scales:
    """(L, N/128) float32 with the strides (1, L), where L is K/128 up to 4 x n."""
    scale = _spread(weight, 128, 128)  # (N/128, K/128)
    missing = -scale.shape[1] % 4
    if missing:
        scale = F.pad(scale, (0, missing))
    return (scale.contiguous().t(),)


def _tiled_scales(weight: BlockScaled) -> Scales:
    """E8M0 in tiles of 128 x 4."""
    return (to_tiles(weight.scale),)


def _fp4_scales(weight: BlockScaled) -> Scales:
    """E4M3 in tiles of 128 x 4, and the scale of the weight."""
    if weight.factor is None:
        raise ValueError(f"{NAME}: an NVFP4 weight has no factor; expected its scale")
    return to_tiles(weight.scale), weight.factor


def _spread(weight: BlockScaled, rows: int, cols: int) -> Tensor:
    """Scales (N/R', K/C') float32 of smaller blocks that divide those there are."""
    (n, k), scale = weight.shape, weight.scale.float()
    if weight.factor is not None:
        scale = scale * weight.factor
    high, wide = min(weight.size[0], n) // rows, min(weight.size[1], k) // cols
    if high > 1:
        scale = scale.repeat_interleave(high, 0)[: -(-n // rows)]
    if wide > 1:
        scale = scale.repeat_interleave(wide, 1)[:, : -(-k // cols)]
    return scale


ROW = Recipe(
    *("row", quantized_inputs.fp8_per_token, _row_scales),
    *(("RowWise",), ("RowWise",)),
)
NARROW = Recipe(
    *("1x128", quantized_inputs.fp8_per_group, _narrow_scales),
    *(("BlockWise1x128",), ("BlockWise1x128",)),
    columns=128,
    rows=4,  # the scales of 128 columns begin at a multiple of 16 bytes
    takes_bias=False,
)
SQUARE = dataclasses.replace(
    NARROW, name="128x128", layout=_square_scales, weights=("BlockWise128x128",)
)
MXFP8 = Recipe(
    *("mxfp8", quantized_inputs.mxfp8, _tiled_scales),
    *(("BlockWise1x32",), ("BlockWise1x32",), ("SWIZZLE_32_4_4",)),
    columns=32,
)
NVFP4 = Recipe(
    *("nvfp4", quantized_inputs.nvfp4, _fp4_scales),
    *(("BlockWise1x16", "TensorWise"), ("BlockWise1x16", "TensorWise")),
    ("SWIZZLE_32_4_4", "NO_SWIZZLE"),
    columns=32,
)


# -- which recipe ----------------------------------------------------------------------


def recipe_of(weight: BlockScaled) -> Recipe | str:
    """The recipe for a weight on units that have it, or why there is none.

    Args:
        weight: (N, K).
    """
    (n, k), (rows, cols) = weight.shape, weight.size
    powers = weight.scale.dtype == torch.float8_e8m0fnu
    if weight.table is not None:
        if (rows, cols) != (1, 16) or weight.scale.dtype != torch.float8_e4m3fn:
            return f"no unit multiplies codes of four bits in blocks of {rows}x{cols}"
        if weight.factor is None or weight.high_first or not _is_e2m1(weight):
            return "the codes of four bits are in another order, or no E2M1"
        return NVFP4
    if weight.codes.dtype != torch.float8_e4m3fn:
        return f"no unit multiplies {weight.codes.dtype} with an input in E4M3"
    if cols >= k:
        return ROW
    if (rows, cols) == (1, 32) and powers and weight.factor is None:
        return MXFP8
    if cols % 128:
        return f"no unit has blocks of {rows}x{cols}; 1x128 and 128x128 have one"
    return NARROW if rows % 128 or n % 128 else SQUARE


def _is_e2m1(weight: BlockScaled) -> bool:
    """Whether the table is E2M1's; in compiled code, where it is a copy, it is."""
    if torch.compiler.is_compiling():
        return True
    return weight.table is table_on(E2M1, weight.device)


def refuses(weight: BlockScaled, dtype: torch.dtype) -> str | None:
    """Why no unit of the weight's device multiplies it and inputs of a dtype, or None.

    Args:
        weight: (N, K).
        dtype: of the input.
    """
    recipe = recipe_of(weight)
    if isinstance(recipe, str):
        return recipe
    if dtype not in DENSE:
        return f"takes inputs of float32, bfloat16 and float16, not of {dtype}"
    (n, k), codes = weight.shape, weight.codes
    if n % ALIGNMENT or k % recipe.columns:
        return (
            f"the unit takes {ALIGNMENT} x n rows and {recipe.columns} x n columns, "
            f"the weight has {n} and {k}"
        )
    if not (codes.is_contiguous() and _is_aligned(codes)):
        return "the codes do not lie in memory as a unit reads them"
    return _device_refuses(recipe, weight.device)


def _is_aligned(codes: Tensor) -> bool:
    """Whether codes begin at a multiple of 16 bytes; compilers cannot ask."""
    return torch.compiler.is_compiling() or codes.storage_offset() % ALIGNMENT == 0


def _device_refuses(recipe: Recipe, device: torch.device) -> str | None:
    """Why a device has no unit for a recipe, or torch no way to it."""
    if not hasattr(F, "scaled_mm") and recipe is not ROW and recipe is not MXFP8:
        return f"torch {torch.__version__} cannot call the unit; update it to 2.10"
    if device.type == "cpu":
        if NAME not in forced():
            return f"the CPU has no unit for it; HIJACK_FORWARD={NAME} tries it there"
        return None if recipe is ROW else f"the CPU has no recipe {recipe.name}"
    amd = devices.amd_architecture(device)
    if amd:
        known = amd.startswith(("gfx950", "gfx12")) and recipe is ROW
        return None if known else f"{amd} has no unit for recipe {recipe.name}"
    found = devices.capability(device)
    if recipe is ROW:
        has, wanted = found >= (8, 9), "8.9 or later"
    elif recipe is NARROW or recipe is SQUARE:
        has, wanted = found[0] == 9, "9.x"
    else:
        has, wanted = found >= (10, 0), "10.0 or later"
    if has:
        return None
    return (
        f"compute capability {found[0]}.{found[1]} has no unit for recipe "
        f"{recipe.name}; {wanted} has"
    )


# -- the product -----------------------------------------------------------------------


def linear(x: Tensor, weight: BlockScaled, bias: Tensor | None) -> Tensor:
    """``F.linear`` with an input that is quantized as the weight's recipe says.

    Args:
        x: (M, K) float32, bfloat16 or float16; of a rotated weight it is rotated.
        weight: (N, K), which `refuses` does not refuse.
        bias: (N,) of ``x``'s dtype, or None.

    Returns:
        (M, N) of ``x``'s dtype.

    Raises:
        ValueError: if there is no recipe for the weight.
    """
    recipe = recipe_of(weight)
    if isinstance(recipe, str):
        raise ValueError(f"{NAME}: {recipe}")
    m, dtype = len(x), x.dtype
    if recipe.rows > 1:
        x = F.pad(x, (0, 0, 0, -m % recipe.rows))
    tokens = quantized_inputs.quantize(recipe.quantizer, x)
    # for rows CUTLASS gives only bfloat16 in older versions of torch
    made = torch.bfloat16 if recipe is ROW and x.is_cuda else dtype
    inside = recipe.takes_bias and made == dtype != torch.float32
    added = bias if inside else None
    output = _product(recipe, tokens, weight, added, made)[:m].to(dtype)
    return output if bias is None or inside else output + bias


def _product(
    recipe: Recipe,
    tokens: Quantized,
    weight: BlockScaled,
    bias: Tensor | None,
    dtype: torch.dtype,
) -> Tensor:
    """(M, N) of a dtype, by the newest of torch's functions."""
    codes, scales = weight.codes, _scales(recipe, weight)
    given, (first, *_) = tokens.codes, tokens.scales
    if not hasattr(F, "scaled_mm"):
        return torch._scaled_mm(
            *(given, codes.t(), first, scales[0]),
            bias=bias,
            out_dtype=dtype,
            use_fast_accum=False,
        )
    if weight.table is not None:
        given = given.view(torch.float4_e2m1fn_x2)
        codes = codes.view(torch.float4_e2m1fn_x2)
    kinds: Any = F.ScalingType
    orders = [getattr(F.SwizzleType, name) for name in recipe.swizzles]
    output: Tensor = F.scaled_mm(
        given,
        codes.t(),
        list(tokens.scales),
        [getattr(kinds, name) for name in recipe.inputs],
        list(scales),
        [getattr(kinds, name) for name in recipe.weights],
        orders,
        orders,
        bias=bias,
        output_dtype=dtype,
        use_fast_accum=False,
    )
    return output


# -- scales that are laid out once -----------------------------------------------------

#: A scale's id to the scale, what tells its content, and what was made of it.
_kept: dict[int, tuple[weakref.ref[Tensor], tuple[object, ...], Scales]] = {}


def _scales(recipe: Recipe, weight: BlockScaled) -> Scales:
    """The scales of a weight as a recipe has them, made again when they may differ."""
    scale, device = weight.scale, weight.device
    base = scale._base
    if base is not None and base.numel() == scale.numel():  # a view made a moment ago
        scale = base
    sources = (scale,) if weight.factor is None else (scale, weight.factor)
    # inference tensors have no version that tells when they are written to
    if torch.compiler.is_compiling() or any(t.is_inference() for t in sources):
        return recipe.layout(weight)
    stream = 0
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            return recipe.layout(weight)
        stream = torch.cuda.current_stream(device).cuda_stream
    state: tuple[object, ...] = (
        *(recipe.name, weight.shape, weight.size, stream),
        *((tensor.data_ptr(), tensor._version) for tensor in sources),
    )
    key = id(scale)
    known = _kept.get(key)
    if known is not None and known[0]() is scale and known[1] == state:
        return known[2]
    with torch.inference_mode(False):
        made = recipe.layout(weight)
    if made[0].untyped_storage().data_ptr() != scale.untyped_storage().data_ptr():
        # a view costs nothing, and would keep the weight's scale alive
        _kept[key] = weakref.ref(scale, lambda _: _kept.pop(key, None)), state, made
    return made
