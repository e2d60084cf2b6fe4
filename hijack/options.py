"""Options of schemes, declared once for Python, files, command line and nodes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from hijack.errors import SchemeError
from hijack.text import DTYPE_WORDS, did_you_mean, parse_block_size

#: Options of many schemes, which have an argument or an input of their own.
COMMON = ("block_size", "dtype", "scale_dtype", "scale_search")
_DTYPE_NAMES = {name: word for word, name in DTYPE_WORDS.items()}
_WORDS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


@dataclasses.dataclass(frozen=True)
class Option:
    """One keyword argument of ``Scheme.quantize``.

    Attributes:
        name: of the argument.
        type: ``"int"``, ``"float"``, ``"bool"``, ``"str"``, ``"dtype"``,
            ``"block_size"``, or ``"any"`` for other Python values.
        default: the default value; None leaves the choice to the scheme.
        help: what it does, in a sentence.
        choices: the allowed values; empty for any.
        minimum: least value of a number.
        maximum: greatest value of a number.
        forward: whether it says how a layer computes, not how it is quantized. A
            dialect that cannot store it loses something.
    """

    name: str
    type: str = "any"
    default: Any = None
    help: str = ""
    choices: Sequence[Any] = ()
    minimum: float | None = None
    maximum: float | None = None
    forward: bool = False

    @classmethod
    def from_default(cls, name: str, default: Any) -> Option:
        """An option whose type is inferred from its default value.

        If the default is an int or a string, other types may be allowed too, so the
        type is ``"any"``.
        """
        kind = {bool: "bool", float: "float"}.get(type(default), "any")
        if isinstance(default, torch.dtype):
            kind = "dtype"
        elif name == "block_size":
            kind = "block_size"
        return cls(name, kind, default)

    def parse(self, text: str) -> Any:
        """Parse a value from a command line or a file.

        Raises:
            SchemeError: if the text is not a value, or out of range.
        """
        try:
            value = self._parsed(text.strip())
        except SchemeError as error:
            raise SchemeError(f"option {self.name}: {error}") from error
        self.check(value)
        return value

    def _parsed(self, text: str) -> Any:
        if text.lower() == "none":
            return None
        if self.type == "block_size":
            return parse_block_size(text)
        if self.type == "dtype":
            name = DTYPE_WORDS.get(text, text.removeprefix("torch."))
            dtype = getattr(torch, name, None)
            if isinstance(dtype, torch.dtype):
                return dtype
        elif self.type == "bool":
            if text.lower() in _WORDS:
                return _WORDS[text.lower()]
        elif self.type in ("int", "float"):
            try:
                return int(text) if self.type == "int" else float(text)
            except ValueError:
                pass
        elif self.type == "any":
            for kind in (int, float):
                try:
                    return kind(text)
                except ValueError:
                    continue
            return _WORDS.get(text.lower(), text)
        else:
            return text
        raise SchemeError(f"got {text!r}, expected {self.expected()}")

    def text(self, value: Any) -> str:
        """A value as text that `parse` accepts."""
        if self.type == "block_size" and isinstance(value, tuple | list):
            return "x".join(str(size) for size in value)
        return str(value).removeprefix("torch.")

    def word(self, value: Any) -> str:
        """A value as the shortest text that `parse` accepts, such as ``e4m3``."""
        text = self.text(value)
        return _DTYPE_NAMES.get(text, text)

    def described(self) -> str:
        """Name, default, meaning and values, in one line."""
        default = "" if self.default is None else f"={self.word(self.default)}"
        meaning = f": {self.help}" if self.help else ""
        return f"{self.name}{default}{meaning}; {self.expected()}"

    def check(self, value: Any, where: str = "") -> None:
        """Refuse a value of another type, not among the choices, or out of range.

        Args:
            value: as passed to ``quantize``.
            where: the scheme, for the message.

        Raises:
            SchemeError: with the expected values.
        """
        if type(value) is type(self.default) and value == self.default:
            return
        kinds: dict[str, tuple[type, ...]] = {
            "int": (int,),
            "float": (int, float),
            "bool": (bool,),
            "str": (str,),
            "dtype": (torch.dtype,),
        }
        good = isinstance(value, kinds.get(self.type, (object,)))
        if self.type in ("int", "float") and good:
            least, most = self.minimum, self.maximum
            good = not isinstance(value, bool) and not (
                (least is not None and value < least)
                or (most is not None and value > most)
            )
        if self.choices and value not in self.choices:
            good = False
        if not good:
            prefix = f"{where}: " if where else ""
            raise SchemeError(
                f"{prefix}option {self.name}: got {value!r}, expected {self.expected()}"
            )

    def expected(self) -> str:
        """The allowed values, human-readable."""
        if self.choices:
            return f"one of {', '.join(self.text(choice) for choice in self.choices)}"
        words = {
            "int": "a whole number",
            "float": "a number",
            "bool": "true or false",
            "dtype": "a dtype such as float8_e4m3fn",
            "block_size": "a block size such as 1x64, row or tensor",
            "any": "any value",
        }.get(self.type, "a text")
        least, most = self.minimum, self.maximum
        if least is not None and most is not None:
            return f"{words} from {least:g} to {most:g}"
        if least is not None:
            return f"{words} of at least {least:g}"
        return words if most is None else f"{words} of at most {most:g}"


def parse_options(
    declared: Sequence[Option], texts: Iterable[str], where: str
) -> dict[str, Any]:
    """Parse options of the form ``NAME=VALUE``.

    Args:
        declared: the options of the scheme.
        texts: one option each.
        where: the scheme, for messages.

    Raises:
        SchemeError: if an option is unknown, or its value is not allowed.
    """
    known = {option.name: option for option in declared}
    values: dict[str, Any] = {}
    for text in texts:
        name, equals, value = text.partition("=")
        name = name.strip()
        if not equals or not name:
            raise SchemeError(f"option: got {text!r}, expected NAME=VALUE")
        if name not in known:
            raise SchemeError(
                f"{where}: has no option {name!r}; expected options among "
                f"{', '.join(known) or 'none'}{did_you_mean(name, known)}"
            )
        values[name] = known[name].parse(value)
    return values
