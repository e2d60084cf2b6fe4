"""Golden files of ComfyUI, by its own mixed-precision layers.

Run with a ComfyUI checkout on PYTHONPATH, in an environment that can start it.
"""

# ruff: noqa: E402, TID253
from __future__ import annotations

import json

import comfy.cli_args
import torch
from _folder import comfy_marker, digest, randn, said, said_by, write

comfy.cli_args.args.cpu = True

import comfy.ops
import comfy.utils
from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
from comfyui_version import __version__

PROGRAM = f"ComfyUI {__version__}"
CODES = torch.float8_e4m3fn
OPERATIONS = comfy.ops.mixed_precision_ops(compute_dtype=torch.float32)


def quantize(weight, name, layer, marked=None, **options):
    """Tensors of one layer as ComfyUI saves them, after it has loaded them itself."""
    marker = comfy_marker(format=name, **(marked or {}))
    layout = QUANT_ALGOS[name]["comfy_tensor_layout"]
    made = QuantizedTensor.from_float(weight, layout, **options)
    tensors = {**made.state_dict("weight"), "comfy_quant": marker}
    module = load(tensors, weight.shape)
    return {key: t.data for key, t in module.state_dict(prefix=f"{layer}.").items()}


def load(tensors, shape):
    """A layer of ComfyUI with the tensors of a file."""
    module = OPERATIONS.Linear(shape[1], shape[0], bias=False)
    module.load_state_dict(tensors)
    return module


def part(tensors, layer):
    """Tensors of one layer, without its name."""
    start = f"{layer}."
    return {k[len(start) :]: t for k, t in tensors.items() if k.startswith(start)}


def dequantize(tensors, layer, shape):
    """What ComfyUI makes of a layer of a file."""
    return load(part(tensors, layer), shape).weight.dequantize()


def folder(name, about, tensors, shapes, blocks, **more):
    """Write a folder whose dense weights ComfyUI gives."""
    write(
        name,
        tensors,
        program=PROGRAM,
        about=about,
        dense={la: dequantize(tensors, la, shape) for la, shape in shapes.items()},
        layers=said("comfy_quant", **blocks),
        **more,
    )


def main():
    """Write all folders."""
    write_floats()
    write_experts()
    write_mx()
    write_legacy()
    write_int8()


def write_floats():
    """One scale, both kinds of codes, marked in the tensors or in the header."""
    shapes = {"e4m3": (24, 40), "e5m2": (16, 24)}
    tensors = {}
    for layer, shape in shapes.items():
        name = {"e4m3": "float8_e4m3fn"}.get(layer, "float8_e5m2")
        tensors |= quantize(randn(*shape), name, layer, scale="recalculate")
    tensors["e4m3.input_scale"] = torch.tensor(0.5)
    about = "one scale; E4M3 and E5M2; an input_scale"
    blocks = {"e4m3": (24, 40), "e5m2": (16, 24)}
    folder("comfyui_float8", about, tensors, shapes, blocks)
    table = {
        layer: json.loads(bytes(tensors.pop(f"{layer}.comfy_quant").tolist()))
        for layer in shapes
    }
    table["e4m3"]["full_precision_matrix_mult"] = True
    metadata = {
        "_quantization_metadata": json.dumps({"format_version": "1.0", "layers": table})
    }
    read, _ = comfy.utils.convert_old_quants(dict(tensors), "", dict(metadata))
    write(
        "comfyui_header",
        tensors,
        metadata=metadata,
        program=PROGRAM,
        about="the markers are in the header alone, as comfy-quants writes them",
        dense={la: dequantize(read, la, shape) for la, shape in shapes.items()},
        layers=said("comfy_quant", **blocks),
    )


def write_experts():
    """A bank of experts, with one scale each."""
    weight = randn(3, 16, 24)
    scale = weight.abs().amax((1, 2)) / 448
    bank = OPERATIONS.MoEExperts(3, 24, 16, bias=False)
    bank.load_state_dict(
        {
            "weight": (weight / scale.view(3, 1, 1)).to(torch.float8_e4m3fn),
            "weight_scale": scale,
            "comfy_quant": comfy_marker(format="float8_e4m3fn", num_experts=3),
        }
    )
    dense = torch.stack([bank.expert_weight(i).dequantize() for i in range(3)])
    write(
        "comfyui_experts",
        {key: t.data for key, t in bank.state_dict(prefix="experts.").items()},
        program=PROGRAM,
        about="three experts of 16x24 in one tensor, a scale each",
        dense={"experts": dense},
        layers=said("comfy_quant", experts=(1, 16 * 24)),
    )


def write_mx():
    """MXFP8 in tiles: with its marker, without it, and where nothing tells."""
    shapes = {"even": (32, 64), "ragged": (20, 24)}
    tensors = {}
    for layer, shape in shapes.items():
        tensors |= quantize(randn(*shape), "mxfp8", layer)
    tensors["ragged.bias"] = randn(20)
    read = {k: t for k, t in tensors.items() if k != "ragged.bias"}
    write(
        "comfyui_mxfp8",
        tensors,
        program=PROGRAM,
        about="exponents F8_E8M0 in tiles; 20x24 is padded, its bias tells the rows",
        dense={la: dequantize(read, la, shape) for la, shape in shapes.items()},
        shapes=shapes,
        layers=said("comfy_quant", even=(1, 32), ragged=(1, 32)),
    )
    shapes = {"proj": (160, 32)}
    tensors = quantize(randn(160, 32), "mxfp8", "proj")
    dense = dequantize(tensors, "proj", shapes["proj"])
    del tensors["proj.comfy_quant"]
    tensors["proj.weight_scale"] = tensors["proj.weight_scale"].view(torch.uint8)
    write(
        "mxfp8_tiles",
        tensors,
        program=PROGRAM,
        about="without a marker; 256x4 scales for 160x32 can only be tiles",
        sha256={"proj": digest(dense)},
        layers=said("comfy_quant", proj=(1, 32)),
    )
    write_ambiguous()


def write_ambiguous():
    """128x128, whose scales in tiles have the shape of those in plain order."""
    tensors = quantize(randn(128, 128), "mxfp8", "proj")
    tiles = dequantize(tensors, "proj", (128, 128))
    del tensors["proj.comfy_quant"]
    scale = tensors["proj.weight_scale"].view(torch.uint8)
    powers = torch.exp2(scale.double() - 127).repeat_interleave(32, 1)
    plain = (tensors["proj.weight"].double() * powers).float()
    tensors["proj.weight_scale"] = scale
    readings = {"comfy_quant": tiles, "mxfp8": plain}
    write(
        "mxfp8_ambiguous",
        tensors,
        program=PROGRAM,
        about="without a marker; 128x4 scales for 128x128 may be tiles or plain",
        ambiguous=["proj"],
        assume={
            word: {
                "layers": said(word, proj=(1, 32)),
                "sha256": {"proj": digest(dense)},
            }
            for word, dense in readings.items()
        },
    )


def write_legacy():
    """Files marked as a whole, which ComfyUI takes apart itself."""
    prefix = "model.diffusion_model."
    layer, shape = f"{prefix}blocks.0.q", (24, 40)
    weight = randn(*shape)
    for name, dtype, count, about in (
        ("scaled_fp8", torch.float8_e4m3fn, 0, "under a prefix; input scales"),
        ("scaled_fp8_f32", torch.float32, 1, "a marker of float32, which means E4M3"),
        ("scaled_fp8_e5m2", torch.float8_e5m2, 2, "E5M2, which ComfyUI takes for E4M3"),
    ):
        codes = torch.float8_e5m2 if dtype.itemsize == 1 and count else CODES
        scale = weight.abs().max() / torch.finfo(codes).max
        tensors = {
            f"{prefix}scaled_fp8": torch.zeros(count).to(dtype),
            f"{layer}.weight": (weight / scale).to(codes),
            f"{layer}.scale_weight": scale,
            "vae.norm.weight": torch.ones(8),
        }
        if not count:
            tensors[f"{layer}.scale_input"] = torch.tensor(0.25)
        write(
            name,
            tensors,
            program=PROGRAM,
            about=f"the legacy marker {about}",
            dense={layer: legacy_dense(tensors, prefix, layer, shape)},
            layers={layer: said("scaled_fp8", x=shape)["x"]},
        )


def legacy_dense(tensors, prefix, layer, shape):
    """ComfyUI's own reading; of E5M2 after putting its marker right."""
    read, _ = comfy.utils.convert_old_quants(dict(tensors), prefix, {})
    if tensors[f"{layer}.weight"].dtype == torch.float8_e5m2:
        read[f"{layer}.comfy_quant"] = comfy_marker(format="float8_e5m2")
    read = {k: t for k, t in read.items() if "input_scale" not in k}
    return dequantize(read, layer, shape)


def write_int8():
    """One scale, rows, and rows of a rotated weight."""
    rotation = {"convrot": True, "convrot_groupsize": 256}
    full = {"full_precision_matrix_mult": True}
    # scales that are powers of two make every sum of the rotation exact, in any order
    codes = torch.randint(-127, 128, (8, 256), generator=torch.Generator())
    codes[:, 5] = 127
    rotated = codes * 2.0 ** -torch.arange(3, 11)[:, None]
    layout = QUANT_ALGOS["int8_tensorwise"]["comfy_tensor_layout"]
    bare = QuantizedTensor.from_float(rotated, layout, per_channel=True)
    tensors = {
        **quantize(randn(24, 40), "int8_tensorwise", "whole"),
        **quantize(randn(16, 24), "int8_tensorwise", "rows", full, per_channel=True),
    }
    turned = {**bare.state_dict("weight")}
    turned["comfy_quant"] = comfy_marker(format="int8_tensorwise", **rotation)
    state = load(turned, (8, 256)).state_dict(prefix="turned.")
    tensors |= {key: tensor.data for key, tensor in state.items()}
    shapes = {"whole": (24, 40), "rows": (16, 24), "turned": (8, 256)}
    write(
        "comfyui_int8",
        tensors,
        program=PROGRAM,
        about="one scale; rows, multiplied as floats; rows in groups of 256 (ConvRot)",
        dense={la: dequantize(tensors, la, shape) for la, shape in shapes.items()},
        layers=said_by(
            "int8", "comfy_quant", whole=(24, 40), rows=(1, 24), turned=(1, 256)
        ),
    )


if __name__ == "__main__":
    main()
