"""Golden files of bitsandbytes and SDNQ: hijack reads FP8 and names the rest."""

from __future__ import annotations

import importlib.metadata

import bitsandbytes
import torch
from _folder import randn, said, write
from sdnq import SDNQConfig, sdnq_quantize_layer

BITSANDBYTES = f"bitsandbytes {bitsandbytes.__version__}"
SDNQ = f"sdnq {importlib.metadata.version('sdnq')}"
WEIGHT = (32, 64)


def main():
    """Write all folders."""
    four = bitsandbytes.nn.Linear4bit(64, 32, bias=False, quant_type="nf4")
    four.weight = bitsandbytes.nn.Params4bit(
        randn(*WEIGHT), requires_grad=False, quant_type="nf4"
    )
    eight = bitsandbytes.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
    eight.weight = bitsandbytes.nn.Int8Params(
        randn(*WEIGHT), requires_grad=False, has_fp16_weights=False
    )
    for layer, name in ((four, "4-bit"), (eight, "int8")):
        state = layer.to("cpu").state_dict(prefix="proj.")
        write(
            f"foreign_bitsandbytes_{name.removesuffix('-bit')}",
            {key: tensor.detach() for key, tensor in state.items()},
            program=BITSANDBYTES,
            about=type(layer).__name__,
            foreign={"proj": f"bitsandbytes {name}"},
        )
    sdnq("sdnq", block=(1, 64), about="rows")
    sdnq("sdnq_e5m2", block=(1, 64), about="rows", weights_dtype="float8_e5m2")
    sdnq("sdnq_groups", block=(1, 16), about="groups of 16", group_size=16)
    sdnq("sdnq_tensor", block=WEIGHT, about="one scale", group_size=-2)
    sdnq("sdnq_matmul", block=(1, 64), about="lying down", use_quantized_matmul=True)
    sdnq("foreign_sdnq_rotated", about="rotated", use_hadamard=True)
    sdnq("foreign_sdnq_svd", about="a part apart", use_svd=True, svd_rank=4)
    sdnq("foreign_sdnq_uint4", about="groups", weights_dtype="uint4", group_size=16)


def sdnq(name, *, about, block=None, **options):
    """A folder of SDNQ, read in blocks of that size, or named if there is none."""
    usual = {"weights_dtype": "float8_e4m3fn", "group_size": -1}
    linear = torch.nn.Linear(64, 32, bias=False)
    linear.weight.data = randn(*WEIGHT)
    made, config = sdnq_quantize_layer(linear, SDNQConfig(**{**usual, **options}))
    state = made.state_dict(prefix="proj.")
    read = {"foreign": {"proj": "SDNQ"}}
    if block is not None:
        lies = made.sdnq_dequantizer.use_quantized_matmul
        dense = made.sdnq_dequantizer(
            made.weight, made.scale, skip_quantized_matmul=lies
        )
        read = {
            "layers": said("sdnq", proj=block),
            "shapes": {"proj": list(WEIGHT)},
            "dense": {"proj": dense.detach().contiguous()},
        }
    write(
        name,
        {key: tensor.detach() for key, tensor in state.items()},
        config=config.to_dict(),
        program=SDNQ,
        about=about,
        **read,
    )


if __name__ == "__main__":
    main()
