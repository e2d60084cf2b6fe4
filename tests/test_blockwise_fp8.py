"""The reference scheme: what it stores, how exact it is, what it refuses."""

import contextlib
import math

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from safetensors.torch import load, save
from torch import Tensor

import hijack
from hijack.errors import (
    CheckpointError,
    DTypeError,
    NonFiniteError,
    SchemeError,
    ShapeError,
)
from hijack.formats import matching
from hijack.safetensors_io.header import Header
from schemes import _blocks as blocks
from schemes import blockwise_fp8
from schemes.blockwise_fp8 import BlockwiseFP8

SCHEME = BlockwiseFP8()
FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
E4M3, E5M2 = FP8
#: shapes and block sizes: exact, ragged on either side, larger than the weight
CASES = [
    ((6, 128), (1, 64)),
    ((6, 100), (1, 64)),
    ((33, 70), (16, 32)),
    ((4, 8), (128, 128)),
    ((5, 7), "row"),
    ((5, 7), "tensor"),
    ((4, 3, 3, 3), (2, 9)),
    ((9,), (2, 1)),
    ((1, 1), 64),
]


def dense(q: Tensor, params: dict[str, Tensor], size: tuple[int, int]) -> Tensor:
    """What the codes mean, formed another way than the scheme does: float32."""
    n, k = q.shape[0], math.prod(q.shape[1:])
    scale = torch.kron(params["weight_scale"].float(), torch.ones(size))[:n, :k]
    return (q.reshape(n, k).float() * scale).view(q.shape)


def bits(tensor: Tensor) -> Tensor:
    views = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
    return tensor.contiguous().view(views[tensor.element_size()])


def same(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(bits(a), bits(b))


def weights(shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(shape[0], generator=generator).mul(2).exp()
    noise = torch.randn(shape, generator=generator)
    return (noise * rows.view(-1, *[1] * (len(shape) - 1))).to(dtype)


# -- what is stored --------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "block_size"), CASES)
@pytest.mark.parametrize("dtype", FP8)
def test_codes_are_within_half_a_step(shape, block_size, dtype):
    """Every weight comes back to half the distance of its code's neighbours."""
    weight = weights(shape, 0, torch.float32)
    q, params = SCHEME.quantize(weight, block_size=block_size, dtype=dtype)
    assert q.shape == weight.shape
    assert q.dtype == dtype
    back = SCHEME.dequantize(q, params, torch.float32)
    info = torch.finfo(dtype)
    largest = weight.abs().max() / info.max
    step = weight.abs() * info.eps + largest * info.smallest_normal * info.eps
    assert ((back - weight).abs() <= step * 0.5001 + 1e-12).all()


def test_the_grid_covers_short_blocks_and_says_so():
    """A marker of no bytes carries the block size where it does not divide."""
    q, params = SCHEME.quantize(torch.ones(130, 300), block_size=128)
    assert params["weight_scale"].shape == (130, 3)
    assert params["weight_block_size"].shape == (1, 128, 0)
    assert params["weight_block_size"].nbytes == 0
    assert SCHEME.dequantize(q, params, torch.float32).eq(1).all()
    _, params = SCHEME.quantize(torch.ones(130, 300), block_size=(65, 100))
    assert set(params) == {"weight_scale"}


def test_the_marker_survives_safetensors():
    """An empty tensor keeps its shape in a file."""
    q, params = SCHEME.quantize(torch.randn(33, 70), block_size=(16, 32))
    again = load(save(params))
    assert again["weight_block_size"].shape == (16, 32, 0)
    wanted = SCHEME.dequantize(q, params, torch.float32)
    assert torch.equal(SCHEME.dequantize(q, again, torch.float32), wanted)


@pytest.mark.parametrize(
    ("spelling", "meaning"),
    [
        (32, (1, 32)),
        ("1x32", (1, 32)),
        ("16X32", (16, 32)),
        ([16, 32], (16, 32)),
        ("row", (1, 96)),
        ("tensor", (48, 96)),
        ((500, 500), (48, 96)),
    ],
)
def test_block_sizes_may_be_spelled_in_several_ways(spelling, meaning):
    """Each spelling gives the codes of (rows, cols)."""
    weight = weights((48, 96), 1, torch.float32)
    a, pa = SCHEME.quantize(weight, block_size=spelling)
    b, pb = SCHEME.quantize(weight, block_size=meaning)
    assert same(a, b)
    assert torch.equal(pa["weight_scale"], pb["weight_scale"])


@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_codes_fit_the_scale_that_is_stored(scale_dtype):
    """The scale is rounded before it divides."""
    weight = weights((32, 128), 2, torch.float32)
    q, params = SCHEME.quantize(weight, scale_dtype=scale_dtype)
    scale = params["weight_scale"]
    assert scale.dtype == scale_dtype
    ratio = weight / scale.float().repeat_interleave(64, 1)
    assert same(q, ratio.clamp(-448, 448).to(E4M3))


def test_the_scale_takes_the_weights_dtype():
    """Without scale_dtype, as musubi-tuner does."""
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        _, params = SCHEME.quantize(weights((4, 64), 3, dtype))
        assert params["weight_scale"].dtype == dtype
    _, params = SCHEME.quantize(weights((4, 64), 3, torch.float64))
    assert params["weight_scale"].dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zeros_stay_zeros(dtype):
    """An all-zero block divides by no zero, and signs of zeros are kept."""
    weight = torch.zeros(4, 128, dtype=dtype)
    weight[1, 3], weight[2, 5] = 1.0, -0.0
    q, params = SCHEME.quantize(weight)
    back = SCHEME.dequantize(q, params, dtype)
    assert torch.equal(back, weight)
    # musubi-tuner's float16 scale of such a block is 0, and 0 / 0 has no sign
    assert dtype == torch.float16 or same(back, weight)


@pytest.mark.parametrize("dtype", [E4M3, torch.float8_e5m2])
def test_numbers_too_small_for_a_float16_scale_become_zeros(dtype):
    """musubi-tuner's codes of them are the largest, under a scale of zero."""
    weight = weights((2, 128), 7, torch.float16)
    weight[0, :64] = torch.linspace(-6e-6, 6e-6, 64)
    q, params = SCHEME.quantize(weight, dtype=dtype)
    assert params["weight_scale"][0, 0] == 0
    SCHEME.validate(q, params, "a layer")
    assert not SCHEME.dequantize(q, params, torch.float16)[0, :64].any()
    q.view(torch.uint8)[0, 5] = 3  # which no writer leaves there
    with pytest.raises(CheckpointError, match="a layer: weight_scale holds 0"):
        SCHEME.validate(q, params, "a layer")


@pytest.mark.parametrize("at", [(0, 0), (0, 2), (1, 1), (2, 3)])
def test_a_zero_scale_is_refused_over_any_block_that_is_not_zero(at):
    """Every block is looked at, the short ones too, and no block beside it."""
    q = torch.ones(5, 14).to(E4M3)
    scale = torch.ones(3, 4)
    scale[at] = 0
    block = torch.empty((2, 4, 0), dtype=torch.uint8)
    params = {"weight_scale": scale, "weight_block_size": block}
    with pytest.raises(CheckpointError, match="a layer: weight_scale holds 0"):
        SCHEME.validate(q, params, "a layer")
    rows, cols = slice(at[0] * 2, at[0] * 2 + 2), slice(at[1] * 4, at[1] * 4 + 4)
    q.view(torch.uint8)[rows, cols] = 0
    SCHEME.validate(q, params, "a layer")


@pytest.mark.parametrize("at", [0, 77, 4095])
@pytest.mark.parametrize(
    ("dtype", "byte"),
    [
        *((E4M3, byte) for byte in (0x7F, 0xFF)),
        *((torch.float8_e5m2, byte) for byte in (0x7C, 0xFC, 0x7D, 0xFF)),
    ],
)
def test_data_that_is_not_finite_is_refused(dtype, byte, at):
    """A NaN in a weight makes every pixel NaN; the message names the layer."""
    q = torch.ones(64, 64).to(dtype)
    params = {"weight_scale": torch.ones(64, 1)}
    SCHEME.validate(q, params, "a layer")
    q.view(torch.uint8).view(-1)[at] = byte
    with pytest.raises(NonFiniteError, match="a layer: weight holds NaN or inf"):
        SCHEME.validate(q, params, "a layer")


@pytest.mark.parametrize(("row", "refused"), [(0, True), (3, True), (4, False)])
def test_the_first_codes_of_a_large_weight_are_looked_at(monkeypatch, row, refused):
    """All of them would have a file read from end to end in order to map it."""
    monkeypatch.setattr(blockwise_fp8, "CHECKED", 4 * 64)
    q = torch.ones(64, 64).to(E4M3)
    q.view(torch.uint8)[row, 7] = 0x7F
    params = {"weight_scale": torch.ones(64, 1)}
    with pytest.raises(NonFiniteError) if refused else contextlib.nullcontext():
        SCHEME.validate(q, params, "a layer")


@pytest.mark.parametrize(("size", "byte"), [(1e-38, 0), (1e-42, 0), (3e38, 247)])
def test_power_of_two_scales_stay_within_their_range(size, byte):
    """The least is 2**-127, and the largest weights are far from what is NaN."""
    weight = torch.full((2, 64), size)
    _, params = SCHEME.quantize(weight, scale_dtype=torch.float8_e8m0fnu)
    assert (params["weight_scale"].view(torch.uint8) == byte).all()


@pytest.mark.parametrize(
    ("shape", "grid", "sizes"),
    [
        ((1, 8), (1, 8), ([(1, 1)], True)),  # one row: its columns are its elements
        ((4, 8), (1, 8), ([(4, 1)], False)),  # one scale per column, or transposed
        ((4, 8), (4, 1), ([(1, 8)], True)),
        ((192, 8), (2, 1), ([(128, 8), (96, 8)], False)),
        ((256, 8), (2, 1), ([(128, 8)], True)),
    ],
)
def test_a_grid_tells_the_block_sizes_it_may_have(shape, grid, sizes):
    """Only an exact division that no short blocks rival is certain."""
    assert blocks.possible_sizes(shape, grid) == sizes


@pytest.mark.parametrize("scale", [(4, 2, 2), (4, 1, 2, 1), (4, 2, 0)])
def test_a_scale_of_other_dimensions_has_no_grid(scale):
    """Three dimensions have a trailing 1, or they are no rows and columns."""
    assert blocks.grid_of(scale, (4, 8)) is None
    assert blocks.grid_of((4, 2, 1), (4, 8)) == (4, 2)


def test_a_number_is_a_matrix_of_one_row_and_column():
    """Whatever is flattened."""
    assert blocks.matrix_shape(()) == (1, 1)
    assert blocks.matrix_shape((3, 2, 5)) == (3, 10)


def test_the_scheme_declares_which_values_its_options_have():
    """Command line and nodes offer these, and refuse others before any work."""
    declared = {option.name: option for option in SCHEME.declared_options()}
    assert declared["dtype"].choices == FP8
    for name, text in {"dtype": "int8", "scale_dtype": "float64"}.items():
        with pytest.raises(SchemeError, match=f"option {name}: "):
            declared[name].parse(text)
    for text in ("-1", "129"):
        with pytest.raises(SchemeError, match="option scale_search: "):
            declared["scale_search"].parse(text)


def test_meta_tensors_give_meta_tensors():
    """Shapes and dtypes are known without data."""
    q, params = SCHEME.create_params((33, 70), torch.bfloat16, "meta", block_size=16)
    assert (q.shape, q.dtype, q.device.type) == ((33, 70), E4M3, "meta")
    assert params["weight_scale"].shape == (33, 5)
    assert params["weight_block_size"].shape == (1, 16, 0)
    assert SCHEME.dequantize(q, params, torch.float16).shape == (33, 70)


# -- properties ------------------------------------------------------------------------


@st.composite
def cases(draw):
    shape = draw(st.tuples(st.integers(1, 20), st.integers(1, 40)))
    block = draw(st.tuples(st.integers(1, 24), st.integers(1, 48)))
    weight = weights(shape, draw(st.integers(0, 10**6)), torch.float32)
    return weight, block, draw(st.sampled_from(FP8))


@given(cases())
@settings(max_examples=150, deadline=None)
def test_decoding_means_what_it_says(case):
    """Codes times scales, for any block size; then quantizing again changes nothing."""
    weight, block, dtype = case
    q, params = SCHEME.quantize(weight, block_size=block, dtype=dtype)
    size = tuple(min(b, n) for b, n in zip(block, weight.shape, strict=True))
    back = SCHEME.dequantize(q, params, torch.float32)
    assert same(back, dense(q, params, size))
    again, params2 = SCHEME.quantize(back, block_size=block, dtype=dtype)
    assert same(q, again)
    assert torch.allclose(params["weight_scale"], params2["weight_scale"], rtol=2e-7)


@given(cases(), st.integers(-4, 8))
@settings(max_examples=60, deadline=None)
def test_powers_of_two_pass_through(case, power):
    """Scaling the weight by a power of two scales the scales and keeps the codes."""
    weight, block, dtype = case
    weight = weight + weight.sign() * 1e-2  # no block at the floor of the scale
    q, params = SCHEME.quantize(weight, block_size=block, dtype=dtype)
    q2, params2 = SCHEME.quantize(weight * 2.0**power, block_size=block, dtype=dtype)
    assert same(q, q2)
    wanted = params["weight_scale"] * 2.0**power
    assert torch.equal(params2["weight_scale"], wanted)


@given(st.integers(0, 10**6))
@settings(max_examples=30, deadline=None)
def test_blocks_do_not_touch_each_other(seed):
    """Changing one block changes no other."""
    weight = weights((12, 20), seed, torch.float32)
    changed = weight.clone()
    changed[4:8, 8:16] *= 3.7
    outside = torch.ones(12, 20, dtype=torch.bool)
    outside[4:8, 8:16] = False
    q, _ = SCHEME.quantize(weight, block_size=(4, 8))
    q2, _ = SCHEME.quantize(changed, block_size=(4, 8))
    assert torch.equal(bits(q)[outside], bits(q2)[outside])


# -- stochastic rounding ---------------------------------------------------------------


@pytest.mark.parametrize("dtype", FP8)
def test_stochastic_rounding_takes_a_neighbour_and_has_no_bias(dtype):
    """Codes are one of the two neighbours; the mean over seeds is the weight."""
    weight = weights((16, 64), 5, torch.float32)
    below, above = SCHEME.quantize(weight, dtype=dtype), None
    scale = below[1]["weight_scale"].float()
    grid = torch.arange(256, dtype=torch.uint8).view(dtype).float()
    grid = grid[grid.isfinite()].unique()
    ratio = (weight / scale).clamp(grid[0], grid[-1])
    above = torch.searchsorted(grid, ratio).clamp(max=len(grid) - 1)
    low = torch.where(grid[above] == ratio, above, above - 1)
    total = torch.zeros_like(weight)
    for seed in range(200):
        q, _ = SCHEME.quantize(weight, dtype=dtype, stochastic=True, seed=seed)
        assert ((q.float() == grid[above]) | (q.float() == grid[low])).all()
        total += q.float()
    gap = (grid[above] - grid[low]).clamp_min(1e-9)
    error = (total / 200 - ratio) / gap  # standard deviation at most 0.5 / sqrt(200)
    assert error.abs().max() < 0.2
    assert error.mean().abs() < 0.005


@pytest.mark.parametrize("dtype", FP8)
def test_stochastic_rounding_has_no_bias_where_the_spacing_ends(dtype):
    """Below the second-lowest binade all numbers are equally far apart."""
    info = torch.finfo(dtype)
    gap = info.smallest_normal * info.eps
    weight = torch.linspace(-3, 3, 64).mul(info.smallest_normal).repeat(400, 1)
    weight[:, 0] = info.max  # so that the scale is 1
    q, params = SCHEME.quantize(weight, dtype=dtype, stochastic=True, seed=3)
    assert (params["weight_scale"] == 1).all()
    codes = q.float()[:, 1:]
    inside = weight[:, 1:].abs() < 2 * info.smallest_normal
    assert (((codes - weight[:, 1:]).abs() < gap) | ~inside).all()
    error = (codes - weight[:, 1:]).mean(0) / gap  # deviation at most 0.5 / sqrt(400)
    assert error[inside[0]].abs().max() < 0.15


def test_stochastic_rounding_follows_its_seed():
    """The same seed gives the same codes, and the global generator is left alone."""
    weight = weights((16, 64), 6, torch.bfloat16)
    state = torch.get_rng_state()
    first, _ = SCHEME.quantize(weight, stochastic=True, seed=1)
    second, _ = SCHEME.quantize(weight, stochastic=True, seed=1)
    third, _ = SCHEME.quantize(weight, stochastic=True, seed=2)
    assert same(first, second)
    assert not same(first, third)
    assert torch.equal(torch.get_rng_state(), state)


# -- files -----------------------------------------------------------------------------


def claim_of(tensors: dict[str, Tensor], layer: str = "a.b") -> hijack.Claim | None:
    return matching.recognise(SCHEME, Header.from_state_dict(tensors), layer)


@pytest.mark.parametrize(("shape", "block_size"), [c for c in CASES if len(c[0]) > 1])
def test_the_native_dialect_knows_every_block_size(shape, block_size):
    """X.weight and X.weight_scale are recognised whatever the grid."""
    q, params = SCHEME.quantize(torch.randn(shape), block_size=block_size)
    written = matching.dialect_of(SCHEME, "hijack").encode(q, params, {})
    tensors = {f"a.b.{name}": tensor for name, tensor in written.items()}
    claim = claim_of(tensors)
    assert claim.certainty == hijack.Certainty.FITS
    q2, params2 = matching.decode(SCHEME, claim, tensors)
    wanted = SCHEME.dequantize(q, params, torch.float32)
    assert torch.equal(SCHEME.dequantize(q2, params2, torch.float32), wanted)
    n, k = shape[0], math.prod(shape[1:])
    assert tuple(params["weight_scale"].shape) == (
        -(-n // claim.block_size[0]),
        -(-k // claim.block_size[1]),
    )


def test_scales_of_fewer_dimensions_are_read():
    """[out] is one scale for each row, [1] and 0-d one for the weight."""
    q = torch.randn(6, 8).to(E4M3)
    for scale, size in (
        (torch.rand(6), (1, 8)),
        (torch.rand(1), (6, 8)),
        (torch.tensor(0.5), (6, 8)),
    ):
        tensors = {"a.b.weight": q, "a.b.weight_scale": scale}
        claim = claim_of(tensors)
        assert claim.block_size == size
        got = SCHEME.dequantize(*matching.decode(SCHEME, claim, tensors), torch.float32)
        assert torch.equal(got, q.float() * scale.reshape(-1, 1))


def test_layers_of_others_are_left_alone():
    """ComfyUI's own marker, odd grids, odd dtypes and missing scales are no claims."""
    q, scale = torch.zeros(6, 8).to(E4M3), torch.rand(6, 1)
    marker = torch.tensor(list(b'{"format": "theirs"}'), dtype=torch.uint8)
    base = {"a.b.weight": q, "a.b.weight_scale": scale}
    assert claim_of(base) is not None
    assert claim_of({**base, "a.b.comfy_quant": marker}) is None
    assert claim_of({**base, "a.b.weight_scale": torch.rand(4, 1)}) is None
    assert claim_of({**base, "a.b.weight_scale": torch.rand(6, 1).byte()}) is None
    assert claim_of({**base, "a.b.weight": q.float()}) is None
    assert claim_of({"a.b.weight": q}) is None
    assert claim_of({}) is None


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float8_e8m0fnu])
def test_power_of_two_scales_are_read(dtype):
    """Exponent bytes b mean 2 ** (b - 127)."""
    exponents = torch.tensor([[127, 128], [126, 120]], dtype=torch.uint8)
    q = torch.ones(2, 8).to(E4M3)
    params = {"weight_scale": exponents.view(dtype)}
    SCHEME.validate(q, params, "layer")
    got = SCHEME.dequantize(q, params, torch.float32)[:, ::4]
    assert got.tolist() == [[1.0, 2.0], [0.5, 2.0**-7]]


# -- refusals --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"block_size": 0}, r"block_size: got 0, expected \(rows, cols\)"),
        ({"block_size": "1by64"}, "got '1by64'"),
        ({"block_size": (1, 2, 3)}, r"got \(1, 2, 3\)"),
        ({"block_size": (1.5, 2)}, r"got \(1.5, 2\)"),
        ({"block_size": True}, "got True"),
        ({"dtype": torch.int8}, "dtype: got torch.int8, expected one of float8_e4m3fn"),
        (
            {"scale_dtype": torch.uint8},
            "scale_dtype: got torch.uint8",
        ),
    ],
)
def test_wrong_options_are_refused(options, match):
    """Messages say what was got and what is expected."""
    with pytest.raises(SchemeError, match=match):
        SCHEME.quantize(torch.ones(4, 64), **options)


def test_weights_that_cannot_be_quantized_are_refused():
    """Not finite, not floating, or quantized already."""
    weight = torch.ones(4, 64)
    weight[0, 0], weight[1, 1], weight[2, 2] = math.nan, math.inf, -math.inf
    with pytest.raises(NonFiniteError, match=r"\(4, 64\) holds 1 NaN and 2 infinite"):
        SCHEME.quantize(weight)
    with pytest.raises(NonFiniteError, match="holds 0 NaN and 256 infinite values as"):
        SCHEME.quantize(torch.full((4, 64), 1e39, dtype=torch.float64))
    for wrong in (torch.ones(4, 64, dtype=torch.int8), torch.ones(4, 64).to(E4M3)):
        with pytest.raises(DTypeError, match="expected a dense floating dtype"):
            SCHEME.quantize(wrong)


def test_a_grid_that_does_not_divide_is_refused_without_its_block_size():
    """192 rows in 2 blocks may be 128 + 64 or 96 + 96: never guess."""
    q, params = SCHEME.quantize(torch.randn(192, 200), block_size=(128, 128))
    del params["weight_block_size"]
    params["weight_scale"] = params["weight_scale"][:, :1].expand(2, 3)
    with pytest.raises(ShapeError, match=r"is \(2, 3\), which does not divide weight"):
        SCHEME.dequantize(q, params, torch.float32)
    params["weight_block_size"] = torch.empty(64, 128, 0, dtype=torch.uint8)
    with pytest.raises(ShapeError, match=r"is \(2, 3\), expected \(3, 2\) for weight"):
        SCHEME.dequantize(q, params, torch.float32)
    params["weight_block_size"] = torch.empty(128, dtype=torch.uint8)
    with pytest.raises(ShapeError, match=r"expected \(rows, cols, 0\)"):
        SCHEME.dequantize(q, params, torch.float32)


def test_validate_names_the_layer():
    """What a file got wrong is said with the layer it is in."""
    q, params = SCHEME.quantize(torch.randn(4, 64))
    SCHEME.validate(q, params, "x")
    with pytest.raises(
        DTypeError, match=r"^x.y: weight is torch.int8, expected float8"
    ):
        SCHEME.validate(q.to(torch.int8), params, "x.y")
    with pytest.raises(CheckpointError, match=r"^x.y: weight_scale is missing"):
        SCHEME.validate(q, {}, "x.y")
    with pytest.raises(DTypeError, match=r"^x.y: weight_scale is torch.int32"):
        SCHEME.validate(q, {"weight_scale": torch.ones(4, 1).int()}, "x.y")
    with pytest.raises(ShapeError, match=r"^x.y: weight_scale: is \(3, 1\)"):
        SCHEME.validate(q, {"weight_scale": torch.ones(3, 1)}, "x.y")


@pytest.mark.parametrize(
    "size",
    [
        *(0, True, 1.5, (1, 64.0), (1,), "1xfoo", "0x64", "-1x64", "\u0663x\u0664"),
        *(torch.tensor(64), torch.tensor([1, 64]), {1, 64}, b"1x64"),
    ],
)
def test_what_is_no_block_size_is_named(size):
    """Also if comparing it gives no answer, as with arrays."""
    with pytest.raises(SchemeError, match=r"block_size: got .*, expected "):
        SCHEME.quantize(torch.ones(4, 64), block_size=size)


@pytest.mark.parametrize("shape", [(), (1,), (6,), (6, 1)])
def test_scales_of_fewer_dimensions_are_rows_or_one(shape):
    """As files have them; a number is the scale of everything."""
    q, scale = torch.ones(6, 8).to(E4M3), torch.arange(1.0, 7)
    scale = scale.view(shape) if 6 in shape else torch.full(shape, 3.0)
    got = SCHEME.dequantize(q, {"weight_scale": scale}, torch.float32)
    assert torch.equal(got, scale.reshape(-1, 1).expand(-1, 8).expand(6, 8))
