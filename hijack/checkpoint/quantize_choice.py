"""Which layers of a checkpoint are quantized, and what is special about each."""

from __future__ import annotations

import dataclasses
import fnmatch
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from hijack.errors import CheckpointError, SchemeError
from hijack.layers import DENSE_DTYPES
from hijack.model_families import Architecture, detect_architecture
from hijack.safetensors_io.header import Header, TensorInfo, join
from hijack.text import parse_block_size

Patterns = str | Sequence[str] | None

#: The word that stands for the patterns of a model's architecture.
DEFAULT = "default"
#: What a rule may say instead of a block size.
_SKIP = "skip"
_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


@dataclasses.dataclass(frozen=True)
class Rule:
    """What becomes of the layers of a name.

    Attributes:
        text: as it was given.
        pattern: fnmatch pattern on the name of a layer, or of a module it is in.
        block_size: for ``scheme.quantize``; None leaves the layers dense.
        dtype: of the weight of a layer left dense; None keeps its own.
    """

    text: str
    pattern: str
    block_size: Any = None
    dtype: torch.dtype | None = None

    @classmethod
    def parse(cls, text: str) -> Rule:
        """Read ``PATTERN=128x128``, ``PATTERN=skip`` or ``PATTERN=bf16``.

        Raises:
            CheckpointError: if it is none of these.
        """
        pattern, _, value = (word.strip() for word in text.rpartition("="))
        if pattern and value == _SKIP:
            return cls(text, pattern)
        if pattern and value in _DTYPES:
            return cls(text, pattern, dtype=_DTYPES[value])
        try:
            if pattern:
                return cls(text, pattern, parse_block_size(value))
        except SchemeError:
            pass
        raise CheckpointError(
            f"rule: got {text!r}, expected PATTERN=SIZE such as "
            f"'blocks.*.ffn=128x128', PATTERN={_SKIP}, or PATTERN="
            f"{', '.join(_DTYPES)}"
        )

    def matches(self, layer: str) -> bool:
        """Whether the layer, or a module it is in, has such a name."""
        names = (self.pattern, f"{self.pattern}.*")
        return any(fnmatch.fnmatchcase(layer, name) for name in names)


@dataclasses.dataclass(frozen=True)
class Choice:
    """What becomes of each layer.

    Attributes:
        header: of the checkpoint.
        layers: those to quantize, with the options that a rule gives each.
        skipped: those with a 2-D weight or more that stay dense, and why.
        casts: those that stay dense in another dtype.
        architecture: of the model, if it is known.
        replaced: ``include`` and ``exclude``, if patterns given there took the place
            of the architecture's, to the latter.
    """

    header: Header
    layers: Mapping[str, Mapping[str, Any]]
    skipped: Mapping[str, str]
    casts: Mapping[str, torch.dtype]
    architecture: Architecture | None
    replaced: Mapping[str, Sequence[str]]


def choose(
    header: Header,
    include: Patterns = None,
    exclude: Patterns = None,
    rules: str | Sequence[str] = (),
) -> Choice:
    """Choose among the layers of a checkpoint.

    `exclude` outweighs `include`. Of the rules, the first that matches a layer counts;
    one with a block size says how to quantize a layer that is chosen, the others leave
    a layer dense.

    Args:
        header: of a dense checkpoint.
        include: fnmatch patterns on layer names; None is those of the architecture, or
            every layer with a 2-D floating weight. Weights of more dimensions are
            quantized only if a pattern given here names them.
        exclude: patterns of layers to leave dense; None is those of the architecture.
            In both, the word ``"default"`` stands for the architecture's.
        rules: as for `Rule.parse`.

    Raises:
        CheckpointError: if a pattern of ``include`` matches no layer, a rule applies to
            none, or no layer is left to quantize.
    """
    chooser = _Chooser(header, include, exclude, rules)
    for layer in header.layers():
        chooser.decide(layer, header.tensors[join(layer, "weight")])
    chooser.check()
    return Choice(
        header,
        chooser.layers,
        chooser.skipped,
        chooser.casts,
        chooser.architecture,
        chooser.replaced,
    )


class _Chooser:
    def __init__(
        self,
        header: Header,
        include: Patterns,
        exclude: Patterns,
        rules: str | Sequence[str],
    ) -> None:
        self.header = header
        include, exclude = _held(include), _held(exclude)
        self.architecture = known = detect_architecture(header)
        self.named = [word for word in _listed(include) if word != DEFAULT]
        self.unwanted = [word for word in _listed(exclude) if word != DEFAULT]
        usual = (None, ()) if known is None else (known.include or None, known.exclude)
        self.include = _expand(include, usual[0])
        self.exclude = _expand(exclude, usual[1]) or ()
        self.replaced = {
            name: own
            for name, given, own in zip(
                ("include", "exclude"), (include, exclude), usual, strict=True
            )
            if own and given and DEFAULT not in given and not set(own) <= set(given)
        }
        self.rules = [Rule.parse(rule) for rule in _listed(rules)]
        self.used: set[Rule] = set()
        self.layers: dict[str, dict[str, Any]] = {}
        self.skipped: dict[str, str] = {}
        self.casts: dict[str, torch.dtype] = {}

    def decide(self, layer: str, info: TensorInfo) -> None:
        """Put one layer where it belongs."""
        rule = next((rule for rule in self.rules if rule.matches(layer)), None)
        reason = self._why_not(layer, info)
        if rule is not None and rule.block_size is None:
            reason = f"rule {rule.text}"
            self._cast(layer, info, rule)
            self.used.add(rule)
        if reason is None:
            self.layers[layer] = {}
            if rule is not None:
                self.layers[layer] = {"block_size": rule.block_size}
                self.used.add(rule)
        elif len(info.shape) > 1:
            self.skipped[layer] = reason

    def _cast(self, layer: str, info: TensorInfo, rule: Rule) -> None:
        if rule.dtype in (None, info.torch_dtype):
            return
        if info.torch_dtype not in DENSE_DTYPES:
            raise CheckpointError(
                f"{layer}: is {info.dtype}, expected a dense floating weight; the rule "
                f"{rule.text!r} cannot make it {rule.dtype}"
            )
        self.casts[layer] = rule.dtype

    def _why_not(self, layer: str, info: TensorInfo) -> str | None:
        """The reason to leave a layer dense, rules apart; or None."""
        name = "" if self.architecture is None else self.architecture.name
        if self.include is not None and not _matches(layer, self.include):
            return "not included" if self.named else f"not usual for {name}"
        if _matches(layer, self.exclude):
            given = _matches(layer, self.unwanted)
            return "excluded" if given else f"not usual for {name}"
        if info.torch_dtype not in DENSE_DTYPES:
            return f"dtype {info.dtype}"
        dimensions = len(info.shape)
        if dimensions < 2 or (dimensions > 2 and not _matches(layer, self.named)):
            return f"{dimensions} dimensions"
        return None if 0 not in info.shape else "empty"

    def check(self) -> None:
        """Refuse what was asked for in vain."""
        names = list(self.header.layers())
        some = _some(list(self.layers) or list(self.skipped) or names)
        for pattern in self.named:
            if not any(_matches(layer, [pattern]) for layer in names):
                raise CheckpointError(
                    f"include: pattern {pattern!r} matches no layer of "
                    f"{self.header.source}; layers are such as {some}"
                )
        for rule in self.rules:
            if rule not in self.used:
                matched = [layer for layer in names if rule.matches(layer)]
                what = f"matches no layer; layers are such as {some}"
                if matched:
                    what = (
                        f"applies to none of the {len(matched)} layers it matches, "
                        f"such as {_some(matched)}; they stay dense, or an earlier "
                        "rule matches them"
                    )
                raise CheckpointError(
                    f"rule: {rule.text!r}, of {self.header.source}, {what}"
                )
        if not self.layers:
            kinds = Counter(self.skipped.values()).most_common(3)
            reasons = ", ".join(f"{reason} ({count})" for reason, count in kinds)
            raise CheckpointError(
                f"{self.header.source}: no layer is left to quantize; it has "
                f"{len(self.skipped)} with weights of two dimensions or more"
                f"{': ' if kinds else ''}{reasons}; expected dense weights that "
                "include and exclude leave"
            )


def _held(patterns: Patterns) -> list[str] | None:
    """Patterns that can be gone through twice, unlike those of an iterator."""
    return None if patterns is None else _listed(patterns)


def _listed(patterns: Patterns) -> list[str]:
    return [patterns] if isinstance(patterns, str) else list(patterns or ())


def _expand(patterns: Patterns, usual: Sequence[str] | None) -> Sequence[str] | None:
    """Patterns with the usual ones in their place; None are all there are."""
    if patterns is None:
        return usual
    own = ["*"] if usual is None else usual
    words = [own if word == DEFAULT else [word] for word in _listed(patterns)]
    return [pattern for word in words for pattern in word]


def _matches(layer: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(layer, pattern) for pattern in patterns)


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) or "none"
