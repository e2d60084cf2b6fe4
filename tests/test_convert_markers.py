"""convert keeps what markers say beside the weight, or names what it loses."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import hijack
import schemes.blockwise_fp8  # noqa: F401 - registers the scheme

FLAG = "full_precision_matrix_mult"
FP8 = torch.float8_e4m3fn


def marker(**entries):
    """A layer's marker as ComfyUI stores it."""
    text = json.dumps({"format": "float8_e4m3fn", **entries}).encode()
    return torch.tensor(list(text), dtype=torch.uint8)


def flagged(path):
    """Layers whose marker says that they are never multiplied in FP8."""
    tensors = load_file(path)
    own = {
        key.removesuffix(".comfy_quant")
        for key, tensor in tensors.items()
        if key.endswith(".comfy_quant") and json.loads(bytes(tensor)).get(FLAG) is True
    }
    with safe_open(path, "pt") as file:
        table = json.loads((file.metadata() or {}).get("_quantization_metadata", "{}"))
    entries = table.get("layers", {})
    assert own == {name for name, entry in entries.items() if entry.get(FLAG) is True}
    return own


def current(path, **markers):
    """A file of ComfyUI's current format with the given entries by layer."""
    tensors = {}
    for name, entries in markers.items():
        tensors[f"{name}.weight"] = torch.ones(32, 32).to(FP8)
        tensors[f"{name}.weight_scale"] = torch.tensor(0.5)
        tensors[f"{name}.comfy_quant"] = marker(**entries)
    save_file(tensors, path)
    return path


def former(path, elements, **inputs):
    """A file of ComfyUI's former format with input scales by layer."""
    tensors = {"scaled_fp8": torch.zeros(elements).to(FP8)}
    for name, scale in inputs.items():
        tensors[f"{name}.weight"] = torch.ones(32, 32).to(FP8)
        tensors[f"{name}.scale_weight"] = torch.tensor(0.5)
        if scale is not None:
            tensors[f"{name}.scale_input"] = torch.tensor(scale)
    save_file(tensors, path)
    return path


@pytest.fixture
def out(tmp_path):
    """Where to write."""
    return tmp_path / "out.safetensors"


@pytest.mark.parametrize(
    ("elements", "layers"), [(2, {"a", "b"}), (1, set()), (0, set())]
)
def test_the_former_marker_of_two_elements_is_each_layers(
    tmp_path, out, elements, layers
):
    """ComfyUI reads it as full precision for the whole file."""
    source = former(tmp_path / "in.safetensors", elements, a=None, b=None)
    report = hijack.convert_file(source, out, "comfy_quant")
    assert flagged(out) == layers
    assert not report.lost


def test_the_flag_of_a_layer_goes_through_hijacks_own_dialect_and_back(tmp_path, out):
    """It is an option of the layer, which the metadata keeps."""
    source = current(tmp_path / "in.safetensors", a={FLAG: True}, b={}, c={FLAG: False})
    middle = tmp_path / "middle.safetensors"
    assert not hijack.convert_file(source, middle, "hijack").lost
    assert not hijack.convert_file(middle, out, "comfy_quant").lost
    assert flagged(out) == {"a"}


def test_the_flag_survives_loading_and_saving(tmp_path, out):
    """A model holds it with its weight."""
    source = current(tmp_path / "in.safetensors", a={FLAG: True}, b={})
    model = nn.ModuleDict({name: nn.Linear(32, 32, bias=False) for name in "ab"})
    hijack.load(model, source)
    assert model["a"].weight.options[FLAG] is True
    hijack.save(model, out)
    assert flagged(out) == {"a"}


def test_quantize_writes_the_flag_on_request(tmp_path, out):
    """It is declared as any option of the scheme is."""
    source = tmp_path / "dense.safetensors"
    save_file({"a.weight": torch.randn(32, 32)}, source)
    hijack.quantize_file(source, out, dialect="comfy_quant", **{FLAG: True})
    assert flagged(out) == {"a"}


@pytest.mark.parametrize("dialect", ["musubi", "deepseek", "torchao"])
def test_a_dialect_without_a_place_for_it_loses_it_by_name(tmp_path, out, dialect):
    """The summary does not speak of no loss alone."""
    source = current(tmp_path / "in.safetensors", a={FLAG: True}, b={FLAG: True}, c={})
    report = hijack.convert_file(source, out, dialect)
    assert report.lost == {FLAG: 2}
    assert f"lost: {FLAG} of 2 layers" in str(report)


def test_entries_nobody_knows_are_lost_by_name(tmp_path, out):
    """What a later ComfyUI writes may mean something."""
    source = current(tmp_path / "in.safetensors", a={"smooth": 3}, b={})
    report = hijack.convert_file(source, out, "comfy_quant")
    assert report.lost == {"smooth": 1}


def test_an_input_scale_of_one_is_none_in_the_former_format_alone(tmp_path, out):
    """ComfyUI's former writers put 1 where they had no input scale."""
    source = former(tmp_path / "in.safetensors", 0, a=1.0, b=0.25)
    report = hijack.convert_file(source, out, "comfy_quant")
    written = load_file(out)
    assert "a.input_scale" not in written
    assert written["b.input_scale"].item() == 0.25
    assert report.dropped == ()
    again = tmp_path / "again.safetensors"
    fixed = {**written, "a.input_scale": torch.tensor(1.0)}
    save_file(fixed, tmp_path / "fixed.safetensors")
    hijack.convert_file(tmp_path / "fixed.safetensors", again, "comfy_quant")
    assert load_file(again)["a.input_scale"].item() == 1.0


def test_a_tensor_that_is_not_written_is_named(tmp_path, out):
    """The scale of a fallback is needless beside the blocks, and left out by name."""
    source = tmp_path / "in.safetensors"
    tensors = load_file(current(source, a={}))
    save_file({**tensors, "a.weight_scalar": torch.tensor(2.0)}, source)
    report = hijack.convert_file(source, out, "musubi")
    assert report.dropped == ("a.weight_scalar",)
    assert "1 tensors left out" in str(report)


@pytest.mark.parametrize("value", [True, 1, "true"])
def test_the_flag_may_be_any_value_that_comfyui_takes_for_true(tmp_path, value):
    """ComfyUI asks only whether it is truthy."""
    source = current(tmp_path / "source.safetensors", a={FLAG: value}, b={FLAG: 0})
    hijack.convert_file(source, tmp_path / "out.safetensors", "comfy_quant")
    assert flagged(tmp_path / "out.safetensors") == {"a"}


@pytest.mark.parametrize("says", ["header", "tensor"])
def test_the_header_outweighs_the_marker_of_a_layer(tmp_path, says):
    """ComfyUI replaces the tensor with the header's entry; what it said is named."""
    entries = {says: {"format": "float8_e4m3fn", FLAG: True}}
    tensor, entry = (
        entries.get(w, {"format": "float8_e4m3fn"}) for w in ("tensor", "header")
    )
    source = current(tmp_path / "source.safetensors", a={**tensor})
    table = json.dumps({"format_version": "1.0", "layers": {"a": entry}, "mixed": 1})
    save_file(load_file(source), source, {"_quantization_metadata": table})
    report = hijack.convert_file(source, tmp_path / "out.safetensors", "comfy_quant")
    assert flagged(tmp_path / "out.safetensors") == (
        {"a"} if says == "header" else set()
    )
    assert (FLAG in report.lost) == (says == "tensor")
    with safe_open(tmp_path / "out.safetensors", "pt") as file:
        assert json.loads(file.metadata()["_quantization_metadata"])["mixed"] == 1


def test_what_a_marker_nests_is_named_as_lost(tmp_path):
    """Of the parameters of a format only the size of groups is read."""
    nested = {"group_size": 32, "offset": 3}
    source = current(tmp_path / "source.safetensors", a={"params": nested})
    report = hijack.convert_file(source, tmp_path / "out.safetensors", "comfy_quant")
    assert dict(report.lost) == {"offset": 1}
