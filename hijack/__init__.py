"""Give any torch module a weight format its host never heard of.

Importing the package is cheap: its names, which need torch, are imported when the first
of them is used, so that the command line can show its help at once. Hosts all need
torch too: once that is imported, they are patched, or will be when they are imported.
"""

import contextlib as _contextlib
import importlib as _importlib
import sys as _sys
import typing as _typing

from hijack import imports as _imports

if _typing.TYPE_CHECKING:
    from hijack.public import *  # noqa: F403
    from hijack.public import __all__ as __all__

__version__ = "0.1.0"

if not _typing.TYPE_CHECKING:

    def __getattr__(name):
        """Import every public name, and give one of them, or a module of ours."""
        if name != "public":  # which the import itself asks for
            public = _importlib.import_module("hijack.public")
            names = globals()
            names.update({each: getattr(public, each) for each in public.__all__})
            names["__all__"] = public.__all__
            if name in names:
                return names[name]
        raise AttributeError(f"module 'hijack' has no attribute {name!r}")

    def __dir__():
        return [*globals(), *_importlib.import_module("hijack.public").__all__]


def _arm_hosts(torch: object = None) -> None:
    """Patch hosts, now that torch is there; or once a module of ours has its own."""
    modules = [m for n, m in list(_sys.modules.items()) if n.startswith("hijack.")]
    importing = next(filter(_imports.initializing, modules), None)
    if importing is not None:  # it is that which imports torch
        _imports.when_initialized(importing, lambda _: _arm_hosts())
        return
    try:
        _importlib.import_module("hijack.hosts").arm_all()
    except Exception as error:  # what somebody imports must not fail because of us
        kind = type(error).__name__
        log = _importlib.import_module("hijack.text").logger("hijack")
        log.warning("hijack: no host is patched: %s: %s", kind, error)


# where wrapt is missing, the names that need it say so
with _contextlib.suppress(ModuleNotFoundError):
    _importlib.import_module("wrapt").register_post_import_hook(_arm_hosts, "torch")
