"""Compute what a LoRA adds to a weight.

Kinds, in the notation of LyCORIS: LoRA (down, up, and mid for convolutions; or numbered
pairs, one for each piece of a fused layer), LoHa (two products, multiplied
elementwise), LoKr (a Kronecker product), full differences, and each of the first three
with DoRA's magnitudes. References: arXiv 2106.09685, 2108.06098, 2309.14859,
2402.09353.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from hijack.errors import CheckpointError

#: Suffixes of keys to the part of a LoRA; longer ones first.
SUFFIXES: Mapping[str, str] = {
    ".lora_magnitude_vector.weight": "row_magnitudes",
    ".lora_magnitude_vector": "row_magnitudes",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora_up.bias": "up_bias",
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
    ".dora_scale": "magnitudes",
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
#: PEFT names each adapter, most often "default", within the key.
_ADAPTER = re.compile(
    r"(\.lora_(?:A|B|down|up|mid|magnitude_vector))\.(?!(?:weight|bias)$)[^.]+"
    r"(?=$|\.(?:weight|bias)$)"
)
_FACTOR = re.compile(r"lora|\.hada_|\.lokr_")
#: kohya's trainers give each piece of a fused layer a LoRA of its own.
_NUMBERED = re.compile(r"(.+)\.lora_(down|up)\.(\d+)\.weight")
#: lightx2v's difference of a parameter that belongs to no layer.
_MODULATION = ".diff_m"
#: Kinds that cannot be merged, by a part of the key.
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
    ".set_weight": "a weight that replaces another",
    ".reshape_weight": "a LoRA that changes the shape of the weight",
}
#: The parts of each kind, apart from those any kind may have.
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
#: DoRA's parts.
_MAGNITUDES = frozenset({"magnitudes", "row_magnitudes"})
_ANY_KIND = frozenset({"alpha", "magnitudes", "row_magnitudes", "bias", "up_bias"})


def split_key(key: str) -> tuple[str, str] | None:
    """The module of a LoRA and the part of it that a key names; None for others."""
    if key.endswith(_MODULATION):
        block = key.removesuffix(_MODULATION)  # kohya's names have no dots
        return f"{block}{'.' if '.' in block else '_'}modulation", "diff"
    if match := _NUMBERED.fullmatch(key):
        return match[1], f"{match[2]}_{match[3]}"
    key = _ADAPTER.sub(r"\1", key)
    suffix = next((end for end in SUFFIXES if key.endswith(end)), None)
    return (key.removesuffix(suffix), SUFFIXES[suffix]) if suffix else None


def is_factor(key: str) -> bool:
    """Whether a key is of a factor of LoRA, LoHa or LoKr, which no checkpoint has."""
    return split_key(key) is not None and bool(_FACTOR.search(key))


def check_parts(parts: Mapping[str, str], where: str) -> None:
    """Refuse a LoRA that lacks tensors or mixes kinds.

    Args:
        parts: its parts, as in `SUFFIXES`, to keys.
        where: the file, for messages.

    Raises:
        CheckpointError: naming the keys.
    """
    kind = parts.keys() - _ANY_KIND
    count = len(kind) // 2
    numbered = {f"{half}_{i}" for i in range(count) for half in ("down", "up")}
    if (
        kind in _KINDS
        or (kind and kind == numbered)
        or (not kind and parts.keys() == {"bias"})
    ):
        return
    key, *others = parts.values()
    near = [known for known in _KINDS if kind < known]
    if near:
        missing = " and ".join(sorted(min(near, key=len) - kind))
        raise CheckpointError(
            f"{where}: {key}: has no {missing} beside it, expected all tensors of a "
            "LoRA; the file is damaged or incomplete"
        )
    raise CheckpointError(
        f"{where}: {key}: together with {', '.join(others) or 'nothing else'} this is "
        "not a LoRA, LoHa, LoKr or difference; the file is damaged or of another kind"
    )


def check_shapes(
    parts: Mapping[str, Tensor],
    shape: Sequence[int],
    where: str,
    rows: Sequence[tuple[int, int]] = (),
) -> int:
    """Refuse a LoRA that does not fit a weight of this shape.

    Args:
        parts: of the LoRA, as in `SUFFIXES`; may be on the meta device.
        shape: of the weight.
        where: file and module, for messages.
        rows: of the difference that the weight has, each the first one and the one
            after the last; none for all.

    Returns:
        The divisor of alpha; 0 if alpha does not apply.

    Raises:
        CheckpointError: naming the shapes.
    """
    for part, tensor in parts.items():
        if tensor.numel() == 0:
            raise CheckpointError(
                f"{where}: {part} {list(tensor.shape)} has no elements, so that this "
                "is of rank 0 and changes nothing; expected a LoRA of rank 1 or more; "
                "get the file again, or remove this layer from it"
            )
    try:
        difference, rank = _delta(parts)
        if rows:
            parts = take_rows(parts, rows, where)
            difference, _ = _delta(parts)
        good = _flat(difference.shape) == _flat(shape)
        if good and parts.keys() & _MAGNITUDES:
            _magnitude_ratio(difference.view(shape), parts)
    except (RuntimeError, IndexError, TypeError):  # torch's errors for shapes
        good = False
    if not good:
        shapes = ", ".join(f"{n} {list(t.shape)}" for n, t in parts.items())
        raise CheckpointError(
            f"{where}: {shapes} do not fit each other and a weight {list(shape)}; is "
            "this LoRA for another model?"
        )
    return rank


def delta_shape(parts: Mapping[str, Tensor]) -> tuple[int, ...] | None:
    """The shape of the difference, or None if the parts do not fit each other.

    Args:
        parts: of the LoRA, as in `SUFFIXES`; may be on the meta device.
    """
    try:
        return tuple(_delta(parts)[0].shape)
    except (RuntimeError, IndexError, TypeError, KeyError):
        return None


def take_rows(
    parts: Mapping[str, Tensor], rows: Sequence[tuple[int, int]], where: str
) -> dict[str, Tensor]:
    """The LoRA of some rows alone.

    Args:
        parts: as in `SUFFIXES`.
        rows: of the difference, each the first one and the one after the last.
        where: file and module, for messages.

    Returns:
        Its parts; of LoHa and LoKr the difference itself.

    Raises:
        CheckpointError: if DoRA's magnitudes are of columns that are longer than the
            rows wanted.
    """

    def taken(tensor: Tensor) -> Tensor:
        return torch.cat([tensor[start:stop] for start, stop in rows])

    if "up" in parts:
        split = {**parts, "up": taken(parts["up"])}
        height = len(parts["up"])
    else:
        difference = _delta(parts)[0]
        kept = parts.keys() & _MAGNITUDES
        split = {name: parts[name] for name in kept} | {"diff": taken(difference)}
        height = len(difference)
    if "row_magnitudes" in parts:
        split["row_magnitudes"] = taken(parts["row_magnitudes"].flatten())
    magnitudes = parts.get("magnitudes")
    if magnitudes is not None and magnitudes.shape[:1] == (height,):
        split["magnitudes"] = taken(magnitudes)
    elif magnitudes is not None and sum(stop - start for start, stop in rows) < height:
        raise CheckpointError(
            f"{where}: is a DoRA with magnitudes {list(magnitudes.shape)} of columns, "
            "which several layers of the checkpoint share; expected magnitudes of "
            "rows; convert it to a LoRA first"
        )
    return split


def merge(
    weight: Tensor, parts: Mapping[str, Tensor], factor: float, strength: float
) -> Tensor:
    """Merge a LoRA into a weight.

    Args:
        weight: (N, ...) float32; not modified.
        parts: float32, as in `SUFFIXES`; `check_shapes` accepted them.
        factor: of the difference: alpha / rank.
        strength: of the LoRA.

    Returns:
        (N, ...) float32, a new tensor.
    """
    difference = _delta(parts)[0].reshape(weight.shape)
    if not parts.keys() & _MAGNITUDES:
        return torch.add(weight, difference, alpha=strength * factor)
    merged = torch.add(weight, difference, alpha=factor)
    merged *= _magnitude_ratio(merged, parts)
    return weight + strength * (merged - weight)


def _flat(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape as a matrix: a LoRA of a convolution may have a flat weight."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else tuple(shape)


def _delta(parts: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    """The unscaled difference, and the divisor of alpha."""
    if "down" in parts:
        down = parts["down"].flatten(1)
        if "mid" in parts:
            middle = parts["mid"].movedim(1, -1) @ down
            down = middle.movedim(-1, 1).flatten(1)
        return parts["up"].flatten(1) @ down, len(parts["down"])
    if "down_0" in parts:
        halves = [
            (parts[f"up_{i}"], parts[f"down_{i}"])
            for i in range(sum(name.startswith("down_") for name in parts))
        ]
        if len({len(down) for _, down in halves}) > 1:
            raise RuntimeError("alpha is of one rank, and the pieces have several")
        pieces = [up.flatten(1) @ down.flatten(1) for up, down in halves]
        return torch.cat(pieces), len(parts["down_0"])
    if "w1_a" in parts:
        first = _product(parts["w1_a"], parts["w1_b"], parts.get("t1"))
        second = _product(parts["w2_a"], parts["w2_b"], parts.get("t2"))
        if first.shape != second.shape:
            raise RuntimeError("the factors differ in shape")
        return first.mul_(second), len(parts["w1_b"])
    if "diff" in parts:
        return parts["diff"], 0
    return _kronecker(parts)


def _kronecker(parts: Mapping[str, Tensor]) -> tuple[Tensor, int]:
    first, second, rank = parts.get("kron_1"), parts.get("kron_2"), 0
    if first is None:
        first, rank = parts["kron_1_a"] @ parts["kron_1_b"], len(parts["kron_1_b"])
    if second is None:
        rank = len(parts["kron_2_b"])
        second = _product(parts["kron_2_a"], parts["kron_2_b"], parts.get("kron_t2"))
    if first.ndim != 2 or second.ndim < 2:
        raise RuntimeError("the factors are not matrices")
    return torch.kron(first[(..., *[None] * (second.ndim - 2))], second), rank


def _product(a: Tensor, b: Tensor, core: Tensor | None) -> Tensor:
    """(N, r) times (r, K); with a core (r, r, ...) the first matrix is (r, N)."""
    if core is None:
        return torch.mm(a, b)
    right = core.movedim(1, -1) @ b  # (r, ..., K)
    left = torch.mm(a.t(), right.flatten(1))
    return left.view(len(left), *right.shape[1:]).movedim(-1, 1).contiguous()


def _magnitude_ratio(weight: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """DoRA's magnitude of each row or column, over its actual norm.

    PEFT's magnitudes are of rows, whatever their shape; LyCORIS' follow their shape.
    """
    magnitudes = parts.get("row_magnitudes")
    axis = 0
    if magnitudes is None:
        magnitudes = parts["magnitudes"]
        axis = 0 if magnitudes.shape[:1] == weight.shape[:1] else 1
    others = [dim for dim in range(weight.ndim) if dim != axis]
    norms: Tensor = torch.linalg.vector_norm(weight, dim=others, keepdim=True)
    return magnitudes.reshape(norms.shape) / (norms + torch.finfo(weight.dtype).eps)
