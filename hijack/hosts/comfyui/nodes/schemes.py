"""Nodes with the options of a scheme, made from what the scheme declares.

Each gives the text that the input ``options`` of the quantizing nodes takes.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

from hijack.hosts.comfyui.nodes.options import AUTO, schemes
from hijack.hosts.comfyui.nodes.spec import Input, Node, Output, Result
from hijack.options import Option
from hijack.scheme import Scheme

#: What a whole number is limited to that an option does not limit.
_WIDEST = (-(2**31), 2**31 - 1)
#: Names of numbers that the page changes after each run.
_CHANGED = ("seed", "noise_seed")
#: Kinds of input for types of option that have a default.
_KINDS = {"bool": "BOOLEAN", "int": "INT", "float": "FLOAT"}


def option_nodes() -> tuple[Node, ...]:
    """A node for each registered scheme that has options."""
    return tuple(_node(scheme) for scheme in schemes() if scheme.declared_options())


def _node(scheme: Scheme) -> Node:
    declared = {option.name: option for option in scheme.declared_options()}
    return Node(
        f"HijackOptions_{scheme.name}",
        f"Options of {scheme.name}",
        f"{scheme.summary} Link it to options of a node that quantizes with "
        f"{scheme.name}.",
        ("quantize", "quantization", "options", scheme.name),
        tuple(_input(option) for option in declared.values()),
        (Output("STRING", "options", "The options that are not the default ones."),),
        functools.partial(as_text, declared),
        category="hijack/options",
    )


def _input(option: Option) -> Input:
    """The input for an option: a number, a switch, a choice or a text."""
    tooltip, default = option.described(), option.default
    if option.choices:
        words = [AUTO, *(option.word(choice) for choice in option.choices)]
        return Input(option.name, "COMBO", tooltip, options=lambda: words, default=AUTO)
    kind = "STRING"
    if default is not None and option.name not in _CHANGED:
        kind = _KINDS.get(option.type, kind)
    if kind == "STRING":
        return Input(option.name, kind, f"{tooltip}. Empty: the default.", default="")
    limits = None
    if kind != "BOOLEAN":
        least, most = option.minimum, option.maximum
        limits = (
            _WIDEST[0] if least is None else least,
            _WIDEST[1] if most is None else most,
        )
    step = 0.01 if kind == "FLOAT" else None
    return Input(option.name, kind, tooltip, default=default, limits=limits, step=step)


def as_text(declared: Mapping[str, Option], **values: Any) -> Result:
    """Run *Options of* a scheme.

    Raises:
        SchemeError: if a text is none of the option's values.
    """
    lines = []
    for name, value in values.items():
        option, text = declared[name], str(value).strip()
        if text in ("", AUTO) or option.parse(text) == option.default:
            continue
        lines.append(f"{name}={text}")
    return Result(("\n".join(lines),))
