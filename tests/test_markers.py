"""ComfyUI's markers that are wrong, unreadable, doubled, or on dense layers."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import hijack
import schemes.blockwise_fp8  # noqa: F401 - registers the scheme

FP8 = torch.float8_e4m3fn
ZEROS = torch.zeros(27, dtype=torch.uint8)


def marker(**entries):
    """A layer's marker as ComfyUI stores it."""
    return torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8)


def scaled(*shape, **others):
    """A layer of FP8 data with a scale of some shape, and other tensors."""
    layer = {"weight": torch.ones(64, 64).to(FP8), "weight_scale": torch.ones(shape)}
    return {f"a.{name}": tensor for name, tensor in {**layer, **others}.items()}


WRONG = {
    "zeros": (ZEROS, "is unreadable"),
    "half of it": (marker(format="float8_e4m3fn")[:9], "is unreadable"),
    "a list": (torch.tensor(list(b"[1]"), dtype=torch.uint8), "is unreadable"),
    "no format": (marker(orig_dtype="torch.bfloat16"), "names no format"),
    "integers": (marker(format="int8_tensorwise"), "the weight is F8_E4M3"),
    "two codes a byte": (marker(format="nvfp4"), "the weight is F8_E4M3"),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("shape", [(), (64,)], ids=["one scale", "rows"])
def test_a_wrong_marker_of_fp8_is_repaired_and_named(name, shape):
    """FP8 data with a scale can only be one thing; the report says what was wrong."""
    mark, reason = WRONG[name]
    tensors = scaled(*shape, comfy_quant=mark)
    found = hijack.identify(hijack.Header.from_state_dict(tensors))
    claim = found.claims()["a"]
    assert claim.block_size == ((64, 64) if shape == () else (1, 64))
    assert claim.contradiction.startswith("a: comfy_quant ")
    assert reason in claim.contradiction
    assert f"wrong marker: {claim.contradiction}" in found.as_table()
    model = nn.Sequential()
    model.add_module("a", nn.Linear(64, 64, bias=False))
    hijack.load(model, tensors)
    assert torch.equal(model.a.weight.dense(torch.float32), torch.ones(64, 64))


def test_of_two_markers_the_one_that_fits_counts():
    """An entry in the header outweighs the tensor, but not where it cannot be."""
    tensors = scaled(comfy_quant=marker(format="float8_e4m3fn"))
    table = {"layers": {"a": {"format": "int8_tensorwise"}}}
    metadata = {"_quantization_metadata": json.dumps(table)}
    found = hijack.identify(hijack.Header.from_state_dict(tensors, metadata))
    claim = found.claims()["a"]
    assert (claim.certainty, claim.contradiction) == (hijack.Certainty.MARKED, "")
    assert claim.evidence[0] == "comfy_quant says float8_e4m3fn"


def test_a_format_that_is_no_name_is_wrong_like_any_other():
    """Whatever JSON holds there; the entry in the header is wrong too, and counts."""
    tensors = scaled(comfy_quant=marker(format=["float8_e4m3fn"]))
    table = {"layers": {"a": {"format": "int8_tensorwise"}}}
    metadata = {"_quantization_metadata": json.dumps(table)}
    found = hijack.identify(hijack.Header.from_state_dict(tensors, metadata))
    assert "int8_tensorwise" in found.claims()["a"].contradiction


@pytest.fixture
def dense(tmp_path):
    """A file of two dense layers, both with a marker."""
    tensors = {
        "0.weight": torch.randn(64, 64, dtype=torch.bfloat16),
        "0.bias": torch.randn(64, dtype=torch.bfloat16),
        "0.comfy_quant": ZEROS,
        "1.weight": torch.randn(64, 64, dtype=torch.bfloat16),
        "1.comfy_quant": marker(format="float8_e4m3fn"),
    }
    save_file(tensors, tmp_path / "dense.safetensors")
    return tmp_path / "dense.safetensors"


def model():
    """What the file is of."""
    layers = nn.Linear(64, 64), nn.Linear(64, 64, bias=False)
    return nn.Sequential(*layers).bfloat16()


def test_a_marker_of_a_dense_layer_is_ignored_and_said(dense):
    """It loads as what it is; the report says so in one line."""
    found = hijack.identify(dense)
    assert found.clear
    assert found.needless == ("0.comfy_quant", "1.comfy_quant")
    assert "needless: 2 dense layers have a marker of quantized ones" in (
        found.as_table()
    )
    assert json.loads(found.to_json())["needless"] == list(found.needless)
    loaded = model()
    report = hijack.load(loaded, dense)
    assert (report.dense, report.unexpected) == (3, ())
    assert torch.equal(loaded[0].weight, load_file(dense)["0.weight"])


def test_a_quantized_copy_has_no_marker_of_a_dense_layer(dense, tmp_path):
    """Neither of the layer that is quantized, nor of the one that stays dense."""
    copy = tmp_path / "copy.safetensors"
    hijack.quantize_file(dense, copy, "blockwise_fp8", include=["0"])
    assert not [key for key in load_file(copy) if key.endswith("comfy_quant")]
    again = tmp_path / "again.safetensors"
    hijack.convert_file(copy, again, "musubi")
    hijack.load(model(), again)
    comparison = hijack.compare_files(dense, copy)
    assert not [key for key in comparison.layers if "comfy_quant" in key]


def test_a_marker_beside_a_dense_weight_with_a_scale_is_not_ignored():
    """A scale that nobody reads is refused, marker or not."""
    tensors = {
        "a.weight": torch.ones(4, 4),
        "a.weight_scale": torch.ones(()),
        "a.comfy_quant": ZEROS,
    }
    found = hijack.identify(hijack.Header.from_state_dict(tensors))
    assert (found.needless, found.unconsumed) == ((), ("a.weight_scale",))
    assert not found.clear
