"""A quantized weight passes for the dense one: it computes as such, or refuses."""

import concurrent.futures
import copy
import gc
import io
import warnings
import weakref

import pytest
import torch
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn.utils import (
    parameters_to_vector,
    parametrize,
    prune,
    vector_to_parameters,
)

import hijack
from hijack.errors import CheckpointError, DTypeError, ReadOnlyError
from hijack.quantized import QuantizedTensor
from hijack.stored import StoredWeight


@pytest.fixture
def layer():
    """A small quantized Linear."""
    torch.manual_seed(0)
    return hijack.wrap_module(nn.Linear(128, 32), "blockwise_fp8")


@pytest.fixture
def dense(layer):
    """The same layer, dequantized."""
    return hijack.unwrap(copy.deepcopy(layer))


def data(tensor):
    """The bytes of a tensor."""
    return tensor.detach().contiguous().view(torch.uint8)


def test_a_layer_computes_in_the_dtype_of_its_dense_weight():
    """PEFT makes adapters of it, and trainers move it by casting."""
    layer = hijack.wrap_module(nn.Linear(64, 64).bfloat16(), "blockwise_fp8")
    assert layer.compute_dtype == torch.bfloat16
    assert layer.half().compute_dtype == torch.float16


# -- writes ----------------------------------------------------------------------------

WRITES = {
    "add_": lambda w: w.data.add_(1),
    "iadd": lambda w: w.data.__iadd__(torch.ones(128)),
    "copy_ of dense": lambda w: w.data.copy_(torch.ones(32, 128)),
    "data of dense": lambda w: setattr(w, "data", torch.ones(32, 128)),
    "item": lambda w: w.data.__setitem__(0, 1.0),
    "row": lambda w: w[0].add_(1),
    "chunk": lambda w: w.chunk(2)[0].add_(1),
    "split": lambda w: w.data.split(16)[0].zero_(),
    "unsafe chunk": lambda w: w.unsafe_chunk(2)[0].zero_(),
    "foreach of parts": lambda w: torch._foreach_add_(list(w.split(16)), 1.0),
    "strided": lambda w: w.as_strided((4,), (1,)).zero_(),
    "diagonal": lambda w: w.fill_diagonal_(0),
    "transposed": lambda w: w.t().zero_(),
    "row of transposed": lambda w: w.t()[0].mul_(2),
    "item of a row": lambda w: w.data[0].__setitem__(0, 1.0),
    "data of a row": lambda w: w[0].data.add_(1),
    "out": lambda w: torch.add(torch.ones(128), 1, out=w.detach()[0]),
    "init": nn.init.zeros_,
    "kaiming": nn.init.kaiming_uniform_,
    "foreach": lambda w: torch._foreach_add_([w.data], 1),
    "vector": lambda w: vector_to_parameters(torch.zeros(32 * 128), [w]),
    "training": lambda w: w.requires_grad_(),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_is_refused(layer, write):
    """Into the weight and into its views; the quantized data stay as they were."""
    before = data(layer.weight.qdata).clone()
    with pytest.raises(ReadOnlyError, match="unwrap"):
        write(layer.weight)
    assert torch.equal(data(layer.weight.qdata), before)


def test_an_operator_that_writes_shows_the_message(layer):
    """PEFT merges with ``weight.data += delta``; Python replaces TypeErrors."""
    with pytest.raises(ReadOnlyError, match="cannot write into a quantized"):
        layer.weight.data += torch.ones(32, 128)


def test_parts_that_are_read_are_plain_in_what_is_computed(layer, dense):
    """A view is read-only; its clone, and what is computed with it, are not."""
    row = layer.weight[0].clone()
    row.add_(1)
    assert type(row) is torch.Tensor
    assert type(layer.weight.t() @ torch.ones(32)) is torch.Tensor
    assert torch.equal(row, dense.weight[0] + 1)


# -- state dicts -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn], ids=str
)
def test_a_lora_merged_through_the_state_dict_is_refused(layer, dtype):
    """As kohya's and musubi-tuner's ``merge_to`` do it, in any dtype."""

    def merge():
        state = layer.state_dict()
        merged = state["weight"].to(torch.float32) + torch.ones(32, 128)
        state["weight"] = merged.to(dtype)
        layer.load_state_dict(state)

    before = data(layer.weight.qdata).clone()
    with pytest.raises(RuntimeError, match="unwrap"):
        merge()
    assert torch.equal(data(layer.weight.qdata), before)


def test_the_data_in_a_state_dict_can_be_decoded_by_hand(layer):
    """They are numbers like those in a file, as long as no module takes them."""
    state = layer.state_dict()
    scale = state["weight_scale"].float().repeat_interleave(64, 1)
    by_hand = state["weight"].float() * scale
    assert torch.equal(by_hand, layer.weight.dense(torch.float32))
    with pytest.raises(CheckpointError, match="unwrap"):
        torch.nn.functional.linear(torch.ones(2, 128), by_hand)


def test_data_of_integers_are_no_numbers_either():
    """int8 has arithmetic of its own, which FP8 lacks."""

    class Int8(hijack.Scheme):
        name = "int8_manners"

        def quantize(self, weight):
            scale = weight.abs().amax() / 127
            return (weight / scale).round().to(torch.int8), {"scale": scale}

        def dequantize(self, qdata, params, dtype):
            return (qdata * params["scale"]).to(dtype)

    layer = hijack.wrap_module(nn.Linear(64, 8), Int8())
    state = layer.state_dict()
    for compute in (
        lambda w: w + 1,
        lambda w: 1 - w,
        lambda w: w * 2,
        lambda w: w + torch.ones(64),
        lambda w: torch.ones(64).add(w),
        lambda w: w.float().add(1),
    ):
        changed = {**state, "weight": compute(state["weight"])}
        with pytest.raises(RuntimeError, match="unwrap"):
            layer.load_state_dict(changed)
    for write in (
        lambda w: w.float().add_(1),
        lambda w: torch.zeros(8, 64).copy_(w),
        lambda w: torch.zeros(8, 64).copy_(w.float()),
        lambda w: torch.zeros(8, 64).copy_(w.float() + 1),
        lambda w: w.copy_(torch.ones(8, 64)),
    ):
        with pytest.raises((hijack.HijackError, RuntimeError)):
            write(state["weight"])


def test_the_weight_of_a_state_dict_behaves_as_plain_data(layer):
    """Where it is moved, copied, compared, saved and loaded."""
    import safetensors.torch

    state, qdata = layer.state_dict(), layer.weight.qdata
    weight = state["weight"]
    assert isinstance(weight, StoredWeight)
    assert weight.dtype == qdata.dtype
    assert weight.data_ptr() == qdata.data_ptr()
    assert bool((weight == qdata).all())
    saved = safetensors.torch.load(safetensors.torch.save(state))["weight"]
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)["weight"]
    for plain in (saved, loaded, weight.view(torch.uint8), weight[:3]):
        assert type(plain) is torch.Tensor
    moved = (weight.clone(), weight.to("cpu"), weight.detach(), weight.data)
    for same in (saved, loaded, *moved, copy.deepcopy(state)["weight"]):
        assert torch.equal(data(same), data(qdata))
    assert all(isinstance(same, StoredWeight) for same in moved)
    with torch.no_grad():
        weight.copy_(torch.zeros_like(qdata))
    assert not layer.weight.value().any()


def test_a_distributed_checkpoint_of_one_process(layer, dense, tmp_path):
    """It is read by a quantized module, and refused by a dense one."""
    import torch.distributed.checkpoint as dcp

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # no process group is there, it says
        dcp.save(layer.state_dict(), checkpoint_id=tmp_path)
        other = hijack.wrap_module(nn.Linear(128, 32), "blockwise_fp8")
        state = dict(other.state_dict())
        dcp.load(state, checkpoint_id=tmp_path)
        with pytest.raises(dcp.CheckpointException, match="expected a dense weight"):
            dcp.load(nn.Linear(128, 32).state_dict(), checkpoint_id=tmp_path)
    other.load_state_dict(state)
    assert torch.equal(other.weight.dense(), dense.weight)


def test_data_do_not_become_the_weight_of_a_dense_module(layer):
    """Neither copied nor with the scales ignored."""
    with pytest.raises(RuntimeError, match="quantized"):
        nn.Linear(128, 32).load_state_dict(layer.state_dict(), strict=False)


def test_a_state_dict_made_before_a_change_restores(layer):
    """Its clone does not follow the module."""
    want = layer.weight.value()
    state = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    layer.reset_parameters()
    layer.load_state_dict(state)
    assert torch.equal(layer.weight.value(), want)


def test_a_buffer_that_was_written_to_is_no_copy_of_a_weight(layer):
    """Also through ``.data``, of whose writes torch keeps no count."""
    for write in (lambda b: b.add_(1), lambda b: b.data.add_(1)):
        buffer = torch.empty_like(layer.weight)
        buffer.copy_(layer.weight)
        layer.weight.data = buffer  # it is one: nothing changes
        write(buffer)
        with pytest.raises(hijack.HijackError, match="cannot write"):
            layer.weight.data = buffer


# -- what asks for no numbers ----------------------------------------------------------


def test_tensors_like_it_are_dense_and_nothing_is_decoded(layer, monkeypatch):
    """``zeros_like`` and the others ask for shape, dtype and device."""
    weight = layer.weight

    def decode(*_):
        raise AssertionError("decoded")

    monkeypatch.setattr(QuantizedTensor, "dense", decode)
    for like in (
        torch.zeros_like(weight),
        torch.empty_like(weight).fill_(1),
        torch.rand_like(weight, dtype=torch.float64),
        weight.new_ones(32, 128),
        weight.new_zeros((32, 128)),
        weight.new_full((32, 128), 2.0),
    ):
        assert type(like) is torch.Tensor
        assert like.shape == weight.shape
    assert weight.data_ptr() == weight.qdata.data_ptr()


def test_share_memory_shares_what_is_inside(layer):
    """Also the scales."""
    layer.share_memory()
    assert layer.weight.is_shared()
    assert all(t.is_shared() for t in layer.weight.plain_tensors().values())


# -- torch's tools ---------------------------------------------------------------------


def test_functional_call_takes_dense_quantized_and_stored_weights(layer, dense):
    """A state dict's weight decodes with its own scales, not with the module's."""
    x = torch.randn(3, 128)
    other = hijack.wrap_module(nn.Linear(128, 32), "blockwise_fp8")
    for module in (layer, other):
        for tensors in (
            layer.state_dict(),
            dict(layer.named_parameters()),
            dict(dense.named_parameters()),
        ):
            if module is other and "weight_scale" in tensors:
                del tensors["weight_scale"]
            got = functional_call(module, tensors, (x,))
            torch.testing.assert_close(got, dense(x), rtol=1e-5, atol=1e-5)
    with pytest.raises(hijack.HijackError, match="part of weight"):
        functional_call(other, {"weight_scale": torch.ones(32, 2)}, (x,))


def test_ensembles_run_with_the_decoded_weights(layer, dense):
    """``stack_module_state`` stacks dense weights, and ``vmap`` runs over them."""
    x = torch.randn(3, 128)
    params, buffers = stack_module_state([layer, layer])
    base = copy.deepcopy(layer).to("meta")

    def call(params, buffers):
        return functional_call(base, (params, buffers), (x,))

    assert torch.equal(vmap(call)(params, buffers)[1], dense(x))


def test_swap_tensors_swaps_with_quantized_and_dense(layer):
    """Type, numbers and quantized tensors change places."""
    other = hijack.wrap_module(nn.Linear(128, 32), "blockwise_fp8")
    plain = nn.Linear(128, 32)
    for second in (other, plain):
        first, wanted = layer.weight, second.weight.detach().clone() + 0
        second_wanted = layer.weight.detach() + 0
        torch.utils.swap_tensors(layer.weight, second.weight)
        assert layer.weight is first
        assert torch.equal(layer.weight + 0, wanted)
        assert torch.equal(second.weight + 0, second_wanted)


def test_swapping_on_conversion(layer, dense):
    """``torch.__future__`` can have torch swap parameters where it moves them."""
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        state = layer.state_dict()
        layer.to(torch.bfloat16).float().load_state_dict(state)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    assert torch.equal(layer.weight + 0, dense.weight)


def test_prune_parametrize_and_vectors_read_the_decoded_weight(layer, dense):
    """They register other tensors in place of the weight."""
    x, pruned, changed = torch.randn(3, 128), copy.deepcopy(layer), layer
    assert torch.equal(parameters_to_vector([layer.weight]), dense.weight.flatten())
    prune.random_unstructured(pruned, "weight", 0.0)
    assert torch.equal(pruned(x), dense(x))

    class Twice(nn.Module):
        def forward(self, weight):
            return weight * 2

    parametrize.register_parametrization(changed, "weight", Twice())
    assert torch.equal(
        changed(x), nn.functional.linear(x, dense.weight * 2, dense.bias)
    )
    assert "parametrizations.weight.original" in changed.state_dict()
    changed.to(torch.float64)
    assert "Linear" in repr(changed)


# -- moves -----------------------------------------------------------------------------


def test_moves_keep_weights_tied_and_no_old_ones():
    """Also with a function that stays, such as ``torch.clone``."""
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    hijack.wrap_model(model, "blockwise_fp8")
    first, seen = model[0].weight, []
    for _ in range(3):
        for move in (nn.Module.half, nn.Module.float, lambda m: m._apply(torch.clone)):
            move(model)
            assert model[0].weight is model[1].weight
            seen.append(weakref.ref(model[0].weight))
    model.to(torch.float64)
    gc.collect()
    assert first.dtype == torch.float32
    assert not any(ref() for ref in seen)


def test_a_cast_to_store_leaves_the_dtype(layer):
    """diffusers casts whole models to FP8 between their forwards."""
    layer.to(torch.float8_e4m3fn)
    assert layer.weight.dtype == torch.float32


def test_a_weight_on_meta_takes_its_own_data_back(layer):
    """As accelerate offloads to disk: by the type of the weight, cast to its dtype."""
    want, qdata = layer.weight + 0, layer.weight.qdata
    meta = type(layer.weight)(layer.weight.to("meta"), requires_grad=False).to("meta")
    assert meta.is_meta
    for given in (qdata, qdata.to(torch.float32), layer.state_dict()["weight"].float()):
        weight = type(meta)(given, requires_grad=False)
        assert isinstance(weight, nn.Parameter)
        assert torch.equal(weight + 0, want)
        assert type(weight.to("meta")) is type(meta)
    assert torch.equal(type(copy.deepcopy(meta))(qdata) + 0, want)
    with pytest.raises(DTypeError, match="not quantized data"):
        type(meta)(torch.randn(32, 128))
    with pytest.raises(DTypeError, match="alone"):
        QuantizedTensor(qdata, requires_grad=False)


# -- writes that are asked for ---------------------------------------------------------


@pytest.mark.parametrize(
    "scheme", ["blockwise_fp8", "nvfp4", "mxfp4", "nf4", "int8", "w4a8"]
)
def test_writes_that_are_asked_for_quantize_the_result(scheme):
    """As the layer was quantized, in the memory it has, with every way to write."""
    torch.manual_seed(0)
    delta = torch.randn(32, 256)
    writes = (
        lambda w: w.data.add_(delta),
        lambda w: w.detach().mul_(2),
        lambda w: w.copy_(delta),
        lambda w: setattr(w, "data", delta.clone()),
        nn.init.ones_,
        lambda w: torch.add(w.detach(), delta, out=w.detach()),
    )
    for write in writes:
        layer = hijack.wrap_module(nn.Linear(256, 32), scheme)
        plain = nn.Parameter(layer.weight.value())
        expected = nn.Linear(256, 32)
        with torch.no_grad():
            write(plain)
            expected.weight.copy_(plain)
        hijack.wrap_module(expected, scheme, **layer.weight.options)
        pointer = layer.weight.data_ptr()
        with hijack.requantizing(), torch.no_grad():
            write(layer.weight)
        assert layer.weight.data_ptr() == pointer
        assert torch.equal(layer.weight.value(), expected.weight.value())
    with pytest.raises(ReadOnlyError, match="requantizing"):
        layer.weight.data.add_(delta)


def test_what_cannot_be_asked_for_stays_refused(layer):
    """Parts, other shapes, what is no number, and other threads."""
    before = data(layer.weight.qdata).clone()
    with hijack.requantizing():
        for write in (
            lambda: layer.weight.data[0].add_(1),
            lambda: setattr(layer.weight, "data", torch.ones(3)),
            lambda: layer.weight.data.fill_(float("nan")),
            lambda: layer.weight.to("meta").data.add_(1),
        ):
            with pytest.raises(hijack.HijackError):
                write()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            done = pool.submit(layer.weight.data.add_, 1.0)
            assert isinstance(done.exception(), ReadOnlyError)
    assert torch.equal(data(layer.weight.qdata), before)
