"""The table of kernels: which one takes a layer, and what happens when one fails."""

import logging

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.utils._python_dispatch import TorchDispatchMode

import hijack
from hijack import kernels
from hijack.hosts.diagnostics import diagnose
from hijack.kernels import Choice, Kernel, KernelTable
from schemes._kernels import forward, inductor, plain, torch_eager
from schemes._kernels.block_scaled import BlockScaled

CPU = torch.device("cpu")


class Recorded:
    """Kernels that say which of them computed."""

    def __init__(self):
        self.calls = []

    def kernel(self, name, *, refuses=None, error=None, **options):
        def linear(x, weight, bias):
            self.calls.append(name)
            if error is not None:
                raise error
            return F.linear(x, weight, bias)

        def decode(weight, out):
            self.calls.append(name)
            out.copy_(weight)

        options = {"linear": linear, "decode": decode, **options}
        return Kernel(name, ("cpu",), lambda weight, dtype: refuses, **options)


@pytest.fixture
def recorded():
    return Recorded()


WEIGHT, X = torch.ones(4, 8), torch.ones(3, 8)


def test_the_first_kernel_that_does_not_refuse_computes(recorded):
    """Order, refusal, rows and device decide, in this order of the table."""
    table = KernelTable(
        Kernel("elsewhere", ("cuda",), lambda weight, dtype: None),
        recorded.kernel("refuses", refuses="it is too narrow"),
        recorded.kernel("few", rows=2),
        recorded.kernel("decodes", linear=None),
        recorded.kernel("takes"),
        recorded.kernel("late"),
    )
    assert torch.equal(table.linear(X, WEIGHT, None), F.linear(X, WEIGHT))
    table.linear(X[:2], WEIGHT, None)
    table.decode(WEIGHT, torch.empty_like(WEIGHT))
    assert recorded.calls == ["takes", "few", "few"]
    choice = table.explain(WEIGHT, torch.float32, 3)
    assert choice == Choice(
        "takes", {"refuses": "it is too narrow", "few": "for at most 2 rows"}
    )
    others = "refuses: it is too narrow; few: for at most 2 rows"
    assert str(choice) == f"takes (not {others})"


def test_nothing_takes_it(recorded):
    """Without a kernel the caller computes as it can."""
    table = KernelTable(recorded.kernel("a", refuses="no"))
    assert table.linear(X, WEIGHT, None) is None
    assert not table.decode(WEIGHT, torch.empty_like(WEIGHT))
    assert table.explain(WEIGHT, torch.float32, 1).kernel == "plain"


def test_a_kernel_that_fails_is_not_tried_again(recorded, caplog):
    """The next one computes, one line says so, and reports give the reason."""
    table = KernelTable(
        recorded.kernel("bad", error=RuntimeError("no such\ninstruction")),
        recorded.kernel("good"),
    )
    with caplog.at_level(logging.WARNING, "hijack"):
        for _ in range(3):
            assert torch.equal(table.linear(X, WEIGHT, None), F.linear(X, WEIGHT))
    assert recorded.calls == ["bad", "good", "good", "good"]
    (line,) = caplog.messages
    assert "kernel bad failed on cpu" in line
    assert "no such" in line
    assert "\n" not in line
    assert table.failures() == {"bad on cpu": "failed with RuntimeError: no such"}
    choice = table.explain(WEIGHT, torch.float32, 1)
    assert choice.others == {"bad": "failed with RuntimeError: no such"}


def test_a_failure_is_raised_when_that_is_wanted(recorded, monkeypatch):
    """Under HIJACK_STRICT no kernel is left out without a word."""
    table = KernelTable(recorded.kernel("bad", error=RuntimeError("no")))
    monkeypatch.setenv("HIJACK_STRICT", "1")
    with pytest.raises(RuntimeError, match="no"):
        table.linear(X, WEIGHT, None)
    assert not table.failures()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_too_little_memory_is_no_fault_of_a_kernel(recorded, error):
    """The host sees it and frees memory; the kernel is tried again."""
    table = KernelTable(recorded.kernel("a", error=error), recorded.kernel("b"))
    for _ in range(2):
        with pytest.raises(type(error)):
            table.linear(X, WEIGHT, None)
    assert recorded.calls == ["a", "a"]


def test_an_environment_variable_puts_kernels_first(recorded, monkeypatch):
    """HIJACK_FORWARD names them in order; with plain among them no others are tried."""
    table = KernelTable(*(recorded.kernel(name) for name in "abc"))
    for value, expected in [("b", "b"), (" c , b", "c"), ("x,b", "b"), ("", "a")]:
        monkeypatch.setenv("HIJACK_FORWARD", value)
        recorded.calls.clear()
        table.linear(X, WEIGHT, None)
        assert recorded.calls == [expected]
    monkeypatch.setenv("HIJACK_FORWARD", "plain")
    assert table.linear(X, WEIGHT, None) is None


def test_kernels_with_other_results_are_asked_for(recorded, monkeypatch):
    """By the layer, or by the environment."""
    table = KernelTable(recorded.kernel("quantizes", opt_in=True), recorded.kernel("a"))
    table.linear(X, WEIGHT, None)
    table.linear(X, WEIGHT, None, opt_in=True)
    monkeypatch.setenv("HIJACK_FORWARD", "quantizes")
    table.linear(X, WEIGHT, None)
    assert recorded.calls == ["a", "quantizes", "quantizes"]


def test_kernels_on_request_are_named(recorded, monkeypatch):
    """Nothing but the environment has them taken."""
    table = KernelTable(recorded.kernel("slow", on_request=True), recorded.kernel("a"))
    table.linear(X, WEIGHT, None, opt_in=True)
    assert table.explain(WEIGHT, torch.float32, 1) == Choice("a")
    monkeypatch.setenv("HIJACK_FORWARD", "slow")
    table.linear(X, WEIGHT, None)
    assert recorded.calls == ["a", "slow"]


def test_doctor_names_kernels_and_misspelled_ones(monkeypatch):
    """What would compute each scheme, and what HIJACK_FORWARD cannot mean."""
    monkeypatch.setenv("HIJACK_FORWARD", "torch_eagre")
    found = diagnose()
    assert any(s.startswith("cpu: ") for s in found.kernels["blockwise_fp8"])
    (problem,) = (p for p in found.problems if "HIJACK_FORWARD" in p)
    assert "'torch_eagre'" in problem
    assert "did you mean 'torch_eager'?" in problem
    monkeypatch.setenv("HIJACK_FORWARD", "torch_eager,plain")
    assert not [p for p in diagnose().problems if "HIJACK_FORWARD" in p]


def test_a_load_report_says_what_computes(tmp_path, monkeypatch):
    """Of each layer, for few rows of input and for many."""
    model = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))
    hijack.wrap_model(model, "blockwise_fp8", include=["*"])
    hijack.save(model, tmp_path / "a.safetensors")
    dense = nn.Sequential(nn.Linear(64, 32), nn.Linear(32, 16))
    monkeypatch.setenv("HIJACK_FORWARD", "torch_eager")
    report = hijack.load(dense, tmp_path / "a.safetensors")
    assert report.forwards() == {"0": "torch_eager", "1": "torch_eager"}
    monkeypatch.setenv("HIJACK_FORWARD", "plain")
    assert report.forwards() == {"0": "plain", "1": "plain"}
    del dense
    assert report.forwards() == {}


def test_the_forced_forward_is_the_one_that_runs(monkeypatch):
    """HIJACK_FORWARD=plain decodes whole and multiplies; the results agree."""
    layer = hijack.wrap_module(nn.Linear(128, 64), "blockwise_fp8")
    x = torch.randn(3, 128)
    calls = []
    real = torch_eager.linear
    monkeypatch.setattr(
        forward.TABLE,
        "kernels",
        tuple(
            Kernel(k.name, k.devices, k.refuses, spy(calls, real), k.decode)
            if k.name == "torch_eager" and "cpu" in k.devices
            else k
            for k in forward.TABLE.kernels
        ),
    )
    with torch.no_grad():
        monkeypatch.setenv("HIJACK_FORWARD", "torch_eager")
        fast = layer(x)
        monkeypatch.setenv("HIJACK_FORWARD", "plain")
        slow = layer(x)
    assert len(calls) == 1
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-5)


def spy(calls, function):
    def spied(*args):
        calls.append(args)
        return function(*args)

    return spied


@pytest.mark.parametrize("codes", [torch.int8, torch.float8_e4m3fn, "table"])
@pytest.mark.parametrize("size", [(1, 16), (4, 24), (20, 80)])
def test_eager_kernels_decode_bit_for_bit(codes, size):
    """On the CPU and as on other devices: all codes, short blocks, a factor."""
    n, k = 20, 80
    table = None
    if codes == "table":
        data = torch.randint(0, 256, (n, k // 2), dtype=torch.uint8)
        table = torch.randn(16)
    elif codes == torch.int8:
        data = torch.randint(-128, 128, (n, k), dtype=torch.int8)
    else:
        data = torch.randn(n, k).to(codes)
    scale = torch.rand(-(-n // size[0]), -(-k // size[1])) + 0.1
    for factor in (None, torch.tensor(0.3)):
        weight = BlockScaled(data, scale, size, table, False, factor)
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            wanted = plain.decode(weight, dtype)
            out = torch.empty(n, k, dtype=dtype)
            if torch_eager.refuses(weight, dtype) is None:
                torch_eager.decode(weight, out)
                assert torch.equal(out, wanted)
            torch_eager.decode_elsewhere(weight, out.zero_())
            assert torch.equal(out, wanted)
            x = torch.randn(3, k, dtype=dtype)
            got = torch_eager.linear_elsewhere(x, weight, None)
            torch.testing.assert_close(got, F.linear(x, wanted))


def test_names_of_kernels_are_those_of_all_schemes():
    """So that doctor knows what can be meant."""
    assert {"torch_eager", "plain"} <= kernels.kernel_names(hijack.schemes().values())


@pytest.mark.thorough
@pytest.mark.skipif(
    inductor._no_compiler("cpu") is not None, reason="no C++ compiler is installed"
)
def test_inductor_decodes_bit_for_bit():
    """All codes of FP8, and of four bits; one compilation for layers of all shapes."""
    for n, k in [(8, 128), (16, 192), (24, 320)]:
        codes = torch.arange(256, dtype=torch.uint8).repeat(n * k // 256 + 1)
        codes = codes[: n * k].view(n, k)
        finite = (codes & 0x7F) != 0x7F
        scale = torch.rand(n, k // 64) + 0.1
        weight = BlockScaled(codes.view(torch.float8_e4m3fn), scale, (1, 64))
        out, wanted = torch.empty(n, k), plain.decode(weight, torch.float32)
        inductor.decode(weight, out)
        assert torch.equal(out[finite], wanted[finite])
        layout = inductor._LAYOUTS[torch.float8_e4m3fn]  # as on a GPU
        operands = (codes.view(torch.int8), scale, None, None, out.view(n, 1, -1, 64))
        inductor._decode(*operands, layout, False)
        assert torch.equal(out[finite], wanted[finite])
        assert out[~finite].isnan().all()
        table = BlockScaled(codes, torch.rand(n, k // 32), (1, 64), torch.randn(16))
        out = torch.empty(n, 2 * k)
        inductor.decode(table, out)
        assert torch.equal(out, plain.decode(table, torch.float32))


def test_inductor_refuses_what_it_cannot_do():
    """Short blocks, which Inductor compiles wrongly, and other dtypes."""
    codes = torch.zeros(4, 40, dtype=torch.int8)
    short = BlockScaled(codes, torch.ones(4, 2), (1, 32))
    assert "short" in inductor.refuses(short, torch.float32)
    whole = BlockScaled(codes, torch.ones(4, 2), (1, 20))
    assert "float64" in inductor.refuses(whole, torch.float64)


def test_a_forward_waits_for_no_device():
    """Nothing is copied to the CPU or asked for a number, so that graphs capture it."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    seen = []
    codes = torch.randn(32, 64).to(torch.float8_e4m3fn)
    weight = BlockScaled(codes, torch.ones(32, 1), (1, 64))
    x, bias = torch.randn(5, 64), torch.randn(32)
    torch_eager.linear_elsewhere(x, weight, bias)  # the buffer is made once
    with Watch():
        torch_eager.linear_elsewhere(x, weight, bias)
    views = {"view", "t", "slice", "unsqueeze", "detach", "alias", "expand"}
    assert [name for name in seen if name not in views] == ["copy_", "mul_", "addmm"]


@pytest.mark.parametrize("scheme", ["blockwise_fp8", "int8", "nvfp4", "nf4"])
def test_equal_layers_share_one_graph(scheme):
    """Twelve layers compile at once, and other numbers of tokens compile nothing."""
    model = nn.Sequential(*(nn.Linear(64, 64) for _ in range(12))).requires_grad_(False)
    hijack.wrap_model(model, scheme, include=["*"])
    torch.compiler.reset()
    counter = CompileCounter()
    run = torch.compile(model, fullgraph=True, dynamic=True, backend=counter)
    for tokens in (7, 3, 11):
        x = torch.randn(tokens, 64)
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-5)
    assert counter.frame_count == 1


# -- what kernels must not see, and what they leave behind -----------------------------


def wrapped(scheme="blockwise_fp8", **options):
    """A Linear 128 -> 64 that wants no gradient."""
    layer = nn.Linear(128, 64).requires_grad_(False)
    return hijack.wrap_module(layer, scheme, **options)


def test_one_column_is_multiplied_in_integers_too():
    """torch's own product of one column writes nothing on a CPU."""
    layer = nn.Linear(1, 8, bias=False).requires_grad_(False)
    layer = hijack.wrap_module(layer, "int8", quantized_inputs=True)
    x = torch.ones(3, 1)
    torch.testing.assert_close(layer(x), x @ layer.weight.dense().t())


def test_autocast_leaves_float64_alone():
    """As it does with a dense layer."""
    layer = wrapped().double()
    x = torch.randn(3, 128)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x.double()).dtype == torch.float64
        assert layer(x).dtype == torch.bfloat16


def test_a_wrong_bias_is_refused_and_no_kernel_blamed():
    """The error is torch's, and the next call has the same kernel."""
    layer = wrapped()
    before = forward.TABLE.failures()
    layer.bias = nn.Parameter(torch.zeros(65), requires_grad=False)
    for rows in (3, 300):
        with pytest.raises(RuntimeError):
            layer(torch.randn(rows, 128))
    assert forward.TABLE.failures() == before


def test_inputs_that_are_no_plain_memory():
    """Sparse ones, and those that are negated when they are read."""
    layer, x = wrapped().bfloat16(), torch.randn(4, 128).bfloat16()
    expected = layer(x)
    negated = layer(torch._neg_view(x))
    torch.testing.assert_close(negated, -expected + 2 * layer.bias, atol=1e-2, rtol=0)
    layer, x = wrapped(), torch.randn(4, 128)
    torch.testing.assert_close(layer(x.to_sparse()), layer(x))


@pytest.mark.parametrize("scheme", ["nvfp4", "mxfp4"])
def test_a_scale_that_becomes_nan_is_seen(scheme):
    """The layer gives NaN, not numbers that look sound."""
    layer, x = wrapped(scheme), torch.randn(3, 128)
    assert layer(x).isfinite().all()
    nan = 0x7F if scheme == "nvfp4" else 0xFF
    layer.weight.params["weight_scale"].view(torch.uint8).view(-1)[0] = nan
    assert layer(x).isnan()[:, 0].all()
