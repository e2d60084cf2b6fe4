"""The CPU forward of the reference scheme: bit for bit cast and multiply, but fast."""

import copy
import threading
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import hijack
from schemes._blocks import embedding_forward
from schemes._kernels import plain as plain_kernel
from schemes._kernels import torch_eager
from schemes._kernels.forward import linear_forward
from schemes.blockwise_fp8 import BlockwiseFP8

SCHEME = BlockwiseFP8()
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
DENSE = (torch.float32, torch.bfloat16, torch.float16)
SCALES = (
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.uint8,
    torch.float8_e8m0fnu,
)
#: weight, block size: exact, ragged, blocks larger and smaller than what is decoded
SHAPES = [
    ((260, 512), (1, 64)),
    ((260, 512), (128, 128)),
    ((130, 300), (128, 128)),
    ((33, 70), (1, 64)),
    ((33, 70), (33, 70)),
    ((500, 3000), (300, 100)),
]


@pytest.fixture(params=[1, 2])
def threads(request):
    """One thread decodes tile by tile, several decode below torch's grain."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def all_codes(dtype: torch.dtype, shape: tuple[int, int]) -> Tensor:
    """Every finite code, in random order, often."""
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[codes.view(dtype).float().isfinite()]
    return codes[torch.randint(len(codes), shape)].view(dtype)


def some_scales(dtype: torch.dtype, grid: tuple[int, int]) -> Tensor:
    if dtype.itemsize == 1:
        return torch.randint(90, 133, grid, dtype=torch.uint8).view(dtype)
    return torch.randn(grid).mul(3).exp().clamp(1e-7, 100).to(dtype)


def quantized(
    shape: tuple[int, int],
    size: tuple[int, int],
    dtype: torch.dtype,
    scale: torch.dtype,
) -> tuple[Tensor, dict[str, Tensor]]:
    grid = (-(-shape[0] // size[0]), -(-shape[1] // size[1]))
    params = {"weight_scale": some_scales(scale, grid)}
    if shape[0] % size[0] or shape[1] % size[1]:
        params["weight_block_size"] = torch.empty(*size, 0, dtype=torch.uint8)
    return all_codes(dtype, shape), params


def plain(q: Tensor, params: dict[str, Tensor], dtype: torch.dtype) -> Tensor:
    """Cast and multiply."""
    return plain_kernel.decode(SCHEME.block_scaled(q, params), dtype).view(q.shape)


def excess(got: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> float:
    """How far ``got`` is from ``F.linear(x, weight, bias)``; up to 1 is rounding.

    Processors cut a product into tiles of different sizes, so the bits of a sum differ
    from one to the next. What all of them keep to is a bound: one rounding to the
    result's dtype, and some of float32 on the way, over the largest sum of magnitudes.
    """
    x, weight = x.detach().double(), weight.detach().double()
    bias = None if bias is None else bias.detach().double()
    wanted = F.linear(x, weight, bias)
    magnitude = F.linear(x.abs(), weight.abs()).max()
    bound = torch.finfo(got.dtype).eps * wanted.abs().max()
    bound += 8 * torch.finfo(torch.float32).eps * magnitude
    return float((got.detach().double() - wanted).abs().max() / bound)


def assert_same_bits(a: Tensor, b: Tensor) -> None:
    integer = {2: torch.int16, 4: torch.int32}[a.element_size()]
    assert a.dtype == b.dtype
    assert torch.equal(a.view(integer), b.view(integer))


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_decoding_is_bitwise_cast_and_multiply(threads, shape, size, dtype):
    """All finite codes, scale dtypes, result dtypes and kinds of blocks."""
    for scale_dtype in SCALES:
        q, params = quantized(shape, size, dtype, scale_dtype)
        assert torch_eager.refuses(SCHEME.block_scaled(q, params), E4M3) is not None
        assert torch_eager.refuses(SCHEME.block_scaled(q, params), DENSE[0]) is None
        for result in DENSE:
            got = SCHEME.dequantize(q, params, result)
            assert_same_bits(got, plain(q, params, result))


def layer(
    n: int = 300, k: int = 512, size: tuple[int, int] = (1, 64), **options: object
) -> nn.Linear:
    """A wrapped Linear; options are those of nn.Linear."""
    return hijack.wrap_module(nn.Linear(k, n, **options), SCHEME, block_size=size)


def dense_of(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """A wrapped module's weight, cast and multiplied."""
    params = module.state_dict()
    params.pop("bias", None)
    return plain(params.pop("weight"), params, dtype)


@pytest.mark.parametrize("dtype", DENSE)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rows", [1, 16, 200])
def test_linear_multiplies_with_the_decoded_weight(threads, dtype, bias, rows):
    """Pieces of any size change the order of summation at most."""
    module = layer(700, 1024, bias=bias, dtype=dtype)
    x = torch.randn(rows, 1024).to(dtype)
    weight = dense_of(module, dtype)
    with (
        torch.no_grad(),
        mock.patch.multiple(torch_eager, TILE_BYTES=1 << 18, PIECE_BYTES=1 << 19),
    ):
        got = module(x)
    assert module._bound_forward is linear_forward
    assert got.is_contiguous()
    assert got.dtype == dtype
    assert excess(got, x, weight, module.bias) <= 1
    got = module(x.view(1, rows, 1, 1024))
    assert got.shape == (1, rows, 1, 700)
    assert excess(got.view(rows, 700), x, weight, module.bias) <= 1


@pytest.mark.parametrize("size", [(1, 64), (32, 48), (1, 512), (300, 512)])
def test_the_fast_path_is_taken_and_nothing_else(one_thread, size):
    """In a plain forward no weight is decoded whole."""
    module = layer(size=size)
    x = torch.randn(3, 512)
    weight = dense_of(module, torch.float32)
    with mock.patch.object(SCHEME, "dequantize", side_effect=AssertionError):
        for mode in (torch.no_grad, torch.inference_mode):
            with mode():
                assert excess(module(x), x, weight, module.bias) <= 1


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.bfloat16, (1, 64)), (torch.float32, (128, 128))]
)
@pytest.mark.parametrize("kernel", ["cpu", "torch_eager"])
def test_temporaries_are_the_scales_of_a_piece(
    threads, dtype, size, kernel, monkeypatch
):
    """Beside input, output, the buffer that is kept, and what a product itself takes.

    That last part is the processor's: products of Intel's AMX take more than a
    mebibyte, others nothing.
    """
    monkeypatch.setenv("HIJACK_FORWARD", kernel)
    module = layer(4096, 3072, size, dtype=dtype)
    for rows in (1, 16, 256):
        x = torch.randn(rows, 3072).to(dtype)
        with torch.no_grad():
            out = module(x)
            with profile(
                activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
            ) as prof:
                module(x)
        peak = peak_outside_products(prof.profiler.kineto_results.events())
        scales = torch_eager.GRAIN * torch.float32.itemsize
        assert out.nbytes <= peak <= out.nbytes + 2 * scales


def peak_outside_products(events: list) -> int:
    """The most bytes allocated at any moment when no matrix product was running."""
    products = [e for e in events if e.name() in ("aten::mm", "aten::addmm")]
    now = peak = 0
    memory = [e for e in events if e.name() == "[memory]"]
    for event in sorted(memory, key=lambda e: e.start_ns()):
        now += event.nbytes()
        at = event.start_ns()
        if not any(
            p.start_ns() <= at <= p.start_ns() + p.duration_ns() for p in products
        ):
            peak = max(peak, now)
    return peak


# -- what takes the plain path, and must -----------------------------------------------


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_codes_that_are_no_numbers_stay_so(dtype):
    """The codes of NaN and infinity are not decoded as numbers, even when new."""
    q, params = quantized((4, 64), (1, 64), dtype, torch.float32)
    assert SCHEME.dequantize(q, params, torch.bfloat16).isfinite().all()
    q.view(torch.uint8)[1, 2] = 0xFF  # NaN, in place: the tensor was seen as clean
    q.view(torch.uint8)[1, 3] = 0x7F if dtype == E4M3 else 0xFC
    got = SCHEME.dequantize(q, params, torch.bfloat16)
    assert (~got.isfinite()).nonzero().tolist() == [[1, 2], [1, 3]]


def test_scales_whose_power_overflows():
    """Scales from 128 on are multiplied the plain way; NaN scales give NaN."""
    for value in (127.0, 300.0, 1e30, -300.0, float("inf"), float("nan")):
        for scale_dtype in (torch.float32, torch.bfloat16):
            q, params = quantized((4, 64), (1, 64), E4M3, scale_dtype)
            params["weight_scale"][2] = value
            got = SCHEME.dequantize(q, params, torch.float32)
            wanted = plain(q, params, torch.float32)
            assert torch.equal(got, wanted) or (value != value or value == float("inf"))
            assert torch.equal(got.isnan(), wanted.isnan())
    q, params = quantized((4, 64), (1, 64), E4M3, torch.uint8)
    params["weight_scale"][2] = 200
    assert_same_bits(
        SCHEME.dequantize(q, params, torch.float32), plain(q, params, torch.float32)
    )


def test_flushing_subnormal_numbers():
    """Codes below the smallest normal number survive set_flush_denormal."""
    q, params = quantized((8, 64), (1, 64), E4M3, torch.float32)
    wanted = SCHEME.dequantize(q, params, torch.bfloat16)
    if not torch.set_flush_denormal(True):
        pytest.skip("this processor cannot flush subnormal numbers")
    try:
        got = SCHEME.dequantize(q, params, torch.bfloat16)
    finally:
        torch.set_flush_denormal(False)
    assert_same_bits(got, wanted)


def test_new_weights_are_seen():
    """Nothing about a weight is remembered that could be out of date."""
    module = layer(bias=False)
    x = torch.randn(2, 512)
    with torch.no_grad():
        old = module(x)
        module.weight.params["weight_scale"] *= 2
        doubled = module(x)
        module.load_state_dict(layer(bias=False).state_dict())
        new = module(x)
        other = {"weight": layer().weight}
        called = torch.func.functional_call(module, other, (x,))
    torch.testing.assert_close(doubled, old * 2)
    assert not torch.allclose(new, doubled)
    assert not torch.allclose(called, new)


def test_gradients_flow_through_the_input(one_thread):
    """Autograd keeps the right weight, also when a tile buffer is written meanwhile."""
    module, other = layer(), layer()
    x = torch.randn(3, 512, requires_grad=True)
    out = module(x)
    other(x.detach())
    out.sum().backward()
    weight = dense_of(module, torch.float32)
    assert torch.allclose(x.grad, weight.sum(0).expand(3, -1), atol=1e-5)
    module.requires_grad_(False)
    assert not module(x.detach()).requires_grad


@pytest.mark.filterwarnings("ignore")  # of jit, about itself
def test_transforms_and_modes_take_the_plain_path():
    """vmap, forward-mode derivatives, autocast and jit tracing see plain operations."""
    module = layer().requires_grad_(False)
    x = torch.randn(4, 3, 512)
    wanted = module(x)
    assert torch.allclose(torch.vmap(module)(x), wanted, atol=1e-5)
    _, tangent = torch.func.jvp(module, (x,), (torch.ones_like(x),))
    assert torch.allclose(tangent, module(torch.ones_like(x)) - module.bias, atol=1e-3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x).dtype == torch.bfloat16
    traced = torch.jit.trace(module, (x,), check_trace=False)
    assert torch.allclose(traced(x * 2), module(x * 2), atol=1e-4)


def test_other_shapes_of_input():
    """No rows, one dimension, and a mismatch that F.linear explains."""
    module = layer()
    assert module(torch.randn(0, 512)).shape == (0, 300)
    assert module(torch.randn(512)).shape == (300,)
    with pytest.raises(RuntimeError, match="cannot be multiplied"):
        module(torch.randn(2, 500))


def test_threads_do_not_share_buffers():
    """Many Python threads at once get what one gets."""
    x = torch.randn(2, 512)
    wrong = []

    def work(module: nn.Linear, weight: Tensor) -> None:
        with torch.no_grad():
            for _ in range(20):
                if not excess(module(x), x, weight, module.bias) <= 1:
                    wrong.append(module)

    modules = [layer() for _ in range(4)]
    weights = [dense_of(module, torch.float32) for module in modules]
    workers = [
        threading.Thread(target=work, args=pair)
        for pair in zip(modules, weights, strict=True)
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


class Parent(nn.Module):
    """An embedding and two Linears, the last one with short blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.up = nn.Embedding(50, 128), nn.Linear(128, 96)
        self.down = nn.Linear(96, 70)

    def forward(self, index: Tensor) -> Tensor:
        return self.down(self.up(self.embed(index)).relu())


@pytest.mark.parametrize("size", [(1, 64), (32, 40)])
def test_it_compiles_inside_a_parent(size):
    """In one graph, with the values of eager mode: short blocks, too."""
    model = Parent().bfloat16().requires_grad_(False)
    hijack.wrap_model(model, SCHEME, block_size=size)
    index = torch.randint(50, (4, 7))
    wanted = model(index)
    torch._dynamo.reset()
    got = torch.compile(model, fullgraph=True)(index)
    rounding = 2 * torch.finfo(torch.bfloat16).eps * wanted.abs().max()
    assert (got - wanted).abs().max() <= rounding
    exported = torch.export.export(model, (index,)).module()
    assert (exported(index) - wanted).abs().max() <= rounding


@pytest.mark.parametrize("size", [(1, 64), (32, 40), "row", "tensor"])
def test_an_embedding_decodes_the_rows_asked_for(size):
    """The rows of the dense table, for any index shape."""
    dense = nn.Embedding(50, 128, padding_idx=3, dtype=torch.bfloat16)
    module = hijack.wrap_module(copy.deepcopy(dense), SCHEME, block_size=size)
    assert module._bound_forward is embedding_forward
    table = hijack.unwrap(copy.deepcopy(module)).weight.detach()
    for index in (torch.tensor([[3, 0], [49, 7]]), torch.tensor(5), torch.tensor([])):
        index = index.long()
        assert torch.equal(module(index), F.embedding(index, table))
    assert torch.equal(module(torch.tensor([9], dtype=torch.int32)), table[9:10])


def test_a_forward_hijack_does_not_know_is_not_replaced():
    """Only nn.Linear's and nn.Embedding's own forward are."""

    class Twice(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * 2

    module = hijack.wrap_module(Twice(64, 8), SCHEME)
    assert module._bound_forward is not linear_forward
    limited = hijack.wrap_module(nn.Embedding(8, 64, max_norm=1.0), SCHEME)
    assert limited._bound_forward is not embedding_forward
    assert SCHEME.bind_forward(nn.Linear(64, 8)) is linear_forward
