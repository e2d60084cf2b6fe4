"""Weights, options and markers that no scheme can do anything sensible with."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import hijack
from hijack.errors import AmbiguousError, HijackError, SchemeError

WEIGHT = torch.randn(8, 256, generator=torch.Generator().manual_seed(5))
SCHEMES = ("blockwise_fp8", "convrot_w4a4", "int8", "mxfp4", "nf4", "nvfp4", "w4a8")


def bytes_of(marker):
    """A marker as files have it."""
    return torch.tensor(list(json.dumps(marker).encode()), dtype=torch.uint8)


def layer(scheme, marker=None, dialect=0, **options):
    """A layer as a dialect stores it, perhaps with another marker."""
    scheme = hijack.schemes()[scheme]
    quantized = scheme.quantize(WEIGHT, **options)
    tensors = scheme.dialects[dialect].encode(*quantized, options)
    if marker is not None:
        told = json.loads(bytes(tensors["comfy_quant"].tolist()))
        tensors["comfy_quant"] = bytes_of({**told, **marker})
    return {f"a.{name}": tensor for name, tensor in tensors.items()}


def model(columns=256):
    """A model with one layer."""
    made = nn.Module()
    made.a = nn.Linear(columns, 8, bias=False)
    return made


def identified(tmp_path, tensors):
    """The identification of a file with these tensors."""
    path = tmp_path / "file.safetensors"
    save_file({key: t.contiguous() for key, t in tensors.items()}, path)
    return hijack.identify(path)


# -- quantizing ------------------------------------------------------------------------


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("shape", [(0, 256), (256, 0), (0, 0)])
def test_a_weight_without_elements_is_declined(name, shape):
    """It has no blocks; the layer stays dense and is reported."""
    built = nn.Sequential(nn.Linear(4, 4, bias=False))
    built[0].weight = nn.Parameter(torch.empty(shape))
    assert "elements" in hijack.schemes()[name].declines(shape)
    report = hijack.wrap_model(built, name)
    assert not report.layers
    assert type(built[0].weight) is nn.Parameter


@pytest.mark.parametrize("name", SCHEMES)
def test_what_overflows_is_refused_when_it_is_quantized(name):
    """Not first when the file is read: float64 has numbers that float32 has not."""
    module = nn.Linear(256, 8, bias=False).double()
    with torch.no_grad():
        module.weight.fill_(1e300)
    with pytest.raises(HijackError):
        hijack.wrap_module(module, name)
    assert type(module.weight) is nn.Parameter


def test_a_scale_that_its_dtype_has_not_is_refused():
    """float16 ends at 65504, which would clip all but the largest weights."""
    weight = WEIGHT.clone()
    weight[0, 0] = 1e30
    with pytest.raises(SchemeError, match="scale_dtype float32"):
        hijack.schemes()["int8"].quantize(weight, scale_dtype=torch.float16)


@pytest.mark.parametrize(
    ("name", "option"), [("nf4", "quant_type"), ("int8", "rotation"), ("w4a8", "bits")]
)
def test_none_is_no_value_of_an_option_that_has_a_default(name, option):
    """It would be computed with."""
    with pytest.raises(SchemeError, match=f"option {option}: got None"):
        hijack.wrap_module(nn.Linear(256, 8), name, **{option: None})


# -- markers ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "marker"),
    [
        ("int8", {"convrot": True, "convrot_groupsize": 1024}),
        ("int8", {"convrot": True, "convrot_groupsize": None}),
        ("int8", {"convrot": True, "convrot_groupsize": "2_56"}),
        ("int8", {"convrot": "false"}),
        ("int8", {"convrot": [1]}),
        ("convrot_w4a4", {"convrot_groupsize": 1024}),
        ("convrot_w4a4", {"convrot_groupsize": None}),
        ("w4a8", {"group_size": 100}),
        ("w4a8", {"group_size": 256}),
        ("w4a8", {"convrot_groupsize": 4096}),
    ],
)
def test_identify_refuses_a_marker_that_load_refuses(tmp_path, name, marker):
    """It has the header alone, and says so before anything is read."""
    tensors = layer(name, marker)
    found = identified(tmp_path, tensors)
    assert not found.clear
    assert list(found.mismatches) == ["a"]
    with pytest.raises(HijackError, match="a: metadata and tensors do not match"):
        hijack.load(model(), tensors)


@pytest.mark.parametrize("name", ["weight_s_channel", "weight_codebook"])
def test_identify_refuses_tensors_that_do_not_fit_each_other(tmp_path, name):
    """Of a layer whose marker names the format."""
    tensors = layer("w4a8")
    tensors[f"a.{name}"] = tensors[f"a.{name}"][:-1]
    assert name in identified(tmp_path, tensors).mismatches["a"]


@pytest.mark.parametrize("told", ["true", "True", True, 1])
def test_a_rotation_that_is_told_as_text_is_one(told):
    """Some tools write all values as texts."""
    made = model()
    hijack.load(made, layer("int8", {"convrot": told}, rotation=256))
    assert (made.a.weight.dense() - WEIGHT).norm() < 0.02 * WEIGHT.norm()


def test_blocks_may_be_rotated_too():
    """What the marker says of the rotation holds whatever format it names."""
    made = model()
    marker = {"format": "int8_blockwise", "group_size": 256}
    hijack.load(made, layer("int8", marker, rotation=256))
    assert (made.a.weight.dense() - WEIGHT).norm() < 0.02 * WEIGHT.norm()


def test_scales_of_rows_in_a_row_are_not_taken_for_blocks():
    """As many scales as rows: they may be of rows, or of blocks of columns."""
    tensors = layer("int8")
    tensors["a.weight_scale"] = tensors["a.weight_scale"].view(1, 8)
    with pytest.raises(AmbiguousError):
        hijack.load(model(), tensors)


def test_a_marker_of_packed_codes_is_not_taken_for_padding():
    """Codes as wide as the module are a weight that is twice as wide."""
    tensors = layer("int8", {"format": "convrot_w4a4"})
    with pytest.raises(HijackError, match=r"decodes to a weight of shape \(8, 512\)"):
        hijack.load(model(), tensors)


@pytest.mark.parametrize("offset", [float("nan"), float("inf"), 10**400])
def test_an_offset_that_is_no_number_is_refused(tmp_path, offset):
    """JSON has such numbers, float32 has not."""
    tensors = layer("nf4", double_quant=True)
    key = next(key for key in tensors if "quant_state" in key)
    state = json.loads(bytes(tensors[key].tolist()))
    tensors[key] = bytes_of({**state, "nested_offset": offset})
    assert not identified(tmp_path, tensors).clear


@pytest.mark.parametrize("options", [{}, {"quantized_inputs": True}])
def test_a_saved_layer_computes_as_it_did(tmp_path, options):
    """ComfyUI quantizes inputs unless the marker says that it shall not."""
    made = model()
    hijack.wrap_module(made.a, "int8", **options)
    hijack.save(made, tmp_path / "saved.safetensors", dialect="comfy_quant")
    again = model()
    hijack.load(again, tmp_path / "saved.safetensors")
    inputs = torch.randn(3, 256)
    assert torch.equal(made.a(inputs), again.a(inputs))


def test_a_format_that_nobody_knows_is_shown(tmp_path):
    """Whoever misspelled it sees how."""
    found = identified(tmp_path, layer("int8", {"format": "INT8_TENSORWISE"}))
    assert "comfy_quant says INT8_TENSORWISE" in found.unsupported["a"].evidence
