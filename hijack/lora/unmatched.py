"""Say what the layers of a LoRA that a checkpoint lacks would have changed."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence

from hijack.naming.encoders import of_encoder
from hijack.naming.wrappers import shorter_names
from hijack.safetensors_io.header import Header

#: What a layer does, by words in its name; the first that fits.
_PURPOSES = (
    ("norms", re.compile(r"norm(?!\d?[._](context[._])?linear)|[._]ln_", re.I)),
    (
        "modulation",
        re.compile(r"mod([._]|X|C|F|ulation)|adaln|norm\w*[._]linear", re.I),
    ),
    (
        "attention",
        re.compile(r"att(n|ention)|qkv|[._](to_)?[qkv](_proj)?$|linear1$", re.I),
    ),
    ("feed-forward", re.compile(r"mlp|ff|feed_?forward|linear2$|proj_out$", re.I)),
    ("embeddings", re.compile(r"embed|_in$|_in[._]|patchify", re.I)),
    ("convolutions", re.compile(r"resnets|conv|(in|out)_layers", re.I)),
)
_KINDS_SHOWN = 4


def unmatched_message(
    source: Header, header: Header, unmatched: Sequence[str], merged: Collection[str]
) -> str:
    """The message that a LoRA file is wholly or partly for another model.

    Args:
        source: header of the LoRA file.
        header: of the checkpoint.
        unmatched: names in the LoRA file of layers that the checkpoint lacks.
        merged: the others.
    """
    count = len(unmatched)
    encoders = [name for name in unmatched if of_encoder(name)]
    others = [name for name in unmatched if not of_encoder(name)]
    some = ", ".join([*others, *encoders][:3]) + (", ..." if count > 3 else "")
    many = f"({count} of {count + len(merged)})"
    if not merged:
        only = "" if others else "; they are of text encoders alone"
        return (
            f"{source.source}: none of its {count} names, such as {some}, is of a "
            f"layer of {header.source}{only}; expected a LoRA for this model"
        )
    component = ""
    if not others:
        component, own = "text encoders", "text encoder's"
    elif not encoders and all(map(of_encoder, merged)):
        component, own = "a diffusion model", "diffusion model's"
    if component:
        return (
            f"{source.source}: {some} {many} are of {component}, of which "
            f"{header.source} has no such layers; expected a checkpoint with them, or "
            "a LoRA without; pass ignore_unmatched (--ignore-unmatched) to merge the "
            f"rest alone, and merge the LoRA into the {own} own file, too"
        )
    also = f", {len(encoders)} of them of text encoders" if encoders else ""
    return (
        f"{source.source}: {header.source} has no layer for {some} {many}{also}; "
        f"{_losses(others)} would be left unchanged, and the model would not be what "
        "the LoRA was made for; expected a LoRA for this model; ignore_unmatched "
        "(--ignore-unmatched) merges the others alone and loses these"
    )


def _losses(names: Sequence[str]) -> str:
    """How many layers of each kind, with the name of one each."""
    kinds: dict[str, list[str]] = {}
    for name in names:
        kinds.setdefault(_purpose(name), []).append(_kind(name))
    shown = sorted(kinds.items(), key=lambda item: -len(item[1]))
    texts = [
        f"{len(layers)} layer{'s' if len(layers) > 1 else ''}"
        f"{f' of {purpose}' if purpose else ''} ({', '.join(_first(layers))})"
        for purpose, layers in shown
    ]
    return ", ".join(texts)


def _purpose(name: str) -> str:
    kinds = (purpose for purpose, words in _PURPOSES if words.search(name))
    return next(kinds, "")


def _kind(name: str) -> str:
    """The end of a name, without the number of its block."""
    *_, short = shorter_names(name)
    return re.sub(r".*?\d+[._]", "", short, count=1) or short


def _first(kinds: Sequence[str]) -> Iterator[str]:
    """A few kinds of layers, each once."""
    unique = list(dict.fromkeys(kinds))
    yield from unique[:_KINDS_SHOWN]
    if len(unique) > _KINDS_SHOWN:
        yield "..."
