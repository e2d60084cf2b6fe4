"""diffusers converts quantized files of other names: scales travel with weights."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import hijack
from hijack.errors import HijackError
from hijack.hosts.checkpoint import TravellingWeight, read_weights
from hijack.hosts.config import HijackConfig
from hijack.quantized import QuantizedTensor
from tests.libraries.diffusers_models import (
    build,
    folder_of,
    model_class,
    models,
    original,
    patched,  # noqa: F401
    quantized_layers,
    run,
    same_weights,
    text_encoder,
)

SD3, WAN = "SD3Transformer2DModel", "WanTransformer3DModel"
QWEN, Z_IMAGE = "QwenImageTransformer2DModel", "ZImageTransformer2DModel"
CONVERTED = (SD3, QWEN, WAN, Z_IMAGE)
PREFIX = "model.diffusion_model."


def save(tensors, path):
    """A file of tensors that may be parts of others."""
    save_file({k: t.contiguous().clone() for k, t in tensors.items()}, path)
    return path


def scaled_fp8(state):
    """Linears as ComfyUI and Kijai scale them: FP8 with one scale a tensor."""
    found = {"scaled_fp8": torch.zeros(2, dtype=torch.float8_e4m3fn)}
    for key, tensor in state.items():
        found[key] = tensor
        if tensor.ndim == 2 and key.endswith("weight") and "embed" not in key:
            scale = tensor.abs().max() / 448
            found[key] = (tensor / scale).to(torch.float8_e4m3fn)
            found[key.replace("weight", "scale_weight")] = scale.float()
    return found


def quantized_file(state, path, how, exclude=("*embed*",)):
    """A state dict as a quantized file, and the same exactly dequantized."""
    if how == "scaled_fp8":
        save(scaled_fp8(state), path)
    else:
        dense = save(state, path.with_name("dense.safetensors"))
        scheme, _, block = how.partition(" ")
        block = {"block_size": block} if block else {}
        hijack.quantize_file(dense, path, scheme, include="*", exclude=exclude, **block)
    weights = read_weights(path)
    exact = {
        k: t.dense() if isinstance(t, QuantizedTensor) else t
        for k, t in weights.items()
    }
    return path, save(exact, path.with_name("exact.safetensors")), weights


FORMATS = [
    "scaled_fp8",
    "blockwise_fp8",
    "blockwise_fp8 tensor",
    "int8",
    "nvfp4",
    "nf4",
]
CASES = [(name, how) for name in (SD3, Z_IMAGE) for how in FORMATS]
CASES += [(name, how) for name in (QWEN, WAN) for how in FORMATS[:2]]  # only renamed


@pytest.mark.parametrize(("name", "how"), CASES)
def test_a_file_is_converted_as_the_dense_one(tmp_path, name, how):
    """Renamed, split and swapped; every layer that was quantized stays so."""
    model = build(name)
    prefix = "" if name == QWEN else PREFIX  # which the host does not remove there
    state = {prefix + k: t for k, t in original(name, model.state_dict()).items()}
    path, exact, weights = quantized_file(state, tmp_path / "q.safetensors", how)
    kind, config = model_class(name), str(folder_of(model, tmp_path))
    for dtype in (torch.bfloat16, torch.float32):
        given = {"config": config, "torch_dtype": dtype}
        loaded = kind.from_single_file(str(path), **given)
        control = kind.from_single_file(str(exact), **given)
        same_weights(loaded, control)
    rows = sum(len(w) for w in weights.values() if isinstance(w, TravellingWeight))
    kept = [p for p in loaded.parameters() if isinstance(p, QuantizedTensor)]
    assert sum(map(len, kept)) == rows
    if how != "int8":  # which quantizes what it multiplies with
        bound = 1e-4 * run(control).abs().max()
        assert (run(loaded) - run(control)).abs().max() <= bound


@models(*CONVERTED)
def test_the_original_names_are_right(tmp_path, name):
    """The dense file is the model: the tests above convert what they mean to."""
    model = build(name)
    path = save(original(name, model.state_dict()), tmp_path / "dense.safetensors")
    config = str(folder_of(model, tmp_path))
    same_weights(model_class(name).from_single_file(str(path), config=config), model)


def test_blocks_across_a_cut_are_decoded(tmp_path):
    """q, k and v of 64 rows, in blocks of 48: no part has scales of its own."""
    model = build(SD3)
    state = original(SD3, model.state_dict())
    how = "blockwise_fp8 48x32"
    path, exact, _ = quantized_file(state, tmp_path / "q.safetensors", how)
    kind, config = model_class(SD3), str(folder_of(model, tmp_path))
    loaded = kind.from_single_file(str(path), config=config)
    same_weights(loaded, kind.from_single_file(str(exact), config=config))
    kept = quantized_layers(loaded)
    assert "transformer_blocks.0.attn.to_q.weight" not in kept
    assert "transformer_blocks.0.ff.net.0.proj.weight" in kept
    weight = loaded.transformer_blocks[0].attn.to_q.weight
    assert type(weight) is torch.nn.Parameter
    weight.data.add_(1)  # it is the host's own


def test_a_state_dict_is_converted(tmp_path):
    """As a user loads it with safetensors, without the header."""
    model = build(SD3)
    state = original(SD3, model.state_dict())
    path, exact, _ = quantized_file(state, tmp_path / "q.safetensors", "scaled_fp8")
    kind, config = model_class(SD3), str(folder_of(model, tmp_path))
    loaded = kind.from_single_file(load_file(path), config=config)
    assert quantized_layers(loaded)
    same_weights(loaded, kind.from_single_file(str(exact), config=config))


def test_a_model_with_memory_gets_the_decoded_weights(tmp_path):
    """``low_cpu_mem_usage=False``, with which the host copies into dense layers."""
    model = build(SD3)
    state = original(SD3, model.state_dict())
    path, exact, _ = quantized_file(state, tmp_path / "q.safetensors", "nf4")
    how = {"config": str(folder_of(model, tmp_path)), "low_cpu_mem_usage": False}
    kind = model_class(SD3)
    loaded = kind.from_single_file(str(path), **how)
    same_weights(loaded, kind.from_single_file(str(exact), **how))


def test_a_dense_file_is_quantized_while_it_is_converted(tmp_path):
    """With the config that `from_pretrained` takes."""
    model = build(SD3)
    path = save(original(SD3, model.state_dict()), tmp_path / "dense.safetensors")
    kind, config = model_class(SD3), str(folder_of(model, tmp_path))
    how = HijackConfig("blockwise_fp8", include="*.attn.*", exclude=())
    loaded = kind.from_single_file(str(path), config=config, quantization_config=how)
    assert quantized_layers(loaded)
    hijack.wrap_model(model, "blockwise_fp8", include="*.attn.*")
    assert quantized_layers(loaded) == quantized_layers(model)
    same_weights(hijack.unwrap(loaded), hijack.unwrap(model))


def test_what_a_file_does_not_tell_is_asked_for(tmp_path):
    """Two scales for 384 rows are for 192 or 256; the config says which."""
    model = build(QWEN)
    state = dict(model.state_dict())
    layer = "transformer_blocks.0.img_mod.1"
    state[f"{layer}.weight"] = state[f"{layer}.weight"].to(torch.float8_e4m3fn)
    state[f"{layer}.weight_scale_inv"] = torch.tensor([[1.0], [2.0]])
    kind, folder = model_class(QWEN), folder_of(model, tmp_path / "model", state)
    path, config = save(state, tmp_path / "q.safetensors"), str(folder)
    for load in (
        lambda **how: kind.from_pretrained(folder, **how),
        lambda **how: kind.from_single_file(str(path), config=config, **how),
        lambda **how: kind.from_single_file(dict(state), config=config, **how),
    ):
        with pytest.raises(HijackError, match="256x64"):
            load()
        how = HijackConfig(assume=["256x64"])
        weight = load(quantization_config=how).get_submodule(layer).weight
        codes = state[f"{layer}.weight"].float()
        assert torch.equal(weight.dense()[:256], codes[:256])
        assert torch.equal(weight.dense()[256:], codes[256:] * 2)


def test_another_quantizer_reads_its_own_files(tmp_path):
    """hijack leaves a file alone that is loaded with a config which is not its own."""
    from hijack.hosts.diffusers import loading

    model, other, read = build(SD3), object(), []
    state = original(SD3, model.state_dict())
    path, _, _ = quantized_file(state, tmp_path / "q.safetensors", "scaled_fp8")
    load = loading.make_load_state_dict(load_file)
    kind = model_class(SD3)
    from_single_file = loading.make_from_single_file(
        lambda cls, path, **how: read.append(load(path))
    )
    for config in (other, HijackConfig()):
        from_single_file(kind, str(path), quantization_config=config)
    travels = [any(isinstance(t, TravellingWeight) for t in r.values()) for r in read]
    assert travels == [False, True]
    with pytest.raises(HijackError, match="HIJACK_DISABLE"):
        kind.from_single_file(read[1], quantization_config=other)


def test_a_scale_that_nobody_reads_is_refused(tmp_path):
    """The converter would leave it out, and take data for weights."""
    model = build(SD3)
    state = original(SD3, model.state_dict())
    key = "joint_blocks.0.x_block.attn.qkv.weight"
    state[key] = state[key].to(torch.float8_e4m3fn)
    state[key.replace("weight", "weight_mystery_scale")] = torch.ones(7)
    path = save(state, tmp_path / "q.safetensors")
    with pytest.raises(HijackError, match="scale"):
        model_class(SD3).from_single_file(
            str(path), config=str(folder_of(model, tmp_path))
        )


# -- converters that fix the sizes of models -------------------------------------------


def flux(columns=32):
    """Tensors of a Flux checkpoint with as many rows as its converter expects."""
    from tests.libraries.diffusers_models import noise

    rows = {
        **{f"{n}_in.in_layer": 64 for n in ("time", "vector", "guidance")},
        **{f"{n}_in.out_layer": 64 for n in ("time", "vector", "guidance")},
        **{"txt_in": 64, "img_in": 64, "final_layer.linear": 64},
        "final_layer.adaLN_modulation.1": 128,
        "single_blocks.0.linear1": 3 * 3072 + 12288,
        "single_blocks.0.linear2": 64,
        "single_blocks.0.modulation.lin": 96,
    }
    for part in ("img", "txt"):
        block = f"double_blocks.0.{part}"
        rows[f"{block}_mod.lin"] = rows[f"{block}_attn.qkv"] = 192
        rows[f"{block}_attn.proj"] = 64
        rows[f"{block}_mlp.0"] = rows[f"{block}_mlp.2"] = 64
    state = {f"{name}.weight": noise(count, columns) for name, count in rows.items()}
    state |= {f"{name}.bias": noise(count) for name, count in rows.items()}
    norms = ("double_blocks.0.img_attn", "double_blocks.0.txt_attn", "single_blocks.0")
    for name in norms:
        state |= {f"{name}.norm.{x}_norm.scale": noise(8) for x in ("query", "key")}
    return state


@pytest.mark.parametrize("how", ["scaled_fp8", "blockwise_fp8", "nvfp4", "nf4"])
def test_rows_of_given_sizes_are_split(tmp_path, how):
    """Flux: q, k, v and an MLP in one, and scale and shift swapped."""
    from diffusers.loaders import single_file_utils

    convert = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers
    columns = 64 if how == "nf4" else 32
    _, exact, weights = quantized_file(
        flux(columns), tmp_path / "q.safetensors", how, exclude=()
    )
    assert any(isinstance(w, TravellingWeight) for w in weights.values())
    converted, expected = convert(weights), convert(load_file(exact))
    assert converted.keys() == expected.keys()
    for key, tensor in converted.items():
        assert torch.equal(tensor + 0, expected[key]), key
    name = "single_transformer_blocks.0.proj_mlp.weight"
    assert isinstance(converted[name], TravellingWeight)
    assert isinstance(converted["norm_out.linear.weight"], TravellingWeight)


# -- every operation that a converter does ---------------------------------------------

OPERATIONS = {
    "chunk": lambda w: w.chunk(3, dim=0),
    "torch.chunk": lambda w: torch.chunk(w, 3, 0),
    "split": lambda w: torch.split(w, [32, 96, 64], dim=0),
    "split evenly": lambda w: torch.split(w, 96),
    "rows": lambda w: (w[:64, :], w[64:128, :], w[128:]),
    "rows copied": lambda w: w[64:128, :].clone().detach(),
    "cat of one": lambda w: torch.cat([w.chunk(3)[1]]),
    "swap": lambda w: torch.cat([*w.chunk(2)[::-1]], dim=0),
    "transpose": lambda w: w.T.contiguous(),
    "squeeze": lambda w: w.squeeze(),
    "unsqueeze": lambda w: w[:, :, None, None][:, :, 0, 0],
    "last of three": lambda w: w[:, :, None][:, :, 0],
    "reshape": lambda w: w.reshape(6, -1),
    "interleaved": lambda w: [
        part.flatten(0, 1) for part in w.unflatten(0, (2, 3, 32)).unbind(dim=1)
    ],
    "is zero": lambda w: torch.all(w == 0.0),
    "contiguous": lambda w: w.contiguous(),
    "bfloat16": lambda w: w.to(torch.bfloat16) + 0,
}
#: Those after which a weight is quantized still.
KEEPING = ("chunk", "torch.chunk", "split", "split evenly", "rows", "rows copied")
KEEPING += ("cat of one", "swap", "contiguous")


@pytest.mark.parametrize("scheme", ["blockwise_fp8", "int8", "nvfp4", "nf4", "mxfp4"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_an_operation_is_done_with_the_weight(tmp_path, scheme, operation):
    """Bit for bit as with the decoded one, and what can stay quantized does."""
    torch.manual_seed(0)
    layer = hijack.wrap_module(torch.nn.Linear(64, 192), scheme)
    model = torch.nn.ModuleDict({"layer": layer})
    hijack.save(model, tmp_path / "a.safetensors")
    weight = read_weights(tmp_path / "a.safetensors")["layer.weight"]
    dense = weight.dense()
    function = OPERATIONS[operation]
    done, expected = function(weight), function(dense)
    if isinstance(done, torch.Tensor):
        done, expected = [done], [expected]
    assert len(done) == len(expected)
    for mine, theirs in zip(done, expected, strict=True):
        assert mine.shape == theirs.shape
        assert torch.equal(mine, theirs)
        kept = isinstance(mine, TravellingWeight)
        assert kept or type(mine) is torch.Tensor
        if operation in KEEPING:
            assert kept


# -- text encoders of other libraries --------------------------------------------------


def test_text_encoders_in_a_file_are_quantized(tmp_path):
    """CLIP and T5 beside a model, which the host converts for transformers."""
    import transformers
    from diffusers.loaders import single_file_utils as host

    prefixes = {"clip": "text_encoders.clip_l.transformer.", "t5": "text_encoders."}
    prefixes["t5"] += "t5xxl.transformer."
    kinds = {"clip": transformers.CLIPTextModel, "t5": transformers.T5EncoderModel}
    dense, configs = {}, {}
    for kind, prefix in prefixes.items():
        encoder = text_encoder(kind)
        names = encoder.state_dict()
        wrapper = (
            "" if kind == "t5" or hasattr(encoder, "text_model") else "text_model."
        )
        dense |= {f"{prefix}{wrapper}{key}": t for key, t in names.items()}
        configs[kind] = str(tmp_path / kind)
        encoder.config.save_pretrained(configs[kind])
    path, exact, weights = quantized_file(
        dense, tmp_path / "q.safetensors", "scaled_fp8", exclude=()
    )
    assert any(isinstance(t, TravellingWeight) for t in weights.values())
    make = {
        "clip": host.create_diffusers_clip_model_from_ldm,
        "t5": host.create_diffusers_t5_model_from_checkpoint,
    }
    for kind, create in make.items():
        loaded, control = (
            create(
                kinds[kind], host.load_single_file_checkpoint(str(p)), "", configs[kind]
            )
            for p in (path, exact)
        )
        assert quantized_layers(loaded)
        same_weights(loaded, control)
