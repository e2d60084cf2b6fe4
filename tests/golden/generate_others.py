"""Golden files of bitsandbytes and SDNQ, which hijack names and does not read."""

from __future__ import annotations

import importlib.metadata

import bitsandbytes
import torch
from _folder import randn, write
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
    for dtype, groups in (("float8_e4m3fn", -1), ("float8_e4m3fn", 16), ("uint4", 16)):
        config = SDNQConfig(weights_dtype=dtype, group_size=groups)
        linear = torch.nn.Linear(64, 32, bias=False)
        linear.weight.data = randn(*WEIGHT)
        made, config = sdnq_quantize_layer(linear, config)
        state = made.state_dict(prefix="proj.")
        write(
            f"foreign_sdnq_{dtype}" + ("_groups" if groups > 0 else ""),
            {key: tensor.detach() for key, tensor in state.items()},
            config=config.to_dict(),
            program=SDNQ,
            about=f"{dtype}, groups of {groups}",
            foreign={"proj": "SDNQ"},
        )


if __name__ == "__main__":
    main()
