"""What the tensors of a LoRA add to a weight.

Kinds, in the letters of LyCORIS: LoRA (down, up, and mid for convolutions), LoHa (two
products, multiplied element by element), LoKr (a Kronecker product), full differences,
and each of the first three with DoRA's magnitudes. References: arXiv 2106.09685,
2108.06098, 2309.14859, 2402.09353.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hijack.errors import CheckpointError

#: Endings of keys, with the part of a LoRA they are; longer ones come first.
SUFFIXES: Mapping[str, str] = {
    ".lora_magnitude_vector.default.weight": "row_lengths",
    ".lora_magnitude_vector.weight": "row_lengths",
    ".lora_magnitude_vector": "row_lengths",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_A.default.weight": "down",
    ".lora_B.default.weight": "up",
    ".lora_B.default.bias": "up_bias",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_mid.weight": "mid",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    "_lora.down.weight": "down",
    "_lora.up.weight": "up",
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_B.bias": "up_bias",
    ".down.weight": "down",
    ".up.weight": "up",
    ".lora_A": "down",
    ".lora_B": "up",
    ".dora_scale": "lengths",
    ".alpha": "alpha",
    ".hada_w1_a": "w1_a",
    ".hada_w1_b": "w1_b",
    ".hada_w2_a": "w2_a",
    ".hada_w2_b": "w2_b",
    ".hada_t1": "t1",
    ".hada_t2": "t2",
    ".lokr_w1_a": "kron_1_a",
    ".lokr_w1_b": "kron_1_b",
    ".lokr_w2_a": "kron_2_a",
    ".lokr_w2_b": "kron_2_b",
    ".lokr_w1": "kron_1",
    ".lokr_w2": "kron_2",
    ".lokr_t2": "kron_t2",
    ".diff_b": "bias",
    ".b_norm": "bias",
    ".w_norm": "diff",
    ".diff": "diff",
}
#: What there is no merging of, told by a part of the key.
UNSUPPORTED: Mapping[str, str] = {
    ".oft_": "OFT or BOFT",
    ".boft_": "BOFT",
    ".a1.weight": "GLoRA",
    ".a2.weight": "GLoRA",
    ".b1.weight": "GLoRA",
    ".b2.weight": "GLoRA",
    ".lora_E": "AdaLoRA",
    ".lora_embedding_": "a LoRA of an embedding",
    ".vera_lambda": "VeRA",
    ".ia3_l": "IA3",
    ".on_input": "IA3",
    ".set_weight": "a weight that takes the place of another",
    ".reshape_weight": "a LoRA that changes the shape of the weight",
}
#: The tensors each kind consists of, apart from those any kind may have.
_KINDS: Sequence[frozenset[str]] = tuple(
    frozenset(parts.split())
    for parts in (
        "down up",
        "down up mid",
        "w1_a w1_b w2_a w2_b",
        "w1_a w1_b w2_a w2_b t1 t2",
        "kron_1 kron_2",
        "kron_1_a kron_1_b kron_2",
        "kron_1 kron_2_a kron_2_b",
        "kron_1 kron_2_a kron_2_b kron_t2",
        "kron_1_a kron_1_b kron_2_a kron_2_b",
        "kron_1_a kron_1_b kron_2_a kron_2_b kron_t2",
        "diff",
    )
)
_ANY_KIND = frozenset({"alpha", "lengths", "row_lengths", "bias", "up_bias"})


def check_parts(parts: Mapping[str, str], where: str) -> None:
    """Refuse a LoRA that lacks tensors, or is of two kinds at once.

    Args:
        parts: names of its parts, as in `SUFFIXES`, to keys.
        where: the file, for messages.

    Raises:
        CheckpointError: naming the keys.
    """
    kind = parts.keys() - _ANY_KIND
    if kind in _KINDS or (not kind and parts.keys() == {"bias"}):
        return
    key, *others = parts.values()
    near = [known for known in _KINDS if kind < known]
    if near:
        absent = " and ".join(sorted(min(near, key=len) - kind))
        raise CheckpointError(
            f"{where}: {key}: has no {absent} beside it, expected all tensors of a "
            "LoRA; the file is damaged or incomplete"
        )
    raise CheckpointError(
        f"{where}: {key}: together with {', '.join(others) or 'nothing else'} this is "
        "no LoRA, LoHa, LoKr or difference; the file is damaged or of another kind"
    )


def fit(parts: Mapping[str, Tensor], shape: Sequence[int], where: str) -> int:
    """Refuse a LoRA that is not for a weight of this shape.

    Args:
        parts: of the weight, as in `SUFFIXES`; on the meta device is enough.
        shape: of the weight.
        where: file and module, for messages.

    Returns:
        The rank that alpha is held against; 0 where alpha has no meaning.

    Raises:
        CheckpointError: naming the shapes.
    """
    try:
        difference, rank = _delta(parts)
        good = _flat(difference.shape) == _flat(shape)
        if good and parts.keys() & {"lengths", "row_lengths"}:
            _lengths(difference.view(shape), parts)
    except (RuntimeError, IndexError, TypeError):  # torch's words for shapes
        good = False
    if not good:
        shapes = ", ".join(f"{n} {list(t.shape)}" for n, t in parts.items())
        raise CheckpointError(
            f"{where}: {shapes} do not fit each other and a weight {list(shape)}; is "
            "this LoRA for another model?"
        )
    return rank


def merge(
    weight: Tensor, parts: Mapping[str, Tensor], factor: float, strength: float
) -> Tensor:
    """A weight with a LoRA in it.

    Args:
        weight: (N, ...) float32; is not changed.
        parts: float32, as in `SUFFIXES`; they `fit`.
        factor: what the difference is multiplied with: alpha / rank.
        strength: how much of the LoRA is wanted.

    Returns:
        (N, ...) float32, a tensor of its own.
    """
    difference = _delta(parts)[0].reshape(weight.shape)
    if not parts.keys() & {"lengths", "row_lengths"}:
        return torch.add(weight, difference, alpha=strength * factor)
    whole = torch.add(weight, difference, alpha=factor)
    whole *= _lengths(whole, parts)
    return weight + strength * (whole - weight)


def _flat(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape as a matrix: a LoRA of a convolution may be of its flat weight."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else tuple(shape)


def _delta(parts: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """The difference before it is scaled, and the rank alpha is held against."""
    if "down" in parts:
        down = parts["down"].flatten(1)
        if "mid" in parts:
            middle = parts["mid"].movedim(1, -1) @ down
            down = middle.movedim(-1, 1).flatten(1)
        return parts["up"].flatten(1) @ down, len(parts["down"])
    if "w1_a" in parts:
        one = _product(parts["w1_a"], parts["w1_b"], parts.get("t1"))
        two = _product(parts["w2_a"], parts["w2_b"], parts.get("t2"))
        if one.shape != two.shape:
            raise RuntimeError("the factors differ in shape")
        return one.mul_(two), len(parts["w1_b"])
    if "diff" in parts:
        return parts["diff"], 0
    return _kronecker(parts)


def _kronecker(parts: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    one, two, rank = parts.get("kron_1"), parts.get("kron_2"), 0
    if one is None:
        one, rank = parts["kron_1_a"] @ parts["kron_1_b"], len(parts["kron_1_b"])
    if two is None:
        rank = len(parts["kron_2_b"])
        two = _product(parts["kron_2_a"], parts["kron_2_b"], parts.get("kron_t2"))
    if one.ndim != 2 or two.ndim < 2:
        raise RuntimeError("the factors are no matrices")
    return torch.kron(one[(..., *[None] * (two.ndim - 2))], two), rank


def _product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """Of matrices (N, r) and (r, K); with a core (r, r, ...) between, of (r, N)."""
    if core is None:
        return torch.mm(a, b)
    right = core.movedim(1, -1) @ b  # (r, ..., K)
    left = torch.mm(a.t(), right.flatten(1))
    return left.view(len(left), *right.shape[1:]).movedim(-1, 1).contiguous()


def _lengths(whole: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """DoRA: what gives each row, or each column, of a weight a length of its own.

    PEFT's are of rows, whatever their shape; LyCORIS' say by their shape which.
    """
    lengths = parts.get("row_lengths")
    axis = 0
    if lengths is None:
        lengths = parts["lengths"]
        axis = 0 if lengths.shape[:1] == whole.shape[:1] else 1
    others = [dim for dim in range(whole.ndim) if dim != axis]
    actual: Tensor = torch.linalg.vector_norm(whole, dim=others, keepdim=True)
    return lengths.reshape(actual.shape) / (actual + torch.finfo(whole.dtype).eps)
