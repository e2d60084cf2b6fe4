"""Formats hijack can name and not read: told by keys, dtypes, shapes and markers.

They are listed so that `identify` can say what a file is. A plugin with a scheme for
one of them claims its layers before this table is asked.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping

from hijack.formats.dialect import Row
from hijack.safetensors_io.header import Header, TensorInfo

#: ComfyUI's marker of one layer: JSON in a tensor of bytes.
LAYER_MARKER = "comfy_quant"
#: For `Format.marked`: any marker of ComfyUI's, whatever it says.
ANY_MARKER = ("*",)
#: Last part of a key, or of two, to the layer's tensor.
Group = Mapping[str, TensorInfo]


@dataclasses.dataclass(frozen=True)
class Format:
    """One row of the table.

    Attributes:
        name: what people call it.
        row: for ``docs/formats.md``.
        needs: last parts of keys that a layer of the format has.
        test: a closer look at the layer's tensors, given (header, layer, group).
        marked: values of ``format`` in ComfyUI's marker, or `ANY_MARKER`.
        rivals: formats of which the header looks the same.
    """

    name: str
    row: Row
    needs: tuple[str, ...] = ()
    test: Callable[[Header, str, Group], bool] | None = None
    marked: tuple[str, ...] = ()
    rivals: tuple[str, ...] = ()


def _of(name: str, *dtypes: str) -> Callable[[Header, str, Group], bool]:
    """Whether a tensor has one of some dtypes."""

    def test(header: Header, layer: str, group: Group) -> bool:
        return group[name].dtype in dtypes

    return test


def _method(name: str) -> Callable[[Header, str, Group], bool]:
    """Whether the config names a quantization method."""

    def test(header: Header, layer: str, group: Group) -> bool:
        return header.quantization.get("quant_method") == name

    return test


def _nvfp4(header: Header, layer: str, group: Group) -> bool:
    return (
        group["weight"].dtype == "U8"
        and group["weight_scale"].dtype == "F8_E4M3"
        and len(group["weight"].shape) == len(group["weight_scale"].shape) == 2
    )


def _nvfp4_plain(header: Header, layer: str, group: Group) -> bool:
    """Scales in plain order: as the config says, or of a shape no tiles have."""
    said = _method("modelopt")(header, layer, group)
    return _nvfp4(header, layer, group) and (said or not _tiled(group))


def _tiled(group: Group) -> bool:
    """Whether the scales have the shape of whole tiles of 128 x 4."""
    rows, cols = group["weight_scale"].shape
    (n, half) = group["weight"].shape
    return rows == -(-n // 128) * 128 and cols == -(-half // 32) * 4


def _bitsandbytes(header: Header, layer: str, group: Group) -> bool:
    return any(name.startswith("weight.quant_state.bitsandbytes__") for name in group)


def _quanto(header: Header, layer: str, group: Group) -> bool:
    return any(name.startswith("weight._data") for name in group)


def _torchao(header: Header, layer: str, group: Group) -> bool:
    """Codes of a parameter of any name, with their scales."""
    return any(
        name.startswith("_") and f"{name.removesuffix('_qdata')}_scale" in group
        for name in group
        if name.endswith("_qdata")
    ) or any(name.endswith(":qdata") for name in group)


def _compressed_int8(header: Header, layer: str, group: Group) -> bool:
    """Integers that the config is of; without one they may be anybody's."""
    config = _method("compressed-tensors")(header, layer, group)
    return config and group["weight"].dtype == "I8"


def _fnuz(header: Header, layer: str, group: Group) -> bool:
    """FP8 as AMD's older units have it, whose codes are half of what they look like."""
    scaled = any("scale" in name for name in group)
    return scaled and group["weight"].dtype.endswith("FNUZ")


def _stacked(header: Header, layer: str, group: Group) -> bool:
    """FP8 codes under a name of their own, and a scale named after them."""
    return any(
        other.startswith(f"{name}_scale")
        for name, info in group.items()
        if info.dtype.startswith("F8_E") and name != "weight"
        for other in group
    )


def _gptq(header: Header, layer: str, group: Group) -> bool:
    """Packed along the columns: as wide as its scales, which AWQ's codes are not."""
    wide = group["qweight"].shape[-1:] == group["scales"].shape[-1:]
    return "g_idx" in group or wide


def _mxfp4(header: Header, layer: str, group: Group) -> bool:
    """Blocks of codes, and scales of the same name."""
    return any(
        info.dtype == "U8" and f"{name.removesuffix('blocks')}scales" in group
        for name, info in group.items()
        if name.endswith("blocks")
    )


def _fp4(header: Header, layer: str, group: Group) -> bool:
    codes, scale = group["weight"].dtype, group["scale"].dtype
    return codes in ("I8", "U8") and scale in ("U8", "F8_E8M0")


def _integers(header: Header, layer: str, group: Group) -> bool:
    return group["weight"].dtype in ("I8", "U8")


_COMFY = "X.comfy_quant, JSON in bytes"
_CONFIG = "config.json, quantization_config"

#: In the order of asking: the most specific first.
FORMATS: tuple[Format, ...] = (
    Format(
        "bitsandbytes 4-bit",
        Row(
            "bitsandbytes",
            "X.weight, X.weight.absmax, X.weight.quant_map, X.weight.quant_state.*",
            "absmax, one for each block of the flattened weight",
            "64 elements, nf4 or fp4 codes, U8 [n/2, 1]",
            "the key X.weight.quant_state.bitsandbytes__nf4",
        ),
        test=_bitsandbytes,
    ),
    Format(
        "bitsandbytes int8",
        Row("bitsandbytes", "X.weight, X.SCB", "F32 [N]", "1 x K", "the key X.SCB"),
        needs=("weight", "SCB"),
        test=_of("weight", "I8"),
    ),
    Format(
        "nunchaku SVDQuant",
        Row(
            "nunchaku",
            "X.qweight, X.wscales, X.proj_down, X.proj_up, X.smooth_factor",
            "[K/group, N], transposed",
            "4-bit codes in I8 [N, K/2]",
            "header metadata config, comfy_config, model_class",
        ),
        needs=("qweight", "wscales"),
    ),
    Format(
        "GPTQ",
        Row("GPTQ", "X.qweight, X.qzeros, X.scales, X.g_idx", "F16", "groups", _CONFIG),
        needs=("qweight", "qzeros", "scales"),
        test=_gptq,
    ),
    Format(
        "AWQ",
        Row("AWQ", "X.qweight, X.qzeros, X.scales", "F16", "groups", _CONFIG),
        needs=("qweight", "qzeros", "scales"),
    ),
    Format(
        "packed integers of another kind",
        Row("many", "X.qweight, X.scales", "any", "any", _CONFIG),
        needs=("qweight",),
    ),
    Format(
        "compressed-tensors nvfp4",
        Row(
            "compressed-tensors",
            "X.weight_packed, X.weight_scale, X.weight_global_scale",
            "F8_E4M3 [N, K/16]; the global scale divides",
            "1 x 16, E2M1 codes in U8",
            _CONFIG,
        ),
        needs=("weight_packed", "weight_global_scale"),
    ),
    Format(
        "compressed-tensors packed",
        Row(
            "compressed-tensors",
            "X.weight_packed, X.weight_scale, X.weight_shape",
            "model's dtype",
            "groups of 4- or 8-bit integers, or MXFP4",
            _CONFIG,
        ),
        needs=("weight_packed", "weight_scale"),
    ),
    Format(
        "quanto",
        Row(
            "optimum-quanto",
            "X.weight._data, X.weight._scale, X.weight._shift",
            "as the codes",
            "integers, packed",
            "a JSON map apart from the file",
        ),
        needs=("weight._scale",),
        test=_quanto,
    ),
    Format(
        "torchao of another kind",
        Row(
            "torchao",
            "X._weight_qdata, X._weight_scale; X.weight:qdata up to 0.14",
            "by its class",
            "by its class, such as MXTensor with scales in tiles, or Int4Tensor",
            "metadata, one entry for each tensor, with its `_type`",
        ),
        test=_torchao,
    ),
    Format(
        "stacked FP8 experts",
        Row(
            "transformers",
            "P.gate_up_proj, P.gate_up_proj_scale_inv or P.gate_up_proj_scale",
            "F32 (E, ceil(N/R), ceil(K/C)) for (E, N, K)",
            "128 x 128",
            _CONFIG,
        ),
        test=_stacked,
    ),
    Format(
        "SDNQ",
        Row(
            "sdnq",
            "X.weight, X.scale, X.zero_point, X.svd_up, X.svd_down",
            "by its config",
            "groups; FP8 that is rotated, or has more than one scale",
            _CONFIG + ", quant_method sdnq",
        ),
        needs=("weight", "scale"),
        test=_method("sdnq"),
    ),
    Format(
        "MXFP4 experts",
        Row(
            "gpt-oss",
            "P_blocks, P_scales; P.blocks, P.scales",
            "U8 exponents",
            "1 x 32, E2M1",
            _CONFIG,
        ),
        test=_mxfp4,
    ),
    Format(
        "comfy_quant nvfp4",
        Row(
            "ComfyUI, comfy-kitchen",
            "X.weight, X.weight_scale, X.weight_scale_2",
            "F8_E4M3, tiles of 128 x 4; and one F32 that multiplies",
            "1 x 16, E2M1 codes in U8, the even element in the high bits",
            _COMFY,
        ),
        needs=("weight", "weight_scale", "weight_scale_2"),
        marked=("nvfp4",),
    ),
    Format(
        "ModelOpt nvfp4",
        Row(
            "Black Forest Labs, TensorRT Model Optimizer",
            "X.weight, X.weight_scale, X.weight_scale_2, X.input_scale",
            "F8_E4M3 [N, K/16] in plain order; and one F32 that multiplies",
            "1 x 16, E2M1 codes in U8, the even element in the low bits",
            "none; of the same shapes as ComfyUI's where 128 divides N and 64 K",
        ),
        needs=("weight", "weight_scale", "weight_scale_2"),
        test=_nvfp4_plain,
    ),
    Format(
        "nvfp4 without a marker",
        Row(
            "ComfyUI or ModelOpt; nobody can tell",
            "X.weight, X.weight_scale, X.weight_scale_2",
            "F8_E4M3; the order of scales and of the two halves of a byte is unknown",
            "1 x 16",
            "none",
        ),
        needs=("weight", "weight_scale", "weight_scale_2"),
        test=_nvfp4,
        rivals=("comfy_quant nvfp4", "ModelOpt nvfp4"),
    ),
    Format(
        "comfy_quant int8_tensorwise",
        Row("ComfyUI", "X.weight, X.weight_scale", "[], [N] or [N, 1]", "all", _COMFY),
        needs=("weight",),
        marked=("int8_tensorwise",),
        test=_of("weight", "I8"),
    ),
    Format(
        "comfy_quant convrot_w4a4",
        Row(
            "ComfyUI",
            "X.weight, X.weight_scale",
            "groups of 64",
            "4-bit in I8, rotated by Hadamard matrices of 256",
            _COMFY,
        ),
        needs=("weight",),
        marked=("convrot_w4a4",),
        test=_of("weight", "I8", "U8"),
    ),
    Format(
        "comfy_quant asym_w4a8_int8",
        Row(
            "ComfyUI",
            "X.weight, X.weight_s_rel, X.weight_s_channel, X.weight_codebook",
            "F8_E4M3 times F32 per row",
            "4-bit indexes into a table of 16",
            _COMFY,
        ),
        needs=("weight", "weight_s_rel", "weight_s_channel"),
    ),
    Format(
        "convert_to_quant int8_blockwise",
        Row(
            "convert_to_quant",
            "X.weight, X.weight_scale",
            "F32 [N/128, K/128]",
            "128 x 128, I8; refused where it does not divide",
            _COMFY,
        ),
        needs=("weight", "weight_scale"),
        marked=("int8_blockwise",),
        test=_of("weight", "I8"),
    ),
    Format(
        "comfy-quants int8_w8a8",
        Row(
            "comfy-quants, INT8-Fast",
            "X.weight, X.weight_scale",
            "F32 [N, 1]",
            "1 x K, I8",
            _COMFY + ", without `format`",
        ),
        needs=("weight", "weight_scale"),
        marked=("",),
        test=_of("weight", "I8"),
    ),
    Format(
        "comfy_quant of another kind",
        Row("ComfyUI or a node pack", "X.weight", "unknown", "unknown", _COMFY),
        needs=("weight",),
        marked=ANY_MARKER,
        test=_of("weight", "I8", "U8", "F8_E4M3", "F8_E5M2"),
    ),
    Format(
        "compressed-tensors int8",
        Row("compressed-tensors", "X.weight, X.weight_scale", "any", "any", _CONFIG),
        needs=("weight", "weight_scale"),
        test=_compressed_int8,
    ),
    Format(
        "int8 without a marker",
        Row("many", "X.weight, X.weight_scale", "any", "any; maybe rotated", "none"),
        needs=("weight", "weight_scale"),
        test=_of("weight", "I8"),
    ),
    Format(
        "FP8 FNUZ",
        Row(
            "vLLM on AMD's older units",
            "X.weight, X.weight_scale or another",
            "any",
            "any; codes with another bias, and no minus zero",
            "the dtype F8_E4M3FNUZ or F8_E5M2FNUZ",
        ),
        needs=("weight",),
        test=_fnuz,
    ),
    Format(
        "HQQ",
        Row(
            "hqq, transformers",
            "X.W_q, X.scale, X.zero",
            "model's dtype",
            "groups of 64, 1- to 8-bit integers, packed",
            "the key X.W_q",
        ),
        needs=("W_q", "scale", "zero"),
    ),
    Format(
        "DeepSeek FP4 experts",
        Row(
            "DeepSeek-V4",
            "X.weight, X.scale",
            "U8 or F8_E8M0 exponents",
            "1 x 32, two E2M1 codes in an I8",
            _CONFIG,
        ),
        needs=("weight", "scale"),
        test=_fp4,
    ),
    Format(
        "integers without a marker",
        Row(
            "SDNQ without its config, and others",
            "X.weight, X.scale, X.zero_point",
            "any",
            "groups; maybe packed, maybe rotated",
            "none",
        ),
        needs=("weight", "scale"),
        test=_integers,
    ),
)
