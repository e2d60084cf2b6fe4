"""Run by tests in a fresh process: files in every dialect, in ComfyUI's own loader.

Usage: dialect_case.py COMFYUI FOLDER

The files are spelled here, without hijack. Prints one JSON object: dialect to the error
of the network's output against that of the exactly dequantized model.
"""

# ruff: noqa: TID253 - ComfyUI is importable only once it is prepared
from __future__ import annotations

import json

import comfy_case  # prepares ComfyUI, so it comes first  # isort: skip
import comfy.sd
import comfy_models
import torch
from comfy_case import error, first_output, load
from safetensors.torch import save_file

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2


def quantize(weight, rows, cols, dtype=E4M3):
    """Quantized data, scales (N/R, K/C) in float32, and what they mean."""
    n, k = weight.shape
    blocks = weight.float().reshape(n // rows, rows, k // cols, cols)
    scale = blocks.abs().amax((1, 3), keepdim=True).clamp(min=1e-8)
    scale = scale / torch.finfo(dtype).max
    qdata = (blocks / scale).to(dtype)
    dense = (qdata.float() * scale).reshape(n, k)
    return qdata.reshape(n, k), scale[:, 0, :, 0], dense


def marker(**entry):
    """ComfyUI's marker of a layer."""
    return torch.tensor(list(json.dumps(entry).encode()), dtype=torch.uint8)


def tiles(scale):
    """Exponents in tiles of 128 x 4, written element by element."""
    rows, cols = scale.shape
    high, wide = -(-rows // 128), -(-cols // 4)
    flat = torch.zeros(high * wide * 512, dtype=torch.uint8)
    for r in range(rows):
        for c in range(cols):
            tile = (r // 128) * wide + c // 4
            flat[tile * 512 + r % 32 * 16 + r % 128 // 32 * 4 + c % 4] = scale[r, c]
    return flat.reshape(high * 128, wide * 4)


def scaled(dtype, marked, name="scale_weight"):
    """The older files of ComfyUI: one scale, E4M3 or E5M2."""

    def spell(layer, weight):
        qdata, scale, dense = quantize(weight, *weight.shape, dtype)
        return {"weight": qdata, name: scale.reshape(())}, dense

    return spell, {"scaled_fp8": torch.zeros(marked, dtype=dtype)}, {}


def scaled_rows():
    """What convert_to_quant wrote under the older marker: a scale for each row."""

    def spell(layer, weight):
        qdata, scale, dense = quantize(weight, 1, weight.shape[1])
        return {"weight": qdata, "scale_weight": scale[:, 0]}, dense

    return spell, {"scaled_fp8": torch.zeros(2, dtype=E4M3)}, {}


def marked_blocks(rows, cols, name, **entry):
    """Layers marked one by one, in blocks."""

    def spell(layer, weight):
        qdata, scale, dense = quantize(weight, rows or 1, cols or weight.shape[1])
        shape = (-1,) if cols is None else scale.shape
        mark = marker(format=name, **entry)
        tensors = {"weight_scale": scale.reshape(shape), "comfy_quant": mark.clone()}
        return {"weight": qdata, **tensors}, dense

    return spell, {}, {}


def mismarked(mark):
    """One scale, and a marker that cannot be true or read."""

    def spell(layer, weight):
        qdata, scale, dense = quantize(weight, *weight.shape)
        tensors = {"weight_scale": scale.reshape(()), "comfy_quant": mark.clone()}
        return {"weight": qdata, **tensors}, dense

    # and one of a layer that is dense
    return spell, {"img_in.comfy_quant": torch.zeros(27, dtype=torch.uint8)}, {}


def mxfp8():
    """ComfyUI's own MXFP8."""

    def spell(layer, weight):
        _, scale, _ = quantize(weight, 1, 32)
        power = torch.ceil(torch.log2(scale)).clamp(-127, 127)
        wide = torch.exp2(power).repeat_interleave(32, 1)
        qdata = (weight.float() / wide).to(E4M3)
        stored = tiles((power + 127).to(torch.uint8))
        tensors = {"weight_scale": stored, "comfy_quant": marker(format="mxfp8")}
        return {"weight": qdata, **tensors}, qdata.float() * wide

    return spell, {}, {}


def rotated(matrix, group):
    """Groups of columns times the regular Hadamard matrix of that size."""
    four = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1.0]])
    hadamard = four
    while len(hadamard) < group:
        hadamard = torch.kron(hadamard, four)
    n, k = matrix.shape
    return (matrix.reshape(n, -1, group) @ (hadamard / group**0.5)).reshape(n, k)


def int8(mark, group=0, block=0):
    """Integers in rows, or in square blocks, of the weight or of its rotation."""

    def spell(layer, weight):
        n, k = weight.shape
        group_here = group if group and k % group == 0 else 0
        wide = weight.float()
        wide = rotated(wide, group_here) if group_here else wide
        rows, cols = (block, block) if block else (1, k)
        blocks = wide.reshape(n // rows, rows, k // cols, cols)
        scale = blocks.abs().amax((1, 3), keepdim=True) / 127
        qdata = (blocks / scale).round().to(torch.int8)
        dense = (qdata.float() * scale).reshape(n, k)
        dense = rotated(dense, group_here) if group_here else dense
        entry = {"convrot": True, "convrot_groupsize": group} if group_here else {}
        stored = scale[:, 0, :, 0].contiguous() if block else scale.reshape(n, 1)
        tensors = {"weight_scale": stored, "comfy_quant": marker(**{**mark, **entry})}
        return {"weight": qdata.reshape(n, k), **tensors}, dense

    return spell, {}, {}


#: Files that nothing tells from those of another program.
AMBIGUOUS = ("nvfp4 without a marker",)
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def e2m1(blocks, step):
    """The nearest codes of blocks, as (N, K) bytes, and what they decode to."""
    step = step.unsqueeze(-1)
    codes = (blocks / step).abs().sub(E2M1[:, None, None, None]).abs().argmin(0)
    signs = blocks < 0
    dense = E2M1[codes] * torch.where(signs, -1.0, 1.0) * step
    return (codes + 8 * signs).to(torch.uint8).flatten(1), dense.flatten(1)


def nvfp4(smooth=False, plain=False, marked=True):
    """ComfyUI's own NVFP4: the even code in the high half, scales in tiles.

    With ``plain`` ModelOpt's: the even code in the low half, scales in plain order.
    """

    def spell(layer, weight):
        n, k = weight.shape
        factor = torch.linspace(0.5, 2, k) if smooth else torch.ones(k)
        blocks = (weight.float() / factor).reshape(n, k // 16, 16)
        whole = blocks.abs().max() / (448 * 6)
        scale = (blocks.abs().amax(-1) / 6 / whole).to(E4M3)
        codes, dense = e2m1(blocks, scale.float() * whole)
        even, odd = (1, 16) if plain else (16, 1)
        tensors = {
            "weight": codes[:, 0::2] * even + codes[:, 1::2] * odd,
            "weight_scale": scale,
            "weight_scale_2": whole,
        }
        if not plain:
            tensors["weight_scale"] = tiles(scale.view(torch.uint8)).view(E4M3)
        if marked and not plain:
            tensors["comfy_quant"] = marker(format="nvfp4")
        if smooth:
            tensors["pre_quant_scale"] = factor
        return tensors, dense * factor

    config = {"quant_method": "modelopt", "quant_algo": "NVFP4"}
    said = {"quantization_config": json.dumps(config)} if plain else {}
    return spell, {}, said


def mxfp4():
    """compressed-tensors' MXFP4, which has no tensor that is called ``weight``."""

    def spell(layer, weight):
        n, k = weight.shape
        blocks = weight.float().reshape(n, k // 32, 32)
        exponents = blocks.abs().amax(-1).log2().floor() - 1  # nothing exceeds 6
        codes, dense = e2m1(blocks, exponents.exp2())
        tensors = {
            "weight_packed": codes[:, 0::2] + codes[:, 1::2] * 16,
            "weight_scale": (exponents + 127).to(torch.uint8),
        }
        return tensors, dense

    return spell, {}, {}


#: bitsandbytes' 16 values, the negative ones and then the others.
NF4 = torch.tensor(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634),
        *(0.33791524171829224, 0.44070982933044434, 0.5626170039176941),
        *(0.7229568362236023, 1.0),
    ]
)


def nf4():
    """bitsandbytes' NF4 in blocks of 64, the first code in the high half."""

    def spell(layer, weight):
        blocks = weight.float().reshape(-1, 64)
        absmax = blocks.abs().amax(1)
        codes = (blocks / absmax[:, None])[..., None].sub(NF4).abs().argmin(-1)
        dense = (NF4[codes] * absmax[:, None]).reshape(weight.shape)
        flat = codes.to(torch.uint8).reshape(-1, 2)
        state = {
            **{"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16"},
            "shape": list(weight.shape),
        }
        name = "weight.quant_state.bitsandbytes__nf4"
        return {
            "weight": (flat[:, :1] * 16 + flat[:, 1:]),
            "weight.absmax": absmax,
            "weight.quant_map": NF4.clone(),
            name: marker(**state),
        }, dense

    return spell, {}, {}


def plain(rows, cols, shape, name="weight_scale", metadata=None, code="weight"):
    """Data and a scale of some name and shape, and no marker."""

    def spell(layer, weight):
        high = weight.shape[0] if rows is None else rows
        qdata, scale, dense = quantize(weight, high, cols or weight.shape[1])
        return {code: qdata, name: scale.reshape(shape(scale))}, dense

    return spell, {}, metadata or {}


def sdnq(cols, lying=False):
    """SDNQ's groups of columns, a dimension of the weight, or rows that lie down."""

    def spell(layer, weight):
        n, k = weight.shape
        qdata, scale, dense = quantize(weight, 1, cols or k)
        if lying:
            return {"weight": qdata.t().contiguous(), "scale": scale.t()}, dense
        shaped = qdata.reshape(n, -1, cols)
        return {"weight": shaped, "scale": scale[:, :, None].contiguous()}, dense

    config = {"quant_method": "sdnq", "weights_dtype": "float8_e4m3fn"}
    return spell, {}, {"quantization_config": json.dumps(config)}


def torchao(dense):
    """What torchao's writer puts into the header."""
    names, metadata = [], {}
    for key, tensor in dense.items():
        entry = {"_type": "Tensor"}
        if comfy_models.is_quantized(key, tensor):
            data = {"block_size": [1, tensor.shape[1]]}
            parts = ["qdata", "scale"]
            entry = {
                "_type": "Float8Tensor",
                "_data": data,
                "_tensor_data_names": parts,
            }
        names.append(key)
        metadata[key] = json.dumps(entry)
    return {**metadata, "tensor_names": json.dumps(names)}


def dialects(dense):
    """Name to how a layer is spelled, tensors of the file, and metadata."""
    config = {"quant_method": "fp8", "weight_block_size": [64, 64]}
    grid = {"quantization_config": json.dumps(config)}
    same = lambda scale: scale.shape  # noqa: E731
    return {
        "scaled_fp8 E4M3": scaled(E4M3, 0),
        "scaled_fp8 E5M2": scaled(E5M2, 2),
        "scaled_fp8 rows": scaled_rows(),
        "scaled_fp8 under today's name": scaled(E4M3, 0, "weight_scale"),
        "sdnq groups": sdnq(64),
        "sdnq lying down": sdnq(None, lying=True),
        "comfy_quant one scale": marked_blocks(None, None, "float8_e4m3fn_rowwise"),
        "comfy_quant blocks": marked_blocks(
            64, 64, "float8_e4m3fn_blockwise", group_size=64
        ),
        "comfy_quant rows for blocks": marked_blocks(
            None, None, "float8_e4m3fn_blockwise", group_size=64
        ),
        "comfy_quant of zeros": mismarked(torch.zeros(27, dtype=torch.uint8)),
        "comfy_quant without format": mismarked(marker(orig_dtype="torch.bfloat16")),
        "comfy_quant of integers": mismarked(marker(format="int8_tensorwise")),
        "mxfp8": mxfp8(),
        "int8 rows": int8({"format": "int8_tensorwise"}),
        "int8 ConvRot": int8({"format": "int8_tensorwise"}, 64),
        "int8 ConvRot without format": int8({"convrot": False, "per_row": True}, 64),
        "int8 blocks": int8({"format": "int8_blockwise", "group_size": 64}, block=64),
        "nvfp4": nvfp4(),
        "nvfp4 with factors of its inputs": nvfp4(smooth=True),
        "nvfp4 without a marker": nvfp4(marked=False),
        "nvfp4 of ModelOpt": nvfp4(plain=True),
        "nvfp4 of ModelOpt, with factors": nvfp4(smooth=True, plain=True),
        "mxfp4": mxfp4(),
        "nf4": nf4(),
        "kijai": plain(None, None, lambda scale: ()),
        "fp8r": plain(1, None, lambda scale: (len(scale),)),
        "compressed_tensors": plain(1, None, lambda scale: (len(scale), 1)),
        "deepseek": plain(64, 64, same, "weight_scale_inv", grid),
        "torchao": plain(
            1, None, same, "_weight_scale", torchao(dense), "_weight_qdata"
        ),
        "quanto": plain(1, None, same, "weight._scale", code="weight._data"),
    }


def main():
    """All dialects; the error of each is printed as the last line."""
    import schemes.blockwise_fp8  # noqa: F401 - patches ComfyUI

    bf16 = comfy_models.make_state_dict(comfy_models.small_qwen_shapes())
    found = {}
    for name, (spell, extra, metadata) in dialects(bf16).items():
        quantized_sd, dense = dict(extra), {}
        for key, tensor in bf16.items():
            quantized_sd[key] = dense[key] = tensor
            if comfy_models.is_quantized(key, tensor):
                layer = key.removesuffix(".weight")
                del quantized_sd[key]
                made, dense[key] = spell(layer, tensor)
                quantized_sd.update(
                    {f"{layer}.{suffix}": t for suffix, t in made.items()}
                )
        path = str(comfy_case.FOLDER / f"{name.replace(' ', '-')}.safetensors")
        save_file(quantized_sd, path, metadata)
        expected = first_output(load(dense))
        found[name] = error(loaded(path, name in AMBIGUOUS), expected)
    return found


def loaded(path, ambiguous):
    """What the stock loader's model computes; of a file that may be two, as preferred.

    One that is loaded although nothing says which it is counts as nothing but error.
    """
    import hijack
    from hijack.formats.preference import prefer

    load = comfy.sd.load_diffusion_model
    if not ambiguous:
        return first_output(load(path))
    try:
        load(path)
        raise AssertionError(f"{path}: is ambiguous, and was loaded")
    except hijack.HijackError as error:
        if "assume" not in str(error):
            raise
    with prefer(["comfy_quant"]):
        return first_output(load(path))


if __name__ == "__main__":
    with torch.inference_mode():  # as ComfyUI runs nodes
        found = main()
    print(json.dumps(found))
