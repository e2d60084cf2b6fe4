"""Triton's kernels on CPU tensors; `test_kernels_triton` runs this in a process.

Triton reads ``TRITON_INTERPRET`` when it is imported, so that a process has either
interpreted kernels or real ones. The interpreter truncates where a GPU rounds to
bfloat16: results are compared bit for bit in float32 and float16, and within one unit
of the last place in bfloat16. It cannot multiply matrices of bfloat16.
"""

import os
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1", allow_module_level=True)

import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

from schemes._fp8 import quantize as fp8
from schemes._kernels import buffers, int_mm, quantized_inputs, tables
from schemes._kernels.block_scaled import CODES, SCALES, BlockScaled
from schemes._kernels.triton import inputs
from schemes._kernels.triton import quantize as kernels_quantize
from schemes._kernels.triton._decode import decode
from schemes._kernels.triton._linear import linear
from schemes._kernels.triton.gemm import gemm
from schemes._kernels.triton.inputs import groups, int8_output, powers, tokens
from schemes._kernels.triton.numbers import fp8_code
from schemes._kernels.triton.quantize import quantize
from schemes._kernels.triton.rotate import rotate
from schemes._rotation import rotate_inputs
from schemes._tiles import to_tiles

# numpy says so where a number of float32 is infinite in float16
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
E2M1 = tables.table_on(tables.E2M1, torch.device("cpu"))
#: Sixteen numbers that are no E2M1, as NF4's are.
TABLE = torch.linspace(-1, 1, 16).sin()
#: exact, ragged on either side, odd, whole rows, one scale
BLOCKS = [
    ((8, 256), (1, 64)),
    ((37, 330), (16, 32)),
    ((9, 70), (2, 7)),
    ((33, 300), (1, 300)),
    ((20, 130), (20, 130)),
    ((5, 40), (2, 4)),
]


def grid(shape, size):
    """Rows and columns of the scales."""
    return -(-shape[0] // size[0]), -(-shape[1] // size[1])


def scales(shape, dtype):
    """Random scales of every magnitude that a dtype of scales has."""
    random = torch.Generator().manual_seed(1)
    exponents = torch.randint(-9, 3, shape, generator=random)
    return torch.ldexp(torch.rand(shape, generator=random) + 0.5, exponents).to(dtype)


def all_codes(shape, dtype):
    """Every finite code, several times, in rows of this shape."""
    codes = torch.arange(256, dtype=torch.uint8).view(dtype)
    codes = codes[codes.float().isfinite()].view(torch.uint8)
    n = shape[0] * shape[1]
    return codes.repeat(-(-n // len(codes)))[:n].view(dtype).view(shape)


def weight_of(
    kind, shape, size, scale_dtype=torch.float32, factor=None, high_first=False
):
    """A weight of a dtype of codes, or of two codes a byte for a table."""
    scale = scales(grid(shape, size), scale_dtype)
    if isinstance(kind, torch.dtype):
        codes, table = all_codes(shape, kind), None
    else:
        codes = all_codes((shape[0], shape[1] // 2), torch.uint8)
        table = {"e2m1": E2M1, "copied": E2M1.clone(), "table": TABLE}[kind]
    factor = None if factor is None else torch.tensor(factor)
    return BlockScaled(codes, scale, size, table, high_first, factor)


def reference(weight, dtype=torch.float32):
    """The dense weight by `BlockScaled`'s definition."""
    n, k = weight.shape
    if weight.table is None:
        numbers = weight.codes.float()
    else:
        low, high = weight.codes & 15, weight.codes >> 4
        pair = [high, low] if weight.high_first else [low, high]
        numbers = weight.table[torch.stack(pair, 2).long()].view(n, k)
    scale = weight.scale.float()
    if weight.factor is not None:
        scale = scale * weight.factor
    up, along = torch.arange(n) // weight.size[0], torch.arange(k) // weight.size[1]
    return (numbers * scale[up][:, along]).to(dtype)


def decoded(weight, dtype, rows=None):
    """What the kernel writes."""
    n, k = weight.shape
    span = range(n)[rows or slice(None)]
    out = torch.full((len(span), k), torch.nan, dtype=dtype)
    decode(weight, out, rows)
    return out


def assert_same(actual, expected):
    """Equal bit for bit; in bfloat16 within one unit of the last place."""
    assert actual.dtype == expected.dtype
    if actual.dtype == torch.bfloat16:
        apart = actual.view(torch.int16).int() - expected.view(torch.int16).int()
        assert apart.abs().max() <= 1
        return
    integer = {2: torch.int16, 4: torch.int32}[actual.element_size()]
    assert torch.equal(actual.view(integer), expected.view(integer))


class TestDecode:
    """Any weight into dense memory."""

    @pytest.mark.parametrize("kind", [*CODES, "e2m1", "copied", "table"], ids=str)
    @pytest.mark.parametrize("scale_dtype", SCALES, ids=str)
    @pytest.mark.parametrize("factor", [None, 0.37])
    def test_all_codes_have_their_bits(self, kind, scale_dtype, factor):
        """Every code times scales of every dtype is what the definition says."""
        weight = weight_of(kind, (8, 256), (1, 32), scale_dtype, factor)
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert_same(decoded(weight, dtype), reference(weight, dtype))

    @pytest.mark.parametrize(("shape", "size"), BLOCKS)
    @pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8], ids=str)
    def test_blocks_of_any_size(self, shape, size, kind):
        """Blocks may be short, odd, whole rows, or the whole weight."""
        weight = weight_of(kind, shape, size)
        assert_same(decoded(weight, torch.float32), reference(weight))

    @pytest.mark.parametrize("high_first", [False, True])
    @pytest.mark.parametrize("size", [(1, 16), (4, 64), (1, 6), (1, 192)])
    def test_four_bits_in_either_order(self, high_first, size):
        """The first of two codes may be in the low or the high bits."""
        weight = weight_of("table", (9, 192), size, high_first=high_first)
        assert_same(decoded(weight, torch.float32), reference(weight))

    def test_the_largest_and_the_least_scales(self):
        """Products may be subnormal, and scales 2**-127, 2**127 or zero."""
        weight = weight_of(torch.float8_e4m3fn, (3, 256), (1, 256))
        tiny = torch.tensor([[0], [1], [5]], dtype=torch.uint8)
        tiny = weight._replace(scale=tiny.view(torch.float8_e8m0fnu))
        assert_same(decoded(tiny, torch.float32), reference(tiny))
        zero = weight._replace(scale=torch.tensor([[0.0], [1e-45], [7e35]]))
        assert_same(decoded(zero, torch.float32), reference(zero))

    @pytest.mark.parametrize("rows", [slice(0, 1), slice(5, 30), slice(36, 37)])
    def test_some_rows(self, rows):
        """A slice of the rows is written alone, also inside of a block."""
        weight = weight_of(torch.float8_e5m2, (37, 96), (16, 32))
        assert_same(decoded(weight, torch.float32, rows), reference(weight)[rows])

    def test_no_rows(self):
        """Nothing is written for no rows, and for a weight without columns."""
        weight = weight_of(torch.int8, (4, 32), (1, 32))
        assert decoded(weight, torch.float32, slice(2, 2)).numel() == 0
        empty = BlockScaled(
            torch.empty(3, 0, dtype=torch.int8), torch.empty(3, 0), (1, 4)
        )
        decode(empty, torch.empty(3, 0))

    @pytest.mark.parametrize("kind", [torch.float8_e4m3fn, "e2m1"], ids=str)
    def test_strides_and_offsets(self, kind):
        """Tensors may be transposed, cut out of others, and start anywhere."""
        weight = weight_of(kind, (20, 96), (4, 32))
        n, k = weight.codes.shape
        wide = weight.codes.new_empty((n + 1, 3 * k + 5))
        wide[1:, 5::3] = weight.codes
        moved = weight._replace(
            codes=wide[1:, 5::3], scale=weight.scale.t().contiguous().t()
        )
        assert_same(decoded(moved, torch.float32), reference(weight))
        turned = weight._replace(codes=weight.codes.t().contiguous().t())
        out = torch.zeros(96, 40)
        decode(turned, out.t()[10:30])
        assert_same(out.t()[10:30].contiguous(), reference(weight))
        assert not out[:, :10].any()
        assert not out[:, 30:].any()


def product_error(x, weight, bias):
    """Largest error of a product over its bound: below 1 if it is right."""
    dense = reference(weight).double()
    exact = x.double() @ dense.t()
    size = x.double().abs() @ dense.abs().t()
    if bias is not None:
        exact, size = exact + bias, size + bias.abs()
    # one rounding of each element of the weight, one of the result, and of the sum
    eps = 2 * torch.finfo(x.dtype).eps + x.shape[1] * torch.finfo(torch.float32).eps
    out = linear(x, weight, bias)
    assert out.dtype == x.dtype
    assert out.shape == exact.shape
    return float(((out.double() - exact).abs() / (eps * size + 1e-30)).max())


@triton.jit
def loop_kernel(out, n):
    """Store how often a loop runs whose end is an argument."""
    count = 0
    for _ in range(0, n, 2):
        count += 1
    tl.store(out, count)


@pytest.fixture(scope="module")
def loops():
    """Skip where interpreted kernels cannot loop: Triton 3.3 with a recent numpy."""
    out = torch.zeros(1, dtype=torch.int32)
    try:
        loop_kernel[(1,)](out, 6)
    except InterpreterError as error:
        pytest.skip(f"this Triton's interpreter cannot loop with this numpy: {error}")
    assert out == 3


@pytest.mark.usefixtures("loops")
class TestProducts:
    """Products that decode the weight."""

    @pytest.mark.parametrize("m", [1, 3, 5, 33, 64, 65])
    @pytest.mark.parametrize(
        ("kind", "size"),
        [
            *((torch.float8_e4m3fn, (1, 64)), (torch.float8_e5m2, (16, 32))),
            *((torch.int8, (1, 336)), ("e2m1", (1, 16)), ("table", (4, 64))),
        ],
        ids=str,
    )
    def test_products_are_within_rounding(self, m, kind, size):
        """All numbers of inputs give the product with the decoded weight."""
        # so that no element of the weight overflows float16
        factor = 1e-5 if kind == torch.float8_e5m2 else 0.2
        weight = weight_of(kind, (10, 336), size, factor=factor)
        bias = torch.randn(10)
        for dtype in (torch.float32, torch.float16):
            x = torch.randn(m, 336).to(dtype)
            assert product_error(x, weight, bias.to(dtype)) < 1

    @pytest.mark.parametrize("m", [2, 4, 7, 80])
    def test_odd_blocks_and_strides(self, m):
        """Blocks may be of any size, and inputs and biases of any strides."""
        weight = weight_of(torch.int8, (37, 70), (2, 7))
        x = torch.randn(70, 2 * m)[:, ::2].t()
        assert product_error(x, weight, torch.randn(74)[::2]) < 1
        assert product_error(x.half(), weight, None) < 1

    @pytest.mark.parametrize("m", [1, 3])
    def test_one_input_in_bfloat16(self, m):
        """Products with few inputs are in float32 whatever their dtype is."""
        weight = weight_of(torch.float8_e4m3fn, (9, 128), (1, 64))
        assert product_error(torch.randn(m, 128).bfloat16(), weight, None) < 1

    def test_parts_of_sums_are_added_in_order(self):
        """A product whose K is split gives the same bits each time, and cleans up."""
        weight = weight_of(torch.float8_e4m3fn, (70, 512), (1, 64))
        x = torch.randn(9, 512).half()
        first = gemm(x, weight, None)
        arrived = buffers.shared("arrived", 2, torch.int32, x.device, zeros=True)
        assert not arrived.any()
        assert torch.equal(gemm(x, weight, None), first)
        expected = F.linear(x.float(), reference(weight, torch.float16).float())
        torch.testing.assert_close(first.float(), expected, rtol=2e-3, atol=2e-2)

    @pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
    def test_empty_batches(self, shape):
        """No inputs and no rows give empty results."""
        m, n = shape
        weight = weight_of(torch.int8, (n, 32), (1, 32))
        weight = weight._replace(scale=torch.ones(n, 1))
        assert linear(torch.randn(m, 32), weight, None).shape == (m, n)

    def test_gradients_flow_to_inputs(self):
        """A product with the same memory twice keeps the weight for its derivative."""
        first = weight_of(torch.float8_e4m3fn, (6, 64), (1, 64))
        second = first._replace(scale=first.scale * 3)
        x = torch.randn(3, 64, requires_grad=True)
        (linear(x, first, None).sum() + linear(x, second, None).sum()).backward()
        torch.testing.assert_close(
            x.grad[0], reference(first).sum(0) + reference(second).sum(0)
        )


@pytest.mark.usefixtures("loops")
class TestInputs:
    """Inputs that are quantized or rotated."""

    DENSE = (torch.float32, torch.float16, torch.bfloat16)

    @staticmethod
    def inputs(dtype, shape=(9, 256)):
        """Tokens of all sizes, one of zeros, of strides of their own."""
        x = torch.randn(shape[1], shape[0], generator=torch.Generator().manual_seed(2))
        x *= torch.ldexp(torch.ones(shape[0]), torch.arange(shape[0]) - 5)
        x[:, -1] = 0
        return x.to(dtype).t()

    @pytest.mark.parametrize("dtype", DENSE, ids=str)
    @pytest.mark.parametrize("k", [64, 250, 2100])
    def test_int8_tokens_are_those_of_the_scheme(self, dtype, k):
        """Codes and scales are bit for bit what an int8 layer computes with torch."""
        x = self.inputs(dtype, (9, k))
        codes, scale = tokens(x, torch.int8)
        amax = x.abs().amax(1, keepdim=True).float()
        expected = (amax / amax.new_tensor(127.0)).clamp_min(1e-30)
        assert torch.equal(scale, expected)
        rounded = (x.float() / expected).round_().clamp_(-128, 127)
        assert torch.equal(codes, rounded.to(torch.int8))

    @pytest.mark.parametrize("code", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
    def test_fp8_tokens(self, code):
        """FP8 codes are rounded as torch's cast rounds the quotient."""
        x = self.inputs(torch.float32)
        codes, scale = tokens(x, code)
        largest = torch.finfo(code).max
        amax = x.abs().amax(1, keepdim=True)
        expected = (amax / amax.new_tensor(largest)).clamp_min(1e-30)
        assert torch.equal(scale, expected)
        quotient = (x / expected).clamp(-largest, largest).to(code)
        assert torch.equal(codes.view(torch.uint8), quotient.view(torch.uint8))

    def test_more_rows_than_tokens(self):
        """Rows that a product wants beside the tokens are zeros."""
        x = self.inputs(torch.float16)
        codes, scale = tokens(x, torch.int8, rows=20)
        assert codes.shape == (20, 256)
        assert scale.shape == (9, 1)
        assert torch.equal(codes[:9], tokens(x, torch.int8)[0])
        assert not codes[9:].any()
        assert not groups(x, torch.float8_e4m3fn, rows=12)[0][9:].view(torch.int8).any()

    @pytest.mark.parametrize("group", [4, 16, 64, 256])
    def test_rotations(self, group):
        """Groups are multiplied with the matrix of ConvRot; twice gives the inputs."""
        x = torch.randn(512, 5, generator=torch.Generator().manual_seed(3)).t()
        x = x[:, : 3 * group] if group <= 64 else x
        for dtype, eps in ((torch.float32, 1e-6), (torch.float16, 1e-3)):
            expected = rotate_inputs(x.to(dtype).double(), group)
            rotated = rotate(x.to(dtype), group)
            assert rotated.dtype == dtype
            error = (rotated.double() - expected).norm() / expected.norm()
            assert error < eps
            back = rotate(rotated, group).double()
            assert (back - x).norm() / x.norm() < 2 * eps

    @pytest.mark.parametrize("group", [16, 256])
    def test_rotated_tokens(self, group):
        """Rotating and quantizing at once is rotating, and then quantizing."""
        x = self.inputs(torch.float16, (9, 512))
        codes, scale = tokens(x, torch.int8, group, rows=17)
        expected, expected_scale = tokens(rotate(x, group), torch.int8, rows=17)
        assert torch.equal(scale, expected_scale)
        assert torch.equal(codes, expected)

    @pytest.mark.parametrize("k", [128, 384, 300])
    @pytest.mark.parametrize("code", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
    def test_groups_of_128(self, k, code):
        """Each 128 columns have a scale, in the layout of scaled_mm."""
        x = self.inputs(torch.float16, (9, k))
        codes, scale = groups(x, code)
        largest = torch.finfo(code).max
        blocks = F.pad(x.float(), (0, -k % 128)).view(9, -1, 128)
        amax = blocks.abs().amax(2)
        expected = (amax / amax.new_tensor(largest)).clamp_min(1e-30)
        assert torch.equal(scale, expected)
        assert scale.stride() == (1, 9)
        quotient = (blocks / expected[:, :, None]).clamp(-largest, largest).to(code)
        quotient = quotient.view(torch.uint8).flatten(1)[:, :k]
        assert torch.equal(codes.view(torch.uint8), quotient)

    @pytest.mark.parametrize(("m", "k"), [(9, 128), (130, 160), (3, 1000)])
    def test_powers_for_32(self, m, k):
        """Each 32 columns have a power of two, in tiles padded with zeros."""
        x = self.inputs(torch.bfloat16, (m, k))
        x[0, 0] = 2.0**-140
        x[1, :32] = 448 * 2.0**-3
        codes, scale = powers(x, torch.float8_e4m3fn)
        blocks = F.pad(x.float(), (0, -k % 32)).view(m, -1, 32)
        amax = blocks.abs().amax(2)
        expected = fp8._round_up_to_power(amax / amax.new_tensor(448.0))
        tiles = to_tiles(expected)
        assert torch.equal(scale.view(torch.uint8), tiles.view(torch.uint8))
        quotient = (blocks / expected.float()[:, :, None]).to(torch.float8_e4m3fn)
        quotient = quotient.view(torch.uint8).flatten(1)[:, :k]
        assert torch.equal(codes.view(torch.uint8), quotient)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
    @pytest.mark.parametrize("rows", [1, 530])
    def test_the_end_of_an_integer_product(self, dtype, rows):
        """Scales and bias are applied as an int8 layer applies them."""
        random = torch.Generator().manual_seed(4)
        product = torch.randint(-(1 << 24), 1 << 24, (7, 540), generator=random).int()
        product = product[:, :530]
        token_scale = torch.rand(7, 1, generator=random) * 1e-4
        weight_scale = torch.rand(rows, 1, generator=random) * 1e-3
        bias = torch.randn(530, generator=random).to(dtype)
        expected = (product.float() * (token_scale * weight_scale.t())).to(dtype)
        plain = int8_output(product, token_scale, weight_scale, None, dtype)
        assert_same(plain, expected)
        offset = int8_output(product, token_scale, weight_scale, bias, dtype)
        assert_same(offset, expected + bias)


class TestJoined:
    """Kernels where the functions that they replace are used."""

    @pytest.mark.parametrize(
        "name", ["int8_per_token", "fp8_per_token", "fp8_per_group", "mxfp8"]
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_fused_quantizers_are_the_plain_ones(self, name, dtype):
        """Codes and scales have the same bits and layouts."""
        x = torch.randn(9, 256).to(dtype)
        plain = getattr(quantized_inputs, name)(x)
        fused = getattr(inputs, name)(x)
        assert torch.equal(fused.codes.view(torch.uint8), plain.codes.view(torch.uint8))
        for mine, theirs in zip(fused.scales, plain.scales, strict=True):
            assert mine.dtype == theirs.dtype
            assert mine.shape == theirs.shape
            assert mine.stride() == theirs.stride()
            same = (each.contiguous().view(torch.uint8) for each in (mine, theirs))
            assert torch.equal(*same)

    @pytest.mark.parametrize("bias", [False, True])
    def test_integer_products_in_three_launches(self, bias):
        """They equal those of torch's operations bit for bit."""
        codes = torch.randint(-128, 128, (40, 64), dtype=torch.int8)
        weight = BlockScaled(codes, torch.rand(40, 1) / 100, (1, 64))
        x = torch.randn(5, 64)
        offsets = torch.randn(40) if bias else None
        expected = int_mm.linear(x, weight, offsets)
        got = int_mm._fused_linear(inputs, x, codes, weight.scale, offsets)
        assert torch.equal(got, expected)

    @pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
    def test_codes_that_are_no_numbers_decode_to_none(self, dtype):
        """A damaged weight gives NaN, not numbers that look sound."""
        codes = torch.arange(256, dtype=torch.uint8).view(1, 256).view(dtype)
        out = torch.empty(1, 256)
        decode(BlockScaled(codes, torch.ones(1, 4), (1, 64)), out)
        assert torch.equal(out.isfinite(), codes.float().isfinite())
        assert out[~out.isfinite()].isnan().all()


class TestQuantize:
    """A weight to FP8 in blocks."""

    @staticmethod
    def check(weight, size, code, scale_dtype):
        """Codes and scales have the bits of the plain quantizer."""
        expected_scale = torch.empty(grid(weight.shape, size)).to(scale_dtype)
        expected = torch.empty(weight.shape, dtype=code)
        with mock.patch.dict(os.environ, HIJACK_FORWARD="plain"):
            fp8.quantize(weight, size, expected, expected_scale)
        codes, scale = torch.empty_like(expected), torch.empty_like(expected_scale)
        damaged = torch.zeros((), dtype=torch.int32)
        quantize(weight, size, codes, scale, damaged)
        assert not damaged
        as_integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
        for actual, wanted in ((scale, expected_scale), (codes, expected)):
            integer = as_integers[actual.element_size()]
            assert torch.equal(actual.view(integer), wanted.view(integer))

    @staticmethod
    def weight(shape, dtype):
        """Numbers of all sizes, and zeros, positive and negative."""
        random = torch.Generator().manual_seed(5)
        weight = torch.randn(shape, generator=random)
        exponents = torch.arange(shape[0])[:, None] % 40 - 34
        weight = torch.ldexp(weight, exponents)
        weight[0] = 0
        weight[1, ::3] = -0.0
        return weight.to(dtype)

    @pytest.mark.parametrize("code", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
    @pytest.mark.parametrize(
        "scale_dtype",
        [torch.float32, torch.bfloat16, torch.float16, torch.float8_e8m0fnu],
        ids=str,
    )
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_dtypes(self, code, scale_dtype, dtype):
        """All dtypes of codes, scales and weights, scales that become 0 among them."""
        self.check(self.weight((40, 256), dtype), (1, 64), code, scale_dtype)

    @pytest.mark.parametrize(("shape", "size"), [*BLOCKS, ((140, 260), (128, 128))])
    def test_blocks_of_any_size(self, shape, size):
        """Blocks may be short, odd, whole rows, or the whole weight."""
        weight = self.weight(shape, torch.float16)
        self.check(weight, size, torch.float8_e4m3fn, torch.float32)

    @pytest.mark.parametrize("size", [(33, 130), (3, 700), (40, 700)])
    def test_blocks_larger_than_a_program(self, size, monkeypatch):
        """Large blocks take two passes, and give the same bits."""
        monkeypatch.setattr(kernels_quantize, "MAX_BLOCK", 512)
        weight = self.weight((40, 700), torch.float32)
        self.check(weight, size, torch.float8_e4m3fn, torch.bfloat16)

    @pytest.mark.parametrize("most", [512, 1 << 14])
    @pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
    def test_damage_is_noticed(self, value, most, monkeypatch):
        """A single NaN or infinity is said in a tensor, without an exception."""
        monkeypatch.setattr(kernels_quantize, "MAX_BLOCK", most)
        weight = self.weight((40, 256), torch.bfloat16)
        weight[37, 200] = value
        codes = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        damaged = torch.zeros((), dtype=torch.int32)
        quantize(weight, (8, 128), codes, torch.empty(5, 2), damaged)
        assert damaged == 1

    def test_rounding_is_that_of_torch(self):
        """All float32 numbers next to FP8 ones and to the ties between them."""
        for code, name in ((torch.float8_e4m3fn, "e4m3"), (torch.float8_e5m2, "e5m2")):
            numbers = all_codes((1, 254), code).float().unique()
            ties = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2])
            bits = ties.view(torch.int32)
            near = torch.cat([bits - 1, bits, bits + 1]).view(torch.float32)
            largest = torch.finfo(code).max
            near = near[near.isfinite() & (near.abs() <= 2 * largest)]
            out = torch.empty(len(near), dtype=torch.int8)
            fp8_kernel[(1,)](out, near, len(near), CODE=name, BLOCK=4096)
            expected = near.clamp(-largest, largest).to(code)
            assert torch.equal(out, expected.view(torch.int8))


@triton.jit
def fp8_kernel(out, x, n, CODE: tl.constexpr, BLOCK: tl.constexpr):  # noqa: N803
    """Round some numbers to FP8."""
    place = tl.arange(0, BLOCK)
    values = tl.load(x + place, mask=place < n, other=0)
    tl.store(out + place, fp8_code(values, CODE), mask=place < n)
