"""Which hooks are asked, in which order, whatever makes a module quantized."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import hijack
import schemes.blockwise_fp8
from tests.recording_plugin import ORDER, recording

PER_MODULE = list(ORDER)
LAYERS = {"first": nn.Linear, "second": nn.Conv1d}


def make():
    """Two layers that become quantized, and one that no scheme targets."""
    model = nn.ModuleDict(
        {
            "first": nn.Linear(8, 4),
            "norm": nn.LayerNorm(4),
            "second": nn.Conv1d(4, 4, 3),
        }
    )
    return model.requires_grad_(False)


@pytest.fixture
def recorder():
    """A recording plugin of a registry of its own, which is in force."""
    registry = hijack.create_registry()
    registry.add_plugin(schemes.blockwise_fp8, "blockwise_fp8")
    with hijack.use_registry(registry), recording() as recorder:
        recorder.asked.clear()
        yield recorder


@pytest.fixture
def wrapped(recorder):
    """A quantized model of which the recorder knows nothing."""
    model = make()
    hijack.wrap_model(model, "blockwise_fp8")
    recorder.asked.clear()
    return model


def of_each_module(recorder):
    """What was asked about each module, by kind; layers and classes are one."""
    names = {layer: layer for layer in LAYERS}
    names |= {kind.__name__: layer for layer, kind in LAYERS.items()}
    asked = {layer: [] for layer in LAYERS}
    for hook, about in recorder.calls():
        if about:
            asked[names[about]].append(hook)
    return asked


def hooks(recorder):
    """The hooks in the order they were asked."""
    return [hook for hook, _ in recorder.asked]


def by_file(recorder):
    """For each question for a scheme, whether a file decides."""
    return [a["header"] is not None for a in recorder.named("select_scheme")]


def test_wrap_module(recorder):
    """One module, decided by nobody but the caller."""
    hijack.wrap_module(nn.Linear(8, 4), "blockwise_fp8")
    assert recorder.calls() == [(hook, "Linear") for hook in PER_MODULE]
    assert by_file(recorder) == [False]
    chosen = {a["scheme"].name for _, a in recorder.asked if "scheme" in a}
    assert chosen == {"blockwise_fp8"}


def test_wrap_model(recorder):
    """Each target, the layers left out excepted."""
    model = make()
    hijack.wrap_model(model, "blockwise_fp8")
    assert of_each_module(recorder) == dict.fromkeys(LAYERS, PER_MODULE)
    assert by_file(recorder) == [False, False]
    recorder.asked.clear()
    hijack.wrap_model(make(), "blockwise_fp8", exclude="second")
    assert of_each_module(recorder) == {"first": PER_MODULE, "second": []}


def test_building(recorder):
    """Each target, when the context ends and names are known."""
    with hijack.building("blockwise_fp8"):
        model = make()
        assert recorder.calls() == []
    assert len(model) == 3
    assert of_each_module(recorder) == dict.fromkeys(LAYERS, PER_MODULE)
    assert by_file(recorder) == [False, False]


@pytest.mark.parametrize("kind", ["file", "state dict"])
def test_load(recorder, wrapped, tmp_path, kind):
    """The file once, then each layer that is quantized in it."""
    source = wrapped.state_dict()
    if kind == "file":
        source = tmp_path / "model.safetensors"
        hijack.save(wrapped, source)
    recorder.asked.clear()
    hijack.load(make(), source)
    assert recorder.calls()[0] == ("identify", "")
    assert hooks(recorder).count("identify") == 1
    assert of_each_module(recorder) == dict.fromkeys(LAYERS, PER_MODULE)
    assert by_file(recorder) == [True, True]


def test_loading_into_quantized_modules(recorder, wrapped, tmp_path):
    """Modules that are quantized have a forward, and are known; others are not."""
    hijack.save(wrapped, tmp_path / "model.safetensors")
    recorder.asked.clear()
    hijack.load(wrapped, tmp_path / "model.safetensors")
    assert hooks(recorder)[0] == "identify"
    assert of_each_module(recorder) == dict.fromkeys(LAYERS, PER_MODULE[:2])


def test_load_state_dict(recorder, wrapped):
    """torch's own: only the tensors are new."""
    state = copy.deepcopy(wrapped.state_dict())
    for assign in (False, True):
        recorder.asked.clear()
        wrapped.load_state_dict(state, assign=assign)
        assert of_each_module(recorder) == {key: ["create_params"] for key in LAYERS}
    recorder.asked.clear()
    wrapped.load_state_dict(make().state_dict())
    assert of_each_module(recorder) == {key: ["create_params"] for key in LAYERS}


def test_reset_parameters(recorder, wrapped):
    """Only the tensors are new."""
    wrapped["first"].reset_parameters()
    assert recorder.calls() == [("create_params", "Linear")]


def by_torch(model):
    """Through ``torch.save`` and ``torch.load``."""
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), by_torch]
)
def test_copies(recorder, wrapped, copied):
    """A copied or unpickled module is a new object; its tensors are there."""
    twin = copied(wrapped)
    assert twin["first"] is not wrapped["first"]
    assert of_each_module(recorder) == dict.fromkeys(LAYERS, PER_MODULE[2:])


def test_a_forward_of_its_own_is_not_replaced(recorder):
    """Of a class with a forward of its own nobody is asked for another."""

    class Twice(nn.Linear):
        def forward(self, input):
            return 2 * super().forward(input)

    hijack.wrap_module(Twice(8, 4), "blockwise_fp8")
    assert hooks(recorder) == ["select_scheme", "create_params", "init"]


def test_moving_running_and_saving_ask_nothing(recorder, wrapped, tmp_path):
    """Plugins decide; they do not run."""
    wrapped["first"](torch.zeros(1, 8))
    wrapped.half().float()
    hijack.save(wrapped, tmp_path / "model.safetensors")
    wrapped.state_dict()
    hijack.unwrap(wrapped)
    assert recorder.calls() == []


def test_plugins_are_asked_once_when_they_come(recorder):
    """For their schemes, and of hosts that were patched before."""
    registry = hijack.create_registry()
    registry.host_patched("toy", "1.0")
    with recording(registry) as late:
        assert sorted(late.calls()) == [
            ("host_patched", "toy"),
            ("register_schemes", ""),
        ]
