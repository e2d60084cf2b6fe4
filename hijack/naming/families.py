"""Blocks and layers that diffusers names differently from a model's own files.

A line without indentation has the name of a block in a model's own files, and in
diffusers; the lines under it name modules and layers in the block. A dot is the block
itself, or the model. ``{}`` stands for any number. What comes after a name is kept.
``:swap`` says that the two halves of the rows change places, if there are twice as many
rows as columns: scale and shift of a last modulation.

Projections need no line (`hijack.naming.spellings`), nor do names that differ in dots,
underscores and wrappers alone (`hijack.naming.wrappers`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator

#: Also HunyuanVideo, Chroma and XLabs' LoRAs, where 1 is the image and 2 the text.
_FLUX = """
double_blocks.{} transformer_blocks.{}
  img_attn attn
  txt_attn attn.added
  img_mlp ff
  txt_mlp ff_context
  img_mod norm1
  txt_mod norm1_context
  processor.qkv_lora1 attn.qkv
  processor.qkv_lora2 attn.added.qkv
  processor.proj_lora1 attn.proj
  processor.proj_lora2 attn.added.proj
single_blocks.{} single_transformer_blocks.{}
  linear2 proj_out
  proj proj_out
  modulation norm
  norm .
  processor.qkv_lora linear1_qkv
  processor.proj_lora proj_out
single_transformer_blocks.{} single_transformer_blocks.{}
  attn .
  attn.to_out proj_out
. .
  img_in x_embedder
  txt_in context_embedder
  final_layer.linear proj_out
  final_layer.adaLN_modulation.1 norm_out.linear:swap
  pos_embed_input controlnet_x_embedder
  time_in time_text_embed.timestep_embedder
  time_in.mlp time_text_embed.timestep_embedder
  vector_in time_text_embed.text_embedder
  vector_in.mlp time_text_embed.text_embedder
  guidance_in time_text_embed.guidance_embedder
  guidance_in.mlp time_text_embed.guidance_embedder
  time_guidance_embed time_text_embed
  txt_in.input_embedder context_embedder.proj_in
  txt_in.t_embedder context_embedder.time_text_embed.timestep_embedder
  txt_in.t_embedder.mlp context_embedder.time_text_embed.timestep_embedder
  txt_in.c_embedder context_embedder.time_text_embed.text_embedder
txt_in.individual_token_refiner context_embedder.token_refiner
  blocks.{} refiner_blocks.{}
  blocks.{}.self_attn refiner_blocks.{}.attn
  blocks.{}.mlp refiner_blocks.{}.ff
  blocks.{}.adaLN_modulation.1 refiner_blocks.{}.norm_out.linear
"""

#: DiffSynth's names of Flux: a is the image, b the text.
_DIFFSYNTH = """
blocks.{} transformer_blocks.{}
  attn.a_to attn.to
  attn.b_to attn.added.to
  ff_a ff
  ff_b ff_context
  norm1_a norm1
  norm1_b norm1_context
single_blocks.{} single_transformer_blocks.{}
  to_qkv_mlp linear1
"""

_WAN = """
blocks.{} blocks.{}
  self_attn attn1
  cross_attn attn2
  norm3 norm2
  modulation scale_shift_table
. condition_embedder
  time_embedding time_embedder
  time_projection.1 time_proj
  text_embedding text_embedder
  img_emb.proj.0 image_embedder.norm1
  img_emb.proj.1 image_embedder.ff.0
  img_emb.proj.3 image_embedder.ff.2
  img_emb.proj.4 image_embedder.norm2
. .
  head.head proj_out
  head.modulation scale_shift_table
"""

_LUMINA = """
. .
  x_embedder all_x_embedder.2-1
  final_layer all_final_layer.2-1
"""

_SD3 = """
joint_blocks.{}.x_block transformer_blocks.{}
  attn attn
  attn2 attn2
  mlp ff
  adaLN_modulation.1 norm1.linear
joint_blocks.{}.context_block transformer_blocks.{}
  attn attn.added
  mlp ff_context
  adaLN_modulation.1 norm1_context.linear:swap
. .
  x_embedder.proj pos_embed.proj
  t_embedder.mlp time_text_embed.timestep_embedder
  y_embedder.mlp time_text_embed.text_embedder
  final_layer.linear proj_out
  final_layer.adaLN_modulation.1 norm_out.linear:swap
"""

_PIXART = """
blocks.{} transformer_blocks.{}
  attn attn1
  cross_attn attn2
  mlp ff
. .
  x_embedder.proj pos_embed.proj
  t_block.1 adaln_single.linear
  t_embedder.mlp adaln_single.emb.timestep_embedder
  csize_embedder.mlp adaln_single.emb.resolution_embedder
  ar_embedder.mlp adaln_single.emb.aspect_ratio_embedder
  y_embedder caption_projection
  y_embedder.y_proj caption_projection
  final_layer.linear proj_out
  final_layer.scale_shift_table scale_shift_table
"""

_COSMOS = """
blocks.{} transformer_blocks.{}
  self_attn attn1
  cross_attn attn2
  mlp ff
  adaln_modulation_self_attn.1 norm1.linear_1
  adaln_modulation_self_attn.2 norm1.linear_2
  adaln_modulation_cross_attn.1 norm2.linear_1
  adaln_modulation_cross_attn.2 norm2.linear_2
  adaln_modulation_mlp.1 norm3.linear_1
  adaln_modulation_mlp.2 norm3.linear_2
. .
  x_embedder.proj.1 patch_embed.proj
  t_embedder.1 time_embed.t_embedder
  t_embedding_norm time_embed.norm
  final_layer.linear proj_out
  final_layer.adaln_modulation.1 norm_out.linear_1
  final_layer.adaln_modulation.2 norm_out.linear_2
"""

#: 1 is the text, 2 the image; a single block has one stream.
_AURAFLOW = """
double_layers.{} joint_transformer_blocks.{}
  attn.w1 attn.added.
  attn.w2 attn.
  modX.1 norm1.linear
  modC.1 norm1_context.linear
  mlpX ff
  mlpC ff_context
  mlpX.c_fc1 ff.linear_1
  mlpX.c_fc2 ff.linear_2
  mlpX.c_proj ff.out_projection
  mlpC.c_fc1 ff_context.linear_1
  mlpC.c_fc2 ff_context.linear_2
  mlpC.c_proj ff_context.out_projection
single_layers.{} single_transformer_blocks.{}
  attn.w1 attn.
  modCX.1 norm1.linear
  mlp.c_fc1 ff.linear_1
  mlp.c_fc2 ff.linear_2
  mlp.c_proj ff.out_projection
. .
  t_embedder.mlp time_step_proj
  cond_seq_linear context_embedder
  positional_encoding pos_embed.pos_embed
  init_x_linear pos_embed.proj
  final_linear proj_out
  modF.1 norm_out.linear:swap
"""

_KREA_2 = """
blocks.{} transformer_blocks.{}
  mlp ff
txtfusion text_fusion
  layerwise_blocks.{}.mlp layerwise_blocks.{}.ff
  refiner_blocks.{}.mlp refiner_blocks.{}.ff
. .
  first img_in
  tmlp time_embed
  tproj.1 time_mod_proj
  txtmlp.1 txt_in.linear_1
  txtmlp.3 txt_in.linear_2
  last final_layer
"""

#: LTX-Video and LTX-2.
_LTX = """
transformer_blocks.{} transformer_blocks.{}
  scale_shift_table_a2v_ca_video video_a2v_cross_attn_scale_shift_table
  scale_shift_table_a2v_ca_audio audio_a2v_cross_attn_scale_shift_table
. .
  patchify_proj proj_in
  audio_patchify_proj audio_proj_in
  adaln_single time_embed
  audio_adaln_single audio_time_embed
  prompt_adaln_single prompt_adaln
  audio_prompt_adaln_single audio_prompt_adaln
  av_ca_video_scale_shift_adaln_single av_cross_attn_video_scale_shift
  av_ca_audio_scale_shift_adaln_single av_cross_attn_audio_scale_shift
  av_ca_a2v_gate_adaln_single av_cross_attn_video_a2v_gate
  av_ca_v2a_gate_adaln_single av_cross_attn_audio_v2a_gate
  video_embeddings_connector video_connector
  audio_embeddings_connector audio_connector
  video_embeddings_connector.transformer_1d_blocks video_connector.transformer_blocks
  audio_embeddings_connector.transformer_1d_blocks audio_connector.transformer_blocks
  text_embedding_projection.aggregate_embed text_proj_in
  connectors.video_connector video_connector
  connectors.audio_connector audio_connector
  connectors.text_proj_in text_proj_in
"""

#: OpenCLIP's own names and transformers'; see `hijack.naming.encoders`.
_OPEN_CLIP = "".join(
    f"""
{encoder}.transformer.resblocks.{{}} {encoder}.text_model.encoder.layers.{{}}
  attn self_attn
  ln_1 layer_norm1
  ln_2 layer_norm2
{encoder} {encoder}
  token_embedding text_model.embeddings.token_embedding
  ln_final text_model.final_layer_norm
"""
    for encoder in ("te{}", "te_clip_g", "te_clip_h", "te")
)

#: UNets with classes; the others' ``label_emb`` is for sizes.
_CLASSES = """
. .
  label_emb.0 class_embedding
"""

_TABLES = (
    _FLUX,
    _DIFFSYNTH,
    _WAN,
    _LUMINA,
    _SD3,
    _PIXART,
    _COSMOS,
    _AURAFLOW,
    _KREA_2,
    _LTX,
    _OPEN_CLIP,
    _CLASSES,
)


def diffusers_names(name: str) -> Iterator[tuple[str, bool]]:
    """What diffusers may call a layer, and whether the halves of its rows are swapped.

    Args:
        name: of a layer, without wrappers, its dots being underscores.
    """
    for family in _families():
        for pattern, template, swap in family.get(name[:_FEW], ()):
            if match := pattern.match(name):
                yield match.expand(template) + name[match.end() :], swap
                break


_Rows = list[tuple[re.Pattern[str], str, bool]]
#: Names are sorted by this many letters, to try few patterns on each.
_FEW = 2


@functools.cache
def _families() -> tuple[dict[str, _Rows], ...]:
    """Patterns of names, longest first, and templates of diffusers' names."""
    families = []
    for table in (*map(_rows, _TABLES), _unet()):
        family: dict[str, _Rows] = {}
        for own, theirs in sorted(table, key=lambda row: -len(row[0])):
            family.setdefault(own[:_FEW], []).append(_row(own, theirs))
        families.append(family)
    return tuple(families)


def _row(own: str, theirs: str) -> tuple[re.Pattern[str], str, bool]:
    theirs, _, word = theirs.partition(":")
    pattern = re.escape(own.replace(".", "_")).replace(r"\{\}", r"(\d+)")
    # a name that ends in a dot goes on without one, as in "w1q"
    end = "" if theirs.endswith(".") else r"(?=_|$)"
    numbers = iter(range(1, 1 + theirs.count("{}")))
    template = re.sub(
        r"\{\}", lambda _: rf"\g<{next(numbers)}>", theirs.replace(".", "_")
    )
    return re.compile(pattern + end), template, word == "swap"


def _rows(table: str) -> Iterator[tuple[str, str]]:
    """Pairs of names in a model's own files and in diffusers."""
    blocks = [".", "."]
    for line in table.splitlines():
        pair = line.split()
        if pair and not line.startswith(" "):
            blocks = pair
            if "." not in pair:
                yield pair[0], pair[1]
        elif pair:
            own, theirs = (
                block if name == "." else name if block == "." else f"{block}.{name}"
                for block, name in zip(blocks, pair, strict=True)
            )
            yield own, theirs


#: Layers of a block of a UNet.
_RESNET = {
    "in_layers.2": "conv1",
    "out_layers.3": "conv2",
    "emb_layers.1": "time_emb_proj",
    "skip_connection": "conv_shortcut",
    "in_layers.0": "norm1",
    "out_layers.0": "norm2",
}
_UNET = {
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
    "time_embed": "time_embedding",
    "label_emb.0": "add_embedding",
    "middle_block.1": "mid_block.attentions.0",
}


def _unet() -> Iterator[tuple[str, str]]:
    """The UNet of Stable Diffusion and SDXL, which diffusers counts by levels."""
    yield from _UNET.items()
    blocks = {"middle_block.0": "mid_block.{}.0", "middle_block.2": "mid_block.{}.1"}
    for level in range(4):
        at = 3 * level
        for block in range(3):
            if block < 2:
                theirs = f"down_blocks.{level}.{{}}.{block}"
                blocks[f"input_blocks.{at + block + 1}"] = theirs
            blocks[f"output_blocks.{at + block}"] = f"up_blocks.{level}.{{}}.{block}"
        yield f"input_blocks.{at + 3}.0.op", f"down_blocks.{level}.downsamplers.0.conv"
        for after in (1, 2):  # without attention before it, and with it
            own = f"output_blocks.{at + 2}.{after}.conv"
            yield own, f"up_blocks.{level}.upsamplers.0.conv"
    for own, theirs in blocks.items():
        middle = own.startswith("middle")
        for layer, known in _RESNET.items():
            resnet = own if middle else f"{own}.0"
            yield f"{resnet}.{layer}", f"{theirs.format('resnets')}.{known}"
        if not middle:
            yield f"{own}.1", theirs.format("attentions")
