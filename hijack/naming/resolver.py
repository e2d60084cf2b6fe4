"""Find the layers of a checkpoint by the names that other files have for them.

A name is looked up as it is, then with its dots as underscores, because kohya's keys do
not distinguish them; each time with wrappers removed one by one. Then its normal forms
are: the name that diffusers has for it, and the projections that it stands for. One
layer may be several in the other file, and the other way round; which rows belong to
each is told by shapes. Text encoders are numbered; see `hijack.naming.encoders`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence

from hijack.naming.encoders import encoder_layers, encoder_names
from hijack.naming.families import diffusers_names
from hijack.naming.spellings import Spelling, spelled
from hijack.naming.wrappers import common_wrapper, shorter_names

#: Rows and columns; one number for a vector.
Shape = tuple[int, ...]
#: First row and the row after the last one.
Span = tuple[int, int]
_WHOLE: tuple[Span, ...] = ()


@dataclasses.dataclass(frozen=True)
class Layer:
    """A layer of a checkpoint, or a single parameter.

    Attributes:
        name: of the layer or parameter.
        key: of the weight or parameter.
        shape: of it; None if it is not known.
        transposed: whether it is the transpose of what other files have.
    """

    name: str
    key: str
    shape: Shape | None
    transposed: bool = False

    @property
    def bias(self) -> str:
        """Key of the bias that belongs to the weight."""
        if self.key.endswith("in_proj_weight"):  # torch's attention has a fused one
            return f"{self.key.removesuffix('weight')}bias"
        return f"{self.name}.bias" if self.name else "bias"

    @property
    def size(self) -> Shape | None:
        """The shape as a matrix, as other files have it."""
        size = None if self.shape is None else _flat(self.shape)
        return size[::-1] if size and self.transposed else size


@dataclasses.dataclass(frozen=True)
class Piece:
    """Some rows of a layer of the checkpoint, and those of the layer looked up.

    Attributes:
        layer: of the checkpoint.
        rows: of its weight, in this order; none for all.
        own: rows of the layer looked up that belong to them; none for all.
    """

    layer: Layer
    rows: tuple[Span, ...] = _WHOLE
    own: tuple[Span, ...] = _WHOLE


@dataclasses.dataclass(frozen=True)
class Resolution:
    """What became of the names that were looked up.

    Attributes:
        pieces: name to what it is in the checkpoint.
        unmatched: names of layers that the checkpoint lacks.
        problems: names that may be several layers or that fit none, and why.
    """

    pieces: Mapping[str, Sequence[Piece]]
    unmatched: tuple[str, ...]
    problems: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class _Form:
    """A normal form of a name."""

    spelling: Spelling
    swapped: bool


@dataclasses.dataclass(frozen=True)
class _Reading:
    """One understanding of a name."""

    pieces: tuple[Piece, ...]
    problem: str = ""


class LayerNames:
    """The layers of a checkpoint, by whatever name other files have for them.

    Args:
        tensors: key of each tensor to its shape; None if it is not known.
    """

    def __init__(self, tensors: Mapping[str, Shape | None]) -> None:
        self._dotted: dict[str, dict[Layer, None]] = {}
        self._flat: dict[str, dict[Layer, None]] = {}
        #: Stem and part to the layers that hold it.
        self._parts: dict[tuple[str, str], dict[tuple[Layer, _Form], None]] = {}
        self._stems: dict[str, dict[Layer, Spelling]] = {}
        #: HunyuanImage 3 and its like fuse queries, keys and values by heads.
        self._by_heads = any("query_layernorm" in key for key in tensors)
        layers = {key: _layer(key, shape) for key, shape in tensors.items()}
        wrapper = common_wrapper(layer.name for layer in layers.values())
        for alias, key in encoder_layers(tensors):
            layer = layers[key]
            if alias.endswith(".text_projection"):  # a parameter, not a layer's weight
                layer = dataclasses.replace(layer, transposed=True)
            self._add([_layer(alias, None).name], layer)
        for layer in layers.values():
            names = [*shorter_names(layer.name), layer.name.removeprefix(wrapper)]
            # Flux calls the weight of a norm its scale
            names += [name.removesuffix(".scale") for name in names]
            self._add(list(dict.fromkeys(names)), layer)

    def _add(self, names: Sequence[str], layer: Layer) -> None:
        for name in names:
            self._dotted.setdefault(name, {})[layer] = None
            self._flat.setdefault(_underscored(name), {})[layer] = None
            for form in _forms(_underscored(name)):
                spelling = form.spelling
                self._stems.setdefault(spelling.stem, {})[layer] = spelling
                for part in spelling.parts:
                    owners = self._parts.setdefault((spelling.stem, part), {})
                    owners[layer, form] = None

    def resolve(self, modules: Mapping[str, Shape | None]) -> Resolution:
        """Find the layers of another file in this checkpoint.

        Args:
            modules: name of each layer in the other file to the shape of its weight
                there; None if it is not known.
        """
        wrapper = common_wrapper(name for name in modules if not encoder_names(name))
        others = _Others(modules, wrapper)
        pieces: dict[str, Sequence[Piece]] = {}
        problems: dict[str, str] = {}
        unmatched = []
        for name, shape in modules.items():
            readings = self._readings(name, shape, others)
            good = [reading for reading in readings if not reading.problem]
            if len(good) == 1:
                pieces[name] = good[0].pieces
            elif good:
                layers = (_names(reading.pieces) for reading in good)
                problems[name] = (
                    f"may be one of two layers of the checkpoint, {' or '.join(layers)}"
                    "; expected names that differ in more than wrappers, dots and "
                    "underscores; rename its keys to those of the one that is meant"
                )
            elif readings:
                problems[name] = readings[0].problem
            else:
                unmatched.append(name)
        return Resolution(pieces, tuple(unmatched), problems)

    def _readings(
        self, name: str, shape: Shape | None, others: _Others
    ) -> list[_Reading]:
        candidates = others.names(name)
        for candidate in candidates:
            for table, key in (
                (self._dotted, candidate),
                (self._flat, _underscored(candidate)),
            ):
                layers = table.get(key, ())
                if layers:
                    exact = [layer for layer in layers if layer.name == candidate]
                    return [_Reading((Piece(each),)) for each in exact or layers]
        size = None if shape is None else _flat(shape)
        for candidate in candidates:
            found: dict[tuple[Piece, ...], _Reading] = {}
            for form in _forms(_underscored(candidate)):
                for reading in self._of_form(form, size, others):
                    found.setdefault(reading.pieces, reading)
            if found:
                return list(found.values())
        return []

    def _of_form(
        self, form: _Form, size: Shape | None, others: _Others
    ) -> Iterator[_Reading]:
        spelling = form.spelling
        owners = [self._parts.get((spelling.stem, part), {}) for part in spelling.parts]
        whole = [
            (layer, own)
            for layer, own in owners[0]
            if own.spelling.parts == spelling.parts
        ]
        for layer, own in whole:
            yield _whole(layer, size, own.swapped != form.swapped)
        if whole or not all(owners):
            return
        holders: list[tuple[Layer, Spelling]] = []
        for part, candidates in zip(spelling.parts, owners, strict=True):
            layers = {layer: own.spelling for layer, own in candidates}
            if len(layers) > 1:
                pieces = tuple(Piece(layer) for layer in layers)
                yield _Reading(
                    pieces,
                    f"its {part} may be in one of two layers of the checkpoint, "
                    f"{' or '.join(layer.name for layer in layers)}; expected one; "
                    "rename its keys to those of the one that is meant",
                )
                return
            holders += layers.items()
        yield self._split(spelling, holders, size, others)

    def _split(
        self,
        spelling: Spelling,
        holders: Sequence[tuple[Layer, Spelling]],
        size: Shape | None,
        others: _Others,
    ) -> _Reading:
        """A layer whose rows are divided in another way in the checkpoint."""
        layers = dict(holders)
        pieces = tuple(Piece(layer) for layer in layers)
        certain = all(each.certain for each in (spelling, *layers.values()))
        if not certain or (self._by_heads and {"q", "k", "v"} & {*spelling.parts}):
            return _Reading(
                pieces,
                f"is divided in another way than {_names(pieces)}, and programs "
                "differ in the order of such rows: q, k and v one after the other or "
                "by heads, w1 before w3 or behind it; expected layers that are divided "
                "alike in both files; convert one of the two",
            )
        facts = [
            (own.parts, layer.size[0])
            for layer, own in self._stems[spelling.stem].items()
            if layer.size
        ]
        sizes = _solve([*facts, *others.facts(spelling.stem)])
        problem = _misfit(spelling, layers, size, sizes)
        if problem:
            return _Reading(pieces, problem)
        mine = _spans(spelling.parts, sizes)
        theirs = {layer: _spans(own.parts, sizes) for layer, own in layers.items()}
        rows: dict[Layer, list[Span]] = {layer: [] for layer in layers}
        own_rows: dict[Layer, list[Span]] = {layer: [] for layer in layers}
        for part, (layer, _) in zip(spelling.parts, holders, strict=True):
            _extend(rows[layer], theirs[layer][part])
            _extend(own_rows[layer], mine[part])
        return _Reading(
            tuple(
                Piece(
                    layer,
                    _unless_all(rows[layer], layer.size),
                    _unless_all(own_rows[layer], size),
                )
                for layer in layers
            )
        )


class _Others:
    """The layers of another file: their names without wrappers, and their sizes."""

    def __init__(self, modules: Mapping[str, Shape | None], wrapper: str) -> None:
        self._modules, self._wrapper = modules, wrapper

    def names(self, name: str) -> list[str]:
        """The names that a layer may have in a checkpoint, longer ones first."""
        if numbered := encoder_names(name):
            found = [name]
            for each in numbered:
                label, _, layer = each.partition(".")
                found += [f"{label}.{short}" for short in shorter_names(layer)]
        else:
            found = list(shorter_names(name))
            if self._wrapper and name.startswith(self._wrapper):
                found += shorter_names(name.removeprefix(self._wrapper))
        # older versions of diffusers name what adds a LoRA
        found += [
            each.replace(".processor.", ".") for each in found if "processor" in each
        ]
        for end in (".scale", ".weight"):
            found += [each.removesuffix(end) for each in found]
        return list(dict.fromkeys(found))

    def facts(self, stem: str) -> Sequence[tuple[tuple[str, ...], int]]:
        """Parts in a stem, and how many rows they have together."""
        return self._facts.get(stem, ())

    @functools.cached_property
    def _facts(self) -> dict[str, list[tuple[tuple[str, ...], int]]]:
        facts: dict[str, list[tuple[tuple[str, ...], int]]] = {}
        for name, shape in self._modules.items():
            if not shape:
                continue
            for candidate in self.names(name):
                for form in _forms(_underscored(candidate)):
                    known = facts.setdefault(form.spelling.stem, [])
                    known.append((form.spelling.parts, shape[0]))
        return facts


# -- forms -----------------------------------------------------------------------------


def _layer(key: str, shape: Shape | None) -> Layer:
    name = key.removesuffix(".weight") if key != "weight" else ""
    if name.endswith("in_proj_weight"):
        name = name.removesuffix("_weight")
    return Layer(name, key, shape)


def _underscored(name: str) -> str:
    return name.replace(".", "_")


@functools.lru_cache(maxsize=1 << 16)
def _forms(flat: str) -> tuple[_Form, ...]:
    """The normal forms of a name: its own, and with the names of diffusers."""
    forms = [_Form(spelled(flat), False)]
    for name, swapped in diffusers_names(flat):
        forms.append(_Form(spelled(name), swapped))
    return tuple(dict.fromkeys(forms))


def _names(pieces: Iterable[Piece]) -> str:
    return ", ".join(dict.fromkeys(piece.layer.name for piece in pieces))


# -- shapes ----------------------------------------------------------------------------


def _flat(shape: Shape) -> Shape:
    """The shape as a matrix: a layer of a convolution may be one elsewhere."""
    return (shape[0], math.prod(shape[1:])) if len(shape) > 1 else shape


def _whole(layer: Layer, size: Shape | None, swapped: bool) -> _Reading:
    """All rows of a layer, in the same order or with the halves swapped."""
    known = layer.size
    piece = Piece(layer)
    if swapped and known and len(known) == 2 and known[0] == 2 * known[1]:
        half = known[1]
        first, second = (0, half), (half, 2 * half)
        piece = Piece(layer, (second, first), (first, second))
    problem = ""
    if (
        size
        and known
        and (size if len(size) > 1 else size[0])
        != (known if len(size) > 1 else known[0])
    ):
        problem = (
            f"is {list(size)}, which does not fit {layer.name} {list(known)}; is it "
            "for another model?"
        )
    return _Reading((piece,), problem)


def _solve(facts: Sequence[tuple[tuple[str, ...], int]]) -> dict[str, int]:
    """How many rows each part has, as far as the sums tell.

    Keys and values have the same heads. Queries have, too, where a layer of one stream
    shares its weight with the feed-forward layer, as in Flux and HunyuanVideo.
    """
    sizes: dict[str, int] = {}
    alike: list[list[str]] = [[], ["k", "v"]]
    if any("mlp" in parts for parts, _ in facts):
        alike.append(["k", "v", "q"])
    for same in alike:
        before = -1
        while before < len(sizes):
            before = len(sizes)
            for parts, total in dict.fromkeys(facts):
                _solve_one(parts, total, same, sizes)
    return sizes


def _solve_one(
    parts: Sequence[str], total: int, same: Sequence[str], sizes: dict[str, int]
) -> None:
    """Add what one sum tells, some parts being of one size."""
    known = [sizes[part] for part in same if part in sizes]
    for part in same if known else ():
        sizes.setdefault(part, known[0])
    unknown = [part for part in parts if part not in sizes]
    rest = total - sum(sizes.get(part, 0) for part in parts)
    one_size = len(unknown) == 1 or set(unknown) <= set(same)
    if unknown and one_size and rest > 0 and rest % len(unknown) == 0:
        sizes |= dict.fromkeys(unknown, rest // len(unknown))


def _spans(parts: Sequence[str], sizes: Mapping[str, int]) -> dict[str, Span]:
    """The rows of each part."""
    spans, start = {}, 0
    for part in parts:
        spans[part] = (start, start + sizes[part])
        start += sizes[part]
    return spans


def _extend(spans: list[Span], more: Span) -> None:
    """Add rows; those that follow the last ones are joined to them."""
    if spans and spans[-1][1] == more[0]:
        more = (spans.pop()[0], more[1])
    spans.append(more)


def _unless_all(spans: Sequence[Span], size: Shape | None) -> tuple[Span, ...]:
    everything = size is not None and list(spans) == [(0, size[0])]
    return _WHOLE if everything else tuple(spans)


def _misfit(
    spelling: Spelling,
    layers: Mapping[Layer, Spelling],
    size: Shape | None,
    sizes: Mapping[str, int],
) -> str:
    """Why the rows of some layers are not those of another one, or nothing."""
    pairs = [(layer.size, own.parts) for layer, own in layers.items()]
    pairs.append((size, spelling.parts))
    what = " and ".join(spelling.parts)
    shapes = " and ".join(f"{layer.name} {list(layer.size or ())}" for layer in layers)
    if not all(part in sizes for _, parts in pairs for part in parts):
        held = ", ".join(part for own in layers.values() for part in own.parts)
        return (
            f"is {what} of {shapes}, of {held}, and the shapes do not tell how many "
            "rows each has; expected all of them, or layers that are divided alike in "
            "both files; is it for another model?"
        )
    known = [(shape, parts) for shape, parts in pairs if shape is not None]
    heights = all(s[0] == sum(sizes[part] for part in parts) for s, parts in known)
    if heights and len({shape[1] for shape, _ in known if len(shape) > 1}) <= 1:
        return ""
    return (
        f"is {list(size or ())}, {what}, which does not fit {shapes}; is it for "
        "another model?"
    )
