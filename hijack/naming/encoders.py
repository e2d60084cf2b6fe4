"""The text encoders of a checkpoint, and what trainers call them.

kohya's ``lora_te1_`` and diffusers' ``text_encoder.`` are the first encoder of a model,
wherever a checkpoint stores it; ComfyUI and OneTrainer call encoders by their kind, as
in ``clip_l.``. Here layers get names such as ``te1.text_model.encoder...`` and
``te_clip_l.text_model...``; ``te.`` is the encoder of a file that has only one.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

from hijack.naming.wrappers import plain, shorter_names

#: Prefixes of encoders in files of Stability AI and ComfyUI.
_PREFIX = re.compile(
    r"(cond_stage_model|conditioner\.embedders\.\d+|text_encoders\.\w+)"
    r"\.(?:transformer|model)\."
)
#: Names of encoders in LoRA files of kohya and diffusers; no number is the first.
_NUMBERED = re.compile(r"(?:lora_prior_te|lora_te|text_encoder_?)(\d?)[._](.+)")
#: The same in those of ComfyUI and OneTrainer.
_NAMED = re.compile(
    r"(?:text_encoders\.(?!transformer\.)(\w+)|(clip_[lgh]|t5|t5xxl|llama))"
    r"\.(?:transformer\.)?(.+)"
)
_UNNAMED = re.compile(r"text_encoders\.transformer\.(.+)")
#: Keys that identify the kind of an encoder.
_CLIP = "text_model.encoder.layers.0.self_attn.q_proj.weight"
_OPEN_CLIP = "transformer.resblocks.0.attn.in_proj_weight"
_T5 = "encoder.block.0.layer.0.SelfAttention.q.weight"
#: Only the larger of SDXL's two encoders has this many layers.
_CLIP_G = "text_model.encoder.layers.31.self_attn.q_proj.weight"
_OPEN_CLIP_G = "transformer.resblocks.31.attn.in_proj_weight"
#: Tables of tokens, which no other network has.
_TOKENS = re.compile(
    r"(.*\.)?(embed_tokens|token_embedding|word_embeddings|wte|shared)\.weight"
)


def encoder_names(module: str) -> tuple[str, ...]:
    """A name in a LoRA file with its encoder as ``te1.``, then as ``te.``; or none."""
    if match := _NUMBERED.fullmatch(module):
        label, layer = match[1] or "1", match[2]
    elif match := _NAMED.fullmatch(module):
        label, layer = f"_{_kind(match[1] or match[2])}", match[3]
    elif match := _UNNAMED.fullmatch(module):
        return (f"te.{match[1]}",)
    else:
        return ()
    return f"te{label}.{layer}", f"te.{layer}"


def of_encoder(module: str) -> bool:
    """Whether a name in a LoRA file belongs to a text encoder."""
    return bool(encoder_names(module))


def encoder_layers(keys: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Names such as ``te1.text_model.encoder...`` with the keys of a checkpoint.

    Args:
        keys: of a checkpoint's tensors.
    """
    encoders: dict[str, dict[str, str]] = {}
    plain_keys = {plain(key): key for key in keys}
    for name, key in plain_keys.items():
        if numbered := encoder_names(name):  # as folders of diffusers are named
            yield numbered[0], key
        if (match := _PREFIX.match(name)) is not None:
            encoders.setdefault(match[1], {})[name[match.end() :]] = key
    if not encoders:
        encoders[""] = _only_encoder(plain_keys)
    for prefix, layers in encoders.items():
        for label in _labels(prefix, layers, encoders):
            for layer, key in layers.items():
                for name in _names(layer):
                    yield f"te{label}.{name}", key


def _only_encoder(keys: Mapping[str, str]) -> dict[str, str]:
    """The layers of a file of one encoder, without wrappers; or none."""
    short = {}
    for name, key in keys.items():
        for shorter in shorter_names(name):
            short[shorter] = key
            if shorter.startswith(("transformer.resblocks.", "text_projection")):
                break
    known = (_CLIP in short, _T5 in short, _OPEN_CLIP in short)
    return short if any(known) or any(map(_TOKENS.fullmatch, short)) else {}


def _kind(name: str) -> str:
    return {"t5": "t5xxl"}.get(name, name)


def _labels(
    prefix: str, layers: Mapping[str, str], encoders: Collection[str]
) -> tuple[str, ...]:
    """What trainers may call an encoder: numbers, and kinds."""
    kind, _, name = prefix.rpartition(".")
    if kind == "conditioner.embedders":
        # the refiner of SDXL has only the second encoder
        refiner = name == "0" and _OPEN_CLIP in layers
        numbers = ["1", "2"] if refiner else [str(int(name) + 1)]
        return (*numbers, "_clip_g" if _OPEN_CLIP in layers else "_clip_l")
    if not prefix:
        if _CLIP in layers:
            return ("2", "_clip_g") if _CLIP_G in layers else ("1", "_clip_l")
        if _OPEN_CLIP_G in layers:
            return "2", "_clip_g"
        return ("1", "_clip_h") if _OPEN_CLIP in layers else ("",)
    label = f"_{_kind(name or prefix)}"
    first, second = (f"text_encoders.{n}" in encoders for n in ("clip_l", "clip_g"))
    if name == "clip_g":
        return ("2", label) if first else ("1", "2", label)
    if _T5 in layers:  # SD3's third; kohya also numbers Flux's so
        numbers = ["3"] if second else ["2", "3"] if first else ["1", "2", "3"]
        return (*numbers, label)
    if len(encoders) == 1:
        return "1", label, ""
    return ("1", label) if name == "clip_l" else (label,)


def _names(layer: str) -> Iterator[str]:
    """The names that trainers may give a layer of an encoder."""
    yield from shorter_names(layer)  # kohya trains what is inside the language head
    if layer.startswith(("encoder.layers.", "embeddings.", "final_layer_norm.")):
        yield f"text_model.{layer}"  # files from before transformers had that prefix
