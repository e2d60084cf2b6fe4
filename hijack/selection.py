"""Which layers of a model are quantized, and what is special about each.

Layers are chosen by name: with the patterns of a model's family, with patterns that
replace or extend them, and with rules. Of a model that is not known, layers stay dense
whose like do so in others.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from hijack.dtypes import DENSE_DTYPES
from hijack.errors import CheckpointError, SchemeError
from hijack.layer_kinds import delicate, guess_owners, not_a_target
from hijack.model_families import ModelFamily, detect_family
from hijack.naming.wrappers import plain
from hijack.safetensors_io.header import Header, TensorInfo, join
from hijack.text import parse_block_size

#: fnmatch patterns on the names of layers; None stands for the default.
Patterns = str | Iterable[str] | None

#: Given a shape and options, why a scheme leaves a weight dense, or None.
Declines = Callable[[tuple[int, ...], Mapping[str, Any]], str | None]

#: How reasons begin that are guesses because the model is not known.
UNKNOWN = "the model is not known, and it looks like"
#: The word that stands for the patterns of a model's family.
DEFAULT = "default"
#: What a rule may say instead of a block size.
_SKIP = "skip"
_DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}


# -- rules -----------------------------------------------------------------------------


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
        return matches(layer, (self.pattern, f"{self.pattern}.*"))


# -- names -----------------------------------------------------------------------------


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches any of some fnmatch patterns."""
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def listed(patterns: Patterns) -> Patterns:
    """Patterns that can be read more than once."""
    return patterns if patterns is None or isinstance(patterns, str) else list(patterns)


def asks_for_default(*patterns: Patterns) -> bool:
    """Whether any of some lists of patterns has the word ``"default"``."""
    return any(DEFAULT in (_as_list(each, "patterns") or ()) for each in patterns)


class Selection:
    """Chooses layers by their names. Exclude outweighs include.

    Args:
        include: patterns of layers to quantize; None is the family's, or every layer
            without a family.
        exclude: patterns of layers to leave dense; None is the family's. In both, the
            word ``"default"`` stands for the family's.
        family: the model's; None if it is not known, or its defaults do not count.

    Attributes:
        named: the patterns of ``include`` that were given.
        replaced: ``include`` and ``exclude``, if patterns given there took the place
            of the family's, to the latter.
    """

    def __init__(
        self,
        include: Patterns = None,
        exclude: Patterns = None,
        family: ModelFamily | None = None,
    ) -> None:
        self._family = "" if family is None else family.name
        usual_include = family.include if family is not None else ()
        usual_exclude = family.exclude if family is not None else ()
        self._usual = frozenset((*usual_include, *usual_exclude))
        included = _as_list(include, "include")
        excluded = _as_list(exclude, "exclude")
        self.named = [word for word in included or () if word != DEFAULT]
        self._unwanted = [word for word in excluded or () if word != DEFAULT]
        self._include = _expand(included, usual_include or ["*"])
        self._exclude = _expand(excluded, usual_exclude)
        self.replaced = {
            name: usual
            for name, given, usual in (
                ("include", included, usual_include),
                ("exclude", excluded, usual_exclude),
            )
            if usual and given and DEFAULT not in given and not set(usual) <= set(given)
        }

    def reason(self, name: str, *others: str) -> str | None:
        """Why a layer stays dense, or None if it is chosen.

        Args:
            name: of the layer.
            *others: names it has besides; a pattern that matches one matches the layer.
        """
        names = (name, *others)
        if not any(self._matches(name, self._include) for name in names):
            given = self.named or not self._include
            return "not included" if given else f"not usual for {self._family}"
        if any(self._matches(name, self._exclude) for name in names):
            given = any(matches(name, self._unwanted) for name in names)
            return "excluded" if given else f"not usual for {self._family}"
        return None

    def _matches(self, name: str, patterns: Iterable[str]) -> bool:
        """Whether a name matches; a family's patterns know nothing of wrappers."""
        short = plain(name)
        return any(
            fnmatch.fnmatchcase(short if pattern in self._usual else name, pattern)
            for pattern in patterns
        )

    def unmatched(
        self,
        names: Iterable[str],
        where: str,
        examples: Sequence[str] = (),
        noun: str = "layer",
        others: Iterable[str] = (),
    ) -> str | None:
        """What is wrong with a pattern that was given in vain, or None.

        Args:
            names: all layers, or modules, that patterns may be meant for.
            where: the model or file, for the message.
            examples: names to show; default is the first of ``names``.
            noun: what has these names, for the message.
            others: names that ``exclude`` may match too, of what is never chosen.
        """
        names = list(names)
        known = {"include": names, "exclude": [*names, *filter(None, others)]}
        given = {"include": self.named, "exclude": self._unwanted}
        for option, patterns in given.items():
            for pattern in patterns:
                if not any(matches(name, [pattern]) for name in known[option]):
                    return (
                        f"{option}: pattern {pattern!r} matches no {noun} of {where}; "
                        f"{noun}s are such as {some(examples or names)}"
                        f"{nearest_pattern(pattern, known[option])}"
                    )
        return None


def nearest_pattern(pattern: str, names: Sequence[str]) -> str:
    """A question to end an error about a pattern in vain with, or nothing.

    Args:
        pattern: the fnmatch pattern that matches none of the names.
        names: of layers or modules.
    """
    words = {word for name in names for word in name.split(".")}
    literals = re.split(r"([.*?]|\[[^]]*\])", pattern)
    corrected = "".join(
        next(iter(difflib.get_close_matches(part, words, n=1)), part)
        for part in literals
    )
    guesses = [f"{pattern}.*", pattern.removesuffix(".weight"), f"*.{pattern}"]
    guesses += [corrected, *difflib.get_close_matches(pattern, names, n=1)]
    for guess in guesses:
        if any(matches(name, [guess]) for name in names):
            return f"; did you mean {guess!r}?"
    return ""


def some(names: Sequence[str]) -> str:
    """The first few names, for messages."""
    return ", ".join(names[:3]) or "none"


def _as_list(patterns: Patterns, option: str) -> list[str] | None:
    """Patterns that can be gone through many times, unlike those of an iterator."""
    if patterns is None:
        return None
    if isinstance(patterns, str):
        return [patterns]
    listed = list(patterns) if isinstance(patterns, Iterable) else [patterns]
    for pattern in listed:
        if not isinstance(pattern, str):
            raise CheckpointError(
                f"{option}: got {patterns!r}, expected a text such as 'blocks.*', or "
                "several"
            )
    return listed


def _expand(patterns: Sequence[str] | None, usual: Sequence[str]) -> list[str]:
    """Patterns with the usual ones in the place of the word; None are the usual."""
    words = [DEFAULT] if patterns is None else patterns
    lists = (usual if word == DEFAULT else [word] for word in words)
    return [pattern for patterns in lists for pattern in patterns]


# -- layers of a checkpoint ------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Choice:
    """What becomes of each layer of a checkpoint.

    Attributes:
        header: of the checkpoint.
        layers: those to quantize, with the options that a rule gives each.
        skipped: those with a weight of two dimensions or more that stay dense, and why.
        declined: those of them that were chosen, but that the scheme declines.
        casts: those that stay dense in another dtype.
        family: of the model, if it is known.
        replaced: as for `Selection`.
    """

    header: Header
    layers: Mapping[str, Mapping[str, Any]]
    skipped: Mapping[str, str]
    declined: Sequence[str]
    casts: Mapping[str, torch.dtype]
    family: ModelFamily | None
    replaced: Mapping[str, Sequence[str]]


def choose(
    header: Header,
    targets: Sequence[type[nn.Module]],
    include: Patterns = None,
    exclude: Patterns = None,
    rules: str | Iterable[str] = (),
    declines: Declines = lambda shape, options: None,
) -> Choice:
    """Choose among the layers of a checkpoint, or of a model's state dict.

    Of the rules, the first that matches a layer counts; one with a block size says how
    to quantize a layer that is chosen, the others leave a layer dense.

    Args:
        header: of a dense checkpoint.
        targets: types of module that are quantized.
        include: as for `Selection`; by default, every layer with a 2-D floating weight
            that the family includes; without a family, every one that does not look
            like an embedding, a norm, a head or a router. Weights of more dimensions
            are quantized only if a pattern given here names them.
        exclude: as for `Selection`.
        rules: as for `Rule.parse`.
        declines: the scheme's reason against a weight of a shape, with the options that
            a rule gives it.

    Raises:
        CheckpointError: if a pattern matches no layer, a rule applies to none, or no
            layer is left to quantize.
    """
    chooser = _Chooser(header, targets, include, exclude, rules, declines)
    for layer in header.layers():
        chooser.decide(layer, header.tensors[join(layer, "weight")])
    chooser.check()
    return Choice(
        header,
        chooser.layers,
        chooser.skipped,
        chooser.declined,
        chooser.casts,
        chooser.family,
        chooser.selection.replaced,
    )


def choose_among(
    header: Header,
    layers: Iterable[str],
    targets: Sequence[type[nn.Module]],
    include: Patterns,
    exclude: Patterns,
    declines: Declines,
) -> tuple[list[str], dict[str, str]]:
    """Choose among some layers of a checkpoint.

    Args:
        header: of the checkpoint, in which their weights are dense.
        layers: their names.
        targets: types of module that are quantized.
        include: as for `choose`, as are the others.
        exclude: patterns of layers to leave.
        declines: the scheme's reason against a weight.

    Returns:
        Those that are chosen, and the others with a weight of two dimensions or more
        to why they are not.
    """
    chooser = _Chooser(header, targets, include, exclude, (), declines)
    for layer in layers:
        chooser.decide(layer, header.tensors[join(layer, "weight")])
    return list(chooser.layers), chooser.skipped


def model_text(family: str, skipped: Mapping[str, str], hint: str) -> str:
    """Which model it is, in one line; of one that is not known, what was guessed.

    Args:
        family: name of the model's family, "" if it is not known.
        skipped: as for `Choice`.
        hint: how to see or change which layers stay dense on a guess.
    """
    guessed = sum(reason.startswith(UNKNOWN) for reason in skipped.values())
    if family:
        return f"model: {family}"
    if not guessed:
        return "model: not known; layers are chosen by names and shapes"
    return (
        f"model: not known; {guessed} layers that look like embeddings, norms, heads "
        f"or routers stay dense ({hint})"
    )


class _Chooser:
    def __init__(
        self,
        header: Header,
        targets: Sequence[type[nn.Module]],
        include: Patterns,
        exclude: Patterns,
        rules: str | Iterable[str],
        declines: Declines,
    ) -> None:
        self.header, self.targets, self.declines = header, targets, declines
        self.family = detect_family(header.tensors)
        self.selection = Selection(include, exclude, self.family)
        self.rules = [Rule.parse(rule) for rule in _as_list(rules, "rule") or ()]
        self.applied: set[Rule] = set()
        self.layers: dict[str, dict[str, Any]] = {}
        self.skipped: dict[str, str] = {}
        self.declined: list[str] = []
        self.casts: dict[str, torch.dtype] = {}

    def decide(self, layer: str, info: TensorInfo) -> None:
        """Put one layer where it belongs."""
        rule = next((rule for rule in self.rules if rule.matches(layer)), None)
        reason = self.selection.reason(layer) or self._unfit(layer, info)
        if reason is None and (rule is None or rule.block_size is None):
            reason = self._delicate(layer, info)
        if rule is not None and rule.block_size is None:
            reason = f"rule {rule.text}"
            self._cast(layer, info, rule)
            self.applied.add(rule)
        options = {}
        if rule is not None and rule.block_size is not None:
            options["block_size"] = rule.block_size
        if reason is None:
            reason = self.declines(info.shape, options)
            if reason is not None:
                self.declined.append(layer)
        if reason is None:
            self.layers[layer] = options
            if rule is not None:
                self.applied.add(rule)
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

    def _unfit(self, layer: str, info: TensorInfo) -> str | None:
        """The reason to leave a layer dense, whatever its name; or None."""
        if info.torch_dtype not in DENSE_DTYPES:
            return f"dtype {info.dtype}"
        dimensions = len(info.shape)
        if dimensions < 2 or (
            dimensions > 2 and not matches(layer, self.selection.named)
        ):
            return f"{dimensions} dimensions"
        if 0 in info.shape:
            return "empty"
        biased = join(layer, "bias") in self.header.tensors
        return not_a_target(guess_owners(layer, dimensions, biased), self.targets)

    def _delicate(self, layer: str, info: TensorInfo) -> str | None:
        """The reason to leave a layer dense that nobody named, of an unknown model."""
        if self.family is not None or matches(layer, self.selection.named):
            return None
        if not any(issubclass(nn.Linear, target) for target in self.targets):
            return None  # a scheme for nothing but embeddings is for those
        kind = delicate(layer, info.shape)
        return None if kind is None else f"{UNKNOWN} {kind}"

    def check(self) -> None:
        """Refuse what was asked for in vain."""
        names = list(self.header.layers())
        examples = list(self.layers) or list(self.skipped) or names
        problem = self.selection.unmatched(names, self.header.source, examples)
        if problem is not None:
            raise CheckpointError(problem)
        for rule in self.rules:
            if rule not in self.applied:
                matched = [layer for layer in names if rule.matches(layer)]
                what = (
                    f"matches no layer; layers are such as {some(examples)}"
                    f"{nearest_pattern(rule.pattern, names)}"
                )
                if matched:
                    what = (
                        f"applies to none of the {len(matched)} layers it matches, "
                        f"such as {some(matched)}; they stay dense, or an earlier "
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
