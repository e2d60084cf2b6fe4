"""Golden files of Black Forest Labs' FP8, by diffusers' own functions."""

from __future__ import annotations

import diffusers
import torch
from _folder import randn, said, write
from diffusers.quantizers.bfl.utils import dequantize_fp8r, quantize_fp8r

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


if __name__ == "__main__":
    main()
