"""NVFP4: the scheme, its dialects and what it refuses."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import hijack
from hijack.claim import Certainty
from hijack.errors import AmbiguousError, CheckpointError, HijackError
from hijack.metrics import sqnr_db
from hijack.testing import SchemeConformance
from schemes.nvfp4 import NVFP4

GOLDEN = Path(__file__).parent / "golden"
SCHEME = NVFP4()
E4M3 = torch.float8_e4m3fn


class TestConformance(SchemeConformance):
    """The scheme against the whole kit."""

    min_sqnr_db = 18.0
    min_idempotence_db = 15.0
    option_sets = ({"scale_search": 7},)

    @pytest.fixture
    def scheme(self):
        """The scheme."""
        return NVFP4()


def weight_of(*shape, seed=0, dtype=torch.float32):
    """Normal numbers, in rows of very different sizes."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.logspace(-2, 1, shape[0]).unsqueeze(1)
    return (torch.randn(shape, generator=generator) * rows).to(dtype)


def marker(**entries):
    """The value of ``X.comfy_quant``."""
    return torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8)


def tensors_of(n, k, scale, dtype=E4M3, **more):
    """Tensors of a layer ``a``; the scale's shape is given."""
    return {
        "a.weight": torch.full((n, k // 2), 0x21, dtype=torch.uint8),
        "a.weight_scale": torch.ones(scale).to(dtype),
        "a.weight_scale_2": torch.tensor(0.5),
        **{f"a.{name}": tensor for name, tensor in more.items()},
    }


def same_bits(first, second):
    """Whether two tensors hold the same bytes."""
    raw = (tensor.reshape(-1).view(torch.uint8) for tensor in (first, second))
    return torch.equal(*raw)


def identify(tensors, config=None):
    """What the layers of a state dict are."""
    said = {} if config is None else {"quantization_config": json.dumps(config)}
    return hijack.identify(hijack.Header.from_state_dict(tensors, said))


# -- numerics --------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(24, 40), (130, 129), (300, 1000), (16, 32)])
def test_codes_and_scales_are_those_of_comfy_kitchen(shape, dtype):
    """Bit for bit, and so is what they decode to."""
    kitchen = pytest.importorskip("comfy_kitchen.tensor.nvfp4").TensorCoreNVFP4Layout
    weight = weight_of(*shape, dtype=dtype)
    packed, made = kitchen.quantize(weight)
    qdata, params = SCHEME.quantize(weight)
    dialect = SCHEME.dialects[0]
    stored = dialect.store(qdata, params)
    assert torch.equal(stored["weight"], packed)
    assert torch.equal(stored["weight_scale_2"], made.scale)
    tiles = stored["weight_scale"].view(torch.uint8)
    assert torch.equal(tiles, made.block_scale.view(torch.uint8))
    kind = kitchen.Params(
        scale=made.scale,
        orig_dtype=torch.float32,
        orig_shape=tuple(weight.shape),
        block_scale=made.block_scale,
    )
    dense = kitchen.dequantize(packed, kind)[: shape[0], : shape[1]]
    got = SCHEME.dequantize(qdata, params, torch.float32)[:, : shape[1]]
    assert torch.equal(got.view(torch.int32), dense.view(torch.int32))


def test_ties_go_to_the_even_code():
    """The middles between magnitudes, and the numbers next to them."""
    middles = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
    even = torch.tensor([0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0])
    above = torch.tensor([0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
    below = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0])
    rows = torch.stack(
        [middles, middles.nextafter(torch.tensor(9.0)), middles.nextafter(-middles)]
    )
    rows = nn.functional.pad(torch.cat([rows, -rows]), (0, 9), value=6.0)
    made = SCHEME.quantize(rows * 448)  # the scales are 1 and 448
    dense = SCHEME.dequantize(*made, torch.float32)[:, :7] / 448
    expected = torch.stack([even, above, below])
    assert torch.equal(dense, torch.cat([expected, -expected]))


def test_a_small_float16_weight_keeps_its_scale():
    """A scale that is subnormal in float16 would be coarse, or zero."""
    weight = (weight_of(16, 64) * 1e-5).half()
    _, params = SCHEME.quantize(weight)
    expected = weight.float().abs().max() / 2688
    assert params["weight_scale_2"] == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_zeros_stay_zero(dtype):
    """A weight of zeros has a scale, by which nothing is divided."""
    qdata, params = SCHEME.quantize(torch.zeros(3, 40, dtype=dtype))
    SCHEME.validate(qdata, params, "a")
    assert not SCHEME.dequantize(qdata, params, torch.float32).any()


def test_searching_scales_lessens_the_error():
    """By most of a decibel with two tries, and never the other way."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    least = 0.0
    for count, gain in ((0, 0.0), (2, 0.8), (7, 1.0)):
        made = SCHEME.quantize(weight, scale_search=count)
        error = sqnr_db(weight, SCHEME.dequantize(*made, torch.float32))
        if not count:
            least = error
        assert error >= least + gain


def test_a_bfloat16_result_is_rounded_once():
    """It is the float32 product, rounded."""
    made = SCHEME.quantize(weight_of(40, 96))
    exact = SCHEME.dequantize(*made, torch.float32)
    assert torch.equal(SCHEME.dequantize(*made, torch.bfloat16), exact.bfloat16())


# -- factors of columns ----------------------------------------------------------------


def awq():
    """ComfyUI's file with factors of the columns, and the factors."""
    tensors = load_file(GOLDEN / "comfyui_nvfp4" / "model.safetensors")
    mine = {key: tensor for key, tensor in tensors.items() if key.startswith("awq.")}
    return mine, mine["awq.pre_quant_scale"].float()


def test_factors_of_columns_multiply_the_input():
    """As the program computes: the plain weight, and the input times the factors."""
    tensors, factors = awq()
    model = nn.ModuleDict({"awq": nn.Linear(32, 16, bias=False)})
    hijack.load(model, tensors)
    del tensors["awq.pre_quant_scale"]
    plain = nn.ModuleDict({"awq": nn.Linear(32, 16, bias=False)})
    hijack.load(plain, tensors)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1))
    expected = plain["awq"](x * factors)
    assert torch.allclose(model["awq"](x), expected, rtol=1e-5, atol=1e-5)


def test_a_changed_weight_keeps_its_factors():
    """A LoRA that is merged changes the weight, not the smoothing."""
    tensors, factors = awq()
    model = nn.ModuleDict({"awq": nn.Linear(32, 16, bias=False)})
    hijack.load(model, tensors)
    old = model["awq"].weight
    changed = old.dense(torch.float32) + 0.01
    qdata, params = SCHEME.requantize(changed, old)
    assert torch.equal(params["pre_quant_scale"].float(), factors)
    dense = SCHEME.dequantize(qdata, params, torch.float32)
    assert sqnr_db(changed, dense) > 18


# -- ComfyUI's markers -----------------------------------------------------------------


def test_a_padded_weight_is_cut_and_padded_again(tmp_path):
    """24 x 40 is stored as 32 x 48; what is saved is what was loaded, bit for bit."""
    tensors = load_file(GOLDEN / "comfyui_nvfp4" / "model.safetensors")
    mine = {k: t for k, t in tensors.items() if k.startswith("padded.")}
    claim = identify(mine).claims()["padded"]
    assert (claim.shape, claim.padded) == ((24, 48), (16, 16))  # by the bias
    model = nn.ModuleDict({"padded": nn.Linear(40, 24)})
    hijack.load(model, mine)
    weight = model["padded"].weight
    assert weight.qdata.shape == (24, 24)
    assert weight.params["weight_columns"].shape == (40, 0)
    hijack.save(model, tmp_path / "a.safetensors", "comfy_quant")
    saved = load_file(tmp_path / "a.safetensors")
    for name in ("weight", "weight_scale", "weight_scale_2"):
        new, old = saved[f"padded.{name}"], mine[f"padded.{name}"]
        assert same_bits(new, old), name
    said = json.loads(bytes(saved["padded.comfy_quant"].tolist()))
    assert said == {"format": "nvfp4", "orig_shape": [24, 40]}
    assert identify(saved).claims()["padded"].shape == (24, 40)


@pytest.mark.parametrize(
    ("mark", "reason"),
    [
        (torch.zeros(8, dtype=torch.uint8), "comfy_quant is unreadable"),
        (marker(orig_dtype="torch.bfloat16"), "comfy_quant names no format"),
        (marker(format="float8_e4m3fn"), "float8_e4m3fn, the weight is U8"),
    ],
    ids=["NUL", "no format", "another format"],
)
def test_a_wrong_marker_is_repaired_and_named(mark, reason):
    """The tensors can only be NVFP4, and only ComfyUI marks so."""
    claim = identify(tensors_of(128, 64, (128, 4), comfy_quant=mark)).claims()["a"]
    assert (claim.scheme, claim.dialect) == ("nvfp4", "comfy_quant")
    assert reason in claim.contradiction


def test_a_marker_of_another_program_is_left_alone():
    """A format of tomorrow may have the same tensors."""
    mark = marker(format="nvfp4_of_tomorrow")
    found = identify(tensors_of(128, 64, (128, 4), comfy_quant=mark))
    assert found.unsupported["a"].format == "nvfp4 of another kind"


def test_scales_may_be_stored_as_bytes():
    """ComfyUI takes them for E4M3 where it is marked."""
    tensors = tensors_of(32, 64, (128, 4), comfy_quant=marker(format="nvfp4"))
    plain = {**tensors, "a.weight_scale": tensors["a.weight_scale"].view(torch.uint8)}
    models = [nn.ModuleDict({"a": nn.Linear(64, 32, bias=False)}) for _ in range(2)]
    for model, stored in zip(models, (tensors, plain), strict=True):
        hijack.load(model, stored)
    first, second = (model["a"].weight.dense() for model in models)
    assert torch.equal(first, second)


def test_what_a_layer_shall_not_do_is_kept(tmp_path):
    """``full_precision_matrix_mult`` is read and written."""
    mark = marker(format="nvfp4", full_precision_matrix_mult=True)
    model = nn.ModuleDict({"a": nn.Linear(64, 32, bias=False)})
    hijack.load(model, tensors_of(32, 64, (128, 4), comfy_quant=mark))
    assert model["a"].weight.options["full_precision_matrix_mult"] is True
    hijack.save(model, tmp_path / "a.safetensors")
    saved = load_file(tmp_path / "a.safetensors")
    said = json.loads(bytes(saved["a.comfy_quant"].tolist()))
    assert said == {"format": "nvfp4", "full_precision_matrix_mult": True}


def test_a_marker_that_does_not_fit_is_refused_by_name():
    """Plain order under ComfyUI's marker is nothing that ComfyUI reads."""
    tensors = tensors_of(24, 64, (24, 4), comfy_quant=marker(format="nvfp4"))
    assert identify(tensors).unsupported["a"].format == "nvfp4 of another kind"
    with pytest.raises(CheckpointError, match="a: is in the format nvfp4 of another"):
        hijack.load(nn.ModuleDict({"a": nn.Linear(64, 24, bias=False)}), tensors)


# -- without a marker ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "scale", "bias", "dialect"),
    [
        ((24, 64), (24, 4), None, "modelopt"),
        ((32, 64), (128, 4), None, "comfy_quant"),
        ((128, 48), (128, 3), None, "modelopt"),
        ((128, 48), (128, 4), None, "comfy_quant"),
        ((128, 64), (128, 4), 120, "comfy_quant"),
    ],
)
def test_shapes_tell_the_order(shape, scale, bias, dialect):
    """Where the scales are in whole tiles or in plain order, or rows were added."""
    more = {} if bias is None else {"bias": torch.zeros(bias)}
    claim = identify(tensors_of(*shape, scale, **more)).claims()["a"]
    assert (claim.dialect, claim.certainty) == (dialect, Certainty.UNIQUE)


def test_where_they_do_not_the_user_is_asked():
    """Both readings are offered, and each decodes to other numbers."""
    tensors = tensors_of(128, 64, (128, 4), bias=torch.zeros(128))
    tensors["a.weight_scale"] = weight_of(128, 4).abs().to(E4M3)
    with pytest.raises(AmbiguousError, match=r"comfy_quant.*modelopt"):
        identify(tensors).claims()
    dense = {}
    for word in ("comfy_quant", "modelopt"):
        model = nn.ModuleDict({"a": nn.Linear(64, 128)})
        hijack.load(model, tensors, assume=[word])
        dense[word] = model["a"].weight.dense()
    assert not torch.equal(dense["comfy_quant"], dense["modelopt"])
    assert dense["modelopt"][0, :2].tolist() != dense["comfy_quant"][0, :2].tolist()


@pytest.mark.parametrize("algorithm", ["NVFP4", "W4A16_NVFP4", "MIXED_PRECISION"])
def test_a_config_tells_the_order(algorithm):
    """ModelOpt writes one, ComfyUI does not."""
    config = {"quant_method": "modelopt", "quant_algo": algorithm}
    claim = identify(tensors_of(128, 64, (128, 4)), config=config).claims()["a"]
    assert (claim.dialect, claim.certainty) == ("modelopt", Certainty.MARKED)


LOW_RANK = {"svdquant_lora_a": torch.zeros(4, 64)}
MODELOPT = {"quant_method": "modelopt", "quant_algo": "NVFP4_SVD"}


@pytest.mark.parametrize(
    ("more", "config", "name"),
    [
        ({}, {"quant_method": "other"}, "nvfp4 of another kind"),
        ({"pre_quant_scale": torch.ones(32)}, None, "nvfp4 of another kind"),
        (LOW_RANK, MODELOPT, "nvfp4 of another kind"),
    ],
    ids=["another method", "factors of another width", "a low rank"],
)
def test_what_is_not_known_is_named(more, config, name):
    """A weight without its low-rank part, or without its factors, would be wrong."""
    found = identify(tensors_of(128, 64, (128, 4), **more), config=config)
    assert found.unsupported["a"].format == name


# -- other dialects --------------------------------------------------------------------


def test_the_scale_of_compressed_tensors_divides():
    """Its reciprocal multiplies; names that nobody else has need no config."""
    tensors = {
        "a.weight_packed": torch.full((16, 16), 0x22, dtype=torch.uint8),
        "a.weight_scale": torch.full((16, 2), 2.0).to(E4M3),
        "a.weight_global_scale": torch.tensor([4.0]),
    }
    assert identify(tensors).claims()["a"].certainty is Certainty.UNIQUE
    model = nn.ModuleDict({"a": nn.Linear(32, 16, bias=False)})
    hijack.load(model, tensors)
    assert set(model["a"].weight.dense().flatten().tolist()) == {0.5}  # 1 * 2 / 4
    odd = {**tensors, "a.weight_scale": torch.ones(16, 3).to(E4M3)}
    assert identify(odd).unsupported["a"].format == "compressed-tensors packed"


def test_files_convert_back_and_forth(tmp_path):
    """ComfyUI's order and ModelOpt's hold the same numbers."""
    names = ["comfy.safetensors", "modelopt.safetensors", "again.safetensors"]
    first, second, third = (tmp_path / name for name in names)
    tensors = tensors_of(128, 64, (128, 4), comfy_quant=marker(format="nvfp4"))
    tensors["a.weight_scale"] = weight_of(128, 4).abs().to(E4M3)
    tensors["a.input_scale"] = torch.tensor(0.25)
    save_file(tensors, first)
    hijack.convert_file(first, second, "modelopt")
    claim = hijack.identify(second).claims()["a"]
    assert (claim.dialect, claim.certainty) == ("modelopt", Certainty.MARKED)
    hijack.convert_file(second, third, "comfy_quant")
    back = load_file(third)
    for key, tensor in tensors.items():
        assert same_bits(back[key], tensor), key
    assert not torch.equal(load_file(second)["a.weight"], tensors["a.weight"])


def test_a_width_that_16_does_not_divide_is_only_for_comfyui(tmp_path):
    """ModelOpt pads nothing, and its readers would take the padding for weights."""
    model = nn.ModuleDict({"a": nn.Linear(40, 16)})
    hijack.wrap_model(model, NVFP4())
    with pytest.raises(CheckpointError, match="modelopt: has no place for weight_col"):
        hijack.save(model, tmp_path / "a.safetensors", "modelopt")
    hijack.save(model, tmp_path / "a.safetensors", "comfy_quant")


@pytest.mark.parametrize("dialect", ["compressed_tensors", "torchao"])
def test_what_is_only_read_is_not_written(dialect, tmp_path):
    """The error names the dialect."""
    model = nn.ModuleDict({"a": nn.Linear(32, 16)})
    hijack.wrap_model(model, NVFP4())
    with pytest.raises(CheckpointError, match=f"{dialect}: can be read, not written"):
        hijack.save(model, tmp_path / "a.safetensors", dialect)


# -- damaged files ---------------------------------------------------------------------


def damaged(name, value):
    """A layer with one tensor changed."""
    qdata, params = SCHEME.quantize(weight_of(16, 32))
    tensors = {"weight": qdata, **params, "pre_quant_scale": torch.ones(32)}
    tensors[name] = value
    tensors = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    return tensors.pop("weight"), tensors


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight", torch.zeros(16, 16, dtype=torch.int8), "weight is torch.int8"),
        ("weight", torch.zeros(16, 12, dtype=torch.uint8), r"shape \(16, 12\)"),
        ("weight_scale", None, "weight_scale is missing"),
        ("weight_scale", torch.ones(16, 3).to(E4M3), r"shape \(16, 3\)"),
        ("weight_scale", torch.ones(16, 2), "weight_scale is torch.float32"),
        ("weight_scale", torch.full((16, 2), -1.0).to(E4M3), "a negative number"),
        ("weight_scale", torch.full((16, 2), torch.nan).to(E4M3), "holds NaN"),
        ("weight_scale_2", None, "weight_scale_2 is missing"),
        ("weight_scale_2", torch.tensor(torch.inf), "weight_scale_2 is inf"),
        ("weight_scale_2", torch.tensor(torch.nan), "weight_scale_2 is nan"),
        ("weight_scale_2", torch.tensor(-1.0), "weight_scale_2 is -1.0"),
        ("pre_quant_scale", torch.ones(16), r"pre_quant_scale has shape \(16,\)"),
        ("pre_quant_scale", torch.zeros(32), "pre_quant_scale holds 0"),
        ("weight_columns", torch.empty(16, 0, dtype=torch.uint8), "weight_columns"),
        ("weight_columns", torch.empty(32, 0, dtype=torch.uint8), "weight_columns"),
    ],
)
def test_a_damaged_layer_is_refused_by_name(name, value, message):
    """The error says where, what and what was expected."""
    with pytest.raises(HijackError, match=message) as caught:
        SCHEME.validate(*damaged(name, value), "blocks.0.q")
    assert str(caught.value).startswith("blocks.0.q: ")
    assert "expected" in str(caught.value) or "missing" in str(caught.value)


@pytest.mark.parametrize("shape", [[16, 64], [17, 32], [2**70, 32]])
def test_a_shape_that_the_tensors_do_not_give_is_refused(shape, tmp_path):
    """hijack's own marker says the dense shape; it may be smaller, never larger."""
    model = nn.ModuleDict({"a": nn.Linear(32, 16, bias=False)})
    hijack.wrap_model(model, NVFP4())
    hijack.save(model, tmp_path / "a.safetensors", "hijack")
    with safe_open(tmp_path / "a.safetensors", "pt") as file:
        marks = json.loads(file.metadata()["hijack"])
    assert marks["layers"]["a"]["shape"] == [16, 32]
    marks["layers"]["a"]["shape"] = shape
    stored = load_file(tmp_path / "a.safetensors")
    header = hijack.Header.from_state_dict(stored, {"hijack": json.dumps(marks)})
    found = hijack.identify(header)
    assert "shape is" in found.mismatches["a"]


def test_a_weight_that_is_no_matrix_is_refused():
    """Convolutions stay dense."""
    with pytest.raises(HijackError, match=r"shape \(4, 4, 3\)"):
        SCHEME.quantize(torch.zeros(4, 4, 3))
