"""Give any torch module a weight format its host never heard of.

Importing the package is cheap: its names, which need torch, are imported when the first
of them is used, so that the command line can show its help at once.
"""

import importlib as _importlib
import typing as _typing

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
