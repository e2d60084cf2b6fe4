"""A scheme's claim to one layer of a checkpoint, and how certain it is."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping

from hijack.text import block_text


class Certainty(enum.IntEnum):
    """How certain a claim is; the highest wins."""

    #: one of several equally possible interpretations; used only if assumed.
    GUESS = 0
    #: dtypes and shapes are the scheme's, but other formats have the same.
    FITS = 1
    #: key names, dtypes and shapes that only this dialect uses.
    UNIQUE = 2
    #: an explicit marker names the scheme, and the shapes agree.
    MARKED = 3


@dataclasses.dataclass(frozen=True)
class Claim:
    """A scheme's claim to one layer of a checkpoint.

    Attributes:
        layer: module name without a trailing dot; "" is the root.
        scheme: name of the scheme.
        dialect: name of the dialect that recognised it.
        keys: role to full key; the roles are ``"weight"`` and the dialect's others.
        block_size: (rows, cols) in elements, or None if the scheme has no blocks.
        certainty: how certain the claim is.
        evidence: what was seen, human-readable.
        contradiction: where the layer's metadata does not match its tensors; the claim
            follows the tensors.
        padded: (rows, cols) to multiples of which the stored weight was padded, so
            that the layer's weight may be smaller.
        shape: of the layer's dense weight, where the file declares it or it is known
            to be smaller than what is stored.
        options: options the layer was quantized with, as texts, where the file
            declares them.
        unread: what the layer's marker says that the dialect does not know.
        unused: roles of tensors that do not affect the weight, such as the scale of an
            input.
        chosen: why it was taken of several that are as certain; "" if there are none.
    """

    layer: str
    scheme: str
    dialect: str
    keys: Mapping[str, str]
    block_size: tuple[int, int] | None = None
    certainty: Certainty = Certainty.FITS
    evidence: tuple[str, ...] = ()
    contradiction: str = ""
    padded: tuple[int, int] | None = None
    shape: tuple[int, ...] | None = None
    unused: tuple[str, ...] = ()
    unread: tuple[str, ...] = ()
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    chosen: str = ""

    def cropped(self, shape: tuple[int, ...]) -> Claim:
        """The claim with the layer's true shape, if the file pads the weight."""
        if self.padded is None or len(shape) != 2:
            return self
        return dataclasses.replace(self, shape=(shape[0], shape[1]))

    def for_layers(self) -> Callable[[str], Claim]:
        """A function that gives the same claim for another layer.

        That layer's tensors must have the same names. `dataclasses.replace` takes ten
        times as long, and files have tens of thousands of layers.
        """
        start = len(self.layer) + bool(self.layer)
        names = [(role, key[start:]) for role, key in self.keys.items()]
        fields, new = self.__dict__, object.__new__

        def claim(layer: str) -> Claim:
            prefix = f"{layer}." if layer else ""
            keys = {role: prefix + name for role, name in names}
            claim = new(Claim)
            claim.__dict__.update(fields, layer=layer, keys=keys)
            return claim

        return claim

    def interpretation(self) -> tuple[object, ...]:
        """Equal for two claims that decode a layer to the same weight."""
        options = tuple(sorted(self.options.items()))
        return self.scheme, self.dialect, self.block_size, options

    def words(self) -> dict[str, str]:
        """What tells the claim from others to the layer, by what it says.

        The values are the words that ``assume`` takes: the scheme, the dialect, the
        block size as text, and each option as ``name=value``.
        """
        return {
            "scheme": self.scheme,
            "dialect": self.dialect,
            "block size": block_text(self.block_size),
            **{name: f"{name}={value}" for name, value in self.options.items()},
        }
