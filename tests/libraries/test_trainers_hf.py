"""transformers' Trainer over a quantized base with adapters of PEFT."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import hijack

CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "vocab_size": 32,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
}
TOKENS = [torch.arange(1, 17), torch.arange(16, 0, -1)] * 4
DATA = [{"input_ids": tokens, "labels": tokens} for tokens in TOKENS]


def base():
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG))
    hijack.wrap_model(model, "blockwise_fp8", include=["*_proj"])
    return model


def trained(model, folder, **options):
    """A model after a few steps, and its losses."""
    torch.manual_seed(1)
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(model, config)
    if "gradient_checkpointing" in options:  # what checkpoints need that are reentrant
        adapted.enable_input_require_grads()
    arguments = TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=2,
        max_steps=3,
        learning_rate=1e-2,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        dataloader_num_workers=0,
        **options,
    )
    trainer = Trainer(model=adapted, args=arguments, train_dataset=DATA)
    trainer.train()
    return adapted, [row["loss"] for row in trainer.state.log_history if "loss" in row]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": True},
        },
        {
            "gradient_checkpointing": True,
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
            "bf16": True,
        },
    ],
    ids=["plain", "checkpointing", "checkpointing and autocast"],
)
def test_losses_are_those_over_the_decoded_model(options, tmp_path):
    """Step by step; the base has not changed."""
    model = base()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    adapted, losses = trained(model, tmp_path, **options)
    _, wanted = trained(hijack.unwrap(base()), tmp_path, **options)
    assert len(losses) == len(wanted) == 3
    tolerance = 0.02 if "bf16" in options else 1e-3
    assert losses == pytest.approx(wanted, rel=tolerance)
    after = adapted.unload().state_dict()
    assert after.keys() == before.keys()
    for key, tensor in before.items():
        same = tensor.view(torch.uint8) == after[key].view(torch.uint8)
        assert bool(same.all())
