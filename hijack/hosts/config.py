"""`HijackConfig`: what a library with a ``quantization_config`` is told of a model.

Such a library takes it as an argument, keeps it in ``config.json``, and finds by its
method who reads the files.
"""

from __future__ import annotations

import enum
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hijack.errors import CheckpointError
from hijack.safetensors_io.header import QUANT_METHOD
from hijack.selection import Patterns


class QuantMethod(str, enum.Enum):
    """The name that libraries know hijack by; they ask for its ``value``."""

    HIJACK = QUANT_METHOD


class HijackConfig:
    """How a model is to be loaded.

    Args:
        scheme: name of the scheme to quantize a dense model with; None for files that
            are quantized already, in any format that hijack reads.
        include: patterns on the names of layers to quantize, as for
            `hijack.quantize_file`; None is what is usual for the model.
        exclude: patterns on the names of layers to leave dense, likewise.
        rules: as for `hijack.quantize_file`.
        assume: how to read what a file does not tell, as for `hijack.identify`.
        options: of the scheme; they may also be given by name, as in ``block_size=64``.
        quant_method: always ``"hijack"``.
        **more: options of the scheme, and ``metadata``, which a library that writes
            files with none of its own keeps here.
    """

    def __init__(
        self,
        scheme: str | None = None,
        *,
        include: Patterns = None,
        exclude: Patterns = None,
        rules: str | Iterable[str] = (),
        assume: Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
        quant_method: str = QUANT_METHOD,
        **more: Any,
    ) -> None:
        self.quant_method = QuantMethod.HIJACK
        self.scheme = scheme
        self.include, self.exclude, self.rules = include, exclude, rules
        self.assume = [assume] if isinstance(assume, str) else list(assume)
        self.metadata: dict[str, str] = dict(more.pop("metadata", None) or {})
        self.options = {**(options or {}), **more}
        asked = {"include": include, "exclude": exclude, "rules": rules, **self.options}
        vain = [name for name, value in asked.items() if value not in (None, ())]
        if scheme is None and vain:
            raise CheckpointError(
                f"HijackConfig: got {', '.join(vain)} without a scheme, expected the "
                "scheme to quantize with, such as HijackConfig('blockwise_fp8', ...)"
            )

    @classmethod
    def from_dict(cls, config_dict: Mapping[str, Any], **kwargs: Any) -> HijackConfig:
        """The config that `to_dict` gave."""
        return cls(**{**config_dict, **kwargs})

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` says: nothing of what was left as it is by default."""
        return {name: _plain(value) for name, value in vars(self).items() if value}

    def to_json_string(self) -> str:
        """`to_dict` as JSON."""
        return json.dumps(self.to_dict(), indent=2, sort_keys=True) + "\n"

    def __repr__(self) -> str:
        return f"HijackConfig({self.to_dict()})"


def _plain(value: Any) -> Any:
    """A value as JSON has it."""
    if isinstance(value, enum.Enum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(part) for part in value]
    return value if isinstance(value, str | int | float | None) else str(value)
