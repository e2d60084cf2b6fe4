"""Schemes of other kinds than ours with nothing wrong with them.

The conformance kit must pass each: packed codes, a rotated input, a quantized input.
"""

import math

import torch
import torch.nn.functional as F

import hijack
from hijack.options import Option


class PackedInt4(hijack.Scheme):
    """Int4 with a zero point per group of a row, two codes in a byte.

    Rows are padded to whole groups; `dequantize` gives the padded weight, which is cut
    to the layer's shape.
    """

    name = "packed_int4"
    targets = (torch.nn.Linear, torch.nn.Embedding, torch.nn.Conv2d)
    options = (Option("group", "int", 32, "values that share a scale", minimum=2),)

    def declines(self, shape, **options):
        """Odd groups cannot be packed; a weight has rows."""
        if options.get("group", 32) % 2:
            return f"groups of {options['group']} are odd"
        return "it has one dimension" if len(shape) < 2 else None

    def quantize(self, weight, *, group=32):
        """Spread 16 codes over the range of each group, zero among them."""
        if group % 2:
            raise hijack.errors.SchemeError(f"group: got {group}, expected it even")
        flat = weight.flatten(1).float()
        n, k = flat.shape
        groups = F.pad(flat, (0, -k % group)).view(n, -(-k // group), group)
        low = groups.amin(2, keepdim=True).clamp_max(0)
        high = groups.amax(2, keepdim=True).clamp_min(0)
        scale = ((high - low) / 15).clamp_min(1e-12)
        zero = (-low / scale).round()
        codes = (groups / scale + zero).round().clamp(0, 15).to(torch.uint8).flatten(1)
        packed = codes[:, ::2] | (codes[:, 1::2] << 4)
        return packed, {
            "scale": scale.squeeze(2),
            "zero": zero.squeeze(2).to(torch.uint8),
        }

    def dequantize(self, qdata, params, dtype):
        """(N, K) for K a multiple of the group."""
        codes = torch.stack([qdata & 15, qdata >> 4], 2)
        scale, zero = params["scale"], params["zero"]
        groups = codes.reshape(*scale.shape, -1).float() - zero[:, :, None].float()
        return (groups * scale[:, :, None]).flatten(1).to(dtype)

    def dequantize_weight(self, weight, dtype):
        """Cut to the shape of the layer, which may have more than two dimensions."""
        dense = self.dequantize(weight.qdata, weight.params, dtype)
        width = math.prod(weight.shape[1:])
        return dense[:, :width].reshape(weight.shape)

    def dense_shape(self, qdata, params):
        """The padded shape."""
        return (qdata.shape[0], 2 * qdata.shape[1])

    def options_of(self, qdata, params):
        """The group, which the shapes tell."""
        return {"group": 2 * qdata.shape[1] // params["scale"].shape[1]}

    def block_size(self, qdata, params):
        """One row by a group."""
        return (1, 2 * qdata.shape[1] // params["scale"].shape[1])


def _hadamard(x):
    """Rotate the last dimension in blocks of its largest power of two, up to 64."""
    size = min(x.shape[-1] & -x.shape[-1], 64)
    shape = x.shape
    x = x.reshape(-1, shape[-1] // size, size)
    step = 1
    while step < size:
        pairs = x.reshape(*x.shape[:2], size // (2 * step), 2, step)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack([a + b, a - b], -2).reshape(x.shape)
        step *= 2
    return (x / math.sqrt(size)).reshape(shape)


class RotatedInt8(hijack.Scheme):
    """Int8 of a weight rotated by Hadamard matrices; its forward rotates the input."""

    name = "rotated_int8"

    def quantize(self, weight):
        """Rotate each row, then one scale for each."""
        rotated = _hadamard(weight.float())
        scale = rotated.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        codes = (rotated / scale).round().clamp(-127, 127)
        return codes.to(torch.int8), {"weight_scale": scale}

    def dequantize(self, qdata, params, dtype):
        """A Hadamard matrix is its own inverse."""
        return _hadamard(qdata.float() * params["weight_scale"]).to(dtype)

    def dense_shape(self, qdata, params):
        """That of the codes."""
        return tuple(qdata.shape)

    def bind_forward(self, module):
        """One forward for every Linear."""
        return rotated_linear


def rotated_linear(module, input, weight, bias):
    """``F.linear`` of the rotated input with the rotated weight."""
    if not input.is_floating_point() or input.shape[-1] != weight.shape[1]:
        return F.linear(input, weight.dense(), bias)  # which refuses it
    scale = weight.params["weight_scale"].to(input.dtype)
    rotated = weight.qdata.to(input.dtype) * scale
    bias = None if bias is None else bias.to(input.dtype)
    return F.linear(_hadamard(input), rotated, bias)


class LowRankInt8(hijack.Scheme):
    """A low-rank part in 16 bits and the rest in int8, with inputs in int8."""

    name = "low_rank_int8"
    options = (Option("rank", "int", 4, "of the part in 16 bits", minimum=1),)

    def declines(self, shape, **options):
        """It takes matrices."""
        return None if len(shape) == 2 else "it is not a matrix"

    def quantize(self, weight, *, rank=4):
        """Take the largest singular vectors out, then one scale for each row."""
        dense = weight.float()
        rank = min(rank, *weight.shape)
        u, s, v = torch.linalg.svd(dense, full_matrices=False)
        up = (u[:, :rank] * s[:rank]).to(torch.bfloat16).contiguous()
        down = v[:rank].to(torch.bfloat16).contiguous()
        rest = dense - up.float() @ down.float()
        scale = rest.abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        codes = (rest / scale).round().clamp(-127, 127).to(torch.int8)
        return codes, {"weight_scale": scale, "up": up, "down": down}

    def dequantize(self, qdata, params, dtype):
        """The rest and the low-rank part."""
        low = params["up"].float() @ params["down"].float()
        return (qdata.float() * params["weight_scale"] + low).to(dtype)

    def options_of(self, qdata, params):
        """The rank, which the shapes tell."""
        return {"rank": params["up"].shape[1]}

    def bind_forward(self, module):
        """One forward for every Linear."""
        return int8_linear


def _to_int8(x):
    """Round each token to int8, with the gradient of the input itself."""
    scale = x.detach().abs().amax(-1, keepdim=True).clamp_min(1e-6) / 127
    rounded = (x.detach() / scale).round().clamp(-127, 127) * scale
    return x + (rounded - x.detach())


def int8_linear(module, input, weight, bias):
    """The rest with the input in int8, the low-rank part with the input as it is."""
    if not input.is_floating_point():
        return F.linear(input, weight.dense(), bias)  # which refuses it
    params, dtype = weight.params, input.dtype
    rest = weight.qdata.to(dtype) * params["weight_scale"].to(dtype)
    low = F.linear(F.linear(input, params["down"].to(dtype)), params["up"].to(dtype))
    bias = None if bias is None else bias.to(dtype)
    return F.linear(_to_int8(input), rest, bias) + low
