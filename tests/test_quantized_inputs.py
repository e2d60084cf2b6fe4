"""Products with quantized inputs: quantizers, recipes of units, layouts, opting in."""

import gc

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

import hijack
from hijack.hosts.diagnostics import diagnose
from hijack.testing import sqnr_db
from schemes._kernels import devices, plain, quantized_inputs, scaled_mm
from schemes._kernels.block_scaled import BlockScaled
from schemes._kernels.tables import E2M1, table_on
from schemes._tiles import from_tiles
from schemes.blockwise_fp8 import BlockwiseFP8
from schemes.int8 import Int8
from schemes.nvfp4 import NVFP4

CPU = torch.device("cpu")
F32 = torch.float32
needs_scaled_mm = pytest.mark.skipif(
    not hasattr(F, "scaled_mm"), reason="torch 2.10 has scaled_mm"
)


def inputs(m=6, k=256, dtype=F32):
    """Rows of very different sizes, one of zeros."""
    x = torch.randn(m, k, generator=torch.Generator().manual_seed(2))
    x *= 10.0 ** torch.arange(-2, m - 2)[:, None]
    x[1] = 0
    return x.to(dtype)


def fp8_weight(n=32, k=256, **options):
    """A quantized weight as kernels take it."""
    scheme = BlockwiseFP8()
    dense = torch.randn(n, k, generator=torch.Generator().manual_seed(3))
    return scheme.block_scaled(*scheme.quantize(dense, **options))


def fp4_weight(n=32, k=256):
    scheme = NVFP4()
    return scheme.block_scaled(*scheme.quantize(torch.randn(n, k)))


def dequantized(quantizer, x):
    """What the codes of an input stand for: (M, K) float32."""
    m, k = x.shape
    codes, scales = quantizer(x)
    if quantizer is quantized_inputs.nvfp4:
        grid = from_tiles(scales[0], (m, k // 16)).float() * scales[1]
        weight = BlockScaled(codes, grid, (1, 16), table_on(E2M1, CPU))
        return plain.decode(weight, F32)
    grid = scales[0]
    if quantizer is quantized_inputs.mxfp8:
        grid = from_tiles(grid, (m, k // 32))
    return plain.decode(BlockScaled(codes, grid, (1, k // grid.shape[1])), F32)


# -- quantizers ------------------------------------------------------------------------

#: columns that share a scale, largest code, least SQNR in dB of normal inputs
QUANTIZERS = {
    quantized_inputs.int8_per_token: (256, 127.0, 38.0),
    quantized_inputs.fp8_per_token: (256, 448.0, 30.0),
    quantized_inputs.fp8_per_group: (128, 448.0, 30.0),
    quantized_inputs.mxfp8: (32, 448.0, 30.0),
    quantized_inputs.nvfp4: (16, 6.0, 18.0),
}


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_inputs_come_back_with_the_error_of_their_format(quantizer):
    """Rows of any size are exact to some dB, and zeros are zeros."""
    x = inputs()
    if quantizer is quantized_inputs.nvfp4:  # one scale for the input
        x = x / x.abs().amax(1, keepdim=True).clamp(min=1e-9)
    back = dequantized(quantizer, x)
    for row in (0, 2, 3, 4, 5):
        assert sqnr_db(x[row], back[row]) > QUANTIZERS[quantizer][2]
    assert not back[1].any()


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("quantizer", list(QUANTIZERS)[:3])
def test_scales_are_the_largest_number_over_the_largest_code(quantizer, dtype):
    """In float32, whatever the input is; the largest number has the largest code."""
    columns, most, _ = QUANTIZERS[quantizer]
    x = inputs(4, dtype=dtype)
    x[1, 3] = 1.0
    codes, (scale,) = quantizer(x)
    groups = x.float().view(4, -1, columns).abs().amax(2)
    least = 1e-30
    assert torch.equal(scale, (groups / most).clamp_min(least))
    largest = codes.float().view(4, -1, columns).abs().amax(2)
    assert torch.equal(largest[groups > 0], torch.full_like(largest, most)[groups > 0])


def test_scales_of_groups_lie_as_units_read_them():
    """Those of a column side by side, or in tiles of 128 x 4."""
    x = inputs()
    assert quantized_inputs.fp8_per_group(x).scales[0].stride() == (1, 6)
    (tiles,) = quantized_inputs.mxfp8(x).scales
    assert (tiles.dtype, tiles.shape) == (torch.float8_e8m0fnu, (128, 8))
    codes, (tiles, whole) = quantized_inputs.nvfp4(x)
    assert (codes.dtype, codes.shape) == (torch.uint8, (6, 128))
    assert (tiles.dtype, tiles.shape) == (torch.float8_e4m3fn, (128, 16))
    assert whole.shape == ()


def test_powers_of_two_are_rounded_up():
    """So that nothing is clipped; a power of two stays what it is."""
    x = torch.zeros(3, 32)
    x[0, 0], x[1, 0], x[2, 0] = 448.0, 449.0, 1e-38
    codes, (tiles,) = quantized_inputs.mxfp8(x)
    scales = from_tiles(tiles, (3, 1)).float().flatten().tolist()
    assert scales == [1.0, 2.0, 2.0**-126]
    assert codes[0, 0].float() == 448.0


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_quantizers_can_be_compiled(quantizer):
    """In one graph, with the same codes and scales."""
    x = inputs()
    compiled = torch.compile(quantizer, fullgraph=True, backend="aot_eager")
    got, expected = compiled(x), quantizer(x)
    for made, wanted in zip(
        (got.codes, *got.scales), (expected.codes, *expected.scales), strict=True
    ):
        assert made.dtype == wanted.dtype
        assert torch.equal(made.float(), wanted.float())


# -- recipes ---------------------------------------------------------------------------

#: block size and dtype of the scales to the recipe, and where there is none
RECIPES = [
    ("row", F32, "row"),
    ("tensor", torch.bfloat16, "row"),
    ((16, 256), F32, "row"),
    ((1, 128), F32, "1x128"),
    ((1, 128), torch.float8_e8m0fnu, "1x128"),
    ((128, 128), F32, "128x128"),
    ((64, 128), F32, "1x128"),
    ((1, 32), torch.float8_e8m0fnu, "mxfp8"),
    ((1, 32), F32, "no unit has blocks of 1x32"),
    ((1, 64), F32, "no unit has blocks of 1x64"),
]


@pytest.mark.parametrize(("size", "dtype", "expected"), RECIPES)
def test_blocks_choose_the_recipe(size, dtype, expected):
    """Blocks that no unit has are named."""
    recipe = scaled_mm.recipe_of(fp8_weight(256, block_size=size, scale_dtype=dtype))
    text = recipe if isinstance(recipe, str) else recipe.name
    assert text.startswith(expected)


#: capability to the recipes that its units have
UNITS = {
    (7, 5): set(),
    (8, 6): set(),
    (8, 9): {"row"},
    (9, 0): {"row", "1x128", "128x128"},
    (10, 0): {"row", "mxfp8", "nvfp4"},
    (12, 0): {"row", "mxfp8", "nvfp4"},
}
ALL = ("ROW", "NARROW", "SQUARE", "MXFP8", "NVFP4")


@needs_scaled_mm
@pytest.mark.parametrize("found", UNITS)
def test_a_gpu_has_the_recipes_of_its_generation(monkeypatch, found):
    """Others are refused in a sentence that names the generation that has them."""
    monkeypatch.setattr(devices, "capability", lambda device: found)
    monkeypatch.setattr(devices, "amd_architecture", lambda device: "")
    for name in ALL:
        recipe = getattr(scaled_mm, name)
        why = scaled_mm._device_refuses(recipe, torch.device("cuda", 0))
        assert (why is None) == (recipe.name in UNITS[found])
        assert why is None or f"capability {found[0]}.{found[1]} has no unit" in why


@needs_scaled_mm
@pytest.mark.parametrize(("name", "has"), [("gfx950", True), ("gfx942", False)])
def test_amds_units_multiply_rows(monkeypatch, name, has):
    """Of codes without another bias; older ones have other codes."""
    monkeypatch.setattr(devices, "amd_architecture", lambda device: name)
    for recipe in (getattr(scaled_mm, each) for each in ALL):
        why = scaled_mm._device_refuses(recipe, torch.device("cuda", 0))
        assert (why is None) == (has and recipe is scaled_mm.ROW)


def test_what_no_unit_takes_is_refused():
    """Sides, dtypes, the order in memory; on the CPU unless it is named."""
    row = fp8_weight(block_size="row")
    assert "the CPU has no unit" in scaled_mm.refuses(row, F32)
    assert "inputs of float32" in scaled_mm.refuses(row, torch.float64)
    odd = fp8_weight(30, 256, block_size="row")
    assert "the weight has 30 and 256" in scaled_mm.refuses(odd, F32)
    e5m2 = fp8_weight(block_size="row", dtype=torch.float8_e5m2)
    assert "float8_e5m2" in scaled_mm.refuses(e5m2, F32)
    turned = row._replace(codes=row.codes.t().contiguous().t())
    assert "do not lie in memory" in scaled_mm.refuses(turned, F32)
    integers = Int8()
    integer = integers.block_scaled(*integers.quantize(torch.ones(16, 32)))
    assert "int8" in scaled_mm.refuses(integer, F32)
    high = fp4_weight()._replace(high_first=True)
    assert "another order" in scaled_mm.refuses(high, F32)


# -- layouts and products --------------------------------------------------------------


def emulated(recipe, weight):
    """The weight that a unit sees: (N, K) float32, from the scales as laid out."""
    (n, k), scales = weight.shape, recipe.layout(weight)
    if recipe is scaled_mm.ROW:
        assert scales[0].shape == (1, n)
        assert scales[0].is_contiguous()
        return weight.codes.float() * scales[0].t()
    if recipe is scaled_mm.NARROW:
        assert (scales[0].shape, scales[0].stride()) == ((n, k // 128), (1, n))
        return plain.decode(weight._replace(scale=scales[0], size=(1, 128)), F32)
    if recipe is scaled_mm.SQUARE:
        high = -(-k // 128 // 4) * 4
        assert scales[0].shape == (high, n // 128)
        assert scales[0].stride() == (1, high)
        grid = scales[0].t()[:, : k // 128]
        return plain.decode(weight._replace(scale=grid, size=(128, 128)), F32)
    if recipe is scaled_mm.MXFP8:
        return plain.decode(
            weight._replace(scale=from_tiles(scales[0], (n, k // 32))), F32
        )
    grid = from_tiles(scales[0], (n, k // 16))
    return plain.decode(weight._replace(scale=grid, factor=scales[1]), F32)


@pytest.mark.parametrize(
    ("size", "dtype"), [(size, dtype) for size, dtype, why in RECIPES if " " not in why]
)
def test_a_unit_sees_the_same_weight(size, dtype):
    """Scales that are laid out otherwise decode to the same numbers, bit for bit."""
    weight = fp8_weight(256, 256, block_size=size, scale_dtype=dtype)
    recipe = scaled_mm.recipe_of(weight)
    assert torch.equal(emulated(recipe, weight), plain.decode(weight, F32))


def test_a_unit_sees_the_same_weight_of_four_bits():
    """Tiles and the scale of the weight."""
    weight = fp4_weight()
    assert scaled_mm.recipe_of(weight) is scaled_mm.NVFP4
    assert torch.equal(emulated(scaled_mm.NVFP4, weight), plain.decode(weight, F32))


@pytest.mark.parametrize(("high", "k"), [(128, 512), (128, 640), (256, 512)])
def test_square_blocks_of_any_number_are_padded_to_four(high, k):
    """Where four divides their number, the scales are a view."""
    weight = fp8_weight(256, k, block_size=(high, 128))
    assert scaled_mm.recipe_of(weight) is scaled_mm.SQUARE
    assert torch.equal(emulated(scaled_mm.SQUARE, weight), plain.decode(weight, F32))
    (scale,) = scaled_mm.SQUARE.layout(weight)
    shared = scale.data_ptr() == weight.scale.data_ptr()
    assert shared == (high == 128 and k == 512)


@pytest.mark.parametrize(
    ("size", "dtype", "least"),
    [
        ("row", F32, 28),
        ((1, 128), F32, 28),
        ((128, 128), F32, 28),
        ((1, 32), torch.float8_e8m0fnu, 27),
    ],
)
def test_products_have_the_error_of_both_formats(size, dtype, least):
    """Against the decoded weight it is the input's alone, some dB."""
    weight = fp8_weight(256, block_size=size, scale_dtype=dtype)
    recipe, x = scaled_mm.recipe_of(weight), torch.randn(64, 256)
    dense = plain.decode(weight, F32)
    got = dequantized(recipe.quantizer, x) @ emulated(recipe, weight).t()
    assert least < sqnr_db(x @ dense.t(), got) < 45


@pytest.fixture
def forced_on_cpu(monkeypatch):
    """The CPU's loop for rows, which is not taken by itself."""
    monkeypatch.setenv("HIJACK_FORWARD", "scaled_mm")
    monkeypatch.setenv("HIJACK_STRICT", "1")


@needs_scaled_mm
@pytest.mark.parametrize("size", ["row", "tensor"])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16])
def test_rows_are_multiplied_on_the_cpu(forced_on_cpu, size, dtype):
    """The output is the product of what both codes stand for."""
    dense = nn.Linear(64, 32).to(dtype)
    layer = hijack.wrap_module(dense, BlockwiseFP8(), block_size=size)
    x = torch.randn(3, 5, 64).to(dtype)
    tokens = dequantized(quantized_inputs.fp8_per_token, x.view(15, 64))
    weight = layer.weight.dense(F32)
    with torch.no_grad():
        expected = tokens.double() @ weight.double().t() + layer.bias.double()
        got = layer(x)
    assert (got.dtype, got.shape) == (dtype, (3, 5, 32))
    close = torch.finfo(dtype).eps * 4 * float(expected.abs().max())
    assert torch.allclose(got.double().view(15, 32), expected, rtol=0, atol=close)


# -- scales are laid out once ----------------------------------------------------------


def test_scales_are_kept_as_long_as_the_weight():
    """They are made again when the scale is written to, and dropped with it."""
    weight = fp8_weight(block_size=(1, 128))
    (first,) = scaled_mm._scales(scaled_mm.NARROW, weight)
    assert scaled_mm._scales(scaled_mm.NARROW, weight)[0] is first
    key = id(weight.scale)
    assert key in scaled_mm._kept
    weight.scale.mul_(2)
    (second,) = scaled_mm._scales(scaled_mm.NARROW, weight)
    assert torch.equal(second, first * 2)
    del weight
    gc.collect()
    assert key not in scaled_mm._kept


def test_views_and_inference_tensors_are_not_kept():
    """A view would keep its scale alive; the others may change without a sign."""
    weight = fp8_weight(block_size="row", scale_dtype=F32)
    scaled_mm._scales(scaled_mm.ROW, weight)
    assert id(weight.scale) not in scaled_mm._kept
    with torch.inference_mode():
        other = fp8_weight(block_size=(1, 128))
        scaled_mm._scales(scaled_mm.NARROW, other)
    assert id(other.scale) not in scaled_mm._kept


# -- opting in -------------------------------------------------------------------------


def asks(scheme, **options):
    """Whether a layer asks for kernels that quantize its input."""
    layer = hijack.wrap_module(nn.Linear(64, 32), scheme, **options)
    return layer.weight.scheme.quantizes_inputs(layer.weight)


@pytest.mark.parametrize("scheme", ["int8", "blockwise_fp8", "nvfp4"])
def test_a_layer_asks_by_its_option_or_the_environment(monkeypatch, scheme):
    """A layer that says no stays so, and 0 is for all."""
    assert not asks(scheme)
    assert asks(scheme, quantized_inputs=True)
    for value in ("1", "*", f"mxfp4, {scheme}"):
        monkeypatch.setenv("HIJACK_QUANTIZED_INPUTS", value)
        assert asks(scheme)
        assert not asks(scheme, quantized_inputs=False)
        assert not asks("mxfp4")
    monkeypatch.setenv("HIJACK_QUANTIZED_INPUTS", "nf4")
    assert not asks(scheme)
    assert asks(scheme, quantized_inputs=True)
    monkeypatch.setenv("HIJACK_QUANTIZED_INPUTS", "0")
    assert not asks(scheme, quantized_inputs=True)


@pytest.mark.parametrize("scheme", ["blockwise_fp8", "nvfp4"])
def test_full_precision_forbids_it(monkeypatch, scheme):
    """Whatever else asks for it."""
    options = {"quantized_inputs": True, "full_precision_matrix_mult": True}
    monkeypatch.setenv("HIJACK_QUANTIZED_INPUTS", "1")
    assert not asks(scheme, **options)


def test_doctor_shows_the_variable(monkeypatch):
    """Set or not."""
    monkeypatch.delenv("HIJACK_QUANTIZED_INPUTS", raising=False)
    assert diagnose().variables["HIJACK_QUANTIZED_INPUTS"] is None


def test_reports_say_what_computes_and_why():
    """The kernel for integers is taken; the one for FP8 says what is missing."""
    layer = hijack.wrap_module(nn.Linear(64, 32), "int8", quantized_inputs=True)
    explain = layer.weight.scheme.explain_forward
    assert explain(layer.weight, F32, 4).kernel == "int_mm"
    layer = hijack.wrap_module(
        nn.Linear(128, 32), "blockwise_fp8", quantized_inputs=True
    )
    choice = layer.weight.scheme.explain_forward(layer.weight, F32, 4)
    assert choice.others["scaled_mm"].startswith("no unit has blocks of 1x64")


def test_a_layer_without_a_unit_decodes():
    """The output is that of the decoded weight."""
    layer = hijack.wrap_module(
        nn.Linear(128, 32), "blockwise_fp8", quantized_inputs=True
    )
    x = torch.randn(4, 128)
    expected = F.linear(x, layer.weight.dense(), layer.bias)
    assert torch.allclose(layer(x), expected, atol=1e-5)


@pytest.mark.parametrize("scheme", ["blockwise_fp8", "nvfp4"])
def test_the_option_stays_in_hijacks_files_and_others_say_that_it_is_lost(
    tmp_path, scheme
):
    """A conversion to a format without a place for it names it."""
    dense, path = tmp_path / "dense.safetensors", tmp_path / "a.safetensors"
    save_file({"a.weight": torch.randn(32, 64)}, dense)
    hijack.quantize_file(
        *(dense, path, scheme),
        dialect="hijack",
        include=["a"],
        quantized_inputs=True,
    )
    assert hijack.identify(path).claims()["a"].options["quantized_inputs"] == "True"
    model = nn.ModuleDict({"a": nn.Linear(64, 32, bias=False)})
    hijack.load(model, path)
    weight = model["a"].weight
    assert weight.scheme.quantizes_inputs(weight)
    other = {"blockwise_fp8": "musubi", "nvfp4": "modelopt"}[scheme]
    made = hijack.quantize_file(
        *(dense, tmp_path / "c.safetensors", scheme),
        dialect=other,
        include=["a"],
        quantized_inputs=True,
    )
    assert any("cannot store quantized_inputs of 1 layers" in n for n in made.notes)
    report = hijack.convert_file(path, tmp_path / "b.safetensors", other)
    assert "quantized_inputs of 1 layers" in str(report)


# -- compilers, gradients, devices -----------------------------------------------------


@pytest.mark.parametrize("rotation", [0, 16])
def test_products_in_integers_compile_to_one_graph(rotation):
    """With the numbers of the eager product."""
    layer = hijack.wrap_module(
        nn.Linear(64, 32), "int8", rotation=rotation, quantized_inputs=True
    )
    x = torch.randn(5, 64)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), layer(x), atol=1e-5)


@needs_scaled_mm
def test_products_of_rows_compile_to_one_graph(forced_on_cpu):
    """As eager, where the layer asks for it."""
    layer = hijack.wrap_module(
        nn.Linear(64, 32), "blockwise_fp8", block_size="row", quantized_inputs=True
    )
    x = torch.randn(5, 64)
    with torch.no_grad():
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), layer(x), atol=1e-5)
        exact = F.linear(x, layer.weight.dense(), layer.bias)
        assert not torch.allclose(layer(x), exact, atol=1e-4)


def test_a_bias_may_have_a_gradient():
    """The product is in integers; the bias's gradient is known."""
    layer = hijack.wrap_module(nn.Linear(64, 32), "int8", quantized_inputs=True)
    layer.bias.requires_grad_(True)
    x = torch.randn(5, 64)
    output = layer(x)
    output.sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((32,), 5.0))
    exact = F.linear(x, layer.weight.dense(), layer.bias)
    assert not torch.allclose(output, exact, atol=1e-4)


class Waits(TorchDispatchMode):
    """Notes operations that would wait for a device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero"):
            self.found.append(name)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("quantizer", QUANTIZERS)
def test_quantizers_wait_for_nothing(quantizer):
    """No operation reads a number back."""
    with Waits() as waits:
        quantizer(inputs())
    assert not waits.found


@pytest.mark.parametrize(
    ("size", "dtype"), [(size, dtype) for size, dtype, why in RECIPES if " " not in why]
)
def test_layouts_wait_for_nothing(size, dtype):
    """No operation reads a number back."""
    weight = fp8_weight(256, block_size=size, scale_dtype=dtype)
    with Waits() as waits:
        scaled_mm.recipe_of(weight).layout(weight)
    assert not waits.found
