"""A plugin that keeps every question it is asked, and answers what a test tells it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import hijack

#: The order in which one module's hooks are asked, in every host.
ORDER = ("select_scheme", "create_params", "bind_forward", "init")


class Recorder:
    """Keeps what it is asked, in order.

    Args:
        **answers: hook, without ``hijack_``, to a function of its keyword arguments.

    Attributes:
        asked: pairs of a hook, without ``hijack_``, and its arguments by name.
    """

    def __init__(self, **answers):
        self.answers, self.asked = answers, []

    def _ask(self, hook, **arguments):
        self.asked.append((hook, arguments))
        answer = self.answers.get(hook)
        return None if answer is None else answer(**arguments)

    def named(self, hook):
        """The arguments of every question of one hook."""
        return [arguments for name, arguments in self.asked if name == hook]

    def by_module(self):
        """Prefix of each module to its questions, in order; with None for copies."""
        prefixes, found = {}, {}
        for hook, arguments in self.asked:
            module = arguments.get("module")
            if module is None:
                continue
            if "prefix" in arguments:
                prefixes[id(module)] = arguments["prefix"]
            found.setdefault(prefixes.get(id(module)), []).append((hook, arguments))
        return found

    def calls(self):
        """Each hook, and the layer or the class of the module it was asked about."""
        return [(hook, _subject(**arguments)) for hook, arguments in self.asked]

    @hijack.hookimpl
    def hijack_register_schemes(self, registry):
        return self._ask("register_schemes", registry=registry)

    @hijack.hookimpl
    def hijack_identify(self, header):
        return self._ask("identify", header=header)

    @hijack.hookimpl
    def hijack_select_scheme(self, module, prefix, header):
        return self._ask("select_scheme", module=module, prefix=prefix, header=header)

    @hijack.hookimpl
    def hijack_create_params(self, module, scheme, prefix, state_dict):
        return self._ask(
            "create_params",
            module=module,
            scheme=scheme,
            prefix=prefix,
            state_dict=state_dict,
        )

    @hijack.hookimpl
    def hijack_bind_forward(self, module, scheme):
        return self._ask("bind_forward", module=module, scheme=scheme)

    @hijack.hookimpl
    def hijack_init(self, module, scheme):
        return self._ask("init", module=module, scheme=scheme)

    @hijack.hookimpl
    def hijack_host_patched(self, host, version):
        return self._ask("host_patched", host=host, version=version)


def _subject(module=None, prefix="", host="", **_):
    return prefix[:-1] or host or ("" if module is None else type(module).__name__)


@contextlib.contextmanager
def recording(registry: hijack.Registry | None = None) -> Iterator[Recorder]:
    """A recorder that is a plugin of a registry meanwhile, and of none afterwards.

    Args:
        registry: the registry; None for the one in force.
    """
    registry = hijack.current_registry(registry)
    recorder = Recorder()
    registry.add_plugin(recorder, "recorder")
    try:
        yield recorder
    finally:
        registry.remove_plugin("recorder")
