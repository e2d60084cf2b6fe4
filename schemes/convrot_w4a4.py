"""ConvRot's W4A4 as ComfyUI stores it: rotated rows in four bits.

A weight W of shape (N, K) is rotated in groups of R columns: see `schemes._rotation`.
Every row n of the rotated weight W' has one scale and codes ::

    s_n = max_k |W'_nk| / 7                                in the weight's dtype
    Q_nk = clamp(round(W'_nk / s_n), -7, 7)                in the weight's dtype
    W' ~ Q_nk * s_n                                        then rotated back, in float32

Two codes are one byte in two's complement, the first in the lower half. How columns are
rotated is in an empty tensor, ``weight_rotation`` (R, 0). The layer is computed with
the decoded weight; ``linear_dtype`` says to other programs how they multiply.

References: ConvRot (arXiv 2512.03673); comfy-kitchen 0.2.40,
``backends/eager/convrot_w4a4.py``, for the format and the order of operations.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import hijack
from hijack.errors import CheckpointError, DTypeError, NonFiniteError, ShapeError
from hijack.options import Option
from schemes._convrot_w4a4_dialects import DIALECTS, LINEAR_DTYPES
from schemes._kernels.block_scaled import BlockScaled
from schemes._kernels.scheme import BlockScaledScheme
from schemes._kernels.tables import INT4, table_on
from schemes._rotation import (
    ROTATIONS,
    is_rotation_size,
    rotate,
    rotation_marker,
    rotation_of,
    uniform,
)

#: Columns that comfy-kitchen multiplies at once, and has only multiples of.
COLUMNS = 64
#: The largest code that is written.
MOST = 7


class ConvRotW4A4(BlockScaledScheme):
    """Codes of four bits of a rotated weight, and one scale per row."""

    name = "convrot_w4a4"
    dialects = DIALECTS
    options = (
        Option(
            "rotation", "int", 256, "columns rotated together", choices=ROTATIONS[1:]
        ),
        Option("stochastic", "bool", False, "round up or down at random"),
        Option("seed", "int", 0, "of the random numbers"),
        Option(
            "linear_dtype",
            "str",
            LINEAR_DTYPES[0],
            "that programs multiply in which quantize inputs too",
            choices=LINEAR_DTYPES,
            forward=True,
        ),
    )

    def quantize(  # type: ignore[override]
        self,
        weight: Tensor,
        *,
        rotation: int = 256,
        stochastic: bool = False,
        seed: int = 0,
        linear_dtype: str = LINEAR_DTYPES[0],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Rotate a weight and round each row to its scale.

        Args:
            weight: (N, K) floating point; meta tensors give meta tensors.
            rotation: columns rotated together, a power of 4.
            stochastic: round up or down at random, without bias, so that changes of
                less than a step are not lost.
            seed: of the random numbers; the same seed gives the same codes.
            linear_dtype: of the layer that the weight is for; the weight is the same.

        Returns:
            Codes (N, K/2) int8; ``weight_scale`` (N,) float32 and ``weight_rotation``
            (R, 0).

        Raises:
            ShapeError: if the rotation or 64 does not divide the weight.
            DTypeError: if the weight is not floating point.
        """
        chosen = {"rotation": rotation, "linear_dtype": linear_dtype, "seed": seed}
        self.check_options({**chosen, "stochastic": stochastic})
        if not weight.is_floating_point() or weight.element_size() == 1:
            raise DTypeError(
                f"weight is {weight.dtype}, expected a dense floating dtype; "
                "dequantize it first"
            )
        if reason := self.declines(tuple(weight.shape), rotation=rotation):
            raise ShapeError(f"weight: {reason}; leave the layer dense")
        rotated = rotate(weight.detach(), rotation)
        scale = rotated.abs().amax(1, keepdim=True).clamp_min(1e-10) / MOST
        # a row of float16 may be so small that its scale is 0
        steps = (rotated / scale).nan_to_num(0)
        if stochastic and not weight.is_meta:
            random = torch.Generator(weight.device).manual_seed(seed)
            steps = (steps + uniform(steps, random)).floor()
        codes = steps.round().clamp(-MOST, MOST).to(torch.int8).view(torch.uint8)
        packed = (codes[:, ::2] & 15) | codes[:, 1::2] << 4
        return packed.view(torch.int8), {
            "weight_scale": scale.flatten().float(),
            **rotation_marker(rotation, weight.device),
        }

    def block_scaled(self, qdata: Tensor, params: Mapping[str, Tensor]) -> BlockScaled:
        """The codes with a scale for each row, as rotated as they are.

        Args:
            qdata: (N, K/2) int8.
            params: as `quantize` gives them; the scale is (N,) or (N, 1).
        """
        return BlockScaled(
            qdata.view(torch.uint8),
            params["weight_scale"].view(-1, 1),
            (1, 2 * qdata.shape[1]),
            table_on(INT4, qdata.device),
            rotation=rotation_of(params),
        )

    def dense_shape(
        self, qdata: Tensor, params: Mapping[str, Tensor]
    ) -> tuple[int, ...]:
        """Two columns to a byte."""
        return (qdata.shape[0], 2 * qdata.shape[1])

    def declines(self, shape: tuple[int, ...], **options: Any) -> str | None:
        """Weights whose columns are not whole groups."""
        rotation = options.get("rotation", 256)
        if len(shape) != 2 or not shape[0] or not shape[1]:
            return "it is no matrix with elements"
        if not is_rotation_size(rotation) or shape[1] % rotation:
            return f"its {shape[1]} columns are no whole groups of {rotation} to rotate"
        if shape[1] % COLUMNS:
            return f"{shape[1]} columns are no multiple of {COLUMNS}"
        return None

    def options_of(self, qdata: Tensor, params: Mapping[str, Tensor]) -> dict[str, Any]:
        """The rotation; how the layer is multiplied no tensor tells."""
        return {"rotation": rotation_of(params)}

    def requantize(
        self, weight: Tensor, old: hijack.QuantizedTensor, *, seed: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Quantize again with the options the layer has; a seed rounds at random."""
        told = self.options_of(old.qdata, old.params)
        random = {"stochastic": bool(seed), "seed": seed}
        return self.quantize(weight, **{**old.options, **told, **random})

    def block_size(
        self, qdata: Tensor, params: Mapping[str, Tensor]
    ) -> tuple[int, int]:
        """A row."""
        return (1, 2 * qdata.shape[1])

    def validate(self, qdata: Tensor, params: Mapping[str, Tensor], where: str) -> None:
        """Refuse tensors that do not fit each other, and numbers that cannot be."""
        for name in ("weight_scale", "weight_rotation"):
            if name not in params:
                raise CheckpointError(f"{where}: {name} is missing beside the weight")
        scale = params["weight_scale"]
        if qdata.dtype != torch.int8:
            raise DTypeError(f"{where}: weight is {qdata.dtype}, expected int8")
        if not scale.is_floating_point() or scale.element_size() < 2:
            raise DTypeError(
                f"{where}: weight_scale is {scale.dtype}, expected float32"
            )
        if qdata.ndim != 2 or scale.shape not in ((len(qdata),), (len(qdata), 1)):
            raise ShapeError(
                f"{where}: weight_scale is {tuple(scale.shape)} beside "
                f"{tuple(qdata.shape)} codes, expected one for each row; get the file "
                "again"
            )
        shape = self.dense_shape(qdata, params)
        if reason := self.declines(shape, rotation=rotation_of(params)):
            raise ShapeError(f"{where}: {reason}; get the file again")
        if not scale.is_meta and not scale.isfinite().all():
            raise NonFiniteError(
                f"{where}: weight_scale holds NaN or inf, expected finite numbers; the "
                "file is damaged, get it again"
            )


#: The scheme; it keeps nothing, so that one serves everybody.
SCHEME = ConvRotW4A4()


@hijack.hookimpl
def hijack_register_schemes(registry: hijack.Registry) -> None:
    """Register the scheme with any registry that loads this plugin."""
    registry.register(SCHEME)


hijack.default_registry().register(SCHEME)
