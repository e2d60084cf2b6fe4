"""Golden files of bitsandbytes and SDNQ."""

from __future__ import annotations

import importlib.metadata

import bitsandbytes
import torch
from _folder import randn, said_by, write
from sdnq import SDNQConfig, sdnq_quantize_layer

BITSANDBYTES = f"bitsandbytes {bitsandbytes.__version__}"
SDNQ = f"sdnq {importlib.metadata.version('sdnq')}"
WEIGHT = (32, 64)


def main():
    """Write all folders."""
    write_int8()
    sdnq("sdnq", block=(1, 64), about="rows")
    sdnq("sdnq_e5m2", block=(1, 64), about="rows", weights_dtype="float8_e5m2")
    sdnq("sdnq_groups", block=(1, 16), about="groups of 16", group_size=16)
    sdnq("sdnq_tensor", block=WEIGHT, about="one scale", group_size=-2)
    sdnq("sdnq_matmul", block=(1, 64), about="lying down", use_quantized_matmul=True)
    int8 = {"weights_dtype": "int8"}
    sdnq("sdnq_int8", block=(1, 64), about="rows of integers", **int8)
    sdnq("sdnq_int8_groups", block=(1, 16), about="groups", group_size=16, **int8)
    sdnq("sdnq_int8_tensor", block=WEIGHT, about="one scale", group_size=-2, **int8)
    lying = {"use_quantized_matmul": True, **int8}
    sdnq("sdnq_int8_matmul", block=(1, 64), about="lying down", **lying)
    sdnq("foreign_sdnq_rotated", about="rotated", use_hadamard=True)
    sdnq("foreign_sdnq_svd", about="a part apart", use_svd=True, svd_rank=4)
    sdnq("foreign_sdnq_uint4", about="groups", weights_dtype="uint4", group_size=16)


def write_int8():
    """LLM.int8, as a model in float16 dequantizes it."""
    layer = bitsandbytes.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
    layer.weight = bitsandbytes.nn.Int8Params(
        randn(*WEIGHT), requires_grad=False, has_fp16_weights=False
    )
    state = layer.to("cpu").state_dict(prefix="proj.")
    tensors = {key: tensor.detach() for key, tensor in state.items()}
    dense = bitsandbytes.functional.int8_vectorwise_dequant(
        tensors["proj.weight"].clone(), tensors["proj.SCB"]
    )
    write(
        "bitsandbytes_int8",
        tensors,
        program=BITSANDBYTES,
        about="Linear8bitLt",
        dense={"proj": dense.half()},
        layers=said_by("int8", "bitsandbytes", proj=(1, 64)),
    )


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
        integers = options.get("weights_dtype") == "int8"
        scheme = "int8" if integers else "blockwise_fp8"
        read = {
            "layers": said_by(scheme, "sdnq", proj=block),
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
