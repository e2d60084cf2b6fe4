"""Files of SDNQ, as far as their weights are FP8 and no others in disguise."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from hijack.formats.claim import Certainty, Claim
from hijack.formats.dialect import Row
from hijack.safetensors_io.header import Header
from schemes._fp8.dialects.base import Found, FP8Dialect, Said

#: What a layer has beside codes and scale if the weight is more than their product.
_MORE = frozenset({"scale_2", "zero_point", "zero_point_scale", "svd_up", "svd_down"})


class SDNQDialect(FP8Dialect):
    """SDNQ's FP8: ``X.weight``, ``X.scale``, and a config with its own options.

    Groups of columns are a dimension of the weight, (N, K/C, C). A Linear that SDNQ
    means to multiply in FP8 is stored lying down, (K, N), its scale with it. A weight
    that was rotated, or of which a part is kept apart, is named and not read. Without
    a config that says it is not rotated, every reading is a guess.
    """

    name = "sdnq"
    scales = ("scale",)
    ranks = (2, 3)
    inputs = ()
    exact = True
    row = Row(
        "sdnq, SD.Next",
        "X.weight (N, K), (N, K/C, C) or lying down (K, N); X.scale",
        "F32 or the model's dtype; (N, 1), (N, K/C, 1) or (1, 1); lying down (1, N)",
        "rows, 1 x C or all; C divides",
        "quantization_config.json or config.json: quant_method sdnq",
    )

    def find(self, header: Header, layer: str) -> Found | None:
        """The layer's codes and scale; those that lie down as if they stood."""
        found = super().find(header, layer)
        if found is None:
            return None
        weight, scale = found.weight.shape, found.scale.shape
        if len(scale) == 3:
            return found if (*weight[:2], 1) == scale else None
        if len(weight) != 2:
            return None
        if scale == (1, weight[1]) != (1, 1):
            shape, grid = found.shape[::-1], found.grid[::-1]
            return dataclasses.replace(found, shape=shape, grid=grid)
        return found if scale in ((weight[0], 1), (1, 1)) else None

    def said(self, header: Header, found: Found) -> Said | None:
        """What the config says of layers whose weight is codes times scales."""
        method = header.quantization.get("quant_method")
        if _MORE & header.parts[found.layer].keys() or method not in (None, "sdnq"):
            return None
        if method is None:  # it may be rotated, or somebody else's
            return Said(Certainty.GUESS)
        options = list(_options(header.quantization))
        if _any(options, "use_hadamard"):
            return None
        single = found.grid == (1, 1) and found.shape[0] > 1
        if single and _any(options, "use_quantized_matmul"):
            return None  # nobody can tell whether it lies down
        return Said(Certainty.MARKED, "config says sdnq")

    def decode(
        self, claim: Claim, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Join groups; stand up what lies down."""
        weight, scale = tensors["weight"], tensors["scale"]
        if weight.ndim == 3:
            weight = weight.flatten(1)
        elif scale.shape[0] < scale.shape[1]:  # (1, N)
            weight, scale = weight.t().contiguous(), scale.t()
        return super().decode(claim, {**tensors, "weight": weight, "scale": scale})


def _options(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The config's options, and those it has for single modules."""
    yield config
    modules = config.get("modules_quant_config")
    for options in modules.values() if isinstance(modules, dict) else ():
        if isinstance(options, dict):
            yield options


def _any(options: list[Mapping[str, Any]], name: str) -> bool:
    return any(given.get(name) for given in options)
