"""Which layers are in a format that hijack can name and not read."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Hashable, Mapping

from hijack.formats.named_only_table import (
    ANY_MARKER,
    FORMATS,
    LAYER_MARKER,
    Format,
    Group,
)
from hijack.safetensors_io.header import (
    PLAIN_DTYPES,
    Header,
    TensorInfo,
    join,
    signature,
)

#: Header metadata under which ComfyUI marks layers too.
FILE_MARKER = "_quantization_metadata"


@dataclasses.dataclass(frozen=True)
class Foreign:
    """A layer in a format that no registered scheme reads.

    Attributes:
        format: name of the format.
        evidence: what was seen.
        keys: the layer's keys.
        rivals: formats that look the same from the header; which one it is decides
            what the numbers are.
    """

    format: str
    evidence: str
    keys: tuple[str, ...]
    rivals: tuple[str, ...] = ()


def comfy_marker(header: Header, layer: str) -> Mapping[str, object] | None:
    """What ComfyUI's markers say of a layer: of its own tensor, else of the header."""
    own = header.marker(join(layer, LAYER_MARKER))
    return comfy_layers(header).get(layer) if own is None else own


def comfy_layers(header: Header) -> Mapping[str, Mapping[str, object]]:
    """What the header's metadata says in ComfyUI's manner, by layer."""
    return header.said_of_layers(FILE_MARKER)


def find_foreign(header: Header, claimed: Collection[str]) -> dict[str, Foreign]:
    """The layers no scheme claimed that are in a format of the table.

    Args:
        header: of the checkpoint.
        claimed: layers that schemes read.
    """
    found = {}
    known: dict[Hashable, tuple[Format, str] | None] = {}  # many layers are alike
    for layer, group in _groups(header, claimed).items():
        kind = signature(group), repr(comfy_marker(header, layer))
        if kind not in known:
            known[kind] = _name(header, layer, group)
        if (named := known[kind]) is not None:
            (of, evidence), keys = named, tuple(join(layer, name) for name in group)
            found[layer] = Foreign(of.name, evidence, keys, of.rivals)
    return found


def _name(header: Header, layer: str, group: Group) -> tuple[Format, str] | None:
    """The first format of the table that a layer is in, and the evidence."""
    fits = (known for known in FORMATS if _is(known, header, layer, group))
    found = next(fits, None)
    return None if found is None else (found, _evidence(group))


def _groups(header: Header, claimed: Collection[str]) -> dict[str, Group]:
    """Last parts of keys by layer; ``X.weight.absmax`` is ``weight.absmax`` of X."""
    groups: dict[str, dict[str, TensorInfo]] = {}
    for owner, parts in header.parts.items():
        layer, dot, rest = f".{owner}.".partition(".weight.")
        layer, within = (layer[1:], f"weight.{rest}") if dot else (owner, "")
        if layer not in claimed:
            group = groups.setdefault(layer, {})
            group.update({within + name: info for name, info in parts.items()})
    return {
        layer: group
        for layer, group in groups.items()
        if len(group) > 1 and not _is_dense(group)
    }


def _is_dense(group: Group) -> bool:
    """Whether all there is are a weight of plain numbers and a bias, as nearly all."""
    weight = group.get("weight")
    if weight is None or weight.dtype not in PLAIN_DTYPES:
        return False
    return len(group) == 2 and "bias" in group


def _is(known: Format, header: Header, layer: str, group: Group) -> bool:
    if any(name not in group for name in known.needs):
        return False
    if known.marked:
        marker = comfy_marker(header, layer)
        if marker is None:
            return False
        said = str(marker.get("format", ""))
        if known.marked != ANY_MARKER and said not in known.marked:
            return False
    return known.test is None or known.test(header, layer, group)


def _evidence(group: Group) -> str:
    """The tensors of codes and scales; those of a whole module may be many."""
    seen = [
        f"{name} {info.dtype} {list(info.shape)}"
        for name, info in group.items()
        if name != "bias"
    ]
    return ", ".join(seen[:6]) + (" ..." if len(seen) > 6 else "")
