"""Scale search: never worse than absmax, better where blocks are small."""

import os
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hijack.errors import NonFiniteError, SchemeError
from schemes._fp8 import quantize
from schemes.blockwise_fp8 import BlockwiseFP8

SCHEME = BlockwiseFP8()
E4M3, E5M2, E8M0 = torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu
DTYPES = st.sampled_from((E4M3, E5M2))
SCALES = st.sampled_from((torch.float32, torch.bfloat16, torch.float16, E8M0))


@pytest.fixture(autouse=True, scope="module", params=["cpu_quantize", "plain"])
def kernel(request):
    """Search with compiled code where it is installed, and without."""
    with mock.patch.dict(os.environ, HIJACK_FORWARD=request.param):
        yield


def dense(quantized):
    """What codes decode to, in float64."""
    return SCHEME.dequantize(*quantized, torch.float32).double()


def block_errors(weight, quantized, size):
    """Squared error of each block, summed in plain loops."""
    error = (dense(quantized) - weight.double()).square()
    return torch.stack(
        [
            part.sum()
            for rows in error.split(size[0], 0)
            for part in rows.split(size[1], 1)
        ]
    )


def decibels(weight, **options):
    """Signal to noise of a weight that is quantized."""
    return ratio(weight, dense(SCHEME.quantize(weight, **options)))


def ratio(weight, found):
    """Signal to noise, in decibels."""
    signal, noise = weight.double().square(), (found - weight.double()).square()
    return float(10 * torch.log10(signal.sum() / noise.sum()))


def directly(weight, size, dtype, candidates):
    """Scales by a cast of the whole weight for each candidate: (N/R, K/C) float32."""
    (n, k), (rows, cols) = weight.shape, size
    blocks = weight.float().view(n // rows, rows, k // cols, cols)
    first = blocks.abs().amax((1, 3), keepdim=True) / torch.finfo(dtype).max
    errors, scales = [], []
    for j in range(candidates):
        scales.append(first * 2 ** (j / candidates))
        back = (blocks / scales[-1]).to(dtype).float() * scales[-1]
        errors.append((back - blocks).square().sum((1, 3)))
    best = torch.stack(errors).argmin(0)
    return torch.stack(scales)[:, :, 0, :, 0].gather(0, best[None])[0]


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 40)),
    st.tuples(st.integers(1, 5), st.integers(1, 16)),
    DTYPES,
    SCALES,
    st.integers(-30, 30),
    st.integers(1, 128),
    st.integers(0, 2**31),
)
@settings(max_examples=200, deadline=None)
def test_no_block_gets_worse(shape, size, dtype, scale_dtype, power, candidates, seed):
    """Of ragged shapes too, both code dtypes, scales that are rounded or underflow."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=random) * 2.0**power
    weight *= torch.rand(shape, generator=random) > 0.1
    size = tuple(map(min, size, shape))
    options = {"block_size": size, "dtype": dtype, "scale_dtype": scale_dtype}
    plain = block_errors(weight, SCHEME.quantize(weight, **options), size)
    found = SCHEME.quantize(weight, scale_search=candidates, **options)
    assert (block_errors(weight, found, size) <= plain).all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("size", [(1, 64), (16, 16), (1, 256), (128, 256), (100, 96)])
def test_codes_are_those_of_the_chosen_scale(dtype, size):
    """The search chooses scales; the codes come from the one place that makes them."""
    weight = torch.randn(128, 256).bfloat16()
    codes, params = SCHEME.quantize(
        weight, block_size=size, dtype=dtype, scale_search=8
    )
    again = torch.empty_like(codes)
    quantize.encode(weight, params["weight_scale"], size, again, None)
    assert torch.equal(codes.view(torch.uint8), again.view(torch.uint8))


@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_small_blocks_gain_more_than_a_decibel(kind):
    """Normal weights in blocks of 1 x 64: 32.0 dB by absmax, 33.6 dB by search."""
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(256, 512, generator=random).mul_(0.02).to(kind)
    found, plain = decibels(weight, scale_search=32), decibels(weight)
    assert found - plain > 1.5


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("size", [(1, 32), (1, 64), (4, 16), (32, 128)])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float32])
def test_as_good_as_a_search_that_casts(dtype, size, kind):
    """Errors looked up by seven bits of mantissa find as good scales."""
    random = torch.Generator().manual_seed(1)
    weight = torch.randn(256, 512, generator=random).pow(3).to(kind)
    scale = directly(weight, size, dtype, 32)
    codes = torch.empty(weight.shape, dtype=dtype)
    quantize.encode(weight, scale, size, codes, None)
    wanted = ratio(weight, dense((codes, {"weight_scale": scale})))
    options = {"block_size": size, "dtype": dtype, "scale_dtype": torch.float32}
    assert decibels(weight, scale_search=32, **options) > wanted - 0.05


def test_rows_a_few_at_a_time_give_the_same(monkeypatch):
    """Chunks begin and end within blocks and between them."""
    weight = torch.randn(50, 96)
    for size in ((1, 32), (8, 32), (50, 96)):
        whole = SCHEME.quantize(weight, block_size=size, scale_search=32)
        monkeypatch.setattr(quantize, "CHUNK", 700)
        parts = SCHEME.quantize(weight, block_size=size, scale_search=32)
        monkeypatch.undo()
        assert torch.equal(whole[1]["weight_scale"], parts[1]["weight_scale"])


def test_rounding_is_that_of_the_cast():
    """The search rounds with two additions, to what the cast to FP8 gives."""
    for dtype in (E4M3, E5M2):
        most = torch.finfo(dtype).max
        x = torch.cat([torch.rand(4096) * most, torch.rand(4096) * 1e-4 * most])
        wanted = (x.to(dtype).float() - x).square().double()
        error = quantize._squared_error(
            x[:, None, None],
            torch.ones(8192, 1),
            dtype,
            quantize._Memory(x.device),
        )
        torch.testing.assert_close(error[:, 0], wanted, rtol=1e-6, atol=0)


def test_a_block_of_zeros_keeps_its_scale():
    """Nothing is better than no error at all."""
    zeros = torch.zeros(4, 64)
    plain, found = SCHEME.quantize(zeros), SCHEME.quantize(zeros, scale_search=32)
    assert torch.equal(plain[1]["weight_scale"], found[1]["weight_scale"])


def test_a_scale_that_became_zero_is_found_again():
    """Float16 has no 1e-8, but a number that is better than losing the block."""
    weight = torch.full((1, 64), 1e-6)
    plain = SCHEME.quantize(weight, scale_dtype=torch.float16)
    found = SCHEME.quantize(weight, scale_dtype=torch.float16, scale_search=4)
    assert dense(plain).eq(0).all()
    assert torch.allclose(dense(found), weight.double(), rtol=0.07)


def test_meta_tensors_convolutions_and_stochastic_rounding():
    """The option goes with all others."""
    meta = SCHEME.quantize(torch.empty(4, 64, device="meta"), scale_search=8)
    assert meta[0].is_meta
    conv = torch.randn(8, 4, 3, 3)
    codes, _ = SCHEME.quantize(conv, block_size="tensor", scale_search=8)
    assert codes.shape == conv.shape
    one, two = (
        SCHEME.quantize(conv, scale_search=8, stochastic=True, seed=3)[0]
        for _ in range(2)
    )
    assert torch.equal(one.view(torch.uint8), two.view(torch.uint8))


@pytest.mark.parametrize("wrong", [-1, 129, 1.5, "8", True])
def test_the_option_is_a_number_of_candidates(wrong):
    """Anything else is named."""
    with pytest.raises(SchemeError, match="scale_search: got"):
        SCHEME.quantize(torch.ones(2, 2), scale_search=wrong)


def test_weights_that_are_not_finite_are_refused():
    """The search changes nothing about that."""
    with pytest.raises(NonFiniteError, match="1 NaN"):
        SCHEME.quantize(torch.tensor([[1.0, torch.nan]]), scale_search=8)


# -- powers of two ---------------------------------------------------------------------


@given(st.integers(0, 2**31), st.floats(-30, 30), DTYPES)
@settings(max_examples=60, deadline=None)
def test_powers_of_two_are_the_least_that_clip_nothing(seed, power, dtype):
    """Half of it would put the largest value out of range."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(4, 64, generator=random) * 2.0**power
    options = {"block_size": (1, 32), "dtype": dtype, "scale_dtype": E8M0}
    _, params = SCHEME.quantize(weight, **options)
    scale = params["weight_scale"].float()
    most = weight.view(4, 2, 32).abs().amax(2)
    limit = torch.finfo(dtype).max
    assert (most <= scale * limit).all()
    assert (most > scale / 2 * limit).all()


def test_zeros_get_the_smallest_power():
    """As comfy-kitchen stores them: a byte of 0."""
    for candidates in (0, 2):
        _, params = SCHEME.quantize(
            torch.zeros(2, 32), scale_dtype=E8M0, scale_search=candidates
        )
        assert params["weight_scale"].view(torch.uint8).eq(0).all()


def test_half_the_power_is_taken_where_it_is_better():
    """It clips the largest of a block, and has smaller subnormal numbers."""
    weight = torch.full((2, 32), 3 * 2.0**-9)  # which is 1.5 times the least number x 2
    weight[:, 0] = torch.tensor([448.5, 800.0])
    options = {"block_size": (1, 32), "scale_dtype": E8M0}
    _, plain = SCHEME.quantize(weight, **options)
    _, found = SCHEME.quantize(weight, scale_search=2, **options)
    assert plain["weight_scale"].float().tolist() == [[2.0], [2.0]]
    assert found["weight_scale"].float().tolist() == [[1.0], [2.0]]
