"""Layer names of diffusers and trainers that differ from those of checkpoints.

A line without indentation has the name of a block in LoRA files and in checkpoints; the
lines under it name layers in the block. A dot is the model itself. ``{}`` stands for
any number and ``{*}`` for any remainder. A word behind a colon says which part of a
fused weight the layer is:

===========  =========================================================================
q, k, v      one of three consecutive parts, where q has as many rows as the weight has
             columns
first ...    parts with as many rows as there are columns; ``remainder`` follows three
             of them
qkv          those three parts
first_half   the first half of the rows, as ``second_half`` is the other
swap_halves  the halves are swapped, if there are twice as many rows as columns
transposed   the checkpoint has the transpose of the weight
===========  =========================================================================

Names that differ only in dots and underscores, or in prefixes, need no line.
"""

from __future__ import annotations

_FLUX = """
transformer_blocks.{} double_blocks.{}
  attn.to_q img_attn.qkv:q
  attn.to_k img_attn.qkv:k
  attn.to_v img_attn.qkv:v
  attn.to_out.0 img_attn.proj
  attn.norm_q img_attn.norm.query_norm
  attn.norm_k img_attn.norm.key_norm
  attn.add_q_proj txt_attn.qkv:q
  attn.add_k_proj txt_attn.qkv:k
  attn.add_v_proj txt_attn.qkv:v
  attn.to_add_out txt_attn.proj
  attn.norm_added_q txt_attn.norm.query_norm
  attn.norm_added_k txt_attn.norm.key_norm
  ff.net.0.proj img_mlp.0
  ff.net.2 img_mlp.2
  ff.linear_in img_mlp.0
  ff.linear_out img_mlp.2
  ff_context.net.0.proj txt_mlp.0
  ff_context.net.2 txt_mlp.2
  ff_context.linear_in txt_mlp.0
  ff_context.linear_out txt_mlp.2
  norm1.linear img_mod.lin
  norm1_context.linear txt_mod.lin
single_transformer_blocks.{} single_blocks.{}
  attn.to_q linear1:first
  attn.to_k linear1:second
  attn.to_v linear1:third
  proj_mlp linear1:remainder
  attn.to_qkv_mlp_proj linear1
  attn.to_out linear2
  proj_out linear2
  attn.norm_q norm.query_norm
  attn.norm_k norm.key_norm
  norm.linear modulation.lin
. .
  x_embedder img_in
  context_embedder txt_in
  norm_out.linear final_layer.adaLN_modulation.1:swap_halves
  proj_out final_layer.linear
  controlnet_x_embedder pos_embed_input
  double_stream_modulation_img.linear double_stream_modulation_img.lin
  double_stream_modulation_txt.linear double_stream_modulation_txt.lin
  single_stream_modulation.linear single_stream_modulation.lin
distilled_guidance_layer distilled_guidance_layer
  layers.{}.linear_1 layers.{}.in_layer
  layers.{}.linear_2 layers.{}.out_layer
time_text_embed .
  timestep_embedder.linear_1 time_in.in_layer
  timestep_embedder.linear_2 time_in.out_layer
  text_embedder.linear_1 vector_in.in_layer
  text_embedder.linear_2 vector_in.out_layer
  guidance_embedder.linear_1 guidance_in.in_layer
  guidance_embedder.linear_2 guidance_in.out_layer
time_guidance_embed .
  timestep_embedder.linear_1 time_in.in_layer
  timestep_embedder.linear_2 time_in.out_layer
  guidance_embedder.linear_1 guidance_in.in_layer
  guidance_embedder.linear_2 guidance_in.out_layer
"""

#: XLabs' trainer: 1 is the image stream, 2 the text stream.
_XLABS = """
double_blocks.{} double_blocks.{}
  processor.qkv_lora1 img_attn.qkv
  processor.qkv_lora2 txt_attn.qkv
  processor.proj_lora1 img_attn.proj
  processor.proj_lora2 txt_attn.proj
single_blocks.{} single_blocks.{}
  processor.qkv_lora linear1:qkv
  processor.proj_lora linear2
  linear1_qkv linear1:qkv
"""

#: Tencent's names; ComfyUI uses those of Flux.
_HUNYUAN_VIDEO = """
double_blocks.{} double_blocks.{}
  img_mod.linear img_mod.lin
  img_mlp.fc1 img_mlp.0
  img_mlp.fc2 img_mlp.2
  img_attn_q img_attn.qkv:q
  img_attn_k img_attn.qkv:k
  img_attn_v img_attn.qkv:v
  img_attn_q_norm img_attn.norm.query_norm
  img_attn_k_norm img_attn.norm.key_norm
  txt_mod.linear txt_mod.lin
  txt_mlp.fc1 txt_mlp.0
  txt_mlp.fc2 txt_mlp.2
  txt_attn_q txt_attn.qkv:q
  txt_attn_k txt_attn.qkv:k
  txt_attn_v txt_attn.qkv:v
  txt_attn_q_norm txt_attn.norm.query_norm
  txt_attn_k_norm txt_attn.norm.key_norm
single_blocks.{} single_blocks.{}
  modulation.linear modulation.lin
  q_norm norm.query_norm
  k_norm norm.key_norm
txt_in.individual_token_refiner.blocks.{} txt_in.individual_token_refiner.blocks.{}
  mlp.fc1 mlp.0
  mlp.fc2 mlp.2
. .
  time_in.mlp.0 time_in.in_layer
  time_in.mlp.2 time_in.out_layer
  vector_in.mlp.0 vector_in.in_layer
  vector_in.mlp.2 vector_in.out_layer
  guidance_in.mlp.0 guidance_in.in_layer
  guidance_in.mlp.2 guidance_in.out_layer
  txt_in.t_embedder.mlp.0 txt_in.t_embedder.in_layer
  txt_in.t_embedder.mlp.2 txt_in.t_embedder.out_layer
  txt_in.c_embedder.linear_1 txt_in.c_embedder.in_layer
  txt_in.c_embedder.linear_2 txt_in.c_embedder.out_layer
"""

#: diffusers' names that Flux lacks, or where Tencent's differ from Flux's.
_HUNYUAN_VIDEO_DIFFUSERS = """
transformer_blocks.{} double_blocks.{}
  norm1.linear img_mod.linear
  norm1_context.linear txt_mod.linear
  ff.net.0.proj img_mlp.fc1
  ff.net.2 img_mlp.fc2
  ff_context.net.0.proj txt_mlp.fc1
  ff_context.net.2 txt_mlp.fc2
  attn.norm_q img_attn_q_norm
  attn.norm_k img_attn_k_norm
  attn.norm_added_q txt_attn_q_norm
  attn.norm_added_k txt_attn_k_norm
single_transformer_blocks.{} single_blocks.{}
  norm.linear modulation.linear
  attn.norm_q q_norm
  attn.norm_k k_norm
context_embedder.token_refiner txt_in.individual_token_refiner
  refiner_blocks.{}.attn.to_q blocks.{}.self_attn.qkv:q
  refiner_blocks.{}.attn.to_k blocks.{}.self_attn.qkv:k
  refiner_blocks.{}.attn.to_v blocks.{}.self_attn.qkv:v
  refiner_blocks.{}.attn.to_out.0 blocks.{}.self_attn.proj
  refiner_blocks.{}.ff.net.0.proj blocks.{}.mlp.0
  refiner_blocks.{}.ff.net.2 blocks.{}.mlp.2
  refiner_blocks.{}.ff.net.0.proj blocks.{}.mlp.fc1
  refiner_blocks.{}.ff.net.2 blocks.{}.mlp.fc2
  refiner_blocks.{}.norm_out.linear blocks.{}.adaLN_modulation.1
  refiner_blocks.{}.norm1 blocks.{}.norm1
  refiner_blocks.{}.norm2 blocks.{}.norm2
context_embedder txt_in
  proj_in input_embedder
  time_text_embed.timestep_embedder.linear_1 t_embedder.in_layer
  time_text_embed.timestep_embedder.linear_2 t_embedder.out_layer
  time_text_embed.text_embedder.linear_1 c_embedder.in_layer
  time_text_embed.text_embedder.linear_2 c_embedder.out_layer
  time_text_embed.timestep_embedder.linear_1 t_embedder.mlp.0
  time_text_embed.timestep_embedder.linear_2 t_embedder.mlp.2
  time_text_embed.text_embedder.linear_1 c_embedder.linear_1
  time_text_embed.text_embedder.linear_2 c_embedder.linear_2
. .
  x_embedder.proj img_in.proj
time_text_embed .
  timestep_embedder.linear_1 time_in.mlp.0
  timestep_embedder.linear_2 time_in.mlp.2
  guidance_embedder.linear_1 guidance_in.mlp.0
  guidance_embedder.linear_2 guidance_in.mlp.2
"""

_WAN = """
blocks.{} blocks.{}
  attn1.to_q self_attn.q
  attn1.to_k self_attn.k
  attn1.to_v self_attn.v
  attn1.to_out.0 self_attn.o
  attn1.norm_q self_attn.norm_q
  attn1.norm_k self_attn.norm_k
  attn2.to_q cross_attn.q
  attn2.to_k cross_attn.k
  attn2.to_v cross_attn.v
  attn2.to_out.0 cross_attn.o
  attn2.norm_q cross_attn.norm_q
  attn2.norm_k cross_attn.norm_k
  attn2.add_k_proj cross_attn.k_img
  attn2.add_v_proj cross_attn.v_img
  attn2.norm_added_k cross_attn.norm_k_img
  ffn.net.0.proj ffn.0
  ffn.net.2 ffn.2
  norm2 norm3
  scale_shift_table modulation
condition_embedder .
  time_embedder.linear_1 time_embedding.0
  time_embedder.linear_2 time_embedding.2
  time_proj time_projection.1
  text_embedder.linear_1 text_embedding.0
  text_embedder.linear_2 text_embedding.2
  image_embedder.norm1 img_emb.proj.0
  image_embedder.ff.net.0.proj img_emb.proj.1
  image_embedder.ff.net.2 img_emb.proj.3
  image_embedder.norm2 img_emb.proj.4
. .
  proj_out head.head
  scale_shift_table head.modulation
"""

_LUMINA = """
{*}.attention {*}.attention
  to_q qkv:q
  to_k qkv:k
  to_v qkv:v
  to_out.0 out
  norm_q q_norm
  norm_k k_norm
. .
  all_x_embedder.2-1 x_embedder
  all_final_layer.2-1.{*} final_layer.{*}
"""

_SD3 = """
transformer_blocks.{} joint_blocks.{}.x_block
  attn.to_q attn.qkv:q
  attn.to_k attn.qkv:k
  attn.to_v attn.qkv:v
  attn.to_out.0 attn.proj
  attn.norm_q attn.ln_q
  attn.norm_k attn.ln_k
  attn2.to_q attn2.qkv:q
  attn2.to_k attn2.qkv:k
  attn2.to_v attn2.qkv:v
  attn2.to_out.0 attn2.proj
  attn2.norm_q attn2.ln_q
  attn2.norm_k attn2.ln_k
  norm1.linear adaLN_modulation.1
  ff.net.0.proj mlp.fc1
  ff.net.2 mlp.fc2
transformer_blocks.{} joint_blocks.{}.context_block
  attn.add_q_proj attn.qkv:q
  attn.add_k_proj attn.qkv:k
  attn.add_v_proj attn.qkv:v
  attn.to_add_out attn.proj
  attn.norm_added_q attn.ln_q
  attn.norm_added_k attn.ln_k
  norm1_context.linear adaLN_modulation.1:swap_halves
  ff_context.net.0.proj mlp.fc1
  ff_context.net.2 mlp.fc2
. .
  pos_embed.proj x_embedder.proj
  time_text_embed.timestep_embedder.linear_1 t_embedder.mlp.0
  time_text_embed.timestep_embedder.linear_2 t_embedder.mlp.2
  time_text_embed.text_embedder.linear_1 y_embedder.mlp.0
  time_text_embed.text_embedder.linear_2 y_embedder.mlp.2
"""

_PIXART = """
transformer_blocks.{} blocks.{}
  attn1.to_q attn.qkv:q
  attn1.to_k attn.qkv:k
  attn1.to_v attn.qkv:v
  attn1.to_out.0 attn.proj
  attn2.to_q cross_attn.q_linear
  attn2.to_k cross_attn.kv_linear:first_half
  attn2.to_v cross_attn.kv_linear:second_half
  attn2.to_out.0 cross_attn.proj
  ff.net.0.proj mlp.fc1
  ff.net.2 mlp.fc2
  scale_shift_table scale_shift_table
adaln_single .
  linear t_block.1
  emb.timestep_embedder.linear_1 t_embedder.mlp.0
  emb.timestep_embedder.linear_2 t_embedder.mlp.2
  emb.resolution_embedder.linear_1 csize_embedder.mlp.0
  emb.resolution_embedder.linear_2 csize_embedder.mlp.2
  emb.aspect_ratio_embedder.linear_1 ar_embedder.mlp.0
  emb.aspect_ratio_embedder.linear_2 ar_embedder.mlp.2
. .
  caption_projection.linear_1 y_embedder.y_proj.fc1
  caption_projection.linear_2 y_embedder.y_proj.fc2
  caption_projection.y_embedding y_embedder.y_embedding
  scale_shift_table final_layer.scale_shift_table
"""

_AURAFLOW = """
joint_transformer_blocks.{} double_layers.{}
  attn.to_q attn.w2q
  attn.to_k attn.w2k
  attn.to_v attn.w2v
  attn.to_out.0 attn.w2o
  attn.add_q_proj attn.w1q
  attn.add_k_proj attn.w1k
  attn.add_v_proj attn.w1v
  attn.to_add_out attn.w1o
  norm1.linear modX.1
  norm1_context.linear modC.1
  ff.linear_1 mlpX.c_fc1
  ff.linear_2 mlpX.c_fc2
  ff.out_projection mlpX.c_proj
  ff_context.linear_1 mlpC.c_fc1
  ff_context.linear_2 mlpC.c_fc2
  ff_context.out_projection mlpC.c_proj
single_transformer_blocks.{} single_layers.{}
  attn.to_q attn.w1q
  attn.to_k attn.w1k
  attn.to_v attn.w1v
  attn.to_out.0 attn.w1o
  norm1.linear modCX.1
  ff.linear_1 mlp.c_fc1
  ff.linear_2 mlp.c_fc2
  ff.out_projection mlp.c_proj
. .
  time_step_proj.linear_1 t_embedder.mlp.0
  time_step_proj.linear_2 t_embedder.mlp.2
  context_embedder cond_seq_linear
  pos_embed.pos_embed positional_encoding
  pos_embed.proj init_x_linear
  proj_out final_linear
  norm_out.linear modF.1:swap_halves
"""

_KREA_2 = """
transformer_blocks.{} blocks.{}
  attn.to_q attn.wq
  attn.to_k attn.wk
  attn.to_v attn.wv
  attn.to_gate attn.gate
  attn.to_out.0 attn.wo
  ff.{*} mlp.{*}
text_fusion.{*} txtfusion.{*}
  attn.to_q attn.wq
  attn.to_k attn.wk
  attn.to_v attn.wv
  attn.to_gate attn.gate
  attn.to_out.0 attn.wo
  ff.{*} mlp.{*}
. .
  img_in first
  time_embed.linear_1 tmlp.0
  time_embed.linear_2 tmlp.2
  time_mod_proj tproj.1
  txt_in.linear_1 txtmlp.1
  txt_in.linear_2 txtmlp.3
  text_fusion.projector txtfusion.projector
  final_layer.linear last.linear
"""

_LTX = """
. .
  proj_in patchify_proj
  time_embed.{*} adaln_single.{*}
  {*}.norm_q {*}.q_norm
  {*}.norm_k {*}.k_norm
"""

#: transformers' names of CLIP, and OpenCLIP's own; see `hijack.lora.encoders`.
_OPEN_CLIP = """
te{}.text_model.encoder.layers.{} te{}.transformer.resblocks.{}
  self_attn.q_proj attn.in_proj_weight:q
  self_attn.k_proj attn.in_proj_weight:k
  self_attn.v_proj attn.in_proj_weight:v
  self_attn.out_proj attn.out_proj
  mlp.fc1 mlp.c_fc
  mlp.fc2 mlp.c_proj
  layer_norm1 ln_1
  layer_norm2 ln_2
te{} te{}
  text_model.embeddings.token_embedding token_embedding
  text_model.final_layer_norm ln_final
  text_projection projection:transposed
"""

TABLES = (
    _FLUX,
    _XLABS,
    _HUNYUAN_VIDEO,
    _HUNYUAN_VIDEO_DIFFUSERS,
    _WAN,
    _LUMINA,
    _SD3,
    _PIXART,
    _AURAFLOW,
    _KREA_2,
    _LTX,
    _OPEN_CLIP,
)
