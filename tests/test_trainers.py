"""Trainers of LoRAs: how they find layers, merge, and move weights, over any scheme.

musubi-tuner's own code runs where a checkout is (``HIJACK_TEST_MUSUBI``); what it and
others do to layers is done here in plain torch too.
"""

import copy
import importlib.util
import math
import os
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hijack
from hijack.errors import ReadOnlyError

VARIABLE = "HIJACK_TEST_MUSUBI"
SCHEMES = ["blockwise_fp8", "nvfp4", "mxfp4", "nf4", "int8", "w4a8", "convrot_w4a4"]
WIDTH = 256
#: Data that are packed are of another shape, which torch itself refuses to add to.
REFUSAL = r"unwrap|size of tensor"


class Block(nn.Module):
    """What trainers look for by the name of its class."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.up = nn.Linear(WIDTH, WIDTH, dtype=dtype)
        self.down = nn.Linear(WIDTH, WIDTH, dtype=dtype)

    def forward(self, x):
        return x + self.down(F.silu(self.up(x)))


class Base(nn.Module):
    def __init__(self, dtype=torch.float32, blocks=4):
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(dtype) for _ in range(blocks))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(params=SCHEMES)
def scheme(request):
    return request.param


def frozen(scheme, dtype=torch.float32):
    """The three lines that a trainer needs."""
    model = Base(dtype)
    model.requires_grad_(False)
    hijack.wrap_model(model, scheme)
    return model


def exact(model):
    return hijack.unwrap(copy.deepcopy(model)).requires_grad_(False)


def bits(model):
    return {
        key: tensor.detach().reshape(-1).view(torch.uint8).clone()
        for key, tensor in model.state_dict().items()
    }


def assert_same_bits(model, before):
    now = bits(model)
    assert now.keys() == before.keys()
    assert all(torch.equal(now[key], before[key]) for key in before)


def assert_close(got, wanted):
    assert len(got) == len(wanted) > 0
    for one, other in zip(got, wanted, strict=True):
        one, other = one.detach(), other.detach()
        scale = max(float(other.abs().max()), 1e-6)
        torch.testing.assert_close(one, other, rtol=0, atol=1e-4 * scale)


# -- as trainers do it -----------------------------------------------------------------


class Lora(nn.Module):
    """Takes the place of a layer's forward, as kohya's, musubi's and LyCORIS' do."""

    def __init__(self, layer):
        super().__init__()
        rows, columns = layer.weight.shape
        self.lora_down = nn.Linear(columns, 4, bias=False, dtype=layer.weight.dtype)
        self.lora_up = nn.Linear(4, rows, bias=False, dtype=layer.weight.dtype)
        self.org_forward = layer.forward
        layer.forward = self.forward

    def forward(self, x):
        return self.org_forward(x) + self.lora_up(self.lora_down(x))


def apply_loras(model):
    torch.manual_seed(1)
    named = [m for m in model.modules() if m.__class__.__name__ == "Linear"]
    return nn.ModuleList(Lora(layer) for layer in named)


def step(model, loras):
    torch.manual_seed(2)
    x = torch.randn(3, WIDTH)
    model(x).square().mean().backward()
    return [parameter.grad for parameter in loras.parameters()]


def test_layers_are_found_by_the_names_of_their_classes(scheme):
    """And by type, by dtype, and by what they have."""
    model = frozen(scheme, torch.bfloat16)
    layers = [m for m in model.modules() if m.__class__.__name__ == "Linear"]
    assert len(layers) == 8
    for layer in layers:
        assert isinstance(layer, nn.Linear)
        assert layer.weight.dtype == torch.bfloat16
        assert layer.weight.shape == (WIDTH, WIDTH) == tuple(layer.weight.data.shape)
        assert (layer.in_features, layer.out_features) == (WIDTH, WIDTH)
        assert not layer.weight.requires_grad
    assert next(model.parameters()).dtype == torch.bfloat16


@pytest.mark.parametrize("wrap_first", [True, False])
def test_gradients_of_a_lora(scheme, wrap_first):
    """They are those over the decoded model, whichever comes first."""
    if wrap_first:
        model = frozen(scheme)
        loras = apply_loras(model)
    else:
        model = Base().requires_grad_(False)
        loras = apply_loras(model)
        hijack.wrap_model(model, scheme)
    dense = exact(frozen(scheme))
    assert_close(step(model, loras), step(dense, apply_loras(dense)))


def test_a_merge_through_the_state_dict_is_refused(scheme):
    """Nothing changes, and the error says what to do."""
    model = frozen(scheme)
    layer, before = model.blocks[0].up, bits(model)

    def merge(dtype):
        state = layer.state_dict()
        merged = state["weight"].to(torch.float32) + torch.ones(WIDTH, WIDTH)
        state["weight"] = merged.to(dtype)
        layer.load_state_dict(state)

    for dtype in (torch.float32, layer.state_dict()["weight"].dtype):
        with pytest.raises((hijack.HijackError, RuntimeError), match=REFUSAL):
            merge(dtype)
    assert_same_bits(model, before)


def test_a_merge_into_the_weight_is_exact_or_asked_for(scheme):
    """Dense after ``hijack.unwrap``; rounded inside ``hijack.requantizing``."""
    model = frozen(scheme)
    layer = model.blocks[0].up
    delta = 0.01 * torch.randn(WIDTH, WIDTH)
    wanted = layer.weight + delta
    dense = hijack.unwrap(copy.deepcopy(layer))
    dense.weight.data += delta
    assert torch.equal(dense.weight, wanted)
    with pytest.raises(ReadOnlyError, match="requantizing"):
        layer.weight.data += delta
    with hijack.requantizing():
        layer.weight.data += delta
    off = (layer.weight - wanted).norm() / wanted.norm()
    assert 0 < off < 0.2
    quantized = hijack.wrap_module(dense, layer.weight.scheme, **layer.weight.options)
    assert_same_bits(layer, bits(quantized))


def test_a_weight_that_is_swapped_for_a_forward(scheme):
    """A trainer may put a dense weight with a gradient in its place for a while."""
    layer = frozen(scheme).blocks[0].up
    before, original = bits(layer), layer._parameters["weight"]
    diff = nn.Parameter(torch.zeros_like(layer.weight))
    x = torch.randn(2, WIDTH)
    layer._parameters["weight"] = original + diff
    out = layer(x)
    layer._parameters["weight"] = original
    out.sum().backward()
    torch.testing.assert_close(diff.grad, x.sum(0).expand(WIDTH, -1))
    assert_same_bits(layer, before)


def test_a_weight_that_bounces_between_devices(scheme):
    """An autograd function that moves the weight itself, and saves it."""

    class Bounce(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight, bias):
            ctx.save_for_backward(weight)
            return F.linear(x, weight.to("cpu", non_blocking=True), bias)

        @staticmethod
        def backward(ctx, gradient):
            (weight,) = ctx.saved_tensors
            return gradient @ weight.dequantize().to(gradient.dtype), None, None

    layer = frozen(scheme).blocks[0].up
    dense, x = exact(layer), torch.randn(2, WIDTH, requires_grad=True)
    results = []
    for one in (layer, dense):
        out = Bounce.apply(x, one.weight, one.bias)
        results.append((out, torch.autograd.grad(out.sum(), x)[0]))
    assert_close(*results)


# -- block swap ------------------------------------------------------------------------


def swap_by_buffers(one, other, buffers):
    """Exchange the weights of two blocks through two sets of buffers."""
    jobs = [
        (a, b, a.weight.data, b.weight.data)
        for a, b in zip(one.modules(), other.modules(), strict=True)
        if a.__class__.__name__.endswith("Linear")
    ]
    if not buffers:
        buffers += [
            [torch.empty_like(view, device="cpu") for _, _, view, _ in jobs]
            for _ in range(2)
        ]
    for first, second, (a, b, view, other_view) in zip(*buffers, jobs, strict=True):
        first.copy_(view.data, non_blocking=True)
        second.copy_(b.weight.data)
        view.copy_(second, non_blocking=True)
        other_view.copy_(first)
        b.weight.data = view
        a.weight.data = other_view


def swap_by_pinned(one, other, buffers):
    """Exchange them with buffers that become the weights."""
    jobs = [
        (a, b, a.weight.data, b.weight.data)
        for a, b in zip(one.modules(), other.modules(), strict=True)
        if a.__class__.__name__.endswith("Linear")
    ]
    if not buffers:
        buffers += [torch.empty_like(view, device="cpu") for _, _, view, _ in jobs]
    released = []
    for buffer, (a, b, view, other_view) in zip(buffers, jobs, strict=True):
        buffer.copy_(view, non_blocking=True)
        view.copy_(other_view)
        a.weight.data = buffer
        b.weight.data = view
        released.append(other_view)
    buffers[:] = released


@pytest.mark.parametrize("swap", [swap_by_buffers, swap_by_pinned])
def test_block_swap_is_exact(scheme, swap):
    """The forward and the backward of a step, and every bit afterwards.

    A buffer made like a weight is dense, and hands the quantized data on.
    """
    model = frozen(scheme, torch.bfloat16)
    before, blocks, buffers = bits(model), model.blocks, []
    for _ in range(3):
        swap(blocks[0], blocks[1], buffers)
        assert_same_bits(blocks[0], bits(blocks[0]))
    for _ in range(3):
        swap(blocks[1], blocks[0], buffers)
    assert_same_bits(model, before)


@pytest.mark.parametrize("swap", [swap_by_buffers, swap_by_pinned])
def test_gradients_while_blocks_are_swapped(swap):
    """The memory of a block holds another one's weights until its own backward."""
    model = frozen("blockwise_fp8")
    dense, buffers = exact(model), []
    x = torch.randn(2, WIDTH, requires_grad=True)
    (wanted,) = torch.autograd.grad(dense(x).square().sum(), x)
    first, second, third, fourth = model.blocks
    hidden = second(first(x))
    swap(first, third, buffers)
    middle = third(hidden)

    def back(gradient):
        swap(third, first, buffers)
        return gradient

    hidden.register_hook(back)  # when the third block's backward is done
    (got,) = torch.autograd.grad(fourth(middle).square().sum(), x)
    assert_close([got], [wanted])


def test_a_buffer_that_was_written_to_is_dense(scheme):
    """Then it is a dense weight, which is refused."""
    layer = frozen(scheme).blocks[0].up
    buffer = torch.empty_like(layer.weight)
    buffer.copy_(layer.weight)
    assert torch.equal(buffer, layer.weight.value())
    buffer.add_(1)
    for write in (
        lambda: layer.weight.data.copy_(buffer),
        lambda: setattr(layer.weight, "data", buffer),
    ):
        with pytest.raises(ReadOnlyError, match="unwrap"):
            write()
    buffer.fill_(2.0)
    assert torch.equal(buffer, torch.full_like(buffer, 2.0))


# -- musubi-tuner's own code -----------------------------------------------------------


def load(name, stubs=()):
    root = Path(os.environ.get(VARIABLE, "~/peers/musubi-tuner")).expanduser()
    path = root / "src/musubi_tuner" / name
    if not path.is_file():
        pytest.skip(f"needs a checkout of musubi-tuner; set {VARIABLE}")
    spec = importlib.util.spec_from_file_location(f"peer_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    fakes = {stub: mock.MagicMock(spec=types.ModuleType) for stub in stubs}
    with mock.patch.dict(sys.modules, {**fakes, spec.name: module}):
        if "transformers" in fakes:
            fakes["transformers"].CLIPTextModel = object
        spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def lora():
    return load("networks/lora.py", ["transformers"])


def network_over(lora, model):
    torch.manual_seed(1)
    network = lora.LoRANetwork(["Block"], "lora_unet", None, model, lora_dim=4)
    network.apply_to(None, model, False, True)
    for module in network.unet_loras:
        nn.init.normal_(module.lora_up.weight, std=1 / math.sqrt(WIDTH))
    return network


@pytest.mark.filterwarnings("ignore")
def test_musubis_network_trains_over_any_scheme(lora, scheme):
    """It finds every layer, and its gradients are those over the decoded model."""
    model = frozen(scheme)
    results = []
    for one in (model, exact(model)):
        network = network_over(lora, one)
        assert len(network.unet_loras) == 8
        results.append(step(one, network))
    assert_close(*results)


@pytest.mark.filterwarnings("ignore")
def test_musubis_merge_is_refused_or_exact(lora, scheme):
    """``merge_to`` over quantized layers is refused; after unwrap it is right."""
    model = frozen(scheme)
    dense, before = exact(model), bits(model)
    trained = network_over(lora, exact(model)).state_dict()
    torch.manual_seed(3)
    trained = {
        key: torch.tensor(4.0) if "alpha" in key else torch.randn_like(tensor) * 0.05
        for key, tensor in trained.items()
    }

    def merge(one):
        network = lora.create_network_from_weights(
            ["Block"], 1.0, trained, None, one, for_inference=True
        )
        network.merge_to(None, one, trained, torch.float32, torch.device("cpu"))

    with pytest.raises((hijack.HijackError, RuntimeError), match=REFUSAL):
        merge(model)
    assert_same_bits(model, before)
    merge(dense)
    hijack.unwrap(model)
    merge(model)
    x = torch.randn(2, WIDTH)
    torch.testing.assert_close(model(x), dense(x))


@pytest.mark.parametrize("pinned", [False, True])
def test_musubis_block_swap_is_exact(scheme, pinned):
    """By its own function for CUDA, run on the CPU."""
    swapping = load("modules/custom_offloading_utils.py")
    model = frozen(scheme, torch.bfloat16)
    before, device = bits(model), torch.device("cpu")
    offloader = swapping.Offloader("block", 4, 2, device, pinned)
    offloader.stream = mock.MagicMock()
    fakes = {name: mock.MagicMock() for name in ("Event", "stream", "current_stream")}
    with (
        mock.patch.multiple(torch.cuda, **fakes),
        mock.patch.object(
            torch.Tensor, "pin_memory", lambda tensor, device=None: tensor
        ),
    ):
        first, second = model.blocks[0], model.blocks[2]
        for there, back in ((first, second), (second, first)) * 3:
            offloader.swap_weight_devices_cuda(device, there, back)
    assert_same_bits(model, before)
