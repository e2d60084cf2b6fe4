"""Formats that hijack recognises by name but has no scheme to read.

They are listed so that `identify` can say what a file is. A plugin with a scheme for
one of them claims its layers before this table is consulted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Hashable, Mapping

from hijack.formats.comfyui_markers import is_marked, layer_marker
from hijack.safetensors_io.header import (
    DENSE_NAMES,
    Header,
    TensorInfo,
    join,
    signature,
)
from hijack.text import excerpt

#: The rest of a key after the layer's name, to the tensor.
Group = Mapping[str, TensorInfo]
Test = Callable[[Header, Group], bool]


@dataclasses.dataclass(frozen=True)
class UnsupportedLayer:
    """A layer in a format that no registered scheme reads.

    Attributes:
        format: name of the format.
        evidence: dtypes and shapes of its tensors, human-readable.
        keys: the layer's keys.
    """

    format: str
    evidence: str
    keys: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Format:
    """One row of the table.

    Attributes:
        name: common name of the format.
        needs: the tensors that a layer of the format has, separated by spaces.
        test: a closer look at the layer's tensors.
        marked: whether a marker of ComfyUI's must be there, whatever it says.
    """

    name: str
    needs: str = ""
    test: Test | None = None
    marked: bool = False

    def matches(self, header: Header, layer: str, group: Group) -> bool:
        """Whether a layer with these tensors is in the format."""
        if any(name not in group for name in self.needs.split()):
            return False
        if self.marked and not is_marked(header, layer):
            return False
        return self.test is None or self.test(header, group)


def find_unsupported(
    header: Header, claimed: Collection[str]
) -> dict[str, UnsupportedLayer]:
    """The layers no scheme claimed that are in a format of the table.

    Args:
        header: of the checkpoint.
        claimed: layers that schemes read.
    """
    unsupported = {}
    cache: dict[Hashable, Format | None] = {}  # many layers are alike
    for layer, group in _groups(header, claimed).items():
        kind = signature(group), is_marked(header, layer)
        if kind not in cache:
            matches = (row for row in FORMATS if row.matches(header, layer, group))
            cache[kind] = next(matches, None)
        if (row := cache[kind]) is not None:
            keys = tuple(join(layer, name) for name in group)
            evidence = _evidence(group) + _marked_as(header, layer)
            unsupported[layer] = UnsupportedLayer(row.name, evidence, keys)
    return unsupported


def _groups(header: Header, claimed: Collection[str]) -> dict[str, Group]:
    """Tensors by layer; ``X.weight.absmax`` is ``weight.absmax`` of X."""
    groups: dict[str, dict[str, TensorInfo]] = {}
    for owner, parts in header.parts.items():
        layer, dot, rest = f".{owner}.".partition(".weight.")
        layer, prefix = (layer[1:], f"weight.{rest}") if dot else (owner, "")
        if layer not in claimed:
            group = groups.setdefault(layer, {})
            group.update({prefix + name: info for name, info in parts.items()})
    return {
        layer: group
        for layer, group in groups.items()
        if len(group) > 1 and not _is_dense(group)
    }


def _is_dense(group: Group) -> bool:
    """Whether a layer has nothing but a weight in a dense dtype and a bias."""
    weight = group.get("weight")
    if weight is None or weight.dtype not in DENSE_NAMES:
        return False
    return len(group) == 2 and "bias" in group


def _marked_as(header: Header, layer: str) -> str:
    """The format that ComfyUI's marker names, if it names one."""
    named = (layer_marker(header, layer) or {}).get("format")
    return f", comfy_quant says {excerpt(named)}" if named else ""


def _evidence(group: Group) -> str:
    """The tensors of quantized data and scales; a whole module may have many."""
    tensors = [
        f"{name} {info.dtype} {list(info.shape)}"
        for name, info in group.items()
        if name != "bias"
    ]
    return ", ".join(tensors[:6]) + (" ..." if len(tensors) > 6 else "")


# -- tests -----------------------------------------------------------------------------


def _of(name: str, *dtypes: str) -> Test:
    """Whether a tensor has one of some dtypes."""
    return lambda header, group: group[name].dtype in dtypes


def _method(name: str) -> Test:
    """Whether the config names a quantization method."""
    return lambda header, group: header.quantization.get("quant_method") == name


def _nvfp4(header: Header, group: Group) -> bool:
    return (
        group["weight"].dtype == "U8"
        and group["weight_scale"].dtype == "F8_E4M3"
        and len(group["weight"].shape) == len(group["weight_scale"].shape) == 2
    )


def _bitsandbytes(header: Header, group: Group) -> bool:
    """Tensors of its names; with a state that cannot be read, or without any."""
    return "weight.absmax" in group or any(
        name.startswith("weight.quant_state.bitsandbytes__") for name in group
    )


def _quanto(header: Header, group: Group) -> bool:
    return any(name.startswith("weight._data") for name in group)


def _torchao(header: Header, group: Group) -> bool:
    """Quantized data of a parameter of any name, with its scales."""
    return any(
        name.startswith("_") and f"{name.removesuffix('_qdata')}_scale" in group
        for name in group
        if name.endswith("_qdata")
    ) or any(name.endswith(":qdata") for name in group)


def _compressed_int8(header: Header, group: Group) -> bool:
    """Integers with the config; without one they may be of any format."""
    config = _method("compressed-tensors")(header, group)
    return config and group["weight"].dtype == "I8"


def _fnuz(header: Header, group: Group) -> bool:
    """FP8 of older AMD GPUs, whose bytes decode to half of what E4M3's do."""
    scaled = any("scale" in name for name in group)
    return scaled and group["weight"].dtype.endswith("FNUZ")


def _stacked(header: Header, group: Group) -> bool:
    """FP8 data that is not called ``weight``, and a scale named after it."""
    return any(
        other.startswith(f"{name}_scale")
        for name, info in group.items()
        if info.dtype.startswith("F8_E") and name != "weight"
        for other in group
    )


def _gptq(header: Header, group: Group) -> bool:
    """Packed along the rows: as wide as its scales, which AWQ's data is not."""
    wide = group["qweight"].shape[-1:] == group["scales"].shape[-1:]
    return "g_idx" in group or wide


def _mxfp4(header: Header, group: Group) -> bool:
    """Blocks of quantized data, and scales of the same name."""
    return any(
        info.dtype == "U8" and f"{name.removesuffix('blocks')}scales" in group
        for name, info in group.items()
        if name.endswith("blocks")
    )


def _fp4(header: Header, group: Group) -> bool:
    data, scale = group["weight"].dtype, group["scale"].dtype
    return data in ("I8", "U8") and scale in ("U8", "F8_E8M0")


#: The most specific first: the first that matches wins.
FORMATS: tuple[Format, ...] = (
    Format("bitsandbytes 4-bit", test=_bitsandbytes),
    Format("nunchaku SVDQuant", "qweight wscales"),
    Format("GPTQ", "qweight qzeros scales", _gptq),
    Format("AWQ", "qweight qzeros scales"),
    Format("packed integers of another kind", "qweight"),
    Format("compressed-tensors packed", "weight_packed weight_scale"),
    Format("quanto", "weight._scale", _quanto),
    Format("torchao of another kind", test=_torchao),
    Format("stacked FP8 experts", test=_stacked),
    Format("SDNQ", "weight scale", _method("sdnq")),
    Format("MXFP4 experts", test=_mxfp4),
    Format("w4a8 of another kind", "weight weight_s_rel weight_s_channel"),
    Format("nvfp4 of another kind", "weight weight_scale weight_scale_2", _nvfp4),
    Format(
        "comfy_quant of another kind",
        "weight",
        _of("weight", "I8", "U8", "F8_E4M3", "F8_E5M2"),
        marked=True,
    ),
    Format("compressed-tensors int8", "weight weight_scale", _compressed_int8),
    Format("int8 of another kind", "weight weight_scale", _of("weight", "I8")),
    Format("FP8 FNUZ", "weight", _fnuz),
    Format("HQQ", "W_q scale zero"),
    Format("DeepSeek FP4 experts", "weight scale", _fp4),
    Format("integers without a marker", "weight scale", _of("weight", "I8", "U8")),
)
