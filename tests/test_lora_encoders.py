"""LoRAs of text encoders, merged into checkpoints that hold them."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import hijack
import schemes.blockwise_fp8  # noqa: F401 - registers the scheme
from hijack.errors import CheckpointError
from tests.test_lora_files import K, N, R, folder, near, opened, pair

__all__ = ["folder"]  # a fixture

CLIP = "text_model.encoder.layers"
SD1, SD2 = "cond_stage_model.transformer", "cond_stage_model.model"
ONE, TWO = "conditioner.embedders.0.transformer", "conditioner.embedders.1.model"
ALONE = "conditioner.embedders.0.model"
OURS = "text_encoders.{}.transformer"
T5 = "encoder.block"
DIFFUSERS = ("lora_A.weight", "lora_B.weight")


def encoder(place, first, *others):
    """Weights of the layers of an encoder; the first is that which tells its kind."""
    stem = f"{place}." if place else ""
    names = (first, *others)
    return {f"{stem}{name}": torch.randn(N, K) for name in names}


def clip(place, layers=1):
    """A CLIP with transformers' names."""
    names = [f"{CLIP}.{i}.self_attn.q_proj.weight" for i in range(layers)]
    return encoder(place, *names, f"{CLIP}.0.mlp.fc1.weight")


def open_clip(place):
    """A CLIP with OpenCLIP's names: queries, keys and values in one."""
    stem = f"{place}.transformer.resblocks.0"
    return {
        f"{stem}.attn.in_proj_weight": torch.randn(3 * K, K),
        f"{stem}.attn.in_proj_bias": torch.randn(3 * K),
        f"{stem}.attn.out_proj.weight": torch.randn(N, K),
        f"{stem}.mlp.c_fc.weight": torch.randn(N, K),
        f"{stem}.mlp.c_proj.weight": torch.randn(N, K),
        f"{stem}.ln_1.weight": torch.randn(K),
        f"{place}.text_projection": torch.randn(K, N),
    }


def t5(place):
    """A T5."""
    names = (f"{T5}.0.layer.0.SelfAttention.q.weight", f"{T5}.0.layer.1.x.wo.weight")
    return encoder(place, *names)


SDXL = clip(ONE) | open_clip(TWO)
FLUX = clip(OURS.format("clip_l")) | t5(OURS.format("t5xxl"))
SD3 = FLUX | clip(OURS.format("clip_g"), 32)
Q, FC1 = f"{CLIP}.0.self_attn.q_proj", f"{CLIP}.0.mlp.fc1"
T5_Q = f"{T5}.0.layer.0.SelfAttention.q"

#: The checkpoint, a name in the LoRA, and the key it changes.
WHOLE = [
    (clip(SD1), f"lora_te_{Q}", f"{SD1}.{Q}.weight"),
    (clip(SD1), f"lora_te_{FC1}", f"{SD1}.{FC1}.weight"),
    (clip(SD1), f"text_encoder.{Q}", f"{SD1}.{Q}.weight"),
    (clip(SD1), f"{SD1}.{Q}", f"{SD1}.{Q}.weight"),
    (SDXL, f"lora_te1_{Q}", f"{ONE}.{Q}.weight"),
    (SDXL, f"text_encoder.{FC1}", f"{ONE}.{FC1}.weight"),
    (SDXL, f"lora_te2_{FC1}", f"{TWO}.transformer.resblocks.0.mlp.c_fc.weight"),
    (
        SDXL,
        f"text_encoder_2.{CLIP}.0.mlp.fc2",
        f"{TWO}.transformer.resblocks.0.mlp.c_proj.weight",
    ),
    (
        SDXL,
        f"lora_te2_{CLIP}.0.self_attn.out_proj",
        f"{TWO}.transformer.resblocks.0.attn.out_proj.weight",
    ),
    (
        open_clip(SD2),
        f"lora_te_{FC1}",
        f"{SD2}.transformer.resblocks.0.mlp.c_fc.weight",
    ),
    (
        open_clip(ALONE),
        f"lora_te2_{FC1}",
        f"{ALONE}.transformer.resblocks.0.mlp.c_fc.weight",
    ),
    (FLUX, f"lora_te1_{Q}", f"{OURS.format('clip_l')}.{Q}.weight"),
    (FLUX, f"lora_te2_{T5_Q}", f"{OURS.format('t5xxl')}.{T5_Q}.weight"),
    (FLUX, f"lora_te3_{T5_Q}", f"{OURS.format('t5xxl')}.{T5_Q}.weight"),
    (FLUX, f"text_encoder_2.{T5_Q}", f"{OURS.format('t5xxl')}.{T5_Q}.weight"),
    (SD3, f"lora_te2_{Q}", f"{OURS.format('clip_g')}.{Q}.weight"),
    (SD3, f"lora_te3_{T5_Q}", f"{OURS.format('t5xxl')}.{T5_Q}.weight"),
    (
        t5(OURS.format("umt5xxl")),
        f"lora_te1_{T5_Q}",
        f"{OURS.format('umt5xxl')}.{T5_Q}.weight",
    ),
    (clip(""), f"lora_te1_{Q}", f"{Q}.weight"),
    (clip("", 32), f"lora_te2_{Q}", f"{Q}.weight"),
    (t5(""), f"text_encoder_3.{T5_Q}", f"{T5_Q}.weight"),
    (
        encoder(SD1, "encoder.layers.0.mlp.fc1.weight"),
        f"lora_te_{FC1}",
        f"{SD1}.encoder.layers.0.mlp.fc1.weight",
    ),
    (
        encoder(OURS.format("qwen3_06b"), "model.layers.0.mlp.up_proj.weight"),
        "lora_te_layers_0_mlp_up_proj",
        f"{OURS.format('qwen3_06b')}.model.layers.0.mlp.up_proj.weight",
    ),
]


@pytest.mark.parametrize(("base", "theirs", "key"), WHOLE)
def test_layers_of_text_encoders(folder, base, theirs, key):
    """Kohya's and diffusers' numbers, wherever a checkpoint has the encoder."""
    if theirs.startswith("lora_"):
        theirs = theirs.replace(".", "_")
    tensors, product = pair(theirs, style=DIFFUSERS)
    loras = opened(folder, base, tensors, 0.5)
    assert loras.keys == {key}
    assert loras.unmatched == ()
    assert near(loras.merge(key, base[key]), base[key].double() + 0.5 * product)


LLM = "layers.0.self_attn.q_proj"
#: An encoder's own file: the prefix of its layers, a layer, its table of tokens, and
#: what trainers and hosts call the layer.
OWN_FILES = [
    (
        prefix,
        LLM,
        "embed_tokens.weight",
        (
            f"lora_te_{LLM}",
            f"lora_te1_{LLM}",
            f"lora_te_model_{LLM}",
            f"lora_te1_language_model_model_{LLM}",
            f"text_encoder.model.{LLM}",
            f"text_encoder.{LLM}",
            f"text_encoders.qwen3_4b.transformer.model.{LLM}",
            f"text_encoders.transformer.model.{LLM}",
            f"llama.language_model.model.{LLM}",
            f"base_model.model.model.{LLM}",
        ),
    )
    for prefix in ("model.", "", "model.language_model.", "language_model.model.")
]
OWN_FILES += [
    (
        prefix,
        Q,
        "text_model.embeddings.token_embedding.weight",
        (
            f"lora_te_{Q}",
            f"lora_te1_{Q}",
            f"text_encoder.{Q}",
            f"clip_l.{Q}",
            f"text_encoders.clip_l.transformer.{Q}",
            f"base_model.model.{Q}",
        ),
    )
    for prefix in ("", "transformer.", "module.")
]
OWN_FILES += [
    (
        prefix,
        T5_Q,
        "shared.weight",
        (
            f"lora_te_{T5_Q}",
            f"lora_te2_{T5_Q}",
            f"lora_te3_{T5_Q}",
            f"text_encoder_3.{T5_Q}",
            f"t5.{T5_Q}",
            f"text_encoders.t5xxl.transformer.{T5_Q}",
            f"base_model.model.{T5_Q}",
        ),
    )
    for prefix in ("", "transformer.")
]


@pytest.mark.parametrize("wrap", ["", "_orig_mod."])
@pytest.mark.parametrize(("prefix", "layer", "tokens", "names"), OWN_FILES)
def test_the_own_file_of_an_encoder(folder, prefix, layer, tokens, names, wrap):
    """Every program's name for its layers, with and without wrappers."""
    key = f"{wrap}{prefix}{layer}.weight"
    base = {key: torch.randn(N, K), f"{wrap}{prefix}{tokens}": torch.randn(4, K)}
    for name in names:
        flat = name.replace(".", "_") if name.startswith("lora_") else name
        tensors, product = pair(flat, style=DIFFUSERS)
        loras = opened(folder, base, tensors)
        assert loras.keys == {key}, name
        assert near(loras.merge(key, base[key]), base[key].double() + product)


def test_encoders_within_a_checkpoint_have_names_of_their_own(folder):
    """ComfyUI and OneTrainer name an encoder by its kind, not by a number."""
    for kind, theirs in (("clip_l", Q), ("clip_g", Q), ("t5xxl", T5_Q)):
        key = f"{OURS.format(kind)}.{theirs}.weight"
        for name in (kind, f"{kind}.transformer", OURS.format(kind)):
            name = f"{'t5' if name == 't5xxl' else name}.{theirs}"
            loras = opened(folder, SD3, pair(name, style=DIFFUSERS)[0])
            assert loras.keys == {key}
    key = f"{TWO}.transformer.resblocks.0.mlp.c_fc.weight"
    loras = opened(folder, SDXL, pair(f"clip_g.{FC1}", style=DIFFUSERS)[0])
    assert loras.keys == {key}


def test_two_encoders_are_not_merged_into_one(folder):
    """A file of one encoder does not say which of a LoRA's two it is."""
    base = {
        f"model.{LLM}.weight": torch.ones(N, K),
        "model.embed_tokens.weight": torch.ones(2, K),
    }
    flat = LLM.replace(".", "_")
    tensors = pair(f"lora_te1_{flat}")[0] | pair(f"lora_te2_{flat}")[0]
    with pytest.raises(CheckpointError, match="expected one LoRA for a layer"):
        opened(folder, base, tensors)


def test_a_diffusion_model_has_no_text_encoder(folder):
    """Its layers may have an encoder's names, but it has no table of tokens."""
    base = {f"{LLM}.weight": torch.ones(N, K)}
    with pytest.raises(CheckpointError, match="they are of text encoders alone"):
        opened(folder, base, pair(f"lora_te_{LLM.replace('.', '_')}")[0])


@pytest.mark.parametrize("style", ["lora_te2_{}", "text_encoder_2.{}"])
def test_one_weight_of_openclip_is_three_of_transformers(folder, style):
    """Queries, keys and values have their rows of the weight and of the bias."""
    stem = f"{TWO}.transformer.resblocks.0.attn.in_proj_"
    tensors, products = {}, []
    for name in "qkv":
        module = style.format(f"{CLIP}.0.self_attn.{name}_proj")
        if style.startswith("lora_"):
            module = module.replace(".", "_")
        made, product = pair(module, K)
        tensors |= made
        products.append(product)
        tensors[f"{module}.diff_b"] = torch.randn(K)
        tensors[f"{module}.alpha"] = torch.tensor(2.0)
    loras = opened(folder, SDXL, tensors)
    assert loras.keys == {f"{stem}weight", f"{stem}bias"}
    weight, bias = SDXL[f"{stem}weight"], SDXL[f"{stem}bias"]
    expected = weight.double() + 2 / R * torch.cat(products)
    assert near(loras.merge(f"{stem}weight", weight), expected)
    added = torch.cat([t for key, t in tensors.items() if key.endswith("diff_b")])
    assert near(loras.merge(f"{stem}bias", bias), bias.double() + added)


def test_one_of_the_three_leaves_the_others(folder):
    """Keys alone: the rows of queries and values stay bit for bit."""
    key = f"{TWO}.transformer.resblocks.0.attn.in_proj_weight"
    flat = f"lora_te2_{CLIP}.0.self_attn.k_proj".replace(".", "_")
    tensors, product = pair(flat, K)
    merged = opened(folder, SDXL, tensors).merge(key, SDXL[key])
    assert near(merged[K : 2 * K], SDXL[key][K : 2 * K].double() + product)
    assert torch.equal(merged[:K], SDXL[key][:K])
    assert torch.equal(merged[2 * K :], SDXL[key][2 * K :])


def test_openclip_has_the_transpose_of_the_projection(folder):
    """OneTrainer's LoRA of text_projection is (N, K) where the file has (K, N)."""
    key = f"{TWO}.text_projection"
    tensors, product = pair("lora_te2_text_projection")
    tensors["lora_te2_text_projection.dora_scale"] = torch.rand(1, K) + 0.5
    merged = opened(folder, SDXL, tensors).merge(key, SDXL[key])
    whole = SDXL[key].double().t() + product
    lengths = tensors["lora_te2_text_projection.dora_scale"].double()
    whole = whole * (lengths / (whole**2).sum(0).sqrt())
    assert near(merged, whole.t())
    square = SDXL | {key: torch.randn(K, K)}  # as it is in SDXL
    tensors, product = pair("lora_te2_text_projection", K)
    merged = opened(folder, square, tensors).merge(key, square[key])
    assert near(merged, square[key].double() + product.t())


def test_norms_of_openclip(folder):
    """LyCORIS trains them too."""
    key = f"{TWO}.transformer.resblocks.0.ln_1.weight"
    name = f"lora_te2_{CLIP}.0.layer_norm1".replace(".", "_")
    added = torch.randn(K)
    loras = opened(folder, SDXL, {f"{name}.w_norm": added})
    assert near(loras.merge(key, SDXL[key]), SDXL[key].double() + added)


def test_a_file_of_the_second_encoder_has_no_first(folder):
    """Both have layers of the same names; the number tells them apart."""
    flat = Q.replace(".", "_")
    tensors = pair(f"lora_te1_{flat}")[0] | pair(f"lora_te2_{flat}")[0]
    loras = opened(folder, clip("", 32), tensors, ignore_unmatched=True)
    assert loras.unmatched == (f"lora_te1_{flat}",)
    loras = opened(folder, clip(""), tensors, ignore_unmatched=True)
    assert loras.unmatched == (f"lora_te2_{flat}",)


def test_a_whole_checkpoint_is_quantized_with_both(folder):
    """The encoder stays dense, in its own dtype, with the LoRA in its fused weight."""
    stem = f"{TWO}.transformer.resblocks.0.attn"
    base = {key: tensor.bfloat16() for key, tensor in open_clip(TWO).items()}
    base["model.diffusion_model.a.weight"] = torch.randn(N, K).bfloat16()
    names = "q", "k", "v"
    tensors, products = pair("lora_unet_a")[0], []
    for name in names:
        flat = f"lora_te2_{CLIP}.0.self_attn.{name}_proj".replace(".", "_")
        made, product = pair(flat, K)
        tensors |= made
        products.append(product)
    save_file(base, folder / "base.safetensors")
    save_file(tensors, folder / "lora.safetensors")
    report = hijack.quantize_file(
        folder / "base.safetensors",
        folder / "q.safetensors",
        loras=f"{folder / 'lora.safetensors'}:0.5",
        include="model.diffusion_model.*",
    )
    assert report.layers == ("model.diffusion_model.a",)
    assert set(report.merged) == {
        "model.diffusion_model.a.weight",
        f"{stem}.in_proj_weight",
    }
    written = load_file(folder / "q.safetensors")
    key = f"{stem}.in_proj_weight"
    whole = (base[key].double() + 0.5 * torch.cat(products)).bfloat16()
    assert (written[key] != whole).float().mean() < 0.01  # ties that rounding decides
    others = base.keys() - set(report.merged)
    assert all(torch.equal(written[other], base[other]) for other in others)


def test_what_is_of_text_encoders_is_said_to_be(folder):
    """A checkpoint of the diffusion model alone: what these are, and what to pass."""
    base = {"model.diffusion_model.a.weight": torch.randn(N, K)}
    flat = Q.replace(".", "_")
    tensors = pair("lora_unet_a")[0] | pair(f"lora_te1_{flat}")[0]
    message = (
        rf"lora_te1_{flat} \(1 of 2\) are of text encoders, of which .*base.* has no "
        r"such layers; .*--ignore-unmatched\) to merge the rest"
    )
    with pytest.raises(CheckpointError, match=message):
        opened(folder, base, tensors)
    loras = opened(folder, base, tensors, ignore_unmatched=True)
    assert loras.unmatched == (f"lora_te1_{flat}",)
    tensors |= pair("lora_unet_b")[0]
    with pytest.raises(CheckpointError, match=r"\(2 of 3\), 1 of them of text encod"):
        opened(folder, base, tensors)
    with pytest.raises(CheckpointError, match="; they are of text encoders alone; exp"):
        opened(folder, base, pair(f"text_encoder.{Q}")[0], ignore_unmatched=True)
