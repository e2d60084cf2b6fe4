"""Golden files whose writers no longer exist or cannot be had: from their layouts.

What a code or a power of two stands for is worked out here in Python's own numbers.
"""

from __future__ import annotations

import json
import struct

import torch
from _folder import (
    HERE,
    check,
    comfy_marker,
    digest,
    randn,
    said,
    said_by,
    start,
    write,
)

PROGRAM = "nobody; from its layout"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
MOST = {E4M3: 448.0, E5M2: 57344.0}


def value(code, dtype):
    """The number a byte stands for, by the formats' definition."""
    bits, bias = (3, 7) if dtype is E4M3 else (2, 15)
    sign = -1.0 if code & 0x80 else 1.0
    exponent, mantissa = (code & 0x7F) >> bits, code & ((1 << bits) - 1)
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - bits)
    return sign * (1 + mantissa / 2**bits) * 2.0 ** (exponent - bias)


def dense(codes, scale, block):
    """Codes times scales, each product exact before it becomes a float32."""
    table = [0.0] * 256
    for code in range(256):
        table[code] = value(code, codes.dtype)
    numbers = torch.tensor(table, dtype=torch.float64)
    numbers = numbers[codes.view(torch.uint8).long()]
    grid = scale.double()
    for axis, size in enumerate(block):
        grid = grid.repeat_interleave(size, axis)
    n, k = codes.shape
    return (numbers * grid[:n, :k]).float()


def layer(shape, block, seed=0, dtype=E4M3):
    """Codes, scales and the dense weight of one layer; blocks may be short."""
    weight, (n, k), (rows, cols) = randn(*shape, seed=seed), shape, block
    high, wide = -(-n // rows), -(-k // cols)
    padded = weight.new_zeros(high * rows, wide * cols)
    padded[:n, :k] = weight
    tiles = padded.view(high, rows, wide, cols)
    scale = tiles.abs().amax((1, 3)) / MOST[dtype]
    codes = (tiles / scale[:, None, :, None]).view_as(padded)[:n, :k].contiguous()
    codes = codes.to(dtype)
    return codes, scale, dense(codes, scale, block)


def main():
    """Write all folders."""
    write_scalars()
    write_mixed()
    write_native()
    write_mx()
    write_quantizers()
    write_bare()
    write_int8()
    write_foreign()
    write_gguf()


def write_scalars():
    """One scale for a layer and no marker; a marker where none belongs."""
    tensors, expected = {}, {}
    for seed, (name, dtype) in enumerate({"q": E4M3, "k": E5M2}.items()):
        codes, scale, expected[name] = layer((24, 40), (24, 40), seed, dtype)
        tensors[f"{name}.weight"] = codes
        tensors[f"{name}.weight_scale"] = scale.view(() if name == "q" else (1,))
    write(
        "kijai",
        tensors,
        program=PROGRAM,
        about="weight_scale of no dimensions and of one, no marker; E4M3 and E5M2",
        dense=expected,
        layers=said("kijai", q=(24, 40), k=(24, 40)),
    )
    codes, scale, made = layer((24, 40), (1, 20))
    write(
        "musubi_marked",
        {
            "q.weight": codes,
            "q.scale_weight": scale[:, :, None],
            "scaled_fp8": torch.empty(0, dtype=E4M3),
        },
        program=PROGRAM,
        about="a musubi file to which somebody added ComfyUI's marker",
        dense={"q": made},
        layers=said("musubi", q=(1, 20)),
    )


def write_mixed():
    """A whole checkpoint: each of its parts is of another writer."""
    parts = {
        "model.diffusion_model.blocks.0.q": ((12, 32), (1, 16)),
        "text_encoders.t5.proj": ((16, 24), (16, 24)),
        "text_encoders.clip.proj": ((8, 16), (8, 16)),
        "vision.proj": ((24, 24), (1, 24)),
    }
    made = {
        name: layer(shape, block, seed)
        for seed, (name, (shape, block)) in enumerate(parts.items())
    }
    tensors = {f"{name}.weight": codes for name, (codes, _, _) in made.items()}
    musubi, legacy, marked, rows = parts
    tensors[f"{musubi}.scale_weight"] = made[musubi][1].bfloat16()[:, :, None]
    tensors[f"{legacy}.scale_weight"] = made[legacy][1].view(())
    tensors["text_encoders.t5.scaled_fp8"] = torch.empty(0, dtype=E4M3)
    tensors[f"{marked}.weight_scale"] = made[marked][1].view(())
    tensors[f"{marked}.comfy_quant"] = comfy_marker(format="float8_e4m3fn")
    tensors[f"{rows}.weight_scale"] = made[rows][1].flatten()
    tensors["ints.proj.weight"] = torch.ones(8, 16, dtype=torch.int8)
    tensors["ints.proj.weight_scale"] = torch.tensor(0.5)
    tensors["ints.proj.comfy_quant"] = comfy_marker(format="awq_w4a16")
    tensors["vae.conv.weight"] = randn(4, 4)
    expected = {name: made[name][2] for name in parts}
    codes = made[musubi][0]
    expected[musubi] = dense(codes, made[musubi][1].bfloat16(), (1, 16))
    dialects = ("musubi", "scaled_fp8", "comfy_quant", "fp8r")
    layers = {}
    for (name, (_, block)), dialect in zip(parts.items(), dialects, strict=True):
        layers[name] = said(dialect, x=block)["x"]
    write(
        "mixed",
        tensors,
        program=PROGRAM,
        about="musubi, legacy under a prefix, comfy_quant, rows, integers and plain",
        dense=expected,
        layers=layers,
        foreign={"ints.proj": "comfy_quant of another kind"},
    )


def write_native():
    """hijack's own, with blocks that are short."""
    tensors, expected, marks = {}, {}, {}
    for seed, (name, shape) in enumerate({"even": (32, 16), "short": (20, 24)}.items()):
        codes, scale, expected[name] = layer(shape, (16, 16), seed)
        tensors[f"{name}.weight"], tensors[f"{name}.weight_scale"] = codes, scale
        names = ["weight_scale"]
        if name == "short":
            names.append("weight_block_size")
            tensors[f"{name}.weight_block_size"] = torch.empty(
                16, 16, 0, dtype=torch.uint8
            )
        marks[name] = {"scheme": "blockwise_fp8", "params": names}
    write(
        "hijack",
        tensors,
        metadata={"hijack": json.dumps({"version": 1, "layers": marks})},
        program=PROGRAM,
        about="hijack's own: blocks of 16x16, whole and short",
        dense=expected,
        layers=said("hijack", even=(16, 16), short=(16, 16)),
    )


def write_mx():
    """MXFP8 in plain order without a marker; every exponent, the least included."""
    codes, scale, _ = layer((24, 64), (1, 32))
    exponents = torch.ceil(torch.log2(scale)).add(127).to(torch.uint8)
    codes = torch.arange(24 * 64).to(torch.uint8)
    codes[(codes & 0x7F) == 0x7F] = 0  # not a number
    codes = codes.view(24, 64).view(E4M3)
    # with a larger exponent the largest code is beyond float32
    exponents.view(-1)[:3] = torch.tensor([0, 1, 245], dtype=torch.uint8)
    powers = torch.exp2(exponents.double() - 127)
    expected = dense(codes, powers, (1, 32))
    write(
        "mxfp8_plain",
        {"proj.weight": codes, "proj.weight_scale": exponents},
        program=PROGRAM,
        about="no marker; 24x2 scales for 24x64 can only be in plain order; every "
        "code, and the least exponents",
        dense={"proj": expected},
        layers=said("mxfp8", proj=(1, 32)),
    )


def write_quantizers():
    """ModelOpt's and Quark's scales, in and out of the module that made them."""
    blocks, grid, first = layer((130, 8), (128, 8))
    rows, column, second = layer((24, 64), (1, 64), seed=1)
    whole, scale, third = layer((16, 32), (16, 32), seed=2)
    deep, single, fourth = layer((16, 32), (16, 32), seed=3)
    config = {"quant_method": "modelopt", "quant_algo": "FP8_PB_WO"}
    write(
        "modelopt_blocks",
        {"a.weight": blocks, "a.weight_scale": grid.view(2, 1, 1, 1)},
        program=PROGRAM,
        about="ModelOpt's FP8_PB_WO: four dimensions, of which two are 1",
        config={"quantization_config": config},
        dense={"a": first},
        layers=said("modelopt", a=(128, 8)),
    )
    write(
        "modelopt_quantizers",
        {
            "rows.weight": rows,
            "rows.weight_quantizer._scale": column.view(24, 1),
            "rows.weight_quantizer._amax": column.view(24, 1) * 448,
            "rows.input_quantizer._amax": torch.tensor(3.0),
            "whole.weight": whole,
            "whole.weight_quantizer.scale": scale.view(()),
            "engine.weight": deep,
            "engine.weights_scaling_factor": single.view(1),
            "engine.activation_scaling_factor": torch.ones(1),
        },
        program=PROGRAM,
        about="scales one level down, of ModelOpt and Quark, and TensorRT-LLM's",
        dense={"rows": second, "whole": third, "engine": fourth},
        layers=said("modelopt", rows=(1, 64), whole=(16, 32), engine=(16, 32)),
    )


def write_bare():
    """Casts without a scale, and a scale without codes."""
    write(
        "bare",
        {
            "cast.weight": randn(16, 24).to(E4M3),
            "norm.weight": torch.ones(24),
            "lost.scale_weight": torch.ones(16, 2, 1),
        },
        program=PROGRAM,
        about="a plain cast, and a scale whose weight is missing",
        layers={},
        unscaled=["cast"],
        orphans=["lost.scale_weight"],
    )


def rotated(codes, scale, group):
    """Codes times scales of rows, times the regular Hadamard matrix of a group.

    Its element at row i and column j has a minus for each digit, to the base of 4, in
    which i and j add up to 3. All sums are exact if scales are powers of two.
    """
    weight = codes.double() * scale.double()
    if not group:
        return weight.float()
    index, matrix = torch.arange(group), torch.ones(group, group, dtype=torch.float64)
    size = 1
    while size < group:
        digits = index // size % 4
        matrix[digits[:, None] + digits == 3] *= -1
        size *= 4
    groups = weight.view(len(weight), -1, group) @ (matrix / group**0.5)
    return groups.view_as(weight).float()


def write_int8():
    """INT8-Fast's and comfy-quants' markers without a format, and no marker at all."""
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(-127, 128, (8, 256), generator=generator).to(torch.int8)
    scale = 2.0 ** -torch.arange(3.0, 11)[:, None]
    markers = {
        "turned": {"convrot": True, "per_row": True},
        "groups": {"convrot": True, "convrot_groupsize": 64},
        "plain": {"convrot": False, "per_row": True},
    }
    expected = {
        "turned": rotated(codes, scale, 256),
        "groups": rotated(codes[:, :64], scale, 64),
        "plain": rotated(codes[:, :64], scale, 0),
    }
    tensors = {}
    for name, marker in markers.items():
        columns = expected[name].shape[1]
        tensors[f"{name}.weight"] = codes[:, :columns].contiguous()
        tensors[f"{name}.weight_scale"] = scale
        tensors[f"{name}.comfy_quant"] = comfy_marker(**marker)
    write(
        "int8_without_format",
        tensors,
        program=PROGRAM,
        about="markers of INT8-Fast and comfy-quants, which ComfyUI refuses",
        dense=expected,
        layers=said_by(
            "int8", "comfy_quant", turned=(1, 256), groups=(1, 64), plain=(1, 64)
        ),
        contradicted=list(markers),
    )
    codes = codes[:, :64].contiguous()
    write(
        "int8_unmarked",
        {"proj.weight": codes, "proj.weight_scale": scale},
        program=PROGRAM,
        about="nothing says whether the weight is rotated",
        ambiguous=["proj"],
        assume={
            f"rotation={group}": {
                "layers": said_by("int8", "comfy_quant", proj=(1, 64)),
                "sha256": {"proj": digest(rotated(codes, scale, group))},
            }
            for group in (0, 64, 16)
        },
    )


def write_foreign():
    """Formats that hijack names and does not read, from their layouts."""
    i8, u8, i32, f16 = torch.int8, torch.uint8, torch.int32, torch.float16
    int8 = torch.ones(16, 32, dtype=i8)
    groups = {
        "nunchaku SVDQuant": {
            "qweight": torch.ones(32, 32, dtype=i8),
            "wscales": torch.ones(1, 32, dtype=f16),
            "smooth_factor": torch.ones(64, dtype=f16),
            "proj_down": torch.ones(64, 4, dtype=f16),
            "proj_up": torch.ones(32, 4, dtype=f16),
        },
        "GPTQ": {
            "qweight": torch.ones(8, 32, dtype=i32),
            "qzeros": torch.ones(1, 4, dtype=i32),
            "scales": torch.ones(1, 32, dtype=f16),
            "g_idx": torch.zeros(64, dtype=i32),
        },
        "AWQ": {
            "qweight": torch.ones(64, 4, dtype=i32),
            "qzeros": torch.ones(1, 4, dtype=i32),
            "scales": torch.ones(1, 32, dtype=f16),
        },
        "MXFP4 experts": {
            "gate_up_proj_blocks": torch.ones(2, 16, 2, 16, dtype=u8),
            "gate_up_proj_scales": torch.ones(2, 16, 2, dtype=u8),
        },
        "comfy_quant of another kind": {
            "weight": int8,
            "weight_scale": torch.ones(16, 1),
            "comfy_quant": comfy_marker(format="somebody_elses"),
        },
        "DeepSeek FP4 experts": {
            "weight": torch.ones(16, 32, dtype=i8),
            "scale": torch.ones(16, 2, dtype=u8),
        },
        "FP8 FNUZ": {
            "weight": torch.ones(16, 32).to(torch.float8_e4m3fnuz),
            "weight_scale": torch.ones(16, 1),
        },
        "HQQ": {
            "W_q": torch.ones(8, 32, dtype=u8),
            "scale": torch.ones(8, 1, dtype=f16),
            "zero": torch.ones(8, 1, dtype=f16),
        },
    }
    write(
        "foreign_layouts",
        {
            f"layer{number}.{name}": tensor
            for number, group in enumerate(groups.values())
            for name, tensor in group.items()
        },
        program=PROGRAM,
        about="one layer of each format whose writer is not run here",
        foreign={f"layer{number}": name for number, name in enumerate(groups)},
    )


def write_gguf():
    """The first bytes of a GGUF file."""
    folder = start(
        "gguf",
        program=PROGRAM,
        about="magic, version 3, 5 tensors, 7 entries",
        source="model.gguf",
        container="GGUF",
    )
    head = b"GGUF" + struct.pack("<IQQ", 3, 5, 7)
    (HERE / "gguf" / "model.gguf").write_bytes(head.ljust(1024, b"\0"))
    check(folder)


if __name__ == "__main__":
    main()
