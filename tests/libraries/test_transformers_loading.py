"""``from_pretrained`` of transformers, with files that hijack reads or makes."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hijack
from hijack.errors import (
    CheckpointError,
    HijackError,
    NonFiniteError,
    UnconsumedScaleError,
)
from hijack.hosts.config import HijackConfig
from hijack.modules import Wrapped, quantized_weight
from hijack.quantized import QuantizedTensor
from tests.libraries import transformers_models as models

BF16 = torch.bfloat16
FP8 = {"scheme": "blockwise_fp8", "block_size": 32}
NAMES = ("llama", "qwen3", "qwen3-moe", "deepseek-v3", "qwen2.5-vl", "t5", "clip")


def quantized_layers(model: Any) -> list[str]:
    return [name for name, part in model.named_modules() if isinstance(part, Wrapped)]


def dense_weights(model: Any) -> dict[str, torch.Tensor]:
    return dict(models.dense_copy(model).named_parameters())


def assert_same_weights(model: Any, expected: Any) -> None:
    """Compare all parameters, decoded, bit for bit."""
    found, wanted = dense_weights(model), dict(expected.named_parameters())
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        assert torch.equal(found[name], weight), name


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """What saves a tiny model with the host itself, and gives it and its folder."""

    def save(name: str, **more: Any) -> tuple[Any, Path]:
        model = models.build(name, **more)
        folder = tmp_path / f"dense-{name}"
        model.save_pretrained(folder)
        return model, folder

    return save


def quantize_folder(
    source: Path, target: Path, scheme: str, dialect: str | None, **options: Any
) -> None:
    """The files of a model as a program that writes a dialect would write them."""
    target.mkdir()
    shutil.copy(source / "config.json", target)
    hijack.quantize_file(
        source / "model.safetensors",
        target / "model.safetensors",
        scheme,
        dialect=dialect,
        **options,
    )


#: scheme, dialect and options of files that other programs write.
FILES = {
    "finegrained FP8": (
        "blockwise_fp8",
        "deepseek",
        {"block_size": 32, "write_config": True},
    ),
    "compressed-tensors FP8": (
        "blockwise_fp8",
        "compressed_tensors",
        {"write_config": True},
    ),
    "compressed-tensors INT8": ("int8", "compressed_tensors", {"write_config": True}),
    "bitsandbytes NF4": ("nf4", "bitsandbytes", {}),
    "musubi": ("blockwise_fp8", "musubi", {"block_size": 64}),
    "ComfyUI": ("int8", "comfy_quant", {}),
    "hijack": ("blockwise_fp8", "hijack", {"block_size": 32}),
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *((name, kind) for name in ("llama", "qwen2.5-vl") for kind in FILES),
        ("t5", "musubi"),
        ("t5", "ComfyUI"),
        ("clip", "hijack"),
    ],
)
def test_files_stay_quantized(
    name: str, kind: str, saved: Any, tmp_path: Path, recwarn: Any
) -> None:
    """A file of any program is loaded as the dequantized file, and stays quantized."""
    scheme, dialect, options = FILES[kind]
    model, folder = saved(name)
    quantize_folder(folder, tmp_path / "q", scheme, dialect, **options)
    found = type(model).from_pretrained(
        tmp_path / "q", dtype=BF16, quantization_config=HijackConfig()
    )
    decoded = tmp_path / "decoded"
    shutil.copytree(folder, decoded)
    tensors = {
        key: tensor.value() if hasattr(tensor, "value") else tensor
        for key, tensor in hijack.hosts.checkpoint.read_weights(
            tmp_path / "q" / "model.safetensors", dtype=BF16
        ).items()
    }
    save_file(tensors, decoded / "model.safetensors", {"format": "pt"})
    expected = type(model).from_pretrained(decoded, dtype=BF16)
    assert len(quantized_layers(found)) >= 8
    assert_same_weights(found, expected)


@pytest.mark.parametrize("name", NAMES)
def test_finegrained_fp8_equals_the_hosts_own(
    name: str, saved: Any, tmp_path: Path
) -> None:
    """FineGrainedFP8 kept quantized equals what the host dequantizes on the CPU."""
    model, folder = saved(name)
    quantize_folder(
        folder,
        tmp_path / "q",
        "blockwise_fp8",
        "deepseek",
        block_size=32,
        write_config=True,
    )
    kind = type(model)
    own = kind.from_pretrained(tmp_path / "q", dtype=BF16)
    found = kind.from_pretrained(
        tmp_path / "q", dtype=BF16, quantization_config=HijackConfig()
    )
    if quantized_layers(own):
        pytest.skip("transformers refuses FP8 on the CPU before 5")
    assert_same_weights(found, own)
    assert torch.equal(models.output(found), models.output(own))


@pytest.mark.parametrize(
    "kind", ["compressed-tensors FP8", "compressed-tensors INT8", "bitsandbytes NF4"]
)
def test_takes_over_where_the_host_refuses(
    kind: str, saved: Any, tmp_path: Path, caplog: Any
) -> None:
    """A file whose own quantizer does not work here is read without being asked to."""
    scheme, dialect, options = FILES[kind]
    model, folder = saved("llama")
    quantize_folder(folder, tmp_path / "q", scheme, dialect, **options)
    if kind == "bitsandbytes NF4":
        table = {
            "quant_method": "bitsandbytes",
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
        }
        models.edit_config(tmp_path / "q", quantization_config=table)
    with caplog.at_level("WARNING", "hijack"):
        found = type(model).from_pretrained(tmp_path / "q", dtype=BF16)
    assert len(quantized_layers(found)) == 14
    assert "transformers cannot use quant_method" in caplog.text
    assert found.config.quantization_config.quant_method == "hijack"


def test_the_hosts_reason_is_told_where_hijack_cannot_read(
    saved: Any, tmp_path: Path
) -> None:
    """Where neither reads a file, the error is the host's own."""
    model, folder = saved("llama")
    table = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    models.edit_config(folder, quantization_config=table)
    with pytest.raises(ImportError, match="bitsandbytes"):
        type(model).from_pretrained(folder)


@pytest.mark.parametrize("kind", ["musubi", "ComfyUI", "hijack"])
def test_a_folder_that_says_nothing(kind: str, saved: Any, tmp_path: Path) -> None:
    """A quantized file beside a config without quantization_config is recognised."""
    scheme, dialect, options = FILES[kind]
    model, folder = saved("qwen3")
    quantize_folder(folder, tmp_path / "q", scheme, dialect, **options)
    table = json.loads((tmp_path / "q" / "config.json").read_text())
    assert "quantization_config" not in table
    found = type(model).from_pretrained(tmp_path / "q", dtype=BF16)
    assert len(quantized_layers(found)) == 14
    assert found.is_quantized
    assert found.hf_quantizer is not None


def test_shards_and_other_arguments(saved: Any, tmp_path: Path) -> None:
    """Shards, the base class, an AutoModel, a given config and a state dict agree."""
    model, folder = saved("llama")
    quantized = type(model).from_pretrained(
        folder, dtype=BF16, quantization_config=dict(FP8, quant_method="hijack")
    )
    quantized.save_pretrained(tmp_path / "q", max_shard_size="20KB")
    assert len(list((tmp_path / "q").glob("*.safetensors"))) > 2
    expected = models.output(quantized)
    kind = type(model)
    config = copy.deepcopy(model.config)
    for found in (
        kind.from_pretrained(tmp_path / "q", dtype=BF16),
        AutoModelForCausalLM.from_pretrained(tmp_path / "q", dtype=BF16),
        kind.from_pretrained(tmp_path / "q", dtype=BF16, config=config),
        kind.from_pretrained(
            None, config=config, state_dict=quantized.state_dict(), dtype=BF16
        ),
    ):
        assert len(quantized_layers(found)) == 14
        assert torch.equal(models.output(found), expected)
    base = type(model.model).from_pretrained(tmp_path / "q", dtype=BF16)
    assert torch.equal(models.output(base), models.output(quantized.model))


def test_a_file_is_mapped_and_may_be_replaced(saved: Any, tmp_path: Path) -> None:
    """Quantized data are not copied, and saving into their own folder is safe."""
    model, folder = saved("llama")
    config = HijackConfig(**FP8)
    quantized = type(model).from_pretrained(
        folder, dtype=BF16, quantization_config=config
    )
    quantized.save_pretrained(tmp_path / "q")
    found = type(model).from_pretrained(tmp_path / "q", dtype=BF16)
    file = (tmp_path / "q" / "model.hijack.safetensors").stat()
    data = found.model.layers[0].mlp.up_proj.weight.qdata
    assert data.untyped_storage().nbytes() == file.st_size
    found.save_pretrained(tmp_path / "q")
    assert torch.equal(models.output(found), models.output(quantized))
    again = type(model).from_pretrained(tmp_path / "q", dtype=BF16)
    assert torch.equal(models.output(again), models.output(quantized))


def test_the_dtype_is_that_of_dense_tensors(saved: Any, tmp_path: Path) -> None:
    """Where no config says a dtype, it is not that of the codes or of the scales."""
    model, folder = saved("llama")
    quantize_folder(folder, tmp_path / "q", "blockwise_fp8", "deepseek", block_size=32)
    models.edit_config(tmp_path / "q", dtype=None, torch_dtype=None)
    found = type(model).from_pretrained(tmp_path / "q", dtype="auto")
    assert found.dtype == BF16


def test_scales_nobody_reads_are_refused(saved: Any, tmp_path: Path) -> None:
    """A file with scales that no scheme reads is not loaded without them."""
    model, folder = saved("llama")
    quantize_folder(folder, tmp_path / "q", "blockwise_fp8", "musubi", block_size=64)
    models.rewrite(
        tmp_path / "q",
        lambda tensors: {
            key.replace("scale_weight", "scale_of_somebody"): tensor
            for key, tensor in tensors.items()
        },
    )
    with pytest.raises((UnconsumedScaleError, CheckpointError)):
        type(model).from_pretrained(tmp_path / "q")


# -- quantizing while loading ----------------------------------------------------------


@pytest.mark.parametrize("name", models.MODELS)
def test_quantize_while_loading(name: str, saved: Any) -> None:
    """A dense model is quantized with the project's defaults, and computes so."""
    model, folder = saved(name)
    found = type(model).from_pretrained(
        folder, dtype=BF16, quantization_config=HijackConfig(**FP8)
    )
    layers = quantized_layers(found)
    assert len(layers) >= 8
    kept = ("embed", "norm", "lm_head", "bias", "router", "mlp.gate.")
    assert not [layer for layer in layers if any(word in f"{layer}." for word in kept)]
    assert "shared" not in layers
    expected = models.dense_copy(found)
    assert torch.equal(models.output(found), models.output(expected))
    assert not torch.equal(models.output(found), models.output(model))


def test_which_layers_and_options(saved: Any) -> None:
    """include, exclude, rules and options choose as they do for files."""
    model, folder = saved("llama")
    config = HijackConfig(
        "blockwise_fp8",
        include="*.layers.*",
        exclude=["*.k_proj"],
        rules=["*.layers.0.mlp.down_proj=skip", "*.mlp=16x16"],
        block_size=32,
    )
    found = type(model).from_pretrained(folder, dtype=BF16, quantization_config=config)
    blocks = {
        name: weight.scheme.block_size(weight.qdata, weight.params)
        for name, part in found.named_modules()
        if (weight := quantized_weight(part)) is not None
    }
    assert "model.layers.0.self_attn.k_proj" not in blocks
    assert "model.layers.0.mlp.down_proj" not in blocks
    assert blocks["model.layers.1.mlp.down_proj"] == (16, 16)
    assert blocks["model.layers.0.self_attn.q_proj"] == (1, 32)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (HijackConfig("nobody"), "unknown scheme"),
        (HijackConfig("blockwise_fp8", blok_size=3), "has no option"),
        (HijackConfig("blockwise_fp8", include="nothing*"), "matches no layer"),
        (HijackConfig(), "without any quantized layer"),
    ],
)
def test_what_cannot_be_is_refused(
    config: HijackConfig, words: str, saved: Any
) -> None:
    """A scheme, an option or a pattern that does not exist is refused."""
    model, folder = saved("llama")
    with pytest.raises(HijackError, match=words):
        type(model).from_pretrained(folder, quantization_config=config)


def test_a_layer_that_cannot_be_quantized_is_named(saved: Any) -> None:
    """The error is hijack's, whatever the host makes of it."""
    model, folder = saved("llama")

    def spoil(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = float("nan")
        return tensors

    models.rewrite(folder, spoil)
    with pytest.raises(NonFiniteError, match=r"model\.layers\.1\.mlp\.up_proj"):
        type(model).from_pretrained(
            folder, dtype=BF16, quantization_config=HijackConfig("int8")
        )


def test_quantizing_twice_is_refused(saved: Any, tmp_path: Path) -> None:
    """A scheme for a file that is quantized already is refused."""
    model, folder = saved("llama")
    quantize_folder(folder, tmp_path / "q", "blockwise_fp8", None, block_size=32)
    with pytest.raises(CheckpointError, match="quantized already"):
        type(model).from_pretrained(
            tmp_path / "q", quantization_config=HijackConfig("int8")
        )


def test_quantized_files_are_not_quantized_by_others(
    saved: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    """A quantizer of the host's is not let loose on weights that are codes."""
    from transformers.quantizers import auto, base
    from transformers.utils.quantization_config import QuantizationConfigMixin

    class Config(QuantizationConfigMixin):
        quant_method = "somebody"

    class Quantizer(base.HfQuantizer):
        is_trainable = True

        def is_serializable(self, *args: Any) -> bool:
            return True

        def _process_model_before_weight_loading(self, model: Any, **_: Any) -> Any:
            return model

        _process_model_after_weight_loading = _process_model_before_weight_loading

    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "somebody", Quantizer)
    model, folder = saved("llama")
    found = type(model).from_pretrained(folder, quantization_config=Config("somebody"))
    assert isinstance(found.hf_quantizer, Quantizer)
    quantize_folder(folder, tmp_path / "q", "blockwise_fp8", None, block_size=32)
    with pytest.raises(CheckpointError, match="quantized already"):
        type(model).from_pretrained(
            tmp_path / "q", quantization_config=Config("somebody")
        )


# -- where weights go ------------------------------------------------------------------


@pytest.mark.parametrize("place", ["cpu", "auto", "disk"])
@pytest.mark.parametrize("dense", [False, True], ids=["quantized", "dense"])
def test_device_maps(place: str, dense: bool, saved: Any, tmp_path: Path) -> None:
    """A device map places quantized layers, on the disk too, and saves them again."""
    accelerate = pytest.importorskip("accelerate")
    if place == "disk" and accelerate.__version__.startswith("1.6."):
        pytest.skip("accelerate 1.6 writes no FP8 tensor to the disk")
    model, folder = saved("llama")
    kind, config = type(model), HijackConfig(**FP8)
    expected = kind.from_pretrained(folder, dtype=BF16, quantization_config=config)
    if not dense:
        folder, config = tmp_path / "q", None
        expected.save_pretrained(folder)
    device_map: Any = place
    if place == "disk":
        parts = ("embed_tokens", "layers.0", "norm", "rotary_emb")
        device_map = {f"model.{part}": "cpu" for part in parts}
        device_map |= {"model.layers.1": "disk", "lm_head": "disk"}
    arguments = {} if config is None else {"quantization_config": config}
    found = kind.from_pretrained(
        folder,
        dtype=BF16,
        device_map=device_map,
        offload_folder=tmp_path / "offload",
        **arguments,
    )
    assert quantized_layers(found) == quantized_layers(expected)
    assert torch.equal(models.output(found), models.output(expected))
    with pytest.warns() if place == "disk" else _nothing():
        found.save_pretrained(tmp_path / "again")
    again = kind.from_pretrained(tmp_path / "again", dtype=BF16)
    assert torch.equal(models.output(again), models.output(expected))


def test_experts_on_the_disk(saved: Any, tmp_path: Path, caplog: Any) -> None:
    """Stacked experts that are to be on the disk are decoded, and the log says so."""
    accelerate = pytest.importorskip("accelerate")
    if accelerate.__version__.startswith("1.6."):
        pytest.skip("accelerate 1.6 writes no FP8 tensor to the disk")
    model, folder = saved("qwen3-moe")
    quantize_folder(folder, tmp_path / "q", "blockwise_fp8", None, block_size=32)
    expected = type(model).from_pretrained(tmp_path / "q", dtype=BF16)
    device_map = {"": "cpu", "model.layers.1": "disk"}
    with caplog.at_level("INFO", "hijack"):
        found = type(model).from_pretrained(
            tmp_path / "q",
            dtype=BF16,
            device_map=device_map,
            offload_folder=tmp_path / "offload",
        )
    assert "model.layers.1.mlp.experts.down_proj is decoded" in caplog.text
    assert "layers.0" not in caplog.text
    assert torch.equal(models.output(found), models.output(expected))


def _nothing() -> Any:
    import contextlib

    return contextlib.nullcontext()


# -- inert -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", models.MODELS)
def test_dense_models_are_the_hosts_own(name: str, saved: Any, tmp_path: Path) -> None:
    """A dense model is loaded and saved as without hijack, byte for byte."""
    model, folder = saved(name)
    found = type(model).from_pretrained(folder, dtype=BF16)
    assert not hasattr(found, "hf_quantizer") or found.hf_quantizer is None
    assert torch.equal(models.output(found), models.output(model))
    found.save_pretrained(tmp_path / "again")
    names = sorted(path.name for path in folder.iterdir())
    assert sorted(path.name for path in (tmp_path / "again").iterdir()) == names
    hijack.hosts.unpatch("transformers", force=True)
    try:
        own = type(model).from_pretrained(folder, dtype=BF16)
        own.save_pretrained(tmp_path / "own")
    finally:
        hijack.hosts.patch("transformers")
    for path in (tmp_path / "own").iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()


def test_plain_tensors_of_other_dtypes_are_the_hosts_own(
    saved: Any, tmp_path: Path
) -> None:
    """A file with integers that are no weights is not looked at twice."""
    model, folder = saved("clip")
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors["text_model.embeddings.position_ids"] = torch.arange(32)[None]
    save_file(tensors, file, {"format": "pt"})
    found = type(model).from_pretrained(folder, dtype=BF16)
    assert torch.equal(models.output(found), models.output(model))


# -- experts ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "kind"),
    [*(("qwen3-moe", kind) for kind in FILES), ("deepseek-v3", "finegrained FP8")],
)
def test_experts_stay_quantized(
    name: str, kind: str, saved: Any, tmp_path: Path, caplog: Any
) -> None:
    """Experts that the host merges stay quantized, and are saved as they were read."""
    scheme, dialect, options = FILES[kind]
    model, folder = saved(name)
    quantize_folder(folder, tmp_path / "q", scheme, dialect, **options)
    with caplog.at_level("INFO", "hijack"):
        found = type(model).from_pretrained(
            tmp_path / "q", dtype=BF16, quantization_config=HijackConfig()
        )
    parts = {
        key: parameter
        for key, parameter in found.named_parameters()
        if ".experts." in key
    }
    assert parts
    for key, parameter in parts.items():
        assert isinstance(parameter, QuantizedTensor), key
    assert "is decoded" not in caplog.text
    assert found.get_memory_footprint() < 0.8 * model.get_memory_footprint()
    found.save_pretrained(tmp_path / "again")
    source = load_file(tmp_path / "q" / "model.safetensors")
    again = load_file(tmp_path / "again" / "model.hijack.safetensors")
    assert again.keys() == source.keys()
    for key in source:
        if ".experts." in key:
            assert torch.equal(_bytes(again[key]), _bytes(source[key])), key
    read = type(model).from_pretrained(tmp_path / "again", dtype=BF16)
    assert_same_weights(read, models.dense_copy(found))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


@pytest.mark.parametrize("experts", ["eager", "grouped_mm", "batched_mm"])
def test_implementations_of_experts(experts: str, saved: Any, tmp_path: Path) -> None:
    """Every implementation computes with stacked experts as with decoded ones."""
    model, folder = saved("qwen3-moe")
    quantize_folder(folder, tmp_path / "q", "blockwise_fp8", None, block_size=32)
    kind = type(model)
    if not hasattr(kind, "get_experts_implementation"):
        pytest.skip("transformers has one implementation of experts before 5")
    found = kind.from_pretrained(
        tmp_path / "q", dtype=BF16, experts_implementation=experts
    )
    expected = models.dense_copy(found)
    assert torch.equal(models.output(found), models.output(expected))
    for dtype in (torch.float32, BF16):
        cast = copy.deepcopy(found).to(dtype)
        assert cast.dtype == dtype
        decoded = models.dense_copy(cast)
        assert torch.equal(models.output(cast), models.output(decoded))


def _as_mxfp4(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Experts as gpt-oss is published: transposed, packed, in two tensors."""
    scheme = hijack.schemes()["mxfp4"]
    packed = dict(tensors)
    for key, tensor in tensors.items():
        if key.endswith(("experts.gate_up_proj", "experts.down_proj")):
            del packed[key]
            parts = [scheme.quantize(expert.t()) for expert in tensor]
            scales = torch.stack([params["weight_scale"] for _, params in parts])
            codes = torch.stack([qdata for qdata, _ in parts])
            packed[f"{key}_blocks"] = codes.reshape(*scales.shape, 16)
            packed[f"{key}_scales"] = scales
    return packed


def test_experts_in_mxfp4(saved: Any, tmp_path: Path) -> None:
    """MXFP4 experts stay quantized, equal to the host's own decoding, and are saved."""
    model, folder = saved("gpt-oss")
    models.rewrite(folder, _as_mxfp4)
    models.edit_config(folder, quantization_config={"quant_method": "mxfp4"})
    kind = type(model)
    own = kind.from_pretrained(folder, dtype=BF16)  # which decodes them on the CPU
    found = kind.from_pretrained(folder, dtype=BF16, quantization_config=HijackConfig())
    experts = found.model.layers[1].mlp.experts
    for parameter in (experts.gate_up_proj, experts.down_proj):
        assert parameter.qdata.dtype == torch.uint8
        assert parameter.shape[0] == 4
    assert found.get_memory_footprint() < 0.8 * model.get_memory_footprint()
    assert_same_weights(found, own)
    assert torch.equal(models.output(found), models.output(own))
    ids = models.tokens()
    arguments = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    arguments["attention_mask"] = torch.ones_like(ids)
    assert torch.equal(found.generate(ids, **arguments), own.generate(ids, **arguments))
    found.save_pretrained(tmp_path / "again")
    source = load_file(folder / "model.safetensors")
    again = load_file(tmp_path / "again" / "model.hijack.safetensors")
    assert again.keys() == source.keys()
    for key, tensor in source.items():
        if key.endswith(("_blocks", "_scales")):
            assert torch.equal(again[key], tensor), key
    read = kind.from_pretrained(tmp_path / "again", dtype=BF16)
    assert torch.equal(models.output(read), models.output(own))


def test_experts_in_mxfp4_without_a_word(saved: Any) -> None:
    """MXFP4 experts beside a config that does not say so are recognised."""
    model, folder = saved("gpt-oss")
    models.rewrite(folder, _as_mxfp4)
    found = type(model).from_pretrained(folder, dtype=BF16)
    assert isinstance(found.model.layers[0].mlp.experts.down_proj, QuantizedTensor)
    assert torch.equal(models.output(found), models.output(models.dense_copy(found)))


def test_a_pickled_file_is_read_as_its_tensors_say(saved: Any) -> None:
    """Quantized data in ``pytorch_model.bin`` are no weights either."""
    model, folder = saved("llama")
    hijack.wrap_model(model, "blockwise_fp8", include="*_proj", block_size=32)
    hijack.save(model, folder / "quantized.safetensors", "musubi")
    tensors = load_file(folder / "quantized.safetensors")
    (folder / "quantized.safetensors").unlink()
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin")
    found = type(model).from_pretrained(folder, dtype=model.dtype)
    assert quantized_layers(found) == quantized_layers(model)
    assert_same_weights(found, models.dense_copy(model))
