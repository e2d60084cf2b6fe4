"""A scheme's claim to one layer of a checkpoint, and how well it is founded."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Callable, Mapping


class Certainty(enum.IntEnum):
    """How well a claim is founded; a higher one wins."""

    #: one of several readings that are equally possible; taken only if assumed.
    GUESS = 0
    #: dtypes and shapes are what the scheme would write, but others write the same.
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
        keys: role to full key: ``"weight"`` and the dialect's other tensors.
        block_size: (rows, cols) in elements, or None if the scheme has no blocks.
        certainty: how well founded the claim is.
        evidence: what was seen, for people to read.
        contradiction: what the file says of the layer that its tensors prove wrong;
            the claim goes by the tensors.
        padded: (rows, cols) that the stored weight's sides were rounded up to
            multiples of, so that the layer's own weight may be smaller.
        shape: (N, K) of the layer's own weight where it is known to be smaller.
        unused: roles of tensors that say nothing of the weight, such as the scale of
            an input.
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
    shape: tuple[int, int] | None = None
    unused: tuple[str, ...] = ()

    def cropped(self, shape: tuple[int, ...]) -> Claim:
        """The claim with the shape of the layer's own weight, if the file pads it."""
        if self.padded is None or len(shape) != 2:
            return self
        return dataclasses.replace(self, shape=(shape[0], shape[1]))

    def namesake(self) -> Callable[[str], Claim]:
        """Gives the same claim to other layers, whose tensors have the same last parts.

        `dataclasses.replace` takes ten times as long, and files have tens of thousands
        of layers.
        """
        start = len(self.layer) + bool(self.layer)
        names = [(role, key[start:]) for role, key in self.keys.items()]
        shared, new = self.__dict__, object.__new__

        def claim(layer: str) -> Claim:
            stem = f"{layer}." if layer else ""
            keys = {role: stem + name for role, name in names}
            other = new(Claim)
            other.__dict__.update(shared, layer=layer, keys=keys)
            return other

        return claim

    def reading(self) -> tuple[object, ...]:
        """What two claims must share to decode a layer to the same weight."""
        return self.scheme, self.dialect, self.block_size
