"""LoRAs in one program's names and layers on checkpoints in another's, by structure.

Each model is written down once for each program: its layers, and the projections that
share each layer's rows. A LoRA for one is merged into the other; the dense sum of each
projection, computed here, must be in the rows that it has there.
"""

import itertools

import pytest
import torch
from safetensors.torch import save_file

import hijack
import schemes.blockwise_fp8  # noqa: F401 - registers the scheme
from hijack.errors import CheckpointError
from hijack.lora.files import Loras
from hijack.safetensors_io.reader import read_header
from tests.test_lora_files import near

K, R = 12, 3

#: Rows of projections, where they are not K.
ROWS = {
    "mlp": 30,
    "m1": 30,
    "t1": 30,
    "gate": 20,
    "up": 20,
    "k2": 6,
    "v2": 6,
    "ada": 24,
}

#: Model to program to its layers, each with its projections.
MODELS = {
    "FLUX, HunyuanVideo": {
        "own": """
            double_blocks.0.img_attn.qkv=iq,ik,iv double_blocks.0.img_attn.proj=io
            double_blocks.0.txt_attn.qkv=tq,tk,tv double_blocks.0.txt_attn.proj=to
            double_blocks.0.img_mlp.0=m1 double_blocks.0.txt_mlp.0=t1
            double_blocks.0.img_mod.lin=imod single_blocks.3.modulation.lin=smod
            single_blocks.3.linear1=q,k,v,mlp single_blocks.3.linear2=o""",
        "Tencent's": """
            double_blocks.0.img_attn_qkv=iq,ik,iv double_blocks.0.img_attn_proj=io
            double_blocks.0.txt_attn_qkv=tq,tk,tv double_blocks.0.txt_attn_proj=to
            double_blocks.0.img_mlp.fc1=m1 double_blocks.0.txt_mlp.fc1=t1
            double_blocks.0.img_mod.linear=imod single_blocks.3.modulation.linear=smod
            single_blocks.3.linear1=q,k,v,mlp single_blocks.3.linear2=o""",
        "Tencent's, apart": """
            double_blocks.0.img_attn_q=iq double_blocks.0.img_attn_k=ik
            double_blocks.0.img_attn_v=iv double_blocks.0.img_attn_proj=io
            double_blocks.0.txt_attn_q=tq double_blocks.0.txt_attn_k=tk
            double_blocks.0.txt_attn_v=tv double_blocks.0.txt_attn_proj=to
            double_blocks.0.img_mlp.fc1=m1 double_blocks.0.txt_mlp.fc1=t1
            double_blocks.0.img_mod.linear=imod single_blocks.3.modulation.linear=smod
            single_blocks.3.linear1=q,k,v,mlp single_blocks.3.linear2=o""",
        "diffusers": """
            transformer_blocks.0.attn.to_q=iq transformer_blocks.0.attn.to_k=ik
            transformer_blocks.0.attn.to_v=iv transformer_blocks.0.attn.to_out.0=io
            transformer_blocks.0.attn.add_q_proj=tq
            transformer_blocks.0.attn.add_k_proj=tk
            transformer_blocks.0.attn.add_v_proj=tv
            transformer_blocks.0.attn.to_add_out=to
            transformer_blocks.0.ff.net.0.proj=m1
            transformer_blocks.0.ff_context.net.0.proj=t1
            transformer_blocks.0.norm1.linear=imod
            single_transformer_blocks.3.norm.linear=smod
            single_transformer_blocks.3.attn.to_q=q
            single_transformer_blocks.3.attn.to_k=k
            single_transformer_blocks.3.attn.to_v=v
            single_transformer_blocks.3.proj_mlp=mlp
            single_transformer_blocks.3.proj_out=o""",
        "diffusers, fused": """
            transformer_blocks.0.attn.to_qkv=iq,ik,iv
            transformer_blocks.0.attn.to_out.0=io
            transformer_blocks.0.attn.to_added_qkv=tq,tk,tv
            transformer_blocks.0.attn.to_add_out=to
            transformer_blocks.0.ff.net.0.proj=m1
            transformer_blocks.0.ff_context.net.0.proj=t1
            transformer_blocks.0.norm1.linear=imod
            single_transformer_blocks.3.norm.linear=smod
            single_transformer_blocks.3.attn.to_qkv_mlp_proj=q,k,v,mlp
            single_transformer_blocks.3.attn.to_out=o""",
        "OneTrainer": """
            double_blocks.0.img_attn.qkv.0=iq double_blocks.0.img_attn.qkv.1=ik
            double_blocks.0.img_attn.qkv.2=iv double_blocks.0.img_attn.proj=io
            double_blocks.0.txt_attn.qkv.0=tq double_blocks.0.txt_attn.qkv.1=tk
            double_blocks.0.txt_attn.qkv.2=tv double_blocks.0.txt_attn.proj=to
            double_blocks.0.img_mlp.0=m1 double_blocks.0.txt_mlp.0=t1
            double_blocks.0.img_mod.lin=imod single_blocks.3.modulation.lin=smod
            single_blocks.3.linear1.0=q single_blocks.3.linear1.1=k
            single_blocks.3.linear1.2=v single_blocks.3.linear1.3=mlp
            single_blocks.3.linear2=o""",
        "DiffSynth": """
            blocks.0.attn.a_to_qkv=iq,ik,iv blocks.0.attn.a_to_out=io
            blocks.0.attn.b_to_qkv=tq,tk,tv blocks.0.attn.b_to_out=to
            blocks.0.ff_a.0=m1 blocks.0.ff_b.0=t1 blocks.0.norm1_a.linear=imod
            single_blocks.3.norm.linear=smod single_blocks.3.to_qkv_mlp=q,k,v,mlp
            single_blocks.3.proj_out=o""",
        "XLabs": """
            double_blocks.0.processor.qkv_lora1=iq,ik,iv
            double_blocks.0.processor.proj_lora1=io
            double_blocks.0.processor.qkv_lora2=tq,tk,tv
            double_blocks.0.processor.proj_lora2=to
            double_blocks.0.img_mlp.0=m1 double_blocks.0.txt_mlp.0=t1
            double_blocks.0.img_mod.lin=imod single_blocks.3.modulation.lin=smod
            single_blocks.3.processor.qkv=q,k,v single_blocks.3.processor.proj=o
            single_blocks.3.linear1.3=mlp""",
    },
    "HunyuanVideo, outside the blocks": {
        "own": """
            txt_in.individual_token_refiner.blocks.1.self_attn.qkv=q,k,v
            txt_in.individual_token_refiner.blocks.1.self_attn.proj=o
            txt_in.individual_token_refiner.blocks.1.mlp.0=m1
            txt_in.individual_token_refiner.blocks.1.adaLN_modulation.1=a
            txt_in.input_embedder=t txt_in.t_embedder.in_layer=e1
            txt_in.c_embedder.out_layer=e2 img_in.proj=x time_in.in_layer=e3
            vector_in.out_layer=e4 guidance_in.in_layer=e5 final_layer.linear=f
            final_layer.adaLN_modulation.1=shift,scale""",
        "Tencent's": """
            txt_in.individual_token_refiner.blocks.1.self_attn_qkv=q,k,v
            txt_in.individual_token_refiner.blocks.1.self_attn_proj=o
            txt_in.individual_token_refiner.blocks.1.mlp.fc1=m1
            txt_in.individual_token_refiner.blocks.1.adaLN_modulation.1=a
            txt_in.input_embedder=t txt_in.t_embedder.mlp.0=e1
            txt_in.c_embedder.linear_2=e2 img_in.proj=x time_in.mlp.0=e3
            vector_in.out_layer=e4 guidance_in.mlp.0=e5 final_layer.linear=f
            final_layer.adaLN_modulation.1=shift,scale""",
        "diffusers, FramePack": """
            context_embedder.token_refiner.refiner_blocks.1.attn.to_q=q
            context_embedder.token_refiner.refiner_blocks.1.attn.to_k=k
            context_embedder.token_refiner.refiner_blocks.1.attn.to_v=v
            context_embedder.token_refiner.refiner_blocks.1.attn.to_out.0=o
            context_embedder.token_refiner.refiner_blocks.1.ff.net.0.proj=m1
            context_embedder.token_refiner.refiner_blocks.1.norm_out.linear=a
            context_embedder.proj_in=t
            context_embedder.time_text_embed.timestep_embedder.linear_1=e1
            context_embedder.time_text_embed.text_embedder.linear_2=e2 x_embedder.proj=x
            time_text_embed.timestep_embedder.linear_1=e3
            time_text_embed.text_embedder.linear_2=e4
            time_text_embed.guidance_embedder.linear_1=e5 proj_out=f
            norm_out.linear=scale,shift""",
    },
    "Chroma": {
        "own": """
            distilled_guidance_layer.in_proj=a
            distilled_guidance_layer.layers.1.in_layer=b
            distilled_guidance_layer.layers.1.out_layer=c img_in=x txt_in=t
            single_blocks.0.linear1=q,k,v,mlp final_layer.linear=f""",
        "diffusers": """
            distilled_guidance_layer.in_proj=a
            distilled_guidance_layer.layers.1.linear_1=b
            distilled_guidance_layer.layers.1.linear_2=c x_embedder=x context_embedder=t
            single_transformer_blocks.0.attn.to_q=q
            single_transformer_blocks.0.attn.to_k=k
            single_transformer_blocks.0.attn.to_v=v
            single_transformer_blocks.0.proj_mlp=mlp
            proj_out=f""",
    },
    "Qwen-Image": {
        "own": """
            transformer_blocks.0.attn.to_q=q transformer_blocks.0.attn.to_k=k
            transformer_blocks.0.attn.to_v=v transformer_blocks.0.attn.add_q_proj=tq
            transformer_blocks.0.attn.add_k_proj=tk
            transformer_blocks.0.attn.add_v_proj=tv
            transformer_blocks.0.attn.to_out.0=o transformer_blocks.0.attn.to_add_out=to
            transformer_blocks.0.img_mod.1=imod
            transformer_blocks.0.img_mlp.net.0.proj=m1
            transformer_blocks.0.txt_mlp.net.2=t1 img_in=x proj_out=f""",
        "fused": """
            transformer_blocks.0.attn.to_qkv=q,k,v
            transformer_blocks.0.attn.add_qkv_proj=tq,tk,tv
            transformer_blocks.0.attn.to_out.0=o transformer_blocks.0.attn.to_add_out=to
            transformer_blocks.0.img_mod.1=imod
            transformer_blocks.0.img_mlp.net.0.proj=m1
            transformer_blocks.0.txt_mlp.net.2=t1 img_in=x proj_out=f""",
    },
    "Z-Image, Lumina 2 (fewer keys than queries)": {
        "own": """
            layers.1.attention.qkv=q,k2,v2 layers.1.attention.out=o
            layers.1.feed_forward.w1=gate layers.1.feed_forward.w3=up
            x_embedder=x final_layer.linear=f""",
        "diffusers": """
            layers.1.attention.to_q=q layers.1.attention.to_k=k2
            layers.1.attention.to_v=v2 layers.1.attention.to_out.0=o
            layers.1.feed_forward.w1=gate layers.1.feed_forward.w3=up
            all_x_embedder.2-1=x all_final_layer.2-1.linear=f""",
        "fused": """
            layers.1.attention.to_qkv=q,k2,v2 layers.1.attention.to_out=o
            layers.1.feed_forward.gate_up_proj=gate,up x_embedder=x
            final_layer.linear=f""",
        "in two": """
            layers.1.attention.q=q layers.1.attention.kv=k2,v2 layers.1.attention.o=o
            layers.1.feed_forward.w1=gate layers.1.feed_forward.w3=up
            x_embedder=x final_layer.linear=f""",
    },
    "Krea 2": {
        "own": """
            blocks.0.attn.wq=q blocks.0.attn.wk=k blocks.0.attn.wv=v blocks.0.attn.wo=o
            blocks.0.attn.gate=g blocks.0.mlp.gate=gate blocks.0.mlp.up=up
            txtfusion.refiner_blocks.0.attn.wq=rq txtfusion.refiner_blocks.0.mlp.up=rup
            first=x tmlp.0=e1 tmlp.2=e2 txtmlp.1=t txtmlp.3=t2 last.linear=f""",
        "diffusers": """
            transformer_blocks.0.attn.to_q=q transformer_blocks.0.attn.to_k=k
            transformer_blocks.0.attn.to_v=v transformer_blocks.0.attn.to_out.0=o
            transformer_blocks.0.attn.to_gate=g transformer_blocks.0.ff.gate=gate
            transformer_blocks.0.ff.up=up text_fusion.refiner_blocks.0.attn.to_q=rq
            text_fusion.refiner_blocks.0.ff.up=rup img_in=x time_embed.linear_1=e1
            time_embed.linear_2=e2 txt_in.linear_1=t txt_in.linear_2=t2
            final_layer.linear=f""",
        "fused": """
            transformer_blocks.0.attn.to_qkv=q,k,v transformer_blocks.0.attn.to_out.0=o
            transformer_blocks.0.attn.to_gate=g transformer_blocks.0.ff.gate_up=gate,up
            text_fusion.refiner_blocks.0.attn.to_q=rq
            text_fusion.refiner_blocks.0.ff.up=rup img_in=x time_embed.linear_1=e1
            time_embed.linear_2=e2 txt_in.linear_1=t txt_in.linear_2=t2
            final_layer.linear=f""",
    },
    "Wan": {
        "own": """
            blocks.2.self_attn.q=q blocks.2.self_attn.k=k blocks.2.self_attn.v=v
            blocks.2.self_attn.o=o blocks.2.cross_attn.q=q1 blocks.2.cross_attn.k=k1
            blocks.2.cross_attn.v=v1 blocks.2.cross_attn.k_img=k3
            blocks.2.cross_attn.v_img=v3 blocks.2.ffn.0=m1 blocks.2.ffn.2=m2
            time_embedding.0=e1 time_projection.1=e2 text_embedding.2=e3
            img_emb.proj.1=e4 head.head=f""",
        "diffusers": """
            blocks.2.attn1.to_q=q blocks.2.attn1.to_k=k blocks.2.attn1.to_v=v
            blocks.2.attn1.to_out.0=o blocks.2.attn2.to_q=q1 blocks.2.attn2.to_k=k1
            blocks.2.attn2.to_v=v1 blocks.2.attn2.add_k_proj=k3
            blocks.2.attn2.add_v_proj=v3 blocks.2.ffn.net.0.proj=m1
            blocks.2.ffn.net.2=m2 condition_embedder.time_embedder.linear_1=e1
            condition_embedder.time_proj=e2 condition_embedder.text_embedder.linear_2=e3
            condition_embedder.image_embedder.ff.net.0.proj=e4 proj_out=f""",
        "fused": """
            blocks.2.attn1.to_qkv=q,k,v blocks.2.attn1.to_out.0=o blocks.2.attn2.to_q=q1
            blocks.2.attn2.to_kv=k1,v1 blocks.2.attn2.to_added_kv=k3,v3
            blocks.2.ffn.net.0.proj=m1 blocks.2.ffn.net.2=m2
            condition_embedder.time_embedder.linear_1=e1 condition_embedder.time_proj=e2
            condition_embedder.text_embedder.linear_2=e3
            condition_embedder.image_embedder.ff.net.0.proj=e4 proj_out=f""",
    },
    "SD3": {
        "own": """
            joint_blocks.1.x_block.attn.qkv=q,k,v joint_blocks.1.x_block.attn.proj=o
            joint_blocks.1.x_block.attn2.qkv=q2,k1,v1
            joint_blocks.1.context_block.attn.qkv=tq,tk,tv
            joint_blocks.1.x_block.mlp.fc1=m1 joint_blocks.1.context_block.mlp.fc2=t2
            joint_blocks.1.x_block.adaLN_modulation.1=imod t_embedder.mlp.0=e1
            y_embedder.mlp.2=e2 final_layer.linear=f
            final_layer.adaLN_modulation.1=shift,scale""",
        "diffusers": """
            transformer_blocks.1.attn.to_q=q transformer_blocks.1.attn.to_k=k
            transformer_blocks.1.attn.to_v=v transformer_blocks.1.attn.to_out.0=o
            transformer_blocks.1.attn2.to_q=q2 transformer_blocks.1.attn2.to_k=k1
            transformer_blocks.1.attn2.to_v=v1 transformer_blocks.1.attn.add_q_proj=tq
            transformer_blocks.1.attn.add_k_proj=tk
            transformer_blocks.1.attn.add_v_proj=tv
            transformer_blocks.1.ff.net.0.proj=m1
            transformer_blocks.1.ff_context.net.2=t2
            transformer_blocks.1.norm1.linear=imod
            time_text_embed.timestep_embedder.linear_1=e1
            time_text_embed.text_embedder.linear_2=e2 proj_out=f
            norm_out.linear=scale,shift""",
    },
    "PixArt": {
        "own": """
            blocks.1.attn.qkv=q,k,v blocks.1.attn.proj=o blocks.1.cross_attn.q_linear=q2
            blocks.1.cross_attn.kv_linear=k1,v1 blocks.1.cross_attn.proj=o2
            blocks.1.mlp.fc1=m1 t_block.1=t t_embedder.mlp.0=e1
            y_embedder.y_proj.fc2=e2""",
        "diffusers": """
            transformer_blocks.1.attn1.to_q=q transformer_blocks.1.attn1.to_k=k
            transformer_blocks.1.attn1.to_v=v transformer_blocks.1.attn1.to_out.0=o
            transformer_blocks.1.attn2.to_q=q2 transformer_blocks.1.attn2.to_k=k1
            transformer_blocks.1.attn2.to_v=v1 transformer_blocks.1.attn2.to_out.0=o2
            transformer_blocks.1.ff.net.0.proj=m1 adaln_single.linear=t
            adaln_single.emb.timestep_embedder.linear_1=e1
            caption_projection.linear_2=e2""",
    },
    "Cosmos, Anima": {
        "own": """
            blocks.0.self_attn.q_proj=q blocks.0.self_attn.k_proj=k
            blocks.0.self_attn.v_proj=v blocks.0.self_attn.output_proj=o
            blocks.0.cross_attn.k_proj=k1 blocks.0.mlp.layer1=m1 blocks.0.mlp.layer2=m2
            blocks.0.adaln_modulation_mlp.1=a1 x_embedder.proj.1=x
            final_layer.linear=f""",
        "diffusers": """
            transformer_blocks.0.attn1.to_q=q transformer_blocks.0.attn1.to_k=k
            transformer_blocks.0.attn1.to_v=v transformer_blocks.0.attn1.to_out.0=o
            transformer_blocks.0.attn2.to_k=k1 transformer_blocks.0.ff.net.0.proj=m1
            transformer_blocks.0.ff.net.2=m2 transformer_blocks.0.norm3.linear_1=a1
            patch_embed.proj=x proj_out=f""",
    },
    "AuraFlow": {
        "own": """
            double_layers.0.attn.w2q=q double_layers.0.attn.w1q=tq
            double_layers.0.attn.w1o=to double_layers.0.mlpX.c_fc1=m1
            double_layers.0.mlpX.c_fc2=m2 double_layers.0.mlpX.c_proj=m3
            double_layers.0.mlpC.c_proj=c3 single_layers.0.attn.w1v=v
            single_layers.0.mlp.c_proj=s3 modF.1=shift,scale""",
        "diffusers": """
            joint_transformer_blocks.0.attn.to_q=q
            joint_transformer_blocks.0.attn.add_q_proj=tq
            joint_transformer_blocks.0.attn.to_add_out=to
            joint_transformer_blocks.0.ff.linear_1=m1
            joint_transformer_blocks.0.ff.linear_2=m2
            joint_transformer_blocks.0.ff.out_projection=m3
            joint_transformer_blocks.0.ff_context.out_projection=c3
            single_transformer_blocks.0.attn.to_v=v
            single_transformer_blocks.0.ff.out_projection=s3
            norm_out.linear=scale,shift""",
    },
    "LTX-2": {
        "own": """
            transformer_blocks.0.attn1.to_q=q transformer_blocks.0.audio_attn1.to_k=k
            transformer_blocks.0.audio_to_video_attn.to_out.0=o patchify_proj=x
            audio_patchify_proj=ax adaln_single.emb.timestep_embedder.linear_1=e1
            audio_adaln_single.linear=e2 av_ca_a2v_gate_adaln_single.linear=e3
            av_ca_video_scale_shift_adaln_single.linear=e4 proj_out=f
            video_embeddings_connector.transformer_1d_blocks.0.attn1.to_v=cv""",
        "diffusers": """
            transformer_blocks.0.attn1.to_q=q transformer_blocks.0.audio_attn1.to_k=k
            transformer_blocks.0.audio_to_video_attn.to_out.0=o proj_in=x
            audio_proj_in=ax time_embed.emb.timestep_embedder.linear_1=e1
            audio_time_embed.linear=e2 av_cross_attn_video_a2v_gate.linear=e3
            av_cross_attn_video_scale_shift.linear=e4 proj_out=f
            video_connector.transformer_blocks.0.attn1.to_v=cv""",
        "SimpleTuner": """
            transformer_blocks.0.attn1.to_q=q transformer_blocks.0.audio_attn1.to_k=k
            transformer_blocks.0.audio_to_video_attn.to_out.0=o patchify_proj=x
            audio_patchify_proj=ax time_embed.emb.timestep_embedder.linear_1=e1
            audio_time_embed.linear=e2 av_cross_attn_video_a2v_gate.linear=e3
            av_cross_attn_video_scale_shift.linear=e4 proj_out=f
            connectors.video_connector.transformer_blocks.0.attn1.to_v=cv""",
    },
    "language model": {
        "apart": """
            layers.3.self_attn.q_proj=q layers.3.self_attn.k_proj=k2
            layers.3.self_attn.v_proj=v2 layers.3.self_attn.o_proj=o
            layers.3.mlp.gate_proj=gate layers.3.mlp.up_proj=up
            layers.3.mlp.down_proj=d""",
        "fused": """
            layers.3.self_attn.qkv_proj=q,k2,v2 layers.3.self_attn.o_proj=o
            layers.3.mlp.gate_up_proj=gate,up layers.3.mlp.down_proj=d""",
    },
    "UNet": {
        "own": """
            input_blocks.4.1.transformer_blocks.0.attn1.to_q=q
            input_blocks.4.1.transformer_blocks.0.attn1.to_k=k
            input_blocks.4.1.transformer_blocks.0.attn1.to_v=v
            input_blocks.4.1.transformer_blocks.0.ff.net.0.proj=m1
            input_blocks.4.0.emb_layers.1=e middle_block.1.proj_in=p
            output_blocks.5.1.proj_out=p2 time_embed.0=e1 label_emb.0.2=e2""",
        "diffusers": """
            down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q=q
            down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k=k
            down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_v=v
            down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj=m1
            down_blocks.1.resnets.0.time_emb_proj=e mid_block.attentions.0.proj_in=p
            up_blocks.1.attentions.2.proj_out=p2 time_embedding.linear_1=e1
            add_embedding.linear_2=e2""",
        "fused": """
            down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_qkv=q,k,v
            down_blocks.1.attentions.0.transformer_blocks.0.ff.net.0.proj=m1
            down_blocks.1.resnets.0.time_emb_proj=e mid_block.attentions.0.proj_in=p
            up_blocks.1.attentions.2.proj_out=p2 time_embedding.linear_1=e1
            add_embedding.linear_2=e2""",
    },
}
PAIRS = [
    (model, lora, base)
    for model, programs in MODELS.items()
    for lora, base in itertools.product(programs, repeat=2)
    if base not in ("XLabs", "OneTrainer")
]


@pytest.fixture
def folder(tmp_path):
    """Where files go; random numbers repeat."""
    torch.manual_seed(0)
    return tmp_path


def layout(model, program):
    """Name of each layer to its projections."""
    pairs = (word.split("=") for word in MODELS[model][program].split())
    return {name: parts.split(",") for name, parts in pairs}


def rows_of(parts):
    """Rows of each of some projections."""
    return [ROWS.get(part, K) for part in parts]


def lora_of(layers, spell, style=("lora_down", "lora_up"), adapter="", alpha=None):
    """A LoRA of layers, and the difference of each projection in float64."""
    tensors, deltas = {}, {}
    for name, parts in layers.items():
        down, up = torch.randn(R, K), torch.randn(sum(rows_of(parts)), R)
        key = spell(name)
        tensors[f"{key}.{style[0]}{adapter}.weight"] = down
        tensors[f"{key}.{style[1]}{adapter}.weight"] = up
        if alpha is not None:
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
        whole = (1 if alpha is None else alpha / R) * up.double() @ down.double()
        deltas |= dict(zip(parts, whole.split(rows_of(parts)), strict=True))
    return tensors, deltas


def checkpoint_of(layers, wrap=str):
    """Dense weights of layers."""
    return {
        f"{wrap(name)}.weight": torch.randn(sum(rows_of(parts)), K)
        for name, parts in layers.items()
    }


def check_merged(folder, base, tensors, layers, wrap, deltas):
    """Every weight is the dense sum, and every LoRA found its layer."""
    save_file(base, folder / "base.safetensors")
    save_file(tensors, folder / "lora.safetensors")
    header = read_header(folder / "base.safetensors")
    loras = Loras.open([folder / "lora.safetensors"], header)
    assert loras.unmatched == ()
    for name, parts in layers.items():
        key = f"{wrap(name)}.weight"
        added = torch.cat([deltas[part] for part in parts])
        assert near(loras.merge(key, base[key]), base[key].double() + added), key


def flat(name):
    """A name in kohya's keys."""
    return f"lora_unet_{name.replace('.', '_')}"


@pytest.mark.parametrize(("model", "lora", "base"), PAIRS)
def test_a_lora_of_one_program_fits_another_programs_file(folder, model, lora, base):
    """Fused and split layers, either way, with kohya's names and with dots."""
    ours, theirs = layout(model, base), layout(model, lora)
    weights = checkpoint_of(ours)
    for spell, alpha in ((flat, 1.5), (lambda name: f"diffusion_model.{name}", None)):
        if lora == "XLabs" and spell is flat:
            continue
        tensors, deltas = lora_of(theirs, spell, alpha=alpha)
        check_merged(folder, weights, tensors, ours, str, deltas)


#: What precedes or is within the names of a checkpoint.
WRAPPERS = [
    *(
        f"{prefix}{{}}"
        for prefix in (
            "",
            "_orig_mod.",
            "model.",
            "decoder.",
            "net.",
            "dit.",
            "pipe.dit.",
            "diffusion.model.",
            "diffusion_model.",
            "model.diffusion_model.",
            "module.",
            "module._orig_mod.",
            "_orig_mod.module.",
            "transformer.",
            "unet.",
            "base_model.model.",
            "model._orig_mod.diffusion_model.",
            "_fsdp_wrapped_module.",
            "somebodys.own_trainer.",
        )
    ),
    "middle _orig_mod",
    "middle _checkpoint_wrapped_module",
    "end _orig_mod",
    "end base_layer",
]


def wrapped(wrapper):
    """A function that puts a wrapper into names with dots."""
    place, _, word = wrapper.partition(" ")
    if place == "middle":

        def wrap(name):
            block, number, *rest = name.split(".")
            return ".".join([block, number, word, *rest])

    elif place == "end":

        def wrap(name):
            return f"{name}.{word}"

    else:
        wrap = wrapper.format
    return wrap


KOHYA, PEFT = ("lora_down", "lora_up"), ("lora_A", "lora_B")
#: How programs spell keys: what the name becomes, and the rest of the key.
SPELLINGS = {
    "kohya, musubi-tuner": (flat, KOHYA, "", 1.0),
    "VideoX-Fun": (lambda n: flat(n).replace("unet_", "unet__"), KOHYA, "", 1.0),
    "OneTrainer": (lambda n: f"lora_transformer_{flat(n)[10:]}", KOHYA, "", 1.0),
    "SimpleTuner, LyCORIS": (lambda n: f"lycoris_{flat(n)[10:]}", KOHYA, "", 1.0),
    "ComfyUI": (lambda n: f"diffusion_model.{n}", KOHYA, "", None),
    "ai-toolkit": (lambda n: f"transformer.{n}", PEFT, "", None),
    "PEFT": (lambda n: f"base_model.model.{n}", PEFT, "", None),
    "PEFT, default": (lambda n: f"base_model.model.{n}", PEFT, ".default", None),
    "DiffSynth": (lambda n: n, PEFT, ".default", None),
    "DiffSynth, pipe": (lambda n: f"pipe.dit.{n}", PEFT, ".default", None),
    "several adapters": (lambda n: f"transformer.{n}", PEFT, ".default_0", None),
    "a name of one's own": (lambda n: n, PEFT, ".my-style", None),
    "older diffusers": (lambda n: f"unet.{n}", ("lora.down", "lora.up"), "", None),
    "diffusers, linear": (
        lambda n: f"transformer.{n}",
        ("lora_linear_layer.down", "lora_linear_layer.up"),
        "",
        None,
    ),
    "torch.compile": (lambda n: f"_orig_mod.{n}", PEFT, "", None),
    "compiled, PEFT": (lambda n: f"base_model.model._orig_mod.{n}", PEFT, "", 2.0),
    "compiled blocks": (
        lambda n: n.replace(".self_attn", "._orig_mod.self_attn"),
        PEFT,
        "",
        None,
    ),
    "compiled blocks, kohya": (
        lambda n: flat(n.replace(".self_attn", "._orig_mod.self_attn")),
        KOHYA,
        "",
        1.0,
    ),
    "compiled, kohya": (lambda n: flat(f"_orig_mod.{n}"), KOHYA, "", 1.0),
    "Tencent": (lambda n: f"HV_lora_{flat(n)[10:]}", KOHYA, "", 1.0),
    "SimpleTuner, once": (lambda n: f"{flat(n)}_", KOHYA, "", 1.0),
    "diffusers, PEFT": (lambda n: f"transformer.base_model.model.{n}", PEFT, "", None),
    "DDP": (lambda n: f"module.{n}", PEFT, "", None),
    "NVIDIA": (lambda n: f"net.{n}", PEFT, "", None),
    "whole checkpoint": (lambda n: f"model.diffusion_model.{n}", PEFT, "", None),
    "nobody knows": (lambda n: f"somebodys.own_model.{n}", PEFT, "", None),
}
FUSED = {
    "blocks.2.self_attn.qkv": ["q", "k2", "v2"],
    "blocks.2.mlp.gate_up_proj": ["gate", "up"],
}
SPLIT = {
    "blocks.2.self_attn.q_proj": ["q"],
    "blocks.2.self_attn.k_proj": ["k2"],
    "blocks.2.self_attn.v_proj": ["v2"],
    "blocks.2.mlp.gate_proj": ["gate"],
    "blocks.2.mlp.up_proj": ["up"],
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("style", SPELLINGS)
def test_every_spelling_on_every_wrapper(folder, style, wrapper):
    """Whole, fused onto split, and split onto fused."""
    spell, halves, adapter, alpha = SPELLINGS[style]
    wrap = wrapped(wrapper)
    for theirs, ours in itertools.product((FUSED, SPLIT), repeat=2):
        tensors, deltas = lora_of(theirs, spell, halves, adapter, alpha)
        check_merged(folder, checkpoint_of(ours, wrap), tensors, ours, wrap, deltas)


# -- kinds -----------------------------------------------------------------------------

QKV = "transformer_blocks.0.attn.to_qkv"
APART = [f"blocks.0.attn.{part}" for part in ("wq", "wk", "wv")]
SIZES = [12, 6, 6]
N = sum(SIZES)


def separate(folder, tensors, biased=False, strength=1.0):
    """Merge a LoRA of one fused layer into three; returns before and after, fused."""
    base = {
        f"{name}.weight": torch.randn(n, K)
        for name, n in zip(APART, SIZES, strict=True)
    }
    if biased:
        base |= {
            f"{name}.bias": torch.randn(n) for name, n in zip(APART, SIZES, strict=True)
        }
    save_file(base, folder / "base.safetensors")
    save_file(tensors, folder / "lora.safetensors")
    header = read_header(folder / "base.safetensors")
    loras = Loras.open([(folder / "lora.safetensors", strength)], header)
    fused = []
    for leaf in ("weight", "bias") if biased else ("weight",):
        keys = [f"{name}.{leaf}" for name in APART]
        fused.append(torch.cat([base[key] for key in keys]).double())
        fused.append(torch.cat([loras.merge(key, base[key]) for key in keys]))
    return fused


def test_factors_that_are_no_rows_are_split_as_their_product(folder):
    """LoHa, LoKr and plain differences, with alpha and a strength."""
    halves = {f"hada_w{i}_a": torch.randn(N, R) for i in (1, 2)}
    halves |= {f"hada_w{i}_b": torch.randn(R, K) for i in (1, 2)}
    first = halves["hada_w1_a"].double() @ halves["hada_w1_b"].double()
    second = halves["hada_w2_a"].double() @ halves["hada_w2_b"].double()
    blocks = {"lokr_w1": torch.randn(8, 3), "lokr_w2_a": torch.randn(3, R)}
    blocks["lokr_w2_b"] = torch.randn(R, 4)
    inner = blocks["lokr_w2_a"].double() @ blocks["lokr_w2_b"].double()
    whole = torch.randn(N, K)
    for parts, added in (
        (halves, 2 / R * first * second),
        (blocks, 2 / R * torch.kron(blocks["lokr_w1"].double(), inner)),
        ({"diff": whole}, whole.double()),
    ):
        tensors = {f"{QKV}.{part}": tensor for part, tensor in parts.items()}
        if "diff" not in parts:
            tensors[f"{QKV}.alpha"] = torch.tensor(2.0)
        before, after = separate(folder, tensors, strength=0.5)
        assert near(after, before + 0.5 * added)


@pytest.mark.parametrize("sizes", [SIZES, [9, 9, 6]])
def test_each_piece_of_a_fused_layer_may_have_a_lora_of_its_own(folder, sizes):
    """kohya's trainers number the pairs; their alpha is of all of them."""
    tensors, products = {f"{QKV}.alpha": torch.tensor(2.0)}, []
    for i, n in enumerate(sizes):
        down, up = torch.randn(R, K), torch.randn(n, R)
        tensors |= {
            f"{QKV}.lora_down.{i}.weight": down,
            f"{QKV}.lora_up.{i}.weight": up,
        }
        products.append(up.double() @ down.double())
    before, after = separate(folder, tensors, strength=0.5)
    assert near(after, before + 0.5 * 2 / R * torch.cat(products))
    del tensors[f"{QKV}.lora_up.1.weight"]
    with pytest.raises(CheckpointError, match="this is not a LoRA"):
        separate(folder, tensors)
    tensors[f"{QKV}.lora_up.1.weight"] = torch.randn(sizes[1], 2)
    tensors[f"{QKV}.lora_down.1.weight"] = torch.randn(2, K)
    with pytest.raises(CheckpointError, match="do not fit each other"):
        separate(folder, tensors)


def test_values_may_be_wider_than_keys(folder):
    """Qwen 3.5's linear attention; where nothing tells, nothing is guessed."""
    stem = "model.language_model.layers.0.linear_attn.in_proj"
    base = {f"{stem}_qkv.weight": torch.randn(24, K)}
    apart = {f"layers.0.linear_attn.in_proj_{p}": [p] for p in "qkv"}
    tensors, products = {}, []
    for name, n in zip(apart, (6, 6, 12), strict=True):
        down, up = torch.randn(R, K), torch.randn(n, R)
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up
        products.append(up.double() @ down.double())
    save_file(base, folder / "base.safetensors")
    save_file(tensors, folder / "lora.safetensors")
    header = read_header(folder / "base.safetensors")
    loras = Loras.open([folder / "lora.safetensors"], header)
    ((key, weight),) = base.items()
    assert near(loras.merge(key, weight), weight.double() + torch.cat(products))
    tensors = plain("layers.0.linear_attn.in_proj_k", 6)
    refused(
        folder, {f"{stem}_qkv": (24, K)}, tensors, "the shapes do not tell how many"
    )


def test_biases_are_split_with_their_weights(folder):
    """A difference of the bias, and PEFT's bias of the upper half."""
    tensors, deltas = lora_of({QKV: ["q", "k2", "v2"]}, str, PEFT, "", 1.5)
    tensors[f"{QKV}.lora_B.bias"] = torch.randn(N)
    before, after, bias, biased = separate(folder, tensors, biased=True)
    assert near(after, before + torch.cat(list(deltas.values())))
    assert near(biased, bias + 1.5 / R * tensors[f"{QKV}.lora_B.bias"])
    before, after, bias, biased = separate(
        folder, {f"{QKV}.diff_b": torch.arange(1.0, N + 1)}, biased=True
    )
    assert torch.equal(after.double(), before)
    assert near(biased, bias + torch.arange(1.0, N + 1))


@pytest.mark.parametrize(
    ("part", "shape"),
    [("dora_scale", (N, 1)), ("lora_magnitude_vector.default.weight", (N,))],
)
def test_lengths_of_rows_are_split_with_the_rows(folder, part, shape):
    """LyCORIS' and PEFT's magnitudes of DoRA."""
    tensors, deltas = lora_of({QKV: ["q", "k2", "v2"]}, str, alpha=1.5)
    lengths = torch.rand(shape) + 0.5
    tensors[f"{QKV}.{part}"] = lengths
    before, after = separate(folder, tensors, strength=0.5)
    whole = before + torch.cat(list(deltas.values()))
    whole *= lengths.double().view(N, 1) / whole.norm(dim=1, keepdim=True)
    assert near(after, before + 0.5 * (whole - before))


def test_lengths_of_columns_that_layers_share_are_refused(folder):
    """Each length is of a whole column, which no layer of the checkpoint has."""
    tensors, _ = lora_of({QKV: ["q", "k2", "v2"]}, str)
    tensors[f"{QKV}.dora_scale"] = torch.rand(1, K)
    with pytest.raises(
        CheckpointError, match=r"magnitudes \[1, 12\] of columns, which"
    ):
        separate(folder, tensors)


def test_wans_modulation_is_no_layer(folder):
    """lightx2v's diff_m is the difference of a parameter, in any wrapper."""
    base = {"_orig_mod.blocks.0.modulation": torch.randn(1, 6, K)}
    added = torch.randn(1, 6, K)
    for name in ("diffusion_model.blocks.0", "lora_unet_blocks_0", "pipe.dit.blocks.0"):
        save_file(base, folder / "base.safetensors")
        save_file({f"{name}.diff_m": added}, folder / "lora.safetensors")
        header = read_header(folder / "base.safetensors")
        ((key, tensor),) = base.items()
        loras = Loras.open([folder / "lora.safetensors"], header)
        assert near(loras.merge(key, tensor), tensor.double() + added)


# -- what is refused -------------------------------------------------------------------


def refused(folder, base, tensors, match, **options):
    """The shapes of a checkpoint and a LoRA that do not go together."""
    base = {f"{name}.weight": torch.ones(shape) for name, shape in base.items()}
    save_file(base, folder / "base.safetensors")
    save_file(tensors, folder / "lora.safetensors")
    header = read_header(folder / "base.safetensors")
    with pytest.raises(CheckpointError, match=match) as caught:
        Loras.open([folder / "lora.safetensors"], header, **options)
    assert str(folder / "lora.safetensors") in str(caught.value)


def plain(name, n, k=K):
    """A LoRA of one layer."""
    return {
        f"{name}.lora_A.weight": torch.ones(R, k),
        f"{name}.lora_B.weight": torch.ones(n, R),
    }


def test_an_order_of_rows_that_programs_disagree_on_is_refused(folder):
    """By heads or one after the other; but the same layer needs no order."""
    apart = {f"h.0.attn.{part}": (K, K) for part in ("q_proj", "k_proj", "v_proj")}
    message = "wqkv: is divided in another way .* differ in the order of such rows"
    refused(folder, apart, plain("h.0.attn.wqkv", 3 * K), message)
    message = "q_proj: is divided in another way .* differ in the order of such rows"
    refused(
        folder,
        {"h.0.attn.query_key_value": (3 * K, K)},
        plain("h.0.attn.q_proj", K),
        message,
    )
    by_heads = {
        "model.layers.0.self_attn.qkv_proj": (3 * K, K),
        "model.layers.0.self_attn.query_layernorm": (4,),
    }
    message = "q_proj: is divided in another way than model.layers.0.self_attn.qkv_proj"
    refused(folder, by_heads, plain("layers.0.self_attn.q_proj", K), message)
    apart = {f"h.0.feed_forward.{part}": (K, K) for part in ("w1", "w2", "w3")}
    message = "w13: is divided in another way than h.0.feed_forward.w1, h.0.feed_"
    refused(folder, apart, plain("h.0.feed_forward.w13", 2 * K), message)
    save_file(
        {"h.0.attn.wqkv.weight": torch.ones(3 * K, K)}, folder / "base.safetensors"
    )
    save_file(plain("h.0.attn.wqkv", 3 * K), folder / "lora.safetensors")
    header = read_header(folder / "base.safetensors")
    loras = Loras.open([folder / "lora.safetensors"], header)
    assert loras.keys == {"h.0.attn.wqkv.weight"}


def test_rows_that_do_not_add_up_are_refused(folder):
    """The message has both shapes."""
    apart = {f"h.0.attn.{part}": (K, K) for part in ("to_q", "to_k", "to_v")}
    message = r"to_qkv: is \[35, 12\], q and k and v, which does not fit h.0.attn.to_q"
    refused(folder, apart, plain("h.0.attn.to_qkv", 35), message)
    apart["h.0.attn.to_v"] = (K, 8)
    refused(
        folder, apart, plain("h.0.attn.to_qkv", 3 * K), "to_qkv: is .* does not fit"
    )


@pytest.mark.parametrize("rows", [40, 36, 11])
def test_rows_that_shapes_do_not_tell_are_refused(folder, rows):
    """More rows than there are, none left for the others, and a half of a row."""
    message = (
        r"to_q: is q of h.0.attn.qkv \[36, 12\], of q, k, v, and the shapes do not tell"
    )
    base = {"h.0.attn.qkv": (3 * K, K)}
    refused(folder, base, plain("h.0.attn.to_q", rows), message)
    refused(folder, base, {"h.0.attn.to_q.diff_b": torch.ones(rows)}, message)


def test_one_of_two_layers_is_refused(folder):
    """Both are named; two networks in one file have layers of the same names."""
    base = {"model.blocks.0.q": (K, K), "net.blocks.0.q": (K, K)}
    message = (
        "blocks.0.q: may be one of two layers of the checkpoint, model.blocks.0.q or "
        "net.blocks.0.q; expected names that differ"
    )
    refused(folder, base, plain("blocks.0.q", K), message)
    refused(folder, base, plain("lora_unet_blocks_0_q", K), "may be one of two layers")
    save_file(
        {f"{k}.weight": torch.ones(K, K) for k in base}, folder / "base.safetensors"
    )
    save_file(plain("net.blocks.0.q", K), folder / "lora.safetensors")
    header = read_header(folder / "base.safetensors")
    loras = Loras.open([folder / "lora.safetensors"], header)
    assert loras.keys == {"net.blocks.0.q.weight"}


@pytest.mark.parametrize("role", ["student", "teacher", "ema", "generator"])
def test_a_network_in_a_role_is_alone_or_not_meant(folder, role):
    """A distilled model's file may hold its teacher; a bare name is of neither."""
    base = {f"{role}.blocks.0.q.weight": torch.ones(K, K)}
    save_file(base, folder / "base.safetensors")
    save_file(plain("blocks.0.q", K), folder / "lora.safetensors")
    header = read_header(folder / "base.safetensors")
    loras = Loras.open([folder / "lora.safetensors"], header)
    assert loras.keys == base.keys()
    both = {f"{role}.blocks.0.q": (K, K), "critic.blocks.0.q": (K, K)}
    refused(folder, both, plain("blocks.0.q", K), "none of its 1 names")


def test_the_same_rows_twice_are_refused(folder):
    """Fused and split names for one projection in one file."""
    base = {"double_blocks.0.img_attn.qkv": (3 * K, K)}
    tensors = plain("double_blocks.0.img_attn.qkv", 3 * K)
    tensors |= plain("transformer.transformer_blocks.0.attn.to_k", K)
    refused(folder, base, tensors, "targets double_blocks.0.img_attn.qkv.weight, as ")


def test_two_adapters_in_one_file_are_refused(folder):
    """Which of them is meant, the file does not say."""
    tensors = plain("a", K)
    tensors["a.lora_A.other.weight"] = tensors["a.lora_A.weight"].clone()
    refused(
        folder, {"a": (K, K)}, tensors, r"is the same part as a\.lora_A\.(weight|ot)"
    )


@pytest.mark.parametrize(
    "tensors",
    [
        {"a.lora_down.weight": torch.ones(0, K), "a.lora_up.weight": torch.ones(K, 0)},
        {
            "a.hada_w1_a": torch.ones(K, 0),
            "a.hada_w1_b": torch.ones(0, K),
            "a.hada_w2_a": torch.ones(K, 0),
            "a.hada_w2_b": torch.ones(0, K),
        },
        {
            "a.lokr_w1": torch.ones(2, 2),
            "a.lokr_w2_a": torch.ones(6, 0),
            "a.lokr_w2_b": torch.ones(0, 6),
        },
    ],
)
def test_a_rank_of_zero_is_refused(folder, tensors):
    """It says nothing about the layer, whatever its alpha is."""
    tensors = {**tensors, "a.alpha": torch.tensor(1.0)}
    refused(folder, {"a": (K, K)}, tensors, r"lora.safetensors: a: .* of rank 0")


def test_a_refused_lora_writes_nothing(folder):
    """Before anything is written, all LoRAs are found good."""
    source, lora = folder / "base.safetensors", folder / "lora.safetensors"
    save_file({"a.weight": torch.ones(K, K), "b.weight": torch.ones(K, K)}, source)
    empty = {"b.lora_A.weight": torch.ones(0, K), "b.lora_B.weight": torch.ones(K, 0)}
    save_file(plain("a", K) | empty, lora)
    with pytest.raises(CheckpointError, match="of rank 0"):
        hijack.quantize_file(source, folder / "q.safetensors", loras=lora)
    assert sorted(folder.iterdir()) == sorted([source, lora])


def test_what_would_be_left_unchanged_is_told(folder):
    """By what the layers do, with the name of each kind, and no advice to drop them."""
    tensors = plain("blocks.0.ffn.0", K)
    for i in range(3):
        for leaf in ("img_attn.qkv", "img_attn.proj", "img_mlp.2", "img_mod.lin"):
            tensors |= plain(f"lora_unet_double_blocks_{i}_{leaf.replace('.', '_')}", K)
    tensors |= plain("lora_te_text_model_encoder_layers_0_mlp_fc1", K)
    message = (
        r"has no layer for lora_unet_double_blocks_0_.*, \.\.\. \(13 of 14\), 1 of "
        r"them of text encoders; 6 layers of attention \(img_attn_\w+, img_attn_\w+\),"
        r" 3 layers of (feed-forward \(img_mlp_2\)|modulation \(img_mod_lin\)), .* "
        r"would be left unchanged, .*\(--ignore-unmatched\) merges the others alone "
        r"and loses these"
    )
    refused(folder, {"blocks.0.ffn.0": (K, K)}, tensors, message)


def test_a_text_encoders_own_file_has_no_diffusion_model(folder):
    """What else the LoRA has belongs into another file."""
    base = {"model.layers.0.mlp.up_proj": (K, K), "model.embed_tokens": (K, K)}
    tensors = plain("lora_te_layers_0_mlp_up_proj", K) | plain("lora_unet_a_0_b", K)
    message = (
        r"lora_unet_a_0_b \(1 of 2\) are of a diffusion model, of which .* has no such "
        r"layers; .* merge the LoRA into the diffusion model's own file, too"
    )
    refused(folder, base, tensors, message)


def test_hostile_names_take_no_time(folder):
    """Thousands of wrappers, of spellings of one layer, and of underscores."""
    base = {f"{'model.' * 3000}a.0.q": (K, K), f"{'_' * 3000}": (K, K)}
    base |= {f"{'net.' * i}a.0.to_q": (K, K) for i in range(300)}
    base |= {f"{'unet_' * 3000}b.0.v": (K, K), f"{'x_' * 3000}lora": (K, K)}
    tensors = plain("a.0.qkv", 3 * K) | plain(f"{'lora_' * 3000}c", K)
    refused(folder, base, tensors, "none of its 2 names")


GROUPINGS = ["qkv", "q kv", "qk v", "q k v"]


@pytest.mark.parametrize("theirs", GROUPINGS)
@pytest.mark.parametrize("ours", GROUPINGS)
def test_every_division_of_attention_on_every_other(folder, theirs, ours):
    """All projections or some of them, equal or not: merged exactly, or refused."""
    merged, refusals = 0, []
    for sizes in ({"q": 12, "k": 6, "v": 6}, {"q": 8, "k": 8, "v": 8}):
        base = {
            f"blocks.0.attn.to_{group}.weight": torch.randn(
                sum(sizes[part] for part in group), K
            )
            for group in ours.split()
        }
        groups = theirs.split()
        for count in range(1, len(groups) + 1):
            for trained in itertools.combinations(groups, count):
                tensors, deltas = (
                    {},
                    {part: torch.zeros(n, K) for part, n in sizes.items()},
                )
                for group in trained:
                    rows = [sizes[part] for part in group]
                    down, up = torch.randn(R, K), torch.randn(sum(rows), R)
                    tensors[f"blocks.0.attn.{group}.lora_down.weight"] = down
                    tensors[f"blocks.0.attn.{group}.lora_up.weight"] = up
                    product = (up.double() @ down.double()).split(rows)
                    deltas |= dict(zip(group, product, strict=True))
                save_file(base, folder / "base.safetensors")
                save_file(tensors, folder / "lora.safetensors")
                header = read_header(folder / "base.safetensors")
                try:
                    loras = Loras.open([folder / "lora.safetensors"], header)
                except CheckpointError as error:
                    refusals.append((str(error), len(trained) < len(groups)))
                    continue
                merged += 1
                for key, weight in base.items():
                    group = key.split(".")[3].removeprefix("to_")
                    added = torch.cat([deltas[part] for part in group])
                    assert near(loras.merge(key, weight), weight.double() + added)
    assert merged >= 2  # with all projections, where the sizes are told by the sums
    for message, partly in refusals:
        assert "the shapes do not tell" in message
        assert partly
