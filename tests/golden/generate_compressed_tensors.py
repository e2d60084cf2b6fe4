"""Golden files of compressed-tensors: whole models, compressed by ModelCompressor."""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path

import compressed_tensors
import torch
from _folder import randn, said_by, write
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import QuantizationConfig
from compressed_tensors.quantization.lifecycle import apply_quantization_config
from compressed_tensors.quantization.quant_scheme import preset_name_to_scheme
from compressed_tensors.quantization.utils import calculate_qparams

PROGRAM = f"compressed-tensors {compressed_tensors.__version__}"


def block_of(arguments, shape):
    """Rows and columns of a block, by the arguments of a weight."""
    sizes = {
        "tensor": shape,
        "channel": (1, shape[1]),
        "group": (1, arguments.group_size),
        "tensor_group": (1, arguments.group_size),
        "block": arguments.block_structure,
    }
    return sizes[getattr(arguments.strategy, "value", arguments.strategy)]


def extremes(weight, block):
    """Least and largest element of each block; those at the edges may be short."""
    (rows, cols), (n, k) = block, weight.shape
    padded = weight.new_zeros(-(-n // rows) * rows, -(-k // cols) * cols)
    padded[:n, :k] = weight
    tiles = padded.view(-(-n // rows), rows, -(-k // cols), cols)
    return tiles.amin((1, 3)), tiles.amax((1, 3))


def compress(shapes, groups, dtype):
    """Compress a model of Linears.

    Args:
        shapes: layer to shape of its weight.
        groups: preset, targets and changes of its arguments, for each group.
        dtype: of the model.

    Returns:
        Tensors as compressed, tensors as decompressed, and the config.
    """
    model = torch.nn.Module()
    for seed, (name, (n, k)) in enumerate(shapes.items()):
        linear = torch.nn.Linear(k, n, bias=False, dtype=dtype)
        linear.weight.data = randn(n, k, seed=seed, dtype=dtype)
        model.add_module(name, linear)
    schemes = {}
    for number, (preset, targets, changes) in enumerate(groups):
        scheme = preset_name_to_scheme(preset, targets)
        for key, value in changes.items():
            setattr(scheme.weights, key, value)
        schemes[f"group_{number}"] = scheme
    config = QuantizationConfig(config_groups=schemes, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for module in model.children():
        if hasattr(module, "quantization_scheme"):
            calibrate(module)
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    tensors = {key: t.data.clone() for key, t in model.state_dict().items()}
    with tempfile.TemporaryDirectory() as folder:
        compressor.update_config(folder)
        config = json.loads((Path(folder) / "config.json").read_text("utf-8"))
    compressor.decompress_model(model)
    dense = {name: model.get_submodule(name).weight.data for name in shapes}
    return tensors, dense, config["quantization_config"]


def calibrate(module):
    """Scales by the largest element, as an observer would find them."""
    arguments = module.quantization_scheme.weights
    weight = module.weight.data
    least, most = extremes(weight, block_of(arguments, weight.shape))
    whole = None
    if hasattr(module, "weight_global_scale"):
        whole = (448.0 * 6.0 / weight.abs().amax().float()).reshape(1)
        module.weight_global_scale.data.copy_(whole)
    scale, zero = calculate_qparams(least, most, arguments, global_scale=whole)
    module.weight_scale.data.copy_(scale.reshape(module.weight_scale.shape))
    if not arguments.symmetric:
        module.weight_zero_point.data.copy_(
            zero.reshape(module.weight_zero_point.shape)
        )
    for name, value in (("input_scale", 0.0123), ("input_global_scale", 2.0)):
        if hasattr(module, name):
            getattr(module, name).data.fill_(value)


def fp8(name, about, shapes, groups, dtype, **blocks):
    """Write a folder of FP8."""
    read("blockwise_fp8", name, about, shapes, groups, dtype, **blocks)


def read(scheme, name, about, shapes, groups, dtype, **blocks):
    """Write a folder that hijack reads."""
    shapes["lm_head"] = (8, 16)
    tensors, dense, config = compress(shapes, groups, dtype)
    del dense["lm_head"]
    packed = any(key.endswith("weight_packed") for key in tensors)
    told = {layer: list(weight.shape) for layer, weight in dense.items()}
    write(
        name,
        tensors,
        config=config,
        program=PROGRAM,
        about=about,
        dense=dense,
        layers=said_by(scheme, "compressed_tensors", **blocks),
        **({"shapes": told} if packed else {}),
    )


def other(name, format_name, shapes, preset, **changes):
    """Write a folder that hijack only names."""
    groups = [(preset, ["Linear"], changes)]
    tensors, _, config = compress(shapes, groups, torch.bfloat16)
    write(
        name,
        tensors,
        config=config,
        program=PROGRAM,
        about=f"preset {preset} {changes or ''}".strip(),
        foreign=dict.fromkeys(shapes, format_name),
    )


def main():
    """Write all folders."""
    warnings.simplefilter("ignore")
    bf16, every = torch.bfloat16, ["Linear"]
    fp8(
        "compressed_tensors_static",
        "one scale of shape [1], and one for the input; the scale's dtype is the "
        "model's",
        {"q": (24, 40), "k": (16, 24)},
        [("FP8", every, {})],
        bf16,
        q=(24, 40),
        k=(16, 24),
    )
    fp8(
        "compressed_tensors_dynamic",
        "rows, float32 scales",
        {"q": (24, 40), "k": (16, 24)},
        [("FP8_DYNAMIC", every, {})],
        torch.float32,
        q=(1, 40),
        k=(1, 24),
    )
    fp8(
        "compressed_tensors_block",
        "blocks of 16x16, short in both directions",
        {"q": (40, 24), "k": (32, 32), "v": (24, 40)},
        [("FP8_BLOCK", every, {"block_structure": [16, 16]})],
        bf16,
        q=(16, 16),
        k=(16, 16),
        v=(16, 16),
    )
    fp8(
        "compressed_tensors_block128",
        "blocks of 128x128, larger than the weight in one direction",
        {"q": (8, 192)},
        [("FP8_BLOCK", every, {})],
        bf16,
        q=(8, 128),
    )
    fp8(
        "compressed_tensors_mxfp8",
        "exponents in plain order",
        {"q": (24, 64), "k": (16, 32)},
        [("MXFP8", every, {})],
        bf16,
        q=(1, 32),
        k=(1, 32),
    )
    fp8(
        "compressed_tensors_mixed",
        "three groups of layers, each of another kind",
        {"q": (24, 40), "k": (16, 32), "v": (24, 24)},
        [
            ("FP8_DYNAMIC", ["re:.*q"], {}),
            ("MXFP8", ["re:.*k"], {}),
            ("FP8_BLOCK", ["re:.*v"], {"block_structure": [16, 16]}),
        ],
        bf16,
        q=(1, 40),
        k=(1, 32),
        v=(16, 16),
    )
    shape = {"q": (16, 128)}
    other("foreign_ct_packed", "compressed-tensors packed", shape, "W4A16")
    read(
        "int8",
        "compressed_tensors_int8",
        "rows, whose inputs are quantized too; one scale, groups and blocks; the "
        "scale's dtype is the model's",
        {"q": (24, 40), "k": (16, 24), "v": (16, 32), "o": (32, 32)},
        [
            ("W8A8", ["re:.*q"], {}),
            ("W8A8", ["re:.*k"], {"strategy": "tensor"}),
            ("W8A8", ["re:.*v"], {"strategy": "group", "group_size": 16}),
            (
                "W8A8",
                ["re:.*o"],
                {"strategy": "block", "block_structure": [8, 16]},
            ),
        ],
        bf16,
        q=(1, 40),
        k=(16, 24),
        v=(1, 16),
        o=(8, 16),
    )
    read(
        "int8",
        "compressed_tensors_int8_packed",
        "rows and groups packed into int32, and rows whose inputs are quantized",
        {"q": (24, 40), "k": (16, 24), "v": (16, 32)},
        [
            ("W8A8", ["re:.*q"], {}),
            ("W8A16", ["re:.*k"], {"strategy": "channel", "group_size": None}),
            ("W8A16", ["re:.*v"], {"group_size": 16}),
        ],
        bf16,
        q=(1, 40),
        k=(1, 24),
        v=(1, 16),
    )
    other(
        "foreign_ct_int8",
        "compressed-tensors int8",
        shape,
        "W8A8",
        symmetric=False,
    )


if __name__ == "__main__":
    main()
