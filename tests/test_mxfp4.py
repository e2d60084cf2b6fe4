"""MXFP4: the scheme, its dialects and what it refuses."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import hijack
from hijack.claim import Certainty
from hijack.errors import CheckpointError, HijackError
from hijack.metrics import sqnr_db
from hijack.testing import SchemeConformance
from schemes.mxfp4 import MXFP4

SCHEME = MXFP4()
E8M0 = torch.float8_e8m0fnu


class TestConformance(SchemeConformance):
    """The scheme against the whole kit."""

    min_sqnr_db = 15.0
    min_idempotence_db = 15.0

    @pytest.fixture
    def scheme(self):
        """The scheme."""
        return MXFP4()


def identify(tensors, config=None, metadata=None):
    """What the layers of a state dict are; ``config`` is that of ``config.json``."""
    header = hijack.Header.from_state_dict(tensors, metadata)
    return hijack.identify(hijack.Header(header.tensors, header.metadata, config))


def tensors_of(weight="weight", scale="weight_scale", dtype=torch.uint8, code=E8M0):
    """Tensors of a layer ``a`` of 16 x 64: all codes 1.0, all scales 4."""
    return {
        f"a.{weight}": torch.full((16, 32), 0x22, dtype=torch.uint8).view(dtype),
        f"a.{scale}": torch.full((16, 2), 129, dtype=torch.uint8).view(code),
    }


# -- numerics --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("largest", "exponent"),
    [(1.0, -2), (1.99, -2), (2.0, -1), (6.0, 0), (7.9, 0), (8.0, 1), (2.0**-130, -126)],
)
def test_the_exponent_is_the_floor_of_the_standard(largest, exponent):
    """Of the largest element of a block, less two; none is subnormal."""
    weight = torch.zeros(1, 32)
    weight[0, 3] = -largest
    _, params = SCHEME.quantize(weight)
    assert params["weight_scale"].tolist() == [[exponent + 127]]


def test_the_codes_are_those_of_the_standard():
    """Ties go to the even code, and what is too large is 6."""
    row = [4.0, 0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 7.9, -0.3, -6.0]
    expected = [4.0, 0.0, 1.0, 1.0, 2.0, 2.0, 4.0, 4.0, 6.0, -0.5, -6.0]
    weight = nn.functional.pad(torch.tensor([row]), (0, 21))
    dense = SCHEME.dequantize(*SCHEME.quantize(weight), torch.float32)
    assert dense[0, :11].tolist() == expected


def test_zeros_stay_zero():
    """A block of zeros has the least power of two."""
    qdata, params = SCHEME.quantize(torch.zeros(3, 40))
    SCHEME.validate(qdata, params, "a")
    assert not SCHEME.dequantize(qdata, params, torch.float32).any()
    assert not params["weight_scale"].any()


def test_the_next_power_of_two_lessens_the_error():
    """For blocks of which much is more than 6."""
    weight = torch.randn(64, 512, generator=torch.Generator().manual_seed(0))
    errors = [
        sqnr_db(weight, SCHEME.dequantize(*SCHEME.quantize(weight, **o), torch.float32))
        for o in ({}, {"scale_search": 1})
    ]
    assert errors[1] > errors[0] + 0.2


# -- dialects --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "config", "dialect", "certainty"),
    [
        (
            tensors_of("weight_packed", code=torch.uint8),
            None,
            "compressed_tensors",
            Certainty.UNIQUE,
        ),
        (
            tensors_of("weight_packed", code=torch.uint8),
            {"quant_method": "compressed-tensors"},
            "compressed_tensors",
            Certainty.MARKED,
        ),
        (
            tensors_of(scale="scale", dtype=torch.int8),
            None,
            "deepseek",
            Certainty.UNIQUE,
        ),
        (
            tensors_of(scale="scale", dtype=torch.int8, code=torch.uint8),
            {"quant_method": "fp8"},
            "deepseek",
            Certainty.UNIQUE,
        ),
        (tensors_of(), None, "modelopt", Certainty.FITS),
        (
            tensors_of(code=torch.uint8),
            {"quant_method": "modelopt", "quant_algo": "W4A8_MXFP4_FP8"},
            "modelopt",
            Certainty.MARKED,
        ),
    ],
)
def test_a_layer_is_recognised_and_decoded(tensors, config, dialect, certainty):
    """Under the names and dtypes of each program."""
    config = None if config is None else {"quantization_config": config}
    claim = identify(tensors, config).claims()["a"]
    assert (claim.scheme, claim.dialect) == ("mxfp4", dialect)
    assert claim.certainty is certainty
    qdata, params = SCHEME.dialects[
        [d.name for d in SCHEME.dialects].index(dialect)
    ].decode(claim, {role: tensors[key] for role, key in claim.keys.items()})
    SCHEME.validate(qdata, params, "a")
    dense = SCHEME.dequantize(qdata, params, torch.float32)
    assert dense.shape == (16, 64)
    assert set(dense.flatten().tolist()) == {4.0}


def test_a_declared_expert_is_certain():
    """DeepSeek's config says it of all experts."""
    tensors = tensors_of(scale="scale", dtype=torch.int8)
    claim = identify(tensors, {"expert_dtype": "fp4"}).claims()["a"]
    assert claim.certainty is Certainty.MARKED


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        (tensors_of(), {"quant_method": "quark"}),
        (tensors_of("weight_packed", code=torch.uint8), {"quant_method": "other"}),
        (tensors_of(scale="scale", dtype=torch.int8, code=torch.uint8), None),
        ({**tensors_of(), "a.weight_scale": torch.zeros(16, 4).byte()}, None),
        ({**tensors_of(), "a.comfy_quant": torch.zeros(4).byte()}, None),
    ],
    ids=["quark", "another method", "bytes without a config", "a width", "a marker"],
)
def test_what_is_not_certain_is_not_read(tensors, config):
    """Nobody but the scheme of that name would decode it rightly."""
    config = None if config is None else {"quantization_config": config}
    assert "a" not in identify(tensors, config).layers


def test_torchao_says_whether_scales_are_in_tiles():
    """A file that says so needs scales of that shape, and MXTensors of 4 bits."""
    plain = tensors_of("_weight_qdata", "_weight_scale")
    tiles = {**plain, "a._weight_scale": torch.full((32, 16), 127).byte()}
    four = {"elem_dtype": {"_data": "float4_e2m1fn_x2"}}
    for tensors, data, read in (
        (plain, four, True),
        (plain, {**four, "is_swizzled_scales": True}, False),
        (tiles, {**four, "is_swizzled_scales": True}, True),
        (tiles, four, False),
        (plain, {"elem_dtype": "fp6_e3m2"}, False),
    ):
        said = {"a.weight": json.dumps({"_type": "MXTensor", "_data": data})}
        assert ("a" in identify(tensors, metadata=said).layers) is read


def test_a_written_file_has_the_config_that_vllm_reads(tmp_path):
    """And is recognised by it."""
    model = nn.ModuleDict({"a": nn.Linear(64, 16), "norm": nn.LayerNorm(16)})
    hijack.wrap_model(model, MXFP4())
    hijack.save(model, tmp_path / "a.safetensors", "compressed_tensors")
    stored = load_file(tmp_path / "a.safetensors")
    assert stored["a.weight_packed"].shape == (16, 32)
    assert stored["a.weight_scale"].dtype == torch.uint8
    found = hijack.identify(tmp_path / "a.safetensors").claims()["a"]
    assert found.certainty is Certainty.MARKED


def test_a_width_that_32_does_not_divide_stays_hijacks_own(tmp_path):
    """No other program pads."""
    model = nn.ModuleDict({"a": nn.Linear(40, 16)})
    hijack.wrap_model(model, MXFP4())
    with pytest.raises(CheckpointError, match="has no place for weight_columns"):
        hijack.save(model, tmp_path / "a.safetensors", "compressed_tensors")
    hijack.save(model, tmp_path / "a.safetensors")
    again = nn.ModuleDict({"a": nn.Linear(40, 16)})
    hijack.load(again, tmp_path / "a.safetensors")
    assert torch.equal(again["a"].weight.dense(), model["a"].weight.dense())


# -- damaged files ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("weight", torch.zeros(16, 32), "weight is torch.float32"),
        ("weight", torch.zeros(16, 24, dtype=torch.uint8), r"shape \(16, 24\)"),
        ("weight_scale", None, "weight_scale is missing"),
        ("weight_scale", torch.ones(16, 3).byte(), r"shape \(16, 3\)"),
        ("weight_scale", torch.ones(16, 2), "weight_scale is torch.float32"),
        ("weight_scale", torch.full((16, 2), 255).byte(), "weight_scale holds NaN"),
        ("weight_columns", torch.empty(64, 0).byte(), "weight_columns"),
    ],
)
def test_a_damaged_layer_is_refused_by_name(name, value, message):
    """The error says where, what and what was expected."""
    qdata, params = SCHEME.quantize(torch.ones(16, 64))
    tensors = {"weight": qdata, **params, name: value}
    if value is None:
        del tensors[name]
    with pytest.raises(HijackError, match=message) as caught:
        SCHEME.validate(tensors.pop("weight"), tensors, "blocks.0.q")
    assert str(caught.value).startswith("blocks.0.q: ")


def test_a_weight_that_is_no_matrix_is_refused():
    """Convolutions stay dense."""
    with pytest.raises(HijackError, match=r"shape \(4, 4, 3\)"):
        SCHEME.quantize(torch.zeros(4, 4, 3))
