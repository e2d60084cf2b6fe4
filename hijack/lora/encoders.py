"""Which text encoders a checkpoint holds, and by what number trainers call each.

kohya's ``lora_te1_`` and diffusers' ``text_encoder.`` are the first encoder of a model,
wherever a checkpoint has it; so layers get names such as ``te1.text_model.encoder...``
here, and what differs behind the number is left to the tables of `lora_names`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

#: What stands before an encoder's names: in the files of Stability AI, and ComfyUI's.
_PLACE = re.compile(
    r"(cond_stage_model|conditioner\.embedders\.\d+|text_encoders\.\w+)"
    r"\.(?:transformer|model)\."
)
#: Names of encoders in LoRA files of kohya and diffusers; no number is the first.
_LORA = re.compile(r"(?:lora_prior_te|lora_te|text_encoder_?)(\d?)[._](.+)")
#: Names that only layers of a kind of encoder have.
_CLIP = "text_model.encoder.layers.0.self_attn.q_proj.weight"
_OPEN_CLIP = "transformer.resblocks.0.attn.in_proj_weight"
_T5 = "encoder.block.0.layer.0.SelfAttention.q.weight"
#: Only the larger of SDXL's two encoders has as many layers.
_CLIP_G = "text_model.encoder.layers.31.self_attn.q_proj.weight"


def numbered(module: str) -> str | None:
    """A name in a LoRA file with its encoder as ``te1.``; None if it names none."""
    found = _LORA.fullmatch(module)
    return found and f"te{found[1] or 1}.{found[2]}"


def of_encoder(module: str) -> bool:
    """Whether a name in a LoRA file is of a layer of a text encoder."""
    return numbered(module) is not None or module.startswith("text_encoders.")


def encoder_layers(keys: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Names such as ``te1.text_model.encoder...``, and the keys they mean.

    Args:
        keys: of a checkpoint's tensors.
    """
    places: dict[str, dict[str, str]] = {}
    whole = {key: key for key in keys}
    for key in whole:
        if (found := _PLACE.match(key)) is not None:
            places.setdefault(found[1], {})[key[found.end() :]] = key
    if _CLIP in whole or _T5 in whole:  # a file of an encoder alone
        places[""] = whole
    for place, own in places.items():
        for number in _numbers(place, own, places):
            for rest, key in own.items():
                for name in _names(rest):
                    yield f"te{number}.{name}", key


def _numbers(
    place: str, own: Mapping[str, str], places: Collection[str]
) -> tuple[int, ...]:
    """By which numbers trainers may call an encoder."""
    kind, _, name = place.rpartition(".")
    if kind == "conditioner.embedders":
        # the refiner of SDXL has the second encoder only
        alone = name == "0" and _OPEN_CLIP in own
        return (1, 2) if alone else (int(name) + 1,)
    if not place and _T5 not in own:
        return (2,) if _CLIP_G in own else (1,)
    first, second = (f"text_encoders.{clip}" in places for clip in ("clip_l", "clip_g"))
    if name == "clip_g":
        return (2,) if first else (1, 2)
    if _T5 in own:  # SD3's third, which kohya calls so in Flux too; diffusers does not
        return (3,) if second else (2, 3) if first else (1, 2, 3)
    return (1,) if name == "clip_l" or len(places) == 1 else ()


def _names(rest: str) -> Iterator[str]:
    """How trainers may call what an encoder's key says behind its place."""
    if rest == "text_projection":  # no layer's weight, but the transpose of one
        yield "projection"
        return
    yield rest
    if rest.startswith(("encoder.layers.", "embeddings.", "final_layer_norm.")):
        yield f"text_model.{rest}"  # files from before transformers had that word
    if rest.startswith("model."):  # kohya trains what is in the language model's head
        yield rest.removeprefix("model.")
