"""Pipelines of diffusers with quantized models: steps, text encoders, saving, LoRA."""

import copy

import pytest
import torch
from torch import nn

import hijack
from hijack.errors import CheckpointError, ReadOnlyError
from hijack.hosts.config import HijackConfig
from hijack.quantized import QuantizedTensor
from tests.libraries.diffusers_models import (
    CONFIGS,
    build,
    generate,
    models,
    patched,  # noqa: F401
    pipeline,
    quantized,
    quantized_layers,
    same_weights,
    text_encoder,
    tokenizer,
)

FLUX, QWEN = "FluxTransformer2DModel", "QwenImageTransformer2DModel"


def close(mine, theirs, dtype=torch.float32):
    """Whether latents are equal but for the order of sums."""
    bound = 1e-4 if dtype == torch.float32 else 0.03
    assert mine.shape == theirs.shape
    assert theirs.isfinite().all()
    assert (mine - theirs).abs().max() <= bound * theirs.abs().max()


@models()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_two_steps_are_those_of_the_dense_model(name, dtype):
    """With every Linear quantized, those included whose dtype the host asks."""
    model, dense = quantized(build(name, dtype))
    assert model.dtype == dtype
    close(generate(pipeline(model)), generate(pipeline(dense)), dtype)


ENCODERS = {
    "Flux with CLIP and T5": (
        FLUX,
        {"text_encoder": "clip", "text_encoder_2": "t5"},
    ),
    "Wan with UMT5": ("WanTransformer3DModel", {"text_encoder": "umt5"}),
    "Qwen-Image with Qwen2.5-VL": (QWEN, {"text_encoder": "qwen"}),
}


@pytest.mark.parametrize("case", ENCODERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_text_encoders_may_be_quantized(case, dtype, monkeypatch):
    """With their embeddings, whose dtype and rows hosts look at."""
    from diffusers.pipelines.wan import pipeline_wan

    # which 0.35 cleans with a library that it does not require
    monkeypatch.setattr(pipeline_wan, "prompt_clean", str)
    name, kinds = ENCODERS[case]
    latents = []
    for whole in (True, False):
        parts = {part: text_encoder(kind).to(dtype) for part, kind in kinds.items()}
        for part in list(parts):
            hijack.wrap_model(parts[part], "blockwise_fp8")
            rows = [m for m in parts[part].modules() if isinstance(m, nn.Embedding)]
            assert rows
            assert all(is_ours(module.weight) for module in rows)
            if not whole:
                hijack.unwrap(parts[part])
            parts[part.replace("text_encoder", "tokenizer")] = tokenizer()
        pipe = pipeline(build(name, dtype), **parts)
        latents.append(generate(pipe, prompt="a photo of a cat"))
    close(*latents, dtype)


def is_ours(weight):
    """Whether a weight is quantized."""
    return isinstance(weight, QuantizedTensor)


# -- saving ----------------------------------------------------------------------------


NO_ENCODERS = dict.fromkeys(
    ("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
)


def whole_pipeline(transformer):
    """A pipeline all of whose parts are saved and loaded: a VAE, no text encoder."""
    import diffusers

    torch.manual_seed(0)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(32,),
        latent_channels=4,
        norm_num_groups=8,
        layers_per_block=1,
    )
    return pipeline(transformer, vae=vae.eval())


def test_a_pipeline_is_saved_and_loaded(tmp_path):
    """Quantized what was, dense what was, with the same bytes."""
    import diffusers

    model, dense = quantized(build(FLUX), include=["*transformer_blocks.*"])
    pipe = whole_pipeline(model)
    pipe.save_pretrained(tmp_path, max_shard_size="100KB")
    again = diffusers.DiffusionPipeline.from_pretrained(tmp_path, **NO_ENCODERS)
    again.set_progress_bar_config(disable=True)
    assert quantized_layers(again.transformer) == quantized_layers(model)
    same_weights(again.transformer, dense)
    same_weights(again.vae, pipe.vae)
    assert torch.equal(generate(again), generate(pipe))


def test_a_pipeline_is_quantized_while_it_is_loaded(tmp_path):
    """Those of its parts that a mapping names."""
    import diffusers

    pipe = whole_pipeline(build(FLUX))
    pipe.save_pretrained(tmp_path)
    how = diffusers.PipelineQuantizationConfig(
        quant_mapping={"transformer": HijackConfig("blockwise_fp8", exclude=())}
    )
    loaded = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path, quantization_config=how, **NO_ENCODERS
    )
    loaded.set_progress_bar_config(disable=True)
    assert quantized_layers(loaded.transformer)
    assert not quantized_layers(loaded.vae)
    dense = pipeline(hijack.unwrap(copy.deepcopy(loaded.transformer)))
    close(generate(pipeline(loaded.transformer)), generate(dense))


def test_one_config_is_for_models_of_both_libraries(tmp_path):
    """By its name, where hijack knows transformers too."""
    import diffusers
    from transformers.quantizers import auto

    if "hijack" not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        pytest.skip("hijack has no adapter of transformers here")
    encoders = {"text_encoder": text_encoder("clip"), "tokenizer": None}
    pipe = pipeline(build(FLUX), **encoders)
    pipe.save_pretrained(tmp_path)
    how = diffusers.PipelineQuantizationConfig(
        quant_backend="hijack",
        quant_kwargs={"scheme": "blockwise_fp8"},
        components_to_quantize=["transformer", "text_encoder"],
    )
    given = {**NO_ENCODERS, "vae": None}
    del given["text_encoder"]
    loaded = diffusers.DiffusionPipeline.from_pretrained(
        tmp_path, quantization_config=how, **given
    )
    assert quantized_layers(loaded.transformer)
    assert quantized_layers(loaded.text_encoder)


def test_a_model_that_was_unwrapped_is_saved_dense(tmp_path):
    """Its config says nothing of hijack any more."""
    model, dense = quantized(build(QWEN))
    model.save_pretrained(tmp_path / "a")
    loaded = type(model).from_pretrained(tmp_path / "a")
    loaded.dequantize()
    loaded.save_pretrained(tmp_path / "b")
    assert "hijack" not in (tmp_path / "b" / "config.json").read_text()
    same_weights(type(model).from_pretrained(tmp_path / "b"), dense)


def test_a_model_that_is_offloaded_is_saved(tmp_path):
    """What accelerate's hooks keep elsewhere is read; what nothing reads is refused."""
    from accelerate import cpu_offload
    from accelerate.hooks import remove_hook_from_submodules

    model, dense = quantized(build(QWEN))
    away = cpu_offload(copy.deepcopy(model), torch.device("cpu"))
    away.save_pretrained(tmp_path / "a")
    same_weights(type(model).from_pretrained(tmp_path / "a"), dense)
    assert all(parameter.is_meta for parameter in away.parameters())
    remove_hook_from_submodules(away)
    with pytest.raises(CheckpointError, match="offloaded"):
        away.to("meta").save_pretrained(tmp_path / "no")


# -- offloading ------------------------------------------------------------------------


@models()
def test_a_model_is_offloaded_whole(name):
    """``enable_model_cpu_offload``."""
    latents = []
    for model in quantized(build(name, torch.bfloat16)):
        pipe = pipeline(model)
        pipe.enable_model_cpu_offload(device="cpu")
        latents.append(generate(pipe))
    close(*latents, torch.bfloat16)


def test_layers_are_not_offloaded_to_the_device_they_are_on():
    """``enable_sequential_cpu_offload`` to the CPU fails for dense models too."""
    for model in quantized(build(FLUX)):
        pipe = pipeline(model)
        pipe.enable_sequential_cpu_offload(device="cpu")
        with pytest.raises(TypeError, match="requires_grad"):
            generate(pipe)


# -- LoRA ------------------------------------------------------------------------------


def lora(model, seed, size=0.05, rank=4):
    """A LoRA of a model's attention, as a file of diffusers has it."""
    random = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, module in model.named_modules():
        if name.endswith((".to_q", ".to_v")):
            rows, columns = module.weight.shape
            down = torch.randn(rank, columns, generator=random) * size
            up = torch.randn(rows, rank, generator=random) * size
            tensors[f"transformer.{name}.lora_A.weight"] = down
            tensors[f"transformer.{name}.lora_B.weight"] = up
    return tensors


@pytest.mark.parametrize(
    ("name", "dtype"),
    [*((name, torch.float32) for name in CONFIGS), (FLUX, torch.bfloat16)],
)
def test_loras_have_the_effect_they_have_on_dense_models(name, dtype):
    """One, several, with weights, switched off and on; unloaded nothing has changed."""
    model, dense = quantized(build(name, dtype))
    tensors = lora(model, 1), lora(model, 2)
    before = generate(pipeline(model))
    data = {k: w.qdata.clone() for k, w in model.named_parameters() if is_ours(w)}
    latents = []
    for each in (model, dense):
        pipe = pipeline(each)
        pipe.load_lora_weights(dict(tensors[0]), adapter_name="a")
        found = [generate(pipe)]
        pipe.load_lora_weights(dict(tensors[1]), adapter_name="b")
        pipe.set_adapters(["a", "b"], [0.7, 0.4])
        found.append(generate(pipe))
        pipe.set_adapters("b")
        found.append(generate(pipe))
        pipe.disable_lora()
        found.append(generate(pipe))
        pipe.enable_lora()
        adapters = [p for n, p in each.named_parameters() if "lora_" in n]
        assert {p.dtype for p in adapters} == {dtype}
        latents.append(found)
        pipe.unload_lora_weights()
    for mine, theirs in zip(*latents, strict=True):
        close(mine, theirs, dtype)
    assert not torch.equal(latents[0][0], before)
    assert torch.equal(generate(pipeline(model)), before)
    now = {k: w.qdata for k, w in model.named_parameters() if is_ours(w)}
    assert now.keys() == data.keys()
    for key, tensor in data.items():
        assert torch.equal(tensor.view(torch.uint8), now[key].view(torch.uint8))


@pytest.mark.parametrize("scheme", ["nvfp4", "nf4", "int8"])
def test_loras_fit_loaded_models_of_any_format(tmp_path, scheme):
    """Also where the data have another shape than the weight."""
    model, dense = quantized(build(FLUX), scheme)
    model.save_pretrained(tmp_path)
    model = type(model).from_pretrained(tmp_path)
    before, latents = generate(pipeline(model)), []
    for each in (model, dense):
        pipe = pipeline(each)
        pipe.load_lora_weights(lora(dense, 1))
        latents.append(generate(pipe))
        pipe.unload_lora_weights()
    if scheme != "int8":  # which quantizes what it multiplies with
        close(*latents)
    assert not torch.equal(latents[0], before)
    assert torch.equal(generate(pipeline(model)), before)


def test_the_numbers_of_a_lora_are_kept():
    """They were rounded to FP8 when a weight said it was FP8."""
    model, _ = quantized(build(FLUX, torch.bfloat16))
    tensors = lora(model, 1, size=5e-4)
    pipe = pipeline(model)
    pipe.load_lora_weights(dict(tensors))
    loaded = dict(model.named_parameters())
    for key, tensor in tensors.items():
        name = key.removeprefix("transformer.").replace(".weight", ".default_0.weight")
        assert torch.equal(loaded[name], tensor.bfloat16())


def test_a_fused_lora_is_not_lost():
    """It has its effect, or it is refused and the model is as it was."""
    model, dense = quantized(build(FLUX))
    tensors = lora(model, 1)
    mine, theirs = pipeline(model), pipeline(dense)
    for pipe in (mine, theirs):
        pipe.load_lora_weights(dict(tensors))
    before = generate(mine)
    theirs.fuse_lora()
    with pytest.raises(ReadOnlyError, match="unwrap"):
        mine.fuse_lora()
    assert torch.equal(generate(mine), before)
    close(before, generate(theirs))
    hijack.unwrap(model)
    mine.fuse_lora()
    mine.unload_lora_weights()
    close(generate(mine), generate(theirs))
