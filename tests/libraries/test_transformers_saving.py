"""``save_pretrained`` of transformers, and what reads it without hijack."""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file

import hijack
from hijack.errors import CheckpointError
from hijack.hosts.config import HijackConfig
from hijack.modules import Wrapped
from tests.libraries import transformers_models as models

BF16 = torch.bfloat16


def load_quantized(name: str, folder: Path, **more: Any) -> Any:
    """A tiny model that is quantized while it is loaded."""
    tying = {"tie_word_embeddings": True} if more.pop("tied", False) else {}
    model = models.build(name, **tying)
    model.save_pretrained(folder)
    options = {"block_size": 32, **more}
    config = HijackConfig("blockwise_fp8", **options)
    return type(model).from_pretrained(folder, dtype=BF16, quantization_config=config)


def tensors_in(folder: Path) -> dict[str, bytes]:
    """Key to the bytes of its tensor, over all files of a folder."""
    return {
        key: tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        for file in folder.glob("*.safetensors")
        for key, tensor in load_file(file).items()
    }


@pytest.mark.parametrize("name", models.MODELS)
def test_round_trip(name: str, tmp_path: Path) -> None:
    """What is saved, whole or in shards, loads the same and saves the same bytes."""
    model = load_quantized(name, tmp_path / "dense")
    model.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "shards", max_shard_size="20KB")
    expected = tensors_in(tmp_path / "whole")
    assert tensors_in(tmp_path / "shards") == expected
    config = json.loads((tmp_path / "whole" / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "hijack"
    assert {config.get("dtype"), config.get("torch_dtype")} == {"bfloat16", None}
    for folder in ("whole", "shards"):
        found = type(model).from_pretrained(tmp_path / folder, dtype=BF16)
        assert torch.equal(models.output(found), models.output(model))
        found.save_pretrained(tmp_path / f"{folder} again")
        assert tensors_in(tmp_path / f"{folder} again") == expected


def test_other_readers(tmp_path: Path) -> None:
    """`hijack.load` reads what was saved, with the marker of every layer."""
    model = load_quantized("qwen3", tmp_path / "dense")
    model.save_pretrained(tmp_path / "q")
    file = tmp_path / "q" / "model.hijack.safetensors"
    found = models.build("qwen3")
    report = hijack.load(found, file)
    assert len(report.layers) == 14
    assert torch.equal(models.output(found), models.output(model))


@pytest.mark.parametrize("what", ["embedding", "head"])
def test_tied_weights(what: str, tmp_path: Path) -> None:
    """A weight that embedding and head share is quantized, saved and loaded once."""
    include = {"embedding": "model.embed_tokens", "head": "lm_head"}[what]
    model = load_quantized(
        "llama",
        tmp_path / "dense",
        tied=True,
        include=["default", include],
        exclude=["*norm*"],
    )
    embedding, head = model.model.embed_tokens, model.lm_head
    assert head.weight is embedding.weight
    assert isinstance(embedding, Wrapped) == isinstance(head, Wrapped)
    expected = models.dense_copy(model)
    assert torch.equal(models.output(model), models.output(expected))
    model.save_pretrained(tmp_path / "q")
    assert not [key for key in tensors_in(tmp_path / "q") if "lm_head" in key]
    found = type(model).from_pretrained(tmp_path / "q", dtype=BF16)
    assert found.lm_head.weight is found.model.embed_tokens.weight
    assert torch.equal(models.output(found), models.output(model))


def test_models_quantized_by_hand(tmp_path: Path) -> None:
    """A model wrapped without the host is saved and loaded; unwrapped it is dense."""
    model = models.build("llama")
    hijack.wrap_model(model, "blockwise_fp8", exclude=["lm_head", "*embed*"])
    model.save_pretrained(tmp_path / "q")
    found = type(model).from_pretrained(tmp_path / "q", dtype=BF16)
    assert torch.equal(models.output(found), models.output(model))
    hijack.unwrap(model)
    model.save_pretrained(tmp_path / "dense")
    assert (tmp_path / "dense" / "model.safetensors").exists()
    assert "quantization_config" not in (tmp_path / "dense/config.json").read_text()
    found = type(model).from_pretrained(tmp_path / "dense", dtype=BF16)
    assert torch.equal(models.output(found), models.output(model))


def test_dequantize(tmp_path: Path) -> None:
    """The host's `dequantize` gives the dense model, saved as one."""
    model = load_quantized("llama", tmp_path / "dense")
    expected = models.output(models.dense_copy(model))
    model.dequantize()
    assert not any(isinstance(part, Wrapped) for part in model.modules())
    assert torch.equal(models.output(model), expected)
    model.save_pretrained(tmp_path / "again")
    found = type(model).from_pretrained(tmp_path / "again", dtype=BF16)
    assert torch.equal(models.output(found), expected)


def test_a_folder_with_other_weights_is_refused(tmp_path: Path) -> None:
    """Quantized weights are not saved beside weights that would be read instead."""
    model = load_quantized("llama", tmp_path / "dense")
    with pytest.raises(CheckpointError, match="are read instead"):
        model.save_pretrained(tmp_path / "dense")


def test_pickles_are_refused(tmp_path: Path) -> None:
    """Quantized weights are saved as safetensors only."""
    import transformers

    if not transformers.__version__.startswith("4."):
        pytest.skip("transformers saves no pickles since 5")
    model = load_quantized("llama", tmp_path / "dense")
    with pytest.raises(ValueError, match="not serializable"):
        model.save_pretrained(tmp_path / "q", safe_serialization=False)


_WITHOUT_HIJACK = """
import sys
from transformers import AutoModelForCausalLM, LlamaForCausalLM, LlamaConfig
for kind in (AutoModelForCausalLM, LlamaForCausalLM):
    for more in ({}, {"config": LlamaConfig.from_pretrained(sys.argv[1])}):
        try:
            kind.from_pretrained(sys.argv[1], **more)
        except OSError as error:
            assert "no file named" in str(error), error
        else:
            sys.exit("it was loaded")
assert "hijack" not in sys.modules
"""


@pytest.mark.parametrize("size", ["1GB", "20KB"], ids=["whole", "shards"])
@pytest.mark.parametrize("variant", [None, "fp8"])
def test_refused_without_hijack(size: str, variant: str | None, tmp_path: Path) -> None:
    """Without hijack transformers finds no weights in the folder, and says so."""
    model = load_quantized("llama", tmp_path / "dense")
    model.save_pretrained(tmp_path / "q", max_shard_size=size, variant=variant)
    found = type(model).from_pretrained(tmp_path / "q", variant=variant, dtype=BF16)
    assert torch.equal(models.output(found), models.output(model))
    environment = {**os.environ, "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", _WITHOUT_HIJACK, str(tmp_path / "q")],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


# -- training --------------------------------------------------------------------------


class _Texts(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = models.tokens()[index % 2]
        return {"input_ids": ids, "labels": ids}


def _trainer(model: Any, folder: Path, **more: Any) -> Any:
    pytest.importorskip("accelerate")
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=0.05,
        report_to=[],
        use_cpu=True,
        save_steps=3,
        disable_tqdm=True,
        **more,
    )
    return Trainer(model=model, args=arguments, train_dataset=_Texts())


@pytest.mark.filterwarnings("ignore")
def test_trainer_without_adapters_is_refused(tmp_path: Path) -> None:
    """A Trainer refuses a quantized model as it refuses those of its own quantizers."""
    model = load_quantized("llama", tmp_path / "dense")
    with pytest.raises(ValueError, match="purely quantized"):
        _trainer(model, tmp_path / "run")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_trainer_with_lora(checkpointing: bool, tmp_path: Path) -> None:
    """A LoRA trains beside quantized layers as beside the decoded ones."""
    peft = pytest.importorskip("peft")
    quantized = load_quantized("llama", tmp_path / "dense")
    codes = {k: v.clone() for k, v in quantized.state_dict().items()}
    losses = []
    dense = models.dense_copy(quantized)
    dense.hf_quantizer.remove_quantization_config(dense)
    for index, model in enumerate((quantized, dense)):
        config = peft.LoraConfig(
            r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM"
        )
        torch.manual_seed(5)
        lora = peft.get_peft_model(model, config)
        folder = tmp_path / f"run{index}"
        more = {
            "gradient_checkpointing": checkpointing,
            # else a dense model gets no gradient either
            "gradient_checkpointing_kwargs": {"use_reentrant": False},
        }
        trainer = _trainer(lora, folder, **more)
        losses.append(trainer.train().training_loss)
        files = {path.name for path in (folder / "checkpoint-3").iterdir()}
        assert "adapter_model.safetensors" in files
        assert not {"model.safetensors", "model.hijack.safetensors"} & files
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    lora = peft.PeftModel.from_pretrained(
        load_quantized("llama", tmp_path / "dense2"), tmp_path / "run0" / "checkpoint-3"
    )
    assert not torch.equal(models.output(lora), models.output(lora.unload()))
    assert codes.keys() == lora.unload().state_dict().keys()


@pytest.mark.filterwarnings("ignore")
def test_checkpoints_of_a_trainer(tmp_path: Path) -> None:
    """What a Trainer saves of a quantized model is read again as what it was."""
    model = models.build("llama", torch.float32)
    hijack.wrap_model(model, "blockwise_fp8", exclude=["lm_head", "*embed*"])
    trainer = _trainer(model, tmp_path / "run")
    trainer.train()
    folder = tmp_path / "run" / "checkpoint-3"
    assert not (folder / "model.safetensors").exists()
    found = type(model).from_pretrained(folder)
    assert torch.equal(models.output(found), models.output(model.eval()))


def test_host_adapters(tmp_path: Path) -> None:
    """Adapters added through the host are saved alone, and loaded beside the layers."""
    peft = pytest.importorskip("peft")
    model = load_quantized("llama", tmp_path / "dense")
    before = models.output(model)
    try:
        models.build("llama").add_adapter(peft.LoraConfig(target_modules=["q_proj"]))
    except ValueError as error:
        pytest.skip(f"this transformers works with no such PEFT: {error}")
    model.add_adapter(peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    expected = models.output(model)
    assert not torch.equal(before, expected)
    model.save_pretrained(tmp_path / "adapter")
    names = {path.name for path in (tmp_path / "adapter").iterdir()}
    assert "adapter_model.safetensors" in names
    assert not [name for name in names if name.startswith("model")]
    found = load_quantized("llama", tmp_path / "dense2")
    found.load_adapter(str(tmp_path / "adapter"))
    assert torch.equal(models.output(found), expected)


def test_copies(tmp_path: Path) -> None:
    """A deep copy of a quantized model is one too."""
    model = load_quantized("llama", tmp_path / "dense")
    copied = copy.deepcopy(model)
    copied.save_pretrained(tmp_path / "q")
    found = type(model).from_pretrained(tmp_path / "q", dtype=BF16)
    assert torch.equal(models.output(found), models.output(model))
