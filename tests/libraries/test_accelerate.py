"""accelerate: hooks, offloading, device maps and checkpoints of quantized models."""

import copy
import shutil
import tempfile
from pathlib import Path

import accelerate
import pytest
import torch
from accelerate.hooks import (
    AlignDevicesHook,
    add_hook_to_module,
    remove_hook_from_submodules,
)
from accelerate.utils import offload_weight
from safetensors.torch import load_file, save_file
from torch import nn

import hijack
from hijack.errors import CheckpointError, ModuleError
from hijack.testing import HostConformance

LAYERS = ["emb", "a", "b"]
TOKENS = torch.arange(16)[None]


def writes_fp8():
    """Whether accelerate can offload any FP8 tensor to disk, which 1.6 cannot."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            offload_weight(torch.zeros(2, dtype=torch.float8_e4m3fn), "w", folder, {})
        except TypeError:
            return False
    return True


OLD = not writes_fp8()


class Net(nn.Module):
    """An embedding and layers after it, the last of which stays dense."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(16, 64)
        self.a, self.b = nn.Linear(64, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 8)

    def forward(self, tokens):
        x = torch.relu(self.a(self.emb(tokens)))
        return self.head(torch.relu(self.b(x)))


def dense(dtype=torch.float32):
    torch.manual_seed(0)
    return Net().to(dtype)


def wrapped(**options):
    model = dense()
    hijack.wrap_model(model, "blockwise_fp8", include=LAYERS, **options)
    return model


def on_meta(build):
    with accelerate.init_empty_weights():
        model = Net()
    if build is wrapped:
        hijack.wrap_model(model, "blockwise_fp8", include=LAYERS)
    return model


@pytest.fixture
def want():
    with torch.no_grad():
        return wrapped()(TOKENS)


def out(model):
    with torch.no_grad():
        return model(TOKENS)


OFFLOADS = {
    "cpu": lambda model, folder: accelerate.cpu_offload(model, "cpu"),
    "disk": lambda model, folder: accelerate.disk_offload(model, folder, "cpu"),
}


@pytest.fixture(params=OFFLOADS)
def offload(request, tmp_path):
    if request.param == "disk" and OLD:
        pytest.skip("this accelerate writes no FP8 tensors to disk")
    return lambda model: OFFLOADS[request.param](model, tmp_path / "offload")


def test_a_wrapped_model_is_offloaded(offload, want):
    """To the CPU and to disk; each forward brings the quantized data back."""
    model = wrapped()
    offload(model)
    assert model.a.weight.is_meta
    torch.testing.assert_close(out(model), want)
    torch.testing.assert_close(out(model), want)


def test_a_dispatched_model_computes_where_its_parts_are(want, tmp_path):
    """With parts on the CPU and, where accelerate can, on disk."""
    devices = {"emb": "cpu", "a": "disk", "b": "cpu", "head": "disk"}
    if OLD:
        devices = dict.fromkeys(devices, "cpu")
    model = accelerate.dispatch_model(
        wrapped(), devices, offload_dir=tmp_path, force_hooks=True
    )
    torch.testing.assert_close(out(model), want)


@pytest.mark.parametrize("scheme", ["blockwise_fp8", "nvfp4", "int8"])
def test_hooks_that_keep_weights_in_place_may_be_first(scheme):
    """Layers are wrapped under the forwards that hooks have put over theirs."""
    plain = dense()
    hijack.wrap_model(plain, scheme, include=["a", "b"])
    model = dense()
    for child in model.children():
        add_hook_to_module(child, AlignDevicesHook("cpu", io_same_device=True))
    hijack.wrap_model(model, scheme, include=["a", "b"])
    torch.testing.assert_close(out(model), out(plain))


def test_what_would_miss_offloaded_weights_is_refused(offload, want, tmp_path):
    """Wrapping, unwrapping, saving and loading, with what to do first."""
    path = tmp_path / "model.safetensors"
    hijack.save(wrapped(), path)
    model, first = wrapped(), dense()
    offload(model)
    for refused in (
        lambda: hijack.unwrap(model),
        lambda: hijack.save(model, tmp_path / "other.safetensors"),
        lambda: hijack.load(model, path),
    ):
        with pytest.raises(ModuleError, match="remove_hook_from_submodules"):
            refused()
    shutil.rmtree(tmp_path / "offload", ignore_errors=True)
    offload(first)
    with pytest.raises(ModuleError, match="offloaded by hooks"):
        hijack.wrap_model(first, "blockwise_fp8")


def test_a_model_whose_hooks_are_removed_is_whole(offload, want, tmp_path):
    """It is saved, and becomes dense."""
    model, path = wrapped(), tmp_path / "model.safetensors"
    offload(model)
    remove_hook_from_submodules(model)
    hijack.save(model, path)
    for whole in (model, hijack.unwrap(copy.deepcopy(model))):
        torch.testing.assert_close(out(whole), want)
    again = dense()
    hijack.load(again, path)
    torch.testing.assert_close(out(again), want)


@pytest.mark.parametrize("dialect", ["musubi", "hijack"])
@pytest.mark.parametrize("build", [dense, wrapped])
@pytest.mark.parametrize("meta", [False, True])
@pytest.mark.parametrize("devices", [None, {"": "cpu"}, "disk"])
def test_checkpoints_load_quantized(dialect, build, meta, devices, want, tmp_path):
    """By accelerate's own function, into any model; codes are never weights."""
    if devices == "disk":
        if OLD:
            pytest.skip("this accelerate writes no FP8 tensors to disk")
        devices = {"emb": "cpu", "a": "disk", "b": "cpu", "head": "cpu"}
    path = tmp_path / "model.safetensors"
    hijack.save(wrapped(), path, dialect)
    model = accelerate.load_checkpoint_and_dispatch(
        on_meta(build) if meta else build(),
        str(path),
        device_map=devices,
        offload_folder=str(tmp_path / "offload"),
    )
    torch.testing.assert_close(out(model), want)
    assert type(model.a).__name__ == "Linear"


def test_data_of_another_kind_take_the_place_of_those_there(tmp_path):
    """e5m2 in a file for layers of e4m3."""
    other, path = wrapped(dtype=torch.float8_e5m2), tmp_path / "model.safetensors"
    hijack.save(other, path)
    model = accelerate.load_checkpoint_and_dispatch(
        wrapped(), str(path), device_map={"": "cpu"}
    )
    assert model.a.weight.qdata.dtype == torch.float8_e5m2
    torch.testing.assert_close(out(model), out(other))


def test_folders_and_shards_load_quantized(want, tmp_path):
    """As accelerate finds them: the file of a name, or an index."""
    whole, sharded = tmp_path / "whole", tmp_path / "sharded"
    for folder in (whole, sharded):
        folder.mkdir()
    save_file(dense().state_dict(), tmp_path / "dense.safetensors")
    hijack.quantize_file(
        tmp_path / "dense.safetensors", whole / "model.safetensors", include=LAYERS
    )
    hijack.quantize_file(
        tmp_path / "dense.safetensors",
        sharded / "model.safetensors",
        include=LAYERS,
        max_shard_size="10KB",
    )
    for folder in (whole, sharded):
        model = accelerate.load_checkpoint_and_dispatch(
            dense(), str(folder), device_map={"": "cpu"}
        )
        torch.testing.assert_close(out(model), want)
        assert model.a.weight.qdata.element_size() == 1


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, "bfloat16"])
def test_the_dtype_is_that_asked_for_or_the_models(dtype, tmp_path):
    """Dense parameters are cast as accelerate casts them; quantized data never."""
    path = tmp_path / "model.safetensors"
    hijack.save(wrapped(), path)
    model = dense(torch.float16)
    accelerate.load_checkpoint_in_model(model, str(path), {"": "cpu"}, dtype=dtype)
    expected = torch.float16 if dtype is None else torch.bfloat16
    assert {p.dtype for p in model.parameters()} == {expected}
    assert model.a.weight.qdata.dtype == torch.float8_e4m3fn


def test_files_say_that_they_are_torchs(tmp_path):
    """accelerate refuses those that say something else of themselves."""
    from safetensors import safe_open

    path = tmp_path / "model.safetensors"
    hijack.save(wrapped(), path)
    converted, source = tmp_path / "converted.safetensors", tmp_path / "s.safetensors"
    hijack.convert_file(path, converted, dialect="hijack")
    save_file(dense().state_dict(), source)
    quantized = tmp_path / "quantized.safetensors"
    hijack.quantize_file(source, quantized)
    for file in (path, converted, quantized):
        with safe_open(file, "pt") as reader:
            assert reader.metadata()["format"] == "pt"


def test_a_stale_offload_folder_is_refused(tmp_path):
    """accelerate would take the old weights out of it."""
    path, folder = tmp_path / "model.safetensors", tmp_path / "offload"
    hijack.save(wrapped(), path)
    folder.mkdir()
    Path(folder, "index.json").write_text("{}")
    with pytest.raises(CheckpointError, match="empty offload_folder"):
        accelerate.load_checkpoint_and_dispatch(
            dense(), str(path), device_map={"": "disk"}, offload_folder=str(folder)
        )


def test_a_dense_checkpoint_loads_as_without_hijack(tmp_path):
    """Bit for bit, and through accelerate's own code."""
    path = tmp_path / "model.safetensors"
    save_file(dense().state_dict(), path)
    model = accelerate.load_checkpoint_and_dispatch(
        on_meta(dense), str(path), device_map={"": "cpu"}
    )
    for key, tensor in load_file(path).items():
        assert torch.equal(model.state_dict()[key], tensor)


def test_prepared_models_train_and_save(want, tmp_path):
    """By ``Accelerator``, with the quantized layers frozen."""
    accelerator = accelerate.Accelerator(cpu=True)
    model = wrapped()
    optimizer = torch.optim.SGD(model.head.parameters(), 0.1)
    model, optimizer = accelerator.prepare(model, optimizer)
    accelerator.backward(model(TOKENS).sum())
    optimizer.step()
    accelerator.save_model(model, tmp_path)
    again = accelerate.load_checkpoint_and_dispatch(
        dense(), str(tmp_path), device_map={"": "cpu"}
    )
    torch.testing.assert_close(out(again), out(model))


class TestAdapter(HostConformance):
    """The adapter leaves accelerate as it found it."""

    adapter = "hijack.hosts.accelerate"
    use = """
import tempfile
import accelerate, torch
from safetensors.torch import save_file
torch.manual_seed(0)
model = torch.nn.Linear(8, 8)
with tempfile.TemporaryDirectory() as folder:
    save_file(model.state_dict(), f"{folder}/model.safetensors")
    with accelerate.init_empty_weights():
        empty = torch.nn.Linear(8, 8)
    loaded = accelerate.load_checkpoint_and_dispatch(
        empty, folder, device_map={"": "cpu"}
    )
    result = loaded(torch.ones(1, 8))
"""


def test_pickled_files_with_quantized_layers_are_refused(tmp_path):
    """Their data would be taken for weights."""
    model = hijack.wrap_module(nn.Linear(64, 64), "blockwise_fp8")
    hijack.save(model, tmp_path / "model.safetensors", "musubi")
    tensors = load_file(tmp_path / "model.safetensors")
    (tmp_path / "model.safetensors").unlink()
    torch.save(tensors, tmp_path / "pytorch_model.bin")
    with pytest.raises(hijack.HijackError, match="expected safetensors"):
        accelerate.load_checkpoint_in_model(nn.Linear(64, 64), tmp_path)
