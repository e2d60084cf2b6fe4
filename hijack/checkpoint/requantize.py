"""Which layers of a quantized checkpoint can become layers of another scheme."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from hijack.claim import Certainty, Claim
from hijack.errors import CheckpointError
from hijack.formats.dialect import Dialect
from hijack.formats.identification import Identification
from hijack.layer_kinds import guess_owners, not_a_target
from hijack.safetensors_io.header import DTYPE_NAMES, Header, join
from hijack.scheme import Quantized, Scheme
from hijack.selection import Patterns, Selection, choose_among


class PlainCast(Scheme):
    """Weights that are only cast to FP8, without a scale, as a scheme to read."""

    name = "plain_cast"

    def quantize(self, weight: Tensor, **options: Any) -> Quantized:
        """Cast a weight to E4M3."""
        return weight.to(torch.float8_e4m3fn), {}

    def dequantize(
        self, qdata: Tensor, params: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        """Cast back."""
        return qdata.to(dtype)

    def dense_shape(
        self, qdata: Tensor, params: Mapping[str, Tensor]
    ) -> tuple[int, ...]:
        """That of the cast."""
        return tuple(qdata.shape)


PLAIN_CAST = PlainCast()


@dataclasses.dataclass(frozen=True)
class Target:
    """What layers of a checkpoint are to become, and which.

    Attributes:
        scheme: the scheme.
        options: of ``scheme.quantize``.
        include: patterns on names of layers; None is all, and of plain casts those that
            `quantize_file` quantizes by default.
        exclude: patterns on names of layers to leave; None is none, and of plain casts
            those that it leaves.
    """

    scheme: Scheme
    options: Mapping[str, Any]
    include: Patterns = None
    exclude: Patterns = None

    def declines(self, shape: tuple[int, ...], own: Mapping[str, Any]) -> str | None:
        """The scheme's reason against a weight of a shape, or None."""
        return self.scheme.declines(shape, **{**self.options, **own})


def plain_casts(
    header: Header, result: Identification, target: Target
) -> tuple[dict[str, Claim], dict[str, str]]:
    """The plain casts of a checkpoint that are to be quantized.

    They are chosen as `quantize_file` chooses among dense layers.

    Args:
        header: of the checkpoint.
        result: what was identified in it.
        target: the scheme, and patterns.

    Returns:
        Layer to a claim that reads it, and the others to why they stay.
    """
    if result.lacks_scales():
        reason = "it holds quantized data without a scale"
        return {}, dict.fromkeys(result.unscaled, reason)
    bf16 = DTYPE_NAMES[torch.bfloat16]
    casts = {join(layer, "weight"): layer for layer in result.unscaled}
    dense = {
        key: dataclasses.replace(info, dtype=bf16) if key in casts else info
        for key, info in header.tensors.items()
    }
    chosen, left = choose_among(
        dataclasses.replace(header, tensors=dense),
        casts.values(),
        target.scheme.targets,
        target.include,
        target.exclude,
        target.declines,
    )
    claims = {
        layer: Claim(
            layer,
            PLAIN_CAST.name,
            Dialect.name,
            {"weight": join(layer, "weight")},
            certainty=Certainty.UNIQUE,
        )
        for layer in chosen
    }
    return claims, left


def reasons_against(
    header: Header,
    shapes: Mapping[str, tuple[int, ...]],
    schemes: Mapping[str, str],
    target: Target,
) -> dict[str, str]:
    """The quantized layers that do not become what is asked for, and why.

    Args:
        header: of the checkpoint.
        shapes: layer to the shape of its dense weight.
        schemes: layer to the scheme it is in; one that is in the right one is asked
            for nothing but its name.
        target: the scheme, and patterns.

    Raises:
        CheckpointError: if a pattern matches no layer.
    """
    selection = Selection(target.include, target.exclude)
    names = [*dict.fromkeys((*header.layers(), *shapes))]
    problem = selection.unmatched(names, header.source, list(shapes))
    if problem is not None:
        raise CheckpointError(problem)
    reasons = {}
    for layer, shape in shapes.items():
        biased = join(layer, "bias") in header.tensors
        owners = guess_owners(layer, len(shape), biased)
        reason = selection.reason(layer)
        if reason is None and schemes[layer] != target.scheme.name:
            reason = not_a_target(owners, target.scheme.targets)
            reason = reason or target.declines(shape, {})
        if reason is not None:
            reasons[layer] = reason
    return reasons
