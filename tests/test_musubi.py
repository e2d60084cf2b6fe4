"""musubi-tuner's files: bit for bit what it writes, and every shape it uses."""

import os
import sys
import types
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import hijack
from hijack.errors import CheckpointError
from hijack.formats import matching
from hijack.safetensors_io.header import Header
from schemes.blockwise_fp8 import BlockwiseFP8

SCHEME = BlockwiseFP8()
MUSUBI = matching.dialect_of(SCHEME, "musubi")
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
VARIABLE = "HIJACK_TEST_MUSUBI"


@pytest.fixture(scope="module")
def peer():
    """musubi-tuner's own quantizer, from a checkout; its helpers are not needed."""
    root = Path(os.environ.get(VARIABLE, "~/peers/musubi-tuner")).expanduser()
    path = root / "src/musubi_tuner/modules/fp8_optimization_utils.py"
    if not path.is_file():
        pytest.skip(f"needs a checkout of musubi-tuner; set {VARIABLE}")
    utils = "musubi_tuner.utils"
    names = [
        "musubi_tuner",
        utils,
        f"{utils}.safetensors_utils",
        f"{utils}.device_utils",
    ]
    stubs = {name: mock.MagicMock(spec=types.ModuleType) for name in names}
    for name in ("MemoryEfficientSafeOpen", "TensorWeightAdapter"):
        setattr(stubs[f"{utils}.safetensors_utils"], name, object)
    stubs[f"{utils}.safetensors_utils"].WeightTransformHooks = object
    stubs[f"{utils}.device_utils"].clean_memory_on_device = lambda device: None
    spec = spec_from_file_location("peer_musubi", path)
    module = module_from_spec(spec)
    tqdm = types.SimpleNamespace(tqdm=lambda keys, **_: keys)
    with mock.patch.dict(sys.modules, {**stubs, "tqdm": tqdm}):
        spec.loader.exec_module(module)
    return module


def model(dtype: torch.dtype) -> dict[str, Tensor]:
    """Layers of every kind musubi-tuner treats differently, with hard values."""
    torch.manual_seed(0)
    weights = {
        "blocks.0.attn.weight": torch.randn(96, 192),
        "blocks.0.odd.weight": torch.randn(96, 100),
        "blocks.0.narrow.weight": torch.randn(16, 64),
        "blocks.0.small.weight": torch.randn(16, 32),
        "blocks.0.one.weight": torch.randn(1, 100),
        "blocks.0.one64.weight": torch.randn(1, 64),
        "blocks.0.conv.weight": torch.randn(8, 4, 3, 3),
        "blocks.0.attn.bias": torch.randn(96),
        "norm.weight": torch.randn(64),
    }
    big = weights["blocks.0.attn.weight"]
    big *= torch.logspace(-9, 2, 96).view(-1, 1)  # below the floor of the scale, too
    big[3], big[5, :64], big[7, 0] = 0.0, -0.0, 4e4
    return {key: weight.to(dtype) for key, weight in weights.items()}


def bits(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8) if tensor.ndim else tensor


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("exponent", "code"), [(4, E4M3), (5, E5M2)])
def test_a_file_is_bit_for_bit_musubis(peer, tmp_path, dtype, exponent, code):
    """Same keys, shapes, dtypes and bits as its own function, for all layers."""
    source = tmp_path / "model.safetensors"
    save_file(model(dtype), source)
    wanted = peer.optimize_state_dict_with_fp8(
        model(dtype), None, ["blocks."], None, exponent, 7 - exponent
    )
    hijack.quantize_file(
        source,
        tmp_path / "out.safetensors",
        block_size=(1, 64),
        include=["blocks.*"],
        dialect="musubi",
        dtype=code,
    )
    got = load_file(tmp_path / "out.safetensors")
    assert got.keys() == wanted.keys()
    for key, tensor in wanted.items():
        assert got[key].shape == tensor.shape, key
        assert got[key].dtype == tensor.dtype, key
        assert torch.equal(bits(got[key]), bits(tensor)), key


@pytest.mark.parametrize("bias", [True, False])
def test_the_forward_computes_what_musubis_does(peer, bias):
    """The same codes and bfloat16 scales give the same weight, so the same result."""
    layer = torch.nn.Linear(192, 96, bias=bias, dtype=torch.bfloat16)
    hijack.wrap_module(layer, SCHEME)
    x = torch.randn(5, 192, dtype=torch.bfloat16)
    theirs = types.SimpleNamespace(
        weight=layer.weight.qdata,
        scale_weight=layer.weight_scale[:, :, None],
        bias=layer.bias,
    )
    with torch.no_grad():
        wanted = peer.fp8_linear_forward_patch(theirs, x)
        torch.testing.assert_close(layer(x), wanted)


# -- reading ---------------------------------------------------------------------------


def tensors(scale: Tensor, weight: Tensor | None = None) -> dict[str, Tensor]:
    q = torch.randn(6, 128).to(E4M3) if weight is None else weight
    return {"a.b.weight": q, "a.b.scale_weight": scale}


def claim_of(given: dict[str, Tensor], layer: str = "a.b") -> hijack.Claim | None:
    return matching.recognise(SCHEME, Header.from_state_dict(given), layer)


@pytest.mark.parametrize(
    ("shape", "block", "certainty"),
    [
        ((6, 2, 1), (1, 64), hijack.Certainty.UNIQUE),
        ((6, 1, 1), (1, 128), hijack.Certainty.UNIQUE),
        ((6, 1), (1, 128), hijack.Certainty.UNIQUE),
        ((), (6, 128), hijack.Certainty.FITS),
        ((1,), (6, 128), hijack.Certainty.FITS),
        ((1, 1), (6, 128), hijack.Certainty.FITS),
    ],
)
def test_its_shapes_are_recognised(shape, block, certainty):
    """Blocks, rows and scalars; decoding views the file's tensors."""
    given = tensors(torch.rand(shape).bfloat16())
    claim = claim_of(given)
    assert (claim.dialect, claim.block_size) == ("musubi", block)
    assert claim.certainty == certainty
    assert f"{list(shape)}" in claim.evidence[0]
    q, params = matching.decode(SCHEME, claim, given)
    assert q is given["a.b.weight"]
    assert params["weight_scale"].data_ptr() == given["a.b.scale_weight"].data_ptr()
    dense = SCHEME.dequantize(q, params, torch.float32)
    scale = given["a.b.scale_weight"].float()
    wide = (
        scale.squeeze(-1).repeat_interleave(block[1], 1) if len(shape) == 3 else scale
    )
    assert torch.equal(dense, q.float() * wide)


@pytest.mark.parametrize(
    "scale",
    [
        torch.rand(6, 3, 1),  # does not divide 128
        torch.rand(5, 2, 1),
        torch.rand(6, 2, 2),
        torch.rand(3, 2),
        torch.rand(6, 1).byte(),
    ],
)
def test_other_shapes_are_not_claimed(scale):
    """A grid that is none of musubi-tuner's is left to an error about its scale."""
    assert claim_of(tensors(scale)) is None


def test_weights_that_are_not_fp8_are_not_claimed():
    """A scale beside a dense weight is somebody else's."""
    assert claim_of(tensors(torch.rand(6, 2, 1), torch.randn(6, 128))) is None


@pytest.mark.parametrize("marker", ["scaled_fp8", "a.scaled_fp8", "a.b.comfy_quant"])
def test_comfyuis_own_scalars_are_left_to_it(marker):
    """With ComfyUI's marker, only blocks are musubi's, which ComfyUI cannot read."""
    extra = {marker: torch.zeros(0, dtype=E4M3 if "scaled" in marker else torch.uint8)}
    for scale in (torch.rand(()), torch.rand(6, 1)):
        claim = claim_of({**tensors(scale), **extra})
        assert claim is None or claim.dialect == "scaled_fp8"
    claim = claim_of({**tensors(torch.rand(6, 2, 1)), **extra})
    assert claim is not None
    elsewhere = {"z.scaled_fp8": torch.zeros(0)}
    assert claim_of({**tensors(torch.rand(())), **elsewhere}).dialect == "musubi"


def test_the_key_that_is_replaced_twice():
    """musubi-tuner replaces every ".weight", so this scale lies in another layer."""
    q = torch.randn(6, 128).to(E4M3)
    given = {
        "blocks.0.weight_mod.weight": q,
        "blocks.0.scale_weight_mod.scale_weight": torch.rand(6, 2, 1),
    }
    claim = claim_of(given, "blocks.0.weight_mod")
    assert claim.keys["scale_weight"] == "blocks.0.scale_weight_mod.scale_weight"
    assert matching.decode(SCHEME, claim, given)[1]["weight_scale"].shape == (6, 2)


# -- writing ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(6, 2, 1), (6, 1), ()])
def test_what_was_read_is_written_again(shape):
    """Reading and writing are each other's inverse."""
    given = tensors(torch.rand(shape))
    claim = claim_of(given)
    q, params = matching.decode(SCHEME, claim, given)
    again = MUSUBI.encode(q, params, {"block_size": claim.block_size})
    assert again["scale_weight"].shape == shape
    assert torch.equal(again["scale_weight"], given["a.b.scale_weight"])
    assert again["weight"] is q


@pytest.mark.parametrize(
    ("shape", "size"), [((6, 100), 64), ((6, 128), (2, 64)), ((130, 300), (128, 128))]
)
def test_what_it_cannot_spell_is_refused(shape, size):
    """The message says which dialect can."""
    made = SCHEME.quantize(torch.randn(shape), block_size=size)
    with pytest.raises(
        CheckpointError, match=r"cannot write blocks of .* dialect 'hij"
    ):
        MUSUBI.encode(*made, {"block_size": size})


def test_its_fallbacks_are_chosen_before_quantizing():
    """Rows where 1 x C does not divide, the whole weight where it is not 2-D."""
    options = {"block_size": (1, 64), "dtype": E5M2}
    for shape, size in (
        ((6, 128), (1, 64)),
        ((6, 100), "row"),
        ((8, 4, 3, 3), "tensor"),
        ((8,), "tensor"),
    ):
        assert MUSUBI.fit_options(shape, options) == {**options, "block_size": size}
    assert MUSUBI.fit_options((6, 100), {}) == {"block_size": "row"}
    assert MUSUBI.fit_options((6, 100), {"block_size": 50}) == {"block_size": 50}
