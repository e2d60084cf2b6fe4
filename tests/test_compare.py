"""compare: errors of weights, whatever the two files are."""

import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import hijack
from hijack import cli
from hijack.errors import CheckpointError
from hijack.metrics import quantization_error
from hijack.safetensors_io.reader import read_header
from tests.test_lora_layouts import MODELS, WRAPPERS, K, layout, rows_of, wrapped


@pytest.fixture
def files(tmp_path):
    """A dense file and what quantizing made of it."""
    torch.manual_seed(0)
    dense, coded = tmp_path / "dense.safetensors", tmp_path / "coded.safetensors"
    tensors = {f"blocks.{i}.weight": torch.randn(64, 128) for i in range(3)}
    tensors["norm.weight"] = torch.randn(64)
    save_file(tensors, dense)
    hijack.quantize_file(dense, coded)
    return dense, coded


def test_each_weight_gets_its_error(files):
    """Against sums in float64; what was not quantized is equal."""
    found = hijack.compare_files(*files)
    wanted = load_file(files[0])["blocks.1.weight"].double()
    stored = load_file(files[1])
    scale = stored["blocks.1.scale_weight"].double().expand(64, 2, 64).reshape(64, 128)
    error = stored["blocks.1.weight"].double() * scale - wanted
    loss = found.layers["blocks.1.weight"]
    assert loss.rmse == pytest.approx(error.square().mean().sqrt().item(), rel=1e-6)
    assert loss.max_abs_error == pytest.approx(error.abs().max().item(), rel=1e-6)
    ratio = wanted.square().sum() / error.square().sum()
    assert loss.sqnr == pytest.approx(10 * torch.log10(ratio).item(), rel=1e-6)
    assert found.layers["norm.weight"].max_abs_error == 0
    assert not found.same
    assert hijack.compare_files(files[1], files[1]).same


def test_prefixes_do_not_matter(files, tmp_path):
    """Trainers and ComfyUI name the same layers differently."""
    path = tmp_path / "prefixed.safetensors"
    prefixed = {f"model.diffusion_model.{k}": t for k, t in load_file(files[1]).items()}
    save_file(prefixed, path)
    for pair in ((files[1], path), (path, files[1])):
        found = hijack.compare_files(*pair)
        assert found.same
        assert len(found.layers) == 4


def test_a_prefix_nobody_knows_does_not_matter_either(tmp_path):
    """Of names without blocks, and of a text encoder within a checkpoint."""
    for prefix, layer in (("foo.", "a"), ("text_encoders.x.transformer.", "model.a")):
        paths = [tmp_path / "plain.safetensors", tmp_path / "prefixed.safetensors"]
        save_file({f"{layer}.weight": torch.ones(2, 2)}, paths[0])
        save_file({f"{prefix}{layer}.weight": torch.ones(2, 2)}, paths[1])
        for pair in (paths, paths[::-1]):
            assert hijack.compare_files(*pair).same


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_do_not_matter(tmp_path, wrapper):
    """Nor do they hide a difference."""
    torch.manual_seed(0)
    wrap = wrapped(wrapper)
    plain = {
        "blocks.0.self_attn.q.weight": torch.randn(8, 8),
        "blocks.0.norm.weight": torch.randn(8),
        "blocks.0.self_attn.q.bias": torch.randn(8),
        "blocks.0.modulation": torch.randn(1, 6, 8),
    }
    others = {}
    for key, tensor in plain.items():
        layer, _, leaf = key.rpartition(".")
        others[f"{wrap(layer)}.{leaf}"] = tensor
    paths = tmp_path / "plain.safetensors", tmp_path / "wrapped.safetensors"
    save_file(plain, paths[0])
    save_file(others, paths[1])
    for pair in (paths, paths[::-1]):
        found = hijack.compare_files(*pair)
        assert found.same
        assert len(found.layers) == len(plain)
    others[f"{wrap('blocks.0.norm')}.weight"] += 1
    save_file(others, paths[1])
    assert not hijack.compare_files(*paths).same


LAYOUTS = [
    (model, *pair)
    for model, programs in MODELS.items()
    for pair in itertools.permutations(programs, 2)
    if not {"XLabs", "OneTrainer"} & set(pair)
]


@pytest.mark.parametrize(("model", "one", "other"), LAYOUTS)
def test_fused_and_split_projections_are_compared(tmp_path, model, one, other):
    """Dense and quantized, in the names of different programs, with their biases."""
    torch.manual_seed(0)
    layers = layout(model, one), layout(model, other)
    names = dict.fromkeys(part for parts in layers[0].values() for part in parts)
    weights = {part: torch.randn(rows_of([part])[0], K) for part in names}
    biases = {part: torch.randn(rows_of([part])[0]) for part in names}
    paths = []
    for number, each in enumerate(layers):
        tensors = {}
        for name, parts in each.items():
            tensors[f"{name}.weight"] = torch.cat([weights[part] for part in parts])
            tensors[f"{name}.bias"] = torch.cat([biases[part] for part in parts])
        paths.append(tmp_path / f"{number}.safetensors")
        save_file(tensors, paths[-1])
    found = hijack.compare_files(*paths)
    assert found.same, found.as_table()
    assert len(found.layers) == 2 * len(layers[0])
    coded = tmp_path / "coded.safetensors"
    hijack.quantize_file(paths[1], coded, include="*", block_size=(1, 4))
    found = hijack.compare_files(paths[0], coded)
    assert found.only_reference == found.only_other == ()
    assert not found.skipped
    assert all(error.sqnr > 25 for error in found.layers.values())


def test_what_only_one_has_is_named(files, tmp_path):
    """Missing weights and other shapes are no errors, but are not passed over."""
    path = tmp_path / "other.safetensors"
    tensors = load_file(files[0])
    del tensors["blocks.0.weight"]
    tensors["extra.weight"] = torch.ones(2, 2)
    tensors["blocks.1.weight"] = torch.ones(2, 2)
    save_file(tensors, path)
    found = hijack.compare_files(files[0], path)
    assert found.only_reference == ("blocks.0.weight",)
    assert found.only_other == ("extra.weight",)
    assert "has shape (64, 128) and (2, 2)" in found.skipped["blocks.1.weight"]
    text = found.as_table()
    assert "not compared: blocks.1.weight" in text
    assert "extra.weight" in text


def test_codes_whose_scale_nobody_reads_are_no_numbers(files, tmp_path, capsys):
    """They are named, and not compared as if they were the weights."""
    path = tmp_path / "other.safetensors"
    tensors = load_file(files[1])
    tensors["blocks.0.odd_scale"] = tensors.pop("blocks.0.scale_weight")
    tensors["blocks.1.pre_quant_scale"] = torch.ones(128)
    save_file(tensors, path)
    for pair in ((files[0], path), (path, files[0])):
        found = hijack.compare_files(*pair)
        assert set(found.layers) == {"blocks.2.weight", "norm.weight"}
        assert found.only_reference == found.only_other == ()
        assert "scale that no scheme reads, blocks.0.odd_scale" in str(found.skipped)
    assert cli.main(["compare", str(files[0]), str(path)]) == 3
    assert "not compared: blocks.1.weight: has a scale" in capsys.readouterr().out


def test_markers_are_no_weights(files, tmp_path):
    """ComfyUI's marker of a whole file is a tensor of floating point numbers."""
    path = tmp_path / "marked.safetensors"
    marker = torch.empty(0, dtype=torch.float8_e4m3fn)
    coded = tmp_path / "tensor.safetensors"
    hijack.quantize_file(files[0], coded, block_size="tensor")
    save_file({**load_file(coded), "scaled_fp8": marker}, path)
    found = hijack.compare_files(coded, path)
    assert found.same
    assert "scaled_fp8" not in found.layers


def test_layers_of_a_scheme_nobody_registered_are_not_compared(files, tmp_path):
    """What their codes mean is not known."""
    path = tmp_path / "other.safetensors"
    hijack.convert_file(files[1], path, "hijack")
    said = {"hijack": read_header(path).metadata["hijack"].replace("wise_fp8", "x")}
    save_file({"a.weight": torch.ones(2), **load_file(path)}, path, said)
    found = hijack.compare_files(files[0], path)
    assert set(found.layers) == {"norm.weight"}
    assert "is of scheme blockx, which is not reg" in found.skipped["blocks.0.weight"]
    with pytest.raises(CheckpointError, match="is quantized already"):
        hijack.quantize_file(path, tmp_path / "again.safetensors")


def test_padding_is_cut_off(tmp_path):
    """ComfyUI pads MXFP8; the dense original does not."""
    dense, coded = tmp_path / "dense.safetensors", tmp_path / "coded.safetensors"
    save_file({"a.weight": torch.randn(40, 64)}, dense)
    options = {"scale_dtype": torch.float8_e8m0fnu}
    hijack.quantize_file(dense, coded, dialect="comfy_quant", **options)
    for pair in ((dense, coded), (coded, dense)):
        assert 25 < hijack.compare_files(*pair).layers["a.weight"].sqnr < 40


def test_models_that_have_nothing_in_common_are_refused(files, tmp_path):
    """The message shows a weight of each."""
    path = tmp_path / "other.safetensors"
    save_file({"z.weight": torch.ones(2, 2)}, path)
    with pytest.raises(CheckpointError, match=r"no weight in common.*z\.weight"):
        hijack.compare_files(files[0], path)


@pytest.mark.parametrize(
    ("one", "two", "sqnr"),
    [
        (torch.ones(4), torch.ones(4), "inf"),
        (torch.zeros(4), torch.ones(4), "-inf"),
        (torch.ones(4), torch.tensor([1, 1, 1, torch.nan]), "nan"),
        (torch.ones(4), torch.tensor([1, 1, 1, torch.inf]), "nan"),
        (torch.ones(0), torch.ones(0), "inf"),
    ],
)
def test_extremes_have_numbers_too(one, two, sqnr):
    """Equal, nothing to compare with, and what is no number."""
    assert str(quantization_error(one, two).sqnr) == sqnr


def test_weights_that_hold_nan_are_the_worst(files, tmp_path, capsys, monkeypatch):
    """The command ends with 3, and the picture names them."""
    path, picture = tmp_path / "broken.safetensors", tmp_path / "p.png"
    tensors = load_file(files[0])
    tensors["blocks.1.weight"][0, 0] = torch.nan
    save_file(tensors, path)
    found = hijack.compare_files(files[0], path)
    assert found.broken == ("blocks.1.weight",)
    assert found.worst(1)[0][0] == "blocks.1.weight"
    matplotlib = pytest.importorskip("matplotlib.axes")
    labels = []
    scatter = matplotlib.Axes.scatter

    def noted(self, *words, **options):
        labels.append(options.get("label"))
        return scatter(self, *words, **options)

    monkeypatch.setattr(matplotlib.Axes, "scatter", noted)
    words = ["compare", str(files[0]), str(path), "--plot", str(picture)]
    assert cli.main(words) == 3
    assert "blocks.1.weight  NaN or inf" in labels
    assert picture.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit):
        cli.main([*words, "--worst", "-1"])
    assert "expected a number from 0" in capsys.readouterr().err


def test_the_worst_come_first_and_json_has_all(files, capsys):
    """For people a table, for programs JSON without infinities."""
    assert cli.main(["compare", *map(str, files), "--worst", "2"]) == 0
    out = capsys.readouterr().out
    assert "... and 1 more that differ" in out
    assert "4 weights compared, 1 equal" in out
    assert cli.main(["compare", *map(str, files), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["layers"]["norm.weight"]["sqnr_db"] is None
    assert report["layers"]["blocks.0.weight"]["numel"] == 64 * 128
    ranks = [loss.sqnr for _, loss in hijack.compare_files(*files).worst()]
    assert ranks == sorted(ranks)


def test_the_picture_is_a_png(files, tmp_path):
    """With matplotlib of the extra; a folder that is not there is an error."""
    path = tmp_path / "p.png"
    assert cli.main(["compare", *map(str, files), "--plot", str(path)]) == 0
    assert path.read_bytes().startswith(b"\x89PNG")
    nowhere = tmp_path / "none" / "p.png"
    assert cli.main(["compare", *map(str, files), "--plot", str(nowhere)]) == 1


def test_names_are_drawn_as_they_are(tmp_path, monkeypatch):
    """Dollars are no formulas; letters that no font has are escaped, not boxes."""
    plot = pytest.importorskip("hijack.checkpoint.plot")
    axes = pytest.importorskip("matplotlib.axes")
    names = [
        r"a_{b}^$\frac$",
        "x.$y$.z",
        "\u5c42.\u6743\u91cd",
        "a\x1b\n\uffff",
        "\u00e9",
    ]
    paths = [tmp_path / "one.safetensors", tmp_path / "$t\\wo$\u6a21.safetensors"]
    for path in paths:
        save_file({f"{n}.weight": torch.randn(8, 8) for n in names}, path)
    texts = []
    for name, place in (("scatter", "label"), ("set_title", 0)):
        original = getattr(axes.Axes, name)

        def noted(self, *words, original=original, place=place, **options):
            given = options.get(place) if place == "label" else words[place]
            texts.append(given)
            return original(self, *words, **options)

        monkeypatch.setattr(axes.Axes, name, noted)
    for letters, shown in (
        (plot._letters(), plot.drawable("\u5c42.\u6743\u91cd")),
        (frozenset(range(32, 127)), r"\u5c42.\u6743\u91cd"),
    ):
        monkeypatch.setattr(plot, "_letters", lambda letters=letters: letters)
        texts.clear()
        picture = tmp_path / f"{len(letters)}.png"
        assert cli.main(["compare", *map(str, paths), "--plot", str(picture)]) == 0
        assert picture.read_bytes().startswith(b"\x89PNG")
        labels = " ".join(filter(None, texts))
        for name in (r"a_{b}^$\frac$", "x.$y$.z", shown, r"a\x1b\n\uffff", "$t\\wo$"):
            assert f"{name}" in labels
