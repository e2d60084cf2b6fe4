"""diffusers loads any file that hijack reads: folders, quantize on load, devices."""

import enum
import inspect
import json
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import hijack
from hijack.errors import HijackError
from hijack.hosts.checkpoint import read_weights
from hijack.hosts.config import HijackConfig
from tests.libraries.diffusers_models import (
    CONFIGS,
    build,
    folder_of,
    model_class,
    models,
    patched,  # noqa: F401
    quantized,
    quantized_layers,
    run,
    same_weights,
)

FLUX, QWEN = "FluxTransformer2DModel", "QwenImageTransformer2DModel"
FILE = "diffusion_pytorch_model.safetensors"
LAYERS = "*transformer_blocks.*"


def folder(model, path, dialect=None):
    """A folder with a quantized model's config and a file of hijack."""
    hijack.save(model, folder_of(model, path) / FILE, dialect)
    return path


def close(model, dense):
    """Whether two models compute the same but for the order of sums."""
    mine, theirs = run(model), run(dense)
    bound = 0.02 if model.dtype != torch.float32 else 1e-4
    assert (mine - theirs).abs().max() <= bound * theirs.abs().max()


# -- folders ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.float32) for name in CONFIGS),
        *((name, torch.bfloat16) for name in CONFIGS),
        (FLUX, torch.float16),
    ],
)
def test_a_folder_is_loaded_as_the_dense_one(tmp_path, name, dtype):
    """Without a word of hijack in its config; in any dtype the host is asked for."""
    model, dense = quantized(build(name))
    layers = quantized_layers(model)
    mine = folder(model, tmp_path / "quantized")
    theirs = folder_of(dense, tmp_path / "dense", dense.state_dict())
    kind = model_class(name)
    loaded = kind.from_pretrained(mine, torch_dtype=dtype)
    control = kind.from_pretrained(theirs, torch_dtype=dtype)
    assert quantized_layers(loaded) == layers
    assert loaded.dtype == control.dtype
    assert loaded.num_parameters() == control.num_parameters()
    assert loaded.get_memory_footprint() < control.get_memory_footprint()
    same_weights(loaded, control)
    if dtype != torch.float16:  # in which the random weights overflow
        close(loaded, control)


DIALECTS = [
    ("blockwise_fp8", "musubi"),
    ("tensor_fp8", "comfy_quant"),
    ("blockwise_fp8", "deepseek"),
    ("blockwise_fp8", "compressed_tensors"),
    ("blockwise_fp8", "torchao"),
    ("blockwise_fp8", "hijack"),
    ("int8", "comfy_quant"),
    ("int8", "compressed_tensors"),
    ("nvfp4", "comfy_quant"),
    ("nvfp4", "modelopt"),
    ("mxfp4", "compressed_tensors"),
    ("nf4", "bitsandbytes"),
]


@pytest.mark.parametrize(("scheme", "dialect"), DIALECTS)
def test_every_spelling_is_read(tmp_path, scheme, dialect):
    """And what is saved of it is read again, with the same bytes."""
    options = {"include": [LAYERS]}
    if scheme == "tensor_fp8":
        scheme, options["block_size"] = "blockwise_fp8", "tensor"
    model, dense = quantized(build(QWEN), scheme, **options)
    kind = model_class(QWEN)
    loaded = kind.from_pretrained(folder(model, tmp_path / "a", dialect))
    same_weights(loaded, dense)
    assert quantized_layers(loaded) == quantized_layers(model)
    loaded.save_pretrained(tmp_path / "b")
    again = kind.from_pretrained(tmp_path / "b")
    same_bytes(again, loaded)


def same_bytes(model, other):
    """Whether two models hold the same quantized data."""
    theirs = dict(other.named_parameters())
    for name, weight in model.named_parameters():
        if not hasattr(theirs[name], "qdata"):
            assert torch.equal(weight, theirs[name]), name
            continue
        parts = theirs[name].plain_tensors()
        for part, tensor in weight.plain_tensors().items():
            assert tensor.dtype == parts[part].dtype, (name, part)
            mine, other = (bytes_of(t) for t in (tensor, parts[part]))
            assert torch.equal(mine, other), (name, part)


def bytes_of(tensor):
    """What a tensor holds, as bytes."""
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def scaled_fp8(state):
    """A state dict as Kijai and ComfyUI scale it: FP8 with a scale a tensor."""
    found = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for key, tensor in state.items():
        found[key] = tensor
        if tensor.ndim == 2 and key.endswith(".to_q.weight"):
            scale = tensor.abs().max() / 448
            found[key] = (tensor / scale).to(torch.float8_e4m3fn)
            found[key.replace("weight", "scale_weight")] = scale.float()
    return found


@models()
def test_scaled_fp8_is_read(tmp_path, name):
    """``scale_weight`` beside FP8, and ``scaled_fp8``."""
    model = build(name)
    path = folder_of(model, tmp_path, scaled_fp8(model.state_dict()))
    loaded = model_class(name).from_pretrained(path)
    expected = read_weights(path / FILE)
    assert quantized_layers(loaded)
    for key, weight in loaded.named_parameters():
        given = expected[key]
        given = given.dense() if hasattr(given, "qdata") else given
        decoded = weight.dense() if hasattr(weight, "qdata") else weight
        assert torch.equal(decoded, given)


def test_a_scale_may_be_in_another_shard_than_its_weight(tmp_path):
    """All files of a folder are read as one."""
    model, dense = quantized(build(QWEN), include=[LAYERS])
    path = folder_of(model, tmp_path)
    hijack.save(model, tmp_path / "whole.safetensors", "musubi")
    with safe_open(tmp_path / "whole.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    places = {key: f"part-{1 + key.endswith('weight')}.safetensors" for key in tensors}
    for shard in set(places.values()):
        save_file({k: tensors[k] for k in tensors if places[k] == shard}, path / shard)
    index = {"metadata": {}, "weight_map": places}
    (path / f"{FILE}.index.json").write_text(json.dumps(index))
    (tmp_path / "whole.safetensors").unlink()
    same_weights(model_class(QWEN).from_pretrained(path), dense)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_model_that_has_memory_already_takes_quantized_weights(tmp_path, dtype):
    """``low_cpu_mem_usage=False``, where the host copies."""
    model, dense = quantized(build(QWEN))
    mine = folder(model, tmp_path / "quantized")
    theirs = folder_of(dense, tmp_path / "dense", dense.state_dict())
    how = {"torch_dtype": dtype, "low_cpu_mem_usage": False}
    loaded = model_class(QWEN).from_pretrained(mine, **how)
    assert quantized_layers(loaded) == quantized_layers(model)
    same_weights(loaded, model_class(QWEN).from_pretrained(theirs, **how))


PLACES = {
    "cpu": {"device_map": "cpu"},
    "auto": {"device_map": "auto"},
    "balanced": {"device_map": "balanced"},
}


@pytest.mark.parametrize("how", PLACES.values(), ids=PLACES)
def test_a_device_map_places_quantized_layers(tmp_path, how):
    """As it places dense ones."""
    model, dense = quantized(build(QWEN, torch.bfloat16))
    path = folder(model, tmp_path)
    loaded = model_class(QWEN).from_pretrained(path, torch_dtype=torch.bfloat16, **how)
    assert quantized_layers(loaded) == quantized_layers(model)
    close(loaded, dense)


@pytest.mark.parametrize("scheme", ["blockwise_fp8", "int8"])
def test_a_device_map_may_name_the_disk(tmp_path, scheme):
    """accelerate writes the quantized data, and reads them for each forward."""
    from accelerate.utils.offload import offload_weight

    if scheme == "blockwise_fp8" and "float8" not in inspect.getsource(offload_weight):
        pytest.skip("this accelerate writes no FP8 to the disk, of dense models either")
    model, dense = quantized(build(QWEN), scheme)
    names = ("time_text_embed", "txt_norm", "img_in", "txt_in", "norm_out", "proj_out")
    places = dict.fromkeys(names, "cpu")
    places |= {"transformer_blocks.0": "cpu", "transformer_blocks.1": "disk"}
    places["pos_embed"] = "cpu"
    loaded = model_class(QWEN).from_pretrained(
        folder(model, tmp_path / "model"),
        device_map=places,
        offload_folder=tmp_path / "offload",
    )
    block = loaded.transformer_blocks[1].attn.to_q
    assert block.weight.is_meta
    assert block.weight.numel() == 64 * 64
    close(loaded, model if scheme == "int8" else dense)


def test_a_scale_that_nobody_reads_is_refused(tmp_path):
    """The host would take FP8 data for weights."""
    model = build(QWEN)
    state = dict(model.state_dict())
    key = "transformer_blocks.0.attn.to_q.weight"
    state[key] = state[key].to(torch.float8_e4m3fn)
    state[key.replace("weight", "weight_mystery_scale")] = torch.ones(7)
    with pytest.raises(HijackError, match="scale"):
        model_class(QWEN).from_pretrained(folder_of(model, tmp_path, state))


OTHERS = {
    "UNet2DConditionModel": {
        "sample_size": 8,
        "block_out_channels": (16, 32),
        "layers_per_block": 1,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "cross_attention_dim": 32,
        "norm_num_groups": 8,
    },
    "AutoencoderKL": {"block_out_channels": (32,), "norm_num_groups": 8},
    "AutoencoderKLWan": {"base_dim": 8, "z_dim": 4, "num_res_blocks": 1},
    "PixArtTransformer2DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "num_layers": 1,
        "cross_attention_dim": 64,
        "sample_size": 8,
        "caption_channels": 64,
        "norm_num_groups": 8,
        "use_additional_conditions": False,
    },
    "LTXVideoTransformer3DModel": {
        "num_attention_heads": 2,
        "attention_head_dim": 32,
        "cross_attention_dim": 64,
        "num_layers": 1,
        "caption_channels": 64,
    },
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_models_are_saved_and_loaded(tmp_path, name):
    """No model is known by its name: convolutions and VAEs, too."""
    import diffusers

    model, dense = quantized(getattr(diffusers, name)(**OTHERS[name]).eval())
    assert quantized_layers(model)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert quantized_layers(loaded) == quantized_layers(model)
    same_weights(loaded, dense)


def test_padded_layers_are_cropped(tmp_path):
    """MXFP4 has groups of 32 columns, of which the model has 16."""
    model, dense = quantized(build(QWEN), "mxfp4", include=["img_in", LAYERS])
    kind = model_class(QWEN)
    for how in ({}, {"low_cpu_mem_usage": False}, {"ignore_mismatched_sizes": True}):
        loaded = kind.from_pretrained(folder(model, tmp_path), **how)
        (tmp_path / FILE).unlink()
        assert "img_in.weight" in quantized_layers(loaded)
        same_weights(loaded, dense)


def test_shards_are_read_in_parallel(tmp_path, monkeypatch):
    """With the host's own threads."""
    from diffusers.models import modeling_utils

    model, dense = quantized(build(QWEN))
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 3
    monkeypatch.setattr(modeling_utils, "HF_ENABLE_PARALLEL_LOADING", True)
    same_weights(model_class(QWEN).from_pretrained(tmp_path), dense)


@pytest.mark.parametrize("scheme", ["blockwise_fp8", "int8", "nvfp4", "nf4"])
def test_what_was_saved_is_a_file_of_hijack_too(tmp_path, scheme):
    """`hijack.load` reads it as it stands in the folder, with its config."""
    model, dense = quantized(build(QWEN), scheme, include=[LAYERS])
    model.save_pretrained(tmp_path)
    hijack.load(empty := build(QWEN, seed=1), tmp_path / FILE)
    same_weights(empty, dense)
    same_bytes(empty, model)


def test_pickled_weights_are_read(tmp_path):
    """``safe_serialization=False``, whose files have no header."""
    model, dense = quantized(build(QWEN), include=[LAYERS])
    model.save_pretrained(tmp_path, safe_serialization=False)
    same_weights(model_class(QWEN).from_pretrained(tmp_path), dense)


# -- quantize on load ------------------------------------------------------------------


@models()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_dense_folder_is_quantized_while_it_is_loaded(tmp_path, name, dtype):
    """As `wrap_model` does it with the weights that were loaded."""
    dense = build(name)
    path = folder_of(dense, tmp_path, dense.state_dict())
    kind = model_class(name)
    config = HijackConfig("blockwise_fp8", include="*", exclude=())
    loaded = kind.from_pretrained(path, torch_dtype=dtype, quantization_config=config)
    control = kind.from_pretrained(path, torch_dtype=dtype)
    report = hijack.wrap_model(control, "blockwise_fp8")
    assert quantized_layers(loaded) == [f"{layer}.weight" for layer in report.layers]
    same_bytes(loaded, control)
    close(loaded, control)


def test_the_layers_of_a_model_are_chosen_as_for_a_file(tmp_path):
    """The families' defaults, patterns, and options by name."""
    dense = build(QWEN)
    path = folder_of(dense, tmp_path, dense.state_dict())
    report = hijack.quantize_file(path / FILE, tmp_path / "q.safetensors", "int8")
    kind = model_class(QWEN)
    config = HijackConfig("int8")
    loaded = kind.from_pretrained(path, quantization_config=config)
    layers = {f"{layer}.weight" for layer in report.layers}
    assert set(quantized_layers(loaded)) == layers
    config = HijackConfig(
        "blockwise_fp8", include="*.attn.*", exclude=["*.to_q"], block_size=32
    )
    loaded = kind.from_pretrained(path, quantization_config=config)
    layers = quantized_layers(loaded)
    assert layers
    assert all(".attn." in layer and "to_q" not in layer for layer in layers)
    scale = loaded.transformer_blocks[0].attn.to_k.weight.params["weight_scale"]
    assert scale.shape == (64, 2)


def test_what_cannot_be_quantized_is_refused(tmp_path):
    """Before anything is read: a scheme or an option that does not exist."""
    dense = build(QWEN)
    path = folder_of(dense, tmp_path, dense.state_dict())
    for config in (HijackConfig("int9"), HijackConfig("int8", block="no")):
        with pytest.raises(HijackError, match=r"int9|block"):
            model_class(QWEN).from_pretrained(path, quantization_config=config)


def test_a_quantized_file_is_not_quantized_again(tmp_path):
    """It is refused, with what to do."""
    model, _ = quantized(build(QWEN))
    path = folder(model, tmp_path)
    config = HijackConfig("int8")
    with pytest.raises(HijackError, match="leave out the quantization_config"):
        model_class(QWEN).from_pretrained(path, quantization_config=config)


def test_a_quantized_file_is_not_quantized_by_others(tmp_path, monkeypatch):
    """A quantizer of the host's is not let loose on weights that are codes."""
    from diffusers.quantizers import auto, base

    class Method(str, enum.Enum):
        OTHER = "somebody"

    class Config(HijackConfig):
        def __init__(self, **how):
            super().__init__(**how)
            self.quant_method = Method.OTHER

    class Quantizer(base.DiffusersQuantizer):
        is_serializable = is_trainable = True

        def _process_model_before_weight_loading(self, model, **_):
            return model

        _process_model_after_weight_loading = _process_model_before_weight_loading

    monkeypatch.setitem(auto.AUTO_QUANTIZER_MAPPING, "somebody", Quantizer)
    dense = build(QWEN)
    path = folder_of(dense, tmp_path / "dense", dense.state_dict())
    found = model_class(QWEN).from_pretrained(path, quantization_config=Config())
    assert isinstance(found.hf_quantizer, Quantizer)
    model, _ = quantized(dense)
    path = folder(model, tmp_path / "quantized")
    with pytest.raises(HijackError, match="quantized already"):
        model_class(QWEN).from_pretrained(path, quantization_config=Config())


# -- without hijack, and without quantized data ----------------------------------------

ALONE = """
import sys, diffusers
try:
    diffusers.{name}.from_pretrained(sys.argv[1])
except ValueError as error:
    print("refused:", error)
assert "hijack" not in sys.modules
"""
BESIDE = """
import sys
{imports}
from tests.libraries.diffusers_models import quantized_layers
model = diffusers.{name}.from_pretrained(sys.argv[1])
print("layers:", len(quantized_layers(model)))
"""


def python(code, *arguments):
    """What a new process prints."""
    command = [sys.executable, "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_without_hijack_what_was_saved_is_refused(tmp_path):
    """Never loaded with data for weights."""
    model, _ = quantized(build(QWEN))
    model.save_pretrained(tmp_path)
    assert "refused: Unknown quantization type" in python(
        ALONE.format(name=QWEN), tmp_path
    )


@pytest.mark.parametrize("imports", ["hijack, diffusers", "diffusers, hijack"])
def test_hijack_may_be_imported_before_or_after(tmp_path, imports):
    """The host is patched in either order."""
    model, _ = quantized(build(QWEN))
    model.save_pretrained(tmp_path)
    code = BESIDE.format(imports=f"import {imports}", name=QWEN)
    assert f"layers: {len(quantized_layers(model))}" in python(code, tmp_path)


@models()
def test_dense_folders_are_left_to_the_host(tmp_path, name, monkeypatch):
    """Nothing but a header is read, and the weights are those without hijack."""
    dense = build(name)
    path = folder_of(dense, tmp_path, dense.state_dict())
    kind = model_class(name)
    read = []
    from hijack.hosts import checkpoint

    monkeypatch.setattr(checkpoint, "identify", lambda *a, **k: read.append(a))
    loaded = kind.from_pretrained(path)
    assert not read
    hijack.unpatch("diffusers", force=True)
    control = kind.from_pretrained(path)
    same_weights(loaded, control)
    assert torch.equal(run(loaded), run(control))
    assert type(next(loaded.parameters())) is torch.nn.Parameter


def test_plain_casts_are_the_hosts(tmp_path):
    """FP8 without any scale: the host casts it itself."""
    dense = build(QWEN)
    state = {k: t.to(torch.float8_e4m3fn) for k, t in dense.state_dict().items()}
    loaded = model_class(QWEN).from_pretrained(folder_of(dense, tmp_path, state))
    assert not quantized_layers(loaded)
    for key, weight in loaded.named_parameters():
        assert torch.equal(weight, state[key].float())


def test_every_model_is_tested():
    """In the newest release."""
    import diffusers

    if diffusers.__version__ < "0.36":
        pytest.skip("diffusers 0.35 has no Z-Image")
    assert all(hasattr(diffusers, name) for name in CONFIGS)


def test_a_config_without_a_scheme_quantizes_nothing_and_says_so(tmp_path):
    """Neither a dense folder nor options are taken without a word."""
    model = build("QwenImageTransformer2DModel")
    model.save_pretrained(tmp_path)
    with pytest.raises(hijack.HijackError, match="a scheme to quantize it with"):
        type(model).from_pretrained(tmp_path, quantization_config=HijackConfig())
    with pytest.raises(hijack.HijackError, match="block_size without a scheme"):
        HijackConfig(block_size=64)


def test_a_scheme_for_a_folder_that_is_quantized_is_refused(tmp_path):
    """What hijack saved, and what names another quantizer."""
    model = build("QwenImageTransformer2DModel")
    hijack.wrap_model(model, "blockwise_fp8", include="transformer_blocks.*")
    model.save_pretrained(tmp_path)
    with pytest.raises(hijack.HijackError, match="quantized already"):
        type(model).from_pretrained(tmp_path, quantization_config=HijackConfig("int8"))


def test_hijack_reads_what_names_a_quantizer_that_diffusers_has_not(tmp_path):
    """If it is asked to."""
    model = build("QwenImageTransformer2DModel")
    hijack.wrap_model(
        model, "blockwise_fp8", include="transformer_blocks.*", block_size="row"
    )
    name = "diffusion_pytorch_model.safetensors"
    hijack.save(model, tmp_path / name, "compressed_tensors")
    method = {"quant_method": "compressed-tensors"}
    config = {**model.config, "quantization_config": method}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="compressed-tensors"):
        type(model).from_pretrained(tmp_path)
    again = type(model).from_pretrained(tmp_path, quantization_config=HijackConfig())
    weight = again.transformer_blocks[0].attn.to_q.weight
    expected = model.transformer_blocks[0].attn.to_q.weight
    assert torch.equal(weight.dense(torch.float32), expected.dense(torch.float32))
