"""musubi-tuner's files: ``X.weight`` and ``X.scale_weight``, and no marker at all."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from hijack.formats.claim import Certainty
from hijack.formats.dialect import FileMarks, Row, Spelled
from hijack.safetensors_io.header import Header, TensorInfo, join
from schemes._fp8.blocks import Pair, block_size_of, matrix_shape, parse_block_size
from schemes._fp8.dialects.base import Found, FP8Dialect, Said, is_power
from schemes._fp8.dialects.markers import file_markers, marked

#: musubi-tuner's blocks are 1 x 64.
COLS = 64


class MusubiDialect(FP8Dialect):
    """What musubi-tuner writes: ``X.weight`` and ``X.scale_weight``, and no marker.

    The scale is (N, K/C, 1) for 1 x C blocks; (N, 1) per row, where C does not divide
    K; and 0-d for a whole weight, where that is not 2-D. A scalar may as well be from
    another writer (Kijai's files have the same keys): it decodes the same.
    """

    name = "musubi"
    scales = ("scale_weight",)
    ranks = (2, 3)
    inputs = ("scale_input",)
    exact = True
    refit = (
        "where columns do not divide the width, a layer has one scale a row, as in "
        "musubi-tuner; a weight that is not 2-D has one scale"
    )
    row = Row(
        "musubi-tuner; Kijai's older files",
        "X.weight, X.scale_weight",
        "the source's dtype; (N, K/C, 1), (N, 1) or ()",
        "1 x C, C = 64; 1 x K where C does not divide K; all where not 2-D",
        "none; the shape (N, K/C, 1) is its own",
        "yes",
    )

    def layers(self, header: Header) -> Iterable[str]:
        """The layers that own a scale, or whose scale has the odd key."""
        owners = super().layers(header)
        return [layer.replace(".scale_weight", ".weight") for layer in owners]

    def scale_keys(self, layer: str) -> Iterable[tuple[str, str]]:
        """The scale's key: musubi replaces every ``.weight`` in the weight's."""
        yield "scale_weight", join(layer, "scale_weight")
        if ".weight" in layer:
            odd = join(layer, "weight").replace(".weight", ".scale_weight")
            yield "scale_weight", odd

    def said(self, header: Header, found: Found) -> Said | None:
        """Claim the three shapes; ComfyUI's markers outweigh the two they share."""
        shape, n = found.scale.shape, found.shape[0]
        if len(shape) == 3 and shape[0] == n and shape[2] == 1:
            return Said(Certainty.UNIQUE)  # no reader the marker is for can read this
        if marked(header, found.layer):
            return None
        if shape == (n, 1) and n > 1:
            return Said(Certainty.UNIQUE)
        return Said(Certainty.FITS) if found.grid == (1, 1) else None

    def unmark(
        self, metadata: Mapping[str, str], keys: Collection[str], layers: Iterable[str]
    ) -> tuple[dict[str, str], set[str]]:
        """Drop the marker people add to make ComfyUI load a file it cannot read."""
        return dict(metadata), file_markers(keys, layers)

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
        given = options.get("block_size")
        # a block that is a whole row is a row, unless blocks were asked for
        blocks = cols < k or (cols == COLS and given != "row")
        if is_power(scale):
            rows = 0
        if (rows, cols) == (n, k) and (n > 1 or not blocks) and given != "row":
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

        Writers of files ask before they quantize; `encode` refuses what does not fit.

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
        """Blocks as musubi-tuner has them if the scales allow it, else finer ones."""
        n, k = matrix_shape(shape)
        rows, cols = block_size
        if (rows, cols) == (n, k) or len(shape) != 2:
            return [(n, k)]
        usual = (1, k) if k % COLS else (1, min(COLS, k))
        own = (1, math.gcd(cols, k) if cols < k else k)
        return [usual, own] if cols < usual[1] else [own]

    def finish(
        self, layers: Mapping[str, Spelled], others: Mapping[str, TensorInfo]
    ) -> FileMarks:
        """Nothing: the files have no marker."""
        return FileMarks()
