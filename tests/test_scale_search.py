"""Scale search: never worse than absmax, better where blocks are small."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hijack.errors import NonFiniteError, SchemeError
from schemes import _fp8_quantize
from schemes.blockwise_fp8 import BlockwiseFP8

SCHEME = BlockwiseFP8()
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
DTYPES = st.sampled_from((E4M3, E5M2))
SCALES = st.sampled_from((torch.float32, torch.bfloat16, torch.float16))


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


@given(
    st.tuples(st.integers(1, 9), st.integers(1, 40)),
    st.tuples(st.integers(1, 5), st.integers(1, 16)),
    DTYPES,
    SCALES,
    st.floats(1e-6, 1e3),
    st.integers(0, 2**31),
)
@settings(max_examples=120, deadline=None)
def test_no_block_gets_worse(shape, size, dtype, scale_dtype, factor, seed):
    """Also of ragged shapes, both code dtypes, and scales that are rounded."""
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=random) * factor
    size = tuple(map(min, size, shape))
    options = {"block_size": size, "dtype": dtype, "scale_dtype": scale_dtype}
    plain = block_errors(weight, SCHEME.quantize(weight, **options), size)
    found = SCHEME.quantize(weight, scale_search=12, **options)
    searched = block_errors(weight, found, size)
    assert (searched <= plain * (1 + 1e-6) + 1e-30).all()


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
@pytest.mark.parametrize("size", [(1, 64), (16, 16), (1, 256), (128, 256)])
def test_codes_are_those_of_the_chosen_scale(dtype, size):
    """The search chooses scales; the codes come from the one place that makes them."""
    weight = torch.randn(128, 256).bfloat16()
    codes, params = SCHEME.quantize(
        weight, block_size=size, dtype=dtype, scale_search=8
    )
    again = torch.empty_like(codes)
    _fp8_quantize.encode(weight, params["weight_scale"], size, again, None)
    assert torch.equal(codes.view(torch.uint8), again.view(torch.uint8))


def test_small_blocks_gain_more_than_a_decibel():
    """Normal weights in blocks of 1 x 64: 32.0 dB by absmax, 33.6 dB by search."""
    weight = torch.randn(256, 512, generator=torch.Generator().manual_seed(0))
    noise = [
        (dense(SCHEME.quantize(weight, scale_search=n)) - weight).square().sum()
        for n in (0, 32)
    ]
    assert 10 * torch.log10(noise[0] / noise[1]) > 1.4


def test_rounding_is_that_of_the_cast():
    """The search rounds with two additions, to what the cast to FP8 gives."""
    for dtype in (E4M3, E5M2):
        most = torch.finfo(dtype).max
        x = torch.cat([torch.rand(4096) * most, torch.rand(4096) * 1e-4 * most])
        wanted = (x.to(dtype).float() - x).square().double()
        error = _fp8_quantize._squared_error(
            x[:, None, None], torch.ones(8192, 1), dtype
        )
        assert torch.equal(error[:, 0], wanted)


def test_a_block_of_zeros_keeps_its_scale():
    """Nothing is better than no error at all."""
    zeros = torch.zeros(4, 64)
    plain, found = SCHEME.quantize(zeros), SCHEME.quantize(zeros, scale_search=32)
    assert torch.equal(plain[1]["weight_scale"], found[1]["weight_scale"])


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


@pytest.mark.parametrize("wrong", [-1, 1.5, "8", True])
def test_the_option_is_a_number_of_candidates(wrong):
    """Anything else is named."""
    with pytest.raises(SchemeError, match="scale_search: got"):
        SCHEME.quantize(torch.ones(2, 2), scale_search=wrong)


def test_weights_that_are_not_finite_are_refused():
    """The search changes nothing about that."""
    with pytest.raises(NonFiniteError, match="1 NaN"):
        SCHEME.quantize(torch.tensor([[1.0, torch.nan]]), scale_search=8)


# -- powers of two ---------------------------------------------------------------------

E8M0 = torch.float8_e8m0fnu


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
    _, params = SCHEME.quantize(torch.zeros(2, 32), scale_dtype=E8M0)
    assert params["weight_scale"].view(torch.uint8).eq(0).all()


def test_the_search_among_powers_is_never_worse():
    """Half the scale clips the largest values, which now and then is better."""
    weight = torch.randn(64, 64)
    options = {"block_size": (1, 32), "scale_dtype": E8M0}
    plain = block_errors(weight, SCHEME.quantize(weight, **options), (1, 32))
    found = SCHEME.quantize(weight, scale_search=2, **options)
    assert (block_errors(weight, found, (1, 32)) <= plain).all()
