"""Registering schemes and plugins, and asking them."""

import importlib.metadata
import logging
import types

import pytest
import torch
from torch import nn

import hijack
from hijack.errors import (
    DuplicateSchemeError,
    PluginError,
    SchemeError,
    UnknownSchemeError,
)
from hijack.formats.dialect import native_claim
from hijack.formats.identification import identify


class Plain(hijack.Scheme):
    """The smallest scheme."""

    name = "plain"

    def quantize(self, weight, **options):
        """Halve the width."""
        return weight.half(), {"unit": torch.ones(1)}

    def dequantize(self, qdata, params, dtype):
        """Widen."""
        return qdata.to(dtype) * params["unit"]


class Other(Plain):
    """Another name."""

    name = "other"


@pytest.fixture
def registry():
    """A registry of its own for each test."""
    return hijack.create_registry()


def test_a_registered_scheme_is_found_by_name_with_its_origin(registry):
    """schemes() maps names to schemes, and each says where it came from."""
    scheme = registry.register(Plain())
    assert registry.get("plain") is scheme
    assert registry.schemes() == {"plain": scheme}
    assert scheme.origin == __name__


def test_a_taken_name_is_an_error_that_names_the_owner(registry):
    """Duplicates are refused, never renamed, and the first stays."""
    first = registry.register(Plain())
    with pytest.raises(DuplicateSchemeError, match=f"'plain'.*already.*{__name__}"):
        registry.register(Plain())
    assert registry.get("plain") is first


def test_an_unknown_name_lists_the_known_ones(registry):
    """The error names what is registered."""
    registry.register(Plain())
    registry.register(Other())
    with pytest.raises(UnknownSchemeError, match=r"unknown.*'nix'.*other, plain"):
        registry.get("nix")


def test_unregister_forgets_and_frees_the_name(registry):
    """An unregistered scheme makes no claims and its name can be taken."""
    registry.register(Plain())
    registry.unregister("plain")
    assert registry.schemes() == {}
    registry.register(Plain())
    with pytest.raises(UnknownSchemeError, match="'nix'"):
        registry.unregister("nix")


@pytest.mark.parametrize(
    ("thing", "message"),
    [
        (
            Plain,
            r"got the class Plain, expected an instance; write register\(Plain\(\)\)",
        ),
        (object(), "got object, expected an instance"),
        (type("Bad", (Plain,), {"name": "two words"})(), "name is 'two words'"),
    ],
)
def test_things_that_are_no_schemes_are_refused(registry, thing, message):
    """The message says what was given and what to write."""
    with pytest.raises(SchemeError, match=message):
        registry.register(thing)


def test_a_plugin_registers_its_schemes(registry):
    """hijack_register_schemes gets the registry it was added to."""

    class Plugin:
        @hijack.hookimpl
        def hijack_register_schemes(self, registry):
            registry.register(Plain())
            registry.register(Other())

    registry.add_plugin(Plugin(), "pair")
    assert set(registry.schemes()) == {"plain", "other"}


def test_a_plugin_that_fails_leaves_nothing_behind(registry):
    """Schemes registered before the failure are taken back."""

    class Plugin:
        @hijack.hookimpl
        def hijack_register_schemes(self, registry):
            registry.register(Plain())
            raise OSError("disk on fire")

    with pytest.raises(PluginError, match=r"plugin bad.*OSError: disk on fire"):
        registry.add_plugin(Plugin(), "bad")
    assert registry.schemes() == {}
    registry.add_plugin(types.SimpleNamespace(), "bad")


def test_a_misspelt_hook_is_refused(registry):
    """A hookimpl no spec knows is an error, not silence."""

    class Plugin:
        @hijack.hookimpl
        def hijack_identfy(self, header):
            return []

    with pytest.raises(PluginError, match="hijack_identfy"):
        registry.add_plugin(Plugin(), "typo")


class FakeEntryPoint:
    """An entry point that gives an object, or raises it."""

    group = "hijack"

    def __init__(self, name, thing):
        self.name, self.value, self.thing = name, f"{name}:thing", thing

    def load(self):
        """Give or raise."""
        if isinstance(self.thing, Exception):
            raise self.thing
        return self.thing


@pytest.fixture
def installed(monkeypatch):
    """Pretend that distributions with these entry points are installed."""

    def install(**things):
        points = [FakeEntryPoint(name, thing) for name, thing in things.items()]
        dist = types.SimpleNamespace(entry_points=points)
        monkeypatch.setattr(importlib.metadata, "distributions", lambda: [dist])

    return install


def test_one_broken_entry_point_does_not_stop_the_others(installed, caplog):
    """Each entry point is loaded in its own try; the failure is logged and kept."""
    installed(broken=ImportError("no libfoo"), good=Plain, better=Other())
    registry = hijack.create_registry(entry_points=True)
    with caplog.at_level(logging.WARNING):
        assert set(registry.schemes()) == {"plain", "other"}
    assert "plugin broken: loading: ImportError: no libfoo" in caplog.text
    assert [p.plugin for p in registry.problems] == ["broken"]
    assert registry.get("plain").origin == "entry point good = good:thing"


def test_strict_raises_what_would_be_logged(installed, monkeypatch):
    """HIJACK_STRICT=1 turns a plugin's failure into an error."""
    monkeypatch.setenv("HIJACK_STRICT", "1")
    installed(broken=ImportError("no libfoo"))
    with pytest.raises(PluginError, match="no libfoo"):
        hijack.create_registry(entry_points=True).schemes()


def test_disabled_entry_points_are_not_loaded(installed, monkeypatch):
    """HIJACK_DISABLE names entry points too."""
    monkeypatch.setenv("HIJACK_DISABLE", "comfyui, good")
    installed(good=ImportError("must not be loaded"), better=Other())
    registry = hijack.create_registry(entry_points=True)
    assert set(registry.schemes()) == {"other"}
    assert registry.problems == []


HALVES = {"a.weight": torch.ones(2, 2).half(), "a.unit": torch.ones(1)}


class Unmarked(Plain):
    """One that claims what nobody marked."""

    name = "unmarked"
    claims_unmarked = True


def test_a_disabled_scheme_claims_nothing_but_can_be_used(registry, monkeypatch):
    """HIJACK_DISABLE keeps a scheme from claiming checkpoints."""
    registry.register(Unmarked())
    header = hijack.Header.from_state_dict(HALVES)
    assert set(identify(header, registry).layers) == {"a"}
    monkeypatch.setenv("HIJACK_DISABLE", "unmarked")
    assert identify(header, registry).layers == {}
    qdata, _ = registry.get("unmarked").quantize(torch.ones(2, 2))
    assert qdata.dtype == torch.float16


def test_every_scheme_may_claim_and_a_failing_one_is_passed_over(registry, caplog):
    """identify collects claims; a scheme that raises is logged and the rest counts."""

    class Failing(Plain):
        name = "failing"

        def match(self, header):
            raise ZeroDivisionError("oops")

    registry.register(Failing())
    registry.register(Unmarked())
    found = identify(hijack.Header.from_state_dict(HALVES), registry)
    assert {layer: claim.scheme for layer, claim in found.layers.items()} == {
        "a": "unmarked"
    }
    words = "plugin scheme failing: hijack_identify: ZeroDivisionError: oops"
    assert words in caplog.text


def test_select_scheme_takes_what_fits_the_question(registry):
    """A claim where a file decides, a scheme or its name elsewhere, None otherwise."""
    plain = registry.register(Plain())
    claim = native_claim("a", "plain", ["unit"])
    answers = iter([claim, "plain", plain, None, claim, plain])

    class Plugin:
        @hijack.hookimpl
        def hijack_select_scheme(self):
            return next(answers)

    registry.add_plugin(Plugin(), "chooser")
    layer, header = nn.Linear(2, 2), hijack.Header.from_state_dict(HALVES)
    assert registry.select_scheme(layer, "a.", header) is claim
    assert registry.select_scheme(layer, "a.", None) is plain
    assert registry.select_scheme(layer, "a.", None) is plain
    assert registry.select_scheme(layer, "a.", None) is None
    assert registry.problems == []
    assert registry.select_scheme(layer, "a.", None) is None
    assert registry.select_scheme(layer, "a.", header) is None
    assert [p.error.split(",")[0].split()[2] for p in registry.problems] == [
        "Claim",
        "Plain",
    ]


def test_a_plugin_may_answer_before_the_scheme(registry):
    """create_params and bind_forward take the first plugin that answers."""

    def forward(module, input, weight, bias):
        return input

    tensors = torch.zeros(2, 2), {"unit": torch.ones(1)}

    class Plugin:
        @hijack.hookimpl(tryfirst=True)
        def hijack_create_params(self, module, scheme, prefix, state_dict):
            return tensors

        @hijack.hookimpl(tryfirst=True)
        def hijack_bind_forward(self, module, scheme):
            return forward

    scheme = registry.register(Plain())
    layer = nn.Linear(2, 2)
    assert registry.create_params(layer, scheme) is None
    assert registry.bind_forward(layer, scheme) is None
    registry.add_plugin(Plugin(), "eager")
    assert torch.equal(registry.create_params(layer, scheme)[0], tensors[0])
    assert registry.bind_forward(layer, scheme) is forward


def test_late_plugins_learn_of_hosts_patched_before(registry):
    """hijack_host_patched is historic."""
    seen = []

    class Plugin:
        @hijack.hookimpl
        def hijack_host_patched(self, host, version):
            seen.append((host, version))

    registry.host_patched("toy", "1.2")
    registry.add_plugin(Plugin(), "late")
    assert seen == [("toy", "1.2")]


def test_module_functions_use_the_default_registry():
    """hijack.register, schemes and unregister agree with each other."""
    scheme = hijack.register(Plain())
    try:
        assert hijack.schemes()["plain"] is scheme
    finally:
        assert hijack.unregister("plain") is scheme
    assert "plain" not in hijack.schemes()
