"""Golden files of NVFP4, MXFP4 and ModelOpt's INT8, by their own programs."""

# ruff: noqa: TID253
from __future__ import annotations

import importlib.metadata
import json
import types

import comfy_kitchen
import compressed_tensors
import diffusers
import modelopt
import torch
import torchao
import transformers
from _folder import comfy_marker, digest, randn, said_by, write
from comfy_kitchen.tensor.nvfp4 import TensorCoreNVFP4Layout
from diffusers.quantizers.bfl import utils as bfl
from generate_compressed_tensors import compress
from modelopt.torch.export.convert_hf_config import convert_hf_quant_config_format
from modelopt.torch.export.quant_utils import to_quantized_weight
from modelopt.torch.quantization.qtensor import (
    INT8QTensor,
    MXFP4QTensor,
    NVFP4QTensor,
)
from torchao.prototype.mx_formats.mx_tensor import MXTensor
from torchao.prototype.mx_formats.nvfp4_tensor import NVFP4Tensor
from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict
from transformers.integrations.finegrained_fp8 import Fp8Dequantize

DISTRIBUTIONS = {"modelopt": "nvidia-modelopt"}
NVFP4 = ("weight", "weight_scale", "weight_scale_2")


def program(module):
    """Name and version of a program."""
    name = module.__name__.replace("_", "-")
    return f"{name} {importlib.metadata.version(DISTRIBUTIONS.get(name, name))}"


def folder(name, tensors, scheme, dialect, dense, hashed=None, **more):
    """Write a folder of layers of one dialect.

    Args:
        name: of the folder.
        tensors: key to tensor.
        scheme: name of the scheme.
        dialect: name of the dialect.
        dense: layer to dense weight.
        hashed: the same, of those that are too large.
        more: for `write`.
    """
    hashed = hashed or {}
    every = {**dense, **hashed}
    cols = 16 if scheme == "nvfp4" else 32
    said = said_by(scheme, dialect, **dict.fromkeys(every, (1, cols)))
    write(
        name,
        tensors,
        dense=dense,
        layers=said,
        shapes={layer: list(weight.shape) for layer, weight in every.items()},
        **({"sha256": {la: digest(w) for la, w in hashed.items()}} if hashed else {}),
        **more,
    )


def main():
    """Write all folders."""
    write_comfyui()
    write_bfl()
    write_modelopt()
    write_modelopt_int8()
    write_compressed_tensors()
    write_torchao()
    write_deepseek()


# -- ComfyUI ---------------------------------------------------------------------------


def comfy(layer, weight):
    """Tensors of one layer, and what they decode to."""
    packed, params = TensorCoreNVFP4Layout.quantize(weight)
    tensors = TensorCoreNVFP4Layout.state_dict_tensors(packed, params)
    tensors = {f"{layer}.weight{end}": tensor for end, tensor in tensors.items()}
    return tensors, comfy_dense(tensors, layer)[: weight.shape[0], : weight.shape[1]]


def comfy_dense(tensors, layer):
    """What comfy-kitchen decodes the tensors of a layer to, padding included."""
    packed, tiles, whole = (tensors[f"{layer}.{name}"] for name in NVFP4)
    shape = (packed.shape[0], 2 * packed.shape[1])
    params = TensorCoreNVFP4Layout.Params(
        scale=whole, orig_dtype=torch.float32, orig_shape=shape, block_scale=tiles
    )
    return TensorCoreNVFP4Layout.dequantize(packed, params)


def write_comfyui():
    """With a marker in a tensor, in the header, and without one."""
    marker = comfy_marker(format="nvfp4")
    tensors, dense = {}, {}
    for seed, (layer, shape) in enumerate(
        {"padded": (24, 40), "awq": (16, 32), "header": (16, 64)}.items()
    ):
        more, dense[layer] = comfy(layer, randn(*shape, seed=seed))
        tensors |= more
    tensors["padded.bias"] = randn(24)
    tensors["padded.input_scale"] = torch.tensor(0.5)
    tensors["padded.comfy_quant"] = marker
    tensors["awq.comfy_quant"] = marker
    columns = (randn(32, seed=9).abs() + 0.5).bfloat16()
    tensors["awq.pre_quant_scale"] = columns  # ComfyUI multiplies the input by it
    dense["awq"] = dense["awq"] * columns.float()
    table = {"format_version": "1.0", "layers": {"header": {"format": "nvfp4"}}}
    folder(
        "comfyui_nvfp4",
        tensors,
        "nvfp4",
        "comfy_quant",
        {layer: weight.contiguous() for layer, weight in dense.items()},
        metadata={"_quantization_metadata": json.dumps(table)},
        program=program(comfy_kitchen),
        about="padded sides; AWQ's factors of the columns; a marker in the header",
    )
    tensors, dense = comfy("tiles", randn(32, 64))
    more, wide = comfy("bias", randn(120, 64))
    folder(
        "comfyui_nvfp4_unmarked",
        {**tensors, **more, "bias.bias": randn(120)},
        "nvfp4",
        "comfy_quant",
        {"tiles": dense},
        {"bias": wide.contiguous()},
        program=program(comfy_kitchen),
        about="no marker: whole tiles for 32 rows, a bias of 120 for 128 rows",
    )


# -- ModelOpt's order ------------------------------------------------------------------


def write_bfl():
    """Black Forest Labs' files, which have no marker and no config."""
    layer, parts = "proj", bfl.quantize_nvfp4(randn(24, 64))
    tensors = {f"{layer}.{name}": t for name, t in zip(NVFP4, parts, strict=True)}
    tensors[f"{layer}.input_scale"] = torch.tensor(0.5)
    folder(
        "bfl_nvfp4",
        tensors,
        "nvfp4",
        "modelopt",
        {layer: bfl.dequantize_nvfp4(*parts)},
        program=program(diffusers),
        about="no marker; scales in plain order for 24 rows",
    )
    parts = bfl.quantize_nvfp4(randn(128, 64))
    tensors = {f"{layer}.{name}": t for name, t in zip(NVFP4, parts, strict=True)}
    readings = {
        "comfy_quant": comfy_dense(tensors, layer),
        "modelopt": bfl.dequantize_nvfp4(*parts),
    }
    write(
        "nvfp4_ambiguous",
        tensors,
        program=program(diffusers),
        about=f"no marker; as {program(comfy_kitchen)} it decodes to other numbers",
        ambiguous=[layer],
        shapes={layer: [128, 64]},
        assume={
            word: {
                "layers": said_by("nvfp4", word, proj=(1, 16)),
                "sha256": {layer: digest(dense)},
            }
            for word, dense in readings.items()
        },
    )


def modelopt_config(algorithm):
    """The config of ``config.json``, made of that of ``hf_quant_config.json``."""
    details = {"quant_algo": algorithm, "group_size": 16, "exclude_modules": []}
    made = {
        "producer": {
            "name": "modelopt",
            "version": importlib.metadata.version("nvidia-modelopt"),
        },
        "quantization": details,
    }
    return {**convert_hf_quant_config_format(made), "quant_method": "modelopt"}


def write_modelopt():
    """Files with a config."""
    tensors, dense = {}, {}
    # positive, because its zeros have no sign, which a hash would tell
    for layer, weight in {"q": randn(128, 64).abs(), "awq": randn(24, 32)}.items():
        made, scale, whole = NVFP4QTensor.quantize(weight, 16)
        parts = (made._quantized_data, scale, whole)
        tensors |= {f"{layer}.{n}": t for n, t in zip(NVFP4, parts, strict=True)}
        tensors[f"{layer}.input_scale"] = torch.tensor(0.5)
        dense[layer] = made.dequantize(
            torch.float32, scale=scale, double_scale=whole, block_sizes={-1: 16}
        )
    columns = (randn(32, seed=9).abs() + 0.5).bfloat16()
    tensors["awq.pre_quant_scale"] = columns
    folder(
        "modelopt_nvfp4",
        tensors,
        "nvfp4",
        "modelopt",
        {"awq": dense["awq"] * columns.float()},
        {"q": dense["q"]},
        config=modelopt_config("NVFP4"),
        program=program(modelopt),
        about="a config that decides; AWQ's factors of the columns",
    )
    made, scale = MXFP4QTensor.quantize(randn(24, 64), 32)
    folder(
        "modelopt_mxfp4",
        {"q.weight": made._quantized_data, "q.weight_scale": scale.view(24, 2)},
        "mxfp4",
        "modelopt",
        {"q": made.dequantize(torch.float32, scale=scale, block_sizes={-1: 32})},
        config=modelopt_config("W4A8_MXFP4_FP8"),
        program=program(modelopt),
        about="exponents as plain bytes, and a config",
    )


def write_modelopt_int8():
    """Rows of INT8, as its export writes them."""
    made, scale = INT8QTensor.quantize(randn(24, 40), axis=0)
    write(
        "modelopt_int8",
        {
            "q.weight": to_quantized_weight(randn(24, 40), scale.view(24), "int8_sq"),
            "q.weight_scale": scale.view(24),
            "q.input_scale": torch.tensor(0.5),
        },
        config=modelopt_config("W8A8_SQ_PER_CHANNEL"),
        program=program(modelopt),
        about="INT8, rows; a config that decides",
        dense={"q": made.dequantize(torch.float32, scale=scale)},
        layers=said_by("int8", "modelopt", q=(1, 40)),
    )


# -- others ----------------------------------------------------------------------------


def write_compressed_tensors():
    """Presets of both formats."""
    for scheme, preset in (("nvfp4", "NVFP4A16"), ("mxfp4", "MXFP4A16")):
        groups = [(preset, ["Linear"], {})]
        tensors, dense, config = compress({"q": (16, 128)}, groups, torch.bfloat16)
        folder(
            f"compressed_tensors_{scheme}",
            tensors,
            scheme,
            "compressed_tensors",
            dense,
            config=config,
            program=program(compressed_tensors),
            about=f"preset {preset}",
        )


def write_torchao():
    """Tensor subclasses, flattened for safetensors."""
    weight = randn(16, 64)
    whole = weight.abs().amax() / 2688
    made = {
        "blocks": NVFP4Tensor.to_nvfp4(weight),
        "whole": NVFP4Tensor.to_nvfp4(weight, per_tensor_scale=whole),
        "tiles": NVFP4Tensor.to_nvfp4(
            weight, per_tensor_scale=whole, is_swizzled_scales=True
        ),
    }
    torchao_folder("nvfp4", "with and without a scale of the whole; in tiles", made)
    fours = torch.float4_e2m1fn_x2
    made = {
        "q": MXTensor.to_mx(weight, fours, 32),
        "tiles": MXTensor.to_mx(weight, fours, 32, is_swizzled_scales=True),
    }
    torchao_folder("mxfp4", "exponents as float8_e8m0fnu, also in tiles", made)


def torchao_folder(scheme, about, made):
    """Write a folder of tensor subclasses, by layer."""
    named = {f"{layer}.weight": tensor for layer, tensor in made.items()}
    flat, metadata = flatten_tensor_state_dict(named)
    folder(
        f"torchao_{scheme}",
        flat,
        scheme,
        "torchao",
        {layer: tensor.dequantize(torch.float32) for layer, tensor in made.items()},
        metadata=metadata,
        program=program(torchao),
        about=about,
    )


def write_deepseek():
    """An expert of DeepSeek V4, quantized by torchao and decoded by transformers."""
    made = MXTensor.to_mx(randn(24, 64), torch.float4_e2m1fn_x2, 32)
    codes, scale = made.qdata.view(torch.int8), made.scale
    reader = Fp8Dequantize(types.SimpleNamespace())
    config = {"quant_method": "fp8", "scale_fmt": "ue8m0"}
    folder(
        "deepseek_fp4",
        {"experts.0.w1.weight": codes, "experts.0.w1.scale": scale},
        "mxfp4",
        "deepseek",
        {"experts.0.w1": reader._dequantize_one(codes, scale, torch.float32)},
        config={**config, "weight_block_size": [128, 128]},
        program=program(transformers),
        about="bytes with a sign, exponents as float8_e8m0fnu",
    )


if __name__ == "__main__":
    main()
