"""What diffusers does with the layers of a model, it does with quantized ones."""

import copy

import pytest
import torch

import hijack
from hijack.quantized import QuantizedTensor
from tests.libraries.diffusers_models import (
    CONFIGS,
    build,
    forward,
    model_class,
    models,
    noise,
    patched,  # noqa: F401
    quantized,
    quantized_layers,
    run,
    same_weights,
)

FLUX, QWEN = "FluxTransformer2DModel", "QwenImageTransformer2DModel"
SD3, WAN = "SD3Transformer2DModel", "WanTransformer3DModel"
CPU = torch.device("cpu")


def close(model, dense, bound=0.02):
    """Whether two models compute the same but for the order of sums."""
    mine, theirs = run(model), run(dense)
    assert theirs.isfinite().all()
    assert (mine - theirs).abs().max() <= bound * theirs.abs().max()


@models()
def test_layerwise_casting_leaves_quantized_layers_as_they_are(name):
    """They are small already; what is dense beside them is cast as in a dense model."""
    model, dense = quantized(build(name, torch.bfloat16))
    data = {k: w.qdata for k, w in model.named_parameters() if hasattr(w, "qdata")}
    how = {"storage_dtype": torch.float8_e4m3fn, "compute_dtype": torch.bfloat16}
    model.enable_layerwise_casting(**how)
    assert model.dtype == torch.bfloat16
    stored = dict(model.named_parameters())
    assert torch.float8_e4m3fn in {p.dtype for p in stored.values()}
    assert all(stored[key].qdata is tensor for key, tensor in data.items())
    control = copy.deepcopy(dense)
    with torch.no_grad():
        for key, parameter in control.named_parameters():
            if key not in data:
                parameter.copy_(stored[key].to(torch.bfloat16))
    close(model, control)
    hijack.unwrap(model)
    for key in data:
        assert torch.equal(model.get_parameter(key), control.get_parameter(key))


OFFLOADS = {
    "blocks": {"offload_type": "block_level", "num_blocks_per_group": 1},
    "leaves": {"offload_type": "leaf_level"},
}


@models(FLUX, WAN)
@pytest.mark.parametrize("how", OFFLOADS)
@pytest.mark.parametrize("place", ["memory", "disk"])
def test_groups_are_offloaded(tmp_path, name, how, place):
    """From memory and from the disk, for more than one forward."""
    import diffusers

    if diffusers.__version__ < "0.36":
        pytest.skip("diffusers 0.35 offloads groups only where there is an accelerator")
    model, dense = quantized(build(name, torch.bfloat16))
    expected = copy.deepcopy(model)
    path = {"offload_to_disk_path": str(tmp_path)} if place == "disk" else {}
    model.enable_group_offload(CPU, CPU, **OFFLOADS[how], **path)
    for _ in range(2):
        close(model, dense)
    assert bool(list(tmp_path.iterdir())) == (place == "disk")
    assert quantized_layers(model) == quantized_layers(expected)
    assert all(w.device == CPU for w in model.parameters())


@models(FLUX, SD3, WAN, QWEN)
def test_projections_are_fused(name):
    """Into one layer that computes the same, and back."""
    kind, config = model_class(name), dict(CONFIGS[name])
    if not hasattr(kind, "fuse_qkv_projections"):
        pytest.skip(f"this {name} has no fused projections")
    config.pop("dual_attention_layers", None)  # with which SD3 fails dense, too
    torch.manual_seed(0)
    model, dense = quantized(kind(**config).eval())
    for each in (model, dense):
        each.fuse_qkv_projections()
    close(model, dense, 1e-4)
    for each in (model, dense):
        each.unfuse_qkv_projections()
    close(model, dense, 1e-4)


@models(FLUX, QWEN, WAN, "ZImageTransformer2DModel")
def test_blocks_are_compiled(name):
    """``compile_repeated_blocks``, whole: no graph breaks at a quantized layer."""
    model, dense = quantized(build(name))
    model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
    close(model, dense, 1e-4)


@models()
def test_gradients_pass_through_with_checkpointing(name):
    """Those of what is dense beside quantized layers, as in the dense model."""
    gradients = []
    for model in quantized(build(name)):
        model.train()
        model.enable_gradient_checkpointing()
        for parameter in model.parameters():
            vector = parameter.ndim == 1 and not isinstance(parameter, QuantizedTensor)
            parameter.requires_grad_(vector)
        output = forward(model, torch.float32)
        (output * noise(*output.shape)).sum().backward()
        gradients.append(
            {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        )
    mine, theirs = gradients
    assert mine.keys() == theirs.keys()
    assert theirs
    for key, gradient in theirs.items():
        bound = 1e-3 * gradient.abs().max() + 1e-6
        assert (mine[key] - gradient).abs().max() <= bound, key


@models(FLUX, WAN)
def test_a_model_is_cast(name):
    """``to``, ``half`` and ``float``, also of one that `from_pretrained` has loaded."""
    model, dense = quantized(build(name))
    for cast in ("bfloat16", "half", "float"):
        expected = getattr(copy.deepcopy(dense), cast)()
        mine = getattr(copy.deepcopy(model), cast)()
        same_weights(mine, expected)
        assert mine.dtype == expected.dtype
    model.bfloat16()
    close(model, copy.deepcopy(dense).bfloat16())


def test_a_loaded_model_may_be_cast(tmp_path):
    """The host refuses that of what its own quantizers have made."""
    model, dense = quantized(build(QWEN))
    model.save_pretrained(tmp_path)
    loaded = model_class(QWEN).from_pretrained(tmp_path)
    loaded.to(torch.bfloat16)
    same_weights(loaded, dense.to(torch.bfloat16))


@models()
def test_a_model_is_counted(name):
    """All weights, and the bytes that they take."""
    model, dense = quantized(build(name, torch.bfloat16))
    assert model.num_parameters() == dense.num_parameters()
    quantized_bytes = sum(
        part.nbytes
        for weight in model.parameters()
        for part in (
            weight.plain_tensors().values()
            if isinstance(weight, QuantizedTensor)
            else [weight]
        )
    )
    buffers = sum(buffer.nbytes for buffer in model.buffers())
    assert model.get_memory_footprint() == quantized_bytes + buffers
    assert model.get_memory_footprint(return_buffers=False) == quantized_bytes
    assert model.get_memory_footprint() < 0.6 * dense.get_memory_footprint()
    same_weights(hijack.unwrap(model), dense)


@models(FLUX, SD3)
def test_a_file_of_hijack_is_loaded_into_an_empty_model(tmp_path, name):
    """`hijack.load`, into what accelerate makes without memory."""
    from accelerate import init_empty_weights

    model, dense = quantized(build(name))
    hijack.save(model, tmp_path / "model.safetensors")
    with init_empty_weights():
        empty = model_class(name)(**CONFIGS[name])
    hijack.load(empty, tmp_path / "model.safetensors")
    close(empty.eval(), dense, 1e-4)
