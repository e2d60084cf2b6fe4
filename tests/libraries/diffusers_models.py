"""Tiny models and pipelines of diffusers, built from configs."""

from __future__ import annotations

import copy
import inspect
import json
from pathlib import Path

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


def noise(*shape, dtype=torch.float32):
    """The same numbers for the same shape, in every process."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).to(dtype)


def build(name, dtype=torch.float32, seed=0):
    """A model with weights that are not zero anywhere."""
    import diffusers

    torch.manual_seed(seed)
    model = getattr(diffusers, name)(**CONFIGS[name]).eval()
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
