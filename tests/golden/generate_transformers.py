"""Golden files of DeepSeek's format, by transformers' FineGrainedFP8.

Its quantizer leaves a weight alone whose blocks would be short, as DeepSeek's own does
not; those are quantized here, padded with zeros as DeepSeek's files are, and
dequantized by transformers.
"""

from __future__ import annotations

import json
import types

import torch
import transformers
from _folder import check, digest, randn, said, start, write, write_tensors
from transformers import FineGrainedFP8Config
from transformers.integrations.finegrained_fp8 import (
    Fp8Quantize,
    _dequantize_fp8_weight,
)

PROGRAM = f"transformers {transformers.__version__}, FineGrainedFP8"
DEEPSEEK = {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8"}
CODES = torch.float8_e4m3fn


def quantize(weights, config):
    """Weights and their scales by transformers."""
    operation = Fp8Quantize(types.SimpleNamespace(quantization_config=config))
    tensors = {}
    for layer, weight in weights.items():
        tensors.update(operation.convert({f"{layer}.weight": weight}))
    return tensors


def padded(weight, block):
    """Codes and scales of blocks that may be short, by the largest element."""
    (n, k), (rows, cols) = weight.shape, block
    high, wide = -(-n // rows), -(-k // cols)
    whole = weight.new_zeros(high * rows, wide * cols)
    whole[:n, :k] = weight
    tiles = whole.view(high, rows, wide, cols)
    scale = tiles.abs().amax((1, 3)) / 448
    codes = (tiles / scale[:, None, :, None]).view_as(whole)[:n, :k].to(CODES)
    return codes.contiguous(), scale


def dequantize(weight, scale, block):
    """What transformers makes of a layer in float32."""
    if scale.dtype == torch.uint8:  # as it does after loading
        scale = scale.view(torch.float8_e8m0fnu)
    block = None if scale.numel() == 1 else block
    return _dequantize_fp8_weight(weight, scale, block, torch.float32)


def ragged(shapes, block, scale_name="weight_scale_inv"):
    """Tensors and dense weights of layers with short blocks."""
    tensors, dense = {}, {}
    for seed, (layer, shape) in enumerate(shapes.items()):
        codes, scale = padded(randn(*shape, seed=seed), block)
        tensors[f"{layer}.weight"] = codes
        tensors[f"{layer}.{scale_name}"] = scale
        dense[layer] = dequantize(codes, scale, block)
    return tensors, dense


def plain_config(config):
    """A config as ``save_pretrained`` writes it."""
    return json.loads(json.dumps(config.to_dict()))


def folder(name, about, tensors, config, block, layers, **more):
    """Write a folder whose dense weights transformers gives."""
    names = ("weight_scale_inv", "scale", "qscale_weight")
    dense = {
        layer: dequantize(
            tensors[f"{layer}.weight"],
            next(t for n in names if (t := tensors.get(f"{layer}.{n}")) is not None),
            block,
        )
        for layer in layers
    }
    write(
        name,
        tensors,
        config=config,
        program=PROGRAM,
        about=about,
        dense=dense,
        layers=said("deepseek", **layers),
        **more,
    )


def main():
    """Write all folders."""
    write_blocks()
    write_kinds()
    write_dialects()
    write_shards()


def write_blocks():
    """Even and short blocks, with and without the config that tells them."""
    config = FineGrainedFP8Config(
        weight_block_size=[16, 16], modules_to_not_convert=["lm_head"]
    )
    weights = {"q": randn(32, 48, seed=1), "k": randn(16, 32, seed=2)}
    tensors = quantize(weights, config)
    tensors["lm_head.weight"] = randn(8, 16)
    about = "blocks of 16x16, all whole"
    sizes = {"q": (16, 16), "k": (16, 16)}
    folder("deepseek", about, tensors, plain_config(config), (16, 16), sizes)
    tensors, _ = ragged({"kv_a": (36, 32), "o": (24, 40)}, (16, 16))
    about = "short blocks: 36x32 is to 16 what 576x512 is to 128, and 24x40 likewise"
    config = {**DEEPSEEK, "weight_block_size": [16, 16]}
    sizes = {"kv_a": (16, 16), "o": (16, 16)}
    folder("deepseek_ragged", about, tensors, config, (16, 16), sizes)
    tensors, dense = ragged({"kv_a": (24, 32)}, (16, 16))
    write(
        "deepseek_no_config",
        tensors,
        program=PROGRAM,
        about="the config is lost: 24 rows with two scales may be blocks of 12 or 16",
        ambiguous=["kv_a"],
        assume={
            "16x16": {
                "layers": said("deepseek", kv_a=(16, 16)),
                "sha256": {"kv_a": digest(dense["kv_a"])},
            }
        },
    )


def write_kinds():
    """Scales that are powers of two, of a whole weight, and beside dense weights."""
    weights = {"q": randn(32, 48, seed=1), "k": randn(16, 32, seed=2)}
    config = FineGrainedFP8Config(weight_block_size=[16, 16], scale_fmt="ue8m0")
    tensors = quantize(weights, config)
    tensors["k.weight_scale_inv"] = tensors["k.weight_scale_inv"].view(torch.uint8)
    sizes = {"q": (16, 16), "k": (16, 16)}
    about = "scales are powers of two, F8_E8M0 and U8"
    folder("deepseek_ue8m0", about, tensors, plain_config(config), (16, 16), sizes)
    config = FineGrainedFP8Config(weight_block_size=[1, 32], scale_fmt="ue8m0")
    tensors = quantize({"q": randn(24, 64)}, config)
    tensors["q.weight_scale_inv"] = tensors["q.weight_scale_inv"].view(torch.uint8)
    about = "MXFP8 in plain order under DeepSeek's names"
    sizes = {"q": (1, 32)}
    folder("deepseek_mxfp8", about, tensors, plain_config(config), (1, 32), sizes)
    config = FineGrainedFP8Config(weight_block_size=None, activation_scheme="static")
    tensors = quantize(weights, config)
    tensors["k.weight_scale_inv"] = tensors["k.weight_scale_inv"].view(())
    for layer in weights:
        tensors[f"{layer}.activation_scale"] = torch.tensor(0.75)
    about = "weight_block_size is null: one scale, [1, 1] and [], and one of the input"
    sizes = {"q": (32, 48), "k": (16, 32)}
    folder("deepseek_null", about, tensors, plain_config(config), None, sizes)
    config = FineGrainedFP8Config(weight_block_size=[16, 16], dequantize=True)
    write(
        "deepseek_dense",
        {"q.weight": randn(8, 16), "norm.weight": torch.ones(16)},
        config=plain_config(config),
        program=PROGRAM,
        about="loaded with dequantize=True and saved: the config stayed, the weights "
        "are plain",
        layers={},
    )


def write_dialects():
    """Other names of the scale, and DeepSeek's scale_fmt beside float32 scales."""
    config = {**DEEPSEEK, "weight_block_size": [16, 16], "scale_fmt": "ue8m0"}
    tensors, _ = ragged({"wq": (24, 40)}, (16, 16), "scale")
    about = "X.scale, as DeepSeek-V4 has it, float32 although scale_fmt is ue8m0"
    folder("deepseek_scale", about, tensors, config, (16, 16), {"wq": (16, 16)})
    tensors, _ = ragged({"wq": (24, 40)}, (16, 16), "qscale_weight")
    tensors["wq.qscale_act"] = torch.tensor(0.5)
    config = {**DEEPSEEK, "weight_block_size": [16, 16]}
    about = "X.qscale_weight and X.qscale_act, as Mistral has them"
    folder("deepseek_qscale", about, tensors, config, (16, 16), {"wq": (16, 16)})


def write_shards():
    """Two shards, whose index puts a scale into another file than its weight."""
    tensors, dense = ragged({"layers.0.q": (24, 40), "layers.1.q": (40, 24)}, (16, 16))
    tensors["embed.weight"] = randn(8, 16)
    path = start(
        "deepseek_sharded",
        program=PROGRAM,
        about="two shards; the scale of layers.1.q is in the first",
        config={**DEEPSEEK, "weight_block_size": [16, 16]},
        source="model.safetensors.index.json",
        dense=dense,
        layers=said("deepseek", layers__0__q=(16, 16), layers__1__q=(16, 16)),
    )
    files = [f"model-0000{n}-of-00002.safetensors" for n in (1, 2)]
    late = {"layers.1.q.weight", "embed.weight"}
    parts = [{k: t for k, t in tensors.items() if (k in late) == at} for at in (0, 1)]
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    where = {k: f for f, part in zip(files, parts, strict=True) for k in part}
    for file, part in zip(files, parts, strict=True):
        write_tensors(path / file, part, {"format": "pt"})
    index = {
        "metadata": {"total_size": total},
        "weight_map": dict(sorted(where.items())),
    }
    text = json.dumps(index, indent=1) + "\n"
    (path / "model.safetensors.index.json").write_text(text, "utf-8")
    check(path)


if __name__ == "__main__":
    main()
