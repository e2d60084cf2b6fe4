"""Golden files of convert_to_quant, by its command line's own functions.

Its converters correct biases by random inputs; only weights are kept. The files of
before, which a tensor ``scaled_fp8`` marks, it no longer writes: their keys are put
back here, as its own migration takes them apart.
"""

from __future__ import annotations

import importlib.metadata
import json
import tempfile
from pathlib import Path

import torch
from _folder import comfy_marker, randn, said, said_by, write
from convert_to_quant.comfy.quant_ops import (
    BlockWiseFP8Layout,
    BlockWiseINT8Layout,
    RowWiseFP8Layout,
    TensorCoreFP8Layout,
)
from convert_to_quant.formats.format_migration import (
    convert_fp8_scaled_to_comfy_quant,
)
from convert_to_quant.formats.fp8_conversion import convert_to_fp8_scaled
from convert_to_quant.formats.hybrid_mxfp8_conversion import convert_to_hybrid_mxfp8
from convert_to_quant.formats.mxfp8_conversion import convert_to_mxfp8
from convert_to_quant.utils.float_utils import e8m0_to_f32, from_blocked
from safetensors import safe_open
from safetensors.torch import save_file

PROGRAM = f"convert_to_quant {importlib.metadata.version('convert_to_quant')}"
MARK = torch.empty(0, dtype=torch.float8_e4m3fn)
SHAPES = {"blocks.0.even": (32, 32), "blocks.0.ragged": (24, 40)}


def weights(shapes):
    """Weights of layers; one called ``zero`` is of zeros."""
    dense = {
        f"{layer}.weight": randn(*shape, seed=seed, dtype=torch.bfloat16)
        for seed, (layer, shape) in enumerate(shapes.items())
    }
    for key, weight in dense.items():
        weight.mul_(0 if "zero" in key else 1)
    return dense


def through(function, tensors, *args, metadata=None, **options):
    """Tensors and metadata after a function from file to file."""
    with tempfile.TemporaryDirectory() as folder:
        source, target = Path(folder) / "in", Path(folder) / "out"
        save_file(tensors, source, metadata)
        function(str(source), str(target), *args, **options)
        with safe_open(target, "pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata()  # noqa: SIM118


def convert(shapes, mode, **options):
    """Tensors and metadata of a model quantized with blocks of 16."""
    return through(
        convert_to_fp8_scaled,
        weights(shapes),
        True,
        {},
        16,
        0,
        scaling_mode=mode,
        block_size=16,
        no_learned_rounding=True,
        device="cpu",
        **options,
    )


def dequantize(weight, scale):
    """A layer by the layout that fits its scale."""
    f32 = torch.float32
    if scale.numel() == 1:
        return TensorCoreFP8Layout.dequantize(weight, scale.float(), f32)
    if scale.ndim == 1 or scale.shape == (weight.shape[0], 1):
        return RowWiseFP8Layout.dequantize(weight, scale.flatten(), f32)
    if scale.ndim == 3:  # its layouts have none for it any more
        blocks = weight.to(f32).view(*scale.shape[:2], -1) * scale
        return blocks.view_as(weight)
    size = weight.shape[0] // scale.shape[0]
    return BlockWiseFP8Layout.dequantize(weight, scale, size, f32)


def dequantize_mx(weight, scale, shape):
    """An MXFP8 layer, cut to its own shape."""
    n, k = weight.shape
    plain = e8m0_to_f32(from_blocked(scale, n, k // 32))
    blocks = weight.float().view(n, k // 32, 32) * plain[:, :, None]
    return blocks.view(n, k)[: shape[0], : shape[1]].contiguous()


def folder(name, about, tensors, metadata, layers, dialect="comfy_quant", **more):
    """Write a folder whose dense weights convert_to_quant gives."""
    suffix = "scale_weight" if dialect == "scaled_fp8" else "weight_scale"
    dense = {
        layer: dequantize(tensors[f"{layer}.weight"], tensors[f"{layer}.{suffix}"])
        for layer in layers
    }
    write(
        name,
        tensors,
        metadata=metadata,
        program=PROGRAM,
        about=about,
        dense=dense,
        layers={la: v for d in layers.values() for la, v in d.items()},
        **more,
    )


def sizes(dialect, layers):
    """Layers as the folder wants them."""
    return {la: said(dialect, **{la.replace(".", "__"): s}) for la, s in layers.items()}


def main():
    """Write all folders."""
    write_floats()
    write_int8()
    write_mx()
    write_migrated()
    write_legacy()


def write_floats():
    """One scale, rows and blocks, as it writes them today."""
    even, ragged = "blocks.0.even", "blocks.0.ragged"
    tensors, metadata = convert(SHAPES, "tensor", save_quant_metadata=True)
    layers = sizes("comfy_quant", {even: (32, 32), ragged: (24, 40)})
    about = "one scale, markers in the tensors and the header"
    folder("c2q_tensor", about, tensors, metadata, layers)
    tensors, metadata = convert(
        SHAPES, "row", save_quant_metadata=False, include_input_scale=True
    )
    layers = sizes("comfy_quant", {even: (1, 32), ragged: (1, 40)})
    about = "rows, and an input_scale of one"
    folder("c2q_rowwise", about, tensors, metadata, layers)
    shapes = {**SHAPES, "blocks.0.zero": (20, 32)}
    tensors, metadata = convert(shapes, "block", save_quant_metadata=False)
    layers = {even: (16, 16), ragged: (1, 40), "blocks.0.zero": (20, 32)}
    about = (
        "all marked as blocks of 16; where those do not divide it is rows, or one "
        "scale if all is zero"
    )
    layers = sizes("comfy_quant", layers)
    wrong = [ragged, "blocks.0.zero"]
    folder("c2q_blockwise", about, tensors, metadata, layers, contradicted=wrong)
    nested = {"format": "float8_e4m3fn_blockwise", "params": {"group_size": 16}}
    tensors = {k: t for k, t in tensors.items() if "even" in k}
    tensors[f"{even}.comfy_quant"] = comfy_marker(**nested)
    layers = sizes("comfy_quant", {even: (16, 16)})
    about = "group_size under params, as versions before 1.2 had it"
    folder("c2q_nested", about, tensors, metadata, layers)


def write_int8():
    """Square blocks of integers, which ComfyUI knows no more."""
    shapes = {"blocks.0.even": (32, 32), "blocks.0.wide": (16, 48)}
    tensors, metadata = convert(shapes, "block", save_quant_metadata=False, int8=True)
    size, f32 = 16, torch.float32
    dense = {
        layer: BlockWiseINT8Layout.dequantize(
            tensors[f"{layer}.weight"],
            tensors[f"{layer}.weight_scale"],
            size,
            is_weight=True,
            orig_dtype=f32,
        )
        for layer in shapes
    }
    names = [layer.replace(".", "__") for layer in shapes]
    write(
        "c2q_int8",
        tensors,
        metadata=metadata,
        program=PROGRAM,
        about="int8_blockwise, blocks of 16",
        dense=dense,
        layers=said_by("int8", "comfy_quant", **dict.fromkeys(names, (size, size))),
    )


def write_mx():
    """MXFP8 and its hybrid, with shapes that are padded."""
    shapes = {"blocks.0.even": (32, 32), "blocks.0.ragged": (24, 40)}
    tensors, metadata = through(
        convert_to_mxfp8, weights(shapes), simple=True, calib_samples=16
    )
    about = "exponents in tiles; 24x40 is padded to 32x64, which the marker says"
    write_padded("c2q_mxfp8", about, tensors, metadata, shapes)
    tensors, metadata = through(convert_to_hybrid_mxfp8, tensors, metadata=metadata)
    about = "MXFP8 with one more scale for GPUs without it, which changes nothing"
    write_padded("c2q_hybrid_mxfp8", about, tensors, metadata, shapes)


def write_padded(name, about, tensors, metadata, shapes):
    """Write a folder of padded layers."""
    dense = {
        layer: dequantize_mx(
            tensors[f"{layer}.weight"], tensors[f"{layer}.weight_scale"], shape
        )
        for layer, shape in shapes.items()
    }
    names = [layer.replace(".", "__") for layer in shapes]
    write(
        name,
        tensors,
        metadata=metadata,
        program=PROGRAM,
        about=about,
        dense=dense,
        shapes=shapes,
        layers=said("comfy_quant", **dict.fromkeys(names, (1, 32))),
    )


def write_migrated():
    """A file of musubi-tuner's shapes after --convert-fp8-scaled: wrong markers."""
    tensors = {"scaled_fp8": MARK}
    expected = {}
    for seed, (layer, block) in enumerate({"blocks": (1, 16), "rows": (1, 40)}.items()):
        shape = (24, 48) if layer == "blocks" else (20, 40)
        weight = randn(*shape, seed=seed)
        parts = weight.view(shape[0], -1, block[1])
        scale = (parts.abs().amax(2, keepdim=True) / 448).bfloat16()
        codes = (parts / scale.float()).clamp(-448, 448).view(shape)
        tensors[f"{layer}.weight"] = codes.to(torch.float8_e4m3fn)
        scale = scale if layer == "blocks" else scale[:, 0]
        tensors[f"{layer}.scale_weight"] = scale
        expected[layer] = block
    tensors, metadata = through(
        convert_fp8_scaled_to_comfy_quant, tensors, save_quant_metadata=True
    )
    about = (
        "--convert-fp8-scaled on a musubi file: blocks marked block3d without a size, "
        "rows as blocks of 1, bfloat16 scales"
    )
    layers = sizes("comfy_quant", expected)
    wrong = ["rows"]
    folder("c2q_migrated", about, tensors, metadata, layers, contradicted=wrong)
    nested = json.loads(metadata["_quantization_metadata"])["layers"]
    assert nested["blocks"] == {"format": "float8_e4m3fn_block3d"}


def write_legacy():
    """Files marked as a whole, with scales ComfyUI does not read."""
    even, ragged = "blocks.0.even", "blocks.0.ragged"
    expected = {
        "row": {even: (1, 32), ragged: (1, 40)},
        "block": {even: (16, 16), ragged: (1, 40)},
    }
    for mode, blocks in expected.items():
        tensors, _ = convert(SHAPES, mode, save_quant_metadata=False)
        old = {"scaled_fp8": torch.zeros(2).to(MARK.dtype) if mode == "row" else MARK}
        for key, tensor in tensors.items():
            if not key.endswith("comfy_quant"):
                old[key.replace("weight_scale", "scale_weight")] = tensor
            if mode == "block" and key.endswith("weight_scale"):
                name = key.replace("weight_scale", "scale_input")
                old[name] = torch.ones_like(tensor)
        folder(
            f"c2q_legacy_{mode}",
            "the legacy marker over one scale a row"
            if mode == "row"
            else "the legacy marker over blocks and rows, input scales of their shapes",
            old,
            None,
            sizes("scaled_fp8", blocks),
            "scaled_fp8",
            contradicted=[],
        )


if __name__ == "__main__":
    main()
