"""Deliberately broken schemes, for the conformance kit to find.

A few defects cannot be had with a scheme alone; those patch hijack itself.
"""

import contextlib
import itertools
import math
import random
import threading
import weakref

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import hijack
from hijack.claim import Certainty, Claim
from hijack.errors import CheckpointError
from hijack.formats.dialect import Dialect, FormatMetadata, native_claim
from hijack.modules import Wrapped
from hijack.options import Option
from hijack.safetensors_io.header import join
from hijack.testing.subjects import Foreign


class Good(hijack.Scheme):
    """Int8 with one scale per first index, nothing wrong with it."""

    name = "broken"
    levels = 127

    def scale(self, weight):
        peak = weight.float().abs().flatten(1).amax(1)
        return (peak.clamp_min(1e-12) / self.levels).view(-1, *[1] * (weight.dim() - 1))

    def quantize(self, weight, **options):
        scale = self.scale(weight)
        codes = (weight / scale).round().clamp(-self.levels, self.levels)
        return codes.to(torch.int8), {"weight_scale": scale}

    def dequantize(self, qdata, params, dtype):
        return (qdata.float() * params["weight_scale"]).to(dtype)


# -- tensors ---------------------------------------------------------------------------


class Coarse(Good):
    """Has five levels."""

    levels = 2


class Shrinking(Good):
    """Rounds towards zero, so that every round trip takes something away."""

    def quantize(self, weight, **options):
        scale = self.scale(weight) * 1.05
        return (weight / scale).trunc().to(torch.int8), {"weight_scale": scale}


class OneDtype(Good):
    """Ignores the dtype asked for."""

    def dequantize(self, qdata, params, dtype):
        return super().dequantize(qdata, params, torch.float32)


class ImpreciseHalf(Good):
    """Loses more than rounding in bfloat16."""

    def dequantize(self, qdata, params, dtype):
        dense = super().dequantize(qdata, params, dtype)
        return dense * 1.1 if dtype == torch.bfloat16 else dense


class BadColumns(Good):
    """Gets the sign of a single column wrong."""

    def dequantize(self, qdata, params, dtype):
        dense = super().dequantize(qdata, params, dtype)
        return -dense if qdata.shape[1] == 1 else dense


class IgnoresStrides(Good):
    """Takes the memory of a weight for the weight."""

    def quantize(self, weight, **options):
        if not weight.is_meta:
            weight = weight.as_strided(weight.shape, (math.prod(weight.shape[1:]), 1))
        return super().quantize(weight)


class ZeroRows(Good):
    """Divides zero by zero."""

    def quantize(self, weight, **options):
        scale = weight.float().abs().amax(1, keepdim=True) / 448
        return (weight / scale).to(torch.float8_e4m3fn), {"weight_scale": scale}


class ZeroTensor(Good):
    """Takes a weight of zeros for one of ones."""

    def quantize(self, weight, **options):
        blank = not weight.is_meta and not weight.any()
        return super().quantize(torch.ones_like(weight) if blank else weight)


class FlipsLarge(Good):
    """Flips the sign of large weights."""

    def dequantize(self, qdata, params, dtype):
        dense = super().dequantize(qdata, params, dtype)
        return torch.where(params["weight_scale"] > 1, -dense, dense)


class NotLocal(Good):
    """One scale for all rows, though rows are said to be independent."""

    def scale(self, weight):
        own = super().scale(weight)
        return own.amax().expand_as(own).contiguous()


class WritesWeight(Good):
    """Divides the caller's weight in place."""

    def quantize(self, weight, **options):
        scale = self.scale(weight)
        return weight.div_(scale).round().to(torch.int8), {"weight_scale": scale}


class CountsCalls(Good):
    """Keeps count of its calls in a parameter."""

    def quantize(self, weight, **options):
        qdata, params = super().quantize(weight)
        return qdata, {**params, "calls": torch.zeros(1, device=weight.device)}

    def dequantize(self, qdata, params, dtype):
        params["calls"].add_(1)
        return super().dequantize(qdata, params, dtype)


class Stamped(Good):
    """Never gives the same tensors twice."""

    def __init__(self):
        self.serial = itertools.count()

    def quantize(self, weight, **options):
        qdata, params = super().quantize(weight)
        stamp = torch.full((1,), float(next(self.serial)), device=weight.device)
        return qdata, {**params, "stamp": stamp}


class ParameterScale(Good):
    """Gives an nn.Parameter."""

    def quantize(self, weight, **options):
        qdata, params = super().quantize(weight)
        return qdata, {"weight_scale": nn.Parameter(params["weight_scale"])}


class Transposed(Good):
    """Gives codes that are not contiguous."""

    def quantize(self, weight, **options):
        qdata, params = super().quantize(weight)
        return qdata.t().contiguous().t(), params


class SharesMemory(Good):
    """Gives one tensor under two names."""

    def quantize(self, weight, **options):
        qdata, params = super().quantize(weight)
        return qdata, {**params, "spare": params["weight_scale"]}


class WrongPlan(Good):
    """Promises other tensors on meta than it gives."""

    def create_params(self, shape, dtype, device=None, **options):
        qdata, params = super().create_params(shape, dtype, device)
        if device == "meta":
            params = {"weight_scale": params["weight_scale"].half()}
        return qdata, params


class WrongBirth(Good):
    """Makes other tensors for new modules than for wrapped ones."""

    def create_params(self, shape, dtype, device=None, **options):
        qdata, params = super().create_params(shape, dtype, device)
        if torch.device(device or "cpu").type != "meta":
            params = {"weight_scale": params["weight_scale"].half()}
        return qdata, params


class SignedPeak(Good):
    """Takes the largest value for the largest magnitude."""

    def scale(self, weight):
        peak = weight.float().flatten(1).amax(1).clamp_min(1e-12)
        return (peak / 127).view(-1, *[1] * (weight.dim() - 1))


class WrongNarrow(Good):
    """Loses the sign of weights in bfloat16."""

    def quantize(self, weight, **options):
        if weight.dtype == torch.bfloat16:
            weight = weight.abs()
        return super().quantize(weight)


class OverflowsHalf(Good):
    """Forms the sum of a row in the weight's dtype."""

    def scale(self, weight):
        total = weight.abs().flatten(1).sum(1) / 16
        shape = (-1, *[1] * (weight.dim() - 1))
        return (total.float().clamp_min(1e-12) / self.levels).view(shape)


class NoLeastScale(Good):
    """Has no least scale, so that subnormal values are divided by zero."""

    def scale(self, weight):
        peak = weight.float().abs().flatten(1).amax(1)
        scale = torch.where(peak > 0, peak, 1.0) / self.levels
        return scale.view(-1, *[1] * (weight.dim() - 1))

    def quantize(self, weight, **options):
        scale = self.scale(weight)
        codes = (weight * (1 / scale)).nan_to_num().clamp(-127, 127).round()
        scale = torch.where(scale < 1e-30, 1 / scale, scale)
        return codes.to(torch.int8), {"weight_scale": scale}


class Clips(Good):
    """Clips what is far from the mean."""

    def quantize(self, weight, **options):
        most = 8 * weight.float().pow(2).mean().sqrt()
        return super().quantize(weight.clamp(-most, most))


class Blocks(Good):
    """Int8 in blocks of 1 x 64, spread in a way that Inductor compiles into garbage.

    There is nothing else wrong with it.
    """

    cols = 64

    def spread(self, scale, width):
        return scale.repeat_interleave(self.cols, 1)[:, :width]

    def quantize(self, weight):
        n, k = weight.flatten(1).shape
        flat = F.pad(weight.float().flatten(1), (0, -k % self.cols))
        peak = flat.view(n, -1, self.cols).abs().amax(2).clamp_min(1e-12)
        scale = peak / 127
        codes = weight.flatten(1) / self.spread(scale, k)
        codes = codes.round().clamp(-127, 127).to(torch.int8)
        return codes.view(weight.shape), {"weight_scale": scale}

    def dequantize(self, qdata, params, dtype):
        flat = qdata.flatten(1).float()
        dense = flat * self.spread(params["weight_scale"], flat.shape[1])
        return dense.to(dtype).view(qdata.shape)

    def block_size(self, qdata, params):
        return (1, self.cols)


class LastBlockUnscaled(Blocks):
    """Decodes the last short block with the scale of the one before it."""

    def dequantize(self, qdata, params, dtype):
        scale = params["weight_scale"].clone()
        if qdata.flatten(1).shape[1] % self.cols and scale.shape[1] > 1:
            scale[:, -1] = scale[:, -2] * 1.3
        return super().dequantize(qdata, {"weight_scale": scale}, dtype)


class LastRowsLost(Blocks):
    """Handles rows four at a time, and forgets the rest."""

    def dequantize(self, qdata, params, dtype):
        dense = super().dequantize(qdata, params, dtype)
        rest = qdata.shape[0] % 4
        if rest and qdata.shape[0] > 4:
            dense[-rest:] = 0
        return dense


class LastColumnsLost(Blocks):
    """Handles columns sixteen at a time, and repeats the last of them."""

    def quantize(self, weight):
        qdata, params = super().quantize(weight)
        width = weight.flatten(1).shape[1]
        if width > 16 and width % 16 and not weight.is_meta:
            flat = qdata.view(len(qdata), -1)
            flat[:, width // 16 * 16 :] = flat[:, :1]
        return qdata, params


class ShortBlockRounded(Blocks):
    """Rounds what is in a short block to seven levels."""

    def quantize(self, weight):
        qdata, params = super().quantize(weight)
        width = weight.flatten(1).shape[1]
        rest = width % self.cols
        if rest and not weight.is_meta:
            flat = qdata.view(len(qdata), -1)
            flat[:, -rest:] = (
                (flat[:, -rest:].float() / 42).round().mul(42).to(torch.int8)
            )
        return qdata, params


class WrongBlockSize(Blocks):
    """Says that blocks are twice as wide."""

    def block_size(self, qdata, params):
        return (1, 2 * self.cols)


class TransposedBlockSize(Blocks):
    """Says columns first."""

    def block_size(self, qdata, params):
        return (self.cols, 1)


class BlockSizeNeedsData(Blocks):
    """Knows the block size only where there is data."""

    def block_size(self, qdata, params):
        return None if qdata.is_meta else (1, self.cols)


class ViewOfWeight(Good):
    """Keeps the first columns dense, as a view of the weight."""

    def quantize(self, weight, **options):
        qdata, params = super().quantize(weight)
        return qdata, {**params, "first": weight.flatten(1)[:, 0].detach()}


class BufferedCodes(Good):
    """Writes codes to a buffer that it keeps for each shape."""

    def __init__(self):
        self.buffers = {}

    def quantize(self, weight, **options):
        qdata, params = super().quantize(weight)
        if weight.is_meta:
            return qdata, params
        key = (tuple(weight.shape), weight.device)
        buffer = self.buffers.setdefault(key, torch.empty_like(qdata))
        return buffer.copy_(qdata), params


class BufferedWeight(Good):
    """Decodes to a buffer that it keeps for each shape."""

    def __init__(self):
        self.buffers = {}

    def dequantize(self, qdata, params, dtype):
        dense = super().dequantize(qdata, params, dtype)
        if dense.is_meta or torch.compiler.is_compiling():
            return dense
        key = (tuple(dense.shape), dtype, dense.device)
        return self.buffers.setdefault(key, torch.empty_like(dense)).copy_(dense)


class Remembers(Good):
    """Keeps the decoded weight of each tensor it was asked for."""

    def __init__(self):
        self.known = {}

    def key(self, qdata):
        return qdata.data_ptr(), qdata._version

    def dequantize(self, qdata, params, dtype):
        if qdata.is_meta or torch.compiler.is_compiling() or qdata.is_inference():
            return super().dequantize(qdata, params, dtype)
        key = (self.key(qdata), qdata.shape, dtype)
        if key not in self.known:
            self.known[key] = super().dequantize(qdata, params, dtype)
        return self.known[key]


class RemembersByIdentity(Remembers):
    """Keeps the decoded weight of each tensor, whatever is written to it."""

    def key(self, qdata):
        return id(qdata)


class RemembersByAddress(Remembers):
    """Keeps a copy of the decoded weight by address and version."""

    def dequantize(self, qdata, params, dtype):
        return super().dequantize(qdata, params, dtype).clone()


class KeepsDense(Good):
    """Keeps every weight it quantized."""

    def __init__(self):
        self.kept = []

    def quantize(self, weight, **options):
        self.kept.append(weight)
        return super().quantize(weight)


class KeepsCodes(Good):
    """Keeps every tensor it decoded."""

    def __init__(self):
        self.kept = {}

    def dequantize(self, qdata, params, dtype):
        self.kept[id(qdata)] = qdata
        return super().dequantize(qdata, params, dtype)


class RandomOffsets(Good):
    """Rounds at random, with torch's own random numbers."""

    def quantize(self, weight, **options):
        scale = self.scale(weight)
        offset = torch.rand(weight.shape, device=weight.device) - 0.5
        codes = (weight / scale + 0.01 * offset).round().clamp(-127, 127)
        return codes.to(torch.int8), {"weight_scale": scale}


class ScaleElsewhere(Good):
    """Leaves a tensor on the meta device."""

    def quantize(self, weight, **options):
        qdata, params = super().quantize(weight)
        return qdata, {**params, "spare": torch.zeros(3, device="meta")}


class BigView(Good):
    """Gives a part of something larger."""

    def quantize(self, weight, **options):
        qdata, params = super().quantize(weight)
        wide = weight.new_zeros(4096)
        return qdata, {**params, "spare": wide[:16]}


class WrongPlanForHalf(Good):
    """Promises a scale in float32, and gives it in the weight's dtype."""

    def quantize(self, weight, **options):
        qdata, params = super().quantize(weight)
        if not weight.is_meta:
            params["weight_scale"] = params["weight_scale"].to(weight.dtype)
        return qdata, params


class WrongPlanForOdd(Blocks):
    """Promises one scale less where the last block is short."""

    def create_params(self, shape, dtype, device=None, /, **options):
        n, k = shape[0], math.prod(shape[1:])
        qdata = torch.zeros(shape, dtype=torch.int8, device=device)
        scale = torch.zeros(n, max(k // 64, 1), device=device)
        return qdata, {"weight_scale": scale}


class Packed(Good):
    """Int4, two in a byte; odd widths are padded. Nothing wrong with it."""

    levels = 7

    def quantize(self, weight):
        scale = self.scale(weight)
        codes = (weight / scale).round().clamp(-7, 7).flatten(1) + 8
        codes = F.pad(codes, (0, codes.shape[1] % 2), value=8.0).to(torch.uint8)
        packed = codes[:, ::2] + 16 * codes[:, 1::2]
        return packed, {"weight_scale": scale.flatten(1)}

    def dequantize(self, qdata, params, dtype):
        codes = torch.stack([qdata % 16, qdata // 16], 2).flatten(1).float() - 8
        return (codes * params["weight_scale"]).to(dtype)


class OneScaleForAll(Good):
    """Says that rows can be quantized alone, which share a scale."""

    def scale(self, weight):
        return super().scale(weight).amax(0, keepdim=True)

    def row_step(self, shape, **options):
        return 2


class WrongDenseShape(Packed):
    """Takes the shape of the bytes for that of the weight."""

    def dense_shape(self, qdata, params):
        return tuple(qdata.shape)


class DenseShapeNeedsData(Packed):
    """Says another shape where there is no data."""

    def dense_shape(self, qdata, params):
        shape = (qdata.shape[0], 2 * qdata.shape[1])
        return (*shape, 1) if qdata.is_meta else shape


class DeclinesInNoWords(Good):
    """Answers True and False."""

    def declines(self, shape, **options):
        return len(shape) != 2 and len(shape) != 4


class DeclinesAll(Good):
    """Declines every weight."""

    def declines(self, shape, **options):
        return "it is too small"


class QuantizesLessThanItTakes(Good):
    """Needs an even width, and declines nothing."""

    def quantize(self, weight, **options):
        if weight.shape[-1] % 2:
            raise hijack.errors.ShapeError(f"weight is {tuple(weight.shape)}")
        return super().quantize(weight)


class Leveled(Good):
    """Has an option for its levels. Nothing wrong with it."""

    def quantize(self, weight, *, levels: int = 100):
        scale = self.scale(weight) * 127 / levels
        codes = (weight / scale).round().clamp(-levels, levels)
        return codes.to(torch.int8), {"weight_scale": scale}


class WrongDefault(Leveled):
    """Declares another default than it has."""

    options = (Option("levels", "int", 90, minimum=2, maximum=127),)


class Undeclared(Leveled):
    """Declares none of its options."""

    options = ()


class LevelsOnSelf(Leveled):
    """Keeps the levels of the last layer to itself."""

    levels_now = 100

    def quantize(self, weight, *, levels: int = 100):
        self.levels_now = levels
        qdata, params = super().quantize(weight, levels=levels)
        return qdata, {"weight_scale": params["weight_scale"] * levels}

    def dequantize(self, qdata, params, dtype):
        return super().dequantize(qdata, params, dtype) / self.levels_now


class LevelsOfTheInstance(Good):
    """Is made with levels that no file tells."""

    def __init__(self, levels=127):
        self.own = levels

    def quantize(self, weight):
        scale = self.scale(weight) * 127
        codes = (weight * self.own / scale).round().clamp(-self.own, self.own)
        return codes.to(torch.int8), {"weight_scale": scale}

    def dequantize(self, qdata, params, dtype):
        return super().dequantize(qdata, params, dtype) / self.own


def few_levels():
    """A scheme whose instance differs from others of its class."""
    return LevelsOfTheInstance(100)


class TableOnSelf(Good):
    """Keeps the peaks of each layer it quantized to itself, by shape."""

    def __init__(self):
        self.peaks = {}

    def quantize(self, weight, **options):
        scale = self.scale(weight)
        if not weight.is_meta:
            self.peaks[tuple(weight.shape)] = scale
        codes = (weight / scale).round().clamp(-127, 127).to(torch.int8)
        return codes, {"unused": torch.zeros(1, device=weight.device)}

    def dequantize(self, qdata, params, dtype):
        scale = self.peaks[tuple(qdata.shape)].to(qdata.device)
        return (qdata.float() * scale).to(dtype)


class OptionLosesAll(Leveled):
    """Gives zeros with fewer levels."""

    options = (Option("levels", "int", 100, minimum=2, maximum=127),)

    def dequantize_weight(self, weight, dtype):
        dense = super().dequantize_weight(weight, dtype)
        return dense * 0 if weight.options.get("levels", 100) < 100 else dense


class Grouped(Good):
    """Int8 in groups of an option's size. Nothing wrong with it."""

    options = (Option("cols", "int", 32, choices=(16, 32, 64)),)

    def spread(self, scale, width, cols):
        index = torch.arange(width, device=scale.device) // cols
        return scale[:, index]

    def quantize(self, weight, *, cols: int = 32):
        n, k = weight.flatten(1).shape
        flat = F.pad(weight.float().flatten(1), (0, -k % cols))
        scale = flat.view(n, -1, cols).abs().amax(2).clamp_min(1e-12) / 127
        codes = weight.flatten(1) / self.spread(scale, k, cols)
        codes = codes.round().clamp(-127, 127).to(torch.int8).view(weight.shape)
        mark = torch.empty((cols, 0), dtype=torch.uint8, device=weight.device)
        return codes, {"weight_scale": scale, "cols": mark}

    def dequantize(self, qdata, params, dtype):
        flat, cols = qdata.flatten(1).float(), params["cols"].shape[0]
        scale = self.spread(params["weight_scale"], flat.shape[1], cols)
        return (flat * scale).to(dtype).view(qdata.shape)

    def options_of(self, qdata, params):
        return {"cols": params["cols"].shape[0]}


class WrongOptionsOf(Grouped):
    """Says the default, whatever the tensors have."""

    def options_of(self, qdata, params):
        return {"cols": 32}


class OptionsOfNeedData(Grouped):
    """Knows its options only where there is data."""

    def options_of(self, qdata, params):
        return {} if qdata.is_meta else super().options_of(qdata, params)


class RequantizeForgets(Grouped):
    """Quantizes anew with the defaults."""

    def requantize(self, weight, old, *, seed=0):
        return self.quantize(weight)


class RequantizeCoarse(Good):
    """Quantizes anew with fewer levels."""

    def requantize(self, weight, old, *, seed=0):
        scale = self.scale(weight) * 4
        return (weight / scale).round().to(torch.int8), {"weight_scale": scale}


class RequantizeAtRandom(RandomOffsets):
    """Rounds at random when asked to, and takes no notice of the seed."""

    def quantize(self, weight, **options):
        return Good.quantize(self, weight)

    def requantize(self, weight, old, *, seed=0):
        if not seed:
            return Good.quantize(self, weight)
        return RandomOffsets.quantize(self, weight)


class RequantizeSeededBadly(Good):
    """Adds noise that depends on the seed, as large as the weight."""

    def requantize(self, weight, old, *, seed=0):
        if seed:
            noise = torch.Generator(weight.device).manual_seed(seed)
            weight = (
                torch.randn(weight.shape, generator=noise) * weight.float().std() * 3
            )
        return self.quantize(weight)


class RequantizeSmaller(Good):
    """Gives a scale in half precision."""

    def requantize(self, weight, old, *, seed=0):
        qdata, params = self.quantize(weight)
        scale = params["weight_scale"]
        return qdata, {"weight_scale": scale.half() if seed else scale}


# -- surroundings ----------------------------------------------------------------------


class CpuTable(Good):
    """Decodes with a table that is on the CPU, always."""

    def __init__(self):
        self.table = torch.arange(-128, 128, dtype=torch.float32, device="cpu")

    def dequantize(self, qdata, params, dtype):
        if qdata.is_meta:
            return super().dequantize(qdata, params, dtype)
        codes = self.table[qdata.long() + 128]
        return (codes * params["weight_scale"]).to(dtype)


class CpuConstant(Good):
    """Quantizes with a constant vector that is on the CPU."""

    def quantize(self, weight, **options):
        qdata, params = super().quantize(weight)
        ones = torch.ones(len(weight), *[1] * (weight.dim() - 1), device="cpu")
        if not weight.is_meta:
            params["weight_scale"] = params["weight_scale"] * ones
        return qdata, params


class CpuSigns(Good):
    """Its forward has a table on the CPU."""

    def bind_forward(self, module):
        return CpuSigns.forward

    @staticmethod
    def forward(module, input, weight, bias):
        ones = torch.ones(input.shape[-1], dtype=input.dtype, device="cpu")
        return F.linear(input * ones, weight.dense(input.dtype), cast(bias, input))


class DefaultDtype(Good):
    """Takes the default dtype for float32."""

    def quantize(self, weight, **options):
        qdata, params = super().quantize(weight)
        one = torch.ones_like(params["weight_scale"], dtype=torch.get_default_dtype())
        return qdata, {"weight_scale": params["weight_scale"] * one}


class DefaultDevice(Good):
    """Makes a constant wherever the default is."""

    def dequantize(self, qdata, params, dtype):
        ones = torch.ones(qdata.shape[-1])
        ones = ones if not qdata.is_meta else ones.to("meta")
        if torch.compiler.is_compiling() or ones.is_meta == qdata.is_meta:
            return super().dequantize(qdata, params, dtype) * ones.to(dtype)
        return super().dequantize(qdata, params, dtype).to(ones.device)


class SetsThreads(Good):
    """Sets the number of threads for all."""

    def quantize(self, weight, **options):
        torch.set_num_threads(torch.get_num_threads() + 1)
        return super().quantize(weight)


class TurnsGradientsOff(Good):
    """Turns gradients off, and not on again."""

    def dequantize(self, qdata, params, dtype):
        torch.set_grad_enabled(False)
        return super().dequantize(qdata, params, dtype)


class SeedsEverything(Good):
    """Seeds torch's random numbers to repeat itself."""

    def quantize(self, weight, **options):
        torch.manual_seed(0)
        return super().quantize(weight)


class DrawsInPython(Good):
    """Draws one of Python's random numbers when it decodes."""

    def dequantize(self, qdata, params, dtype):
        random.random()
        return super().dequantize(qdata, params, dtype)


class PeakOnSelf(Good):
    """Passes the scale from one method to another by way of itself."""

    def scale(self, weight):
        self.last = super().scale(weight)
        return self.last

    def quantize(self, weight, **options):
        self.scale(weight)
        codes = (weight / self.last).round().clamp(-127, 127)
        return codes.to(torch.int8), {"weight_scale": self.last}


class ScratchForAll(Good):
    """Decodes by way of memory that all layers share."""

    def __init__(self):
        self.scratch = torch.empty(1 << 16)

    def dequantize(self, qdata, params, dtype):
        if qdata.is_meta or torch.compiler.is_compiling() or qdata.numel() > 1 << 16:
            return super().dequantize(qdata, params, dtype)
        scratch = self.scratch[: qdata.numel()].view(qdata.shape)
        scratch.copy_(qdata)
        scratch.mul_(params["weight_scale"])
        return scratch.to(dtype, copy=True)


class CreatesAtRandom(Good):
    """Draws random numbers when it makes empty tensors."""

    def create_params(self, shape, dtype, device=None, /, **options):
        torch.rand(1, device="cpu")
        return super().create_params(shape, dtype, device, **options)


# -- modules ---------------------------------------------------------------------------


def cast(bias, input):
    """A bias in the input's dtype."""
    return None if bias is None else bias.to(input.dtype)


class Bound(Good):
    """Has a forward of its own."""

    def bind_forward(self, module):
        return type(self).forward

    @staticmethod
    def forward(module, input, weight, bias):
        return F.linear(input, weight.dense(input.dtype), cast(bias, input))


class ForgetsBias(Bound):
    """Its forward forgets the bias."""

    @staticmethod
    def forward(module, input, weight, bias):
        return F.linear(input, weight.dense(input.dtype))


class CutsGradient(Bound):
    """Its forward cuts the gradient off."""

    @staticmethod
    def forward(module, input, weight, bias):
        with torch.no_grad():
            return Bound.forward(module, input, weight, bias)


class WrongGradient(Bound):
    """Its forward has a gradient of zero."""

    @staticmethod
    def forward(module, input, weight, bias):
        y = Bound.forward(module, input, weight, bias)
        return y.detach() + 0 * (
            input.sum() if bias is None else bias.sum() + input.sum()
        )


class Straight(torch.autograd.Function):
    """A product whose gradient is written by hand, for contiguous ones."""

    @staticmethod
    def forward(ctx, input, weight):
        ctx.save_for_backward(weight)
        return input @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        flat = grad.as_strided(grad.shape, grad.new_empty(grad.shape).stride())
        return flat @ weight, None


class StridedGradient(Bound):
    """Takes the memory of a gradient for the gradient."""

    @staticmethod
    def forward(module, input, weight, bias):
        if torch.compiler.is_compiling() or not input.requires_grad:
            return Bound.forward(module, input, weight, bias)
        y = Straight.apply(input, weight.dense(input.dtype))
        return y if bias is None else y + bias


class KeepsInput(torch.autograd.Function):
    """Squares nothing, but gives the gradient of a used input twice."""

    @staticmethod
    def forward(ctx, input, weight):
        ctx.save_for_backward(weight)
        return input @ weight.t()

    @staticmethod
    def backward(ctx, grad):
        (weight,) = ctx.saved_tensors
        return torch.ones_like(grad) @ weight, None


class GradientOfOnes(Bound):
    """Takes every gradient for ones."""

    @staticmethod
    def forward(module, input, weight, bias):
        if torch.compiler.is_compiling() or not input.requires_grad:
            return Bound.forward(module, input, weight, bias)
        y = KeepsInput.apply(input, weight.dense(input.dtype))
        return y if bias is None else y + bias


class BiasWithoutGradient(Bound):
    """The gradient of its bias is that of half the bias."""

    @staticmethod
    def forward(module, input, weight, bias):
        half = None if bias is None else bias / 2 + bias.detach() / 2
        return Bound.forward(module, input, weight, half)


class Stale(Bound):
    """Keeps the dense weight from when the module was wrapped."""

    def bind_forward(self, module):
        weight = self.quantize(module._parameters["weight"].detach().float())
        module.stale = self.dequantize(*weight, torch.float32)
        return Stale.forward

    @staticmethod
    def forward(module, input, weight, bias):
        return F.linear(input, module.stale.to(input.dtype), cast(bias, input))


class StaleForward(Bound):
    """Keeps the dense weight of each module from the first call."""

    known = weakref.WeakKeyDictionary()

    @staticmethod
    def forward(module, input, weight, bias):
        if torch.compiler.is_compiling():
            return Bound.forward(module, input, weight, bias)
        if module not in StaleForward.known:
            StaleForward.known[module] = weight.dense(torch.float32)
        dense = StaleForward.known[module].to(input.dtype)
        return F.linear(input, dense, cast(bias, input))


class StaleBias(Bound):
    """Keeps the bias of each module from the first call."""

    known = weakref.WeakKeyDictionary()

    @staticmethod
    def forward(module, input, weight, bias):
        if bias is not None and not torch.compiler.is_compiling():
            kept = StaleBias.known.setdefault(module, bias.detach().clone())
            bias = kept + 0 * bias
        return Bound.forward(module, input, weight, bias)


class OldBias(Bound):
    """Goes on with the bias that was taken away."""

    known = weakref.WeakKeyDictionary()

    @staticmethod
    def forward(module, input, weight, bias):
        if not torch.compiler.is_compiling():
            if bias is not None:
                OldBias.known[module] = bias.detach()
            bias = OldBias.known.get(module) if bias is None else bias
        return Bound.forward(module, input, weight, bias)


class BiasOfOneDtype(Bound):
    """Leaves out a bias of another dtype than the input's."""

    @staticmethod
    def forward(module, input, weight, bias):
        if bias is not None and bias.dtype == torch.float64 != input.dtype:
            bias = None
        return Bound.forward(module, input, weight, bias)


class ReadsModule(Bound):
    """Reads the module's weight, not the one it is given."""

    @staticmethod
    def forward(module, input, weight, bias):
        return Bound.forward(module, input, module.weight, bias)


class ReadsModuleBias(Bound):
    """Reads the module's bias, not the one it is given."""

    @staticmethod
    def forward(module, input, weight, bias):
        return Bound.forward(module, input, weight, module.bias)


class BreaksGraph(Bound):
    """Its forward cannot be compiled in one graph."""

    @staticmethod
    def forward(module, input, weight, bias):
        torch._dynamo.graph_break()
        return Bound.forward(module, input, weight, bias)


class WrongCompiled(Bound):
    """Its forward computes something else when compiled."""

    @staticmethod
    def forward(module, input, weight, bias):
        y = Bound.forward(module, input, weight, bias)
        return 2 * y if torch.compiler.is_compiling() else y


class WrongCompiledHalf(Bound):
    """Its forward computes something else when compiled for bfloat16."""

    @staticmethod
    def forward(module, input, weight, bias):
        y = Bound.forward(module, input, weight, bias)
        half = input.dtype == torch.bfloat16
        return 2 * y if half and torch.compiler.is_compiling() else y


class WrongCompiledGradient(Bound):
    """Its forward has no gradient when compiled."""

    @staticmethod
    def forward(module, input, weight, bias):
        y = Bound.forward(module, input, weight, bias)
        if torch.compiler.is_compiling() and input.requires_grad:
            return y.detach() + 0 * input.sum()
        return y


class WrongForMany(Bound):
    """Its compiled forward is for a few tokens."""

    @staticmethod
    def forward(module, input, weight, bias):
        y = Bound.forward(module, input, weight, bias)
        few = input.dim() != 2 or input.shape[0] < 4
        return y if few or not torch.compiler.is_compiling() else 2 * y


class CompiledAnew(Bound):
    """Its forward depends on the number of tokens."""

    @staticmethod
    def forward(module, input, weight, bias):
        y = Bound.forward(module, input, weight, bias)
        return y + 0.0 * (input.shape[0] if input.shape[0] % 3 else 1)


class OneOutputDtype(Bound):
    """Its forward always gives float32."""

    @staticmethod
    def forward(module, input, weight, bias):
        return Bound.forward(module, input, weight, bias).float()


class HalfIsScaled(Bound):
    """Computes something else in float16."""

    @staticmethod
    def forward(module, input, weight, bias):
        y = Bound.forward(module, input, weight, bias)
        return y * 1.1 if input.dtype == torch.float16 else y


class DoubleIsNarrow(Bound):
    """Computes in bfloat16 what is asked for in float64."""

    @staticmethod
    def forward(module, input, weight, bias):
        if input.dtype == torch.float64:
            return Bound.forward(module, input.bfloat16(), weight, bias).double()
        return Bound.forward(module, input, weight, bias)


class IgnoresInputStrides(Bound):
    """Takes the memory of an input for the input."""

    @staticmethod
    def forward(module, input, weight, bias):
        if input.is_contiguous() or not input.numel():
            return Bound.forward(module, input, weight, bias)
        size = input.untyped_storage().nbytes() // input.element_size()
        flat = input.as_strided((size,), (1,), 0)[: input.numel()]
        if flat.numel() < input.numel():
            flat = flat.repeat(input.numel() // flat.numel() + 1)[: input.numel()]
        return Bound.forward(module, flat.view(input.shape), weight, bias)


class IgnoresOffset(Bound):
    """Reads an input from the start of its memory."""

    @staticmethod
    def forward(module, input, weight, bias):
        if not torch.compiler.is_compiling() and input.storage_offset():
            input = input.as_strided(input.shape, input.stride(), 0)
        return Bound.forward(module, input, weight, bias)


class NoVectors(Bound):
    """Gives two dimensions for a vector."""

    @staticmethod
    def forward(module, input, weight, bias):
        y = Bound.forward(module, input, weight, bias)
        return y[None] if input.dim() == 1 else y


class NoTokens(Bound):
    """Makes up a token where there is none."""

    @staticmethod
    def forward(module, input, weight, bias):
        y = Bound.forward(module, input, weight, bias)
        return y.sum(0, keepdim=True) if input.shape[0] == 0 else y


class FewTokens(Bound):
    """Forgets tokens after the first hundred."""

    @staticmethod
    def forward(module, input, weight, bias):
        y = Bound.forward(module, input, weight, bias)
        if torch.compiler.is_compiling() or input.dim() < 2 or len(input) < 100:
            return y
        return torch.cat([y[:100], 0 * y[100:]])


class TakesAnyWidth(Bound):
    """Cuts or pads inputs to the width it needs."""

    @staticmethod
    def forward(module, input, weight, bias):
        missing = weight.shape[1] - input.shape[-1]
        return Bound.forward(module, F.pad(input, (0, missing)), weight, bias)


class AutocastBlind(Bound):
    """Does not notice autocast."""

    @staticmethod
    def forward(module, input, weight, bias):
        with torch.autocast("cpu", enabled=False):
            return Bound.forward(module, input, weight, bias)


class AutocastTwice(Bound):
    """Adds the bias twice under autocast."""

    @staticmethod
    def forward(module, input, weight, bias):
        y = Bound.forward(module, input, weight, bias)
        return (
            y + cast(bias, y)
            if torch.is_autocast_enabled("cpu") and bias is not None
            else y
        )


class WrongInInference(Bound):
    """Computes something else in inference mode."""

    @staticmethod
    def forward(module, input, weight, bias):
        y = Bound.forward(module, input, weight, bias)
        return 2 * y if torch.is_inference_mode_enabled() else y


class StaysOff(Bound):
    """Gives a gradient of zero once it was called without one."""

    off = weakref.WeakSet()

    @staticmethod
    def forward(module, input, weight, bias):
        y = Bound.forward(module, input, weight, bias)
        if torch.compiler.is_compiling():
            return y
        if not torch.is_grad_enabled():
            StaysOff.off.add(module)
            return y
        return y.detach() + 0 * input.sum() if module in StaysOff.off else y


class InferenceTable(Good):
    """Makes a table at the first call, which may be in inference mode."""

    table = None

    def bind_forward(self, module):
        return InferenceTable.forward

    @staticmethod
    def forward(module, input, weight, bias):
        scheme = weight.scheme
        if scheme.table is None or scheme.table.shape != input.shape[-1:]:
            scheme.table = torch.ones(input.shape[-1])
        scaled = input * scheme.table.to(input)
        return F.linear(scaled, weight.dense(input.dtype), cast(bias, input))


class TurnsGradientsOn(Bound):
    """Computes with gradients where nobody asked for them."""

    @staticmethod
    def forward(module, input, weight, bias):
        with torch.enable_grad():
            return Bound.forward(module, input, weight, bias)


class TrainsScale(Good):
    """Makes the scales trainable."""

    @hijack.hookimpl
    def hijack_init(self, module, scheme):
        module.weight.params["weight_scale"].requires_grad_()


class LeaksGradient(Bound):
    """Adds a zero that requires a gradient."""

    @staticmethod
    def forward(module, input, weight, bias):
        zero = torch.zeros(1, dtype=input.dtype, requires_grad=True)
        return Bound.forward(module, input, weight, bias) + zero


class ScalesInput(Bound):
    """Scales its input in place."""

    @staticmethod
    def forward(module, input, weight, bias):
        if torch.is_grad_enabled():
            return Bound.forward(module, input, weight, bias)
        y = Bound.forward(module, input, weight, bias)
        input.mul_(2)
        return y


class WritesBias(Bound):
    """Rounds its bias in place."""

    @staticmethod
    def forward(module, input, weight, bias):
        if bias is not None and not torch.compiler.is_compiling():
            bias.data.copy_(bias.data.half())
        return Bound.forward(module, input, weight, bias)


class SharedOutput(Bound):
    """Writes all outputs of one shape to the same memory."""

    outputs = {}

    @staticmethod
    def forward(module, input, weight, bias):
        y = Bound.forward(module, input, weight, bias)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return y
        key = (y.shape, y.dtype)
        return SharedOutput.outputs.setdefault(key, torch.empty_like(y)).copy_(y)


class OwnOutput(Bound):
    """Writes all outputs of one module to the same memory."""

    outputs = weakref.WeakKeyDictionary()

    @staticmethod
    def forward(module, input, weight, bias):
        y = Bound.forward(module, input, weight, bias)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return y
        held = OwnOutput.outputs.setdefault(module, {})
        return held.setdefault((y.shape, y.dtype), torch.empty_like(y)).copy_(y)


class KnownOutput(Bound):
    """Gives the last output again for an equal input."""

    outputs = weakref.WeakKeyDictionary()

    @staticmethod
    def forward(module, input, weight, bias):
        y = Bound.forward(module, input, weight, bias)
        if torch.is_grad_enabled() or torch.compiler.is_compiling():
            return y
        known = KnownOutput.outputs.get(module)
        same = known is not None and known[0].dtype == input.dtype
        if not (same and torch.equal(known[0], input)):
            known = KnownOutput.outputs[module] = (input.clone(), y)
        return known[1]


class OneWeightForAShape(Bound):
    """Decodes the first weight of each shape, for all."""

    known = {}

    @staticmethod
    def forward(module, input, weight, bias):
        if torch.compiler.is_compiling():
            return Bound.forward(module, input, weight, bias)
        key = tuple(weight.shape)
        dense = OneWeightForAShape.known.setdefault(key, weight.dense(torch.float32))
        return F.linear(input, dense.to(input.dtype), cast(bias, input))


class KeepsModules(Good):
    """Keeps every module it was asked for."""

    def __init__(self):
        self.kept = []

    def bind_forward(self, module):
        self.kept.append(module)


class SpareBuffer(Bound):
    """Leaves a buffer of its own in the module."""

    def bind_forward(self, module):
        module.register_buffer("spare", torch.zeros(1))
        return super().bind_forward(module)


class ScalesBiasWhenBound(Bound):
    """Changes the bias when it chooses a forward."""

    def bind_forward(self, module):
        if getattr(module, "bias", None) is not None:
            module.bias.data.mul_(1.01)
        return super().bind_forward(module)


class ForwardForEach(Bound):
    """Makes a new function for each module."""

    def bind_forward(self, module):
        return lambda module, input, weight, bias: Bound.forward(
            module, input, weight, bias
        )


class MethodForward(Bound):
    """Gives a method of the scheme."""

    def bind_forward(self, module):
        return self.compute

    def compute(self, module, input, weight, bias):
        return Bound.forward(module, input, weight, bias)


class Computes:
    """A forward that is an object."""

    def __call__(self, module, input, weight, bias):
        return Bound.forward(module, input, weight, bias)


class ObjectForward(Bound):
    """Gives an object that can be called."""

    one = Computes()

    def bind_forward(self, module):
        return self.one


class NamesVary(Bound):
    """Gives a tensor another name each time."""

    def __init__(self):
        self.serial = itertools.count()

    def quantize(self, weight, **options):
        qdata, params = super().quantize(weight)
        name = f"spare{next(self.serial) % 2}"
        return qdata, {**params, name: torch.zeros(1, device=weight.device)}


class KnowsOnlyLinear(Bound):
    """Looks a module's class up, and knows no subclass."""

    def bind_forward(self, module):
        return {nn.Linear: Bound.forward}[type(module)]


class OldSignature(Bound):
    """Its forward takes the module and the input."""

    def bind_forward(self, module):
        return OldSignature.two

    @staticmethod
    def two(module, input):
        return Bound.forward(module, input, module.weight, module.bias)


class ReplacesForward(Good):
    """Puts its own forward into every module, whatever its class does."""

    @hijack.hookimpl
    def hijack_init(self, module, scheme):
        if isinstance(module, nn.Linear):
            module.forward = lambda x: Bound.forward(
                module, x, module.weight, module.bias
            )


class ConvolvesPlainly(Good):
    """Its convolution knows neither groups nor padding modes."""

    targets = (nn.Linear, nn.Conv2d)

    def bind_forward(self, module):
        return ConvolvesPlainly.conv if isinstance(module, nn.Conv2d) else None

    @staticmethod
    def conv(module, input, weight, bias):
        padding = module.padding if module.padding_mode == "zeros" else (1, 1)
        return F.conv2d(
            input,
            weight.dense(input.dtype),
            cast(bias, input),
            module.stride,
            padding,
            module.dilation,
            module.groups,
        )


class LooksUpPlainly(Good):
    """Its embedding knows no limit of the norm."""

    targets = (nn.Embedding,)

    def bind_forward(self, module):
        return LooksUpPlainly.embedding

    @staticmethod
    def embedding(module, input, weight, bias):
        return F.embedding(input, weight.dense())


class TransposesPlainly(Good):
    """Its transposed convolution knows no output padding."""

    targets = (nn.ConvTranspose2d,)

    def bind_forward(self, module):
        return TransposesPlainly.conv

    @staticmethod
    def conv(module, input, weight, bias):
        return F.conv_transpose2d(
            input, weight.dense(input.dtype), cast(bias, input), module.stride
        )


class Locked(Good):
    """Cannot be pickled."""

    def __init__(self):
        self.lock = threading.Lock()


class ForgetsItself(Good):
    """Is another one after it was pickled."""

    def __init__(self):
        self.factor = 1.0

    def __setstate__(self, state):
        self.factor = 2.0

    def dequantize(self, qdata, params, dtype):
        return super().dequantize(qdata, params, dtype) * self.factor


class NamedBias(Good):
    """Has a tensor of the name of the module's bias."""

    def quantize(self, weight, **options):
        qdata, params = super().quantize(weight)
        return qdata, {"bias": params["weight_scale"]}

    def dequantize(self, qdata, params, dtype):
        return super().dequantize(qdata, {"weight_scale": params["bias"]}, dtype)


class DeclinesSometimes(Good):
    """Declines for another reason each time."""

    def __init__(self):
        self.serial = itertools.count()

    def declines(self, shape, **options):
        if tuple(shape) in ((13, 7), (31, 127)):
            return f"asked {next(self.serial)} times"
        return None


# -- checkpoints -----------------------------------------------------------------------


class ClaimsAll(Good):
    """Claims every layer there is."""

    def match(self, header):
        for layer in header.layers():
            yield native_claim(layer, self.name, ())


class ClaimsNone(Good):
    """Does not know its own files."""

    def match(self, header):
        return ()


class ByName(Dialect):
    """Claims what has tensors of its names, of one dtype. Nothing wrong with it."""

    name = "by_name"
    suffix = "steps"

    def recognise(self, scheme, header, layer):
        keys = {
            "weight": join(layer, "weight"),
            "weight_scale": join(layer, self.suffix),
        }
        if not all(key in header.tensors for key in keys.values()):
            return None
        weight, scale = (header.tensors[key] for key in keys.values())
        if not self.fits(weight, scale):
            return None
        return Claim(layer, scheme.name, self.name, keys, certainty=Certainty.UNIQUE)

    def fits(self, weight, scale):
        rows = (weight.shape[0], *[1] * (len(weight.shape) - 1))
        return (
            weight.torch_dtype == torch.int8
            and scale.torch_dtype == torch.float32
            and scale.shape == rows
        )

    def encode(self, qdata, params, options):
        return {"weight": qdata, self.suffix: params["weight_scale"]}

    def unmark(self, metadata, keys, layers):
        return dict(metadata), set()

    def finish(self, layers, others):
        return FormatMetadata()


class Spelled(Good):
    """Has a dialect. Nothing wrong with it."""

    dialects = (ByName(),)


def spelled(dialect):
    """A scheme with a second dialect, which is broken."""
    dialect.name = "broken_dialect"
    dialect.suffix = "paces"
    parts = {"dialects": (ByName(), dialect), "__module__": __name__}
    return type(type(dialect).__name__.lstrip("_"), (Spelled,), parts)


class _Unread(ByName):
    """Is written, and not read."""

    def recognise(self, scheme, header, layer):
        return None


class _Inverse(ByName):
    """Writes the inverse of the scale, which is not exact."""

    def encode(self, qdata, params, options):
        return {"weight": qdata, self.suffix: 1 / params["weight_scale"]}

    def decode(self, claim, tensors):
        return tensors["weight"], {"weight_scale": 1 / tensors["weight_scale"]}


class _ForgetsSign(ByName):
    """Reads codes without their sign."""

    def decode(self, claim, tensors):
        return tensors["weight"].abs(), {"weight_scale": tensors["weight_scale"]}


class _OtherOnMeta(ByName):
    """Reads scales of another shape where there is no data."""

    def decode(self, claim, tensors):
        scale = tensors["weight_scale"]
        return tensors["weight"], {
            "weight_scale": scale[None] if scale.is_meta else scale
        }

    def encode(self, qdata, params, options):
        scale = params["weight_scale"]
        wide = scale.is_meta and scale.dim() > qdata.dim()
        return {"weight": qdata, self.suffix: scale[0] if wide else scale}


class _WritesOtherOnMeta(ByName):
    """Plans to write half precision."""

    def encode(self, qdata, params, options):
        scale = params["weight_scale"]
        return {"weight": qdata, self.suffix: scale.half() if scale.is_meta else scale}


class _Refuses(ByName):
    """Says it is written, and writes nothing."""

    def encode(self, qdata, params, options):
        raise CheckpointError(f"dialect {self.name}: cannot write it")


class _NeedsOptions(ByName):
    """Writes only what it is told the levels of."""

    def fit_options(self, shape, options):
        return {**options, "levels": 100}

    def encode(self, qdata, params, options):
        if "levels" not in options:
            raise CheckpointError(f"dialect {self.name}: levels are missing")
        return super().encode(qdata, params, options)


class _TrustsOptions(ByName):
    """Writes peaks, and takes the levels from what it is told."""

    def fit_options(self, shape, options):
        return {**options, "levels": 64}

    def encode(self, qdata, params, options):
        peak = params["weight_scale"] * options.get("levels", 128)
        return {"weight": qdata, self.suffix: peak}

    def decode(self, claim, tensors):
        return tensors["weight"], {"weight_scale": tensors["weight_scale"] / 64}


class _AnyDtype(ByName):
    """Claims by names and shapes."""

    def fits(self, weight, scale):
        return scale.shape[:1] == weight.shape[:1]


class _AnyShape(ByName):
    """Claims by names and dtypes, and cuts what is too long."""

    def fits(self, weight, scale):
        return weight.torch_dtype == torch.int8

    def decode(self, claim, tensors):
        weight, scale = tensors["weight"], tensors["weight_scale"]
        return weight, {"weight_scale": scale[-len(weight) :]}


class _ScaleIsOptional(ByName):
    """Takes a layer without a scale for one that needs none."""

    def recognise(self, scheme, header, layer):
        found = super().recognise(scheme, header, layer)
        info = header.tensors.get(join(layer, "weight"))
        if found or info is None or info.torch_dtype != torch.int8:
            return found
        keys = {"weight": join(layer, "weight")}
        return Claim(layer, scheme.name, self.name, keys, certainty=Certainty.UNIQUE)

    def decode(self, claim, tensors):
        weight = tensors["weight"]
        ones = weight.new_ones(len(weight), *[1] * (weight.dim() - 1)).float()
        return weight, {"weight_scale": tensors.get("weight_scale", ones)}


class _AnyInt8(ByName):
    """Claims any int8 layer with a scale, whoever's it is."""

    def recognise(self, scheme, header, layer):
        found = super().recognise(scheme, header, layer)
        keys = {
            "weight": join(layer, "weight"),
            "weight_scale": join(layer, "weight_scale"),
        }
        if found or not all(key in header.tensors for key in keys.values()):
            return found
        if header.tensors[keys["weight"]].dtype != "I8":
            return None
        return Claim(layer, scheme.name, self.name, keys, certainty=Certainty.FITS)


Unread, Inverse, ForgetsSign = map(spelled, (_Unread(), _Inverse(), _ForgetsSign()))
OtherOnMeta, WritesOtherOnMeta = map(spelled, (_OtherOnMeta(), _WritesOtherOnMeta()))
Refuses, AnyDtype, AnyShape = map(spelled, (_Refuses(), _AnyDtype(), _AnyShape()))
ScaleIsOptional, AnyInt8 = map(spelled, (_ScaleIsOptional(), _AnyInt8()))


class NeedsOptions(Leveled):
    """Has a dialect that needs to be told an option."""

    dialects = (_NeedsOptions(),)


class TrustsOptions(Leveled):
    """Has a dialect that relies on being told an option."""

    dialects = (_TrustsOptions(),)


class ClaimsFits(Spelled):
    """Claims unmarked layers by name, dtype and shape, also where config says no."""

    def match(self, header):
        for layer in header.layers():
            names = [join(layer, name) for name in ("weight", "weight_scale")]
            if all(name in header.tensors for name in names):
                yield native_claim(layer, self.name, ("weight_scale",))


class LikenessByDtype(Spelled):
    """Takes layers with codes of one dtype for alike."""

    def likeness(self, header, layer):
        return header.tensors[join(layer, "weight")].dtype


class LikenessByNames(Spelled):
    """Takes layers with tensors of the same names for alike."""

    def likeness(self, header, layer):
        return tuple(sorted(header.parts.get(layer, ())))


class OutputOfAFile(Bound):
    """Computes something else with what came from a file."""

    @staticmethod
    def forward(module, input, weight, bias):
        y = Bound.forward(module, input, weight, bias)
        return y if weight.config.dialect is None else 2 * y


class TargetsForeign(Good):
    """Targets a module it has never heard of."""

    targets = (nn.Linear, Foreign)


class TargetsUnknown(Good):
    """Targets modules the kit has no subject of."""

    targets = (nn.GroupNorm,)


# -- defects of hijack itself ----------------------------------------------------------


def cast_codes(patch):
    """``.to(dtype)`` casts scales."""

    def casting(self, fn, recurse=True):
        params = self._parameters["weight"].params
        params.update({name: fn(tensor) for name, tensor in params.items()})
        return apply(self, fn, recurse)

    apply = Wrapped._apply
    patch.setattr(Wrapped, "_apply", casting)


def share_copies(patch):
    """A copy is the original."""
    patch.setattr(Wrapped, "__deepcopy__", lambda self, memo: self, raising=False)


def accept_nan(patch):
    """Nobody looks for NaN."""
    patch.setattr("hijack.quantized._check_finite", lambda weight, where: None)


class PassesNan(Good):
    """Says that it refuses what is not finite, and does not look."""

    refuses_non_finite = True

    def scale(self, weight):
        return super().scale(weight.nan_to_num(0.0, 1.0, -1.0))


def mark_modules(patch):
    """``wrap_module`` leaves a mark, whether it wraps or refuses."""
    wrap_module = hijack.wrap_module

    def marking(module, *args, **options):
        module.mark = True
        return wrap_module(module, *args, **options)

    patch.setattr(hijack, "wrap_module", marking)


def unwrap_zeros(patch):
    """``unwrap`` loses the weight."""
    patch.setattr("hijack.wrap.dense_weight", lambda m: torch.zeros(m.weight.shape))


def load_zeros(patch):
    """safetensors gives zeros back."""
    load = safetensors.torch.load
    patch.setattr(
        "safetensors.torch.load", lambda data: {k: 0 * t for k, t in load(data).items()}
    )


def build_dense(patch):
    """``building`` builds nothing quantized."""
    patch.setattr(hijack, "building", lambda *a, **k: contextlib.nullcontext())


def load_other_codes(patch):
    """``load_state_dict`` leaves the codes as they are."""
    patch.setattr("hijack.modules._set_quantized", lambda module, new: None)
