"""The text encoders of a checkpoint, and the numbers that trainers give them.

kohya's ``lora_te1_`` and diffusers' ``text_encoder.`` are the first encoder of a model,
wherever a checkpoint stores it. Here layers get names such as
``te1.text_model.encoder...``; the tables of `hijack.lora.names` translate the rest.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping

#: Prefixes of encoders in files of Stability AI and ComfyUI.
_PREFIX = re.compile(
    r"(cond_stage_model|conditioner\.embedders\.\d+|text_encoders\.\w+)"
    r"\.(?:transformer|model)\."
)
#: Names of encoders in LoRA files of kohya and diffusers; no number is the first.
_LORA = re.compile(r"(?:lora_prior_te|lora_te|text_encoder_?)(\d?)[._](.+)")
#: Keys that identify the kind of an encoder.
_CLIP = "text_model.encoder.layers.0.self_attn.q_proj.weight"
_OPEN_CLIP = "transformer.resblocks.0.attn.in_proj_weight"
_T5 = "encoder.block.0.layer.0.SelfAttention.q.weight"
#: Only the larger of SDXL's two encoders has this many layers.
_CLIP_G = "text_model.encoder.layers.31.self_attn.q_proj.weight"


def numbered(module: str) -> str | None:
    """A name in a LoRA file with its encoder as ``te1.``; None if it has none."""
    match = _LORA.fullmatch(module)
    return match and f"te{match[1] or 1}.{match[2]}"


def of_encoder(module: str) -> bool:
    """Whether a name in a LoRA file belongs to a text encoder."""
    return numbered(module) is not None or module.startswith("text_encoders.")


def encoder_layers(keys: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Names such as ``te1.text_model.encoder...`` with the keys of a checkpoint.

    Args:
        keys: of a checkpoint's tensors.
    """
    encoders: dict[str, dict[str, str]] = {}
    all_keys = {key: key for key in keys}
    for key in all_keys:
        if (match := _PREFIX.match(key)) is not None:
            encoders.setdefault(match[1], {})[key[match.end() :]] = key
    if _CLIP in all_keys or _T5 in all_keys:  # a file of one encoder
        encoders[""] = all_keys
    for prefix, layers in encoders.items():
        for number in _numbers(prefix, layers, encoders):
            for layer, key in layers.items():
                for name in _names(layer):
                    yield f"te{number}.{name}", key


def _numbers(
    prefix: str, layers: Mapping[str, str], encoders: Collection[str]
) -> tuple[int, ...]:
    """The numbers that trainers may give an encoder."""
    kind, _, name = prefix.rpartition(".")
    if kind == "conditioner.embedders":
        # the refiner of SDXL has only the second encoder
        refiner = name == "0" and _OPEN_CLIP in layers
        return (1, 2) if refiner else (int(name) + 1,)
    if not prefix and _T5 not in layers:
        return (2,) if _CLIP_G in layers else (1,)
    first, second = (f"text_encoders.{n}" in encoders for n in ("clip_l", "clip_g"))
    if name == "clip_g":
        return (2,) if first else (1, 2)
    if _T5 in layers:  # SD3's third; kohya also numbers Flux's so
        return (3,) if second else (2, 3) if first else (1, 2, 3)
    return (1,) if name == "clip_l" or len(encoders) == 1 else ()


def _names(layer: str) -> Iterator[str]:
    """The names that trainers may give a layer of an encoder."""
    if layer == "text_projection":  # a parameter, the transpose of a layer's weight
        yield "projection"
        return
    yield layer
    if layer.startswith(("encoder.layers.", "embeddings.", "final_layer_norm.")):
        yield f"text_model.{layer}"  # files from before transformers had that prefix
    if layer.startswith("model."):  # kohya trains the model inside the language head
        yield layer.removeprefix("model.")
