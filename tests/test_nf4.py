"""NF4 and FP4 of bitsandbytes: the scheme, its dialect and what it refuses."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import hijack
from hijack.errors import CheckpointError, HijackError, SchemeError
from hijack.safetensors_io.reader import read_header
from hijack.testing import SchemeConformance
from schemes.nf4 import NF4

STATE = "proj.weight.quant_state.bitsandbytes__"
KINDS = [
    {},
    {"quant_type": "fp4", "blocksize": 32},
    {"double_quant": True},
    {"double_quant": True, "quant_type": "fp4", "dtype": torch.bfloat16},
]


class TestConformance(SchemeConformance):
    """The scheme against the whole kit."""

    min_sqnr_db = 15.0
    compile_backend = "eager"

    @pytest.fixture
    def scheme(self):
        """The scheme."""
        return NF4()


def weight_of(*shape, seed=0):
    """Normal numbers."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def written(folder, shape=(16, 24), **options):
    """Tensors of a file of bitsandbytes' with one layer."""
    dense, path = folder / "dense.safetensors", folder / "four.safetensors"
    save_file({"proj.weight": weight_of(*shape)}, dense)
    hijack.quantize_file(
        dense, path, scheme="nf4", dialect="bitsandbytes", overwrite=True, **options
    )
    return load_file(path)


def state_of(tensors):
    """The only state in a file."""
    key = next(key for key in tensors if key.startswith(STATE))
    return key, json.loads(bytes(tensors[key].tolist()))


def with_state(tensors, **changed):
    """The tensors with other entries of the state; None takes one away."""
    key, state = state_of(tensors)
    state = {k: v for k, v in {**state, **changed}.items() if v is not None}
    text = torch.tensor(list(json.dumps(state).encode()), dtype=torch.uint8)
    return {**tensors, key: text}


# -- numerics --------------------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS, ids=str)
@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 9), (33, 65), (8, 64)])
def test_the_error_is_at_most_half_of_a_step(options, shape):
    """Of every element, against the widest gap of the table and its run's scale."""
    scheme, weight = NF4(), weight_of(*shape)
    made = scheme.dequantize(*scheme.quantize(weight, **options), torch.float32)
    size = options.get("blocksize", 64)
    runs = nn.functional.pad(weight.flatten(), (0, -weight.numel() % size))
    largest = runs.view(-1, size).abs().amax(1, keepdim=True)
    error = (made - weight).flatten().abs()
    error = nn.functional.pad(error, (0, -weight.numel() % size)).view(-1, size)
    coarse = 0.03 if options.get("double_quant") else 0
    widest = 1 / 3 if options.get("quant_type") == "fp4" else 0.3039
    bound = largest * (widest / 2) + coarse * runs.abs().max() + 1e-6
    assert bool((error <= bound).all())


def test_the_first_code_of_a_byte_is_in_its_upper_half():
    """-1 is NF4's code 0 and 1 its code 15; the last of an odd number stands alone."""
    weight = torch.tensor([[-1.0, 1.0, 1.0]])
    qdata, params = NF4().quantize(weight)
    assert qdata.tolist() == [[0x0F], [0xF7]]
    assert params["absmax"].tolist() == [1.0]
    assert params["nf4_shape"].shape == (1, 3, 0)


def test_runs_go_on_in_the_next_row():
    """As bitsandbytes flattens the weight; a row of its own scale would give two."""
    weight = torch.tensor([[1.0] * 48, [4.0] * 48])
    _, params = NF4().quantize(weight)
    assert params["absmax"].tolist() == [4.0, 4.0]


def test_a_run_of_zeros_stays_zero():
    """Its scale is zero, by which nothing is divided."""
    scheme = NF4()
    for kind in KINDS:
        qdata, params = scheme.quantize(torch.zeros(3, 64), **kind)
        dense = scheme.dequantize(qdata, params, torch.float32)
        assert not dense.any()


def test_double_quantization_takes_the_mean_off():
    """Scales are eight bits each, with a scale for each 256 of them."""
    _, plain = NF4().quantize(weight_of(257, 64))
    _, params = NF4().quantize(weight_of(257, 64), double_quant=True)
    assert params["absmax"].dtype == torch.uint8
    assert params["nested_absmax"].shape == (2,)
    assert torch.equal(params["nested_offset"], plain["absmax"].mean())
    table, runs = params["nested_quant_map"], params["nested_absmax"]
    scales = table[params["absmax"].int()] * runs.repeat_interleave(256)[:257]
    error = scales + params["nested_offset"] - plain["absmax"]
    assert error.abs().max() < 0.012 * runs.max()


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_the_tensors_tell_the_options(options):
    """None has to be written beside them, also where no data are."""
    scheme = NF4()
    told = {"quant_type": "nf4", "blocksize": 64, "double_quant": False}
    told |= {"dtype": torch.float16, **options}
    for device in ("cpu", "meta"):
        weight = torch.zeros(40, 64, dtype=torch.float16, device=device)
        assert scheme.options_of(*scheme.quantize(weight, **options)) == told


@pytest.mark.parametrize(
    "option", [{"blocksize": 48}, {"quant_type": "int4"}, {"dtype": torch.float64}]
)
def test_an_option_out_of_range_is_refused(option):
    """By name, with what may be."""
    with pytest.raises(SchemeError, match=f"option {next(iter(option))}: got"):
        NF4().quantize(weight_of(4, 64), **option)


def test_a_weight_without_elements_is_declined():
    """There is no mean of no scales."""
    assert NF4().declines((0, 8)) == "it has no elements"
    assert NF4().declines((1, 8)) is None


# -- files -----------------------------------------------------------------------------


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_a_file_says_the_same_in_both_dialects(tmp_path, options):
    """From bitsandbytes' to hijack's and back, byte for byte."""
    first = written(tmp_path, (13, 7), **options)
    source, there, back = (tmp_path / f"{n}.safetensors" for n in ("four", "a", "b"))
    hijack.convert_file(source, there, dialect="hijack")
    hijack.convert_file(there, back, dialect="bitsandbytes")
    again = load_file(back)
    assert first.keys() == again.keys()
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert hijack.identify(there).layers["proj"].shape == (13, 7)


def test_the_state_is_bitsandbytes_own(tmp_path):
    """Its entries and their spelling; blanks are there so that the length is known."""
    key, state = state_of(written(tmp_path, double_quant=True))
    assert key == f"{STATE}nf4"
    assert state.pop("nested_offset") > 0
    assert state == {
        "quant_type": "nf4",
        "blocksize": 64,
        "dtype": "float32",
        "shape": [16, 24],
        "nested_blocksize": 256,
        "nested_dtype": "float32",
    }


def test_a_config_is_written_for_transformers(tmp_path):
    """It says what the first layer is, and which layers stay dense."""
    dense, path = tmp_path / "dense.safetensors", tmp_path / "out" / "four.safetensors"
    path.parent.mkdir()
    save_file({"proj.weight": weight_of(16, 24), "norm.weight": torch.ones(8)}, dense)
    options = {"scheme": "nf4", "dialect": "bitsandbytes", "double_quant": True}
    hijack.quantize_file(dense, path, write_config=True, **options)
    config = json.loads((path.parent / "config.json").read_text())
    said = config["quantization_config"]
    assert said["quant_method"] == "bitsandbytes"
    assert said["load_in_4bit"]
    assert said["bnb_4bit_quant_type"] == "nf4"
    assert said["bnb_4bit_use_double_quant"]
    assert said["llm_int8_skip_modules"] == ["norm"]
    claim = hijack.identify(path).layers["proj"]
    assert "config says bitsandbytes" in " ".join(claim.evidence)
    native = tmp_path / "native.safetensors"
    hijack.convert_file(path, native, dialect="hijack")
    assert "quantization_config" not in read_header(native).metadata


DAMAGE = {
    "no state": lambda t: {k: v for k, v in t.items() if not k.startswith(STATE)},
    "two states": lambda t: {**t, f"{STATE}fp4": t[f"{STATE}nf4"].clone()},
    "the other table's name": lambda t: {
        f"{STATE}fp4" if k.startswith(STATE) else k: v for k, v in t.items()
    },
    "no JSON": lambda t: {**t, f"{STATE}nf4": torch.zeros(9, dtype=torch.uint8)},
    "no shape": lambda t: with_state(t, shape=None),
    "a shape of text": lambda t: with_state(t, shape="16x24"),
    "a negative shape": lambda t: with_state(t, shape=[-16, -24]),
    "another shape": lambda t: with_state(t, shape=[16, 26]),
    "a size of nothing": lambda t: with_state(t, blocksize=0),
    "another size": lambda t: with_state(t, blocksize=128),
    "no dtype": lambda t: with_state(t, dtype="float8"),
    "an offset of text": lambda t: with_state(t, nested_offset="0.1"),
    "other nested runs": lambda t: with_state(t, nested_blocksize=64),
    "no nested scales": lambda t: {
        k: v for k, v in t.items() if not k.endswith("nested_absmax")
    },
    "no nested table": lambda t: {
        k: v for k, v in t.items() if not k.endswith("nested_quant_map")
    },
    "a short nested table": lambda t: {
        **t, "proj.weight.nested_quant_map": torch.zeros(16)
    },
    "too many nested scales": lambda t: {
        **t, "proj.weight.nested_absmax": torch.ones(2)
    },
    "no table": lambda t: {
        k: v for k, v in t.items() if not k.endswith(".quant_map")
    },
    "an offset that is no number": lambda t: with_state(t, nested_offset=math.nan),
    "a scale that is no number": lambda t: {
        **t, "proj.weight.nested_absmax": torch.tensor([math.inf])
    },
    "scales of another dtype": lambda t: {
        **t, "proj.weight.absmax": t["proj.weight.absmax"].to(torch.int8)
    },
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_layer_is_refused_by_name(tmp_path, damage):
    """Whether its state is wrong or a tensor; nothing is decoded to garbage."""
    tensors = DAMAGE[damage](written(tmp_path, double_quant=True))
    save_file(tensors, tmp_path / "bad.safetensors")
    model = nn.ModuleDict({"proj": nn.Linear(24, 16, bias=False)})
    with pytest.raises(HijackError, match="proj"):
        hijack.load(model, tmp_path / "bad.safetensors")


def test_a_weight_without_its_state_is_named(tmp_path):
    """Its shape is nowhere else, so that it cannot be read."""
    tensors = DAMAGE["no state"](written(tmp_path))
    found = hijack.identify(hijack.Header.from_state_dict(tensors))
    assert found.unsupported["proj"].format == "bitsandbytes 4-bit"
    with pytest.raises(CheckpointError, match="proj: is in the format bitsandbytes"):
        found.check()


def test_a_native_weight_without_its_shape_is_refused():
    """The empty tensor is the only one that tells it."""
    qdata, params = NF4().quantize(weight_of(4, 8))
    del params["nf4_shape"]
    with pytest.raises(CheckpointError, match="proj: has 0 of nf4_shape and fp4_shape"):
        NF4().validate(qdata, params, "proj")


def test_a_model_loads_and_computes(tmp_path):
    """A Linear's output is that of the decoded weight, bit for bit."""
    written(tmp_path, double_quant=True)
    model = nn.ModuleDict({"proj": nn.Linear(24, 16, bias=False)})
    hijack.load(model, tmp_path / "four.safetensors")
    input = weight_of(3, 24, seed=1)
    expected = input @ model["proj"].weight.dense().T
    assert torch.allclose(model["proj"](input), expected, atol=1e-5)
    assert model["proj"].weight.options["double_quant"] is True
