"""What the tensors of a LoRA add to a weight.

Kinds, in the letters of LyCORIS: LoRA (down, up, and mid for convolutions), LoHa (two
products, multiplied element by element), LoKr (a Kronecker product), full differences,
and each with DoRA's magnitudes. References: arXiv 2106.09685, 2108.06098, 2402.09353;
LyCORIS, ``docs/Algo-Details.md``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from hijack.errors import CheckpointError

#: Endings of keys, with the part of a LoRA they are; longer ones come first.
SUFFIXES: Mapping[str, str] = {
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_magnitude_vector.default.weight": "magnitude",
    ".lora_magnitude_vector.weight": "magnitude",
    ".lora_magnitude_vector": "magnitude",
    ".dora_scale": "magnitude",
    ".alpha": "alpha",
    ".hada_w1_a": "w1_a",
    ".hada_w1_b": "w1_b",
    ".hada_w2_a": "w2_a",
    ".hada_w2_b": "w2_b",
    ".hada_t1": "t1",
    ".hada_t2": "t2",
    ".lokr_w1": "kron_1",
    ".lokr_w1_a": "kron_1_a",
    ".lokr_w1_b": "kron_1_b",
    ".lokr_w2": "kron_2",
    ".lokr_w2_a": "kron_2_a",
    ".lokr_w2_b": "kron_2_b",
    ".lokr_t2": "kron_t2",
    ".diff_b": "bias",
    ".diff": "diff",
    ".reshape_weight": "reshape",
}
_NEEDED = (
    {"down", "up"},
    {"w1_a", "w1_b", "w2_a", "w2_b"},
    {"kron_1", "kron_2"},
    {"kron_1_a", "kron_1_b", "kron_2"},
    {"kron_1", "kron_2_a", "kron_2_b"},
    {"kron_1_a", "kron_1_b", "kron_2_a", "kron_2_b"},
    {"diff"},
    {"bias"},
)


def check_parts(parts: Mapping[str, object], where: str) -> None:
    """Refuse a LoRA some tensors of which are missing or of no kind known.

    Args:
        parts: names of its parts, as in `SUFFIXES`.
        where: the module, for messages.

    Raises:
        CheckpointError: naming the parts.
    """
    if not any(need <= parts.keys() for need in _NEEDED):
        raise CheckpointError(
            f"{where}: has {', '.join(sorted(parts))}, expected the tensors of a LoRA, "
            "LoHa, LoKr or difference; the file is damaged or of another kind"
        )
    if "reshape" in parts:
        raise CheckpointError(
            f"{where}: changes the shape of the weight, expected a LoRA that keeps it; "
            "apply it in ComfyUI instead"
        )


def merge(
    weight: Tensor, parts: Mapping[str, Tensor], strength: float, where: str
) -> Tensor:
    """A weight with a LoRA in it.

    Args:
        weight: (N, ...) float32; is not changed.
        parts: as in `SUFFIXES`; alpha is a number, absent for the rank itself.
        strength: what the difference is multiplied with.
        where: for messages.

    Returns:
        (N, ...) float32.

    Raises:
        CheckpointError: if shapes do not fit, or the LoRA is not finite.
    """
    wide = {name: tensor.float() for name, tensor in parts.items()}
    try:
        delta, rank = _delta(wide)
        delta = delta.reshape(weight.shape)
    except RuntimeError as error:  # torch's own words for shapes that do not fit
        shapes = {name: list(tensor.shape) for name, tensor in parts.items()}
        raise CheckpointError(
            f"{where}: its tensors {shapes} do not give a weight {list(weight.shape)}; "
            "is this LoRA for another model?"
        ) from error
    alpha = float(wide["alpha"]) if "alpha" in wide else float(rank)
    factor = alpha / rank if rank else 1.0
    if not math.isfinite(factor) or not bool(torch.isfinite(delta).all()):
        raise CheckpointError(
            f"{where}: holds inf or NaN, expected finite numbers; the file is damaged"
        )
    merged = weight + delta * factor
    if "magnitude" in wide:
        merged = _magnitudes(merged, wide["magnitude"])
    return weight + strength * (merged - weight)


def _delta(parts: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """The difference before it is scaled, and the rank alpha is held against."""
    if "down" in parts:
        down = parts["down"]
        if "mid" in parts:
            down = torch.einsum("ab...,bc->ac...", parts["mid"], down.flatten(1))
        return parts["up"].flatten(1) @ down.flatten(1), parts["down"].shape[0]
    if "w1_a" in parts:
        one = _product(parts["w1_a"], parts["w1_b"], parts.get("t1"))
        two = _product(parts["w2_a"], parts["w2_b"], parts.get("t2"))
        return one * two, parts["w1_b"].shape[0]
    if "kron_1" in parts or "kron_1_a" in parts:
        return _kronecker(parts)
    return parts["diff"], 0


def _kronecker(parts: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    one, two, rank = parts.get("kron_1"), parts.get("kron_2"), 0
    if one is None:
        one, rank = parts["kron_1_a"] @ parts["kron_1_b"], parts["kron_1_b"].shape[0]
    if two is None:
        rank = parts["kron_2_b"].shape[0]
        two = _product(parts["kron_2_a"], parts["kron_2_b"], parts.get("kron_t2"))
    return torch.kron(one[(..., *[None] * (two.ndim - one.ndim))], two), rank


def _product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    if core is None:
        return torch.mm(a, b)
    return torch.einsum("ij...,jr,ip->pr...", core, b, a)


def _magnitudes(merged: Tensor, magnitude: Tensor) -> Tensor:
    """DoRA: each row, or each column, of the merged weight gets a length of its own."""
    flat = merged.flatten(1)
    if magnitude.numel() == len(merged) and magnitude.shape[:1] == merged.shape[:1]:
        length = flat.norm(dim=1)
        scale = magnitude.flatten() / (length + torch.finfo(flat.dtype).eps)
        return torch.mul(merged, scale.view(-1, *[1] * (merged.ndim - 1)))
    length = merged.transpose(0, 1).flatten(1).norm(dim=1)  # (columns,)
    scale = magnitude.flatten() / (length + torch.finfo(flat.dtype).eps)
    return torch.mul(merged, scale.view(1, -1, *[1] * (merged.ndim - 2)))
