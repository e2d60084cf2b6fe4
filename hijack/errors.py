"""The exceptions hijack raises on purpose.

::

    HijackError
    ├── SchemeError(ValueError)            a scheme or its options are wrong
    │   ├── DuplicateSchemeError           the name is taken
    │   ├── UnknownSchemeError(KeyError)   nobody registered that name
    │   └── NonFiniteError                 a weight holds inf or NaN
    ├── ShapeError(ValueError)             tensors do not fit each other
    ├── DTypeError(TypeError)              a tensor has a dtype nobody can take
    ├── ModuleError(ValueError)            a module cannot be wrapped, or is not wrapped
    ├── CheckpointError(ValueError)        a file or state dict cannot be used
    │   ├── HeaderError                    its header is malformed
    │   ├── AmbiguousError                 several schemes claim a layer equally
    │   └── UnconsumedScaleError           a scale that no scheme consumed
    ├── ReadOnlyError(RuntimeError)        a quantized weight cannot be written to
    ├── PluginError(RuntimeError)          a plugin failed
    └── PatchError(RuntimeError)           a host cannot be patched or restored

Messages say *where: what; got X, expected Y; do Z*.
"""

from __future__ import annotations

#: Letters of the longest message; names in files may have millions.
_MOST = 4000


class HijackError(Exception):
    """Root of every error hijack raises on purpose.

    Messages hold what files say. They are one line of letters that can be printed, so
    that none of it moves a terminal's cursor or passes for a line of a log.
    """

    def __init__(self, message: object = "") -> None:
        text = str(message)
        if len(text) > _MOST:
            text = f"{text[: _MOST // 2]} ... {text[-_MOST // 2 :]}"
        super().__init__(printable(text))


def printable(text: str) -> str:
    """Text with escapes for what is no letter that can be printed.

    JSON can spell halves of letters that no output can encode.
    """
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


class SchemeError(HijackError, ValueError):
    """A scheme, or an option given to it, is wrong."""


class DuplicateSchemeError(SchemeError):
    """A scheme of that name is already registered."""


class UnknownSchemeError(SchemeError, KeyError):
    """No scheme of that name is registered."""

    # KeyError shows the repr of its argument; users should read the sentence itself.
    __str__ = Exception.__str__


class NonFiniteError(SchemeError):
    """A weight to quantize holds infinities or NaNs."""


class ShapeError(HijackError, ValueError):
    """Tensors of one layer do not fit each other."""


class DTypeError(HijackError, TypeError):
    """A tensor has a dtype the operation cannot take."""


class ModuleError(HijackError, ValueError):
    """A module cannot be wrapped, or is not wrapped."""


class CheckpointError(HijackError, ValueError):
    """A checkpoint file or state dict cannot be used as it is."""


class HeaderError(CheckpointError):
    """The header of a checkpoint file is malformed."""


class AmbiguousError(CheckpointError):
    """Several schemes claim one layer on equal evidence."""


class UnconsumedScaleError(CheckpointError):
    """A checkpoint holds a scale that no scheme consumed."""


class ReadOnlyError(HijackError, RuntimeError):
    """A quantized weight, or a part of it, was to be written to or trained.

    No `TypeError`: of one that an operator raises, Python shows another message.
    """


class PluginError(HijackError, RuntimeError):
    """A plugin raised or is malformed."""


class PatchError(HijackError, RuntimeError):
    """A host cannot be patched, or cannot be restored."""
