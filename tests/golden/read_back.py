"""Files that hijack writes, read by the programs whose dialects they are in.

Run as ``python read_back.py PROGRAM`` where hijack and the program can be imported. For
each case it prints JSON: layer to ``"same"`` where the program makes of it, bit for
bit, what hijack makes of it, else to what it makes.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
from pathlib import Path

import torch
from _folder import randn
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import hijack
import schemes.blockwise_fp8
import schemes.convrot_w4a4
import schemes.int8
import schemes.mxfp4
import schemes.nf4
import schemes.nvfp4
import schemes.w4a8  # noqa: F401 - registers the schemes

#: Held for the life of the process; one that is collected forgets its operators.
LIBRARY = torch.library.Library("torchvision", "FRAGMENT")

SHAPES = {"blocks.0.q": (64, 128), "blocks.0.k": (32, 64), "blocks.1.q": (48, 96)}
#: Neither 16 nor 128 divides these.
RAGGED = {"blocks.0.q": (36, 40), "blocks.0.k": (24, 200), "blocks.1.q": (130, 24)}


def source(folder, shapes, dtype):
    """A dense checkpoint of layers, a bias and a norm."""
    tensors = {
        f"{layer}.weight": randn(*shape, seed=seed, dtype=dtype)
        for seed, (layer, shape) in enumerate(shapes.items())
    }
    first = next(iter(shapes))
    tensors[f"{first}.bias"] = randn(shapes[first][0], seed=9, dtype=dtype)
    tensors["norm.weight"] = torch.ones(8, dtype=dtype)
    path = folder / "dense" / "model.safetensors"
    path.parent.mkdir()
    save_file(tensors, path)
    return path


def written(folder, shapes, made_of, dialect, **options):
    """A file in a dialect, of a model of a dtype, with the config readers expect."""
    path = folder / "model.safetensors"
    dense = source(folder, shapes, made_of)
    config = dialect in ("deepseek", "compressed_tensors", "bitsandbytes")
    hijack.quantize_file(dense, path, dialect=dialect, write_config=config, **options)
    return path


def model_for(shapes, dtype, first_bias=True):
    """A model with the layers, without memory."""
    model = nn.Module()
    for number, (layer, (n, k)) in enumerate(shapes.items()):
        parent, _, last = layer.rpartition(".")
        grown = model
        for name in parent.split(".") if parent else ():
            if not hasattr(grown, name):
                grown.add_module(name, nn.Module())
            grown = getattr(grown, name)
        bias = first_bias and number == 0
        grown.add_module(last, nn.Linear(k, n, bias=bias, device="meta", dtype=dtype))
    model.norm = nn.LayerNorm(8, bias=False, device="meta", dtype=dtype)
    return model


def ours(path, shapes, dtype):
    """What hijack makes of each layer."""
    model = model_for(shapes, dtype)
    hijack.load(model, path)
    hijack.unwrap(model)
    return {layer: model.get_submodule(layer).weight.detach() for layer in shapes}


def compare(made, expected):
    """Layer to "same", or to what is not."""
    found = {}
    for layer, tensor in expected.items():
        got = made[layer].detach()
        same = got.dtype == tensor.dtype and torch.equal(got, tensor)
        found[layer] = "same" if same else f"{got.dtype} {tuple(got.shape)}: {got}"
    return found


# -- programs --------------------------------------------------------------------------


def torchao():
    """Float8Tensors, loaded into a model of which they have the dtype."""
    from torchao.prototype.safetensors.safetensors_support import (
        unflatten_tensor_state_dict,
    )
    from torchao.quantization import Float8Tensor

    for name, dtype, options in (
        ("rows", torch.bfloat16, {}),
        ("all", torch.float32, {"block_size": "tensor"}),
        ("blocks", torch.bfloat16, {"block_size": "16x16"}),
        ("long blocks", torch.float32, {"block_size": "1x32"}),
    ):
        with scratch() as folder:
            path = written(folder, SHAPES, dtype, "torchao", **options)
            with safe_open(path, "pt") as file:
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                read, left = unflatten_tensor_state_dict(tensors, file.metadata())
            assert not left, left
            model = model_for(SHAPES, dtype)
            model.load_state_dict(read, assign=True)
            layers = {layer: model.get_submodule(layer) for layer in SHAPES}
            assert all(type(m.weight.data) is Float8Tensor for m in layers.values())
            made = {la: m.weight.dequantize(torch.float32) for la, m in layers.items()}
            yield name, compare(made, ours(path, SHAPES, torch.float32))
            dtypes = {la: m.weight.dtype for la, m in layers.items()}
            wrong = {la: str(kind) for la, kind in dtypes.items() if kind != dtype}
            yield f"{name}, dtype", wrong or {"all": "same"}


def bitsandbytes():
    """Tables with scales of either kind, in the dtype that the file tells.

    Its kernels for AVX512 are wrong where runs of scales end within a row of 64 columns
    or more, unlike its other kernels; so no such run is here.
    """
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Params4bit

    for name, shapes, dtype, options in (
        ("nf4", SHAPES, torch.bfloat16, {"blocksize": 32}),
        ("fp4", SHAPES, torch.float16, {"quant_type": "fp4", "blocksize": 32}),
        ("nested", SHAPES, torch.float32, {"blocksize": 32, "double_quant": True}),
        ("ragged", RAGGED, torch.float32, {"blocksize": 32, "double_quant": True}),
    ):
        with scratch() as folder:
            path = written(
                folder, shapes, dtype, "bitsandbytes", scheme="nf4", **options
            )
            tensors, made = load_file(path), {}
            for layer in shapes:
                start = f"{layer}.weight."
                stats = {k: t for k, t in tensors.items() if k.startswith(start)}
                weight = Params4bit.from_prequantized(
                    tensors[f"{layer}.weight"], stats, device="cpu"
                )
                made[layer] = dequantize_4bit(weight.data, weight.quant_state)
            yield name, compare(made, ours(path, shapes, dtype))


def compressed_tensors():
    """Its config applied to a model, its keys loaded strictly, and decompressed."""
    from compressed_tensors.compressors import ModelCompressor
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.quantization.lifecycle import apply_quantization_config

    rules = ["blocks.1.*=row"]
    for name, shapes, dtype, options in (
        ("dynamic", SHAPES, torch.bfloat16, {"block_size": "row"}),
        ("static", SHAPES, torch.bfloat16, {"block_size": "tensor"}),
        ("block", SHAPES, torch.float32, {"block_size": "16x16"}),
        ("short blocks", RAGGED, torch.bfloat16, {"block_size": "128x128"}),
        ("mxfp8", SHAPES, torch.bfloat16, {"scale_dtype": torch.float8_e8m0fnu}),
        ("mixed", SHAPES, torch.float32, {"block_size": "16x16", "rules": rules}),
        ("int8", SHAPES, torch.bfloat16, {"scheme": "int8"}),
        ("int8 static", SHAPES, torch.float32, int8("tensor")),
        ("int8 block", SHAPES, torch.float32, int8("16x16")),
        ("int8 group", SHAPES, torch.bfloat16, int8("1x32")),
        ("int8 mixed", SHAPES, torch.float32, {**int8("16x16"), "rules": rules}),
        ("mxfp4", SHAPES, torch.bfloat16, {"scheme": "mxfp4"}),
    ):
        with scratch() as folder:
            if name == "mxfp8":
                options = {**options, "block_size": "1x32"}
            path = written(folder, shapes, dtype, "compressed_tensors", **options)
            text = (folder / "config.json").read_text("utf-8")
            config = QuantizationConfig.model_validate(
                json.loads(text)["quantization_config"]
            )
            model = model_for(shapes, dtype)
            model.to_empty(device="cpu")
            apply_quantization_config(model, config)
            compressor = ModelCompressor(quantization_config=config)
            compressor.compress_model(model)
            model.load_state_dict(load_file(path), assign=True)
            compressor.decompress_model(model)
            made = {layer: model.get_submodule(layer).weight for layer in shapes}
            kind = {t.dtype for t in made.values()}.pop()
            yield name, compare(made, ours(path, shapes, kind))


def int8(block_size, **options):
    """Options of INT8 whose inputs are not quantized."""
    usual = {"scheme": "int8", "quantized_inputs": False}
    return {**usual, "block_size": block_size, **options}


def define_operators():
    """Declare what a torchvision without its compiled half checks for at import."""
    for name in ("nms", "qnms"):
        if not hasattr(torch.ops.torchvision, name):
            LIBRARY.define(
                f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )


def transformers():
    """A Llama from a folder; and FP8Linear with blocks that are short."""
    define_operators()
    from transformers import LlamaConfig, LlamaForCausalLM
    from transformers.integrations import finegrained_fp8 as fp8

    for name, dialect, options in (
        ("llama in deepseek", "deepseek", {"block_size": "16x16"}),
        ("llama in deepseek, tensor", "deepseek", {"block_size": "tensor"}),
        (
            "llama in deepseek, powers",
            "deepseek",
            {"block_size": "16x16", "scale_dtype": torch.float8_e8m0fnu},
        ),
        ("llama in compressed_tensors", "compressed_tensors", {"block_size": "row"}),
    ):
        with scratch() as folder:
            config = LlamaConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=1,
                num_attention_heads=2,
                num_key_value_heads=1,
                head_dim=16,
                vocab_size=24,
                max_position_embeddings=32,
            )
            torch.manual_seed(0)
            LlamaForCausalLM(config).save_pretrained(folder / "dense")
            (folder / "codes").mkdir()
            hijack.quantize_file(
                folder / "dense" / "model.safetensors",
                folder / "codes" / "model.safetensors",
                dialect=dialect,
                include=["*_proj"],
                write_config=True,
                **options,
            )
            read = LlamaForCausalLM.from_pretrained(
                folder / "codes", dtype=torch.float32, **dequantized(dialect)
            )
            model = LlamaForCausalLM(config)
            hijack.load(model, folder / "codes" / "model.safetensors")
            hijack.unwrap(model)
            expected = dict(model.named_parameters())
            yield name, compare(dict(read.named_parameters()), expected)
    for name, options in (
        ("FP8Linear, short blocks", {"block_size": "16x16"}),
        ("FP8Linear, one block", {"block_size": "128x128"}),
    ):
        with scratch() as folder:
            path = written(folder, RAGGED, torch.float32, "deepseek", **options)
            text = (folder / "config.json").read_text("utf-8")
            block = json.loads(text)["quantization_config"]["weight_block_size"]
            tensors, made = load_file(path), {}
            for number, (layer, (n, k)) in enumerate(RAGGED.items()):
                linear = fp8.FP8Linear(k, n, block, has_bias=number == 0)
                start = f"{layer}."
                own = {key: t for key, t in tensors.items() if key.startswith(start)}
                linear.load_state_dict({k[len(start) :]: t for k, t in own.items()})
                made[layer] = fp8._dequantize_fp8_weight(
                    linear.weight.data, linear.weight_scale_inv, block, torch.float32
                )
            yield name, compare(made, ours(path, RAGGED, torch.float32))


def dequantized(dialect):
    """What makes transformers dequantize as it loads; on a CPU it does so for FP8."""
    if dialect != "compressed_tensors":
        return {}
    from transformers import CompressedTensorsConfig

    return {"quantization_config": CompressedTensorsConfig(dequantize=True)}


def comfy_kitchen():
    """The layouts its markers name."""
    from comfy_kitchen.tensor import QuantizedTensor
    from comfy_kitchen.tensor.fp8 import TensorCoreFP8Layout
    from comfy_kitchen.tensor.int8 import TensorWiseINT8Layout
    from comfy_kitchen.tensor.mxfp8 import TensorCoreMXFP8Layout
    from comfy_kitchen.tensor.nvfp4 import TensorCoreNVFP4Layout

    layouts = {
        "float8_e4m3fn": TensorCoreFP8Layout,
        "float8_e5m2": TensorCoreFP8Layout,
        "mxfp8": TensorCoreMXFP8Layout,
        "int8_tensorwise": TensorWiseINT8Layout,
        "nvfp4": TensorCoreNVFP4Layout,
    }
    for name, shapes, options in (
        ("float8", SHAPES, {}),
        ("float8 e5m2", SHAPES, {"dtype": torch.float8_e5m2}),
        ("mxfp8", SHAPES, {"block_size": "1x32"}),
        ("padded mxfp8", RAGGED, {"block_size": "1x32"}),
        ("int8 rows", RAGGED, {"scheme": "int8"}),
        ("int8", RAGGED, {"scheme": "int8", "block_size": "tensor"}),
        ("int8 ConvRot", SHAPES, {"scheme": "int8", "rotation": 16}),
        ("nvfp4", SHAPES, {"scheme": "nvfp4"}),
        ("padded nvfp4", RAGGED, {"scheme": "nvfp4"}),
    ):
        with scratch() as folder:
            path = written(folder, shapes, torch.bfloat16, "comfy_quant", **options)
            tensors, made = load_file(path), {}
            for layer, shape in shapes.items():
                marker = json.loads(bytes(tensors[f"{layer}.comfy_quant"].tolist()))
                kind = marker["format"]
                names = ("convrot", "convrot_groupsize")
                layout, scale = layouts[kind], tensors[f"{layer}.weight_scale"]
                more = {name: marker[name] for name in names if name in marker}
                if kind == "mxfp8":
                    scale = scale.view(torch.float8_e8m0fnu)
                if kind == "nvfp4":
                    more = {"block_scale": scale}
                    scale = tensors[f"{layer}.weight_scale_2"]
                params = layout.Params(
                    scale=scale, orig_dtype=torch.float32, orig_shape=shape, **more
                )
                codes = tensors[f"{layer}.weight"]
                tensor = QuantizedTensor(codes, layout.__name__, params)
                made[layer] = tensor.dequantize()[: shape[0], : shape[1]]
            yield name, compare(made, ours(path, shapes, torch.float32))
    yield from comfy_kitchen_packed()


def comfy_kitchen_packed():
    """Its packed rotated weights, in groups that divide these widths."""
    from comfy_kitchen.tensor import (
        AsymW4A8Int8Layout,
        QuantizedTensor,
        TensorCoreConvRotW4A4Layout,
    )

    shapes = {"blocks.0.q": (64, 128), "blocks.0.k": (32, 64)}
    for name, layout, options in (
        ("w4a8", AsymW4A8Int8Layout, {"scheme": "w4a8", "group_size": 32}),
        ("w4a4", TensorCoreConvRotW4A4Layout, {"scheme": "convrot_w4a4"}),
    ):
        with scratch() as folder:
            dtype = torch.bfloat16
            path = written(folder, shapes, dtype, "comfy_quant", rotation=16, **options)
            tensors, made = load_file(path), {}
            for layer, shape in shapes.items():
                marker = json.loads(bytes(tensors[f"{layer}.comfy_quant"].tolist()))
                fields = {"convrot_groupsize": marker["convrot_groupsize"]}
                if name == "w4a8":
                    fields["group_size"] = marker["group_size"]
                    fields["scale"] = tensors[f"{layer}.weight_s_rel"]
                    fields["s_channel"] = tensors[f"{layer}.weight_s_channel"]
                    fields["codebook"] = tensors[f"{layer}.weight_codebook"]
                else:
                    fields["scale"] = tensors[f"{layer}.weight_scale"]
                params = layout.Params(
                    orig_dtype=torch.float32, orig_shape=shape, **fields
                )
                codes = tensors[f"{layer}.weight"]
                tensor = QuantizedTensor(codes, layout.__name__, params)
                made[layer] = tensor.dequantize()
            yield name, compare(made, ours(path, shapes, torch.float32))


def modelopt():
    """Its NVFP4 tensors, with its scales."""
    from modelopt.torch.quantization.qtensor import NVFP4QTensor

    with scratch() as folder:
        path = written(folder, SHAPES, torch.bfloat16, "modelopt", scheme="nvfp4")
        tensors, made = load_file(path), {}
        for layer, shape in SHAPES.items():
            codes = tensors[f"{layer}.weight"]
            made[layer] = NVFP4QTensor(shape, torch.float32, codes).dequantize(
                torch.float32,
                scale=tensors[f"{layer}.weight_scale"],
                double_scale=tensors[f"{layer}.weight_scale_2"],
                block_sizes={-1: 16},
            )
        yield "nvfp4", compare(made, ours(path, SHAPES, torch.float32))


PROGRAMS = {
    "torchao": torchao,
    "compressed_tensors": compressed_tensors,
    "transformers": transformers,
    "comfy_kitchen": comfy_kitchen,
    "bitsandbytes": bitsandbytes,
    "modelopt": modelopt,
}


@contextlib.contextmanager
def scratch():
    """A folder that is gone afterwards."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def main(program):
    """Print what one program makes of all cases."""
    print(json.dumps(dict(PROGRAMS[program]())))


if __name__ == "__main__":
    main(sys.argv[1])
