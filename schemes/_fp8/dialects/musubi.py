"""musubi-tuner's files: ``X.weight`` and ``X.scale_weight``, and no marker at all."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from hijack.claim import Certainty
from hijack.formats.comfyui_markers import file_markers_of, is_marked
from hijack.formats.dialect import EncodedLayer, FormatMetadata
from hijack.safetensors_io.header import Header, TensorInfo, join
from schemes._blocks import Pair, block_size_of, matrix_shape, parse_block_size
from schemes._fp8.dialects.base import (
    Declared,
    FP8Dialect,
    QuantizedWeightInfo,
    is_power,
)

#: musubi-tuner's blocks are 1 x 64.
COLS = 64


class MusubiDialect(FP8Dialect):
    """What musubi-tuner writes: ``X.weight`` and ``X.scale_weight``, and no marker.

    The scale is (N, K/C, 1) for 1 x C blocks; (N, 1) per row, where C does not divide
    K; and 0-d for a weight that is not 2-D. A scalar may also be from another writer
    (Kijai's files have the same keys): it decodes the same.
    """

    name = "musubi"
    writes = True
    scales = ("scale_weight",)
    ranks = (2, 3)
    inputs = ("scale_input",)
    exact = True
    refit_reason = (
        "if the block does not divide the columns, a layer has one scale per row, as "
        "in musubi-tuner; a weight that is not 2-D has one scale"
    )

    def layers(self, header: Header) -> Iterable[str]:
        """The layers that have a scale, also under musubi-tuner's odd key."""
        owners = super().layers(header)
        return [layer.replace(".scale_weight", ".weight") for layer in owners]

    def scale_keys(self, layer: str) -> Iterable[tuple[str, str]]:
        """The scale's key: musubi replaces every ``.weight`` in the weight's."""
        yield "scale_weight", join(layer, "scale_weight")
        if ".weight" in layer:
            odd = join(layer, "weight").replace(".weight", ".scale_weight")
            yield "scale_weight", odd

    def declared(self, header: Header, info: QuantizedWeightInfo) -> Declared | None:
        """Match the three shapes; ComfyUI's markers outrank the two they share."""
        shape, n = info.scale.shape, info.shape[0]
        if len(shape) == 3 and shape[0] == n and shape[2] == 1:
            return Declared(Certainty.UNIQUE)  # ComfyUI, the marker's reader, cannot
        if is_marked(header, info.layer):
            return None
        if shape == (n, 1) and n > 1:
            return Declared(Certainty.UNIQUE)
        return Declared(Certainty.FITS) if info.grid == (1, 1) else None

    def unmark(
        self, metadata: Mapping[str, str], keys: Collection[str], layers: Iterable[str]
    ) -> tuple[dict[str, str], set[str]]:
        """Drop the marker that users add to make ComfyUI load such a file."""
        return dict(metadata), file_markers_of(keys, layers)

    # -- writing -----------------------------------------------------------------------

    def encode(
        self, qdata: Tensor, params: Mapping[str, Tensor], options: Mapping[str, object]
    ) -> dict[str, Tensor]:
        """View the grid as musubi-tuner's scale.

        Raises:
            CheckpointError: if the blocks are not 1 x C with C dividing K, nor a row,
                nor the whole weight, or if scales are exponents.
        """
        n, k = matrix_shape(tuple(qdata.shape))
        rows, cols = block_size_of(qdata, params)
        scale = params["weight_scale"]
        requested = options.get("block_size")
        # a block that is a whole row is a row, unless blocks were requested
        blocks = cols < k or (cols == COLS and requested != "row")
        if is_power(scale):
            rows = 0
        if (rows, cols) == (n, k) and (n > 1 or not blocks) and requested != "row":
            return {"weight": qdata, "scale_weight": scale.view(())}
        if rows == 1 and "weight_block_size" not in params and qdata.ndim == 2:
            shape = (n, k // cols, 1) if blocks else (n, 1)
            return {"weight": qdata, "scale_weight": scale.view(shape)}
        raise self.cannot(
            qdata,
            params,
            f"floating scales of 1 x C with C dividing {k}, 'row' or 'tensor'",
        )

    def fit_options(
        self, shape: tuple[int, ...], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The options musubi-tuner would use: per row where its blocks do not divide.

        They are needed before quantizing; `encode` refuses what does not fit.

        Args:
            shape: (N, ...) of the dense weight.
            options: as for ``quantize``.
        """
        n, k = matrix_shape(shape)
        size = options.get("block_size", (1, COLS))
        rows, cols = parse_block_size(size, (n, k))
        if len(shape) != 2:
            size = "tensor"
        elif rows == 1 and k % cols:
            size = "row"
        return {**options, "block_size": size}

    def blocks(
        self, shape: tuple[int, ...], block_size: Pair, options: Mapping[str, Any]
    ) -> Sequence[Pair]:
        """musubi-tuner's blocks if the scales allow it, else finer ones."""
        n, k = matrix_shape(shape)
        rows, cols = block_size
        if (rows, cols) == (n, k) or len(shape) != 2:
            return [(n, k)]
        usual = (1, k) if k % COLS else (1, min(COLS, k))
        divided = (1, math.gcd(cols, k) if cols < k else k)
        return [usual, divided] if cols < usual[1] else [divided]

    def finish(
        self, layers: Mapping[str, EncodedLayer], others: Mapping[str, TensorInfo]
    ) -> FormatMetadata:
        """None: the files have no marker."""
        return FormatMetadata()
