"""Golden files of comfy-kitchen's packed rotated weights, as ComfyUI saves them.

Scales of rows are rounded to powers of two, which make every sum of the rotation exact:
the dense weights are then the same on every processor.
"""

# ruff: noqa: TID253
from __future__ import annotations

import dataclasses
import importlib.metadata

import torch
from _folder import comfy_marker, randn, said_by, write
from comfy_kitchen.tensor import AsymW4A8Int8Layout, TensorCoreConvRotW4A4Layout

PROGRAM = f"comfy-kitchen {importlib.metadata.version('comfy-kitchen')}"


def power(scale):
    """The next power of two."""
    return torch.exp2(torch.log2(scale).round())


def layer_of(layout, scale, name, weight, marker, **options):
    """Tensors of one layer by their keys, and its dense weight."""
    codes, params = layout.quantize(weight, **options)
    params = dataclasses.replace(params, **{scale: power(getattr(params, scale))})
    tensors = layout.state_dict_tensors(codes, params)
    keyed = {f"{name}.weight{end}": tensor for end, tensor in tensors.items()}
    keyed[f"{name}.comfy_quant"] = comfy_marker(**marker)
    return keyed, layout.dequantize(codes, params)


def folder(name, about, scheme, layers, **blocks):
    """Write a folder of some layers."""
    write(
        name,
        {key: t for tensors, _ in layers.values() for key, t in tensors.items()},
        program=PROGRAM,
        about=about,
        dense={layer: dense for layer, (_, dense) in layers.items()},
        layers=said_by(scheme, "comfy_quant", **blocks),
        shapes={layer: list(dense.shape) for layer, (_, dense) in layers.items()},
    )


def main():
    """Write both folders."""

    def eight(name, marker, **options):
        weight = randn(4, 256, seed=len(name))
        marker = {"format": "asym_w4a8_int8", **marker}
        return layer_of(
            AsymW4A8Int8Layout, "s_channel", name, weight, marker, **options
        )

    small = {"group_size": 32, "convrot_groupsize": 64}
    folder(
        "comfyui_w4a8",
        "a table; without one, a marker that says nothing; 6 bits in other groups",
        "w4a8",
        {
            "table": eight("table", {"group_size": 16, "convrot_groupsize": 256}),
            "plain": eight("plain", {}, codebook=False),
            "six": eight("six", small, bits=6, **small),
        },
        table=(1, 16),
        plain=(1, 16),
        six=(1, 32),
    )

    def four(name, marker, **options):
        weight = randn(4, 256, seed=len(name))
        layout = TensorCoreConvRotW4A4Layout
        marker = {"format": "convrot_w4a4", **marker}
        return layer_of(layout, "scale", name, weight, marker, **options)

    int8 = {"convrot_groupsize": 64, "linear_dtype": "int8"}
    folder(
        "comfyui_convrot_w4a4",
        "groups of 256, and of 64 to be multiplied in int8",
        "convrot_w4a4",
        {
            "usual": four("usual", {"convrot_groupsize": 256}),
            "eight": four("eight", {"params": int8}, **int8),
        },
        usual=(1, 256),
        eight=(1, 256),
    )


if __name__ == "__main__":
    main()
