"""Tiny models and pipelines of diffusers, built from configs."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path

import pytest
import torch

import hijack

#: Class of a model to its config and the inputs of its forward.
CONFIGS = {
    "FluxTransformer2DModel": {
        "in_channels": 16,
        "num_layers": 1,
        "num_single_layers": 1,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
        "pooled_projection_dim": 64,
        "axes_dims_rope": [8, 12, 12],
        "guidance_embeds": True,
    },
    "SD3Transformer2DModel": {
        "sample_size": 8,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
        "caption_projection_dim": 64,
        "pooled_projection_dim": 64,
        "pos_embed_max_size": 8,
        "qk_norm": "rms_norm",
        "dual_attention_layers": [0],
    },
    "QwenImageTransformer2DModel": {
        "in_channels": 16,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "joint_attention_dim": 64,
        "axes_dims_rope": [8, 12, 12],
    },
    "WanTransformer3DModel": {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 2,
        "attention_head_dim": 32,
        "num_attention_heads": 2,
        "ffn_dim": 128,
        "text_dim": 64,
        "freq_dim": 64,
        "rope_max_seq_len": 32,
        "cross_attn_norm": True,
        "qk_norm": "rms_norm_across_heads",
    },
    "ZImageTransformer2DModel": {
        "in_channels": 4,
        "dim": 64,
        "n_layers": 2,
        "n_refiner_layers": 1,
        "n_heads": 2,
        "n_kv_heads": 2,
        "cap_feat_dim": 64,
        "axes_dims": [8, 12, 12],
        "axes_lens": [64, 32, 32],
    },
}


def models(*names):
    """Parametrize a test by the models that the installed release has."""
    return pytest.mark.parametrize("name", names or list(CONFIGS))


def model_class(name):
    """A class of diffusers; the test is skipped where the release lacks it."""
    import diffusers

    if not hasattr(diffusers, name):
        pytest.skip(f"diffusers {diffusers.__version__} has no {name}")
    return getattr(diffusers, name)


@pytest.fixture(autouse=True)
def patched():
    """hijack knows diffusers, which says nothing of what it warns of."""
    import diffusers

    diffusers.logging.set_verbosity_error()
    assert diffusers.ModelMixin  # whose import has the rest be patched
    status = hijack.patch("diffusers")  # again, after a test that took it out
    assert status.patched, status


def noise(*shape, dtype=torch.float32):
    """The same numbers for the same shape, in every process."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def build(name, dtype=torch.float32, seed=0):
    """A model with weights that are not zero anywhere."""
    torch.manual_seed(seed)
    model = model_class(name)(**CONFIGS[name]).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return model.to(dtype)


def run(model):
    """What a model computes from fixed inputs, in float32."""
    with torch.no_grad():
        return forward(model, model.dtype).float()


def forward(model, dtype):
    """A model's forward, with inputs of a dtype."""
    ids = torch.zeros(4, 3)
    ids[:, 1] = torch.arange(4)
    inputs = {
        "FluxTransformer2DModel": {
            "hidden_states": noise(1, 4, 16),
            "encoder_hidden_states": noise(1, 3, 64),
            "pooled_projections": noise(1, 64),
            "timestep": torch.tensor([0.5]),
            "img_ids": ids,
            "txt_ids": torch.zeros(3, 3),
            "guidance": torch.tensor([3.5]),
        },
        "SD3Transformer2DModel": {
            "hidden_states": noise(1, 4, 8, 8),
            "encoder_hidden_states": noise(1, 3, 64),
            "pooled_projections": noise(1, 64),
            "timestep": torch.tensor([500.0]),
        },
        "QwenImageTransformer2DModel": {
            "hidden_states": noise(1, 4, 16),
            "encoder_hidden_states": noise(1, 3, 64),
            "encoder_hidden_states_mask": torch.ones(1, 3, dtype=torch.bool),
            "timestep": torch.tensor([0.5]),
            "img_shapes": [[(1, 2, 2)]],
            "txt_seq_lens": [3],
        },
        "WanTransformer3DModel": {
            "hidden_states": noise(1, 4, 1, 4, 4),
            "encoder_hidden_states": noise(1, 3, 64),
            "timestep": torch.tensor([500]),
        },
    }
    name = type(model).__name__
    if name == "ZImageTransformer2DModel":
        sample = [noise(4, 1, 4, 4, dtype=dtype)]
        output = model(sample, torch.tensor([0.5]).to(dtype), [noise(3, 64).to(dtype)])
        sample = output[0] if isinstance(output, tuple) else output.sample
        return sample[0] if isinstance(sample, list) else sample
    known = inspect.signature(type(model).forward).parameters
    given = {
        key: value.to(dtype) if _casts(key, value) else value
        for key, value in inputs[name].items()
        if key in known
    }
    return model(**given, return_dict=False)[0]


def _casts(key, value):
    floats = isinstance(value, torch.Tensor) and value.is_floating_point()
    return floats and not key.endswith("ids")


def folder_of(model, path, tensors=None, metadata=None, **options):
    """A folder with a model's config and a file of the tensors given, or its own."""
    from safetensors.torch import save_file

    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    config = {"_class_name": type(model).__name__, **CONFIGS[type(model).__name__]}
    (path / "config.json").write_text(json.dumps({**config, **options}))
    if tensors is not None:
        file = path / "diffusion_pytorch_model.safetensors"
        save_file({k: t.contiguous() for k, t in tensors.items()}, file, metadata)
    return path


def quantized(model, scheme="blockwise_fp8", **options):
    """The model with its layers quantized, and its exactly dequantized twin."""
    hijack.wrap_model(model, scheme, **options)
    return model, hijack.unwrap(copy.deepcopy(model))


def same_weights(model, dense):
    """Whether two models decode to the same weights, bit for bit."""
    mine, theirs = dict(model.named_parameters()), dict(dense.named_parameters())
    assert mine.keys() == theirs.keys()
    for key, parameter in mine.items():
        weight = parameter.dense() if hasattr(parameter, "qdata") else parameter
        assert weight.dtype == theirs[key].dtype, key
        assert torch.equal(weight, theirs[key]), key


def quantized_layers(model):
    """Names of the layers whose weight is quantized."""
    return [n for n, p in model.named_parameters() if hasattr(p, "qdata")]


# -- original names --------------------------------------------------------------------


def original(name, state):
    """A state dict under the names, and in the tensors, of the model's authors."""
    return _ORIGINALS[name](dict(state))


def _fuse(state, old, new):
    """Put q, k and v into one, in the place of the three."""
    for suffix in ("weight", "bias"):
        parts = [f"{name}.{suffix}" for name in old]
        if parts[0] in state:
            state[f"{new}.{suffix}"] = torch.cat([state.pop(part) for part in parts])


def _rename(state, *pairs):
    for key in list(state):
        new = key
        for old, other in pairs:
            new = new.replace(old, other)
        state[new] = state.pop(key)


def _original_sd3(state):
    blocks = {key.split(".")[1] for key in state if key.startswith("transformer_bl")}
    for i in blocks:
        old, new = f"transformer_blocks.{i}", f"joint_blocks.{i}"
        for attn in ("attn", "attn2"):
            mine = [f"{old}.{attn}.to_{x}" for x in "qkv"]
            _fuse(state, mine, f"{new}.x_block.{attn}.qkv")
        added = [f"{old}.attn.add_{x}_proj" for x in "qkv"]
        _fuse(state, added, f"{new}.context_block.attn.qkv")
    for key in ["norm_out.linear", f"transformer_blocks.{max(blocks)}.norm1_context"]:
        for name in [n for n in state if n.startswith(key)]:
            scale, shift = state[name].chunk(2)
            state[name] = torch.cat([shift, scale])
    x, context = "x_block.", "context_block."
    _rename(
        state,
        ("transformer_blocks", "joint_blocks"),
        (".attn.norm_added_", f".{context}attn.ln_"),
        (".attn.norm_", f".{x}attn.ln_"),
        (".attn2.norm_", f".{x}attn2.ln_"),
        (".attn.to_out.0", f".{x}attn.proj"),
        (".attn2.to_out.0", f".{x}attn2.proj"),
        (".attn.to_add_out", f".{context}attn.proj"),
        (".norm1.linear", f".{x}adaLN_modulation.1"),
        (".norm1_context.linear", f".{context}adaLN_modulation.1"),
        (".ff.net.0.proj", f".{x}mlp.fc1"),
        (".ff.net.2", f".{x}mlp.fc2"),
        (".ff_context.net.0.proj", f".{context}mlp.fc1"),
        (".ff_context.net.2", f".{context}mlp.fc2"),
        ("pos_embed.pos_embed", "pos_embed"),
        ("pos_embed.proj", "x_embedder.proj"),
        ("time_text_embed.timestep_embedder.linear_1", "t_embedder.mlp.0"),
        ("time_text_embed.timestep_embedder.linear_2", "t_embedder.mlp.2"),
        ("time_text_embed.text_embedder.linear_1", "y_embedder.mlp.0"),
        ("time_text_embed.text_embedder.linear_2", "y_embedder.mlp.2"),
        ("proj_out", "final_layer.linear"),
        ("norm_out.linear", "final_layer.adaLN_modulation.1"),
    )
    return state


def _original_wan(state):
    table = state.pop("scale_shift_table")
    _rename(
        state,
        ("norm2", "norm__"),
        ("norm3", "norm2"),
        ("norm__", "norm3"),
        ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
        ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
        ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
        ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
        ("condition_embedder.time_proj", "time_projection.1"),
        ("attn2", "cross_attn"),
        ("attn1", "self_attn"),
        (".to_out.0.", ".o."),
        *((f".to_{x}.", f".{x}.") for x in "qkv"),
        ("proj_out", "head.head"),
        ("scale_shift_table", "modulation"),
        ("ffn.net.0.proj", "ffn.0"),
        ("ffn.net.2", "ffn.2"),
    )
    return {**state, "head.modulation": table}


def _original_z_image(state):
    for name in [key.removesuffix(".to_q.weight") for key in state if "to_q" in key]:
        _fuse(state, [f"{name}.to_{x}" for x in "qkv"], f"{name}.qkv")
    _rename(
        state,
        ("all_final_layer.2-1.", "final_layer."),
        ("all_x_embedder.2-1.", "x_embedder."),
        (".attention.to_out.0.", ".attention.out."),
        (".attention.norm_k.", ".attention.k_norm."),
        (".attention.norm_q.", ".attention.q_norm."),
    )
    return state


_ORIGINALS = {
    "SD3Transformer2DModel": _original_sd3,
    "QwenImageTransformer2DModel": lambda state: state,
    "WanTransformer3DModel": _original_wan,
    "ZImageTransformer2DModel": _original_z_image,
}


# -- pipelines -------------------------------------------------------------------------


def pipeline(transformer, **parts):
    """The pipeline of a model, without what its latents do not need."""
    import diffusers

    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    kinds = {
        "FluxTransformer2DModel": ("FluxPipeline", ("_2",)),
        "SD3Transformer2DModel": ("StableDiffusion3Pipeline", ("_2", "_3")),
        "QwenImageTransformer2DModel": ("QwenImagePipeline", ()),
        "WanTransformer3DModel": ("WanPipeline", ()),
        "ZImageTransformer2DModel": ("ZImagePipeline", ()),
    }
    name, others = kinds[type(transformer).__name__]
    encoders = {
        f"{part}{number}": None
        for part in ("text_encoder", "tokenizer")
        for number in ("", *others)
    }
    given = {"vae": None, "scheduler": flow, **encoders, **parts}
    made = getattr(diffusers, name)(transformer=transformer, **given)
    made.set_progress_bar_config(disable=True)
    return made


def generate(pipe, **more):
    """The latents of two steps, in float32."""
    dtype = pipe.transformer.dtype
    text = {"prompt_embeds": noise(1, 3, 64, dtype=dtype)}
    size = {"height": 32, "width": 32}
    given = {
        "FluxPipeline": {"pooled_prompt_embeds": noise(1, 64, dtype=dtype)},
        "StableDiffusion3Pipeline": {
            "pooled_prompt_embeds": noise(1, 64, dtype=dtype),
            "guidance_scale": 1.0,
        },
        "QwenImagePipeline": {
            "prompt_embeds_mask": torch.ones(1, 3, dtype=torch.int64),
            "true_cfg_scale": 1.0,
        },
        "WanPipeline": {"num_frames": 1, "guidance_scale": 1.0},
        "ZImagePipeline": {"guidance_scale": 0.0},
    }[type(pipe).__name__]
    if type(pipe).__name__ == "ZImagePipeline":
        text = {"prompt_embeds": [noise(3, 64, dtype=dtype)]}
    if "prompt" in more:
        text = {}
        given = {k: v for k, v in given.items() if "embeds" not in k}
    call = {
        "num_inference_steps": 2,
        "output_type": "latent",
        "generator": torch.Generator().manual_seed(0),
        **size,
        **text,
        **given,
        **more,
    }
    with torch.no_grad():
        output = pipe(**call)
    return (output.frames if hasattr(output, "frames") else output.images).float()


def tokenizer(length=16):
    """A tokenizer of a few words, for any text encoder."""
    import transformers
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["<pad>", "</s>", "<unk>", "a", "photo", "of", "cat", "system", "user"]
    model = models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>")
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, model_max_length=length, **special
    )


def text_encoder(kind):
    """A tiny text encoder of transformers, with random weights."""
    import transformers as t

    sizes = {"vocab_size": 32, "d_model": 64, "d_kv": 32, "d_ff": 128}
    t5 = {**sizes, "num_layers": 2, "num_heads": 2, "feed_forward_proj": "gated-gelu"}
    clip = {
        "vocab_size": 32,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 16,
        "projection_dim": 64,
        "bos_token_id": 3,
        "eos_token_id": 1,
        "pad_token_id": 0,
    }
    qwen = {
        "vocab_size": 32,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
    }
    torch.manual_seed(1)
    if kind == "clip":
        made = t.CLIPTextModel(t.CLIPTextConfig(**clip))
    elif kind == "t5":
        made = t.T5EncoderModel(t.T5Config(**t5))
    elif kind == "umt5":
        made = t.UMT5EncoderModel(t.UMT5Config(**t5))
    else:
        vision = {"depth": 1, "hidden_size": 32, "num_heads": 2, "out_hidden_size": 64}
        config = t.Qwen2_5_VLConfig(text_config=qwen, vision_config=vision)
        made = t.Qwen2_5_VLForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.1)
    return made.eval()
