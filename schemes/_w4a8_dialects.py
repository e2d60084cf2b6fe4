"""ComfyUI's packed rotated weights in files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from hijack.claim import Certainty, Claim
from hijack.errors import CheckpointError
from hijack.formats.comfy_quant import ComfyQuantDialect
from hijack.formats.comfyui_markers import FULL_PRECISION
from hijack.formats.tensor_dialect import Reading
from hijack.safetensors_io.header import Header, TensorInfo
from hijack.text import excerpt
from schemes._rotation import ROTATIONS, rotation_marker

#: Digits of more columns than any group has, which a tensor may have.
MOST_DIGITS = 6


class W4A8Dialect(ComfyQuantDialect):
    """``asym_w4a8_int8``: the marker says both sizes of groups, or they are usual."""

    writes = True
    formats = ("asym_w4a8_int8",)
    known = ("group_size", "convrot_groupsize", FULL_PRECISION)
    stores = (FULL_PRECISION,)
    told = ("weight_group_size", "weight_rotation")
    names: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "weight": ("weight",),
        "weight_s_rel": ("weight_s_rel",),
        "weight_s_channel": ("weight_s_channel",),
        "weight_codebook": ("weight_codebook",),
        "weight_correction": ("weight_correction",),
    }
    dtypes: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "weight": ("I8", "U8"),
        "weight_s_rel": ("F8_E4M3", "F32", "U8"),
        "weight_s_channel": ("F32", "F16", "BF16"),
        "weight_codebook": ("F32",),
        "weight_correction": ("F32", "F16", "BF16"),
    }
    optional = ("weight_codebook", "weight_correction")

    def marked(
        self, marker: Mapping[str, Any], infos: Mapping[str, TensorInfo]
    ) -> Iterable[Reading]:
        """As the marker says; what does not fit is refused with its values."""
        size = marker.get("group_size", 16)
        rotation = marker.get("convrot_groupsize", 256)
        options = {"group_size": str(size), "rotation": str(rotation)}
        if marker.get(FULL_PRECISION):
            options[FULL_PRECISION] = "true"
        block = (1, size) if type(size) is int else None
        yield Reading(Certainty.MARKED, options=options, block_size=block)

    def unmarked(
        self,
        marker: Mapping[str, Any] | None,
        header: Header,
        layer: str,
        infos: Mapping[str, TensorInfo],
    ) -> Iterable[Reading]:
        """In groups of 16; which columns are rotated together nothing tells."""
        weight, scale = infos["weight"].shape, infos["weight_s_rel"].shape
        if marker is not None or not weight or not scale:
            return
        columns = scale[-1] * 16
        rotations = (256, *(n for n in ROTATIONS[1:] if n != 256))
        for rotation in rotations if code_bits(weight[-1], columns) else ():
            if columns % rotation == 0:
                options = {"group_size": "16", "rotation": str(rotation)}
                yield Reading(Certainty.GUESS, options=options, block_size=(1, 16))

    def decode(
        self, claim: Claim, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The tensors as what their bytes are, and the sizes of groups."""
        qdata, params = super().decode(claim, tensors)
        if params["weight_s_rel"].dtype == torch.uint8:
            params["weight_s_rel"] = params["weight_s_rel"].view(torch.float8_e4m3fn)
        params |= size_marker(columns_in(claim, "group_size"), qdata.device)
        params |= rotation_marker(columns_in(claim, "rotation"), qdata.device)
        return qdata.view(torch.int8), params

    def store(self, qdata: Tensor, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """As in the base class, which leaves out what the marker says.

        Raises:
            CheckpointError: if groups are shifted, which ComfyUI does not read.
        """
        if "weight_correction" in params:
            raise CheckpointError(
                "dialect comfy_quant: has no place for weight_correction, expected "
                "groups that are not shifted; write it in dialect 'hijack'"
            )
        return super().store(qdata, params)

    def entry(
        self,
        quantized: Mapping[str, TensorInfo],
        stored: Mapping[str, TensorInfo],
        options: Mapping[str, str],
    ) -> dict[str, object]:
        """The format and both sizes, as ComfyUI writes them."""
        entry: dict[str, object] = {
            "format": self.formats[0],
            "group_size": quantized["weight_group_size"].shape[0],
            "convrot_groupsize": quantized["weight_rotation"].shape[0],
        }
        if options.get(FULL_PRECISION, "").lower() == "true":
            entry[FULL_PRECISION] = True
        return entry


def code_bits(width: int, columns: int) -> int:
    """Bits of a code in rows of so many bytes; 0 if neither 4 nor 6 fit."""
    return next((n for n in (4, 6) if columns and width * 8 == columns * n), 0)


def size_marker(size: int, device: torch.device) -> dict[str, Tensor]:
    """The parameter that says how many columns share a scale; it has no elements."""
    empty = torch.empty((size, 0), dtype=torch.uint8, device=device)
    return {"weight_group_size": empty}


def is_group_size(size: int, bits: int) -> bool:
    """Whether comfy-kitchen has groups of that many columns."""
    return (size > 0 and size % 16 == 0) or (bits == 4 and size in (4, 8))


def columns_in(claim: Claim, name: str) -> int:
    """An option of a claim that is a number of columns.

    Raises:
        CheckpointError: if it is none, or more than any weight has.
    """
    text = claim.options[name]
    if not text.isdecimal() or len(text) > MOST_DIGITS:
        raise CheckpointError(
            f"{claim.layer or 'weight'}: is marked with {name} {excerpt(text)}, "
            "expected a number of columns; get the file again"
        )
    return int(text)


DIALECTS = (W4A8Dialect(),)
