"""The registry of schemes and plugins, and the only user of ``pm.hook``."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import importlib.metadata
import inspect
import os
import re
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import pluggy
from torch import Tensor, nn

from hijack.claim import Certainty, Claim
from hijack.errors import (
    DuplicateSchemeError,
    HijackError,
    PluginError,
    SchemeError,
    UnknownSchemeError,
    printable,
)
from hijack.hooks import PROJECT, HookSpecs
from hijack.scheme import Quantized, Scheme, checked, may_be_cut
from hijack.text import did_you_mean, logger

if TYPE_CHECKING:
    from hijack.safetensors_io.header import Header

log = logger(__name__)

_T = TypeVar("_T")

#: Seconds of import after which a plugin is called slow.
SLOW_IMPORT = 3.0

#: Attribute that `hookimpl` leaves on a function.
_MARK = f"{PROJECT}_impl"

#: Schemes that a plugin registers while it is being added, here and in this thread.
_ADDED: contextvars.ContextVar[list[tuple[Registry, str]] | None] = (
    contextvars.ContextVar("hijack_added", default=None)
)
#: Which hooks of which plugins are being asked, here and in this thread.
_BEING_ASKED: contextvars.ContextVar[frozenset[tuple[int, str, str]]] = (
    contextvars.ContextVar("hijack_being_asked", default=frozenset())
)


def strict() -> bool:
    """Whether ``HIJACK_STRICT`` asks for errors instead of log lines."""
    return os.environ.get("HIJACK_STRICT", "") not in ("", "0")


def disabled(name: str) -> bool:
    """Whether ``HIJACK_DISABLE`` (a comma list, or ``*``) names a host or scheme."""
    names = {part.strip() for part in os.environ.get("HIJACK_DISABLE", "").split(",")}
    return "*" in names or name in names


@dataclasses.dataclass(frozen=True)
class Problem:
    """A plugin that failed; shown by ``hijack doctor``.

    Attributes:
        plugin: its name.
        doing: what it was asked.
        error: what it raised, in words.
    """

    plugin: str
    doing: str
    error: str

    @classmethod
    def of(cls, plugin: str, doing: str, error: BaseException) -> Problem:
        """The problem in words; an error itself holds all that its frames held."""
        try:
            text = str(error)
        except Exception:
            text = "its message cannot be read"
        return cls(plugin, doing, f"{type(error).__name__}: {text}")

    def __str__(self) -> str:
        return printable(f"plugin {self.plugin}: {self.doing}: {self.error}")


class Registry:
    """Schemes and plugins, and the questions asked of them.

    Make one with `create_registry`; `current_registry` is the one in force. All methods
    may be called from any thread.
    """

    def __init__(self, *, entry_points: bool = False) -> None:
        self._pm = pluggy.PluginManager(PROJECT)
        self._pm.add_hookspecs(HookSpecs)
        self._schemes: dict[str, Scheme] = {}
        # neither is held while a plugin's hook runs: it may wait for an import that
        # another thread is in, which waits to register a scheme
        self._changing, self._loading = threading.RLock(), threading.RLock()
        self._pending_entry_points, self._in_loading = entry_points, False
        self._loaded: dict[str, str] = {}
        self.problems: list[Problem] = []
        self.slow_imports: dict[str, float] = {}

    # -- registration ------------------------------------------------------------------

    def register(self, scheme: Scheme, origin: str | None = None) -> Scheme:
        """Add a scheme and return it; one that is registered already stays.

        Args:
            scheme: an instance of a `Scheme` subclass.
            origin: where it comes from, to be shown; default is its module.

        Raises:
            SchemeError: if it is not a scheme, or has no usable name.
            DuplicateSchemeError: if the name is taken by another scheme.
            PluginError: if it has hooks that cannot be.
        """
        _check_scheme(scheme)
        with self._changing:
            taken = self._schemes.get(scheme.name)
            if taken is scheme:
                return scheme
            if taken is not None:
                raise DuplicateSchemeError(
                    f"scheme {scheme.name!r} of {type(scheme).__module__} is already "
                    f"registered from {taken.origin}; unregister that one first, or "
                    "give yours another name"
                )
            if not disabled(scheme.name) and _hooks_of(scheme):
                self._register_plugin(scheme, f"scheme:{scheme.name}")
            scheme.origin = origin or type(scheme).__module__
            self._schemes[scheme.name] = scheme
        added = _ADDED.get()
        if added is not None:
            added.append((self, scheme.name))
        return scheme

    def unregister(self, name: str) -> Scheme:
        """Remove a scheme and return it; modules already wrapped with it keep working.

        Raises:
            UnknownSchemeError: if no scheme has that name.
        """
        scheme = self.get(name)
        with self._changing:
            if self._pm.has_plugin(f"scheme:{name}"):
                self._pm.unregister(name=f"scheme:{name}")
            self._schemes.pop(name, None)
        return scheme

    def add_plugin(self, plugin: object, name: str) -> None:
        """Add a plugin object and let it register its schemes.

        Raises:
            PluginError: if a hook of it is none, or a scheme it registers is refused;
                nothing of it stays behind.
        """
        added: list[tuple[Registry, str]] = []
        token = _ADDED.set(added)
        try:
            guarded = self._register_plugin(plugin, name)
            for impl in self._pm.hook.hijack_register_schemes.get_hookimpls():
                if impl.plugin is guarded:
                    impl.function(self)
        except BaseException as error:
            for registry, scheme in added:
                registry.unregister(scheme)
            with self._changing:
                if self._pm.has_plugin(name) and not isinstance(error, _NameTakenError):
                    self._pm.unregister(name=name)
            if isinstance(error, KeyboardInterrupt):
                raise
            problem = Problem.of(name, "cannot be added", error)
            raise PluginError(str(problem)) from error
        finally:
            _ADDED.reset(token)

    def remove_plugin(self, name: str) -> None:
        """Ask a plugin nothing more; the schemes it registered stay.

        Raises:
            PluginError: if there is none of that name.
        """
        with self._changing:
            if not self._pm.has_plugin(name):
                raise PluginError(f"remove_plugin: there is no plugin {name!r}")
            self._pm.unregister(name=name)

    def plugins(self) -> dict[str, str]:
        """Name of each plugin to the distribution it is of, or "" if of none."""
        self.load_entry_points()
        others = {name: "" for name, _ in self._pm.list_name_plugin()}
        return dict(sorted((others | self._loaded).items()))

    def _register_plugin(self, plugin: object, name: str) -> _GuardedPlugin:
        """Hand a plugin to pluggy, with a guard around each of its hooks."""
        guarded = _GuardedPlugin(plugin, name, self)
        with self._changing:
            if self._pm.has_plugin(name):
                raise _NameTakenError(f"the name {name!r} is taken by another plugin")
            self._pm.register(guarded, name=name)
        return guarded

    def load_entry_points(self) -> None:
        """Load the plugins of installed distributions, once, each in its own try.

        Another thread that asks meanwhile waits until all are there.

        Raises:
            PluginError: if one fails and ``HIJACK_STRICT`` is set; the others are
                loaded all the same.
        """
        if not self._pending_entry_points:
            return
        with self._loading:
            if not self._pending_entry_points or self._in_loading:
                return  # done by another thread, or asked by a plugin being loaded
            self._in_loading = True
            try:
                self._load_all_entry_points()
            finally:
                self._in_loading = False
            self._pending_entry_points = False

    def _load_all_entry_points(self) -> None:
        # all before the first is loaded: what it imports may change how the rest are
        # found; and once, where a folder is on the path under two names
        entries = {
            (entry.name, entry.value): entry
            for dist in list(importlib.metadata.distributions())
            for entry in dist.entry_points
            if entry.group == PROJECT and not disabled(entry.name)
        }
        taken: dict[str, str] = {}
        failed: PluginError | None = None
        for entry in entries.values():
            owner = taken.setdefault(entry.name, entry.value)
            try:
                if owner != entry.value:
                    self.guard(entry.name, "loading", _refuse_entry_point, entry, owner)
                elif entry.name not in self._loaded:
                    self.guard(entry.name, "loading", self._load_entry_point, entry)
                    dist = getattr(entry, "dist", None)
                    told = "" if dist is None else f"{dist.name} {dist.version}"
                    self._loaded[entry.name] = told
            except PluginError as error:
                failed = failed or error
        if failed is not None:
            raise failed

    def _load_entry_point(self, entry: importlib.metadata.EntryPoint) -> None:
        start, before = time.monotonic(), set(self._schemes)
        plugin = entry.load()
        took = time.monotonic() - start
        if took > SLOW_IMPORT:
            self.slow_imports[entry.name] = took
            log.warning("hijack: plugin %s took %.1f s to import", entry.name, took)
        if isinstance(plugin, type) and issubclass(plugin, Scheme):
            plugin = plugin()
        if isinstance(plugin, Scheme):
            self.register(plugin, origin=f"entry point {entry.name} = {entry.value}")
        elif _hooks_of(plugin):
            self.add_plugin(plugin, entry.name)
        elif before == set(self._schemes):
            raise PluginError(
                f"entry point {entry.name} = {entry.value}: has no hooks; expected a "
                "module with functions marked hijack.hookimpl, a scheme, or its class"
            )

    # -- look-up -----------------------------------------------------------------------

    def get(self, scheme: str | Scheme) -> Scheme:
        """The scheme of that name; a scheme itself is returned as it is.

        Raises:
            UnknownSchemeError: listing the names that are known.
        """
        if isinstance(scheme, Scheme):
            return scheme
        self.load_entry_points()
        try:
            return self._schemes[scheme]
        except KeyError:
            known = ", ".join(sorted(self._schemes)) or "none"
            raise UnknownSchemeError(
                f"unknown scheme {scheme!r}; registered are: {known}; import the "
                "module that registers it, or install the plugin"
                f"{did_you_mean(str(scheme), self._schemes)}"
            ) from None

    def default_scheme(self) -> Scheme:
        """The scheme that quantizes where nobody names one.

        Raises:
            UnknownSchemeError: if several are registered and none is the default.
        """
        schemes = self.schemes()
        default = [scheme for scheme in schemes.values() if scheme.is_default]
        if not default and len(schemes) == 1:
            default = list(schemes.values())
        if not default:
            known = ", ".join(sorted(schemes)) or "none"
            raise UnknownSchemeError(
                f"scheme: none is the default; registered are: {known}; name one, or "
                "install the plugin that has it"
            )
        return default[0]

    def schemes(self) -> dict[str, Scheme]:
        """Name to scheme; each scheme's ``origin`` says where it came from."""
        self.load_entry_points()
        return dict(self._schemes)

    # -- decisions ---------------------------------------------------------------------

    @property
    def _hook(self) -> Any:
        """Hooks of all plugins there are."""
        self.load_entry_points()
        return self._pm.hook

    def identify(self, header: Header) -> list[Claim]:
        """The claims of all plugins to the layers of a checkpoint.

        Those of the registered schemes come from `hijack.formats.identification`.
        """
        answers: list[list[Claim]] = self._hook.hijack_identify(header=header)
        return [claim for claims in answers for claim in claims]

    def claims_of(
        self, scheme: Scheme, header: Header, call: Callable[[], Iterable[Claim]]
    ) -> list[Claim]:
        """The claims of a scheme to the layers of a checkpoint; none if it fails.

        Args:
            scheme: the scheme.
            header: of the checkpoint.
            call: gives the claims.
        """
        given = {"header": header}
        hook, plugin = "hijack_identify", f"scheme {scheme.name}"
        claims: list[Claim] | None = self._ask(
            plugin, hook, given, lambda: list(call())
        )
        return claims or []

    def select_scheme(
        self, module: nn.Module, prefix: str, header: Header | None
    ) -> Claim | Scheme | None:
        """What a plugin chose for a module instead of what was decided, or None.

        Args:
            module: about to become quantized.
            prefix: its key prefix, ending with a dot; "" for a root.
            header: of the file it comes from, or None.

        Returns:
            A claim if there is a header, else a scheme; None keeps the decision.
        """
        answer: Claim | Scheme | None = self._hook.hijack_select_scheme(
            module=module, prefix=prefix, header=header
        )
        return answer

    def create_params(
        self,
        module: nn.Module,
        scheme: Scheme,
        prefix: str = "",
        state_dict: Mapping[str, Tensor] | None = None,
    ) -> Quantized | None:
        """A plugin's quantized tensors for a module, or None for the scheme's own."""
        answer: Quantized | None = self._hook.hijack_create_params(
            module=module, scheme=scheme, prefix=prefix, state_dict=state_dict
        )
        return answer

    def bind_forward(
        self, module: nn.Module, scheme: Scheme
    ) -> Callable[..., Tensor] | None:
        """The forward a plugin or the scheme chose for a module; None is the default.

        Raises:
            PluginError: if choosing fails and ``HIJACK_STRICT`` is set.
        """
        given = {"module": module, "scheme": scheme}
        bound: Callable[..., Tensor] | None = self._hook.hijack_bind_forward(**given)
        if bound is None:
            bound = self._ask(
                f"scheme {scheme.name}",
                "hijack_bind_forward",
                given,
                lambda: scheme.bind_forward(module),
            )
        return bound

    def notify_init(self, module: nn.Module, scheme: Scheme) -> None:
        """Tell plugins of a module that has become quantized."""
        self._hook.hijack_init(module=module, scheme=scheme)

    def host_patched(self, host: str, version: str) -> None:
        """Tell all plugins, present and future, that a host was patched."""
        self._pm.hook.hijack_host_patched.call_historic(
            kwargs={"host": host, "version": version}
        )

    # -- failing plugins ---------------------------------------------------------------

    def guard(
        self,
        plugin: str,
        doing: str,
        call: Callable[..., _T],
        *args: Any,
        **kwargs: Any,
    ) -> _T | None:
        """Run a plugin's code; a failure is logged and kept, or raised if strict.

        Args:
            plugin: whose code it is.
            doing: what it is asked, for the message.
            call: the code, called with the other arguments.

        Raises:
            PluginError: on a failure, if ``HIJACK_STRICT`` is set.
        """
        try:
            return call(*args, **kwargs)
        except (Exception, SystemExit) as error:
            problem = Problem.of(plugin, doing, error)
            if strict():
                raise PluginError(str(problem)) from error
            self._report(problem)
            return None

    def _report(self, problem: Problem) -> None:
        """Keep a problem and log it in one line; once, however many layers have it."""
        with self._changing:
            if problem in self.problems:
                return
            self.problems.append(problem)
        log.warning("hijack: %s", problem)
        log.debug("hijack: the traceback of it", exc_info=True)

    def _ask(
        self,
        plugin: str,
        hook: str,
        given: Mapping[str, Any],
        call: Callable[[], Any],
    ) -> Any:
        """A plugin's answer to a hook; None where it fails or answers nonsense.

        A plugin that uses hijack to find its answer is not asked the same meanwhile.

        Args:
            plugin: who is asked.
            hook: which hook.
            given: the hook's arguments by name.
            call: gives the answer.
        """
        question = (id(self), plugin, hook)
        being_asked = _BEING_ASKED.get()
        if question in being_asked:
            return None

        def checked_answer() -> Any:
            answer = call()
            return None if answer is None else _ANSWERS[hook](self, answer, given)

        token = _BEING_ASKED.set(being_asked | {question})
        try:
            return self.guard(plugin, _question(hook, given), checked_answer)
        finally:
            _BEING_ASKED.reset(token)

    def _guarded(
        self, plugin: str, hook: str, function: Callable[..., Any]
    ) -> Callable[..., Any]:
        """A hook's function as pluggy may call it.

        Raises:
            PluginError: if there is no such hook, or it has no such argument.
        """
        spec = getattr(HookSpecs, hook, None)
        if spec is None:
            known = ", ".join(n for n in vars(HookSpecs) if n.startswith(PROJECT))
            raise PluginError(f"unknown hook {hook}; expected one of {known}")
        names = list(inspect.signature(spec).parameters)[1:]
        wanted = _arguments(function)
        unknown = [name for name in wanted if name not in names]
        if unknown:
            raise PluginError(
                f"{hook} has no argument {unknown[0]}; expected arguments among "
                f"{', '.join(names)}"
            )

        @functools.wraps(spec)
        def guarded(*args: Any) -> Any:
            given = dict(zip(names, args, strict=True))
            asked = [given[name] for name in wanted]
            if hook == "hijack_register_schemes":  # `add_plugin` takes everything back
                return function(*asked)
            return self._ask(plugin, hook, given, lambda: function(*asked))

        return guarded


class _NameTakenError(PluginError):
    """Another plugin has the name."""


class _GuardedPlugin:
    """A plugin as pluggy sees it: its hooks alone, each with a guard around it."""

    def __init__(self, plugin: object, name: str, registry: Registry) -> None:
        for attribute in _hooks_of(plugin):
            function = getattr(plugin, attribute)
            options = getattr(function, _MARK)
            if options.get("wrapper") or options.get("hookwrapper"):
                raise PluginError(
                    f"{attribute} wraps the answers of other plugins; expected a hook "
                    "that answers for itself; use tryfirst to be asked first"
                )
            hook = options.get("specname") or attribute
            guarded = registry._guarded(name, hook, function)
            setattr(guarded, _MARK, {**options, "specname": hook})
            setattr(self, attribute, guarded)


def _refuse_entry_point(entry: importlib.metadata.EntryPoint, owner: str) -> None:
    raise PluginError(
        f"entry point {entry.name} = {entry.value}: the name is taken by {owner}; it "
        "was not loaded; rename one of them"
    )


# -- what hooks may answer -------------------------------------------------------------


def _claims(registry: Registry, answer: Any, given: Mapping[str, Any]) -> list[Claim]:
    if not isinstance(answer, list | tuple):
        raise _wrong(answer, "a list of hijack.Claim")
    for claim in answer:
        _check_claim(registry, claim, given["header"])
    return list(answer)


def _check_claim(registry: Registry, claim: Any, header: Header) -> None:
    """Refuse a claim that loading could not follow."""
    if not isinstance(claim, Claim):
        raise _wrong(claim, "a hijack.Claim")
    registry.get(claim.scheme)
    if not isinstance(claim.layer, str) or not isinstance(claim.certainty, Certainty):
        raise _wrong(claim, "a claim with a layer and a hijack.Certainty")
    known = map(header.tensors.__contains__, claim.keys.values())
    if "weight" not in claim.keys or not all(known):
        raise _wrong(claim, "the key of a weight, and no keys that the file lacks")


def _claim_or_scheme(registry: Registry, answer: Any, given: Mapping[str, Any]) -> Any:
    header, module = given["header"], given["module"]
    if header is not None:
        _check_claim(registry, answer, header)
        if answer.layer != given["prefix"][:-1]:
            raise _wrong(answer, f"a claim to {given['prefix'][:-1]!r}")
        return answer
    scheme = registry.get(answer) if isinstance(answer, str) else answer
    if not isinstance(scheme, Scheme):
        raise _wrong(answer, "a scheme, the name of one, or None")
    if not isinstance(module, scheme.targets):
        raise _wrong(answer, f"a scheme for a {type(module).__name__}")
    return scheme


def _tensors(registry: Registry, answer: Any, given: Mapping[str, Any]) -> Quantized:
    quantized = qdata, params = checked(answer, "it")
    weight = given["module"]._parameters.get("weight")
    if weight is None:  # a host builds its module only when it loads the weight
        return quantized
    shape, expected = given["scheme"].dense_shape(*quantized), tuple(weight.shape)
    if not may_be_cut(shape, expected):
        raise PluginError(
            f"answered tensors that decode to a weight of shape {shape}, expected "
            f"{expected}"
        )
    if not weight.is_meta and any(t.is_meta for t in (qdata, *params.values())):
        raise PluginError("answered meta tensors, expected some with data")
    return quantized


#: Forwards that take the arguments of one: thousands of modules share a forward.
_CALLABLE: weakref.WeakSet[Any] = weakref.WeakSet()


def _function(registry: Registry, answer: Any, given: Mapping[str, Any]) -> Any:
    odd = inspect.iscoroutinefunction(answer) or inspect.isgeneratorfunction(answer)
    if not callable(answer) or isinstance(answer, type | nn.Module) or odd:
        raise _wrong(answer, "a function forward(module, input, weight, bias), or None")
    hash(answer)  # modules that share a forward share a class
    if answer in _CALLABLE:
        return answer
    try:
        inspect.signature(answer).bind(None, None, None, None)
    except TypeError as error:
        raise PluginError(
            f"the forward {answer!r} cannot be called; {error}; expected "
            "forward(module, input, weight, bias)"
        ) from error
    except ValueError:  # a built-in without a signature
        pass
    with contextlib.suppress(TypeError):  # an object that cannot be referred to weakly
        _CALLABLE.add(answer)
    return answer


def _nothing(registry: Registry, answer: Any, given: Mapping[str, Any]) -> None:
    return None


#: What each hook may answer, other than None; a check raises on anything else.
_ANSWERS: dict[str, Callable[[Registry, Any, Mapping[str, Any]], Any]] = {
    "hijack_identify": _claims,
    "hijack_select_scheme": _claim_or_scheme,
    "hijack_create_params": _tensors,
    "hijack_bind_forward": _function,
    "hijack_init": _nothing,
    "hijack_host_patched": _nothing,
}


def _wrong(answer: object, expected: str) -> HijackError:
    return PluginError(
        f"answered {type(answer).__name__} {str(answer)[:80]!r}, expected {expected}"
    )


def _question(hook: str, given: Mapping[str, Any]) -> str:
    """A hook and what it is asked about, for messages."""
    words = [hook]
    if isinstance(given.get("module"), nn.Module):
        layer, kind = given.get("prefix", "")[:-1], type(given["module"]).__name__
        words.append(f"for {layer} ({kind})" if layer else f"for a {kind}")
    if isinstance(given.get("scheme"), Scheme):
        words.append(f"of scheme {given['scheme'].name}")
    return " ".join(words)


def _hooks_of(plugin: object) -> list[str]:
    """Names of a plugin's functions that are marked as hooks."""
    owner = plugin if inspect.ismodule(plugin) else type(plugin)
    names = {*dir(owner), *vars(plugin)} if hasattr(plugin, "__dict__") else dir(owner)
    return sorted(n for n in names if hasattr(getattr(plugin, n, None), _MARK))


def _arguments(function: Callable[..., Any]) -> list[str]:
    """Names of the arguments a hook's function asks for: those without a default."""
    return [
        p.name
        for p in inspect.signature(function).parameters.values()
        if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
        and p.default is p.empty
    ]


def _check_scheme(scheme: object) -> None:
    if isinstance(scheme, type) and issubclass(scheme, Scheme):
        raise SchemeError(
            f"register: got the class {scheme.__name__}, expected an instance; "
            f"write register({scheme.__name__}())"
        )
    if not isinstance(scheme, Scheme):
        raise SchemeError(
            f"register: got {type(scheme).__name__}, expected an instance of a "
            "hijack.Scheme subclass"
        )
    name = getattr(scheme, "name", None)
    if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z_]\w*", name):
        raise SchemeError(
            f"register: {type(scheme).__name__}.name is {name!r}, expected letters, "
            "digits and underscores"
        )


# -- the registry in force -------------------------------------------------------------


def create_registry(*, entry_points: bool = False) -> Registry:
    """A fresh registry, such as a test makes for itself.

    Args:
        entry_points: whether to load the plugins of installed distributions.
    """
    return Registry(entry_points=entry_points)


_DEFAULT = Registry(entry_points=True)


def default_registry() -> Registry:
    """The registry of the process, in force unless `use_registry` says otherwise."""
    return _DEFAULT


_IN_FORCE: contextvars.ContextVar[Registry | None] = contextvars.ContextVar(
    "hijack_registry", default=None
)


def current_registry(registry: Registry | None = None) -> Registry:
    """The registry in force.

    Args:
        registry: one that was asked for, which is returned; None for the one that
            `use_registry` put in force here, else the default one.
    """
    if registry is not None:
        return registry
    found = _IN_FORCE.get()
    return default_registry() if found is None else found


@contextlib.contextmanager
def use_registry(registry: Registry) -> Iterator[Registry]:
    """Put a registry in force for everything inside, in this thread or task alone.

    Args:
        registry: the one to use wherever none is given.
    """
    token = _IN_FORCE.set(registry)
    try:
        yield registry
    finally:
        _IN_FORCE.reset(token)


def register(scheme: Scheme) -> Scheme:
    """Add a scheme to the registry in force and return it.

    Raises:
        SchemeError: if it is not a scheme, or has no usable name.
        DuplicateSchemeError: if the name is taken by another scheme.
    """
    return current_registry().register(scheme)


def unregister(name: str) -> Scheme:
    """Remove a scheme from the registry in force and return it.

    Raises:
        UnknownSchemeError: if no scheme has that name.
    """
    return current_registry().unregister(name)


def schemes() -> dict[str, Scheme]:
    """Name to scheme in the registry in force; ``scheme.origin`` says where from."""
    return current_registry().schemes()
