"""Requantizing from one scheme to another, and files with layers of several."""

import json
import pkgutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import hijack
import schemes
from hijack import cli
from hijack.errors import CheckpointError, SchemeError, UnknownSchemeError
from hijack.metrics import quantization_error
from hijack.options import Option
from hijack.testing import registered
from tests.correct_schemes import LowRankInt8, PackedInt4, RotatedInt8

SHIPPED = sorted(m.name for m in pkgutil.iter_modules(schemes.__path__))
SHIPPED = [name for name in SHIPPED if not name.startswith("_")]
SIZES = {"a": (64, 96), "b": (32, 64), "c": (48, 128)}
#: Layer to the scheme it is in, in the file that most tests begin with.
MIXED = {"a": "blockwise_fp8", "b": "packed_int4", "c": "rotated_int8"}


class Rows(hijack.Scheme):
    """Int8 rows; it takes no short ones, and has an option of how layers compute."""

    name = "rows"
    options = (
        Option("least", "int", 1, "columns that a weight must have", minimum=1),
        Option("full_precision_matrix_mult", "bool", False, "how", forward=True),
    )

    def declines(self, shape, **options):
        """Short rows."""
        least = options.get("least", 1)
        return f"it has less than {least} columns" if shape[1] < least else None

    def quantize(self, weight, *, least=1, full_precision_matrix_mult=False):
        """One scale for each row."""
        scale = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        codes = (weight / scale).round().clamp(-127, 127)
        return codes.to(torch.int8), {"weight_scale": scale}

    def dequantize(self, qdata, params, dtype):
        """Multiply."""
        return (qdata.float() * params["weight_scale"]).to(dtype)


@pytest.fixture(autouse=True)
def toys():
    """Four toy schemes beside those that come with hijack."""
    schemes.register_all()
    with (
        registered(PackedInt4()),
        registered(RotatedInt8()),
        registered(LowRankInt8()),
        registered(Rows()),
    ):
        yield


def model():
    """A model that the files of these tests are of."""
    torch.manual_seed(0)
    layers = {name: nn.Linear(k, n) for name, (n, k) in SIZES.items()}
    return nn.ModuleDict({**layers, "norm": nn.LayerNorm(8)})


@pytest.fixture
def mixed(tmp_path):
    """A file with a layer of each of three schemes."""
    path = tmp_path / "mixed.safetensors"
    quantized = model()
    for name, scheme in MIXED.items():
        hijack.wrap_module(quantized[name], scheme)
    hijack.save(quantized, path)
    return path


def weights(path):
    """Layer to its dense weight in float32, as a model that loads the file has it."""
    loaded = model()
    hijack.load(loaded, path)
    return {name: loaded[name].weight.detach().float() for name in SIZES}


def schemes_in(path):
    """Layer to the scheme that reads it."""
    claims = hijack.identify(path).claims()
    return {name: claim.scheme for name, claim in claims.items()}


def metadata(path):
    """The header's metadata."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


# -- several schemes in one file -------------------------------------------------------


def test_a_model_of_three_schemes_is_saved_and_loaded(mixed):
    """Each layer is read by the scheme that wrote it, and decodes to the same bits."""
    quantized = model()
    for name, scheme in MIXED.items():
        hijack.wrap_module(quantized[name], scheme)
    assert schemes_in(mixed) == MIXED
    assert hijack.identify(mixed).clear
    for name, weight in weights(mixed).items():
        assert torch.equal(weight, quantized[name].weight.dense())


def test_a_file_of_three_schemes_is_converted(mixed, tmp_path):
    """To the dialect that all have, layers and metadata of all are kept."""
    path = tmp_path / "converted.safetensors"
    report = hijack.convert_file(mixed, path, "hijack")
    assert report.schemes == schemes_in(path) == MIXED
    assert not report.requantized
    before, after = weights(mixed), weights(path)
    assert all(torch.equal(before[name], after[name]) for name in SIZES)
    assert set(json.loads(metadata(path)["hijack"])["layers"]) == set(SIZES)


def test_layers_of_schemes_without_the_dialect_stay_as_they_are(mixed, tmp_path):
    """They are named with the reason; if no scheme has it, that is an error."""
    path = tmp_path / "musubi.safetensors"
    report = hijack.convert_file(mixed, path, "musubi")
    claims = hijack.identify(path).claims()
    dialects = {name: claim.dialect for name, claim in claims.items()}
    assert dialects == {"a": "musubi", "b": "hijack", "c": "hijack"}
    assert schemes_in(path) == MIXED
    assert report.kept["b"].startswith("packed_int4: unknown dialect 'musubi'")
    assert set(report.kept) == {"b", "c"}
    before, after = weights(mixed), weights(path)
    assert all(torch.equal(before[name], after[name]) for name in SIZES)
    with pytest.raises(CheckpointError, match=r": unknown dialect 'musbi'"):
        hijack.convert_file(mixed, path, "musbi", overwrite=True)


def test_what_two_dialects_cannot_both_say_of_a_file_is_refused(tmp_path, monkeypatch):
    """Two configs of a whole file; neither is dropped in silence."""
    from hijack.formats.dialect import Dialect, FormatMetadata

    class Configured(Dialect):
        name = "configured"

        def __init__(self, word):
            self.word = word

        def finish(self, layers, others):
            config = {"quant_method": self.word}
            text = json.dumps(config)
            return FormatMetadata({"quantization_config": text}, config=config)

    quantized = model()
    for name, scheme in MIXED.items():
        hijack.wrap_module(quantized[name], scheme)
    kinds = hijack.schemes()
    monkeypatch.setattr(type(kinds["packed_int4"]), "dialects", (Configured("one"),))
    monkeypatch.setattr(type(kinds["rotated_int8"]), "dialects", (Configured("two"),))
    path = tmp_path / "no.safetensors"
    with pytest.raises(CheckpointError, match=r"configured: says in quantization_conf"):
        hijack.save(quantized, path)
    assert not path.exists()


# -- from one scheme to another --------------------------------------------------------


def test_all_layers_become_those_of_one_scheme(mixed, tmp_path):
    """The loss is reported for each; layers of that scheme are copied bit for bit."""
    path = tmp_path / "rows.safetensors"
    report = hijack.convert_file(mixed, path, requantize="rotated_int8")
    assert report.schemes == schemes_in(path) == dict.fromkeys(SIZES, "rotated_int8")
    assert set(report.requantized) == {"a", "b"}
    before, after = weights(mixed), weights(path)
    for name, error in report.requantized.items():
        assert error == quantization_error(before[name], after[name])
        assert 30 < error.sqnr < 60
    assert torch.equal(before["c"], after["c"])
    assert "1 layers converted without loss, 2 requantized, the worst " in str(report)
    old, new = load_file(mixed), load_file(path)
    assert torch.equal(new["c.weight"], old["c.weight"])
    assert new.keys() == {
        *(f"{name}.{end}" for name in SIZES for end in ("weight", "weight_scale")),
        *(f"{name}.bias" for name in SIZES),
        *("norm.weight", "norm.bias"),
    }


def test_a_requantized_layer_is_the_one_its_dense_weight_gives(mixed, tmp_path):
    """As if the decoded weight had been quantized with the options."""
    path = tmp_path / "packed.safetensors"
    hijack.convert_file(mixed, path, requantize="packed_int4", group=16)
    scheme, old, new = PackedInt4(), weights(mixed), load_file(path)
    for name in ("a", "c"):
        codes, params = scheme.quantize(old[name], group=16)
        assert torch.equal(new[f"{name}.weight"], codes)
        assert torch.equal(new[f"{name}.scale"], params["scale"])
        assert torch.equal(new[f"{name}.zero"], params["zero"])


@pytest.mark.parametrize(
    ("options", "again"), [({}, False), ({"group": 32}, False), ({"group": 16}, True)]
)
def test_layers_of_the_scheme_are_requantized_for_other_options_only(
    mixed, tmp_path, options, again
):
    """Options that the tensors have already cost nothing."""
    path = tmp_path / "packed.safetensors"
    report = hijack.convert_file(mixed, path, requantize="packed_int4", **options)
    assert ("b" in report.requantized) == again
    assert torch.equal(weights(mixed)["b"], weights(path)["b"]) != again


@pytest.mark.parametrize("option", [{}, {"block_size": "1x64"}, {"block_size": "row"}])
def test_the_scheme_and_the_dialect_of_the_result_can_be_chosen(
    mixed, tmp_path, option
):
    """To block-wise FP8 in musubi-tuner's spelling, whose own layer stays."""
    path = tmp_path / "musubi.safetensors"
    report = hijack.convert_file(
        mixed, path, "musubi", requantize=hijack.schemes()["blockwise_fp8"], **option
    )
    claims = hijack.identify(path).claims()
    assert {claim.dialect for claim in claims.values()} == {"musubi"}
    assert set(report.requantized) >= {"b", "c"}
    if not option:  # a has 96 columns, so that it has one scale for each row
        assert set(report.requantized) == {"b", "c"}
        assert claims["c"].block_size == (1, 64)
    if option == {"block_size": "row"}:
        assert claims["c"].block_size == (1, 128)
    assert "hijack" not in metadata(path)


def test_what_a_scheme_declines_stays_in_its_own(mixed, tmp_path):
    """It keeps its bits, is named with the reason, and is read as before."""
    path = tmp_path / "rows.safetensors"
    report = hijack.convert_file(mixed, path, requantize="rows", least=90)
    assert report.kept == {"b": "it has less than 90 columns"}
    assert schemes_in(path) == {"a": "rows", "b": "packed_int4", "c": "rows"}
    assert set(report.requantized) == {"a", "c"}
    assert torch.equal(weights(mixed)["b"], weights(path)["b"])
    assert "2 requantized" in str(report)
    assert "1 kept as they were" in str(report)
    with pytest.raises(CheckpointError, match=r"none of its 3 layers can become one"):
        hijack.convert_file(mixed, path, requantize="rows", least=999, overwrite=True)


def test_layers_are_requantized_by_name(mixed, tmp_path):
    """The others stay, those of the scheme in other options too."""
    path = tmp_path / "some.safetensors"
    report = hijack.convert_file(mixed, path, requantize="rows", exclude="c")
    assert schemes_in(path) == {"a": "rows", "b": "rows", "c": "rotated_int8"}
    assert report.kept == {"c": "excluded"}
    report = hijack.convert_file(
        mixed, path, requantize="packed_int4", include="a", group=16, overwrite=True
    )
    assert report.kept == {"b": "not included", "c": "not included"}
    assert schemes_in(path) == {**MIXED, "a": "packed_int4"}
    assert torch.equal(weights(mixed)["b"], weights(path)["b"])
    with pytest.raises(CheckpointError, match=r"include: pattern 'd' matches no layer"):
        hijack.convert_file(
            mixed, path, requantize="rows", include=["a", "d"], overwrite=True
        )
    with pytest.raises(CheckpointError, match=r"none of its 3 .* not included"):
        hijack.convert_file(
            mixed, path, requantize="rows", include="norm", overwrite=True
        )
    with pytest.raises(CheckpointError, match=r"include: says which layers a scheme"):
        hijack.convert_file(mixed, path, "hijack", include="a", overwrite=True)


def test_plain_casts_are_requantized_by_name(tmp_path):
    """A pattern names what would be left by default, and leaves what would not."""
    path, other = tmp_path / "cast.safetensors", tmp_path / "rows.safetensors"
    names = ("blocks.0.fc", "blocks.1.fc", "time_embedding.linear_1")
    cast = {f"{n}.weight": torch.randn(8, 64).to(torch.float8_e4m3fn) for n in names}
    save_file(cast, path)
    report = hijack.convert_file(
        path, other, requantize="rows", include=["time*", "*.0.*"]
    )
    assert set(schemes_in(other)) == {"blocks.0.fc", "time_embedding.linear_1"}
    assert report.kept == {"blocks.1.fc": "not included"}


def test_a_scheme_takes_no_layers_of_types_it_is_not_for(tmp_path):
    """An embedding of one scheme is none of another that is for Linear."""
    path, other = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    tensors = {"embed.weight": torch.randn(9, 64), "fc.weight": torch.randn(8, 64)}
    save_file(tensors, path)
    hijack.quantize_file(path, other, "packed_int4", include="*")
    report = hijack.convert_file(other, path, requantize="rows", overwrite=True)
    assert report.kept == {"embed": "looks like Embedding; the scheme quantizes Linear"}
    assert schemes_in(path) == {"embed": "packed_int4", "fc": "rows"}


def test_other_blocks_than_requested_are_noted(mixed, tmp_path):
    """musubi-tuner's blocks divide a row; where they do not, a row is one."""
    path = tmp_path / "musubi.safetensors"
    report = hijack.convert_file(
        mixed, path, "musubi", requantize="blockwise_fp8", block_size=(1, 48)
    )
    assert hijack.identify(path).claims()["a"].block_size == (1, 48)
    (note,) = report.notes
    assert note.startswith("2 of 3 layers have other blocks than requested, such as ")
    assert "c with 1x128 instead of 1x48" in note


@pytest.mark.parametrize("dialect", ["scaled_fp8", "compressed_tensors", "comfy_quant"])
def test_a_kept_layer_is_read_although_its_file_was_marked(tmp_path, dialect):
    """Marks of a whole file go or stay with the layers they are true of."""
    path, other = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    tensors = {name: torch.randn(size) for name, size in SIZES.items()}
    save_file({f"{name}.weight": weight for name, weight in tensors.items()}, path)
    written = "musubi" if dialect == "scaled_fp8" else dialect
    hijack.quantize_file(path, other, dialect=written, block_size="tensor")
    if dialect == "scaled_fp8":
        marker = torch.zeros(2, dtype=torch.float8_e4m3fn)
        save_file({**load_file(other), "scaled_fp8": marker}, other)
    assert {c.dialect for c in hijack.identify(other).claims().values()} == {dialect}
    report = hijack.convert_file(
        other, path, requantize="rows", least=70, overwrite=True
    )
    assert set(report.kept) == {"b"}
    assert "scaled_fp8" not in load_file(path)
    assert hijack.identify(path).clear
    assert schemes_in(path) == {"a": "rows", "b": "blockwise_fp8", "c": "rows"}
    comparison = hijack.compare_files(other, path)
    assert comparison.layers["b.weight"].sqnr == float("inf")
    assert comparison.layers["a.weight"].sqnr < 60


def test_what_a_layer_says_of_its_computing_goes_along(tmp_path):
    """An option that both schemes have is kept; that of one alone is lost, and said."""
    path, other = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_file({"a.weight": torch.randn(8, 64)}, path)
    hijack.quantize_file(
        path, other, dialect="comfy_quant", full_precision_matrix_mult=True
    )
    report = hijack.convert_file(other, path, requantize="rows", overwrite=True)
    assert report.lost == {}
    claim = hijack.identify(path).claims()["a"]
    assert claim.options == {"full_precision_matrix_mult": "true"}
    report = hijack.convert_file(other, path, requantize="packed_int4", overwrite=True)
    assert report.lost == {"full_precision_matrix_mult": 1}


def test_input_scales_are_left_out_only_if_that_is_agreed_to(tmp_path):
    """Another scheme has no use for them."""
    path, other = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_file({"a.weight": torch.randn(8, 64)}, path)
    hijack.quantize_file(path, other, dialect="comfy_quant", block_size="tensor")
    tensors = {**load_file(other), "a.input_scale": torch.tensor(0.5)}
    save_file(tensors, other, metadata(other))
    with pytest.raises(CheckpointError, match=r"a\.input_scale: .* of scheme rows"):
        hijack.convert_file(other, path, requantize="rows", overwrite=True)
    report = hijack.convert_file(
        other, path, requantize="rows", overwrite=True, drop_input_scales=True
    )
    assert report.dropped == ("a.input_scale",)
    assert "a.input_scale" not in load_file(path)


# -- plain casts -----------------------------------------------------------------------


def test_plain_casts_are_quantized_as_a_dense_file_would_be(tmp_path):
    """What looks delicate stays a cast; what is dense is copied."""
    path, other = tmp_path / "cast.safetensors", tmp_path / "rows.safetensors"
    tensors = {
        "time_embedding.linear_1.weight": torch.randn(9, 64),
        "blocks.0.fc.weight": torch.randn(8, 64),
        "blocks.0.norm.weight": torch.randn(64),
    }
    cast = {key: tensor.to(torch.float8_e4m3fn) for key, tensor in tensors.items()}
    save_file({**cast, "blocks.1.fc.weight": torch.randn(8, 64)}, path)
    report = hijack.convert_file(path, other, requantize="rows")
    assert schemes_in(other) == {"blocks.0.fc": "rows"}
    assert set(report.kept) == {"time_embedding.linear_1"}
    assert "an embedding" in report.kept["time_embedding.linear_1"]
    new = load_file(other)
    codes, params = Rows().quantize(cast["blocks.0.fc.weight"].float())
    assert torch.equal(new["blocks.0.fc.weight"], codes)
    assert torch.equal(new["blocks.0.fc.weight_scale"], params["weight_scale"])
    assert new["blocks.1.fc.weight"].dtype == torch.float32
    for key in ("time_embedding.linear_1.weight", "blocks.0.norm.weight"):
        assert torch.equal(new[key].float(), cast[key].float())
        assert new[key].dtype == torch.float8_e4m3fn


def test_plain_casts_beside_quantized_layers_are_not_taken_for_casts(tmp_path):
    """Without a scale where others have one, data is no cast; it is left and named."""
    path, other = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    save_file({"a.weight": torch.randn(8, 64)}, path)
    hijack.quantize_file(path, other)
    lone = torch.randn(8, 64).to(torch.float8_e4m3fn)
    save_file({**load_file(other), "b.weight": lone}, other)
    report = hijack.convert_file(other, path, requantize="rows", overwrite=True)
    assert report.kept == {"b": "it holds quantized data without a scale"}
    assert load_file(path)["b.weight"].dtype == torch.float8_e4m3fn


# -- what is refused -------------------------------------------------------------------


def test_what_is_misspelled_is_refused(mixed, tmp_path):
    """Scheme, option, value and dialect, before anything is written."""
    path = tmp_path / "no.safetensors"
    for error, words, arguments in (
        (UnknownSchemeError, "did you mean 'rows'", {"requantize": "row"}),
        (SchemeError, "rows: has no option 'lest'", {"lest": 1}),
        (SchemeError, "rows: option least: got 0", {"least": 0}),
        (CheckpointError, "rows: unknown dialect 'x'", {"dialect": "x"}),
        (CheckpointError, "dialect: got none", {"requantize": True}),
        (CheckpointError, "dialect: got none", {"requantize": False}),
    ):
        with pytest.raises(error, match=words):
            hijack.convert_file(mixed, path, **{"requantize": "rows", **arguments})
        assert not path.exists()


def test_a_file_with_nothing_to_requantize_is_refused(tmp_path):
    """A dense file is for quantize."""
    path = tmp_path / "dense.safetensors"
    save_file({"a.weight": torch.randn(8, 64)}, path)
    with pytest.raises(CheckpointError, match=r"or use `hijack quantize`"):
        hijack.convert_file(path, tmp_path / "no.safetensors", requantize="rows")


# -- the command -----------------------------------------------------------------------


@pytest.fixture
def run(capsys):
    """Run a command; give its status, output and messages."""

    def run(*words):
        status = cli.main([str(word) for word in words])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def test_the_command_says_what_became_of_each_layer(run, mixed, tmp_path):
    """Loss and reason are printed, and are in the JSON."""
    words = ("convert", mixed, tmp_path / "rows.safetensors", "--requantize", "rows")
    status, out, _ = run(*words, "--option", "least=90")
    assert status == 0
    assert "requantized: a: SQNR " in out
    assert "kept: b: it has less than 90 columns" in out
    status, out, _ = run(*words, "--include", "?", "--exclude", "c", "--force")
    assert "kept: c: excluded" in out
    status, out, _ = run(*words, "--option", "least=90", "--json", "--force")
    told = json.loads(out)
    assert told["schemes"] == {"a": "rows", "b": "packed_int4", "c": "rows"}
    assert told["kept"] == {"b": "it has less than 90 columns"}
    assert set(told["requantized"]) == {"a", "c"}


def test_the_command_refuses_what_there_is_not(run, mixed, tmp_path):
    """Unknown schemes and options with a guess; no dialect and no scheme."""
    words = ("convert", mixed, tmp_path / "rows.safetensors")
    status, _, err = run(*words, "--requantize", "rwos")
    assert status == 1
    assert "did you mean 'rows'" in err
    status, _, err = run(*words, "--requantize", "rows", "--option", "group=3")
    assert status == 1
    assert "rows: has no option 'group'; expected options among least" in err
    with pytest.raises(SystemExit):
        run(*words, "--requantize")
    with pytest.raises(SystemExit):
        run(*words)


def test_the_flag_may_still_come_before_the_files(run, mixed, tmp_path):
    """A file is not taken for the name of a scheme."""
    path = tmp_path / "converted.safetensors"
    words = ("convert", "--dialect", "hijack", "--requantize", mixed, path)
    assert run(*words)[0] == 0
    assert schemes_in(path) == MIXED


# -- the schemes that come with hijack -------------------------------------------------


@pytest.fixture
def fp8(tmp_path):
    """A file of block-wise FP8 as musubi-tuner writes it, with a width of no blocks."""
    torch.manual_seed(0)
    shapes = {"q": (128, 256), "k": (96, 100), "v": (64, 1024)}
    path = tmp_path / "fp8.safetensors"
    dense = {f"blocks.0.{n}.weight": torch.randn(s) for n, s in shapes.items()}
    save_file(dense, tmp_path / "dense.safetensors")
    hijack.quantize_file(tmp_path / "dense.safetensors", path)
    return path


@pytest.mark.parametrize("name", SHIPPED)
def test_fp8_blocks_become_every_scheme_and_go_back(fp8, tmp_path, name):
    """Each writes its first dialect, loses what its bits lose, and is read again."""
    path, back = tmp_path / "other.safetensors", tmp_path / "back.safetensors"
    report = hijack.convert_file(fp8, path, requantize=name)
    changed = name != "blockwise_fp8"
    kept = {layer for layer in report.schemes if layer in report.kept}
    assert len(report.requantized) + len(kept) == (3 if changed else len(kept))
    assert all(error.sqnr > 15 for error in report.requantized.values())
    claims = hijack.identify(path).claims()
    assert hijack.identify(path).clear
    assert all(c.scheme == name for n, c in claims.items() if n not in kept)
    report = hijack.convert_file(path, back, "musubi", requantize="blockwise_fp8")
    assert {c.dialect for c in hijack.identify(back).claims().values()} == {"musubi"}
    comparison = hijack.compare_files(fp8, back)
    assert len(comparison.layers) == 3
    assert all(error.sqnr > 15 for error in comparison.layers.values())


def test_convrot_takes_what_its_groups_divide(fp8, tmp_path):
    """The rest stays FP8 and is read beside it; another rotation is another format."""
    path, other = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    report = hijack.convert_file(fp8, path, requantize="int8", rotation=256)
    assert list(report.kept) == ["blocks.0.k"]
    assert report.schemes["blocks.0.k"] == "blockwise_fp8"
    report = hijack.convert_file(path, other, requantize="int8", rotation=64)
    assert set(report.requantized) == {"blocks.0.q", "blocks.0.v"}
    report = hijack.convert_file(
        path, other, requantize="int8", rotation=256, overwrite=True
    )
    assert report.requantized == {}


def test_layers_of_several_schemes_share_comfyuis_table(fp8, tmp_path):
    """Each has its marker and its entry; what stays, stays in it."""
    path, other = tmp_path / "one.safetensors", tmp_path / "two.safetensors"
    hijack.quantize_file(
        tmp_path / "dense.safetensors", path, dialect="comfy_quant", block_size="tensor"
    )
    hijack.convert_file(path, other, "comfy_quant", requantize="int8", include="*.q")
    hijack.convert_file(
        other, path, "comfy_quant", requantize="nvfp4", include="*.v", overwrite=True
    )
    expected = {"q": "int8", "v": "nvfp4", "k": "blockwise_fp8"}
    named = {f"blocks.0.{name}": scheme for name, scheme in expected.items()}
    assert schemes_in(path) == named
    assert hijack.identify(path).clear
    table = json.loads(metadata(path)["_quantization_metadata"])["layers"]
    assert {name: entry["format"] for name, entry in table.items()} == {
        "blocks.0.q": "int8_tensorwise",
        "blocks.0.v": "nvfp4",
        "blocks.0.k": "float8_e4m3fn",
    }
    keys = load_file(path)
    assert all(f"{name}.comfy_quant" in keys for name in named)


def test_shards_are_requantized_into_shards(fp8, tmp_path):
    """The layers of all of them, with the same result as in one file."""
    files = {n: tmp_path / f"{n}.safetensors" for n in ("dense", "from", "to", "whole")}
    hijack.quantize_file(files["dense"], files["from"], max_shard_size="64KB")
    source, path = (f"{files[name]}.index.json" for name in ("from", "to"))
    report = hijack.convert_file(
        source, files["to"], requantize="int8", max_shard_size="64KB"
    )
    assert len(report.requantized) == 3
    assert len(list(tmp_path.glob("to-0*"))) > 1
    hijack.convert_file(fp8, files["whole"], requantize="int8")
    assert hijack.compare_files(files["whole"], path).same
