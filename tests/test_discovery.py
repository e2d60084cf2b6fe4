"""Plugins of installed distributions: what is loaded, and what is said of the rest."""

import importlib.metadata
import logging
import sys
import types

import pytest
import torch

import hijack
from hijack import cli
from hijack import registry as registry_module
from hijack.errors import PluginError
from tests.plugin_folder import install, python
from tests.test_registry import Other, Plain, installed

__all__ = ["installed"]  # a fixture


def doctor(registry, capsys):
    """What ``hijack doctor`` says of a registry, and its exit status."""
    with hijack.use_registry(registry):
        status = cli.main(["doctor"])
    return status, capsys.readouterr().out


@pytest.fixture
def exiting(monkeypatch):
    """An entry point whose import calls ``sys.exit``."""

    class Entry:
        name, group, value = "exiting", "hijack", "exiting_plugin"

        def load(self):
            sys.exit("cannot work here")

    return Entry()


def no_hooks():
    """A module without hooks."""
    module = types.ModuleType("empty_plugin")
    module.scheme = Plain()  # which nobody asks for
    return module


def test_a_module_without_hooks_is_a_problem(installed, capsys, caplog):
    """It registers nothing, so it was meant otherwise; the others are loaded."""
    installed(empty=no_hooks(), good=Other)
    registry = hijack.create_registry(entry_points=True)
    assert set(registry.schemes()) == {"other"}
    words = "entry point empty = empty:thing: has no hooks; expected a module with func"
    assert words in caplog.text
    status, text = doctor(registry, capsys)
    assert status == 1
    assert words in text


def test_a_module_that_registers_when_imported_is_none(installed, monkeypatch):
    """Its schemes are there, though it has no hooks."""
    registry = hijack.create_registry(entry_points=True)

    class Entry:
        name, group, value = "eager", "hijack", "eager_plugin"

        def load(self):
            registry.register(Plain())
            return types.ModuleType("eager_plugin")

    dist = types.SimpleNamespace(entry_points=[Entry()])
    monkeypatch.setattr("importlib.metadata.distributions", lambda: [dist])
    assert set(registry.schemes()) == {"plain"}
    assert registry.problems == []


def test_the_second_of_one_name_is_a_problem(monkeypatch, capsys):
    """The first is loaded; both are named."""
    loaded = []

    class Entry:
        name, group = "twin", "hijack"

        def __init__(self, value, scheme):
            self.value, self.scheme = value, scheme

        def load(self):
            loaded.append(self.value)
            return self.scheme

    one, two, again = Entry("one", Plain), Entry("two", Other), Entry("one", Plain)
    dists = [types.SimpleNamespace(entry_points=[entry]) for entry in (one, two, again)]
    monkeypatch.setattr("importlib.metadata.distributions", lambda: dists)
    registry = hijack.create_registry(entry_points=True)
    assert set(registry.schemes()) == {"plain"}
    assert loaded == ["one"]
    words = "entry point twin = two: the name is taken by one; it was not loaded"
    assert words in doctor(registry, capsys)[1]
    assert len(registry.problems) == 1


def test_an_import_that_exits_is_a_problem(exiting, monkeypatch, capsys):
    """The process goes on."""
    good = types.SimpleNamespace(
        name="good", group="hijack", value="good", load=lambda: Other
    )
    dist = types.SimpleNamespace(entry_points=[exiting, good])
    monkeypatch.setattr("importlib.metadata.distributions", lambda: [dist])
    registry = hijack.create_registry(entry_points=True)
    assert set(registry.schemes()) == {"other"}
    status, text = doctor(registry, capsys)
    assert status == 1
    assert "plugin exiting: loading: SystemExit: cannot work here" in text


@pytest.mark.parametrize("kind", ["empty", "raising", "no scheme"])
def test_strict_raises_each_time_and_loads_the_others(installed, monkeypatch, kind):
    """A second use does not pass for one where all is well."""
    bad = {"empty": no_hooks(), "raising": OSError("no disk"), "no scheme": object()}
    installed(bad=bad[kind], good=Other)
    monkeypatch.setenv("HIJACK_STRICT", "1")
    registry = hijack.create_registry(entry_points=True)
    for _ in range(3):
        with pytest.raises(PluginError, match="plugin bad: loading: "):
            registry.schemes()
    monkeypatch.delenv("HIJACK_STRICT")
    assert set(registry.schemes()) == {"other"}
    assert [problem.plugin for problem in registry.problems] == ["bad"]


def test_a_slow_import_is_named(installed, monkeypatch, caplog, capsys):
    """In the log and by the doctor; it is no failure, strict or not."""
    monkeypatch.setenv("HIJACK_STRICT", "1")
    monkeypatch.setattr(registry_module, "SLOW_IMPORT", -1.0)
    installed(sluggish=Other)
    registry = hijack.create_registry(entry_points=True)
    with caplog.at_level(logging.WARNING):
        assert set(registry.schemes()) == {"other"}
    assert "hijack: plugin sluggish took 0.0 s to import" in caplog.text
    status, text = doctor(registry, capsys)
    assert status == 0
    assert "plugin sluggish: took 0.0 s to import" in text


def test_plugins_are_loaded_before_the_first_question(installed):
    """Also where the first use needs no name of a scheme."""
    asked = []

    class Plugin:
        @hijack.hookimpl
        def hijack_bind_forward(self):
            asked.append(1)

    installed(asking=Plugin())
    registry = hijack.create_registry(entry_points=True)
    hijack.wrap_module(torch.nn.Linear(2, 2), Plain(), registry=registry)
    assert asked == [1]


PLUGIN = """
import hijack, torch

class Mine(hijack.Scheme):
    name = "{name}"
    def quantize(self, weight):
        return weight.half(), {{"one": torch.ones(1)}}
    def dequantize(self, qdata, params, dtype):
        return qdata.to(dtype) * params["one"]

@hijack.hookimpl
def hijack_register_schemes(registry):
    registry.register(Mine())
"""

WHAT_IS_IMPORTED = """
import sys
import hijack
from hijack.cli import main

assert main(["schemes"]) == 0
main(["doctor"])
names = ("mine_plugin", "yours_plugin", "schemes.blockwise_fp8")
print("imported:", *(name for name in names if name in sys.modules))
"""


@pytest.mark.parametrize(
    ("disabled", "imported"),
    [
        ("", ["mine_plugin", "yours_plugin", "schemes.blockwise_fp8"]),
        ("mine", ["yours_plugin", "schemes.blockwise_fp8"]),
        ("mine,blockwise_fp8", ["yours_plugin"]),
        ("*", []),
    ],
)
def test_what_is_disabled_is_not_imported(tmp_path, disabled, imported):
    """Neither by the search for plugins nor by the command line."""
    for name in ("mine", "yours"):
        install(tmp_path, name, PLUGIN.format(name=name))
    out = python(tmp_path, WHAT_IS_IMPORTED, HIJACK_DISABLE=disabled)
    assert out.splitlines()[-1].split()[1:] == imported


def test_two_distributions_of_one_entry_point(tmp_path):
    """Real ones, one of which is loaded; the doctor names the other."""
    for dist in ("first", "second"):
        install(tmp_path, "same", PLUGIN.format(name=dist), dist=dist)
    out = python(tmp_path, "from hijack.cli import main; main(['doctor'])")
    assert out.count("plugin same: loading: PluginError: entry point same = ") == 1
    assert out.count("_plugin: the name is taken by ") == 1


NODE_PACK = """
import importlib.util, sys, types

sys.modules["comfy"] = types.ModuleType("comfy")  # as if ComfyUI imported the pack
spec = importlib.util.spec_from_file_location(
    "pack", {root!r} + "/__init__.py", submodule_search_locations=[{root!r}]
)
pack = importlib.util.module_from_spec(spec)
sys.modules["pack"] = pack
spec.loader.exec_module(pack)
import hijack
print("schemes.blockwise_fp8" in sys.modules, hijack.status()["comfyui"])
"""


@pytest.mark.parametrize("disabled", ["", "blockwise_fp8", "*"])
def test_the_node_pack_imports_nothing_disabled(tmp_path, disabled):
    """It patches ComfyUI without the reference scheme, for the schemes of others."""
    root = str(registry_module.__file__).removesuffix("/hijack/registry.py")
    code = NODE_PACK.format(root=root)
    out = python(tmp_path, code, HIJACK_DISABLE=disabled).splitlines()[-1]
    imported, _, status = out.partition(" ")
    assert imported == str(disabled == "")
    assert ("disarmed by HIJACK_DISABLE" in status) == (disabled == "*")
    assert ("waiting for comfy" in status) == (disabled != "*")


def test_a_plugin_that_asks_for_schemes_while_it_is_loaded_is_loaded_once(monkeypatch):
    """It sees those that are there by then, and nothing starts anew."""
    registry, loads = hijack.create_registry(entry_points=True), []

    class Entry:
        name, group, value = "curious", "hijack", "curious:thing"

        def load(self):
            loads.append(sorted(registry.schemes()))
            return Plain

    dist = types.SimpleNamespace(entry_points=[Entry()])
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: [dist])
    assert set(registry.schemes()) == {"plain"}
    assert loads == [[]]
    assert registry.problems == []


def test_a_scheme_of_hijack_s_own_that_fails_is_passed_over(tmp_path, monkeypatch):
    """The others are registered; what is private or disabled is not imported."""
    import schemes

    (tmp_path / "spoiled.py").write_text("raise ValueError('bad')")
    for name in ("_private_part", "unwanted"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('imported')")
    monkeypatch.setattr(schemes, "__path__", [*schemes.__path__, str(tmp_path)])
    monkeypatch.setenv("HIJACK_DISABLE", "unwanted")
    registry = hijack.create_registry()
    with hijack.use_registry(registry):
        schemes.register_all()
    (problem,) = registry.problems
    assert (problem.plugin, problem.error) == ("spoiled", "ValueError: bad")
