"""Wrapping any module: what changes, what survives, and what unwrap leaves."""

import copy
import io
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hijack
from hijack.errors import (
    DTypeError,
    ModuleError,
    NonFiniteError,
    SchemeError,
    UnknownSchemeError,
)
from hijack.modules import Wrapped, dense_weight

MODULES = {
    "linear": (lambda: nn.Linear(24, 16), (2, 24)),
    "linear-no-bias": (lambda: nn.Linear(24, 16, bias=False), (2, 24)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "conv2d-reflect": (
        lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"),
        (2, 4, 8, 8),
    ),
    "conv3d-groups": (lambda: nn.Conv3d(4, 6, 3, groups=2), (1, 4, 5, 5, 5)),
    "conv-transpose": (lambda: nn.ConvTranspose2d(4, 6, 3), (2, 4, 5, 5)),
    "layer-norm": (lambda: nn.LayerNorm(24), (2, 24)),
    "custom": (lambda: Doubling(24, 16), (2, 24)),
}


class Int8(hijack.Scheme):
    """Symmetric int8, one scale for each first index."""

    name = "int8_test"
    targets = (
        nn.Linear,
        nn.Conv1d,
        nn.Conv2d,
        nn.Conv3d,
        nn.ConvTranspose2d,
        nn.Embedding,
        nn.LayerNorm,
    )

    def quantize(self, weight, **options):
        """Scale each row by its largest magnitude."""
        dims = tuple(range(1, weight.dim()))
        peak = weight.float().abs()
        scale = (peak.amax(dims, keepdim=True) if dims else peak).clamp_min(1e-12) / 127
        return (weight / scale).round().to(torch.int8), {"weight_scale": scale}

    def dequantize(self, qdata, params, dtype):
        """Multiply codes by their scale."""
        return (qdata.float() * params["weight_scale"]).to(dtype)


class Doubling(nn.Linear):
    """A Linear subclass with a forward of its own."""

    def forward(self, input, factor=2.0):
        """Twice the linear map."""
        return factor * F.linear(input, self.weight, self.bias)


@pytest.fixture
def scheme():
    """A registered int8 scheme."""
    yield hijack.register(Int8())
    hijack.unregister("int8_test")


def small_model():
    """A model with an embedding, shared weights and a norm."""
    model = nn.Sequential(
        nn.Embedding(11, 8),
        nn.Linear(8, 8),
        nn.LayerNorm(8),
        nn.Linear(8, 11, bias=False),
    )
    model[3].weight = model[0].weight
    return model


def snapshot(module):
    """Everything unwrap promises to give back, except the values of weights."""
    return {
        name: (
            type(part),
            set(part.__dict__),
            list(part._parameters),
            list(part._buffers),
            {
                k: (p.dtype, p.shape, p.requires_grad)
                for k, p in part._parameters.items()
                if p is not None
            },
        )
        for name, part in module.named_modules()
    }


@pytest.mark.parametrize("kind", MODULES)
def test_a_wrapped_module_computes_with_its_dequantized_weight(scheme, kind):
    """Any module gives what its own forward gives on the dequantized weight."""
    make, shape = MODULES[kind]
    dense, x = make(), torch.randn(shape)
    wrapped = hijack.wrap_module(copy.deepcopy(dense), scheme)
    assert wrapped.weight.qdata.dtype == torch.int8
    assert wrapped.weight.dtype == dense.weight.dtype
    assert wrapped.weight.shape == dense.weight.shape
    dense.weight.data = dense_weight(wrapped)
    torch.testing.assert_close(wrapped(x), dense(x))


def test_arguments_reach_a_forward_hijack_does_not_know(scheme):
    """A subclass's own forward runs, with its own arguments."""
    layer = hijack.wrap_module(Doubling(8, 8), scheme)
    x = torch.randn(3, 8)
    torch.testing.assert_close(layer(x, factor=4.0), 2 * layer(x))


def test_wrap_module_returns_the_same_object(scheme):
    """The module object, its bias and its hooks stay."""
    layer, calls = nn.Linear(4, 4), []
    layer.register_forward_hook(lambda *a: calls.append(1))
    bias = layer.bias
    assert hijack.wrap_module(layer, "int8_test") is layer
    layer(torch.zeros(1, 4))
    assert layer.bias is bias
    assert calls == [1]


@pytest.mark.parametrize("kind", MODULES)
def test_unwrap_leaves_nothing_behind(scheme, kind):
    """Class, __dict__, parameters and buffers are those of a module never wrapped."""
    module = MODULES[kind][0]()
    before = snapshot(module)
    hijack.wrap_module(module, scheme)
    expected = dense_weight(module)
    assert snapshot(module) != before
    hijack.unwrap(module)
    assert snapshot(module) == before
    assert torch.equal(module.weight, expected)


def test_wrap_model_reports_what_it_did(scheme):
    """The report names every layer quantized and why others were not."""
    model = small_model()
    report = hijack.wrap_model(model, scheme, exclude=["2"])
    assert report.layers == ("0", "1", "3")
    assert report.skipped == {"2": "excluded"}
    assert report.bytes_before == (11 * 8 + 8 * 8) * 4
    assert report.bytes_after == 11 * 8 + 11 * 4 + 8 * 8 + 8 * 4
    assert "3 layers quantized" in str(report)


def test_shared_weights_stay_shared(scheme):
    """Modules with one weight have one set of codes, and one weight after unwrap."""
    model = small_model()
    hijack.wrap_model(model, scheme)
    assert model[3].weight is model[0].weight
    hijack.unwrap(model)
    assert model[3].weight is model[0].weight


def test_include_patterns_choose_layers(scheme):
    """Only modules whose name matches are wrapped; other targets are reported."""
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    report = hijack.wrap_model(model, scheme, include="a")
    assert report.layers == ("a",)
    assert report.skipped == {"b": "not included"}


def test_patterns_may_come_from_an_iterator(scheme):
    """They are gone through once for each layer, and none is lost."""
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(4)))
    report = hijack.wrap_model(model, scheme, iter(["[0-2]"]), iter(["1", "2"]))
    assert report.layers == ("0",)
    with hijack.building(scheme, exclude=iter(["0", "1"])):
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    assert [hasattr(layer, "_hijack") for layer in model] == [False, False, True]


@pytest.mark.parametrize("option", ["include", "exclude"])
def test_a_pattern_that_matches_nothing_is_an_error(scheme, option):
    """A misspelt pattern is refused and nothing changes."""
    model = small_model()
    words = rf"{option}: pattern 'blocks\.\*' matches no module.*such as 0"
    with pytest.raises(ModuleError, match=words):
        hijack.wrap_model(model, scheme, **{option: ["blocks.*"]})
    assert not any(isinstance(m, Wrapped) for m in model.modules())


def test_an_empty_pattern_names_only_a_model_that_is_a_layer(scheme):
    """The name of a model is empty, and excluding it all is no exclusion."""
    with pytest.raises(ModuleError, match="exclude: pattern '' matches no module"):
        hijack.wrap_model(small_model(), scheme, exclude="")
    assert hijack.wrap_model(nn.Linear(4, 4), scheme, exclude="").layers == ()


def test_modules_that_are_never_wrapped_may_be_excluded(scheme):
    """A list for many models names norms too; a typo of theirs is an error."""
    model = nn.ModuleDict({"fc": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})
    with pytest.raises(ModuleError, match=r"'nrom' matches no module.*mean 'norm'\?"):
        hijack.wrap_model(model, scheme, exclude=["fc", "nrom"])
    assert hijack.wrap_model(model, scheme, exclude="norm").layers == ("fc",)


def test_a_refused_layer_leaves_the_whole_model_dense(scheme):
    """wrap_model names the layer and changes nothing."""
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    model[1].weight.data[0, 0] = float("inf")
    with pytest.raises(NonFiniteError, match=r"^1: weight holds inf or NaN; got 1 "):
        hijack.wrap_model(model, scheme)
    assert type(model[0]) is nn.Linear


class Raising(Int8):
    """A scheme that fails."""

    name = "raising"

    def quantize(self, weight, **options):
        """Fail."""
        raise IndexError("boom")


class Malformed(Int8):
    """A scheme that answers nonsense."""

    name = "malformed"

    def quantize(self, weight, **options):
        """Give no parameters."""
        return weight


class Colliding(Int8):
    """A scheme whose parameter is called as one of the module's."""

    name = "colliding"

    def quantize(self, weight, **options):
        """Name a parameter bias."""
        return weight.to(torch.int8), {"bias": weight}


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            Raising,
            SchemeError,
            r"raising cannot quantize .* \(4, 4\).*IndexError: boom",
        ),
        (Malformed, SchemeError, r"malformed: quantize gave Tensor, expected"),
        (
            Colliding,
            SchemeError,
            r"colliding has a tensor named bias, which Linear has already",
        ),
    ],
)
def test_a_scheme_that_misbehaves_is_named(make, error, message):
    """The error says which scheme did what to which layer; the module stays dense."""
    layer = nn.Linear(4, 4)
    before = snapshot(layer)
    with pytest.raises(error, match=message):
        hijack.wrap_module(layer, make())
    assert snapshot(layer) == before


def test_modules_that_cannot_be_wrapped_are_refused(scheme):
    """Each refusal says why and what to do."""
    wrapped = hijack.wrap_module(nn.Linear(4, 4), scheme)
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(4, 4))
    half_made = nn.Linear(4, 4)
    half_made.weight = None
    cases = {
        "wrapped with int8_test already": wrapped,
        "ReLU is no target; expected one of Linear": nn.ReLU(),
        "MultiheadAttention.*reads the weight": nn.MultiheadAttention(4, 2).out_proj,
        "it is lazy; run the model once": nn.LazyLinear(4),
        "parametrized; remove": parametrized,
        "no parameter named weight": half_made,
    }
    for message, module in cases.items():
        with pytest.raises(ModuleError, match=message):
            hijack.wrap_module(module, scheme)
    layer = nn.Linear(4, 4)
    layer.weight = nn.Parameter(layer.weight.to(torch.float8_e4m3fn), False)
    with pytest.raises(DTypeError, match=r"float8_e4m3fn, expected one of"):
        hijack.wrap_module(layer, scheme)
    with pytest.raises(
        UnknownSchemeError, match=r"'nope'; registered are: .*int8_test"
    ):
        hijack.wrap_module(nn.Linear(4, 4), "nope")


def test_attention_is_left_to_read_its_own_weight(scheme):
    """wrap_model leaves dense what a parent reads behind the module's back."""
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(1, 3, 8)
    expected = model(x)
    report = hijack.wrap_model(model, scheme, exclude="norm*")
    assert "MultiheadAttention" in report.skipped["self_attn.out_proj"]
    assert "set_fastpath_enabled(False)" in report.skipped["linear1"]
    with torch.no_grad():
        torch.testing.assert_close(model(x), expected)


def test_without_the_fast_path_a_transformer_layer_is_quantized(scheme):
    """Then nobody reads the weights of its Linears but they themselves."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
        report = hijack.wrap_model(model, scheme, exclude="norm*")
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
    assert set(report.layers) == {"linear1", "linear2"}


READS = {
    "linear": lambda w, x: F.linear(x, w),
    "matmul": lambda w, x: x @ w.t(),
    "addmm": lambda w, x: torch.addmm(torch.ones(4), x, w.T),
    "einsum": lambda w, x: torch.einsum("bi,oi->bo", x, w),
    "sum": lambda w, x: w.sum(),
    "row": lambda w, x: w[1],
    "slice": lambda w, x: w[:, 2:5],
    "mask": lambda w, x: w[w > 0],
    "norm": lambda w, x: torch.linalg.vector_norm(w),
    "float": lambda w, x: w.double() * 1.0,
    "chunk": lambda w, x: w.chunk(2)[1] * 1,
    "cat": lambda w, x: torch.cat([w, w]),
    "stack": lambda w, x: torch.stack([w, torch.ones(4, 8)]),
    "compare": lambda w, x: w == w.clone(),
    "item": lambda w, x: torch.tensor(w[0, 0].item()),
    "into dense": lambda w, x: torch.empty(4, 8).copy_(w),
    "iteration": lambda w, x: torch.stack([row * 2 for row in w]),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_whatever_is_computed_is_computed_with_the_decoded_weight(scheme, read):
    """Reading a weight gives what the dense one would, never its codes."""
    layer, x = hijack.wrap_module(nn.Linear(8, 4), scheme), torch.randn(3, 8)
    expected = read(dense_weight(layer), x)
    got = read(layer.weight, x)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("read", [lambda w: w.tolist(), lambda w: w.numpy()])
def test_what_would_read_memory_is_refused(scheme, read):
    """The weight has no memory of its own that Python or numpy could look at."""
    layer = hijack.wrap_module(nn.Linear(8, 4), scheme)
    with pytest.raises((RuntimeError, TypeError), match=r"not supported|numpy"):
        read(layer.weight.detach())


def test_a_quantized_model_has_the_parameters_of_the_dense_one(scheme):
    """Names, shapes, dtypes and counts, but nothing of them is trained."""
    model = small_model()
    before = {n: (p.shape, p.dtype, p.device) for n, p in model.named_parameters()}
    count = sum(p.numel() for p in model.parameters())
    hijack.wrap_model(model, scheme, exclude="2")
    after = {n: (p.shape, p.dtype, p.device) for n, p in model.named_parameters()}
    assert after == before
    assert sum(p.numel() for p in model.parameters()) == count
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {"1.bias", "2.weight", "2.bias"}
    assert {n for n, _ in model.named_buffers()} == set()
    assert hijack.unwrap(model)[1].weight.requires_grad


def test_to_moves_codes_but_never_casts_them(scheme):
    """.to(dtype) casts the bias, keeps codes and scales, and unwrap knows it."""
    layer = hijack.wrap_module(nn.Linear(8, 4), scheme)
    codes, scale = layer.weight.qdata.clone(), layer.weight_scale.clone()
    layer.half().to(torch.bfloat16)
    assert layer.bias.dtype == torch.bfloat16
    assert layer.weight.dtype == torch.bfloat16
    for kept, before in ((layer.weight.qdata, codes), (layer.weight_scale, scale)):
        assert kept.dtype == before.dtype
        assert torch.equal(kept, before)
    assert layer(torch.zeros(1, 8, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert layer.to("meta").weight_scale.is_meta
    assert hijack.unwrap(layer.to_empty(device="cpu")).weight.dtype == torch.bfloat16


def test_an_input_of_another_dtype_meets_a_weight_of_its_dtype(scheme):
    """Weight and bias follow the input's dtype."""
    layer = hijack.wrap_module(nn.Linear(8, 4), scheme)
    assert layer(torch.zeros(2, 8, dtype=torch.float16)).dtype == torch.float16


@pytest.mark.parametrize("assign", [False, True])
def test_state_dicts_round_trip(scheme, assign):
    """Codes, scales and keys come back bit for bit."""
    first = hijack.wrap_module(nn.Linear(8, 4), scheme)
    second = hijack.wrap_module(nn.Linear(8, 4), scheme)
    assert list(first.state_dict()) == ["weight", "bias", "weight_scale"]
    second.load_state_dict(first.state_dict(), assign=assign)
    for key, tensor in first.state_dict().items():
        assert torch.equal(second.state_dict()[key], tensor), key


class Halved(Int8):
    """Codes in a dtype that a dense weight may have too."""

    name = "halved"

    def quantize(self, weight, **options):
        """Half the weight, in float16."""
        return (weight / 2).half(), {"weight_factor": torch.full((1,), 2.0)}

    def dequantize(self, qdata, params, dtype):
        """Twice the codes."""
        return (qdata.float() * params["weight_factor"]).to(dtype)


@pytest.mark.parametrize("assign", [False, True])
def test_codes_of_a_dense_dtype_are_not_quantized_again(assign):
    """Codes and parameters together are codes, whatever their dtype."""
    first = hijack.wrap_module(nn.Linear(8, 4), Halved())
    second = hijack.wrap_module(nn.Linear(8, 4), Halved())
    second.load_state_dict(first.state_dict(), assign=assign)
    assert torch.equal(dense_weight(second), dense_weight(first))


@pytest.mark.parametrize("assign", [False, True])
def test_a_dense_state_dict_is_quantized_on_load(scheme, assign):
    """A wrapped module takes a dense weight and quantizes it."""
    dense = nn.Linear(8, 4)
    layer = hijack.wrap_module(nn.Linear(8, 4), scheme)
    layer.load_state_dict(dense.state_dict(), assign=assign)
    expected = hijack.wrap_module(copy.deepcopy(dense), scheme)
    assert torch.equal(layer.weight.qdata, expected.weight.qdata)
    assert torch.equal(layer.weight_scale, expected.weight_scale)


def test_a_state_dict_of_another_shape_is_refused(scheme):
    """The error names both shapes and the module keeps its tensors."""
    layer = hijack.wrap_module(nn.Linear(8, 4), scheme)
    other = hijack.wrap_module(nn.Linear(8, 6), scheme)
    before = layer.weight.qdata.clone()
    with pytest.raises(
        RuntimeError, match=r"shape \(6, 8\), the module expects \(4, 8\)"
    ):
        layer.load_state_dict(other.state_dict())
    assert torch.equal(layer.weight.qdata, before)


def test_deepcopy_is_independent(scheme):
    """A copy computes with its own tensors."""
    layer = hijack.wrap_module(nn.Linear(8, 4), scheme)
    x = torch.randn(2, 8)
    expected, twin = layer(x), copy.deepcopy(layer)
    twin.weight.qdata.zero_()
    torch.testing.assert_close(layer(x), expected)
    assert torch.equal(twin(x), twin.bias.expand(2, 4))
    assert type(twin) is type(layer)


def test_torch_save_round_trips_whole_modules(scheme):
    """A pickled module comes back wrapped, with its forward."""
    layer, x = hijack.wrap_module(nn.Linear(8, 4), scheme), torch.randn(2, 8)
    buffer = io.BytesIO()
    torch.save(layer, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert torch.equal(dense_weight(again), dense_weight(layer))
    torch.testing.assert_close(again(x), layer(x))


def test_a_spawned_process_gets_a_working_module(tmp_path):
    """A wrapped module sent to a spawned process computes the same there."""
    script = tmp_path / "spawned.py"
    script.write_text(
        textwrap.dedent(
            """
            import torch, hijack
            import torch.multiprocessing as mp

            class Halves(hijack.Scheme):
                name = "halves"
                def quantize(self, weight, **options):
                    return weight.half(), {"one": torch.ones(1)}
                def dequantize(self, qdata, params, dtype):
                    return (qdata * params["one"]).to(dtype)

            def work(layer, x, out):
                out.put(layer(x).detach().numpy())

            if __name__ == "__main__":
                layer = hijack.wrap_module(torch.nn.Linear(8, 4), Halves())
                x = torch.randn(2, 8)
                context = mp.get_context("spawn")
                out = context.Queue()
                process = context.Process(target=work, args=(layer, x, out))
                process.start()
                got = torch.from_numpy(out.get(timeout=60))
                process.join()
                torch.testing.assert_close(got, layer(x).detach())
                print("equal")
            """
        )
    )
    done = subprocess.run(
        [sys.executable, str(script)], capture_output=True, text=True, timeout=120
    )
    assert done.stdout.strip() == "equal", done.stderr


#: Older torch breaks the graph where a forward it must trace runs on a stand-in.
NEW_TORCH = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13)


@pytest.mark.parametrize(
    "kind", ["linear", *(["conv-transpose", "custom"] if NEW_TORCH else [])]
)
def test_compile_traces_the_wrapped_forward_inside_a_parent(scheme, kind):
    """A compiled parent computes the wrapped values in one graph."""
    make, shape = MODULES[kind]
    parent, x = nn.Sequential(make(), nn.Tanh()), torch.randn(shape)
    dense = parent(x)
    hijack.wrap_model(parent, scheme)
    expected = parent(x)
    compiled = torch.compile(parent, fullgraph=True)(x)
    torch.testing.assert_close(compiled, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(compiled, dense, rtol=1e-5, atol=1e-5)


def test_equal_layers_share_one_graph(scheme):
    """Twelve equal layers called from one compiled function do not recompile."""
    layers = [hijack.wrap_module(nn.Linear(8, 8), scheme) for _ in range(12)]
    counter = torch._dynamo.testing.CompileCounter()
    step = torch.compile(lambda layer, x: layer(x), backend=counter, fullgraph=True)
    x = torch.randn(2, 8)
    for layer in layers:
        torch.testing.assert_close(step(layer, x), layer(x))
    assert counter.frame_count == 1


def test_export_keeps_the_wrapped_values(scheme):
    """An exported program computes what the module computes."""
    layer, x = hijack.wrap_module(nn.Linear(8, 4), scheme), torch.randn(2, 8)
    program = torch.export.export(layer, (x,))
    torch.testing.assert_close(program.module()(x), layer(x))


def test_functional_call_uses_the_tensors_it_is_given(scheme):
    """functional_call takes another quantized weight or a dense one, and no codes."""
    layer = hijack.wrap_module(nn.Linear(8, 4, bias=False), scheme)
    x, weight = torch.randn(2, 8), layer.weight
    doubled = weight.replace(params={"weight_scale": layer.weight_scale * 2})
    for given in (doubled, 2 * weight.dense()):
        got = torch.func.functional_call(layer, {"weight": given}, (x,))
        torch.testing.assert_close(got, 2 * layer(x))
    same = torch.func.functional_call(layer, dict(layer.named_parameters()), (x,))
    torch.testing.assert_close(same, layer(x))
    with pytest.raises(
        DTypeError, match=r"torch.int8, which is quantized data without"
    ):
        torch.func.functional_call(layer, {"weight": weight.qdata}, (x,))
    assert layer.weight is weight


def test_gradients_flow_through_the_input(scheme):
    """The input's gradient is that of the dequantized weight; codes have none."""
    layer = hijack.wrap_module(nn.Linear(8, 4), scheme).requires_grad_(False)
    x = torch.randn(2, 8, requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, dense_weight(layer).sum(0).expand(2, 8))
    assert layer.weight.grad is None


def test_embedding_looks_up_dequantized_rows(scheme):
    """An embedding's integer input selects rows of the dequantized weight."""
    layer = hijack.wrap_module(nn.Embedding(10, 4, padding_idx=0), scheme)
    ids = torch.tensor([[1, 9], [0, 3]])
    assert torch.equal(layer(ids), dense_weight(layer)[ids])


def test_reset_parameters_creates_fresh_quantized_weights(scheme):
    """reset_parameters initialises as the class does, then quantizes."""
    layer = hijack.wrap_module(nn.Linear(64, 64), scheme)
    before = dense_weight(layer)
    layer.reset_parameters()
    after = dense_weight(layer)
    assert layer.weight.qdata.dtype == torch.int8
    assert not torch.equal(before, after)
    assert 0.5 < (after.std() / before.std()).item() < 2


ROOT = Path(__file__).parents[1]

STALE = """
import sys
import torch
import hijack
from torch import nn

class Times(hijack.Scheme):
    name = "times"
    targets = (nn.Linear,)

    def quantize(self, weight):
        return weight.half(), {}

    def dequantize(self, qdata, params, dtype):
        return (qdata.float() * %s).to(dtype)

torch.manual_seed(0)
model = hijack.wrap_module(nn.Linear(8, 8, bias=False), Times())
x = torch.randn(2, 8)
with torch.no_grad():
    torch.testing.assert_close(torch.compile(model)(x), model(x))
"""


@pytest.mark.thorough
def test_code_compiled_with_an_earlier_version_of_a_scheme_is_not_used(tmp_path):
    """torch keeps what it compiles on the disk; an edited scheme has the same name."""
    folders = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    for factor in (1, 2):
        command = [sys.executable, "-c", STALE % factor]
        done = subprocess.run(
            command, env={**os.environ, **folders}, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr


def test_the_class_of_a_wrapped_module_constructs_dense_ones():
    """PEFT makes the parts of an adapter by the class of the layer."""

    class Four(nn.Linear):
        def __init__(self):
            super().__init__(4, 4)

    for module, arguments in ((nn.Conv2d(4, 8, 3), (4, 2, 3)), (Four(), ())):
        hijack.wrap_module(module, "blockwise_fp8")
        made = type(module)(*arguments)
        assert type(made) is type(hijack.unwrap(module))
        assert type(made.weight) is nn.Parameter


class TinyLanguageModel(nn.Module):
    """Names by which embeddings and heads are told."""

    def __init__(self):
        super().__init__()
        self.embed_tokens = nn.Embedding(32, 64)
        self.layers = nn.ModuleList(nn.Linear(64, 64) for _ in range(2))
        self.lm_head = nn.Linear(64, 32)


def test_the_word_default_stands_for_what_is_usual():
    """As for `quantize_file`: embeddings and heads stay dense, and the report says."""
    model = TinyLanguageModel()
    report = hijack.wrap_model(model, "blockwise_fp8", exclude=["default", "layers.1"])
    assert report.layers == ("layers.0",)
    assert set(report.skipped) == {"embed_tokens", "layers.1", "lm_head"}
    assert "3 skipped" in str(report)
    assert report.skipped["lm_head"] in str(report)
    other = TinyLanguageModel()
    assert hijack.wrap_model(other, "blockwise_fp8", "default").layers == (
        "layers.0",
        "layers.1",
    )


def test_the_word_default_is_refused_where_no_model_is_there_yet():
    """Within `building`."""
    with (
        pytest.raises(hijack.HijackError, match="wrap_model"),
        hijack.building("blockwise_fp8", exclude="default"),
    ):
        pass
