"""Golden files of bitsandbytes' 4-bit layers, by its kernels for CPUs."""

from __future__ import annotations

import bitsandbytes
import torch
from _folder import randn, write

PROGRAM = f"bitsandbytes {bitsandbytes.__version__}"


def quantize(weight, layer, **options):
    """Tensors of one layer as bitsandbytes saves them, and its dense weight."""
    module = bitsandbytes.nn.Linear4bit(*weight.shape[::-1], bias=False)
    module.weight = bitsandbytes.nn.Params4bit(
        weight, requires_grad=False, module=module, **options
    )
    module = module.to("cpu")
    state = module.state_dict(prefix=f"{layer}.")
    made = module.weight
    dense = bitsandbytes.functional.dequantize_4bit(made.data, made.quant_state)
    return {key: tensor.detach() for key, tensor in state.items()}, dense


def main():
    """Write the folder."""
    half, brain = torch.float16, torch.bfloat16
    layers = {
        "nested": quantize(randn(16, 64), "nested", quant_type="nf4"),
        "fp4": quantize(
            randn(16, 64, seed=1), "fp4", quant_type="fp4", compress_statistics=False
        ),
        "odd": quantize(
            randn(13, 7, dtype=half), "odd", quant_type="nf4", blocksize=32
        ),
        "packed": quantize(
            randn(16, 64, dtype=brain),
            "packed",
            quant_type="nf4",
            compress_statistics=False,
            quant_storage=brain,
        ),
    }
    said = {"scheme": "nf4", "dialect": "bitsandbytes", "block_size": None}
    write(
        "bitsandbytes_4",
        {key: t for tensors, _ in layers.values() for key, t in tensors.items()},
        program=PROGRAM,
        about="nested NF4; FP4; NF4 in float16, 13x7; NF4 in bfloat16, stored as that",
        config={"quant_method": "bitsandbytes", "load_in_4bit": True},
        dense={layer: dense.contiguous() for layer, (_, dense) in layers.items()},
        shapes={layer: list(dense.shape) for layer, (_, dense) in layers.items()},
        layers=dict.fromkeys(layers, said),
    )


if __name__ == "__main__":
    main()
