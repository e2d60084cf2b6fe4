"""Which layers of known models are usually quantized.

A row follows what musubi-tuner quantizes of a model or, where it has no list, what
writers of such files leave dense: norms, embeddings, modulation, first and last layers.
A model is told by names of its tensors.
"""

from __future__ import annotations

import dataclasses
import glob
from collections.abc import Iterable, Iterator

from hijack.naming.wrappers import plain


@dataclasses.dataclass(frozen=True)
class ModelFamily:
    """A family of models.

    Attributes:
        name: of the family.
        include: fnmatch patterns on layer names; what matches none stays dense.
        exclude: fnmatch patterns on layer names that stay dense all the same.
        source: whose choice it is.
        signature: names of layers, and of parameters in none, all of which it has.
    """

    name: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    source: str
    signature: tuple[str, ...]

    def below(self, prefix: str) -> ModelFamily:
        """The patterns of a model whose names begin with a prefix in its file.

        What else is in the file, such as a text encoder, matches none of them.
        """
        start = glob.escape(prefix)
        include = tuple(start + pattern for pattern in self.include)
        exclude = tuple(start + pattern for pattern in self.exclude)
        return dataclasses.replace(self, include=include, exclude=exclude)


def _row(
    name: str, source: str, include: str, exclude: str, signature: str
) -> ModelFamily:
    """A family, with the words that keys of tensors hold."""
    words = tuple(_patterns(include)), tuple(_patterns(exclude))
    return ModelFamily(name, *words, source, tuple(signature.split()))


def _patterns(words: str) -> Iterator[str]:
    """Patterns on the names of layers for words that their weights' keys hold."""
    for word in words.split():
        yield f"*{word}*"
        if word.endswith("."):  # the dot may be the one before "weight"
            yield f"*{word[:-1]}"


_MUSUBI = "musubi-tuner"
_USAGE = "usual practice"

#: More specific ones come first.
_TABLE: tuple[ModelFamily, ...] = (
    _row(
        "Qwen-Image",
        _MUSUBI,
        "transformer_blocks",
        "norm time_text_embed",
        "transformer_blocks.0.img_mod.1 transformer_blocks.0.txt_mlp.net.2 txt_norm",
    ),
    _row(
        "FramePack",
        _MUSUBI,
        "transformer_blocks single_transformer_blocks",
        "norm",
        "single_transformer_blocks.0.proj_mlp clean_x_embedder.proj",
    ),
    _row(
        "HunyuanVideo, diffusers' names",
        _USAGE,
        "transformer_blocks single_transformer_blocks",
        "norm",
        "single_transformer_blocks.0.proj_mlp context_embedder.proj_in",
    ),
    _row(
        "HunyuanVideo 1.5",
        _MUSUBI,
        "double_blocks",
        "norm _emb",
        "txt_in.individual_token_refiner.blocks.0.norm1 vision_in.proj.1",
    ),
    _row(
        "HunyuanVideo",
        _USAGE,
        "double_blocks single_blocks",
        "norm _mod modulation _emb",
        "txt_in.individual_token_refiner.blocks.0.norm1",
    ),
    _row(
        "FLUX.2",
        _MUSUBI,
        "double_blocks single_blocks",
        "norm pe_embedder time_in _modulation",
        "double_blocks.0.img_attn.qkv double_stream_modulation_img.lin",
    ),
    _row(
        "FLUX.2, diffusers' names",
        _USAGE,
        "transformer_blocks",
        "norm",
        "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
    ),
    _row(
        "Chroma",
        _USAGE,
        "double_blocks single_blocks",
        "norm",
        "double_blocks.0.img_attn.qkv distilled_guidance_layer.in_proj",
    ),
    _row(
        "FLUX.1",
        _MUSUBI,
        "single_blocks double_blocks",
        "norm mod",
        "double_blocks.0.img_attn.qkv double_blocks.0.img_mod.lin",
    ),
    _row(
        "FLUX.1, diffusers' names",
        _USAGE,
        "transformer_blocks",
        "norm",
        "transformer_blocks.0.attn.add_q_proj single_transformer_blocks.0.proj_mlp",
    ),
    _row(
        "Wan",
        _MUSUBI,
        "blocks",
        "norm patch_embedding text_embedding time_embedding time_projection head "
        "modulation img_emb",
        "blocks.0.self_attn.q blocks.0.cross_attn.k blocks.0.ffn.0 head.head",
    ),
    _row(
        "Wan, diffusers' names",
        _USAGE,
        "blocks",
        "norm",
        "blocks.0.attn1.to_q blocks.0.ffn.net.2 condition_embedder.time_proj",
    ),
    _row(
        "Z-Image",
        _MUSUBI,
        "layers. noise_refiner. context_refiner.",
        "_modulation .norm_ _norm",
        "cap_embedder.1 cap_pad_token noise_refiner.0.feed_forward.w1",
    ),
    _row(
        "Lumina 2",
        _USAGE,
        "layers. noise_refiner. context_refiner.",
        "_modulation .norm_ _norm",
        "cap_embedder.1 noise_refiner.0.feed_forward.w1",
    ),
    _row(
        "Ideogram 4",
        _MUSUBI,
        "layers.",
        "norm adaln",
        "layers.0.adaln_modulation embed_image_indicator",
    ),
    _row(
        "Krea 2",
        _MUSUBI,
        "blocks.",
        "mod. norm txtfusion",
        "blocks.0.attn.wq txtfusion.projector",
    ),
    _row(
        "Kandinsky 5",
        _MUSUBI,
        "visual_transformer_blocks text_transformer_blocks out_layer",
        "norm",
        "visual_transformer_blocks.0.cross_attention.key_norm",
    ),
    _row(
        "HiDream-O1",
        _MUSUBI,
        "language_model.layers visual.blocks visual.merger "
        "visual.deepstack_merger_list t_embedder1 x_embedder final_layer2",
        "norm rotary pos_embed embed_tokens lm_head",
        "t_embedder1.mlp.0 x_embedder.proj1",
    ),
    _row(
        "HiDream-I1",
        _USAGE,
        "double_stream_blocks single_stream_blocks",
        "norm adaLN_modulation gate",
        "double_stream_blocks.0.block.attn1.to_q caption_projection.0.linear",
    ),
    _row(
        "LTX-Video",
        _USAGE,
        "transformer_blocks",
        "norm adaln scale_shift",
        "adaln_single.linear patchify_proj transformer_blocks.0.attn1.to_q",
    ),
    _row(
        "Stable Diffusion 3",
        _USAGE,
        "joint_blocks",
        "norm adaLN_modulation ln_q ln_k",
        "joint_blocks.0.context_block.attn.qkv",
    ),
    _row(
        "Stable Diffusion 3, diffusers' names",
        _USAGE,
        "transformer_blocks",
        "norm",
        "transformer_blocks.0.attn.add_q_proj pos_embed.proj",
    ),
    _row(
        "AuraFlow",
        _USAGE,
        "double_layers single_layers",
        "norm mod",
        "double_layers.0.attn.w1q single_layers.0.attn.w1q",
    ),
    _row(
        "PixArt",
        _USAGE,
        "blocks.",
        "norm",
        "blocks.0.attn.qkv blocks.0.cross_attn.kv_linear t_block.1",
    ),
    _row(
        "Cosmos-Predict2, Anima",
        _USAGE,
        "blocks.",
        "norm adaln llm_adapter",
        "blocks.0.self_attn.q_proj blocks.0.mlp.layer1 x_embedder.proj.1",
    ),
    _row(
        "Stable Diffusion, SDXL",
        _USAGE,
        "input_blocks middle_block output_blocks",
        "norm emb_layers",
        "input_blocks.0.0 middle_block.0.in_layers.2 out.2",
    ),
    _row(
        "Stable Diffusion, SDXL, diffusers' names",
        _USAGE,
        "down_blocks mid_block up_blocks",
        "norm time_emb_proj",
        "down_blocks.0.resnets.0.conv1 up_blocks.0.resnets.0.conv1 conv_in",
    ),
    _row(
        "T5",
        _USAGE,
        "block.",
        "norm relative_attention_bias",
        "encoder.block.0.layer.0.SelfAttention.q encoder.final_layer_norm",
    ),
    _row(
        "decoder-only language model",
        _USAGE,
        "layers.",
        "norm embed lm_head mlp.gate.",
        "layers.0.self_attn.o_proj layers.0.input_layernorm",
    ),
)


def model_families() -> tuple[ModelFamily, ...]:
    """All families that are known; patterns are of names without a prefix."""
    return _TABLE


def detect_family(keys: Iterable[str]) -> ModelFamily | None:
    """The family of a model, or None if it is none of those known.

    Args:
        keys: of a checkpoint or state dict, with or without prefixes such as
            ``model.diffusion_model.``, and whatever wraps modules, such as
            ``_orig_mod``.

    Returns:
        The family, with patterns for the names as they are there, except for words
        that `hijack.naming.wrappers.plain` takes out.
    """
    names = {plain(key.removesuffix(".weight")) for key in keys}
    for family in _TABLE:
        prefix = _prefix(names, family.signature)
        if prefix is not None:
            return family.below(prefix)
    return None


def _prefix(names: set[str], signature: tuple[str, ...]) -> str | None:
    """What precedes the names of a model that has a whole signature, or None."""
    first, *others = signature
    ends = (name for name in names if f".{name}".endswith(f".{first}"))
    for prefix in sorted((end[: len(end) - len(first)] for end in ends), key=len):
        if all(prefix + name in names for name in others):
            return prefix
    return None
