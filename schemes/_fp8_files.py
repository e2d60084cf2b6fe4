"""What `schemes.blockwise_fp8` knows from shapes alone: block sizes and spellings."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hijack.checkpoint.claim import Certainty, Claim
from hijack.checkpoint.dialect import Dialect
from hijack.checkpoint.header import Header, join
from hijack.errors import CheckpointError, SchemeError, ShapeError
from hijack.scheme import Scheme

BlockSize = int | str | tuple[int, int]

FP8_DTYPES = (torch.float8_e4m3fn, torch.float8_e5m2)
SCALE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_E8M0 = getattr(torch, "float8_e8m0fnu", None)
#: Scales that are powers of two: read, never written. uint8 holds the exponent's bits.
POWER_DTYPES = () if _E8M0 is None else (_E8M0, torch.uint8)
#: musubi-tuner's blocks are 1 x 64.
MUSUBI_COLS = 64

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
    return infer_block_size(
        tuple(qdata.shape), tuple(params["weight_scale"].shape), marker_shape
    )


def infer_block_size(
    weight: tuple[int, ...], scale: tuple[int, ...], marker: tuple[int, ...] | None
) -> tuple[int, int]:
    n, k = matrix_shape(weight)
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


def matrix_shape(shape: tuple[int, ...]) -> tuple[int, int]:
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


def as_grid(scale: Tensor) -> Tensor:
    """Any scale as (ceil(N/R), ceil(K/C)); a view."""
    return scale if scale.ndim == 2 else scale.view((*scale.shape, 1, 1)[:2])


def decode_scale(scale: Tensor) -> Tensor:
    """A scale as float32; bytes are exponents."""
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    return scale.float()


# -- files -----------------------------------------------------------------------------


class MusubiDialect(Dialect):
    """What musubi-tuner writes: ``X.weight`` and ``X.scale_weight``, and no marker.

    The scale is (N, K/C, 1) for 1 x C blocks; (N, 1) per row, where C does not divide
    K; and 0-d for a whole weight, where that is not 2-D. A scalar may as well be from
    another writer (Kijai's files have the same keys): it decodes the same.
    """

    name = "musubi"

    def recognise(self, scheme: Scheme, header: Header, layer: str) -> Claim | None:
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
        n, k = matrix_shape(weight.shape)
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
        n, k = matrix_shape(tuple(qdata.shape))
        rows, cols = block_size_of(qdata, params)
        scale = params["weight_scale"]
        given = options.get("block_size")
        # a block that is a whole row is a row, unless blocks were asked for
        blocks = cols < k or (cols == MUSUBI_COLS and given != "row")
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
        n, k = matrix_shape(shape)
        size = options.get("block_size", (1, MUSUBI_COLS))
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
