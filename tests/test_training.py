"""Training with a frozen quantized base: gradients, and what autograd keeps."""

import copy
import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, jvp, vmap
from torch.utils.checkpoint import checkpoint

import hijack
from hijack.errors import ReadOnlyError

WIDTH, LAYERS = 128, 6
BLOCK = {"block_size": [1, 64]}


class Base(nn.Module):
    """Frozen layers with an adapter between each and the next."""

    def __init__(self, dtype=torch.float32, checkpointed=None):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Linear(WIDTH, WIDTH, dtype=dtype) for _ in range(LAYERS)]
        self.layers = nn.ModuleList(layers).requires_grad_(False)
        self.scales = nn.Parameter(torch.full((LAYERS, WIDTH), 0.1, dtype=dtype))
        self.checkpointed = checkpointed

    def block(self, index, x):
        return x + F.silu(self.layers[index](x * self.scales[index]))

    def forward(self, x):
        for index in range(LAYERS):
            if self.checkpointed is None:
                x = self.block(index, x)
            else:
                x = self.checkpointed(self.block, index, x)
        return x


@pytest.fixture(params=["blockwise_fp8", "nvfp4", "nf4", "int8"])
def scheme(request):
    return request.param


def pair(scheme="blockwise_fp8", dtype=torch.float32, **kwargs):
    """A wrapped model, and a dense one with the same numbers."""
    model = Base(dtype, **kwargs)
    hijack.wrap_model(model, scheme)
    dense = hijack.unwrap(copy.deepcopy(model))
    dense.layers.requires_grad_(False)
    return model, dense


def gradients(model, call=None, dtype=torch.float32):
    """Of the adapters and of the input."""
    torch.manual_seed(1)
    x = torch.randn(4, WIDTH, dtype=dtype, requires_grad=True)
    model.zero_grad()
    out = (model if call is None else call)(x)
    (out.float() ** 2).mean().backward()
    return model.scales.grad.clone(), x.grad


def assert_close(got, wanted, tolerance=1e-5):
    for one, other in zip(got, wanted, strict=True):
        scale = float(other.float().abs().max())
        torch.testing.assert_close(one, other, rtol=0, atol=tolerance * scale)


def kept(call, x):
    """Bytes that autograd keeps of a forward, each memory once, parameters too."""
    memories = {}

    def keep(item):
        if isinstance(item, torch.Tensor):
            if hasattr(item, "plain_tensors"):
                for part in item.plain_tensors().values():
                    keep(part)
                return
            memory = item.untyped_storage()
            memories[memory.data_ptr()] = memory.nbytes()

    out = call(x)
    seen, stack = set(), [out.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        stack += [following for following, _ in node.next_functions]
        for name in dir(node):
            if name.startswith("_raw_saved_"):
                raw = getattr(node, name)
                for saved in raw if isinstance(raw, tuple) else (raw,):
                    try:
                        data = saved.data
                    except RuntimeError:
                        continue
                    held = getattr(data, "weight", getattr(data, "tensor", data))
                    keep(held)
    return memories


def test_a_step_keeps_the_quantized_weights_and_nothing_dense():
    """0.55 of what the same base costs in bfloat16, weights and graph together."""
    model, dense = pair(dtype=torch.bfloat16)
    x = torch.ones(1, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    sizes = []
    for one in (model, dense):
        held = kept(one, x)
        for layer in one.layers:
            weight = layer.weight
            parts = getattr(weight, "plain_tensors", lambda w=weight: {"": w})()
            for part in parts.values():
                memory = part.untyped_storage()
                held[memory.data_ptr()] = memory.nbytes()
        sizes.append(sum(held.values()))
    weights = LAYERS * WIDTH * WIDTH * 2
    assert sizes[1] >= weights
    assert sizes[0] - (sizes[1] - weights) <= 0.55 * weights


def test_gradients_equal_those_of_the_decoded_model(scheme):
    """Of the input and of what is trained, twice from one graph."""
    model, dense = pair(scheme)
    assert_close(gradients(model), gradients(dense))
    x = torch.randn(2, WIDTH, requires_grad=True)
    out = model(x).sum()
    first = torch.autograd.grad(out, x, retain_graph=True)
    assert torch.equal(first[0], torch.autograd.grad(out, x)[0])


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradients_under_checkpointing(reentrant):
    """Both kinds; nothing of a block is kept that the block computes again."""
    run = functools.partial(checkpoint, use_reentrant=reentrant)
    model, dense = pair(checkpointed=run)
    assert_close(gradients(model), gradients(dense))
    x = torch.ones(64, WIDTH, requires_grad=True)
    checkpointed, plain = kept(model, x), kept(Base(), x)
    assert sum(checkpointed.values()) < sum(plain.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_under_autocast(dtype, scheme):
    """Weights are decoded to the dtype that autocast computes in."""
    model, dense = pair(scheme, dtype)

    def call(one, x):
        with torch.autocast("cpu", torch.bfloat16):
            return one(x)

    got, wanted = (
        gradients(one, functools.partial(call, one), dtype) for one in (model, dense)
    )
    assert_close(got, wanted, 0.02)
    x = torch.ones(1, WIDTH, dtype=dtype, requires_grad=True)
    held = kept(functools.partial(call, model), x)
    assert max(held.values()) < WIDTH * WIDTH * 2


def test_autocast_leaves_decoding_alone():
    """Rotated weights are decoded by a product, which autocast would round."""
    layer = hijack.wrap_module(nn.Linear(WIDTH, WIDTH), "int8", rotation=64)
    wanted = layer.weight.dense()
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer.weight.dense(), wanted)
        assert torch.equal(layer.weight.dense(torch.bfloat16), wanted.bfloat16())


def test_gradients_of_gradients():
    """The second derivative is that of the decoded model."""
    results = []
    for model in pair():
        torch.manual_seed(1)
        x = torch.randn(2, WIDTH, requires_grad=True)
        (first,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
        results.append(torch.autograd.grad((first**2).sum(), [x, model.scales]))
    assert_close(*results)


def test_transforms_differentiate():
    """``grad``, ``vmap`` and ``jvp`` give what they give for the decoded model."""
    model, dense = pair()
    x = torch.randn(3, WIDTH)
    trained = {"scales": model.scales.detach()}
    results = []
    for one in (model, dense):

        def loss(params, x, one=one):
            return (functional_call(one, params, (x,)) ** 2).sum()

        per_sample = vmap(grad(loss), in_dims=(None, 0))(trained, x)["scales"]
        tangent = jvp(functools.partial(loss, trained), (x,), (torch.ones_like(x),))
        results.append([per_sample, *tangent])
    assert_close(*results)


@pytest.mark.parametrize("checkpointed", [False, True])
def test_compiled_training_keeps_the_quantized_weights(checkpointed):
    """In one graph, with gradients of the decoded model."""
    run = functools.partial(checkpoint, use_reentrant=False) if checkpointed else None
    model, dense = pair(dtype=torch.bfloat16, checkpointed=run)
    call = torch.compile(model, fullgraph=True, backend="aot_eager")
    got = gradients(model, call, torch.bfloat16)
    assert_close(got, gradients(dense, None, torch.bfloat16), 0.02)
    shapes = []

    def pack(tensor):
        shapes.append((tensor.dtype, tuple(tensor.shape)))
        return tensor

    x = torch.ones(1, WIDTH, dtype=torch.bfloat16, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        call(x)
    assert (torch.float8_e4m3fn, (WIDTH, WIDTH)) in shapes
    assert (torch.bfloat16, (WIDTH, WIDTH)) not in shapes


def test_convolutions_and_forwards_of_their_own_keep_no_dense_weight():
    """Whatever a forward multiplies by; what else it keeps stays as it is."""

    class Own(nn.Linear):
        def forward(self, x):
            return torch.sigmoid(x) @ self.weight.t() + torch.einsum(
                "bi,oi->bo", x, self.weight
            )

    conv, own = nn.Conv2d(8, 16, 3), Own(64, 64)
    cases = [(conv, torch.randn(2, 8, 5, 5)), (own, torch.randn(2, 64))]
    for module, x in cases:
        hijack.wrap_module(module.requires_grad_(False), "blockwise_fp8")
        dense = hijack.unwrap(copy.deepcopy(module)).requires_grad_(False)
        x.requires_grad_()
        dense_bytes = module.weight.numel() * 4
        held = kept(module, x)
        assert x.untyped_storage().data_ptr() in held or module is own
        assert dense_bytes not in held.values()
        got, wanted = (
            torch.autograd.grad((one(x) ** 2).sum(), x) for one in (module, dense)
        )
        assert_close(got, wanted)


def test_hooks_outside_get_what_is_no_weight():
    """Such as those that move activations to the CPU; the input of a convolution."""
    conv = nn.Conv2d(8, 16, 3).requires_grad_(False)
    hijack.wrap_module(conv, "blockwise_fp8")
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    (wanted,) = torch.autograd.grad(conv(x).sum(), x)
    packed = []

    def pack(tensor):
        packed.append(tuple(tensor.shape))
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = conv(x)
    assert packed == [(2, 8, 5, 5)]
    assert_close(torch.autograd.grad(out.sum(), x), [wanted])


def test_what_changed_since_the_forward_is_refused():
    """As autograd refuses for dense weights and for activations."""
    layer = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
    hijack.wrap_module(layer, "blockwise_fp8")
    x = torch.randn(2, WIDTH, requires_grad=True)
    out, other = layer(x), copy.deepcopy(layer).state_dict()
    layer.load_state_dict(other)
    with pytest.raises(ReadOnlyError, match="have changed"):
        out.sum().backward()
    conv = nn.Conv2d(8, 16, 3)
    hijack.wrap_module(conv, "blockwise_fp8")
    y = torch.randn(2, 8, 5, 5, requires_grad=True) * 1
    out = conv(y)
    y.mul_(2)
    with pytest.raises(RuntimeError, match="inplace"):
        out.sum().backward()


def test_a_decoded_weight_that_a_forward_changes_is_kept(scheme):
    """A host may add to what it decoded; the backward sees the sum."""

    class Adding(nn.Linear):
        def forward(self, x):
            weight = self.weight
            weight += 1.0
            return F.linear(x, weight)

    layer = Adding(WIDTH, WIDTH).requires_grad_(False)
    hijack.wrap_module(layer, scheme)
    x = torch.randn(2, WIDTH, requires_grad=True)
    (got,) = torch.autograd.grad(layer(x).sum(), x)
    wanted = (layer.weight.value() + 1).sum(0).expand(2, -1)
    assert_close([got], [wanted])


def test_no_gradient_no_hooks(monkeypatch):
    """A forward that wants no gradient runs as if there were none."""
    import hijack.modules

    def refuse():
        raise AssertionError("asked")

    monkeypatch.setattr(hijack.modules, "recomputing", refuse)
    model, _ = pair()
    layer = model.layers[0]
    layer(torch.ones(1, WIDTH))
    with torch.no_grad():
        layer(torch.ones(1, WIDTH, requires_grad=True))
    with torch.inference_mode():
        model(torch.ones(1, WIDTH))
