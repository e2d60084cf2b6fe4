"""ComfyUI's rotated weights of four bits in files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from hijack.claim import Certainty, Claim
from hijack.formats.comfy_quant import ComfyQuantDialect
from hijack.formats.tensor_dialect import Reading
from hijack.safetensors_io.header import TensorInfo
from schemes._rotation import rotation_marker
from schemes._w4a8_dialects import columns_in

#: What programs multiply in; the first is meant where nothing is said.
LINEAR_DTYPES = ("int4", "int8")


class ConvRotW4A4Dialect(ComfyQuantDialect):
    """``convrot_w4a4``: the marker says which columns are rotated, or it is 256."""

    writes = True
    formats = ("convrot_w4a4",)
    known = ("convrot_groupsize", "linear_dtype", "quant_group_size")
    stores = ("linear_dtype",)
    told = ("weight_rotation",)
    names: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "weight": ("weight",),
        "weight_scale": ("weight_scale",),
    }
    dtypes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "weight": ("I8", "U8"),
        "weight_scale": ("F32", "F16", "BF16"),
    }

    def marked(
        self, marker: Mapping[str, Any], infos: Mapping[str, TensorInfo]
    ) -> Iterable[Reading]:
        """As the marker says, if there is a scale for each row."""
        rotation = marker.get("convrot_groupsize", 256)
        weight, scale = infos["weight"].shape, infos["weight_scale"].shape
        if len(weight) != 2 or scale not in (weight[:1], (weight[0], 1)):
            return
        options = {"rotation": str(rotation)}
        if (dtype := marker.get("linear_dtype", LINEAR_DTYPES[0])) != LINEAR_DTYPES[0]:
            options["linear_dtype"] = str(dtype)
        yield Reading(Certainty.MARKED, options=options, block_size=(1, 2 * weight[1]))

    def decode(
        self, claim: Claim, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The tensors, and the size of rotated groups."""
        qdata, params = super().decode(claim, tensors)
        rotation = columns_in(claim, "rotation")
        params |= rotation_marker(rotation, qdata.device)
        return qdata.view(torch.int8), params

    def entry(
        self,
        quantized: Mapping[str, TensorInfo],
        stored: Mapping[str, TensorInfo],
        options: Mapping[str, str],
    ) -> dict[str, object]:
        """The format and the size of rotated groups, as ComfyUI writes them."""
        entry: dict[str, object] = {
            "format": self.formats[0],
            "convrot_groupsize": quantized["weight_rotation"].shape[0],
        }
        dtype = options.get("linear_dtype", LINEAR_DTYPES[0])
        return entry if dtype == LINEAR_DTYPES[0] else {**entry, "linear_dtype": dtype}


DIALECTS = (ConvRotW4A4Dialect(),)
