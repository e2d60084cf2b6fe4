"""The base of dialects that give a scheme's tensors other names.

A subclass declares the names and dtypes of its tensors, and says in `interpret` what a
file's markers or config declare about a layer that has them.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Collection, Hashable, Iterable, Iterator, Mapping
from typing import ClassVar

from torch import Tensor

from hijack.claim import Certainty, Claim
from hijack.errors import CheckpointError
from hijack.formats.comfyui_markers import file_marker, layer_marker
from hijack.formats.dialect import Dialect
from hijack.formats.native_marker import native_marker
from hijack.safetensors_io.header import Header, TensorInfo, join, signature
from hijack.scheme import Scheme


@dataclasses.dataclass(frozen=True)
class Reading:
    """One way to read a layer.

    Attributes:
        certainty: how certain it is; `Certainty.GUESS` where there are others.
        evidence: what the file says of the layer; "" if only the tensors tell.
        options: options the layer was quantized with, as texts.
        block_size: (rows, cols) that share a scale, or None.
        shape: of the dense weight, where the tensors do not tell.
        padded: (rows, cols) to multiples of which the stored weight was padded.
        mismatch: where the file's marker does not match the tensors.
        unread: what the marker says that the dialect does not know.
    """

    certainty: Certainty
    evidence: str = ""
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    block_size: tuple[int, int] | None = None
    shape: tuple[int, ...] | None = None
    padded: tuple[int, int] | None = None
    mismatch: str = ""
    unread: tuple[str, ...] = ()


class TensorDialect(Dialect, abc.ABC):
    """A scheme's tensors under the names of another program.

    Attributes:
        names: role to the ends of keys, after the layer's name, under which a program
            stores it; the first is written. The roles are ``"weight"`` and the
            scheme's names of its other tensors.
        dtypes: role to safetensors' names of the dtypes it may have; none for any.
        optional: roles that a layer may lack.
        ignored: ends of keys of tensors that do not affect the weight, such as markers.
    """

    writes = False
    stores: Collection[str] = ()
    names: ClassVar[Mapping[str, tuple[str, ...]]]
    dtypes: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    optional: ClassVar[Collection[str]] = ()
    ignored: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "needs" not in cls.__dict__ and "names" in cls.__dict__:
            cls.needs = tuple(end.rpartition(".")[2] for end in cls._telling())

    @classmethod
    def _telling(cls) -> tuple[str, ...]:
        """Ends of keys that every layer has one of: a scale's, else the weight's."""
        roles = [role for role in cls.names if role not in cls.optional]
        return cls.names[roles[1] if len(roles) > 1 else roles[0]]

    @abc.abstractmethod
    def interpret(
        self, header: Header, layer: str, infos: Mapping[str, TensorInfo]
    ) -> Iterable[Reading]:
        """How a layer with these tensors may be read; nothing if by another dialect.

        Args:
            header: of the checkpoint.
            layer: name of the layer.
            infos: role to dtype and shape; all roles but optional ones.
        """

    # -- reading -----------------------------------------------------------------------

    def layers(self, header: Header) -> Iterable[str]:
        """The layers that have a tensor of a name that every layer has."""
        for end in self._telling():
            within, _, name = end.rpartition(".")
            for owner in header.owners.get(name, ()):
                if not within:
                    yield owner
                elif f".{owner}".endswith(f".{within}"):
                    yield owner.removesuffix(within).removesuffix(".")

    def keys(self, header: Header, layer: str) -> dict[str, str] | None:
        """Role to the key of each tensor; None if one is missing or of another dtype.

        Input scales and what is ignored follow, under the ends of their keys.
        """
        keys: dict[str, str] = {}
        for role, ends in self.names.items():
            possible = (join(layer, end) for end in ends)
            present = next((key for key in possible if key in header.tensors), "")
            if not present and role not in self.optional:
                return None
            if not present:
                continue
            dtypes = self.dtypes.get(role)
            if dtypes is not None and header.tensors[present].dtype not in dtypes:
                return None
            keys[role] = present
        for end in (*self.inputs, *self.ignored):
            if (key := join(layer, end)) in header.tensors:
                keys[end] = key
        return keys

    def readings(self, scheme: Scheme, header: Header, layer: str) -> Iterator[Claim]:
        """A claim for each way to read the layer."""
        keys = self.keys(header, layer)
        if keys is None:
            return
        infos = {
            role: header.tensors[keys[role]] for role in self.names if role in keys
        }
        tensors = ", ".join(
            f"{role} {info.dtype} {list(info.shape)}" for role, info in infos.items()
        )
        unused = tuple(role for role in keys if role not in self.names)
        for reading in self.interpret(header, layer, infos):
            certainty = reading.certainty
            if reading.mismatch and certainty is Certainty.MARKED:
                certainty = Certainty.UNIQUE
            yield Claim(
                layer,
                scheme.name,
                self.name,
                keys,
                reading.block_size,
                certainty,
                (reading.evidence, tensors) if reading.evidence else (tensors,),
                reading.mismatch,
                padded=reading.padded,
                shape=reading.shape,
                unused=unused,
                unread=reading.unread,
                options=reading.options,
            )

    def recognise(self, scheme: Scheme, header: Header, layer: str) -> Claim | None:
        """The claim to a layer that can be read in one way only."""
        claims = list(self.readings(scheme, header, layer))
        sure = [claim for claim in claims if claim.certainty is not Certainty.GUESS]
        return max(sure, key=lambda claim: claim.certainty, default=None)

    def decode(
        self, claim: Claim, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The tensors under the scheme's names, as they are stored.

        A dialect that stores them otherwise overrides this.
        """
        params = {role: t for role, t in tensors.items() if role in self.names}
        return params.pop("weight"), params

    # -- writing -----------------------------------------------------------------------

    def encode(
        self, qdata: Tensor, params: Mapping[str, Tensor], options: Mapping[str, object]
    ) -> dict[str, Tensor]:
        """The tensors under the dialect's names, as they are.

        Raises:
            CheckpointError: if it can only be read, or has no name for a tensor.
        """
        if not self.writes:
            raise CheckpointError(
                f"dialect {self.name}: can be read, not written; see docs/formats.md"
            )
        tensors = {"weight": qdata, **params}
        unknown = sorted(tensors.keys() - self.names.keys())
        if unknown:
            raise CheckpointError(
                f"dialect {self.name}: has no place for {unknown[0]}; expected no more "
                f"than {', '.join(self.names)}; write it in dialect 'hijack'"
            )
        return {self.names[role][0]: tensor for role, tensor in tensors.items()}


def likeness(header: Header, layer: str, *within: str) -> Hashable | None:
    """A layer's tensors and all that any marker says of it, for `Scheme.likeness`.

    Args:
        header: of the checkpoint.
        layer: name of the layer.
        within: names of modules inside the layer whose tensors count too.

    Returns:
        None where the layer has no tensor beside it at all.
    """
    parts = header.parts.get(layer)
    if not parts:
        return None
    inner = (header.parts.get(join(layer, name), {}) for name in within)
    old = file_marker(header, layer)
    return (
        signature(parts),
        *map(signature, inner),
        None if old is None else (old.dtype, old.shape),
        repr(layer_marker(header, layer)),
        repr(native_marker(header, layer)),
        header.metadata.get(join(layer, "weight")),  # torchao's
    )
