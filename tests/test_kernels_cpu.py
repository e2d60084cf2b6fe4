"""CPU kernels: decoding, products and quantizing, against plain formulas."""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
import threading
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hijack.errors import HijackError
from schemes import int8
from schemes._fp8 import quantize as fp8
from schemes._kernels import cpu
from schemes._kernels.block_scaled import BlockScaled

DENSE = (torch.float32, torch.bfloat16, torch.float16)
SCALES = (*DENSE, torch.float8_e8m0fnu, torch.float8_e4m3fn)
CODES = ("e4m3", "e5m2", "int8", "low", "high")
E2M1 = (0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6)
#: (N, K), (R, C): whole and short blocks, narrow ones, rows, and one block.
GRIDS = (
    ((7, 576), (1, 64)),
    ((9, 300), (2, 64)),
    ((8, 288), (3, 32)),
    ((5, 208), (2, 16)),
    ((3, 160), (1, 16)),
    ((9, 130), (2, 40)),
    ((10, 100), (3, 6)),
    ((5, 34), (5, 1)),
    ((3, 512), (1, 512)),
    ((9, 302), (9, 302)),
)


@pytest.fixture(autouse=True)
def _one_thread():
    """One thread unless a test asks for more; without kernels, tests are skipped."""
    weight = make("e4m3", torch.float32, (2, 64), (1, 64))
    if reason := cpu.refuses(weight, torch.float32):
        pytest.skip(reason)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["torch's threads", "a pool"])
def two_threads(request, monkeypatch, _one_thread):
    """Two threads of either kind, and work that is split however small it is."""
    from schemes._kernels.cpu import threads

    torch.set_num_threads(2)
    monkeypatch.setattr(threads, "GRAIN", 1)
    if request.param == "a pool":
        monkeypatch.setattr(threads, "_openmp", lambda: None)
    elif threads._openmp() is None:
        pytest.skip("torch has no GNU OpenMP here")


def finite_codes(dtype: torch.dtype) -> Tensor:
    """Every code that is a finite number."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    return codes[codes.float().isfinite()]


def make(code, scale_dtype, shape, size, *, factor=None, normal=False) -> BlockScaled:
    """A weight with random codes and scales of all magnitudes, or of ordinary ones."""
    generator = torch.Generator().manual_seed(len(code) + shape[0] + shape[1])
    (n, k), (rows, cols) = shape, size
    grid = (-(-n // rows), -(-k // cols))

    def integers(low: int, high: int, shape: tuple[int, ...]) -> Tensor:
        return torch.randint(low, high, shape, generator=generator)

    if scale_dtype == torch.float8_e8m0fnu:
        span = (112, 120) if normal else (0, 255)
        scale = integers(*span, grid).to(torch.uint8).view(scale_dtype)
    elif scale_dtype == torch.float8_e4m3fn:
        span = (8, 32) if normal else (0, 127)
        scale = integers(*span, grid).to(torch.uint8).view(scale_dtype)
    else:
        span = (-24, 15) if scale_dtype == torch.float16 else (-149, 127)
        exponent = integers(*((-12, -7) if normal else span), grid)
        fraction = 1 + torch.rand(grid, generator=generator)
        scale = torch.ldexp(fraction, exponent).to(scale_dtype)
        scale[0, 0] = 0
    if code in ("low", "high"):
        codes = integers(0, 256, (n, k // 2)).to(torch.uint8)
        table = torch.tensor(E2M1) if code == "low" else torch.randn(16).sort()[0]
        return BlockScaled(codes, scale, size, table, code == "high", factor)
    dtypes = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
    finite = finite_codes(dtypes.get(code, torch.int8))
    chosen = finite.view(torch.uint8)[integers(0, len(finite), (n, k))]
    return BlockScaled(chosen.view(finite.dtype), scale, size, factor=factor)


def plain(weight: BlockScaled, dtype: torch.dtype) -> Tensor:
    """The dense weight by the formula of `BlockScaled`."""
    (n, k), (rows, cols) = weight.shape, weight.size
    if weight.table is None:
        numbers = weight.codes.float()
    else:
        parts = [weight.codes & 15, weight.codes >> 4]
        if weight.high_first:
            parts.reverse()
        numbers = weight.table[torch.stack(parts, -1).flatten(1).long()]
    scale = weight.scale.float()
    if weight.factor is not None:
        scale = scale * weight.factor
    scale = scale.repeat_interleave(rows, 0)[:n].repeat_interleave(cols, 1)[:, :k]
    return (numbers * scale).to(dtype)


def assert_equal_bits(actual: Tensor, expected: Tensor) -> None:
    """Fail unless two tensors have the same bits."""
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    bits = [t.clone(memory_format=torch.contiguous_format) for t in (actual, expected)]
    assert torch.equal(*(t.flatten().view(torch.uint8) for t in bits))


def assert_product(
    actual: Tensor, x: Tensor, weight: BlockScaled, bias: Tensor | None
) -> None:
    """Fail unless a product is within the bound of its dtype and length.

    Both the weight and the result are rounded once, numbers of ``x``'s dtype may be
    subnormal, and a sum of K terms in float32 errs by K roundings at most.
    """
    info, k = torch.finfo(x.dtype), x.shape[1]
    dense = plain(weight, torch.float32).double()
    expected = x.double() @ dense.t()
    size = x.double().abs() @ dense.abs().t()
    if bias is not None:
        expected += bias.double()
        size += bias.double().abs()
    lost = x.double().abs().sum(1, keepdim=True) * info.tiny * info.eps
    bound = size * (info.eps + k * 2.0**-24) + lost + info.tiny
    assert actual.dtype == x.dtype
    assert actual.shape == expected.shape
    assert ((actual.double() - expected).abs() <= bound).all()


# -- decode ----------------------------------------------------------------------------


@pytest.mark.parametrize("out", DENSE, ids=str)
@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize("code", CODES)
def test_decodes_every_grid_bit_for_bit(code, scale, out):
    """Whole, short and narrow blocks, with scales of all magnitudes and zero."""
    for shape, size in GRIDS:
        factor = torch.tensor(0.7) if size[0] > 1 else None
        weight = make(code, scale, shape, size, factor=factor)
        dense = torch.full(shape, 7.0, dtype=out)
        cpu.decode(weight, dense)
        assert_equal_bits(dense, plain(weight, out))


@pytest.mark.parametrize("out", DENSE, ids=str)
@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize("code", CODES)
def test_decodes_every_code_with_many_scales(code, scale, out):
    """All codes times scales of every exponent that their dtype has."""
    if scale.itemsize == 1:
        scales = finite_codes(scale)
        scales = scales.view(torch.uint8)[scales.float() >= 0].view(scale)
    else:
        powers = torch.exp2(torch.arange(-149, 128)).to(scale)
        scales = torch.cat([powers, (powers.float() * 1.3).to(scale)])
        scales = scales[scales.float().isfinite()]
    if code in ("low", "high"):
        codes = torch.arange(256, dtype=torch.uint8)
        codes = codes.expand(len(scales), 256)
        table = torch.tensor(E2M1)
        weight = BlockScaled(codes, scales[:, None], (1, 512), table, code == "high")
    else:
        dtypes = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
        codes = finite_codes(dtypes.get(code, torch.int8))
        codes = codes.view(torch.uint8).expand(len(scales), len(codes))
        codes = codes.view(dtypes.get(code, torch.int8))
        weight = BlockScaled(codes, scales[:, None], (1, codes.shape[1]))
    dense = torch.empty(weight.shape, dtype=out)
    cpu.decode(weight, dense)
    assert_equal_bits(dense, plain(weight, out))


@pytest.mark.parametrize("code", ["e4m3", "low"])
def test_decodes_rows_of_views_into_views(code):
    """Rows of a weight with strides and offsets go to a view with strides."""
    big = make(code, torch.bfloat16, (40, 256), (4, 64))
    packed = 2 if code == "low" else 1
    views = {
        "columns": big._replace(
            codes=big.codes[8:28, 64 // packed : 192 // packed],
            scale=big.scale[2:7, 1:3],
        ),
        "transposed": big._replace(
            codes=big.codes.view(torch.uint8)
            .t()
            .contiguous()
            .t()
            .view(big.codes.dtype),
            scale=big.scale.t().contiguous().t(),
        ),
        "expanded": big._replace(
            codes=big.codes[:1].view(torch.uint8).expand(20, -1).view(big.codes.dtype),
            scale=big.scale[:1, :1].expand(5, 4),
        ),
    }
    for weight in views.values():
        n, k = weight.shape
        expected = plain(weight, torch.bfloat16)
        for rows in (slice(0, n), slice(3, 11), slice(5, 5), slice(n - 1, n)):
            room = torch.full((n + 2, k + 6), 7.0, dtype=torch.bfloat16)
            part = room[1 : 1 + rows.stop - rows.start, 3 : 3 + k]
            cpu.decode(weight, part, rows)
            assert_equal_bits(part, expected[rows])
            part.fill_(7.0)
            assert (room == 7).all()  # nothing beside it was written
            turned = torch.empty((k, rows.stop - rows.start), dtype=torch.bfloat16)
            cpu.decode(weight, turned.t(), rows)
            assert_equal_bits(turned.t(), expected[rows])


# -- linear ----------------------------------------------------------------------------


@pytest.mark.parametrize("code", CODES)
@pytest.mark.parametrize("dtype", DENSE, ids=str)
def test_products_are_within_the_bound(code, dtype):
    """Few rows, more and many, of all grids, with a bias and without."""
    generator = torch.Generator().manual_seed(0)
    for (n, k), size in (*GRIDS, ((37, 1088), (1, 16)), ((130, 512), (128, 128))):
        weight = make(code, torch.bfloat16, (n, k), size, normal=True)
        for m in (0, 1, 2, 3, 7, 16, 33, 130):
            x = torch.randn((m, k), generator=generator).to(dtype)
            bias = torch.randn(n, generator=generator).to(dtype) if m % 2 else None
            assert_product(cpu.linear(x, weight, bias), x, weight, bias)


@pytest.mark.parametrize("scale", SCALES, ids=str)
@pytest.mark.parametrize("code", ["e4m3", "low"])
def test_dot_products_take_scales_of_every_dtype(code, scale):
    """One row of input, with a factor of all scales."""
    weight = make(
        *(code, scale, (6, 192), (2, 16)), factor=torch.tensor(0.3), normal=True
    )
    x = torch.randn((1, 192)).bfloat16()
    assert_product(cpu.linear(x, weight), x, weight, None)


def test_inputs_may_have_strides():
    """Columns and rows of a larger tensor give what their copies give."""
    weight = make("e4m3", torch.float32, (24, 128), (1, 64), normal=True)
    room = torch.randn(64, 300).bfloat16()
    for x in (room[3:4, 5:133], room[:6, 5:133], room[:128:2, :128], room.t()[:2, :0]):
        if x.shape[1]:
            assert_product(cpu.linear(x, weight), x, weight, None)
    turned = torch.randn(128, 40).bfloat16().t()
    assert_product(cpu.linear(turned[:2], weight), turned[:2], weight, None)
    assert_product(cpu.linear(turned, weight), turned, weight, None)


def test_weights_without_elements_give_the_bias():
    """No columns, or no rows."""
    codes = torch.ones((4, 0), dtype=torch.int8)
    weight = BlockScaled(codes, torch.ones(4, 0), (1, 64))
    bias = torch.randn(4)
    cpu.decode(weight, torch.empty(4, 0))
    assert torch.equal(cpu.linear(torch.empty(3, 0), weight, bias), bias.expand(3, 4))
    assert torch.equal(cpu.linear(torch.empty(3, 0), weight), torch.zeros(3, 4))
    weight = BlockScaled(codes.view(0, 4), torch.ones(0, 1), (1, 4))
    assert cpu.linear(torch.ones(3, 4), weight).shape == (3, 0)


def test_weights_of_many_tiles_are_multiplied_whole(monkeypatch):
    """Tiles that do not divide the rows leave none out."""
    from schemes._kernels.cpu import product

    monkeypatch.setattr(product, "TILE_BYTES", 1 << 12)
    monkeypatch.setattr(product, "TILE_ROWS", 1)
    monkeypatch.setattr(product, "PIECE_BYTES", 1 << 15)
    weight = make("e4m3", torch.bfloat16, (421, 128), (1, 64), normal=True)
    bias = torch.randn(421).bfloat16()
    for m in (40, 600):
        x = torch.randn(m, 128).bfloat16()
        assert_product(cpu.linear(x, weight, bias), x, weight, bias)


# -- quantize --------------------------------------------------------------------------

FLOATS = (torch.float8_e4m3fn, torch.float8_e5m2)


def plain_fp8(
    weight: Tensor, size, dtype: torch.dtype, scale: torch.dtype, candidates: int = 0
) -> tuple[Tensor, Tensor]:
    """Codes and scales by torch's operations alone."""
    grid = [-(-weight.shape[i] // size[i]) for i in (0, 1)]
    codes, scales = torch.empty(weight.shape, dtype=dtype), torch.empty(grid).to(scale)
    with mock.patch.dict(os.environ, HIJACK_FORWARD="plain"):
        fp8.quantize(weight, size, codes, scales, candidates=candidates)
    return codes, scales


BLOCKS = (
    ((9, 576), (1, 64)),
    ((5, 600), (1, 64)),
    ((150, 320), (128, 128)),
    ((10, 50), (3, 7)),
    ((4, 512), (1, 512)),
    ((20, 96), (20, 96)),
)


def weights(shape: tuple[int, int], dtype: torch.dtype) -> list[Tensor]:
    """Weights of several magnitudes, with zeros, outliers and rows of zeros."""
    generator = torch.Generator().manual_seed(shape[0])
    made = []
    for size in (1.0, 1e-4, 1e-9, 300.0, 0.0):
        spread = torch.exp(3 * torch.randn(shape, generator=generator))
        weight = torch.randn(shape, generator=generator) * spread * size
        weight = weight.clamp(-60000, 60000).to(dtype)
        weight[0, 0], weight[0, 1], weight[1] = 0.0, -0.0, 0.0
        made.append(weight)
    return made


@pytest.mark.parametrize("scale_dtype", [*DENSE, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("dense", DENSE, ids=str)
def test_quantizes_to_fp8_bit_for_bit(dense, dtype, scale_dtype):
    """Scales and codes are those of torch's operations."""
    for shape, size in BLOCKS:
        for weight in weights(shape, dense):
            codes, scale = plain_fp8(weight, size, dtype, scale_dtype)
            actual, actual_scale = torch.empty_like(codes), torch.empty_like(scale)
            assert cpu.quantize_fp8(weight, size, actual, actual_scale)
            assert_equal_bits(actual_scale, scale)
            assert_equal_bits(actual, codes)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_quotients_between_two_codes_go_to_the_even_one(dtype):
    """Every number halfway between two codes, and its neighbours."""
    numbers = finite_codes(dtype).float().unique()
    middle = (numbers[1:] + numbers[:-1]) / 2
    below = torch.nextafter(middle, torch.tensor(-torch.inf))
    above = torch.nextafter(middle, torch.tensor(torch.inf))
    weight = torch.cat([numbers, middle, below, above])[None]
    codes = torch.empty(weight.shape, dtype=dtype)
    scale = torch.empty((1, 1))
    assert cpu.quantize_fp8(weight, (1, weight.shape[1]), codes, scale)
    assert scale.item() == 1
    assert_equal_bits(codes, weight.to(dtype))


@pytest.mark.parametrize("scale_dtype", DENSE, ids=str)
@pytest.mark.parametrize("dense", DENSE, ids=str)
def test_quantizes_to_int8_bit_for_bit(dense, scale_dtype):
    """Scales and codes are those of the scheme `int8`."""
    for shape, size in (*BLOCKS, ((5, 192), (1, 192))):
        for weight in weights(shape, dense):
            scale = int8._scale(weight.float(), size, scale_dtype, 0).to(scale_dtype)
            codes = int8._codes(weight.float(), scale.float(), size, None)
            actual = torch.empty(shape, dtype=torch.int8)
            actual_scale = torch.empty_like(scale)
            if not scale.isfinite().all():
                assert not cpu.quantize_int8(weight, size, actual, actual_scale)
                continue
            assert cpu.quantize_int8(weight, size, actual, actual_scale)
            assert_equal_bits(actual_scale, scale)
            assert_equal_bits(actual, codes.to(torch.int8))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dense", DENSE, ids=str)
def test_numbers_that_are_not_finite_are_told(dense, value):
    """Wherever they are in a block."""
    codes = torch.empty((3, 150), dtype=torch.float8_e4m3fn)
    for at in ((0, 0), (1, 63), (2, 149)):
        weight = torch.randn(3, 150).to(dense)
        assert cpu.quantize_fp8(weight, (1, 64), codes, torch.empty(3, 3))
        assert cpu.quantize_int8(
            weight, (1, 64), codes.view(torch.int8), torch.empty(3, 3)
        )
        weight[at] = value
        assert not cpu.quantize_fp8(weight, (1, 64), codes, torch.empty(3, 3))
        assert not cpu.quantize_int8(
            weight, (1, 64), codes.view(torch.int8), torch.empty(3, 3)
        )


def errors(weight: Tensor, dense: Tensor, size: tuple[int, int]) -> Tensor:
    """The squared error of each block in float64."""
    (n, k), (rows, cols) = weight.shape, size
    square = (dense.double() - weight.double()) ** 2
    square = F.pad(square, (0, -k % cols, 0, -n % rows))
    return square.view(len(square) // rows, rows, -1, cols).sum((1, 3))


def fp8_error(weight: Tensor, scale: Tensor, size, dtype: torch.dtype) -> Tensor:
    """The squared error of each block with given scales."""
    codes = torch.empty(weight.shape, dtype=dtype)
    fp8.encode(weight, scale, size, codes, None)
    return errors(weight, plain(BlockScaled(codes, scale, size), torch.float32), size)


@pytest.mark.parametrize("scale_dtype", [*DENSE, torch.float8_e8m0fnu], ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_search_for_fp8_scales_is_no_worse_than_the_plain_one(dtype, scale_dtype):
    """No block errs more than with torch's operations, within float32."""
    for (shape, size), candidates in itertools.product(BLOCKS[:4], (1, 16, 32)):
        weight = torch.randn(shape).bfloat16()
        _, first = plain_fp8(weight, size, dtype, scale_dtype)
        _, plain_scale = plain_fp8(weight, size, dtype, scale_dtype, candidates)
        codes, scale = torch.empty(shape, dtype=dtype), torch.empty_like(first)
        assert cpu.quantize_fp8(weight, size, codes, scale, candidates)
        expected = torch.empty_like(codes)
        fp8.encode(weight, scale, size, expected, None)
        assert_equal_bits(codes, expected)
        error = fp8_error(weight, scale, size, dtype)
        least = fp8_error(weight, plain_scale, size, dtype)
        assert (error <= least * (1 + 2 * fp8.MARGIN)).all()
        assert (error <= fp8_error(weight, first, size, dtype)).all()
    if scale_dtype.itemsize > 1:  # half a power of two is hardly ever better
        assert error.sum() < fp8_error(weight, first, size, dtype).sum()


@pytest.mark.parametrize("scale_dtype", DENSE, ids=str)
def test_a_search_for_int8_scales_is_no_worse_than_the_plain_one(scale_dtype):
    """No block errs more than with the scheme's search, within float32."""
    for (shape, size), candidates in itertools.product(BLOCKS[:4], (1, 20)):
        weight = torch.randn(shape)
        codes = torch.empty(shape, dtype=torch.int8)
        expected = int8._scale(weight, size, scale_dtype, candidates)
        scale = torch.empty_like(expected, dtype=scale_dtype)
        assert cpu.quantize_int8(weight, size, codes, scale, candidates)
        assert_equal_bits(
            codes, int8._codes(weight, scale.float(), size, None).to(torch.int8)
        )
        error = int8._squared_error(weight, scale.float(), size)
        least = int8._squared_error(weight, expected, size)
        assert (error <= least * (1 + 2.0**-16)).all()


# -- threads, modes, failures ----------------------------------------------------------


def test_several_threads_give_what_one_gives(two_threads):
    """Rows that are split, also from several Python threads at once."""
    weight = make("e4m3", torch.bfloat16, (301, 192), (3, 64), normal=True)
    expected = plain(weight, torch.bfloat16)
    x = torch.randn(2, 192).bfloat16()
    matrix = torch.randn(301, 192)
    _, scale = plain_fp8(matrix, (3, 64), torch.float8_e4m3fn, torch.float32)
    failures = []

    def work() -> None:
        try:
            for _ in range(20):
                dense = torch.empty(301, 192, dtype=torch.bfloat16)
                cpu.decode(weight, dense)
                assert_equal_bits(dense, expected)
                assert_product(cpu.linear(x, weight), x, weight, None)
                codes = torch.empty(301, 192, dtype=torch.float8_e4m3fn)
                found = torch.empty_like(scale)
                assert cpu.quantize_fp8(matrix, (3, 64), codes, found)
                assert_equal_bits(found, scale)
        except BaseException as error:  # seen by the thread that started this one
            failures.append(error)

    others = [threading.Thread(target=work) for _ in range(4)]
    for other in others:
        other.start()
    for other in others:
        other.join()
    assert not failures


def test_what_is_used_in_inference_mode_first_serves_outside_too():
    """Buffers that are kept are not tensors of inference mode."""
    weight = make("int8", torch.float32, (30, 128), (1, 128), normal=True)

    def multiply() -> None:
        for m in (1, 20):
            x = torch.randn(m, 128)
            assert_product(cpu.linear(x, weight), x, weight, None)

    def work() -> None:  # a new thread has no buffers
        with torch.inference_mode():
            multiply()
        multiply()
        done.append(True)

    done: list[bool] = []
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done


@pytest.mark.parametrize("code", CODES)
def test_codes_survive_where_subnormal_numbers_are_flushed(code):
    """Small codes are no subnormal numbers on the way to ordinary ones."""
    weight = make(code, torch.bfloat16, (7, 576), (1, 64), normal=True)
    expected = plain(weight, torch.bfloat16)
    dense = torch.empty_like(expected)
    assert torch.set_flush_denormal(True)
    try:
        cpu.decode(weight, dense)
        x = torch.randn(2, 576)
        product = cpu.linear(x, weight)
    finally:
        torch.set_flush_denormal(False)
    assert_equal_bits(dense, expected)
    assert_product(product, x, weight, None)


def test_inputs_that_want_gradients_get_none():
    """The product is one of numbers, whatever records a graph."""
    weight = make("e4m3", torch.float32, (30, 128), (1, 64), normal=True)
    x = torch.randn(2, 128, requires_grad=True)
    bias = torch.randn(30, requires_grad=True)
    for rows in (x, torch.cat([x] * 8)):
        result = cpu.linear(rows, weight, bias)
        assert not result.requires_grad
        assert_product(result, rows.detach(), weight, bias.detach())


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")
def test_threads_are_made_again_after_a_fork():
    """A forked process waits for no thread that it has not."""
    script = """
import os, torch
from schemes._kernels import cpu
from schemes._kernels.block_scaled import BlockScaled
from schemes._kernels.cpu import threads
torch.set_num_threads(2)
threads.GRAIN = 1
weight = BlockScaled(torch.ones((64, 64), dtype=torch.int8), torch.ones(64, 1), (1, 64))
dense = torch.empty(64, 64)
cpu.decode(weight, dense)
child = os.fork()
dense.zero_()
cpu.decode(weight, dense)
assert (dense == 1).all()
if not child:
    os._exit(0)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    run = [sys.executable, "-W", "ignore", "-c", script]
    subprocess.run(run, check=True, timeout=60)


def test_importing_kernels_imports_no_llvmlite():
    """Who uses no kernel pays for none."""
    script = (
        "import sys, schemes._kernels.cpu; "
        "assert not {'llvmlite', 'numba'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_without_llvmlite_kernels_say_what_to_install():
    """The sentence for a report, and an error that a caller can catch."""
    script = """
import sys
sys.modules["llvmlite"] = None
import torch
from hijack.errors import HijackError
from schemes._kernels import cpu
from schemes._kernels.block_scaled import BlockScaled
weight = BlockScaled(torch.ones((4, 64), dtype=torch.int8), torch.ones(4, 1), (1, 64))
assert "pip install" in cpu.refuses(weight, torch.float32)
try:
    cpu.decode(weight, torch.empty(4, 64))
except (HijackError, ImportError):
    pass
else:
    raise SystemExit("decoded without a compiler")
"""
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)


def test_refuses_what_it_cannot_take():
    """Other devices and dtypes, in a sentence."""
    weight = make("e4m3", torch.float32, (4, 64), (1, 64))
    assert cpu.refuses(weight, torch.bfloat16) is None
    assert "float64" in cpu.refuses(weight, torch.float64)
    meta = weight._replace(codes=weight.codes.to("meta"))
    assert "meta" in cpu.refuses(meta, torch.float32)
    wide = weight._replace(scale=weight.scale.double())
    assert "float64" in cpu.refuses(wide, torch.float32)
    assert "uint8" in cpu.refuses(
        weight._replace(codes=weight.codes.view(torch.uint8)), torch.float32
    )


def test_a_kernel_that_llvm_refuses_raises_an_error_to_catch(monkeypatch):
    """The error is hijack's own and names the kernel."""
    from schemes._kernels.cpu import llvm

    def broken() -> object:
        class Function:
            module = "define i64 @f() { no such instruction }"
            name, kinds = "f", ""

        return Function()

    with pytest.raises(HijackError, match="broken"):
        llvm.kernel(broken)


# -- other processors ------------------------------------------------------------------


@pytest.fixture
def avx2_alone(monkeypatch):
    """Kernels as they are compiled where there is no AVX-512."""
    from schemes._kernels.cpu import llvm

    features = {
        name: on and not name.startswith("avx512")
        for name, on in llvm._features().items()
    }
    if not features.get("avx2"):
        pytest.skip("the processor has no AVX2")
    with monkeypatch.context() as patch:
        patch.setattr(llvm, "_features", lambda: features)
        patch.setattr(llvm, "_kernels", {})
        for cached in (llvm.host, llvm._machine):
            cached.cache_clear()
        assert not llvm.host().permute16
        yield
    for cached in (llvm.host, llvm._machine):
        cached.cache_clear()


@pytest.mark.parametrize("code", CODES)
def test_kernels_for_avx2_give_the_same(avx2_alone, code):
    """Decoded bits are equal, and products are within the bound."""
    for shape, size in GRIDS[:6]:
        weight = make(code, torch.bfloat16, shape, size)
        for out in DENSE:
            dense = torch.empty(shape, dtype=out)
            cpu.decode(weight, dense)
            assert_equal_bits(dense, plain(weight, out))
        weight = make(code, torch.bfloat16, shape, size, normal=True)
        for m in (1, 4, 9):
            x = torch.randn(m, shape[1]).bfloat16()
            assert_product(cpu.linear(x, weight), x, weight, None)


def test_quantizing_for_avx2_gives_the_same(avx2_alone):
    """Scales and codes are those of the plain quantizer."""
    dtype = torch.float8_e4m3fn
    for shape, size in BLOCKS[:4]:
        for weight in weights(shape, torch.bfloat16):
            codes, scale = plain_fp8(weight, size, dtype, torch.bfloat16)
            actual, actual_scale = torch.empty_like(codes), torch.empty_like(scale)
            assert cpu.quantize_fp8(weight, size, actual, actual_scale)
            assert_equal_bits(actual_scale, scale)
            assert_equal_bits(actual, codes)
            assert cpu.quantize_fp8(weight, size, actual, actual_scale, 16)


@pytest.mark.parametrize(
    ("triple", "processor", "permutes"),
    [
        ("aarch64-unknown-linux-gnu", "neoverse-n1", (False, False)),
        ("arm64-apple-macosx", "apple-m1", (False, False)),
        ("x86_64-pc-windows-msvc", "haswell", (False, True)),
        ("x86_64-pc-windows-msvc", "skylake-avx512", (True, True)),
    ],
)
def test_kernels_build_for_processors_that_are_not_here(
    monkeypatch, triple, processor, permutes
):
    """LLVM translates each kind of kernel without a call of a library."""
    import llvmlite.binding as llvm

    from schemes._kernels.cpu import decoding, dot, quantize, vectors

    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    try:
        target = llvm.Target.from_triple(triple)
    except RuntimeError as error:
        pytest.skip(f"this LLVM does not know {triple}: {error}")
    machine = target.create_target_machine(cpu=processor, opt=3)
    host = type(vectors.host())(*permutes, bf16=False, tiles=False)
    for module in (vectors, decoding, dot):
        monkeypatch.setattr(module, "host", lambda: host)
    built = []
    for code, out in zip(CODES, itertools.cycle(("f32", "bf16", "f16")), strict=False):
        steps = [(64, False), (0, False)]
        if code in ("low", "high"):
            steps.append((32, True))
        for scale, (step, pair) in itertools.product(("bf16", "e4m3"), steps):
            spec = decoding.Spec(code, scale, out, step, pair)
            built.append(decoding.build(spec))
    for code in CODES:
        built.append(dot.build(dot.Spec(code, "f16", 32, False, 1)))
    for dense, code in itertools.product(("f32", "bf16", "f16"), ("e4m3", "int8")):
        for scale in ("f32", "f16") if code == "int8" else ("bf16", "e8m0"):
            built.append(quantize.build(quantize.Spec(dense, code, scale, True)))
    for function in built:
        module = llvm.parse_assembly(str(function.module))
        module.triple = triple
        text = machine.emit_assembly(module)
        assert not re.findall(r"^\s+(?:bl|callq?)[ \t]+\S+", text, re.MULTILINE)
