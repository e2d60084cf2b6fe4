"""Golden files of musubi-tuner, by its own quantizer and its own forward.

Run with musubi-tuner's ``src`` on PYTHONPATH.
"""

from __future__ import annotations

import torch
from _folder import randn, said, write
from musubi_tuner.modules.fp8_optimization_utils import (
    fp8_linear_forward_patch,
    optimize_state_dict_with_fp8,
)

PROGRAM = "musubi-tuner 30c658c4, optimize_state_dict_with_fp8"


def quantize(weights, dtype, **options):
    """Quantize every layer under ``blocks``, and keep a norm and a bias beside them."""
    dense = {
        f"{layer}.weight": randn(*shape, seed=seed, dtype=dtype)
        for seed, (layer, shape) in enumerate(weights.items())
    }
    first = next(iter(weights))
    dense[f"{first}.bias"] = randn(weights[first][0], seed=50, dtype=dtype)
    dense["norm.weight"] = torch.ones(16, dtype=dtype)
    return dense, optimize_state_dict_with_fp8(dense, "cpu", ["blocks"], **options)


def dequantize(tensors, layer):
    """What the patched forward multiplies with: the rows of the identity, one each."""
    weight = tensors[f"{layer}.weight"]
    scale = tensors[f"{layer}.weight".replace(".weight", ".scale_weight")]
    if weight.ndim != 2:  # its forward is for Linear alone
        return weight.to(scale.dtype) * scale
    linear = torch.nn.Module()
    linear.weight, linear.scale_weight, linear.bias = weight, scale, None
    one = torch.eye(weight.shape[1], dtype=scale.dtype)
    return fp8_linear_forward_patch(linear, one).T.contiguous()


def main():
    """Write all folders."""
    shapes = {
        "blocks.0.attn": (24, 48),
        "blocks.0.ragged": (20, 24),
        "blocks.0.whole": (12, 16),
        "blocks.0.weight_mod": (8, 32),
        "blocks.0.conv": (4, 3, 3, 3),
        "blocks.0.row": (1, 32),
    }
    _, tensors = quantize(shapes, torch.bfloat16, block_size=16)
    write(
        "musubi",
        tensors,
        program=PROGRAM,
        about="blocks of 1x16; rows where 16 does not divide; one scale for a "
        "convolution; a scale whose key has every .weight replaced",
        dense={layer: dequantize(tensors, layer) for layer in shapes},
        layers=said(
            "musubi",
            blocks__0__attn=(1, 16),
            blocks__0__ragged=(1, 24),
            blocks__0__whole=(1, 16),
            blocks__0__weight_mod=(1, 16),
            blocks__0__conv=(4, 27),
            blocks__0__row=(1, 16),
        ),
    )
    # what scales of 1e-8 become in float16: zero
    dense = {"blocks.0.out.weight": randn(8, 32, dtype=torch.float16)}
    dense["blocks.0.out.weight"][2:4] = 0
    tensors = optimize_state_dict_with_fp8(dense, "cpu", ["blocks"], block_size=16)
    write(
        "musubi_float16",
        tensors,
        program=PROGRAM,
        about="float16 source with rows of zeros, whose scales are zero",
        dense={"blocks.0.out": dequantize(tensors, "blocks.0.out")},
        layers=said("musubi", blocks__0__out=(1, 16)),
    )
    _, tensors = quantize(
        {"blocks.0.attn": (24, 40)},
        torch.float32,
        exp_bits=5,
        mantissa_bits=2,
        quantization_mode="channel",
    )
    write(
        "musubi_e5m2",
        tensors,
        program=PROGRAM,
        about="E5M2 codes, rows, float32 scales",
        dense={"blocks.0.attn": dequantize(tensors, "blocks.0.attn")},
        layers=said("musubi", blocks__0__attn=(1, 40)),
    )
    _, tensors = quantize(
        {"blocks.0.attn": (24, 40), "blocks.0.ffn": (16, 24)},
        torch.bfloat16,
        quantization_mode="tensor",
    )
    write(
        "musubi_tensor",
        tensors,
        program=PROGRAM,
        about="one scale_weight of no dimensions for a layer, without a marker; "
        "Kijai's files look the same",
        dense={la: dequantize(tensors, la) for la in ("blocks.0.attn", "blocks.0.ffn")},
        layers=said("musubi", blocks__0__attn=(24, 40), blocks__0__ffn=(16, 24)),
    )


if __name__ == "__main__":
    main()
