"""Spellings of the projections of attention and feed-forward layers.

Programs differ in how they call a projection and in how many of them share a weight:
``to_q``, ``q_proj`` and ``wq`` are the same, and ``qkv`` is three of them, whose rows
follow one another. `spelled` says which projections a name stands for.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Spelling:
    """What the name of a layer stands for.

    Attributes:
        stem: name of the module that the projections are in.
        parts: the projections, in the order of their rows; ``("",)`` if the layer is
            none that is known.
        certain: whether all programs agree on that order.
    """

    stem: str
    parts: tuple[str, ...]
    certain: bool = True


def spelled(name: str) -> Spelling:
    """The projections that a name stands for.

    Args:
        name: of a layer, its dots being underscores.
    """
    words = name.split("_")
    for count in range(min(len(words) - 1, _LONGEST), 0, -1):
        leaf, stem = "_".join(words[-count:]).lower(), "_".join(words[:-count])
        for within, leaves in _LEAVES:
            if leaf in leaves and within.search(stem):
                stream, *parts = leaves[leaf].split()
                stem = stem if stream == "." else f"{stem}_{stream}"
                return Spelling(stem, tuple(parts), leaf not in _UNCERTAIN)
    return Spelling(name, ("",))


def _each(leaves: str, meaning: str) -> dict[str, str]:
    return dict.fromkeys(leaves.split(), meaning)


def _fused(leaves: str, meaning: str) -> dict[str, str]:
    """A fused layer, and its parts by their number, as OneTrainer writes them."""
    stream, *parts = meaning.split()
    numbered = {
        f"{leaf}_{number}": f"{stream} {part}"
        for leaf in leaves.split()
        for number, part in enumerate(parts)
    }
    return _each(leaves, meaning) | numbered


def _attention() -> dict[str, str]:
    leaves: dict[str, str] = {}
    for q, query in (("q", "query"), ("k", "key"), ("v", "value")):
        leaves |= _each(
            f"{q} to_{q} {q}_proj w{q} w_{q} {q}_linear {q}_lin linear_{q} proj_{q} "
            f"{query} to_{query} {query}_proj {query}_linear",
            f". {q}",
        )
        leaves |= _each(f"add_{q}_proj added_{q}_proj {q}_img", f"added {q}")
        leaves |= _each(
            f"{q}_norm norm_{q} {query}_norm norm_{query}_norm ln_{q}", f". {q}_norm"
        )
        leaves |= _each(f"norm_added_{q} norm_{q}_img", f"added {q}_norm")
    return leaves


#: Spellings of which programs disagree: the rows of q, k and v follow one another, or
#: alternate by heads; w1 comes first, or w3 as in Nunchaku.
_UNCERTAIN = frozenset(
    {"wqkv", "w_qkv", "query_key_value", "linear_qkv", "c_attn", "w13", "w1_w3"}
)

#: The last words of a name to the module within the stem that the parts are in, a dot
#: being the stem itself, and the parts. Feed-forward layers have an ``in`` and an
#: ``out``; ``added`` is attention's second stream of tokens.
_ANYWHERE: Mapping[str, str] = {
    **_attention(),
    **_fused("qkv to_qkv qkv_proj in_proj qkv_linear qkv_lin", ". q k v"),
    **_fused("to_added_qkv add_qkv_proj added_qkv_proj", "added q k v"),
    **_fused("kv to_kv kv_proj kv_linear linear_kv wkv", ". k v"),
    **_fused("to_added_kv add_kv_proj kv_img", "added k v"),
    **_fused("qk to_qk qk_proj", ". q k"),
    **_fused("linear1 to_qkv_mlp_proj", ". q k v mlp"),
    **_each("wqkv w_qkv query_key_value linear_qkv c_attn", ". q k v"),
    **_each("linear1_qkv", ". q k v"),
    # linear attention, whose values may be wider than its keys
    **_each("in_proj_qkv", ". query key value"),
    **_each("in_proj_q", ". query"),
    **_each("in_proj_k", ". key"),
    **_each("in_proj_v", ". value"),
    **_each("proj_mlp", ". mlp"),
    **_each("to_out to_out_0 o_proj wo w_o out_proj output_proj", ". o"),
    **_each("to_add_out", "added o"),
    **_fused("gate_up_proj gate_up gate_and_up_proj", ". gate up"),
    **_fused("up_gate_proj up_gate", ". up gate"),
    **_each("gate gate_proj to_gate", ". gate"),
    **_each("up up_proj", ". up"),
    **_each("down down_proj", ". down"),
    **_each(
        "0 fc0 fc1 net_0_proj linear_in linear_1 layer1 c_fc in_layer lin1 fc_in",
        ". in",
    ),
    **_each(
        "2 fc2 net_2 linear_out linear_2 layer2 c_proj out_layer lin2 fc_out", ". out"
    ),
    **_each("lin linear", ". linear"),
}
_IN_ATTENTION = _each("o out proj out_lin out_linear", ". o")
_IN_FEED_FORWARD = {
    **_each("w1", ". gate"),
    **_each("w2", ". down"),
    **_each("w3", ". up"),
    **_each("w13 w1_w3", ". gate up"),
}
_LEAVES: tuple[tuple[re.Pattern[str], Mapping[str, str]], ...] = (
    (re.compile(r"(attn|attention)\d?(_added)?$", re.IGNORECASE), _IN_ATTENTION),
    (re.compile(r"(mlp|ff|ffn|feed_forward)$", re.IGNORECASE), _IN_FEED_FORWARD),
    (re.compile(""), _ANYWHERE),
)
_LONGEST = max(leaf.count("_") + 1 for _, leaves in _LEAVES for leaf in leaves)
