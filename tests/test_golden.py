"""Golden files: identified as what they are, decoded to what their writers decode.

``tests/golden/README.md`` says what wrote them and what ``expected.json`` holds.
"""

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import hijack
import schemes.blockwise_fp8
import schemes.convrot_w4a4
import schemes.int8
import schemes.mxfp4
import schemes.nf4
import schemes.nvfp4
import schemes.w4a8  # noqa: F401 - registers the schemes
from hijack.errors import AmbiguousError, CheckpointError, UnconsumedScaleError
from hijack.formats.unsupported import FORMATS

GOLDEN = Path(__file__).parent / "golden"
#: Most bytes of everything in a folder.
MOST = 20_000


def expected_of(name):
    """What is expected of a folder."""
    return json.loads((GOLDEN / name / "expected.json").read_text("utf-8"))


def source_of(name):
    """The checkpoint of a folder."""
    return GOLDEN / name / expected_of(name).get("source", "model.safetensors")


NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/expected.json"))
READ = [name for name in NAMES if expected_of(name).get("layers")]
AMBIGUOUS = [name for name in NAMES if "assume" in expected_of(name)]
FOREIGN = [name for name in NAMES if expected_of(name).get("foreign")]
#: Told by headers made by hand, in test_dialects.py: their files are no small ones.
BY_HAND = {
    "bitsandbytes 4-bit",
    "int8 of another kind",
    "integers without a marker",
    "nvfp4 of another kind",
    "packed integers of another kind",
    "stacked FP8 experts",
    "torchao of another kind",
    "w4a8 of another kind",
}


def readings_of(name):
    """What is expected of an ambiguous folder under each assumption."""
    return expected_of(name)["assume"].values()


def described(claims):
    """Claims as ``expected.json`` has them."""
    return {
        layer: {
            "scheme": claim.scheme,
            "dialect": claim.dialect,
            "block_size": claim.block_size and list(claim.block_size),
        }
        for layer, claim in claims.items()
    }


def tensors_of(name):
    """All tensors of a folder and the metadata of its files."""
    tensors, metadata = {}, {}
    for path in sorted((GOLDEN / name).glob("model*.safetensors")):
        with safe_open(path, "pt") as file:
            metadata.update(file.metadata() or {})
            tensors.update((key, file.get_tensor(key)) for key in file.keys())  # noqa: SIM118
    return tensors, metadata


def module_for(shape, bias, dtype):
    """A module whose weight has a shape, without memory."""
    n, k = shape[0], shape[1]
    kinds = {
        2: lambda **o: nn.Linear(k, n, **o),
        3: lambda **o: nn.Conv1d(k, n, shape[2:], **o),
        4: lambda **o: nn.Conv2d(k, n, shape[2:], **o),
    }
    return kinds[len(shape)](bias=bias, device="meta", dtype=dtype)


def model_for(tensors, shapes, dtypes):
    """A model that has exactly the layers and the dense tensors of a checkpoint.

    Args:
        tensors: of the checkpoint.
        shapes: quantized layer to shape of its dense weight.
        dtypes: quantized layer to dtype of its dense weight.
    """
    model = nn.Module()

    def place(path, module):
        parent, _, last = path.rpartition(".")
        grow(parent).add_module(last, module)

    def grow(path):
        if not path:
            return model
        found = dict(model.named_modules()).get(path)
        if found is None:
            found = nn.Module()
            place(path, found)
        return found

    for layer, shape in shapes.items():
        bias = f"{layer}.bias" in tensors
        place(layer, module_for(shape, bias, dtypes.get(layer)))
    for key, tensor in tensors.items():
        path, _, last = key.rpartition(".")
        if last in ("weight", "bias") and path not in shapes:
            grow(path).register_parameter(
                last, nn.Parameter(torch.empty_like(tensor, device="meta"), False)
            )
    return model


def load_dense(name, shapes, dtypes, **options):
    """Load a folder strictly and give the dense weights of its quantized layers."""
    tensors, _ = tensors_of(name)
    source = source_of(name)
    foreign = expected_of(name).get("foreign", {})
    if foreign:  # read what is left without them
        tensors = {
            k: t for k, t in tensors.items() if k.rpartition(".")[0] not in foreign
        }
        source = tensors
    model = model_for(tensors, shapes, dtypes)
    report = hijack.load(model, source, **options)
    assert not report.missing
    assert not report.unexpected
    hijack.unwrap(model)
    return {layer: model.get_submodule(layer).weight.detach() for layer in shapes}


def shapes_of(name, layers):
    """Shape of the dense weight of each layer, padding left out."""
    tensors, _ = tensors_of(name)
    own = expected_of(name).get("shapes", {})
    suffixes = ("weight", "_weight_qdata", "weight._data")
    return {
        layer: own.get(layer)
        or next(
            tuple(tensors[key].shape)
            for suffix in suffixes
            if (key := f"{layer}.{suffix}") in tensors
        )
        for layer in layers
    }


def digest(tensor):
    """SHA-256 of the float32 elements, as the generators take it."""
    raw = tensor.float().contiguous().view(torch.uint8).flatten()
    return hashlib.sha256(bytes(raw.tolist())).hexdigest()


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_file_is_identified(name):
    """Scheme, dialect, block size and everything that is odd about it are found."""
    expected = expected_of(name)
    found = hijack.identify(source_of(name))
    assert described(found.layers) == expected.get("layers", {})
    formats = {layer: one.format for layer, one in found.unsupported.items()}
    assert formats == expected.get("foreign", {})
    assert sorted(found.ambiguous) == sorted(expected.get("ambiguous", []))
    assert sorted(found.unscaled) == sorted(expected.get("unscaled", []))
    assert sorted(found.unconsumed) == sorted(expected.get("orphans", []))
    wrong = [layer for layer, claim in found.layers.items() if claim.contradiction]
    assert sorted(wrong) == sorted(expected.get("contradicted", []))
    assert expected.get("container", "") in found.container
    assert bool(found.container) == ("container" in expected)
    assert not found.mismatches
    assert not found.unknown


@pytest.mark.parametrize("name", READ)
def test_a_golden_file_decodes_to_what_its_writer_makes_of_it(name):
    """Every element is the same, in the dtype the original program computes in."""
    expected = expected_of(name)
    layers = expected["layers"]
    path = GOLDEN / name / "dense.safetensors"
    dense = load_file(path) if path.exists() else {}
    dtypes = {layer: tensor.dtype for layer, tensor in dense.items()}
    made = load_dense(name, shapes_of(name, layers), dtypes)
    for layer, tensor in dense.items():
        assert made[layer].dtype == tensor.dtype
        assert torch.equal(made[layer], tensor), layer
    for layer, hashed in expected.get("sha256", {}).items():
        assert digest(made[layer]) == hashed, layer
    assert set(dense) | set(expected.get("sha256", {})) == set(layers)


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_an_ambiguous_golden_file_is_refused_with_the_choice(name):
    """The error spells the words that may be assumed, and names the layer."""
    expected = expected_of(name)
    shapes = shapes_of(name, expected["ambiguous"])
    with pytest.raises(AmbiguousError, match=expected["ambiguous"][0]) as caught:
        load_dense(name, shapes, {})
    for word in expected["assume"]:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    ("name", "word"), [(n, w) for n in AMBIGUOUS for w in expected_of(n)["assume"]]
)
def test_an_assumption_decides_an_ambiguous_golden_file(name, word):
    """Each assumption gives the claim and the numbers of its own reading."""
    reading = expected_of(name)["assume"][word]
    found = hijack.identify(source_of(name), assume=[word])
    assert described(found.layers) == reading["layers"]
    shapes = shapes_of(name, reading["layers"])
    made = load_dense(name, shapes, {}, assume=[word])
    assert {layer: digest(made[layer]) for layer in made} == reading["sha256"]


@pytest.mark.parametrize("name", FOREIGN)
def test_a_format_without_a_scheme_is_refused_by_name(name):
    """Loading says which layer is in which format, whatever the model."""
    found = expected_of(name)["foreign"].items()
    one_of = "|".join(f"{layer}: is in the format {kind}" for layer, kind in found)
    with pytest.raises(CheckpointError, match=one_of):
        hijack.load(nn.Module(), source_of(name))


def test_a_lone_scale_is_refused():
    """A scale whose weight is missing is not passed over."""
    with pytest.raises(
        UnconsumedScaleError, match=r"no scheme reads lost\.scale_weight"
    ):
        hijack.load(nn.Module(), source_of("bare"))


def test_a_gguf_file_is_refused():
    """Loading says what the file is."""
    with pytest.raises(CheckpointError, match="a GGUF file, version 3, with 5 tensors"):
        hijack.identify(source_of("gguf")).claims()


@pytest.mark.parametrize("name", NAMES)
def test_a_golden_folder_is_small(name):
    """Everything in it together is under 20 kB, and it says who wrote it."""
    assert sum(path.stat().st_size for path in (GOLDEN / name).iterdir()) < MOST
    assert expected_of(name)["written_by"]
    assert expected_of(name)["about"]


def test_every_dialect_has_a_golden_file():
    """And so has every format that is only named."""
    readings = [expected_of(name) for name in NAMES]
    readings += [one for name in AMBIGUOUS for one in readings_of(name)]
    layers = [entry for one in readings for entry in one.get("layers", {}).values()]
    seen = {(entry["scheme"], entry["dialect"]) for entry in layers}
    schemes = hijack.schemes().values()
    every = {(scheme.name, d.name) for scheme in schemes for d in scheme.dialects}
    native = hijack.Dialect.name
    assert {pair for pair in seen if pair[1] != native} == every
    named = {kind for n in FOREIGN for kind in expected_of(n)["foreign"].values()}
    assert named | BY_HAND == {one.name for one in FORMATS}
