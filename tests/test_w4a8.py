"""ComfyUI's packed rotated weights: W4A8 in 4 and 6 bits, and W4A4."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import hijack
from hijack.errors import AmbiguousError, HijackError, SchemeError, ShapeError
from hijack.testing import SchemeConformance, realistic_weight
from schemes.convrot_w4a4 import ConvRotW4A4
from schemes.w4a8 import CODEBOOK, W4A8

F32 = torch.float32
EIGHT = {"format": "asym_w4a8_int8", "group_size": 16, "convrot_groupsize": 64}
FOUR = {"format": "convrot_w4a4", "convrot_groupsize": 64}


class TestW4A8(SchemeConformance):
    """Four bits with a table."""

    min_sqnr_db = 15.0
    min_idempotence_db = 30.0
    compile_backend = "eager"
    options = {"rotation": 16}

    @pytest.fixture
    def scheme(self):
        """The scheme."""
        return W4A8()


@pytest.mark.thorough  # the same tests with other options, or of a like scheme
class TestW6A8(TestW4A8):
    """Six bits, with a search of scales."""

    min_sqnr_db = 28.0
    options = {"rotation": 16, "bits": 6}
    quick = True


@pytest.mark.thorough  # the same tests with other options, or of a like scheme
class TestConvRotW4A4(SchemeConformance):
    """A scale for each row of a rotated weight."""

    min_sqnr_db = 13.0
    compile_backend = "eager"
    options = {"rotation": 16}
    block_size = (1, -1)
    weight_shape = (48, 128)

    @pytest.fixture
    def scheme(self):
        """The scheme."""
        return ConvRotW4A4()


# -- comfy-kitchen ---------------------------------------------------------------------

SHAPES = [(8, 256), (33, 512), (300, 1024), (1, 256)]
#: Six bits are of 0.2.40.
BITS = [4, 6]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_w4a8_is_comfy_kitchens(shape, dtype, bits):
    """Codes and scales, and decoded weights in each dtype, bit for bit."""
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.w4a8_int8")
    if bits == 6 and not hasattr(kitchen, "_search_group_scale"):
        pytest.skip("this comfy-kitchen has no six bits")
    weight = realistic_weight(shape, outliers=True).to(dtype)
    six = {"bits": 6} if bits == 6 else {"codebook_tensor": torch.tensor(CODEBOOK)}
    codes, relative, channel, _, table = kitchen.quantize_w4a8_int8_weight(
        weight, 16, 64, **six
    )
    qdata, params = W4A8().quantize(weight, bits=bits, rotation=64)
    assert torch.equal(qdata, codes)
    assert torch.equal(params["weight_s_rel"].float(), relative.float())
    assert torch.equal(params["weight_s_channel"], channel)
    for wanted in (F32, torch.bfloat16, torch.float16):
        theirs = kitchen.dequantize_w4a8_int8_weight(
            codes, relative, channel, table, None, 16, 64, wanted
        )
        assert torch.equal(W4A8().dequantize(qdata, params, wanted), theirs)


@pytest.mark.parametrize("symmetric", [True, False])
def test_weights_without_a_table_are_comfy_kitchens(symmetric):
    """Uniform codes, and groups that are shifted; hijack reads both."""
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.w4a8_int8")
    made = kitchen.quantize_w4a8_int8_weight(
        realistic_weight((8, 256)), 16, 64, symmetric=symmetric, codebook=False
    )
    codes, relative, channel, correction, _ = made
    named = {"weight_s_rel": relative, "weight_s_channel": channel}
    if correction is not None:
        named["weight_correction"] = correction
    tensors = layer_of(EIGHT, {"weight": codes, **named})
    theirs = kitchen.dequantize_w4a8_int8_weight(
        codes, relative, channel, None, correction, 16, 64, F32
    )
    assert torch.equal(loaded(tensors), theirs)


@pytest.mark.parametrize("dtype", [F32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES)
def test_w4a4_is_comfy_kitchens(shape, dtype):
    """Codes and scales, and decoded weights in each dtype, bit for bit."""
    kitchen = pytest.importorskip("comfy_kitchen.backends.eager.convrot_w4a4")
    weight = realistic_weight(shape, outliers=True).to(dtype)
    codes, scale = kitchen.quantize_convrot_w4a4_weight(weight, 64)
    qdata, params = ConvRotW4A4().quantize(weight, rotation=64)
    assert torch.equal(qdata, codes)
    assert torch.equal(params["weight_scale"], scale)
    for wanted in (F32, torch.bfloat16, torch.float16):
        theirs = kitchen.dequantize_convrot_w4a4_weight(codes, scale, 64, 64, wanted)
        assert torch.equal(ConvRotW4A4().dequantize(qdata, params, wanted), theirs)


@pytest.mark.parametrize("seed", [1, 77])
@pytest.mark.parametrize("dtype", [F32, torch.bfloat16])
def test_random_rounding_is_comfy_kitchens(dtype, seed):
    """The same codes from the same seed, of both formats."""
    w4a8 = pytest.importorskip("comfy_kitchen.backends.eager.w4a8_int8")
    w4a4 = pytest.importorskip("comfy_kitchen.backends.eager.convrot_w4a4")
    weight = realistic_weight((33, 256)).to(dtype)
    options = {"rotation": 64, "stochastic": True, "seed": seed}
    theirs = w4a4.quantize_convrot_w4a4_weight(weight, 64, stochastic_rounding=seed)
    assert torch.equal(ConvRotW4A4().quantize(weight, **options)[0], theirs[0])
    table = torch.tensor(CODEBOOK)
    theirs = w4a8.quantize_w4a8_int8_weight(
        weight, 16, 64, codebook_tensor=table, stochastic_rounding=seed
    )
    assert torch.equal(W4A8().quantize(weight, **options)[0], theirs[0])


# -- numerics --------------------------------------------------------------------------


def hadamard(size):
    """The regular matrix of ConvRot, in float64."""
    four = [[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]
    four = matrix = torch.tensor(four, dtype=torch.float64)
    while len(matrix) < size:
        matrix = torch.kron(matrix, four)
    return matrix / math.sqrt(size)


def by_formula(codes, relative, channel, table):
    """A weight from its codes, number by number; codes are (N, K)."""
    n, k = codes.shape
    grid = torch.empty(n, k, dtype=torch.float64)
    size = k // relative.shape[1]
    for row in range(n):
        for column in range(k):
            scale = float(relative[row, column // size])
            number = table[int(codes[row, column])] * scale
            whole = torch.tensor(number, dtype=F32).round().clamp(-127, 127)
            grid[row, column] = float(whole) * float(channel[row])
    return (grid.view(n, -1, 64) @ hadamard(64)).view(n, k)


@pytest.mark.parametrize("bits", BITS)
def test_codes_are_packed_as_the_docstring_says(bits):
    """Against a formula for each number, with every code there is."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(2**bits, (2, 64), generator=generator)
    codes[0, : 2**bits] = torch.arange(2**bits)[:64]
    packed = [
        [int(row[2 * i]) % 16 + 16 * (int(row[2 * i + 1]) % 16) for i in range(32)]
        for row in codes
    ]
    table = {str(c): c - 2 ** (bits - 1) for c in range(2**bits)}
    if bits == 6:
        for line, row in zip(packed, codes, strict=True):
            fours = row.view(16, 4).tolist()
            line += [sum((c >> 4) << 2 * i for i, c in enumerate(f)) for f in fours]
    relative = torch.tensor([[1.0, 1.5, 2.0, 0.5]] * 2).to(torch.float8_e4m3fn)
    tensors = {
        "weight": torch.tensor(packed, dtype=torch.uint8).view(torch.int8),
        "weight_s_rel": relative,
        "weight_s_channel": torch.tensor([0.25, 2.0]),
    }
    expected = by_formula(
        codes, relative, tensors["weight_s_channel"], list(table.values())
    )
    dense = loaded(layer_of(EIGHT, tensors))
    assert torch.allclose(dense.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("scheme", [W4A8(), ConvRotW4A4()], ids=lambda s: s.name)
@pytest.mark.parametrize("dtype", [F32, torch.float16])
def test_rows_of_zeros_stay_zero(scheme, dtype):
    """Whatever their scale is; rows beside them keep theirs."""
    weight = realistic_weight((4, 256)).to(dtype)
    weight[1] = 0
    qdata, params = scheme.quantize(weight)
    scheme.validate(qdata, params, "proj")
    dense = scheme.dequantize(qdata, params, F32)
    assert not dense[1].any()
    assert dense[0].any()


@pytest.mark.parametrize("scheme", [W4A8(), ConvRotW4A4()], ids=lambda s: s.name)
def test_columns_that_are_no_whole_groups_are_declined(scheme):
    """With the reason, which quantizing says too."""
    assert "columns are no whole groups of 256" in scheme.declines((8, 320))
    assert scheme.declines((8, 320), rotation=64) is None
    with pytest.raises(ShapeError, match="320 columns are no whole groups"):
        scheme.quantize(torch.ones(8, 320))
    with pytest.raises(SchemeError, match="option rotation: got 100"):
        scheme.quantize(torch.ones(8, 400), rotation=100)
    assert scheme.declines((0, 256)) == "it is no matrix with elements"


def test_groups_of_scales_are_those_of_comfy_kitchen():
    """4 and 8 columns, or multiples of 16; the latter of six bits."""
    scheme = W4A8()
    for size in (4, 8, 16, 48):
        assert scheme.declines((8, 768), group_size=size) is None
    for size, bits in ((12, 4), (24, 4), (8, 6)):
        declined = scheme.declines((8, 768), group_size=size, bits=bits)
        assert declined == f"768 columns are not cut into groups of {size}"


@pytest.mark.parametrize("scheme", [W4A8(), ConvRotW4A4()], ids=lambda s: s.name)
def test_random_rounding_has_no_bias(scheme):
    """The mean of many is nearer to the weight than what is rounded to nearest."""
    weight = realistic_weight((4, 256))
    nearest = scheme.dequantize(*scheme.quantize(weight, rotation=64), F32)
    many = [
        scheme.dequantize(
            *scheme.quantize(weight, rotation=64, stochastic=True, seed=seed), F32
        )
        for seed in range(1, 65)
    ]
    mean = torch.stack(many).mean(0)
    assert (mean - weight).square().sum() < 0.2 * (nearest - weight).square().sum()


@pytest.mark.parametrize("scheme", [W4A8(), ConvRotW4A4()], ids=lambda s: s.name)
def test_a_changed_weight_is_quantized_as_before(scheme):
    """With the layer's rotation; a seed rounds at random."""
    weight = realistic_weight((4, 256))
    layer = nn.Linear(256, 4, bias=False)
    layer.weight.data = weight
    old = hijack.wrap_module(layer, scheme, rotation=16).weight
    same, params = scheme.requantize(weight, old)
    assert torch.equal(same, old.qdata)
    assert params["weight_rotation"].shape == (16, 0)
    first, _ = scheme.requantize(weight, old, seed=3)
    again, _ = scheme.requantize(weight, old, seed=3)
    other, _ = scheme.requantize(weight, old, seed=4)
    assert torch.equal(first, again)
    assert not torch.equal(first, same)
    assert not torch.equal(first, other)


# -- files -----------------------------------------------------------------------------


def marker(**entries):
    """A layer's marker as ComfyUI stores it."""
    return torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8)


def layer_of(mark, tensors):
    """A layer ``a`` of a file."""
    marked = {**tensors, **({} if mark is None else {"comfy_quant": marker(**mark)})}
    return {f"a.{name}": tensor for name, tensor in marked.items()}


def quantized(scheme, shape=(8, 256), **options):
    """The tensors of a layer that ComfyUI stores."""
    qdata, params = scheme.quantize(realistic_weight(shape), rotation=64, **options)
    stored = {name: t for name, t in params.items() if t.numel()}
    return {"weight": qdata, **stored}


def loaded(tensors):
    """The dense weight of the layer."""
    weight = tensors["a.weight"]
    groups = tensors.get("a.weight_s_rel")
    columns = 2 * weight.shape[1] if groups is None else 16 * groups.shape[1]
    model = nn.Sequential()
    model.add_module("a", nn.Linear(columns, weight.shape[0], bias=False))
    hijack.load(model, tensors)
    return model.a.weight.dense(F32)


def test_a_header_marks_as_a_tensor_does():
    """ComfyUI's table in the metadata; both give the same weight."""
    for scheme, mark in ((W4A8(), EIGHT), (ConvRotW4A4(), FOUR)):
        tensors = quantized(scheme)
        table = {"_quantization_metadata": json.dumps({"layers": {"a": mark}})}
        header = hijack.Header.from_state_dict(layer_of(None, tensors), table)
        claim = hijack.identify(header).claims()["a"]
        assert claim.certainty is hijack.Certainty.MARKED
        assert claim.scheme == scheme.name
        assert claim.unread == ()


def test_bytes_of_other_dtypes_are_what_they_are():
    """Codes and E4M3 scales stored as uint8 decode the same."""
    for scheme, mark in ((W4A8(), EIGHT), (ConvRotW4A4(), FOUR)):
        tensors = quantized(scheme)
        as_bytes = {
            name: t.view(torch.uint8) if t.element_size() == 1 else t
            for name, t in tensors.items()
        }
        first = loaded(layer_of(mark, tensors))
        assert torch.equal(first, loaded(layer_of(mark, as_bytes)))


@pytest.mark.parametrize(
    ("scheme", "options", "entry"),
    [
        (W4A8(), {"group_size": 32}, {"group_size": 32}),
        (W4A8(), {"bits": 6}, {"group_size": 16}),
        (W4A8(), {"full_precision_matrix_mult": True},
         {"group_size": 16, "full_precision_matrix_mult": True}),
        (ConvRotW4A4(), {}, {}),
        (ConvRotW4A4(), {"linear_dtype": "int8"}, {"linear_dtype": "int8"}),
    ],
    ids=str,
)  # fmt: skip
def test_a_file_comes_back_with_its_marker(tmp_path, scheme, options, entry):
    """From ComfyUI's dialect to hijack's and back, byte for byte."""
    dense, first, native, back = (
        tmp_path / f"{name}.safetensors" for name in ("dense", "a", "b", "c")
    )
    save_file({"a.weight": realistic_weight((8, 256))}, dense)
    hijack.quantize_file(
        dense, first, scheme=scheme.name, dialect="comfy_quant", rotation=64, **options
    )
    hijack.convert_file(first, native, dialect="hijack")
    hijack.convert_file(native, back, dialect="comfy_quant")
    written, again = load_file(first), load_file(back)
    assert written.keys() == again.keys()
    for key, tensor in written.items():
        assert torch.equal(tensor.view(torch.uint8), again[key].view(torch.uint8))
    name = {"w4a8": EIGHT, "convrot_w4a4": FOUR}[scheme.name]["format"]
    said = json.loads(bytes(written["a.comfy_quant"].tolist()))
    assert said == {"format": name, "convrot_groupsize": 64, **entry}
    assert "comfy_quant" not in str(load_file(native).keys())


MALFORMED = {
    "a rotation of text": ({"convrot_groupsize": "many"}, "rotation: got 'many'"),
    "no rotation": ({"convrot_groupsize": None}, "rotation: got None|rotation None"),
    "a rotation below zero": ({"convrot_groupsize": -4}, "rotation: got -4"),
    "a rotation without end": ({"convrot_groupsize": 2**70}, "rotation"),
    "no power of four": ({"convrot_groupsize": 128}, "rotation: got 128"),
    "too wide a rotation": ({"convrot_groupsize": 1024}, "no whole groups of 1024"),
    "a list": ({"convrot_groupsize": [64]}, "rotation"),
}
ONLY_EIGHT = {
    "groups of text": ({"group_size": "x"}, "group_size: got 'x'"),
    "groups without end": ({"group_size": 2**70}, "group_size"),
    "groups of three": ({"group_size": 3}, "group_size: got 3"),
    "wider groups": ({"group_size": 32}, "expected 4 or 6 bits"),
    "no groups": ({"group_size": None}, "group_size"),
}


@pytest.mark.parametrize(
    ("scheme", "mark", "name"),
    [(W4A8(), EIGHT, name) for name in (*MALFORMED, *ONLY_EIGHT)]
    + [(ConvRotW4A4(), FOUR, name) for name in MALFORMED],
    ids=str,
)
def test_a_malformed_marker_is_an_error_by_name(scheme, mark, name):
    """It names the layer and what was got; nothing is decoded to garbage."""
    wrong, match = {**MALFORMED, **ONLY_EIGHT}[name]
    tensors = layer_of({**mark, **wrong}, quantized(scheme))
    with pytest.raises(HijackError, match=rf"a: .*({match})"):
        loaded(tensors)


def changed(tensors, **others):
    """Tensors of a layer with others; None takes one away."""
    return {k: t for k, t in {**tensors, **others}.items() if t is not None}


DAMAGE = {
    "no table": {"weight_codebook": None},
    "a short table": {"weight_codebook": torch.ones(8)},
    "no scales of rows": {"weight_s_channel": None},
    "scales of other rows": {"weight_s_channel": torch.ones(9)},
    "no scales of groups": {"weight_s_rel": None},
    "a scale that is no number": {"weight_s_channel": torch.full((8,), math.nan)},
    "a shift of another shape": {"weight_correction": torch.ones(8, 16)},
    "floats for codes": {"weight": torch.ones(8, 128)},
    "too few codes": {"weight": torch.ones(8, 100, dtype=torch.int8)},
    "six bits with a table": {"weight": torch.ones(8, 192, dtype=torch.int8)},
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_layer_is_refused_by_name(name):
    """A missing table as well, which the size of the scales tells."""
    tensors = layer_of(EIGHT, changed(quantized(W4A8()), **DAMAGE[name]))
    model = nn.Sequential()
    model.add_module("a", nn.Linear(256, 8, bias=False))
    with pytest.raises(HijackError, match=r"a\b"):
        hijack.load(model, tensors)


@pytest.mark.parametrize(
    "damage",
    [
        {"weight_scale": None},
        {"weight_scale": torch.ones(8, 2)},
        {"weight_scale": torch.full((8,), math.inf)},
        {"weight": torch.ones(8, 128)},
    ],
)
def test_a_damaged_layer_of_four_bits_is_refused_by_name(damage):
    """Scales that are none, or of something else."""
    tensors = layer_of(FOUR, changed(quantized(ConvRotW4A4()), **damage))
    model = nn.Sequential()
    model.add_module("a", nn.Linear(256, 8, bias=False))
    with pytest.raises(HijackError, match=r"a\b"):
        hijack.load(model, tensors)


def test_without_a_marker_the_rotation_is_asked_for():
    """Everything else the tensors tell; the usual one comes first."""
    tensors = layer_of(None, quantized(W4A8()))
    header = hijack.Header.from_state_dict(tensors)
    found = hijack.identify(header)
    asked = [claim.options["rotation"] for claim in found.ambiguous["a"]]
    assert asked == ["256", "4", "16", "64"]
    with pytest.raises(AmbiguousError, match="rotation=256 or"):
        found.check()
    claim = hijack.identify(header, assume=["rotation=64"]).claims()["a"]
    assert claim.options == {"group_size": "16", "rotation": "64"}


def test_shifted_groups_are_not_written_for_comfyui(tmp_path):
    """It would leave the shift out; hijack's own dialect keeps it."""
    tensors = quantized(W4A8())
    del tensors["weight_codebook"]
    tensors["weight_s_rel"] = (tensors["weight_s_rel"].float() / 9).to(
        torch.float8_e4m3fn
    )
    tensors["weight_correction"] = torch.ones(16, 8)
    source = tmp_path / "a.safetensors"
    save_file(layer_of(EIGHT, tensors), source)
    native = tmp_path / "b.safetensors"
    hijack.convert_file(source, native, dialect="hijack")
    assert torch.equal(loaded(load_file(source)), loaded_native(native))
    with pytest.raises(HijackError, match="no place for weight_correction"):
        hijack.convert_file(native, tmp_path / "c.safetensors", dialect="comfy_quant")


def loaded_native(path):
    """The dense weight of the layer of a file of hijack's."""
    model = nn.Sequential()
    model.add_module("a", nn.Linear(256, 8, bias=False))
    hijack.load(model, path)
    return model.a.weight.dense(F32)
