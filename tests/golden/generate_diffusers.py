"""Golden files of Black Forest Labs' formats, by diffusers' own functions."""

from __future__ import annotations

import diffusers
import torch
from _folder import randn, said, write
from diffusers.quantizers.bfl.utils import (
    dequantize_fp8r,
    quantize_fp8r,
    quantize_nvfp4,
)

PROGRAM = f"diffusers {diffusers.__version__}"


def main():
    """Write all folders."""
    weights = {"blocks.0.qkv": randn(24, 40, seed=1), "blocks.0.mlp": randn(16, 24)}
    tensors, dense = {"norm.weight": torch.ones(8, dtype=torch.bfloat16)}, {}
    for layer, weight in weights.items():
        codes, scale = quantize_fp8r(weight)
        tensors[f"{layer}.weight"], tensors[f"{layer}.weight_scale"] = codes, scale
        dense[layer] = dequantize_fp8r(codes, scale)
    write(
        "fp8r",
        tensors,
        program=PROGRAM,
        about="a scale for each row, one-dimensional, and no marker",
        dense=dense,
        layers=said("fp8r", blocks__0__qkv=(1, 40), blocks__0__mlp=(1, 24)),
    )
    names = {(24, 64): "ModelOpt nvfp4", (128, 64): "nvfp4 without a marker"}
    for shape, name in names.items():
        parts = dict(
            zip(
                ("weight", "weight_scale", "weight_scale_2"),
                quantize_nvfp4(randn(*shape)),
                strict=True,
            )
        )
        parts["input_scale"] = torch.tensor(0.5)
        write(
            "foreign_bfl_nvfp4" if shape == (24, 64) else "foreign_nvfp4_ambiguous",
            {f"proj.{key}": tensor for key, tensor in parts.items()},
            program=PROGRAM,
            about=f"nvfp4 of {shape[0]}x{shape[1]}, as ModelOpt writes it",
            foreign={"proj": name},
        )


if __name__ == "__main__":
    main()
