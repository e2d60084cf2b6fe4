"""What a layer is, guessed from the name and the shape of its weight in a file."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence

from torch import nn

from hijack.naming.wrappers import plain

#: Number of dimensions of a weight to the modules that may own it.
_OWNERS: Mapping[int, tuple[type[nn.Module], ...]] = {
    2: (nn.Linear, nn.Embedding),
    3: (nn.Conv1d, nn.ConvTranspose1d),
    4: (nn.Conv2d, nn.ConvTranspose2d),
    5: (nn.Conv3d, nn.ConvTranspose3d),
}
_ANY_OWNER = tuple(owner for owners in _OWNERS.values() for owner in owners)
#: What an embedding is called: the last part of its name.
_EMBEDDING = re.compile(
    r"(.*_)?(embeds?|embeddings?|emb)|(.*_)?embed_tokens|embed_.*|.*embedding_table"
    r"|wte|wpe|shared|relative_attention_bias"
)


def guess_owners(
    layer: str, dimensions: int, biased: bool
) -> tuple[type[nn.Module], ...]:
    """The types of module that a weight in a file may belong to.

    Args:
        layer: its name.
        dimensions: of the weight.
        biased: whether the layer has a bias, which no embedding has.
    """
    if dimensions != 2:
        return _OWNERS.get(dimensions, ())
    words = [word for word in plain(layer).split(".") if not word.isdigit()]
    embedding = not biased and words and _EMBEDDING.fullmatch(words[-1].lower())
    return (nn.Embedding,) if embedding else (nn.Linear,)


def not_a_target(
    owners: Sequence[type[nn.Module]], targets: Sequence[type[nn.Module]]
) -> str | None:
    """Why a scheme does not quantize weights of some types of module, or None.

    Args:
        owners: types the weight may belong to.
        targets: those the scheme quantizes. Types nobody can guess from a file may own
            any weight.
    """
    for target in targets:
        if not issubclass(target, _ANY_OWNER):
            return None
        for owner in owners:
            if issubclass(owner, target) or issubclass(target, owner):
                return None
    guess = owners[0].__name__ if owners else "no module that is known"
    return f"looks like {guess}; the scheme quantizes {_type_names(targets)}"


def _type_names(types: Sequence[type[nn.Module]]) -> str:
    return ", ".join(each.__name__ for each in types)


#: What a layer's own name, or that of a module it is in, says of it.
_KINDS: Mapping[str, re.Pattern[str]] = {
    "a positional table": re.compile(
        r"(.*_)?pos(ition(s|al)?)?(_.*)?|.*relative_attention_bias|(.*_)?(rotary|rope)(_.*)?"
    ),
    "an embedding": re.compile(
        r"(.*_)?emb(ed(s|der|ders|ding|dings|_.*)?)?(_.*)?|wte|wpe|patchify.*"
    ),
    "a norm or its modulation": re.compile(
        r".*norm.*|(.*_)?ln(_.*|\d*)|ada_?ln.*|(.*_)?mod(ulation)?(_.*)?|scale_shift.*"
    ),
}
#: What heads are called, outside of blocks; within one, only those of its own model.
_HEAD = re.compile(
    r"(.*_)?heads?|.*classifier|logits|scores?|pooler|cls|(visual|text)_projection"
    r"|vocab_.*|qa_outputs|unembed.*"
)
_INNER_HEAD = re.compile(r"(lm|shared)_head")
#: What the last layers of a model are called too, if no block of it is.
_LAST = re.compile(r"proj_out|(.*_)?final(_.*)?|out(put)?(_.*)?")
#: What chooses among experts is called; it has a row for each of them.
_ROUTER = re.compile(r"(.*_)?router(_.*)?")
_GATE, _MOST_EXPERTS = re.compile(r"(.*expert_)?gate|wg|gating"), 1024


def delicate(layer: str, shape: tuple[int, ...]) -> str | None:
    """What a layer looks like if its like usually stay dense, or None.

    Args:
        layer: its name.
        shape: of its weight, (N, K).
    """
    parts = plain(layer).lower().split(".")
    words = [part for part in parts if not part.isdigit()]
    for kind, pattern in _KINDS.items():
        if any(pattern.fullmatch(word) for word in words):
            return kind
    if words and (_EMBEDDING.fullmatch(words[-1]) or words[-1].endswith("_tokens")):
        return "an embedding"
    outer = list(itertools.takewhile(lambda part: not part.isdigit(), parts))
    if any(_HEAD.fullmatch(word) for word in outer) or any(
        _INNER_HEAD.fullmatch(word) for word in words
    ):
        return "a head"
    if outer == parts and any(_LAST.fullmatch(word) for word in words):
        return "a head"
    rows, cols = shape[0], shape[-1]
    router = any(_ROUTER.fullmatch(word) for word in words)
    gate = bool(words) and bool(_GATE.fullmatch(words[-1]))
    if (router or gate) and rows <= _MOST_EXPERTS and rows < cols:
        return "a router"
    return None
