"""What the documents say is what the code does."""

import ast
import builtins
import inspect
import re
import runpy
import shlex
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import hijack
from hijack import cli, errors
from hijack.hooks import HookSpecs
from hijack.testing import SchemeConformance

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LIBRARIES = {"accelerate", "diffusers", "peft", "transformers"}
HOOKS = {n: f for n, f in vars(HookSpecs).items() if n.startswith("hijack_")}


def blocks(document, language):
    """The code blocks of a document in one language."""
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.M | re.S)


def sources(*folders):
    """The Python files of some folders."""
    return [
        file for folder in folders for file in sorted((ROOT / folder).rglob("*.py"))
    ]


def functions(file):
    """Every function in a file."""
    tree = ast.parse(file.read_text())
    return [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("name", HOOKS)
def test_hook_is_documented(name):
    """docs/hooks.md has a section on the hook, with its arguments and its kind."""
    text = (ROOT / "docs/hooks.md").read_text()
    arguments = [p for p in inspect.signature(HOOKS[name]).parameters if p != "self"]
    heading = f"### `{name}({', '.join(arguments)})`\n"
    assert heading in text
    options = HOOKS[name].hijack_spec
    kinds = [kind for kind in ("firstresult", "historic") if options[kind]]
    section = text.split(heading)[1].split("\n###")[0]
    assert section.strip().startswith(f"{(kinds or ['collect'])[0]} ·")


def test_no_unknown_hook_is_documented():
    """Every hook in docs/hooks.md exists."""
    text = (ROOT / "docs/hooks.md").read_text()
    assert set(re.findall(r"^### `(\w+)\(", text, re.M)) == set(HOOKS)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_python_blocks_run(document, tmp_path, monkeypatch):
    """The Python of a document runs, top to bottom; its conformance classes pass."""
    imported = re.findall(r"^(?:from|import) (\w+)", document.read_text(), re.M)
    if LIBRARIES.intersection(imported):
        pytest.skip("is about a library; tests/libraries runs it")
    monkeypatch.chdir(tmp_path)
    before = hijack.schemes()
    scope = {"__name__": "document"}
    try:
        for block in blocks(document, "python"):
            exec(compile(block, document.name, "exec"), scope)
        kits = [v for v in scope.values() if isinstance(v, type)]
        for kit in kits:
            if issubclass(kit, SchemeConformance) and kit is not SchemeConformance:
                run_kit(kit, tmp_path)
    finally:
        for name in hijack.schemes().keys() - before.keys():
            hijack.unregister(name)


def run_kit(kit, folder):
    """Run a conformance class without pytest, but for what cannot be pickled here."""
    scheme = kit.__dict__["scheme"].__wrapped__
    for name in dir(kit):
        if name.startswith("test_") and name != "test_torch_save":
            test = getattr(kit(), name)
            wanted = "tmp_path" in inspect.signature(test).parameters
            (folder / name).mkdir()
            test(scheme(kit()), **({"tmp_path": folder / name} if wanted else {}))


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_shown_commands_exist(document):
    """Every ``hijack`` command shown is one the command line takes."""
    lines = "".join(blocks(document, "bash")).splitlines()
    for line in lines:
        words = shlex.split(line, comments=True)
        if words[:1] == ["hijack"]:
            assert cli._parser().parse_args(words[1:]).run


def test_the_command_lines_of_the_readme_run(tmp_path, monkeypatch, capsys):
    """One after another, in a folder with a model and a LoRA."""
    monkeypatch.chdir(tmp_path)
    names = [f"img_{end}" for end in ("mlp.net.2", "mod.1")]
    names += ["txt_mlp.net.2", "attn.to_q"]
    tensors = {f"transformer_blocks.0.{n}.weight": torch.randn(8, 256) for n in names}
    save_file({**tensors, "txt_norm.weight": torch.ones(8)}, "model.safetensors")
    parts = {"A": torch.randn(2, 256), "B": torch.randn(8, 2)}
    layer = "transformer_blocks.0.attn.to_q"
    lora = {f"{layer}.lora_{part}.weight": tensor for part, tensor in parts.items()}
    save_file(lora, "style.safetensors")
    for line in "".join(blocks(ROOT / "README.md", "bash")).splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["mkdir"]:
            for name in words[1:]:
                Path(name).mkdir()
        if words[:1] == ["hijack"]:
            assert cli.main(words[1:]) == 0, line
            assert "note: " not in capsys.readouterr().out


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    """Files and pictures a document links to exist."""
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def variables(*files):
    """The environment variables that files name."""
    text = "".join(file.read_text() for file in files)
    return set(re.findall(r"\bHIJACK_[A-Z_]+\b", text))


def test_every_variable_is_documented():
    """Those for users in the README, those of tests where contributors look."""
    ours = variables(*sources("hijack", "schemes"), ROOT / "__init__.py")
    others = variables(*sources("benchmarks", "tests")) - ours
    assert variables(ROOT / "README.md") == ours
    assert variables(ROOT / "CONTRIBUTING.md") == others


def test_all_is_what_is_public():
    """``hijack.__all__`` is sorted and has every public name that is no module."""
    public = {
        name
        for name, value in vars(hijack).items()
        if not name.startswith("_") and not inspect.ismodule(value)
    }
    assert hijack.__all__ == sorted(public)


@pytest.mark.parametrize("name", hijack.__all__)
def test_public_name_has_a_docstring(name):
    """Whatever is public says what it is."""
    value = getattr(hijack, name)
    if callable(value) and name != "hookimpl":
        assert inspect.getdoc(value)


def test_error_tree_is_complete():
    """The tree in the docstring of hijack.errors has every exception and its bases."""
    found, path = {}, ["HijackError"]
    for line in errors.__doc__.splitlines():
        match = re.match(r"    ([│ ]*)[├└]── (\w+)(?:\((\w+)\))?", line)
        if match:
            depth = len(match[1]) // 4 + 1
            path[depth:] = [match[2]]
            found[match[2]] = {path[depth - 1]} | ({match[3]} if match[3] else set())
    actual = {
        name: {base.__name__ for base in cls.__bases__}
        for name, cls in vars(errors).items()
        if isinstance(cls, type) and name != "HijackError"
    }
    assert found == actual
    assert all(
        hasattr(errors, b) or hasattr(builtins, b) for v in found.values() for b in v
    )


def test_every_test_says_what_it_tests():
    """Each test function has a docstring of one sentence."""
    silent = [
        f"{file.name}:{node.name}"
        for file in sources("tests")
        for node in functions(file)
        if node.name.startswith("test_") and not ast.get_docstring(node)
    ]
    assert not silent


def test_contributing_is_short():
    """CONTRIBUTING.md can be read in a minute."""
    assert len((ROOT / "CONTRIBUTING.md").read_text().splitlines()) <= 60


def test_texts_name_no_machine():
    """No committed text holds a path of somebody's home."""
    for file in [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"]:
        assert not re.search(r"/(root|home|work|Users)/", file.read_text()), file.name


def test_the_formats_are_those_of_the_code():
    """docs/formats.md is what the tables give; generate_formats_doc.py writes it."""
    made = runpy.run_path(str(ROOT / "scripts/generate_formats_doc.py"))["document"]()
    assert (ROOT / "docs/formats.md").read_text() == made
