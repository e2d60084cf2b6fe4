"""Patches of other people's functions go in together and come out without a trace."""

from __future__ import annotations

import functools
import importlib
import sys
import types

import pytest
import wrapt

from hijack.errors import PatchError
from hijack.patching import Patch, PatchSet


class Base:
    def method(self, x):
        return ("base", x)

    @staticmethod
    def static(x):
        return ("static", x)

    @classmethod
    def klass(cls, x):
        return (cls.__name__, x)

    @property
    def prop(self):
        return 1


class Derived(Base):
    def method(self, x):
        return ("derived", super().method(x))


class Inheriting(Base):
    pass


@pytest.fixture
def owners():
    """The toy classes; whatever a test does, they must be left as they were."""
    before = [dict(vars(c)) for c in (Base, Derived, Inheriting)]
    yield
    for owner, attributes in zip((Base, Derived, Inheriting), before, strict=True):
        assert dict(vars(owner)) == attributes


@pytest.fixture
def module():
    """A module with one function, as a host has them."""
    found = types.ModuleType("toyhost")
    exec(compile("def f(x):\n    return x", "/toy/host.py", "exec"), found.__dict__)
    found.__file__ = "/toy/host.py"
    return found


def tagged(tag):
    """Make a replacement that calls the original and tags what it gives."""

    def make(original):
        def replacement(*args, **kwargs):
            return (tag, original(*args, **kwargs))

        return replacement

    return make


def test_apply_replaces_and_revert_restores_the_same_object(owners):
    """A patched method calls the replacement; reverting gives back the same object."""
    before = vars(Base)["method"]
    patches = PatchSet([Patch(Base, "method", tagged("new"))])
    patches.apply()
    assert Base().method(1) == ("new", ("base", 1))
    assert patches.applied
    assert patches.revert() == []
    assert vars(Base)["method"] is before
    assert not patches.applied


def test_apply_and_revert_twice_do_nothing_more(owners):
    """Applying an applied set, or reverting a reverted one, changes nothing."""
    patches = PatchSet([Patch(Base, "method", tagged("new"))])
    patches.apply()
    installed = vars(Base)["method"]
    patches.apply()
    assert vars(Base)["method"] is installed
    patches.revert()
    assert patches.revert() == []


def test_a_set_can_be_applied_again(owners):
    """After a revert the same set applies and reverts once more."""
    patches = PatchSet([Patch(Base, "method", tagged("new"))])
    for _ in range(3):
        patches.apply()
        assert Base().method(1) == ("new", ("base", 1))
        patches.revert()
        assert Base().method(1) == ("base", 1)


def test_static_and_class_methods_keep_their_kind(owners):
    """A patched staticmethod is still static, a classmethod still gets its class."""
    patches = PatchSet(
        [Patch(Base, "static", tagged("s")), Patch(Base, "klass", tagged("c"))]
    )
    patches.apply()
    assert Base.static(1) == Base().static(1) == ("s", ("static", 1))
    assert Derived.klass(2) == ("c", ("Derived", 2))
    patches.revert()


def test_base_and_derived_class_are_patched_side_by_side(owners):
    """With both patched, the derived method reaches the patched base method once."""
    patches = PatchSet(
        [Patch(Base, "method", tagged("b")), Patch(Derived, "method", tagged("d"))]
    )
    patches.apply()
    assert Derived().method(1) == ("d", ("derived", ("b", ("base", 1))))
    assert Base().method(1) == ("b", ("base", 1))
    patches.revert()


def test_an_inherited_attribute_is_refused_with_its_definer(owners):
    """Patching a class that only inherits a method names the class that defines it."""
    patches = PatchSet([Patch(Inheriting, "method", tagged("new"))])
    with pytest.raises(PatchError, match=r"inherited; patch .*Base\.method"):
        patches.apply()


def test_define_adds_an_override_and_deletes_it(owners):
    """With define=True an override is added to one class, and later deleted."""
    patches = PatchSet([Patch(Inheriting, "method", tagged("new"), define=True)])
    patches.apply()
    assert Inheriting().method(1) == ("new", ("base", 1))
    assert Base().method(1) == ("base", 1)
    patches.revert()
    assert "method" not in vars(Inheriting)


@pytest.mark.parametrize(
    ("attribute", "message"), [("nowhere", "does not exist"), ("prop", "is a property")]
)
def test_what_cannot_be_patched_is_named(owners, attribute, message):
    """A missing attribute and a property are refused by name."""
    with pytest.raises(PatchError, match=rf"Base\.{attribute}: {message}"):
        PatchSet([Patch(Base, attribute, tagged("new"))]).apply()


def test_failure_half_way_rolls_back(owners):
    """If one patch fails, those before it are taken out again."""

    def fail(original):
        raise RuntimeError("no luck")

    patches = PatchSet(
        [
            Patch(Base, "method", tagged("new")),
            Patch(Base, "static", fail),
            Patch(Base, "klass", tagged("new")),
        ]
    )
    with pytest.raises(PatchError, match=r"Base\.static: cannot be .*no luck"):
        patches.apply()
    assert not patches.applied
    assert Base().method(1) == ("base", 1)


def test_patches_revert_in_reverse_order(owners):
    """Two patches of one attribute nest, and unwind to the original object."""
    patches = PatchSet(
        [Patch(Base, "method", tagged("in")), Patch(Base, "method", tagged("out"))]
    )
    patches.apply()
    assert Base().method(1) == ("out", ("in", ("base", 1)))
    patches.revert()


def test_a_foreign_patch_over_ours_is_left_alone_and_named(module):
    """Under somebody else's patch ours goes pass-through; revert says whose it is."""
    original = module.f
    patches = PatchSet([Patch(module, "f", tagged("ours"))])
    patches.apply()
    ours = module.f

    def theirs(x):
        return ("theirs", ours(x))

    module.f = theirs
    assert module.f(1) == ("theirs", ("ours", 1))
    (foreign,) = patches.revert()
    assert foreign.over
    assert foreign.where == "toyhost.f"
    assert "theirs" in foreign.who
    assert __file__ in foreign.who
    assert module.f is theirs
    assert module.f(1) == ("theirs", 1)

    module.f = ours  # they take theirs out; our switched-off gate is left
    patches.apply()
    assert module.f(1) == ("ours", 1)
    patches.revert()
    assert module.f is original


def test_a_gate_left_behind_is_cleaned_up_later(module):
    """Once the foreign patch is gone, the next revert restores the original."""
    original = module.f
    patches = PatchSet([Patch(module, "f", tagged("ours"))])
    patches.apply()
    ours = module.f
    module.f = lambda x: ours(x)
    patches.revert()
    module.f = ours
    patches.revert()
    assert module.f is original


def test_a_gate_left_behind_is_used_again(module):
    """However often another patch comes and goes, ours lies over the original once."""
    original = module.f
    patches = PatchSet([Patch(module, "f", tagged("ours"))])
    patches.apply()
    ours = module.f
    for _ in range(3):
        module.f = lambda x: ours(x)
        patches.revert()
        module.f = ours
        patches.apply()
        assert module.f is ours
        assert module.f(1) == ("ours", 1)
    patches.revert()
    assert module.f is original
    assert not patches._buried


def test_applying_over_a_foreign_patch_over_ours_does_not_double(module):
    """Patching again over a foreign patch runs our replacement once, not twice."""
    patches = PatchSet([Patch(module, "f", tagged("ours"))])
    patches.apply()
    ours = module.f
    module.f = lambda x: ("theirs", ours(x))
    patches.revert()
    patches.apply()
    assert module.f(1) == ("ours", ("theirs", 1))
    patches.revert()
    assert module.f(1) == ("theirs", 1)


def test_a_foreign_patch_under_ours_is_named(module):
    """A function that did not come from the owner's package is reported at apply."""
    original = module.f

    def theirs(x):
        return ("theirs", original(x))

    module.f = theirs
    patches = PatchSet([Patch(module, "f", tagged("ours"))])
    patches.apply()
    (foreign,) = patches.foreign()
    assert not foreign.over
    assert "theirs" in str(foreign)
    assert "before us" in str(foreign)
    assert module.f(1) == ("ours", ("theirs", 1))
    assert patches.revert() == []
    assert module.f is theirs


def test_a_foreign_patch_found_first_is_told_after_another_was_put_back(module):
    """Healing one patch forgets nothing about the others."""
    vars(module)["g"] = own = types.FunctionType(module.f.__code__, {}, "g")
    module.f = lambda x: ("theirs", x)
    patches = PatchSet([Patch(module, name, tagged("ours")) for name in ("f", "g")])
    patches.apply()
    before = [str(foreign) for foreign in patches.foreign()]
    assert any("toyhost.f" in text for text in before)
    module.g = own  # somebody restores it
    patches.apply()
    assert module.g(1) == ("ours", 1)
    assert [str(foreign) for foreign in patches.foreign()] == before
    patches.revert()


def test_a_wrapt_wrapper_is_seen_through(module):
    """A foreign patch made with wrapt is told by its wrapper's file, not the host's."""

    @wrapt.decorator
    def wrapper(wrapped, instance, args, kwargs):
        return wrapped(*args, **kwargs)

    module.f = wrapper(module.f)
    patches = PatchSet([Patch(module, "f", tagged("ours"))])
    patches.apply()
    (foreign,) = patches.foreign()
    assert __file__ in foreign.who
    patches.revert()


def test_an_unpatched_host_has_no_foreign_patches(module):
    """The owner's own function is not mistaken for a patch."""
    patches = PatchSet([Patch(module, "f", tagged("ours"))])
    patches.apply()
    assert patches.foreign() == []
    patches.revert()


def test_a_deleted_attribute_is_noticed(module):
    """If somebody deletes a patched function, revert says so and leaves it deleted."""
    patches = PatchSet([Patch(module, "f", tagged("ours"))])
    patches.apply()
    del module.f
    (foreign,) = patches.revert()
    assert "deleted" in foreign.who
    assert not hasattr(module, "f")


# -- what others do to our patches -----------------------------------------------------


def test_an_original_that_somebody_restored_is_missed_and_put_back(owners):
    """What is not in place any more is told, and applying again puts it there once."""
    original = Base.method
    patches = PatchSet([Patch(Base, "method", tagged("ours"))])
    patches.apply()
    assert patches.gone() == []
    Base.method = original
    assert patches.gone() == [f"{__name__}.Base.method"]
    assert patches.foreign() == []
    assert Base().method(1) == ("base", 1)
    patches.apply()
    assert patches.gone() == []
    assert Base().method(1) == ("ours", ("base", 1))
    patches.revert()
    assert Base.method is original


@pytest.fixture
def reloadable(tmp_path, monkeypatch):
    """A module on disk with a function and a class."""
    (tmp_path / "reloaded_host.py").write_text(
        "def f(x):\n    return x\n\nclass Box:\n    def g(self, x):\n        return x\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    yield importlib.import_module("reloaded_host")
    del sys.modules["reloaded_host"]


def test_a_reloaded_module_is_missed_and_patched_again(reloadable):
    """Reloading replaces functions and classes; applying again patches the new ones."""
    patches = PatchSet(
        [
            Patch(reloadable, "f", tagged("ours")),
            Patch(reloadable.Box, "g", tagged("ours")),
        ]
    )
    patches.apply()
    old = reloadable.Box
    importlib.reload(reloadable)
    assert patches.gone() == ["reloaded_host.f", "reloaded_host.Box.g"]
    patches.apply()
    assert patches.gone() == []
    assert reloadable.f(1) == reloadable.Box().g(1) == ("ours", 1)
    assert old().g(1) == 1
    patches.revert()
    assert reloadable.f(1) == reloadable.Box().g(1) == 1


def wrapped_plainly(ours):
    return lambda x: ("theirs", ours(x))


def wrapped_by_functools(ours):
    @functools.wraps(ours)
    def theirs(x):
        return ("theirs", ours(x))

    return theirs


def wrapped_by_partial(ours):
    return functools.partial(lambda inner, x: ("theirs", inner(x)), ours)


def wrapped_by_default(ours):
    def theirs(x, inner=ours):
        return ("theirs", inner(x))

    return theirs


def wrapped_in_two(ours):
    return wrapped_plainly(wrapped_by_functools(ours))


@pytest.mark.parametrize(
    "wrap",
    [
        wrapped_plainly,
        wrapped_by_functools,
        wrapped_by_partial,
        wrapped_by_default,
        wrapped_in_two,
    ],
)
def test_a_wrapper_over_ours_is_not_missed(module, wrap):
    """A function that calls ours leaves it at work; nothing is put over it."""
    patches = PatchSet([Patch(module, "f", tagged("ours"))])
    patches.apply()
    theirs = module.f = wrap(module.f)
    assert patches.gone() == []
    patches.apply()
    assert module.f is theirs
    patches.revert()


def test_a_wrapper_from_the_owners_own_file_is_not_missed(module):
    """The host itself may wrap what we patched, as its own later modules do."""
    patches = PatchSet([Patch(module, "f", tagged("ours"))])
    patches.apply()
    code = "def make(ours):\n    return lambda x: ours(x)"
    names = {}
    exec(compile(code, "/toy/host.py", "exec"), names)
    module.f = names["make"](module.f)
    assert patches.gone() == []
    assert module.f(1) == ("ours", 1)


def test_a_class_that_somebody_derived_and_put_there_keeps_ours(reloadable):
    """A foreign subclass in the owner's place inherits our patch: nothing is missed."""
    patches = PatchSet([Patch(reloadable.Box, "g", tagged("ours"))])
    patches.apply()
    reloadable.Box = type("Box", (reloadable.Box,), {"__module__": __name__})
    assert patches.gone() == []
    assert reloadable.Box().g(1) == ("ours", 1)
    patches.revert()


def test_healing_that_fails_leaves_nothing(owners):
    """If a function cannot be patched again, every patch is taken out."""
    refused = []

    def make(original):
        if refused:
            raise RuntimeError("no luck")
        return lambda *args: ("ours", original(*args))

    original = Base.method
    patches = PatchSet(
        [Patch(Base, "method", make), Patch(Base, "static", tagged("ours"))]
    )
    patches.apply()
    Base.method = original
    refused.append(True)
    with pytest.raises(PatchError, match="no luck"):
        patches.apply()
    assert not patches.applied
    assert Base.static(1) == ("static", 1)


@pytest.mark.parametrize("interrupted", [KeyboardInterrupt, SystemExit])
def test_an_interruption_leaves_nothing(owners, interrupted):
    """Stopped in the middle, patching takes out what it had put in, and says why."""

    def stop(original):
        raise interrupted

    patches = PatchSet(
        [Patch(Base, "method", tagged("ours")), Patch(Base, "static", stop)]
    )
    with pytest.raises(interrupted):
        patches.apply()
    assert not patches.applied
    assert Base().method(1) == ("base", 1)
    assert patches.foreign() == []


def test_an_interruption_behind_the_last_step_leaves_nothing(module, monkeypatch):
    """Stopped right after a function was replaced, it is restored."""
    original = module.f

    class Host(types.ModuleType):
        def __setattr__(self, name, value):
            super().__setattr__(name, value)
            if name == "f" and value is not original:
                raise KeyboardInterrupt

    host = Host("toyhost")
    vars(host).update(vars(module))
    patches = PatchSet([Patch(host, "f", tagged("ours"))])
    with pytest.raises(KeyboardInterrupt):
        patches.apply()
    assert host.f is original
    assert not patches.applied


@pytest.mark.parametrize("theirs", [len, functools.partial(len), type("C", (), {})])
def test_a_foreign_function_without_a_file_is_named(module, theirs):
    """Built-ins and callable objects that replaced a function are told by module."""
    module.f = theirs
    patches = PatchSet([Patch(module, "f", tagged("ours"))])
    patches.apply()
    (foreign,) = patches.foreign()
    kind = theirs if hasattr(theirs, "__module__") else type(theirs)
    assert foreign.who.startswith(f"{kind.__module__}.")
    assert foreign.who.endswith("(no file)")
    patches.revert()


def test_a_hosts_own_function_without_a_file_is_not_foreign(module):
    """A compiled function of the host's package is the host's own."""

    class Compiled:
        def __call__(self, x):
            return x

    Compiled.__module__ = "toyhost.compiled"
    module.f = Compiled()
    patches = PatchSet([Patch(module, "f", tagged("ours"))])
    patches.apply()
    assert patches.foreign() == []
    patches.revert()


def test_a_function_that_was_imported_by_name_is_not_foreign(module):
    """A copy of another module's function is patched without a word about it."""
    module.copy = len
    patches = PatchSet([Patch(module, "copy", tagged("ours"), copied=True)])
    patches.apply()
    assert patches.foreign() == []
    assert module.copy("ab") == ("ours", 2)
    patches.revert()
    assert module.copy is len
