"""Reversible patches of functions that belong to somebody else.

What is put in place of a function is a *gate*: a plain function that calls the
replacement while the patch is on, and the original once it is off. A gate that somebody
else has wrapped meanwhile cannot be taken out without breaking them, so it stays, off.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import sys
import threading
import types
from collections.abc import Callable, Iterable, MutableMapping
from pathlib import Path
from typing import Any, Final

from hijack.errors import PatchError

Function = Callable[..., Any]


class _Missing:
    def __repr__(self) -> str:
        return "MISSING"


#: Stands for an attribute that its owner did not define itself.
MISSING: Final = _Missing()
#: How many objects are looked into for our function.
_MOST_WRAPPERS = 200


@dataclasses.dataclass(frozen=True)
class Patch:
    """One function to replace.

    Attributes:
        owner: the class or module that defines the function.
        attribute: its name there.
        make_replacement: given the original function (without ``staticmethod`` or
            ``classmethod`` around it), returns the one to call instead.
        define: also allow an attribute that ``owner`` inherits; reverting deletes it.
        copied: the function is another module's, which ``owner`` imported by name; so
            it is nobody's patch there.
    """

    owner: type | types.ModuleType
    attribute: str
    make_replacement: Callable[[Function], Function]
    define: bool = False
    copied: bool = False

    @property
    def where(self) -> str:
        """Dotted name of what is patched."""
        return f"{name_of(self.owner)}.{self.attribute}"

    def place(self) -> _Gate:
        """What puts it in place.

        Raises:
            PatchError: if it cannot be.
        """
        before = vars(self.owner).get(self.attribute, MISSING)
        return _Gate(self, before, _original(self, before))


@dataclasses.dataclass(frozen=True)
class Entry:
    """One entry to add to a mapping, such as a host's table of plugins.

    Attributes:
        owner: the module that has the mapping.
        attribute: the mapping's name there.
        key: of the entry, which must be free.
        value: of the entry.
    """

    owner: types.ModuleType
    attribute: str
    key: Any
    value: Any
    copied: bool = dataclasses.field(default=False, init=False)

    @property
    def where(self) -> str:
        """Dotted name of what is patched."""
        return f"{name_of(self.owner)}.{self.attribute}[{self.key!r}]"

    def place(self) -> _Added:
        """What puts it in place.

        Raises:
            PatchError: if it cannot be.
        """
        mapping = getattr(self.owner, self.attribute, None)
        if not isinstance(mapping, MutableMapping):
            kind = type(mapping).__name__
            raise PatchError(f"{self.where}: got a {kind}, expected a mapping")
        if self.key in mapping:
            raise PatchError(
                f"{self.where}: is taken by {describe(mapping[self.key])}; expected it "
                "to be free; remove that one first"
            )
        return _Added(self, mapping)


@dataclasses.dataclass(frozen=True)
class Foreign:
    """Somebody else's patch of the same attribute.

    Attributes:
        where: dotted name of the attribute.
        who: module, name and file of the function found there.
        over: whether it was put over ours; else it was there before us.
    """

    where: str
    who: str
    over: bool

    def __str__(self) -> str:
        when = "after" if self.over else "before"
        return f"{self.where}: patched {when} us by {self.who}"


@dataclasses.dataclass
class _Gate:
    """A patch in place: what was there, what is there now, and whether it is on."""

    patch: Patch
    before: object
    original: Function
    installed: object = MISSING
    on: bool = True

    def foreign(self) -> Foreign | None:
        """Who had patched the function before us, or None."""
        if self.before is MISSING or self.patch.copied:
            return None
        if _belongs(self.original, self.patch.owner):
            return None
        return Foreign(self.patch.where, describe(self.original), over=False)

    def current(self) -> object:
        return vars(self.patch.owner).get(self.patch.attribute, MISSING)

    def in_place(self) -> bool:
        return self.current() is self.installed

    def is_gone(self) -> bool:
        """Whether the owner's own function is there again, or a new owner is.

        Somebody else's function is taken for a wrapper, which calls ours.
        """
        owner, current = self.patch.owner, self.current()
        if _owner_now(owner) is not owner:
            return True
        if current is self.installed or _calls(current, self.installed):
            return False
        return current in (self.before, MISSING) or _belongs(_bare(current), owner)

    def install(self) -> None:
        function = self._function(self.patch.make_replacement(self.original))
        kind = type(self.before)
        wraps = kind if kind in (staticmethod, classmethod) else None
        self.installed = wraps(function) if wraps else function
        setattr(self.patch.owner, self.patch.attribute, self.installed)

    def _function(self, replacement: Function) -> Function:
        original = self.original

        @functools.wraps(original)
        def gate(*args: Any, **kwargs: Any) -> Any:
            return (replacement if self.on else original)(*args, **kwargs)

        return gate

    def remove(self) -> bool:
        """Restore what was there; False if somebody else has patched over it."""
        self.on = False
        if not self.in_place():
            return self.installed is MISSING
        if self.before is MISSING:
            delattr(self.patch.owner, self.patch.attribute)
        else:
            setattr(self.patch.owner, self.patch.attribute, self.before)
        return True


@dataclasses.dataclass
class _Added:
    """An entry in place."""

    patch: Entry
    mapping: MutableMapping[Any, Any]
    on: bool = True

    def foreign(self) -> Foreign | None:
        """Nobody: the key was free."""
        return None

    def current(self) -> object:
        return self.mapping.get(self.patch.key, MISSING)

    def in_place(self) -> bool:
        return self.current() is self.patch.value

    def is_gone(self) -> bool:
        """Whether it was taken out, or another mapping is there now."""
        owner = _owner_now(self.patch.owner)
        replaced = getattr(owner, self.patch.attribute, None) is not self.mapping
        return replaced or self.current() is MISSING

    def install(self) -> None:
        self.mapping[self.patch.key] = self.patch.value

    def remove(self) -> bool:
        """Take it out; what somebody else has put instead stays."""
        self.on = False
        if self.in_place():
            del self.mapping[self.patch.key]
        return True


class PatchSet:
    """Patches that are applied together, in order, or not at all.

    Args:
        patches: in the order they are applied; reverted in the opposite one.
    """

    def __init__(self, patches: Iterable[Patch | Entry]) -> None:
        self.patches = tuple(patches)
        self._gates: list[_Gate | _Added] = []
        self._buried: list[
            _Gate | _Added
        ] = []  # off, but somebody's wrapper still calls them
        self._found: list[Foreign] = []
        self._lock = threading.RLock()

    @property
    def applied(self) -> bool:
        """Whether the patches are on, as far as nobody has taken one out."""
        return bool(self._gates)

    def in_force(self, where: str) -> bool:
        """Whether what has that dotted name is patched, and nobody took it out."""
        return any(g.patch.where == where and not g.is_gone() for g in self._gates)

    def gone(self) -> list[str]:
        """Dotted names of what was patched and is not any more.

        Somebody has restored what was there before, or imported the owner anew.
        """
        return [gate.patch.where for gate in self._gates if gate.is_gone()]

    def apply(self) -> None:
        """Put every patch in place that is not there.

        Raises:
            PatchError: if one cannot be applied; none is then.
        """
        with self._lock:
            gone = [gate for gate in self._gates if gate.is_gone()]
            if self._gates and not gone:
                return
            if not self._gates:
                self._found.clear()
            for gate in gone:
                self._gates.remove(gate)
                gate.remove()
            owners = [
                dataclasses.replace(gate.patch, owner=_owner_now(gate.patch.owner))
                for gate in gone
            ]
            where = ""
            try:
                for patch in owners or self.patches:
                    where = patch.where
                    self._put(patch)
            except BaseException as error:  # an interruption leaves no patch either
                self.revert()
                self._found.clear()
                if isinstance(error, PatchError) or not isinstance(error, Exception):
                    raise
                raise PatchError(
                    f"{where}: cannot be patched; {type(error).__name__}: {error}"
                ) from error

    def _put(self, patch: Patch | Entry) -> None:
        for gate in self._buried:  # nobody is over it any more: use it again
            if gate.patch == patch and gate.in_place():
                self._buried.remove(gate)
                self._gates.append(gate)
                gate.on = True
                return
        gate = patch.place()
        foreign = gate.foreign()
        if foreign is not None:
            self._found.append(foreign)
        self._gates.append(gate)  # first, so that an interruption finds it
        gate.install()

    def revert(self) -> list[Foreign]:
        """Restore everything, last patch first; once reverted, does nothing.

        Returns:
            The foreign patches lying over ours: those attributes were left alone, and
            our function under them now only calls the original.
        """
        with self._lock:
            over = [foreign for foreign in self.foreign() if foreign.over]
            self._buried = [*reversed(self._gates), *self._buried]
            self._gates = []
            self._buried = [gate for gate in self._buried if not gate.remove()]
            return over

    def foreign(self) -> list[Foreign]:
        """Everybody else who patched the same attributes, as far as can be seen."""
        over = [
            Foreign(gate.patch.where, describe(gate.current()), over=True)
            for gate in self._gates
            if not gate.in_place() and (not gate.is_gone() or gate.current() is MISSING)
        ]
        return [*self._found, *over]


def _owner_now(owner: type | types.ModuleType) -> Any:
    """The module or class that has an owner's name today; it may have been reloaded."""
    if isinstance(owner, types.ModuleType):
        return sys.modules.get(owner.__name__, owner)
    found: Any = sys.modules.get(owner.__module__)
    for name in owner.__qualname__.split("."):
        found = getattr(found, name, None)
    # a class of somebody else's, put there instead, is no new owner
    reloaded = isinstance(found, type) and found.__module__ == owner.__module__
    return found if reloaded else owner


def _calls(function: object, ours: object) -> bool:
    """Whether a function holds ours, as wrappers do, also one of several."""
    found, seen = [function], set[int]()
    while found:
        each = found.pop()
        if each is ours:
            return True
        if id(each) in seen or len(seen) > _MOST_WRAPPERS:
            continue
        seen.add(id(each))
        inner = _bare(each)
        found += [] if inner is each else [inner]
        found += [getattr(inner, name, None) for name in ("__wrapped__", "func")]
        for cell in getattr(inner, "__closure__", None) or ():
            with contextlib.suppress(ValueError):  # one that is empty yet
                found.append(cell.cell_contents)
        found += getattr(inner, "__defaults__", None) or ()
    return False


def describe(function: object) -> str:
    """Module, name and file of a function, through whatever wraps it."""
    if function is MISSING:
        return "somebody who deleted it"
    function = _bare(function)
    module = getattr(function, "__module__", None) or "?"
    name = getattr(function, "__qualname__", None) or type(function).__qualname__
    file = _file_of(function)
    if file is not None:  # functools.wraps copies the original's module: trust the code
        for loaded in list(sys.modules.values()):
            if getattr(loaded, "__file__", None) == file:
                module = loaded.__name__
                break
    return f"{module}.{name} ({file or 'no file'})"


def _original(patch: Patch, before: object) -> Function:
    """The function a patch replaces, or why it cannot be replaced."""
    owner, attribute = patch.owner, patch.attribute
    if before is MISSING:
        found = inspect.getattr_static(owner, attribute, MISSING)
        if found is MISSING:
            raise PatchError(f"{patch.where}: does not exist; nothing to patch")
        if not patch.define:
            bases = owner.__mro__ if isinstance(owner, type) else ()
            definer = next((b for b in bases if attribute in vars(b)), owner)
            raise PatchError(
                f"{patch.where}: is inherited; patch {name_of(definer)}.{attribute}, "
                "where it is defined, or say define=True"
            )
        before = found
    function: Function = _bare(before)
    if not callable(function) or isinstance(before, property):
        raise PatchError(
            f"{patch.where}: is a {type(before).__name__}, expected a function"
        )
    return function


def _bare(function: object) -> Any:
    """The callable inside a ``staticmethod`` or ``classmethod``."""
    if isinstance(function, staticmethod | classmethod):
        return function.__func__
    return function


def _file_of(function: object) -> str | None:
    # A wrapt proxy shows the wrapped function's code; who patched is its wrapper.
    wrapper = getattr(function, "_self_wrapper", None)
    code = getattr(wrapper if wrapper is not None else function, "__code__", None)
    return getattr(code, "co_filename", None)


def _belongs(function: object, owner: type | types.ModuleType) -> bool:
    """Whether a function comes from the package that owns the attribute."""
    name = owner.__name__ if isinstance(owner, types.ModuleType) else owner.__module__
    file = _file_of(function)
    if file is None:  # built-in functions and callable objects carry only a name
        module = getattr(function, "__module__", None) or name
        return str(module).partition(".")[0] == name.partition(".")[0]
    defined_in = owner if isinstance(owner, types.ModuleType) else sys.modules.get(name)
    home = getattr(defined_in, "__file__", None)
    package = sys.modules.get(name.partition(".")[0])
    roots = [Path(path) for path in getattr(package, "__path__", ())]
    return file == home or any(root in Path(file).parents for root in roots)


def name_of(owner: type | types.ModuleType) -> str:
    """Dotted name of a module or class."""
    if isinstance(owner, types.ModuleType):
        return owner.__name__
    return f"{owner.__module__}.{owner.__qualname__}"
