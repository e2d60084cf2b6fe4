"""Plugins that fail: the operation goes on without them, or nothing has changed."""

import copy
import functools
import logging
import threading
import time

import pytest
import torch
from torch import nn

import hijack
from hijack import cli
from hijack.errors import PluginError
from hijack.formats.dialect import native_claim

ASKED = ("identify", "select_scheme", "create_params", "bind_forward", "init")


class Halves(hijack.Scheme):
    """Half the weight, and what to multiply it with."""

    name = "halves"
    targets = (nn.Linear, nn.Conv1d)

    def quantize(self, weight, *, level=2.0):
        """Divide."""
        return (weight / level).half(), {"unit": torch.full((1,), level)}

    def dequantize(self, qdata, params, dtype):
        """Multiply."""
        return (qdata.float() * params["unit"]).to(dtype)


class Thirds(Halves):
    """Another one."""

    name = "thirds"


def plugin(hook, answer):
    """A plugin with one hook that takes no arguments."""

    class Plugin:
        pass

    def function(self):
        return answer()

    setattr(
        Plugin, f"hijack_{hook}", hijack.hookimpl(function, specname=f"hijack_{hook}")
    )
    return Plugin()


@pytest.fixture
def registry():
    """A registry with two schemes, in force."""
    registry = hijack.create_registry()
    registry.register(Halves())
    registry.register(Thirds())
    with hijack.use_registry(registry):
        yield registry


def make():
    """The same layer each time."""
    torch.manual_seed(0)
    return nn.Linear(6, 4)


@pytest.fixture
def saved(registry, tmp_path):
    """A file with one quantized layer."""
    path = tmp_path / "model.safetensors"
    hijack.save(nn.Sequential(hijack.wrap_module(make(), "halves")), path)
    return path


def snapshot(module):
    """Everything that must be as it was: objects, classes and bits."""
    return [
        (
            name,
            type(part),
            dict(part.__dict__, _parameters=None),
            {
                k: (id(p), None if p is None else p.data.clone())
                for k, p in part._parameters.items()
            },
        )
        for name, part in module.named_modules()
    ]


def same(one, other):
    """Whether two snapshots are equal, tensors bit for bit."""
    for (name, kind, attributes, tensors), second in zip(one, other, strict=True):
        if (name, kind, attributes) != second[:3] or tensors.keys() != second[3].keys():
            return False
        for key, (number, tensor) in tensors.items():
            if number != second[3][key][0] or not torch.equal(
                tensor, second[3][key][1]
            ):
                return False
    return True


def perform(hook, saved, module):
    """What asks a hook; gives the weight that came of it."""
    if hook == "identify":
        hijack.load(module, saved)
    else:
        hijack.wrap_model(module, "halves")
    return module[0].weight


def raising(error):
    """An answer that is an error."""

    def answer():
        raise error

    return answer


class UnspeakableError(Exception):
    """An error that cannot be shown."""

    def __str__(self):
        raise RuntimeError("no words")


ERRORS = [
    ValueError("boom"),
    SystemExit(3),
    RecursionError("deep"),
    UnspeakableError(),
    hijack.HijackError("boom"),
]

CLAIM = native_claim("0", "halves", ["unit"])


async def coroutine(module, input, weight, bias):
    """No forward: it gives something to wait for."""
    return input


class Unhashable:
    """Something that can be called, and cannot be shared."""

    __hash__ = None

    def __call__(self, module, input, weight, bias):
        return input


GARBAGE = {
    "identify": [
        1,
        "text",
        {"0": CLAIM},
        [None],
        [CLAIM, "0"],
        [native_claim("0", "nobody", ["unit"])],
        [native_claim("0", "halves", ["lost"])],
        [hijack.Claim("0", "halves", "hijack", {})],
        [hijack.Claim("0", "halves", "hijack", None)],
        [hijack.Claim(None, "halves", "hijack", CLAIM.keys)],
        [hijack.Claim("0", "halves", "hijack", CLAIM.keys, certainty="sure")],
    ],
    "select_scheme": [1, "nobody", Halves, CLAIM, [], nn.Linear(1, 1), torch.zeros(2)],
    "create_params": [
        1,
        torch.zeros(4, 6),
        (torch.zeros(4, 6),),
        (torch.zeros(4, 6), [torch.zeros(1)]),
        (torch.zeros(4, 6), {"unit": 2.0}),
        (torch.zeros(4, 6), {"weight": torch.zeros(1)}),
        (torch.zeros(4, 6), {1: torch.zeros(1)}),
        (torch.zeros(4, 6), {}),
        (torch.zeros(3, 6), {"unit": torch.ones(1)}),
        (torch.zeros(4), {"unit": torch.ones(1)}),
        (torch.zeros(4, 6, device="meta"), {"unit": torch.ones(1)}),
    ],
    "bind_forward": [
        1,
        "forward",
        nn.Linear(6, 4),
        nn.Linear,
        lambda module, input: input,
        lambda module, input, weight, bias, more: input,
        coroutine,
        Unhashable(),
    ],
}

FAILURES = [(hook, raising(error)) for hook in ASKED for error in ERRORS]
FAILURES += [
    (hook, lambda a=a: a) for hook, answers in GARBAGE.items() for a in answers
]


@pytest.mark.parametrize(("hook", "answer"), FAILURES)
def test_a_failing_hook_is_passed_over(registry, saved, hook, answer, caplog, capsys):
    """The result is as without the plugin; a line, a problem and the doctor say so."""
    expected = perform(hook, saved, nn.Sequential(make()))
    registry.add_plugin(plugin(hook, answer), "bad")
    caplog.clear()
    with caplog.at_level(logging.INFO):
        weight = perform(hook, saved, nn.Sequential(make()))
    assert weight.scheme is expected.scheme
    for name, tensor in expected.plain_tensors().items():
        assert torch.equal(weight.plain_tensors()[name], tensor)
    assert torch.equal(weight.dense(), expected.dense())
    (problem,) = registry.problems
    assert problem.plugin == "bad"
    assert problem.doing.startswith(f"hijack_{hook}")
    (record,) = caplog.records
    line = record.getMessage()
    assert line == f"hijack: {problem}"
    assert "\n" not in line
    assert cli.main(["doctor"]) == 1
    assert str(problem) in capsys.readouterr().out


@pytest.mark.parametrize(("hook", "answer"), FAILURES)
def test_strict_raises_and_changes_nothing(registry, saved, hook, answer, monkeypatch):
    """The error names plugin, hook, layer or class, and scheme; nothing changes."""
    registry.add_plugin(plugin(hook, answer), "bad")
    monkeypatch.setenv("HIJACK_STRICT", "1")
    model = nn.Sequential(make(), nn.Conv1d(2, 2, 1))
    before = snapshot(model)
    with pytest.raises(PluginError, match=rf"^plugin bad: hijack_{hook}") as refused:
        perform(hook, saved, model)
    assert same(snapshot(model), before)
    text = str(refused.value)
    if hook != "identify":
        assert "Linear" in text
    if hook in ("create_params", "bind_forward", "init"):
        assert "of scheme halves" in text
    if hook in ("select_scheme", "create_params"):
        assert "for 0 (Linear)" in text


@pytest.mark.parametrize("name", ["reset_parameters", "load_state_dict", "deepcopy"])
def test_strict_changes_nothing_of_a_quantized_module(registry, name, monkeypatch):
    """Whatever asks hooks of a module that is quantized leaves it as it was."""
    layer = hijack.wrap_module(make(), "halves")
    state = hijack.wrap_module(nn.Linear(6, 4), "halves").state_dict()
    hook = "bind_forward" if name == "deepcopy" else "create_params"
    registry.add_plugin(plugin(hook, raising(ValueError("boom"))), "bad")
    monkeypatch.setenv("HIJACK_STRICT", "1")
    actions = {
        "reset_parameters": layer.reset_parameters,
        "load_state_dict": functools.partial(layer.load_state_dict, state),
        "deepcopy": functools.partial(copy.deepcopy, layer),
    }
    before = snapshot(layer)
    with pytest.raises(
        PluginError, match=rf"plugin bad: hijack_{hook} .*Linear.*halves"
    ):
        actions[name]()
    assert same(snapshot(layer), before)


def test_strict_takes_back_what_a_file_changed(registry, saved, monkeypatch):
    """hijack_init comes last, when other modules have changed already."""
    registry.add_plugin(plugin("init", raising(ValueError("boom"))), "bad")
    monkeypatch.setenv("HIJACK_STRICT", "1")
    model = nn.Sequential(make())
    before = snapshot(model)
    with pytest.raises(
        PluginError, match="plugin bad: hijack_init for a Linear of sch"
    ):
        hijack.load(model, saved)
    assert same(snapshot(model), before)


@pytest.mark.parametrize("hook", ASKED)
def test_a_failure_is_logged_once(registry, saved, hook, caplog):
    """Not once for each of many layers."""
    registry.add_plugin(plugin(hook, raising(ValueError("boom"))), "bad")
    model = nn.Sequential(*(make() for _ in range(5)))
    registry.select_scheme(model[0], "", None)
    caplog.clear()
    registry.problems.clear()
    for layer in model:
        perform(hook, saved, nn.Sequential(layer))
    assert len(registry.problems) == len(caplog.records) == 1


def test_hosts_learn_nothing_of_a_failing_plugin(registry, monkeypatch):
    """hijack_host_patched: now, and for a plugin that comes late."""
    bad = plugin("host_patched", raising(ValueError("boom")))
    registry.add_plugin(bad, "bad")
    registry.host_patched("toy", "1.0")
    assert [p.doing for p in registry.problems] == ["hijack_host_patched"]
    registry.add_plugin(bad, "late")
    assert [p.plugin for p in registry.problems] == ["bad", "late"]
    monkeypatch.setenv("HIJACK_STRICT", "1")
    with pytest.raises(PluginError, match="plugin late: hijack_host_patched: ValueErr"):
        registry.host_patched("toy", "2.0")
    with pytest.raises(PluginError, match=r"plugin later: cannot be added.*boom"):
        registry.add_plugin(bad, "later")
    seen = []
    registry.remove_plugin("bad")
    registry.remove_plugin("late")
    registry.add_plugin(plugin("host_patched", lambda: seen.append(1)), "good")
    assert seen == [1, 1]


@pytest.mark.parametrize("error", ERRORS)
def test_a_plugin_that_cannot_register_leaves_nothing(registry, error):
    """hijack_register_schemes: its schemes and hooks go, and its name is free."""

    class Plugin:
        @hijack.hookimpl
        def hijack_register_schemes(self, registry):
            registry.register(type("Fourths", (Halves,), {"name": "fourths"})())
            raise error

        @hijack.hookimpl
        def hijack_init(self):
            raise AssertionError("is asked")

    with pytest.raises(PluginError, match=r"^plugin bad: cannot be added: "):
        registry.add_plugin(Plugin(), "bad")
    assert set(registry.schemes()) == {"halves", "thirds"}
    hijack.wrap_module(make(), "halves")
    assert registry.problems == []
    registry.add_plugin(object(), "bad")


def test_a_name_that_is_taken_is_refused(registry):
    """The plugin that has it stays."""
    seen = []
    registry.add_plugin(plugin("init", lambda: seen.append(1)), "one")
    with pytest.raises(PluginError, match="'one' is taken by another plugin"):
        registry.add_plugin(plugin("init", lambda: seen.append(2)), "one")
    hijack.wrap_module(make(), "halves")
    assert seen == [1]


@pytest.mark.parametrize(
    ("name", "function", "words"),
    [
        ("hijack_init", lambda self, modul: None, "has no argument modul; expected"),
        ("hijack_ini", lambda self: None, "unknown hook hijack_ini; expected one of"),
    ],
)
def test_hooks_that_cannot_be_asked_are_refused(registry, name, function, words):
    """A misspelt hook or argument is an error at once, also of a scheme."""
    namespace = {name: hijack.hookimpl(function, specname=name)}
    with pytest.raises(PluginError, match=words):
        registry.add_plugin(type("Plugin", (), namespace)(), "bad")
    scheme = type("Odd", (Halves,), {"name": "odd", **namespace})()
    with pytest.raises(PluginError, match=words):
        registry.register(scheme)
    assert "odd" not in registry.schemes()


def test_hooks_that_wrap_others_are_refused(registry):
    """They would stand outside what guards each hook."""

    class Plugin:
        @hijack.hookimpl(wrapper=True)
        def hijack_identify(self, header):
            return (yield)

    with pytest.raises(PluginError, match="hijack_identify wraps the answers of other"):
        registry.add_plugin(Plugin(), "bad")


# -- arguments that are left out -------------------------------------------------------


ARGUMENTS = {
    "identify": ("header",),
    "select_scheme": ("module", "prefix", "header"),
    "create_params": ("module", "scheme", "prefix", "state_dict"),
    "bind_forward": ("module", "scheme"),
    "init": ("module", "scheme"),
    "host_patched": ("host", "version"),
    "register_schemes": ("registry",),
}


def subsets():
    """Every hook with each set of its arguments, in another order than its own."""
    for hook, names in ARGUMENTS.items():
        for bits in range(2 ** len(names)):
            chosen = [name for i, name in enumerate(names) if bits >> i & 1]
            yield pytest.param(hook, chosen[::-1], id=f"{hook}-{'-'.join(chosen)}")


@pytest.mark.parametrize(("hook", "names"), list(subsets()))
def test_arguments_may_be_left_out(registry, saved, hook, names):
    """A hook gets by name what it asks for, and nothing else."""
    seen = []
    scope = {"seen": seen}
    arguments = ", ".join(["self", *names])
    pairs = ", ".join(f"{name}={name}" for name in names)
    exec(f"def function({arguments}):\n    seen.append(dict({pairs}))", scope)
    full = f"hijack_{hook}"
    owner = type(
        "Plugin", (), {full: hijack.hookimpl(scope["function"], specname=full)}
    )
    registry.add_plugin(owner(), "brief")
    registry.host_patched("toy", "1.0")
    layer = make()
    if hook not in ("register_schemes", "host_patched"):
        model = nn.Sequential(layer)
        perform(hook, saved, model)
    (given,) = seen
    assert set(given) == set(names)
    known = {"prefix": "0.", "host": "toy", "version": "1.0", "registry": registry}
    known |= {"module": layer, "scheme": registry.get("halves"), "state_dict": None}
    if hook == "identify":
        assert all(isinstance(header, hijack.Header) for header in given.values())
    else:
        assert given == {name: known.get(name) for name in names}
    assert registry.problems == []


def test_arguments_with_defaults_are_left_alone(registry):
    """As pluggy has it: they are the plugin's own."""
    seen = []

    class Plugin:
        @hijack.hookimpl
        def hijack_init(self, module, scheme=None, *, more=3):
            seen.append((scheme, more))

    registry.add_plugin(Plugin(), "own")
    hijack.wrap_module(make(), "halves")
    assert seen == [(None, 3)]


# -- slow and re-entrant ---------------------------------------------------------------


@pytest.mark.parametrize("hook", ASKED)
def test_a_slow_hook_holds_up_nobody_else(registry, saved, hook):
    """While one thread waits for a plugin, another one wraps and registers."""
    entered, leave = threading.Event(), threading.Event()
    slow = threading.current_thread().name

    def wait():
        if threading.current_thread().name == slow:
            return
        entered.set()
        assert leave.wait(30)

    registry.add_plugin(plugin(hook, wait), "slow")
    done = []

    def work():
        with hijack.use_registry(registry):
            done.append(perform(hook, saved, nn.Sequential(make())))

    worker = threading.Thread(target=work)
    worker.start()
    assert entered.wait(30)
    start = time.monotonic()
    perform(hook, saved, nn.Sequential(make()))
    registry.register(type("Fourths", (Halves,), {"name": "fourths"})())
    registry.add_plugin(object(), "meanwhile")
    took = time.monotonic() - start
    assert not done
    leave.set()
    worker.join(30)
    assert done[0].scheme.name == "halves"
    assert took < 20
    assert registry.problems == []


@pytest.mark.parametrize("hook", ASKED)
def test_a_hook_may_use_hijack(registry, saved, hook, monkeypatch):
    """It is not asked about what it does itself; others are."""
    monkeypatch.setenv("HIJACK_STRICT", "1")
    asked, others = [], []

    def busy():
        asked.append(1)
        assert set(hijack.schemes()) == {"halves", "thirds"}
        hijack.identify(saved)
        inner = nn.Sequential(nn.Linear(6, 4))
        hijack.load(inner, saved)
        copy.deepcopy(inner)
        hijack.wrap_model(nn.Sequential(nn.Linear(3, 3)), "thirds")
        with hijack.building("halves"):
            nn.Linear(2, 2)

    registry.add_plugin(plugin(hook, busy), "busy")
    registry.add_plugin(plugin(hook, lambda: others.append(1)), "other")
    weight = perform(hook, saved, nn.Sequential(make()))
    assert weight.scheme.name == "halves"
    assert asked == [1]
    assert len(others) > 1
    perform(hook, saved, nn.Sequential(make()))
    assert asked == [1, 1]


def test_a_plugin_may_register_more_while_it_is_added(registry):
    """hijack_register_schemes may add plugins and look at what is there."""

    class Plugin:
        @hijack.hookimpl
        def hijack_register_schemes(self, registry):
            assert "halves" in registry.schemes()
            registry.add_plugin(object(), "inner")
            registry.register(type("Fourths", (Halves,), {"name": "fourths"})())

    registry.add_plugin(Plugin(), "outer")
    assert "fourths" in registry.schemes()


# -- schemes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "bind",
    [*map(raising, ERRORS), *(lambda a=a: a for a in GARBAGE["bind_forward"])],
)
def test_a_scheme_without_a_usable_forward(registry, bind, monkeypatch, caplog):
    """The default computes the same; strict names layer and scheme."""

    class Bound(Halves):
        name = "bound"

        def bind_forward(self, module):
            return bind()

    scheme = registry.register(Bound())
    layer, expected = make(), hijack.wrap_module(make(), "halves")
    before = snapshot(layer)
    with monkeypatch.context() as context:
        context.setenv("HIJACK_STRICT", "1")
        words = "^plugin scheme bound: hijack_bind_forward for a Linear of scheme bound"
        with pytest.raises(PluginError, match=words):
            hijack.wrap_module(layer, scheme)
        model = nn.Sequential(layer, nn.Conv1d(2, 2, 1))
        with pytest.raises(PluginError, match=words):
            hijack.wrap_model(model, scheme)
    assert same(snapshot(layer), before)
    assert type(model[1]) is nn.Conv1d
    hijack.wrap_module(layer, scheme)
    x = torch.randn(2, 6)
    assert torch.equal(layer(x), expected(x))
    assert len(registry.problems) == 1
    assert len(caplog.records) == 1


def test_a_scheme_whose_forward_wraps_modules_is_not_asked_again(registry):
    """A scheme may use hijack to find its forward."""
    asked = []

    class Nested(Halves):
        name = "nested"

        def bind_forward(self, module):
            asked.append(1)
            hijack.wrap_module(nn.Linear(2, 2), self)

    hijack.wrap_module(make(), registry.register(Nested()))
    assert asked == [1]
    assert registry.problems == []


class Declining(Halves):
    """One that says what it declines in a way that a test chooses."""

    name = "declining"
    reason = None

    def declines(self, shape, **options):
        """Whatever the test wants."""
        if isinstance(self.reason, Exception):
            raise self.reason
        return self.reason


@pytest.mark.parametrize("reason", [ValueError("boom"), True, False, 3, [""]])
def test_a_scheme_that_declines_in_no_words_is_named(registry, reason):
    """The model is as it was."""
    scheme = Declining()
    scheme.reason = reason
    model = nn.Sequential(make())
    before = snapshot(model)
    with pytest.raises(hijack.HijackError, match="scheme declining: declines"):
        hijack.wrap_model(model, scheme)
    assert same(snapshot(model), before)


def test_a_plugin_may_choose_another_scheme(registry):
    """Options that only the scheme asked for has do not go to the other."""

    class Plain(Halves):
        name = "plain"

        def quantize(self, weight):
            return super().quantize(weight)

    registry.register(Plain())
    registry.add_plugin(plugin("select_scheme", lambda: "plain"), "chooser")
    layer = hijack.wrap_module(make(), "halves", level=4.0)
    assert layer.weight.scheme.name == "plain"
    assert layer.weight.options == {}
    model = nn.Sequential(make())
    hijack.wrap_model(model, "halves", level=4.0)
    with hijack.building("halves", level=4.0):
        built = nn.Linear(2, 2)
    for weight in (model[0].weight, built.weight):
        assert (weight.scheme.name, weight.options) == ("plain", {})
    with pytest.raises(hijack.HijackError, match=r"has no option 'levl'.*among level"):
        hijack.wrap_module(make(), "halves", levl=4.0)
