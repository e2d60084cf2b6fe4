"""Golden files of torchao: Float8Tensor flattened for safetensors, and MXTensor."""

from __future__ import annotations

import torch
import torchao
from _folder import digest, randn, said, said_by, write
from torchao.float8.inference import Float8MMConfig
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from torchao.quantization import (
    Float8Tensor,
    Int8DynamicActivationInt8WeightConfig,
    Int8WeightOnlyConfig,
    IntxWeightOnlyConfig,
    PerBlock,
    PerGroup,
    PerRow,
    PerTensor,
    quantize_,
)
from torchao.quantization.quantize_.workflows import QuantizeTensorToFloat8Kwargs

PROGRAM = f"torchao {torchao.__version__}"


def dynamic(granularity):
    """Arguments of a weight whose inputs are quantized too."""
    config = Float8MMConfig(use_fast_accum=True)
    inputs = QuantizeTensorToFloat8Kwargs(
        torch.float8_e4m3fn, granularity, mm_config=config
    )
    return {
        "granularity": granularity,
        "mm_config": config,
        "act_quant_kwargs": inputs,
    }


def main():
    """Write all folders."""
    bf16 = torch.bfloat16
    weights = {
        "layers.0.row": (randn(24, 40, seed=1, dtype=bf16), {"granularity": PerRow()}),
        "layers.0.all": (randn(16, 24, seed=2, dtype=bf16), dynamic(PerTensor())),
        "layers.0.dynamic": (randn(16, 32, seed=3), dynamic(PerRow())),
        "layers.0.block": (
            randn(16, 48, seed=4, dtype=bf16),
            {"granularity": PerBlock([8, 16])},
        ),
    }
    tensors = {
        f"{layer}.weight": Float8Tensor.from_hp(weight, **options)
        for layer, (weight, options) in weights.items()
    }
    tensors["layers.0.row.bias"] = randn(24, seed=5, dtype=bf16)
    flat, metadata = flatten_tensor_state_dict(tensors)
    write(
        "torchao",
        flat,
        metadata=metadata,
        program=PROGRAM,
        about="rows, one scale, blocks; weights alone, and inputs quantized too",
        dense={la: tensors[f"{la}.weight"].dequantize() for la in weights},
        layers=said(
            "torchao",
            layers__0__row=(1, 40),
            layers__0__all=(16, 24),
            layers__0__dynamic=(1, 32),
            layers__0__block=(8, 16),
        ),
    )
    e5m2 = Float8Tensor.from_hp(randn(24, 40), float8_dtype=torch.float8_e5m2)
    flat, metadata = flatten_tensor_state_dict({"proj.weight": e5m2})
    write(
        "torchao_e5m2",
        flat,
        metadata=metadata,
        program=PROGRAM,
        about="E5M2 codes, which the metadata does not mention",
        dense={"proj": e5m2.dequantize()},
        layers=said("torchao", proj=(1, 40)),
    )
    write_int8()
    mx = MXTensor.to_mx(randn(16, 64, dtype=bf16), torch.float8_e4m3fn, 32)
    flat, metadata = flatten_tensor_state_dict({"proj.weight": mx})
    write(
        "torchao_mx",
        flat,
        metadata=metadata,
        program=PROGRAM,
        about="MXTensor: the keys of Float8Tensor, scales F8_E8M0 in plain order",
        dense={"proj": mx.dequantize(torch.float32)},
        layers=said("torchao", proj=(1, 32)),
    )
    # more rows than a tile has, and fewer columns of scales
    mx = MXTensor.to_mx(
        randn(136, 32, dtype=bf16),
        torch.float8_e4m3fn,
        32,
        is_swizzled_scales=True,
    )
    flat, metadata = flatten_tensor_state_dict({"proj.weight": mx})
    write(
        "torchao_mx_tiles",
        flat,
        metadata=metadata,
        program=PROGRAM,
        about="MXTensor with scales in tiles, as its configs quantize",
        sha256={"proj": digest(mx.dequantize(torch.float32))},
        shapes={"proj": [136, 32]},
        layers=said("torchao", proj=(1, 32)),
    )


def write_int8():
    """Int8Tensor: rows, one scale, groups; and with quantized inputs."""
    configs = {
        "row": ((24, 40), Int8WeightOnlyConfig()),
        "all": ((16, 24), Int8WeightOnlyConfig(granularity=PerTensor())),
        "group": ((16, 64), Int8WeightOnlyConfig(granularity=PerGroup(32))),
        "dynamic": ((16, 32), Int8DynamicActivationInt8WeightConfig(version=2)),
        "unpacked": (
            (8, 32),
            IntxWeightOnlyConfig(torch.int4, granularity=PerGroup(16)),
        ),
    }
    model = torch.nn.Module()
    for seed, (name, (shape, config)) in enumerate(configs.items()):
        linear = torch.nn.Linear(shape[1], shape[0], bias=False, dtype=torch.bfloat16)
        linear.weight.data = randn(*shape, seed=seed, dtype=torch.bfloat16)
        model.add_module(name, torch.nn.Sequential(linear))
        quantize_(model.get_submodule(name), config)
    flat, metadata = flatten_tensor_state_dict(model.state_dict())
    weights = {f"{name}.0": model.get_submodule(f"{name}.0").weight for name in configs}
    write(
        "torchao_int8",
        flat,
        metadata=metadata,
        program=PROGRAM,
        about="Int8Tensor of a bfloat16 model, with zero points that are zero; and "
        "IntxUnpackedToInt8Tensor of 4 bits",
        dense={layer: weight.dequantize() for layer, weight in weights.items()},
        layers=said_by(
            "int8",
            "torchao",
            row__0=(1, 40),
            all__0=(16, 24),
            group__0=(1, 32),
            dynamic__0=(1, 32),
            unpacked__0=(1, 16),
        ),
    )


if __name__ == "__main__":
    main()
