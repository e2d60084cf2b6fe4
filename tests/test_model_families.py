"""Families of models told by their keys, and what is usually quantized of each."""

import fnmatch
import re

import pytest
from torch import nn

from hijack.model_families import detect_family, model_families
from hijack.safetensors_io.header import Header, TensorInfo
from hijack.selection import choose

PREFIXES = ("", "model.diffusion_model.", "diffusion_model.", "transformer.")

#: Family: words of musubi-tuner's lists (targets, exclusions), or None where it has
#: none, and names of layers as released files have them, with the parameters of none.
FAMILIES = {
    "Qwen-Image": (
        ("transformer_blocks", "norm time_text_embed"),
        "img_in txt_in txt_norm proj_out norm_out.linear "
        "time_text_embed.timestep_embedder.linear_1 transformer_blocks.0.img_mod.1 "
        "transformer_blocks.0.txt_mod.1 transformer_blocks.0.attn.to_q "
        "transformer_blocks.0.attn.to_out.0 transformer_blocks.0.attn.norm_q "
        "transformer_blocks.0.attn.add_q_proj transformer_blocks.0.txt_mlp.net.2",
    ),
    "FLUX.1": (
        ("single_blocks double_blocks", "norm mod"),
        "img_in txt_in time_in.in_layer vector_in.in_layer guidance_in.out_layer "
        "double_blocks.0.img_mod.lin double_blocks.0.img_attn.qkv "
        "double_blocks.0.img_attn.proj double_blocks.0.txt_mlp.0 "
        "single_blocks.0.linear1 single_blocks.0.linear2 "
        "single_blocks.0.modulation.lin final_layer.linear "
        "final_layer.adaLN_modulation.1 double_blocks.0.img_attn.norm.query_norm.scale",
    ),
    "FLUX.2": (
        ("double_blocks single_blocks", "norm pe_embedder time_in _modulation"),
        "img_in txt_in time_in.in_layer guidance_in.in_layer final_layer.linear "
        "double_stream_modulation_img.lin single_stream_modulation.lin "
        "double_blocks.0.img_attn.qkv double_blocks.0.txt_mlp.2 "
        "single_blocks.0.linear1 single_blocks.0.linear2",
    ),
    "Wan": (
        (
            "blocks",
            "norm patch_embedding text_embedding time_embedding time_projection head "
            "modulation img_emb",
        ),
        "patch_embedding text_embedding.0 time_embedding.2 time_projection.1 head.head "
        "head.modulation img_emb.proj.1 blocks.0.self_attn.q blocks.0.self_attn.o "
        "blocks.0.self_attn.norm_q blocks.0.cross_attn.k blocks.0.cross_attn.k_img "
        "blocks.0.ffn.0 blocks.0.ffn.2 blocks.0.norm3 blocks.0.modulation "
        "vace_blocks.0.before_proj",
    ),
    "HunyuanVideo 1.5": (
        ("double_blocks", "norm _emb"),
        "img_in.proj txt_in.input_embedder txt_in.t_embedder.mlp.0 vision_in.proj.1 "
        "txt_in.individual_token_refiner.blocks.0.norm1 cond_type_embedding "
        "txt_in.individual_token_refiner.blocks.0.self_attn_qkv time_in.mlp.0 "
        "double_blocks.0.img_mod.linear double_blocks.0.img_attn_q "
        "double_blocks.0.img_attn_q_norm double_blocks.0.txt_mlp.fc1 byt5_in.fc1",
    ),
    "HunyuanVideo": (
        None,
        "img_in.proj txt_in.input_embedder time_in.mlp.0 vector_in.in_layer "
        "txt_in.individual_token_refiner.blocks.0.norm1 final_layer.linear "
        "double_blocks.0.img_attn_qkv single_blocks.0.linear1 "
        "single_blocks.0.modulation.linear",
    ),
    "FramePack": (
        ("transformer_blocks single_transformer_blocks", "norm"),
        "x_embedder.proj clean_x_embedder.proj clean_x_embedder.proj_2x "
        "image_projection.up context_embedder.proj_in proj_out norm_out.linear "
        "context_embedder.token_refiner.refiner_blocks.0.attn.to_q "
        "transformer_blocks.0.attn.to_q transformer_blocks.0.ff.net.2 "
        "transformer_blocks.0.norm1.linear single_transformer_blocks.0.proj_mlp "
        "single_transformer_blocks.0.norm.linear single_transformer_blocks.0.proj_out",
    ),
    "Z-Image": (
        ("layers. noise_refiner. context_refiner.", "_modulation .norm_ _norm"),
        "all_x_embedder.2-1 cap_embedder.0 cap_embedder.1 cap_pad_token x_pad_token "
        "t_embedder.mlp.0 layers.0.attention.to_q layers.0.attention.to_out.0 "
        "layers.0.attention.norm_q layers.0.attention_norm1 layers.0.feed_forward.w1 "
        "layers.0.adaLN_modulation.0 noise_refiner.0.feed_forward.w1 "
        "context_refiner.0.feed_forward.w2 all_final_layer.2-1.linear",
    ),
    "Lumina 2": (
        None,
        "x_embedder cap_embedder.0 cap_embedder.1 layers.0.attention.qkv "
        "layers.0.adaLN_modulation.1 noise_refiner.0.feed_forward.w1",
    ),
    "Krea 2": (
        ("blocks.", "mod. norm txtfusion"),
        "first blocks.0.attn.wq blocks.0.attn.gate blocks.0.mlp.down blocks.0.mod.lin "
        "blocks.0.prenorm.scale txtfusion.projector txtfusion.refiner_blocks.0.attn.wq "
        "tmlp.0 tproj.1 last.linear last.modulation.lin",
    ),
    "Kandinsky 5": (
        ("visual_transformer_blocks text_transformer_blocks out_layer", "norm"),
        "time_embeddings.in_layer time_embeddings.out_layer text_embeddings.in_layer "
        "visual_transformer_blocks.0.cross_attention.key_norm "
        "visual_transformer_blocks.0.cross_attention.to_query "
        "visual_transformer_blocks.0.visual_modulation.out_layer "
        "text_transformer_blocks.0.feed_forward.in_layer out_layer.out_layer",
    ),
    "Ideogram 4": (
        ("layers.", "norm adaln"),
        "input_proj llm_cond_proj embed_image_indicator adaln_proj t_embedding.mlp_in "
        "layers.0.attention.qkv layers.0.attention.norm_q layers.0.feed_forward.w1 "
        "layers.0.adaln_modulation final_layer.linear",
    ),
    "HiDream-O1": (
        (
            "language_model.layers visual.blocks visual.merger "
            "visual.deepstack_merger_list t_embedder1 x_embedder final_layer2",
            "norm rotary pos_embed embed_tokens lm_head",
        ),
        "language_model.layers.0.self_attn.q_proj language_model.embed_tokens "
        "language_model.layers.0.input_layernorm visual.blocks.0.attn.qkv "
        "visual.pos_embed visual.merger.linear_fc1 t_embedder1.mlp.0 x_embedder.proj1 "
        "final_layer2.linear",
    ),
    "Chroma": (
        None,
        "img_in distilled_guidance_layer.in_proj double_blocks.0.img_attn.qkv "
        "single_blocks.0.linear1 final_layer.linear",
    ),
    "LTX-Video": (
        None,
        "patchify_proj adaln_single.linear transformer_blocks.0.attn1.to_q "
        "transformer_blocks.0.attn1.q_norm proj_out",
    ),
    "Stable Diffusion 3": (
        None,
        "x_embedder.proj joint_blocks.0.context_block.attn.qkv "
        "joint_blocks.0.x_block.adaLN_modulation.1 final_layer.linear",
    ),
    "Stable Diffusion, SDXL": (
        None,
        "time_embed.0 label_emb.0.0 input_blocks.0.0 input_blocks.4.1.proj_in "
        "input_blocks.4.0.emb_layers.1 middle_block.0.in_layers.2 "
        "output_blocks.0.1.transformer_blocks.0.attn1.to_q out.2",
    ),
    "decoder-only language model": (
        None,
        "embed_tokens layers.0.self_attn.q_proj layers.0.self_attn.o_proj "
        "layers.0.mlp.gate layers.0.mlp.gate_proj layers.0.input_layernorm norm "
        "lm_head",
    ),
}
#: Layers that are quantized, and that stay dense, where musubi-tuner has no list.
USUAL = {
    "HunyuanVideo": (
        "double_blocks.0.img_attn_qkv single_blocks.0.linear1",
        "img_in.proj single_blocks.0.modulation.linear final_layer.linear",
    ),
    "Chroma": (
        "double_blocks.0.img_attn.qkv single_blocks.0.linear1",
        "img_in distilled_guidance_layer.in_proj final_layer.linear",
    ),
    "Lumina 2": ("layers.0.attention.qkv", "x_embedder layers.0.adaLN_modulation.1"),
    "LTX-Video": ("transformer_blocks.0.attn1.to_q", "patchify_proj proj_out"),
    "Stable Diffusion 3": (
        "joint_blocks.0.context_block.attn.qkv",
        "x_embedder.proj joint_blocks.0.x_block.adaLN_modulation.1",
    ),
    "Stable Diffusion, SDXL": (
        "input_blocks.4.1.proj_in output_blocks.0.1.transformer_blocks.0.attn1.to_q",
        "time_embed.0 label_emb.0.0 input_blocks.4.0.emb_layers.1 out.2",
    ),
    "decoder-only language model": (
        "layers.0.self_attn.q_proj layers.0.mlp.gate_proj",
        "embed_tokens layers.0.mlp.gate norm lm_head layers.0.input_layernorm",
    ),
}
#: What is a tensor of its own, not the weight of a layer.
LONE = ("modulation", "_token", ".scale", "blocks.0.mod.lin")


def header_of(names, prefix=""):
    """A header with these layers, and parameters of none."""
    keys = []
    for name in names.split():
        keys.append(prefix + name + ("" if name.endswith(LONE) else ".weight"))
    return Header({key: TensorInfo("BF16", (64, 64)) for key in keys})


def selected(header, known):
    """Layers that the patterns of a family choose."""
    return {
        layer
        for layer in header.layers()
        if any(fnmatch.fnmatchcase(layer, pattern) for pattern in known.include)
        and not any(fnmatch.fnmatchcase(layer, pattern) for pattern in known.exclude)
    }


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_is_told_by_its_keys(name, prefix):
    """With and without the usual prefixes, whatever else is in the file."""
    header = header_of(FAMILIES[name][1], prefix)
    assert detect_family(header.tensors).name == name
    others = header_of("decoder.up.0.conv mid.proj", "first_stage_model.")
    together = Header({**others.tensors, **header.tensors})
    assert detect_family(together.tensors).name == name


WRAPPED = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "compiled in a checkpoint": lambda name: f"model._orig_mod.diffusion_model.{name}",
    "compiled and distributed": lambda name: f"module._orig_mod.{name}",
    "compiled blocks": lambda name: re.sub(r"\.0\.", ".0._orig_mod.", name, count=1),
    "sharded blocks": lambda name: re.sub(
        r"\.0\.", ".0._fsdp_wrapped_module._checkpoint_wrapped_module.", name, count=1
    ),
    "DDP": lambda name: f"module.{name}",
    "NVIDIA": lambda name: f"net.{name}",
    "DiffSynth": lambda name: f"pipe.dit.{name}",
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED)
@pytest.mark.parametrize("name", FAMILIES)
def test_wrappers_change_neither_family_nor_layers(name, wrap):
    """The same layers are quantized as of the plain file, although "mod" is a word."""
    plain = header_of(FAMILIES[name][1])
    tensors = {wrap(key): info for key, info in plain.tensors.items()}
    usual = choose(plain, (nn.Linear,))
    chosen = choose(Header(tensors), (nn.Linear,))
    assert chosen.family.name == usual.family.name == name
    assert set(chosen.layers) == {
        wrap(f"{layer}.weight").removesuffix(".weight") for layer in usual.layers
    }


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", [n for n, (lists, _) in FAMILIES.items() if lists])
def test_musubi_tuner_would_select_the_same(name, prefix):
    """Its words are looked for in the keys of a file without prefix."""
    (targets, excluded), names = FAMILIES[name]
    expected = set()
    for layer in header_of(names).layers():
        key = f"{layer}.weight"
        wanted = any(word in key for word in targets.split())
        if wanted and not any(word in key for word in excluded.split()):
            expected.add(prefix + layer)
    header = header_of(names, prefix)
    known = detect_family(header.tensors)
    assert known.source == "musubi-tuner"
    assert expected
    assert selected(header, known) == expected


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("name", USUAL)
def test_what_stays_dense_without_a_list(name, prefix):
    """Embeddings, modulation, gates, first and last layers."""
    header = header_of(FAMILIES[name][1], prefix)
    chosen = selected(header, detect_family(header.tensors))
    quantized, dense = (set(words.split()) for words in USUAL[name])
    assert {prefix + layer for layer in quantized} <= chosen
    assert not {prefix + layer for layer in dense} & chosen


def test_a_text_encoder_beside_the_model_stays_dense():
    """Although its layers have names that the model's patterns match."""
    model = header_of(FAMILIES["Z-Image"][1], "model.diffusion_model.")
    names = "layers.0.self_attn.q_proj layers.0.self_attn.o_proj layers.0.mlp.up_proj"
    encoder = header_of(names, "text_encoders.qwen3_4b.transformer.model.")
    together = Header({**encoder.tensors, **model.tensors})
    chosen = selected(together, detect_family(together.tensors))
    assert chosen
    assert all(layer.startswith("model.diffusion_model.") for layer in chosen)


def test_letters_of_patterns_in_a_prefix_are_plain_letters():
    """A prefix may hold brackets, which patterns have a use for."""
    header = header_of(FAMILIES["Wan"][1], "a[0].")
    chosen = selected(header, detect_family(header.tensors))
    assert "a[0].blocks.0.ffn.0" in chosen


@pytest.mark.parametrize("names", ["", "a b.c", "blocks.0.self_attn.q", "out.2"])
def test_what_is_no_known_family(names):
    """Nothing is guessed from a part of the signs."""
    assert detect_family(header_of(names).tensors) is None


def test_signs_must_stand_in_one_model():
    """Signs below different prefixes are none of one model."""
    *some, last = detect_family(header_of(FAMILIES["Wan"][1]).tensors).signature
    one, other = header_of(" ".join(some), "a."), header_of(last, "b.")
    assert detect_family([*one.tensors, *other.tensors]) is None


def test_every_family_can_be_told():
    """None is hidden by one before it, and names do not repeat."""
    known = model_families()
    assert len({family.name for family in known}) == len(known)
    for family in known:
        found = detect_family(header_of(" ".join(family.signature)).tensors)
        assert found.name == family.name
        assert family.include
