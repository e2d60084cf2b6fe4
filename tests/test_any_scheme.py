"""quantize writes any scheme: its options, its defaults, LoRAs merged first."""

import pytest
import torch
from safetensors.torch import load_file, save_file

import hijack
from hijack import cli
from hijack.errors import SchemeError, UnknownSchemeError
from hijack.formats import matching
from hijack.options import Option
from hijack.safetensors_io.reader import open_tensors, read_header
from hijack.testing import registered
from schemes.blockwise_fp8 import BlockwiseFP8
from tests.correct_schemes import LowRankInt8, PackedInt4, RotatedInt8


class Searched(PackedInt4):
    """A scheme with a search for scales, and options of types that have words."""

    name = "searched"
    is_default = False
    options = (
        Option("scale_search", "int", 0, "factors to try", minimum=0, maximum=9),
        Option("dtype", "dtype", torch.uint8, choices=(torch.uint8, torch.bfloat16)),
    )

    def quantize(self, weight, *, scale_search=0, dtype=torch.uint8):
        """As many factors as were asked for beside the codes."""
        qdata, params = super().quantize(weight)
        return qdata, {**params, "tried": qdata.new_zeros(scale_search + 1).to(dtype)}

    def options_of(self, qdata, params):
        """As the extra tensor tells."""
        tried = params["tried"]
        return {"scale_search": len(tried) - 1, "dtype": tried.dtype}


SCHEMES = (PackedInt4(), RotatedInt8(), LowRankInt8(), Searched(), BlockwiseFP8())
LAYER = "transformer_blocks.0.attn.to_q"


@pytest.fixture(params=SCHEMES, ids=lambda scheme: scheme.name)
def scheme(request):
    """Each of the schemes, registered."""
    if request.param.name in hijack.schemes():
        yield hijack.schemes()[request.param.name]
        return
    with registered(request.param) as scheme:
        yield scheme


@pytest.fixture
def dense(tmp_path):
    """A few layers of a model that is known, and a LoRA for one."""
    torch.manual_seed(0)
    path = tmp_path / "dense.safetensors"
    tensors = {
        f"{LAYER}.weight": torch.randn(64, 128).bfloat16(),
        "transformer_blocks.0.img_mod.1.weight": torch.randn(64, 128).bfloat16(),
        "img_in.weight": torch.randn(64, 16).bfloat16(),
        "txt_norm.weight": torch.randn(64).bfloat16(),
    }
    save_file(tensors, path)
    lora = {
        f"{LAYER}.lora_A.weight": torch.randn(4, 128),
        f"{LAYER}.lora_B.weight": torch.randn(64, 4),
    }
    save_file(lora, tmp_path / "lora.safetensors")
    return path


def read(path, scheme):
    """The dense weight of a layer of a file."""
    header = read_header(path)
    claim = hijack.identify(header).claims()[LAYER]
    return matching.read_weight(scheme, claim, open_tensors(header)).dense()


def test_the_command_quantizes_with_loras_merged(scheme, dense, tmp_path):
    """The file decodes to what the scheme makes of the merged weight."""
    path, lora = tmp_path / "q.safetensors", tmp_path / "lora.safetensors"
    words = ["quantize", dense, path, "--scheme", scheme.name, "--include", LAYER]
    words += ["--lora", f"{lora}:0.5", "--dialect", "hijack"]
    assert cli.main([str(word) for word in words]) == 0
    factors, weight = load_file(lora), load_file(dense)[f"{LAYER}.weight"]
    up, down = factors[f"{LAYER}.lora_B.weight"], factors[f"{LAYER}.lora_A.weight"]
    merged = weight.float() + 0.5 * (up @ down)
    options = scheme.options_like(torch.bfloat16)
    if options is None:
        merged, options = merged.bfloat16(), {}
    codes, params = scheme.quantize(merged, **options)
    tensors = load_file(path)
    assert torch.equal(tensors[f"{LAYER}.weight"], codes)
    assert {name: tensors[f"{LAYER}.{name}"].dtype for name in params} == {
        name: tensor.dtype for name, tensor in params.items()
    }
    expected = scheme.dequantize(codes, params, torch.float32)
    assert torch.equal(read(path, scheme), expected)


def test_layers_are_chosen_by_the_model(scheme, dense, tmp_path):
    """What a family leaves dense stays so, whatever the scheme."""
    report = hijack.quantize_file(dense, tmp_path / "q.safetensors", scheme)
    assert LAYER in report.layers
    assert "transformer_blocks.0.img_mod.1" in report.skipped


def test_an_option_of_the_scheme_has_its_argument(dense, tmp_path, capsys):
    """--scale-search and --dtype are any scheme's that declares them."""
    path = tmp_path / "q.safetensors"
    with registered(Searched()):
        words = ["quantize", dense, path, "--scheme", "searched", "--include", LAYER]
        words += ["--scale-search", "3", "--dtype", "bf16"]
        assert cli.main([str(word) for word in words]) == 0
        tried = load_file(path)[f"{LAYER}.tried"]
        assert (len(tried), tried.dtype) == (4, torch.bfloat16)
        with pytest.raises(SystemExit):
            cli.main([*(str(w) for w in words[:-3]), "10", "--force"])
        assert "expected a whole number from 0 to 9" in capsys.readouterr().err


def test_a_rule_for_blocks_that_a_scheme_does_not_have_is_refused(dense, tmp_path):
    """The layer and the option are named; nothing is written."""
    path = tmp_path / "q.safetensors"
    with pytest.raises(SchemeError, match=r"to_q: rotated_int8: has no option 'block_"):
        hijack.quantize_file(dense, path, RotatedInt8(), rules=f"{LAYER}=1x32")
    assert not path.exists()


# -- the default scheme ----------------------------------------------------------------


def test_the_default_is_the_scheme_that_says_so(dense, tmp_path):
    """A registry without one refuses, unless there is no choice."""
    registry = hijack.create_registry()
    with pytest.raises(UnknownSchemeError, match="none is the default; registered are"):
        registry.default_scheme()
    for scheme in SCHEMES[:2]:
        registry.register(scheme)
        if scheme is SCHEMES[0]:
            assert registry.default_scheme() is scheme
    with pytest.raises(UnknownSchemeError, match="packed_int4, rotated_int8; name one"):
        hijack.quantize_file(dense, tmp_path / "q", registry=registry)
    registry.register(SCHEMES[-1])
    assert registry.default_scheme() is SCHEMES[-1]
    path = tmp_path / "q.safetensors"
    assert hijack.quantize_file(dense, path, registry=registry).dialect == "musubi"


def test_options_are_described_in_a_line():
    """Name, default, meaning and values, with the words that are parsed."""
    rank = Option("rank", "int", 4, "of the part in 16 bits", minimum=1)
    assert rank.described() == (
        "rank=4: of the part in 16 bits; a whole number of at least 1"
    )
    dtypes = (torch.float8_e4m3fn, torch.float32)
    dtype = Option("dtype", "dtype", dtypes[0], choices=dtypes)
    assert dtype.described() == "dtype=e4m3; one of float8_e4m3fn, float32"
    assert [dtype.parse(dtype.word(value)) for value in dtypes] == list(dtypes)
    assert Option("size", "block_size").described().startswith("size; a block size")
