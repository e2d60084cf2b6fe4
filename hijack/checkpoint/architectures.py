"""Which layers of known models are usually quantized.

Each row follows what musubi-tuner quantizes of a model, or where that knows none, what
writers of such files leave dense: norms, embeddings, modulation, first and last layers.
A model is told by names of its layers.
"""

from __future__ import annotations

import dataclasses
import fnmatch
from collections.abc import Sequence

from hijack.checkpoint.header import Header


@dataclasses.dataclass(frozen=True)
class Architecture:
    """A family of models.

    Attributes:
        name: of the family.
        include: fnmatch patterns on layer names; what matches none stays dense.
        exclude: fnmatch patterns on layer names that stay dense all the same.
        source: whose choice it is.
        signs: patterns each of which some layer must match.
    """

    name: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    source: str
    signs: tuple[str, ...]


def _parts(*words: str) -> tuple[str, ...]:
    """Patterns of names that hold a word."""
    return tuple(f"*{word}*" for word in words)


_MUSUBI = "musubi-tuner"
_USAGE = "usual practice"

#: The most specific first.
_TABLE: tuple[Architecture, ...] = (
    Architecture(
        "Qwen-Image",
        _parts("transformer_blocks"),
        _parts("norm", "time_text_embed"),
        _MUSUBI,
        ("*transformer_blocks.0.img_mod.1", "*transformer_blocks.0.txt_mlp.net.2"),
    ),
    Architecture(
        "HunyuanVideo, FramePack",
        _parts("transformer_blocks", "single_transformer_blocks"),
        _parts("norm"),
        _MUSUBI,
        ("*single_transformer_blocks.0.proj_mlp", "*context_embedder.token_refiner*"),
    ),
    Architecture(
        "FLUX.2",
        _parts("double_blocks", "single_blocks"),
        _parts("norm", "pe_embedder", "time_in", "_modulation"),
        _MUSUBI,
        ("*double_blocks.0.img_attn.qkv", "*double_stream_modulation_img.lin"),
    ),
    Architecture(
        "HunyuanVideo 1.5",
        _parts("double_blocks"),
        _parts("norm", "_emb"),
        _MUSUBI,
        ("*double_blocks.0.img_attn_q", "*txt_in.individual_token_refiner*"),
    ),
    Architecture(
        "HunyuanVideo",
        _parts("double_blocks", "single_blocks"),
        _parts("norm", "_mod", "modulation", "_emb"),
        _MUSUBI,
        ("*double_blocks.0.img_attn*", "*txt_in.individual_token_refiner*"),
    ),
    Architecture(
        "Chroma",
        _parts("double_blocks", "single_blocks"),
        _parts("norm", "distilled_guidance_layer"),
        _USAGE,
        ("*double_blocks.0.img_attn.qkv", "*distilled_guidance_layer*"),
    ),
    Architecture(
        "FLUX.1",
        _parts("double_blocks", "single_blocks"),
        _parts("norm", "_mod", "modulation"),
        _USAGE,
        ("*double_blocks.0.img_attn.qkv", "*single_blocks.0.linear1"),
    ),
    Architecture(
        "Wan",
        ("blocks.*", "*.blocks.*"),
        _parts(
            "norm",
            "patch_embedding",
            "text_embedding",
            "time_embedding",
            "time_projection",
            "head",
            "modulation",
            "img_emb",
        ),
        _MUSUBI,
        ("*blocks.0.self_attn.q", "*blocks.0.cross_attn.k", "*blocks.0.ffn.0"),
    ),
    Architecture(
        "Z-Image",
        _parts("layers.", "noise_refiner.", "context_refiner."),
        _parts("_modulation", ".norm_", "_norm"),
        _MUSUBI,
        ("*noise_refiner.0.attention*", "*cap_embedder.1", "*x_embedder*"),
    ),
    Architecture(
        "Krea 2",
        _parts("blocks."),
        _parts("mod.", "norm", "txtfusion"),
        _MUSUBI,
        ("*txtfusion*", "*blocks.0.*"),
    ),
    Architecture(
        "Kandinsky 5",
        _parts("text_transformer_blocks", "visual_transformer_blocks"),
        _parts("norm", "modulation", "time_embeddings"),
        _USAGE,
        ("*visual_transformer_blocks.0.*",),
    ),
    Architecture(
        "LTX-Video",
        _parts("transformer_blocks"),
        _parts("norm", "adaln", "patchify", "scale_shift"),
        _USAGE,
        ("*adaln_single.*", "*transformer_blocks.0.attn1.to_q"),
    ),
    Architecture(
        "Stable Diffusion 3",
        _parts("joint_blocks"),
        _parts("norm", "adaLN_modulation", "ln_q", "ln_k"),
        _USAGE,
        ("*joint_blocks.0.context_block.attn.qkv",),
    ),
    Architecture(
        "Stable Diffusion, SDXL",
        _parts("input_blocks", "middle_block", "output_blocks"),
        _parts("norm", "emb_layers", "time_embed", "label_emb"),
        _USAGE,
        ("*input_blocks.0.0", "*middle_block.1.proj_in"),
    ),
    Architecture(
        "decoder-only language model",
        _parts("layers."),
        _parts("norm", "embed", "lm_head", "mlp.gate"),
        _USAGE,
        ("*layers.0.self_attn.q_proj", "*layers.0.mlp.*"),
    ),
)


def architectures() -> tuple[Architecture, ...]:
    """All families that are known."""
    return _TABLE


def detect_architecture(header: Header) -> Architecture | None:
    """The family of a checkpoint's model, or None if it is none of those known.

    Args:
        header: of a dense checkpoint, with or without prefixes such as
            ``model.diffusion_model.``.
    """
    layers = list(header.layers())
    return next((known for known in _TABLE if _is(known, layers)), None)


def _is(known: Architecture, layers: Sequence[str]) -> bool:
    return all(fnmatch.filter(layers, sign) for sign in known.signs)
