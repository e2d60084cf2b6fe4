"""What the kit for hosts does in a process of its own, where nothing is imported yet.

``python -m hijack.testing.host_process CHECK`` reads a `Subject` from the standard
input. Every step of a check runs in a process forked from one that has imported what
the host needs, so that each starts from a host that nobody has touched, and soon.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import importlib.abc
import itertools
import json
import os
import runpy
import sys
import traceback
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import wrapt
from torch.utils._pytree import tree_flatten

import hijack
import hijack.hosts
from hijack.hosts.adapter import Probe
from hijack.hosts.manager import host_adapter
from hijack.patching import Entry, Patch, name_of

#: Steps are letters: i imports the host, p patches it, u takes the patches out.
ORDERS = (
    *map("".join, itertools.permutations("ipu")),
    *("ipupu", "pipuu", "uipp", "ppiuu", "ipuip"),
)


@dataclasses.dataclass(frozen=True)
class Subject:
    """The host that is tested.

    Attributes:
        adapter: dotted name of the adapter, a module; ``module:name`` for an object.
        setup: file of code to run before anything else, such as to find the host.
        use: file of code that uses the host with dense weights; leaves ``result``.
    """

    adapter: str
    setup: str
    use: str

    @functools.cached_property
    def host(self) -> Any:
        """The adapter, which hijack knows."""
        module, _, attribute = self.adapter.partition(":")
        adapter = importlib.import_module(module)
        if attribute:
            adapter = getattr(adapter, attribute)
        if host_adapter(adapter.NAME) is None:
            hijack.hosts.add_host(adapter)
        return adapter

    def load(self) -> None:
        """Import the host."""
        importlib.import_module(self.host.MODULE)

    def contents(self) -> Contents:
        """What the patches are to change, and all that is in it now."""
        found: dict[str, Mapping[Any, Any]] = {}
        for patch in self.host.patches():
            name, owner = name_of(patch.owner), patch.owner
            if isinstance(patch, Entry):
                name += f".{patch.attribute}"
                found[name] = getattr(owner, patch.attribute)
            else:
                found[name] = vars(owner)
        return Contents(found, {name: dict(now) for name, now in found.items()})


@dataclasses.dataclass(frozen=True)
class Contents:
    """What is in modules, classes and tables.

    Attributes:
        owners: name to what is in each now.
        before: name to what was in each.
    """

    owners: Mapping[str, Mapping[Any, Any]]
    before: Mapping[str, Mapping[Any, Any]]

    def changes(self) -> set[str]:
        """Names of other objects than before; imports set modules, which are none."""
        return {
            f"{owner}.{name}"
            for owner, now in self.owners.items()
            for name in {*now, *self.before[owner]}
            if now.get(name) is not self.before[owner].get(name)
            and not isinstance(now.get(name), types.ModuleType)
        }


# -- checks ----------------------------------------------------------------------------


def orders(subject: Subject) -> Iterator[tuple[str, Callable[[], None]]]:
    """Any order of importing, patching and taking out leaves the host as it was."""
    for order in ORDERS:
        yield order, functools.partial(_order, subject, order)


def _order(subject: Subject, order: str) -> None:
    name, module, before = subject.host.NAME, subject.host.MODULE, list[Contents]()
    # registered before hijack registers its own, so that it sees the host untouched
    wrapt.register_post_import_hook(lambda _: before.append(subject.contents()), module)
    armed = False
    for step in order:
        if step == "i":
            subject.load()
        elif step == "p":
            hijack.hosts.patch(name)
        else:
            hijack.hosts.unpatch(name)
        armed = armed if step == "i" else step == "p"
        status = hijack.hosts.status()[name]
        assert status.patched == (armed and module in sys.modules), f"{step}: {status}"
    if armed:
        assert before[0].changes(), "nothing is patched"
        hijack.hosts.unpatch(name)
    assert not before[0].changes()


def half_imported(subject: Subject) -> Iterator[tuple[str, Callable[[], None]]]:
    """Asked while the host is being imported, hijack waits until it has been."""
    yield "import succeeds", functools.partial(_half_imported, subject, False)
    yield "import fails", functools.partial(_half_imported, subject, True)


def _half_imported(subject: Subject, fails: bool) -> None:
    name, module = subject.host.NAME, subject.host.MODULE
    seen = []

    class Interrupted(importlib.abc.MetaPathFinder):
        def find_spec(self, fullname: str, path: Any, target: Any = None) -> Any:
            if fullname != module:
                return None
            sys.meta_path.remove(self)
            spec = importlib.util.find_spec(fullname)
            assert spec is not None
            loader: Any = spec.loader
            execute = loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                seen.append(hijack.hosts.patch(name).patched)
                if fails:
                    raise ImportError("interrupted")
                execute(module)
                seen.append(hijack.hosts.patch(name).patched)

            loader.exec_module = exec_module
            return spec

    sys.meta_path.insert(0, Interrupted())
    with contextlib.suppress(ImportError):
        subject.load()
    assert seen == [False] * (1 if fails else 2), f"patched too early: {seen}"
    if fails:
        assert not hijack.hosts.status()[name].patched
        subject.load()
    assert hijack.hosts.status()[name].patched, hijack.hosts.status()[name]


def drift(subject: Subject) -> Iterator[tuple[str, Callable[[], None]]]:
    """Where something is missing that the adapter needs, the host is left alone."""
    subject.load()
    assert subject.host.PROBES, "PROBES: got none, expected what the patches rely on"
    for probe in subject.host.PROBES:
        yield probe.path, functools.partial(_drift, subject, probe)


def _drift(subject: Subject, probe: Probe) -> None:
    path, _, attribute = probe.path.rpartition(".")
    owner = _named(path)
    definer = next(
        c for c in getattr(owner, "__mro__", [owner]) if attribute in vars(c)
    )
    delattr(definer, attribute)
    before = dict(vars(definer))
    status = hijack.hosts.patch(subject.host.NAME)
    assert not status.patched
    assert probe.path in status.reason, status.reason
    assert dict(vars(definer)) == before


def foreign(subject: Subject) -> Iterator[tuple[str, Callable[[], None]]]:
    """Patches of others, before or over ours, are shown and stay."""
    subject.load()
    for patch in subject.host.patches():
        if isinstance(patch, Patch) and patch.attribute in vars(patch.owner):
            for over in (False, True):
                step = functools.partial(_foreign, subject, patch, over)
                yield f"{patch.where}, {'over' if over else 'before'} ours", step


def _foreign(subject: Subject, patch: Patch, over: bool) -> None:
    name = subject.host.NAME
    if over:
        hijack.hosts.patch(name)
    before = vars(patch.owner)[patch.attribute]
    kind = type(before) if isinstance(before, classmethod | staticmethod) else None
    inner = before.__func__ if kind else before

    @functools.wraps(inner)
    def theirs(*args: Any, **kwargs: Any) -> Any:
        return inner(*args, **kwargs)

    installed = kind(theirs) if kind else theirs
    setattr(patch.owner, patch.attribute, installed)
    if not over:
        hijack.hosts.patch(name)
    status = hijack.hosts.status()[name]
    assert status.patched
    shown = [text for text in status.foreign if patch.where in text]
    assert patch.copied or shown, f"{patch.where} is not shown: {status.foreign}"
    hijack.hosts.unpatch(name)
    assert vars(patch.owner)[patch.attribute] is installed


def raising_plugin(subject: Subject) -> Iterator[tuple[str, Callable[[], None]]]:
    """A plugin that fails when it is told of the host stops nothing."""

    class Plugin:
        @hijack.hookimpl
        def hijack_host_patched(self, host: str, version: str) -> None:
            raise RuntimeError(f"told of {host}")

    def step() -> None:
        registry = hijack.current_registry()
        registry.add_plugin(Plugin(), "raising")
        subject.load()
        assert hijack.hosts.patch(subject.host.NAME).patched
        told = f"told of {subject.host.NAME}"
        assert any(told in str(problem) for problem in registry.problems)

    yield "raising", step


def disabled(subject: Subject) -> Iterator[tuple[str, Callable[[], None]]]:
    """``HIJACK_DISABLE`` with the host's name keeps every patch out."""

    def step() -> None:
        os.environ["HIJACK_DISABLE"] = subject.host.NAME
        subject.load()
        before = subject.contents()
        status = hijack.hosts.patch(subject.host.NAME)
        assert not status.patched
        assert "HIJACK_DISABLE" in status.reason
        assert not before.changes()

    yield "disabled", step


def doctor(subject: Subject) -> Iterator[tuple[str, Callable[[], None]]]:
    """What is patched is seen by the doctor, with the host's version."""

    def step() -> None:
        from hijack.hosts.diagnostics import diagnose

        subject.load()
        hijack.hosts.patch(subject.host.NAME)
        version = subject.host.get_version()
        assert f"{subject.host.NAME} {version}: patched" in str(diagnose())

    yield "doctor", step


def inert(subject: Subject) -> Iterator[tuple[str, Callable[[], None]]]:
    """With dense weights the host computes the same bits, patched or not."""

    def step() -> None:
        subject.load()
        before = _run(subject.use)
        assert hijack.hosts.patch(subject.host.NAME).patched
        _assert_equal(before, _run(subject.use))

    yield "use", step


# -- details ---------------------------------------------------------------------------


def _run(path: str) -> Any:
    return runpy.run_path(path)["result"]


def _assert_equal(first: Any, second: Any) -> None:
    mine, structure = tree_flatten(first)
    theirs, other = tree_flatten(second)
    assert structure == other, f"{structure} became {other}"
    for one, two in zip(mine, theirs, strict=True):
        same = torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two
        assert same, f"{one} became {two}"


def _named(path: str) -> Any:
    """The module or class of a dotted name; its module is imported."""
    parts = path.split(".")
    length = next(
        n for n in range(len(parts), 0, -1) if ".".join(parts[:n]) in sys.modules
    )
    found: Any = sys.modules[".".join(parts[:length])]
    return functools.reduce(getattr, parts[length:], found)


def warm_up(module: str) -> None:
    """Import what a host imports, but nothing of the host."""
    names, write = os.pipe()
    if os.fork() == 0:
        importlib.import_module(module)
        own = module.partition(".")[0]
        loaded = [name for name in sys.modules if name.partition(".")[0] != own]
        with open(write, "w") as pipe:
            pipe.write(" ".join(loaded))
        os._exit(0)
    os.close(write)
    with open(names) as pipe:
        for name in pipe.read().split():
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    os.wait()


def forked(step: Callable[[], None]) -> bool:
    """Whether a step succeeds in a process of its own; prints why not."""
    child = os.fork()
    if child == 0:
        try:
            step()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)  # without cleaning up what the parent still uses
    return os.waitpid(child, 0)[1] == 0


CHECKS = {
    check.__name__: check
    for check in (
        *(orders, half_imported, drift, foreign, raising_plugin),
        *(disabled, doctor, inert),
    )
}


def main(check: str) -> int:
    """Run a check; the number of its steps that failed."""
    subject = Subject(**json.load(sys.stdin))
    runpy.run_path(subject.setup)
    warm_up(subject.host.MODULE)
    os.environ.pop("HIJACK_DISABLE", None)
    failed = [name for name, step in CHECKS[check](subject) if not forked(step)]
    legend = (
        " (i imports the host, p patches it, u unpatches)" if check == "orders" else ""
    )
    print(f"{check}: {failed or 'all'} {'failed' if failed else 'passed'}{legend}")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
