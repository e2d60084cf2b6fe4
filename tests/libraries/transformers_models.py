"""Tiny models of transformers, made from configs, and files of them."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

_LM = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
_MOE = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "head_dim": 16,
}


def llama(**more: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(**_LM, **more))


def qwen3(**more: Any) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    return Qwen3ForCausalLM(Qwen3Config(**_LM, head_dim=16, **more))


def qwen3_moe(**more: Any) -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**_LM, **_MOE, **more))


def deepseek_v3(**more: Any) -> Any:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    fields = {**_LM, "num_key_value_heads": 4, "moe_intermediate_size": 32}
    config = DeepseekV3Config(
        **fields,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        kv_lora_rank=32,
        q_lora_rank=32,
        qk_rope_head_dim=16,
        qk_nope_head_dim=16,
        v_head_dim=16,
        **more,
    )
    return DeepseekV3ForCausalLM(config)


def gpt_oss(**more: Any) -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    config = GptOssConfig(
        **_LM, head_dim=16, num_local_experts=4, num_experts_per_tok=2, **more
    )
    return GptOssForCausalLM(config)


def t5(**more: Any) -> Any:
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(_t5_config(T5Config, **more))


def umt5(**more: Any) -> Any:
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(_t5_config(UMT5Config, **more))


def _t5_config(kind: Any, **more: Any) -> Any:
    return kind(
        vocab_size=96,
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
        **more,
    )


def clip(**more: Any) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModel

    config = CLIPTextConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        bos_token_id=1,
        eos_token_id=2,
        **more,
    )
    return CLIPTextModel(config)


def qwen2_5_vl(**more: Any) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    rope = {"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3]}
    config = Qwen2_5_VLConfig(
        text_config={**_LM, "rope_scaling": rope, "rope_theta": 10000.0, **more},
        vision_config={
            "depth": 2,
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_heads": 4,
            "out_hidden_size": 64,
            "patch_size": 4,
            "window_size": 16,
            "fullatt_block_indexes": [1],
        },
        image_token_id=90,
        video_token_id=91,
        vision_start_token_id=92,
        vision_end_token_id=93,
    )
    return Qwen2_5_VLForConditionalGeneration(config)


#: Name to what makes a model.
MODELS: Mapping[str, Callable[..., Any]] = {
    "llama": llama,
    "qwen3": qwen3,
    "qwen3-moe": qwen3_moe,
    "deepseek-v3": deepseek_v3,
    "gpt-oss": gpt_oss,
    "t5": t5,
    "umt5": umt5,
    "clip": clip,
    "qwen2.5-vl": qwen2_5_vl,
}


def build(name: str, dtype: torch.dtype = torch.bfloat16, **more: Any) -> Any:
    """A model with random weights, the same at every call."""
    torch.manual_seed(0)
    model = MODELS[name](**more)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # hosts begin with values too small to tell apart
                parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    return cast(model, dtype).eval()


def cast(model: Any, dtype: torch.dtype) -> Any:
    """A model with its weights in a dtype; its buffers stay as they are."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def tokens(length: int = 9) -> Tensor:
    """Tokens that no model takes for something special."""
    return torch.randint(3, 80, (2, length), generator=torch.Generator().manual_seed(2))


def image_inputs() -> dict[str, Tensor]:
    """A prompt with an image of 4 by 4 patches for Qwen2.5-VL."""
    ids = torch.tensor([[5, 92, 90, 90, 90, 90, 93, 7, 8]])
    generator = torch.Generator().manual_seed(3)
    pixels = torch.randn(16, 3 * 2 * 4 * 4, generator=generator)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == 90).int(),
    }


def output(model: Any, inputs: Any = None) -> Tensor:
    """What a model makes of some tokens."""
    with torch.no_grad():
        if isinstance(inputs, dict):
            result = model(**inputs)
        else:
            result = model(input_ids=tokens() if inputs is None else inputs)
    found: Tensor = result[0]
    return found


def dense_copy(model: nn.Module) -> Any:
    """The same model exactly dequantized."""
    import copy

    import hijack

    return hijack.unwrap(copy.deepcopy(model))


def edit_config(folder: Path, **changes: Any) -> None:
    """Change ``config.json``; None takes an entry out."""
    file = folder / "config.json"
    config = {**json.loads(file.read_text()), **changes}
    config = {key: value for key, value in config.items() if value is not None}
    file.write_text(json.dumps(config))


def rewrite(
    folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]
) -> None:
    """Change the tensors of ``model.safetensors``."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})
