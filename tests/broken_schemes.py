"""Deliberately broken schemes, for the conformance kit to find.

A few defects cannot be had with a scheme alone; those patch hijack itself.
"""

import contextlib
import itertools
import math
import threading

import safetensors.torch
import torch
import torch.nn.functional as F
from torch import nn

import hijack
from hijack.formats.dialect import native_claim
from hijack.hooks import Wrapped, dense_weight
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


class PadsOddWidths(Good):
    """Pads to an even number of columns and forgets to cut them off."""

    def quantize(self, weight, **options):
        return super().quantize(F.pad(weight, (0, weight.shape[-1] % 2)))


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


# -- modules ---------------------------------------------------------------------------


class Bound(Good):
    """Has a forward of its own."""

    def bind_forward(self, module):
        return type(self).forward

    @staticmethod
    def forward(module, x):
        return F.linear(x, dense_weight(module, x.dtype), module.bias)


class ForgetsBias(Bound):
    """Its forward forgets the bias."""

    @staticmethod
    def forward(module, x):
        return F.linear(x, dense_weight(module, x.dtype))


class CutsGradient(Bound):
    """Its forward cuts the gradient off."""

    @staticmethod
    def forward(module, x):
        with torch.no_grad():
            return Bound.forward(module, x)


class WrongGradient(Bound):
    """Its forward has a gradient of zero."""

    @staticmethod
    def forward(module, x):
        return Bound.forward(module, x).detach() + 0 * x.sum()


class Stale(Bound):
    """Keeps the dense weight from when the module was wrapped."""

    def bind_forward(self, module):
        module.stale = dense_weight(module, torch.float32)
        return Stale.forward

    @staticmethod
    def forward(module, x):
        return F.linear(x, module.stale.to(x.dtype), module.bias)


class BreaksGraph(Bound):
    """Its forward cannot be compiled in one graph."""

    @staticmethod
    def forward(module, x):
        torch._dynamo.graph_break()
        return Bound.forward(module, x)


class WrongCompiled(Bound):
    """Its forward computes something else when compiled."""

    @staticmethod
    def forward(module, x):
        y = Bound.forward(module, x)
        return 2 * y if torch.compiler.is_compiling() else y


class OneOutputDtype(Bound):
    """Its forward always gives float32."""

    @staticmethod
    def forward(module, x):
        return Bound.forward(module, x).float()


class SpareBuffer(Bound):
    """Leaves a buffer of its own in the module."""

    def bind_forward(self, module):
        module.register_buffer("spare", torch.zeros(1))
        return super().bind_forward(module)


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


# -- checkpoints -----------------------------------------------------------------------


class ClaimsAll(Good):
    """Claims every layer there is."""

    def match(self, header):
        for layer in header.layers():
            claim = self.recognise(header, layer)
            yield claim or native_claim(layer, self.name, ())


class ClaimsNone(Good):
    """Does not know its own files."""

    def match(self, header):
        return ()


class Misreads(Good):
    """Reads its own files wrongly."""

    def decode(self, claim, state_dict):
        qdata, params = super().decode(claim, state_dict)
        return -qdata, params


class TargetsForeign(Good):
    """Targets a module it has never heard of."""

    targets = (nn.Linear, Foreign)


class TargetsUnknown(Good):
    """Targets modules the kit has no subject of."""

    targets = (nn.GroupNorm,)


# -- defects of hijack itself ----------------------------------------------------------


def cast_codes(patch):
    """``.to(dtype)`` casts scales."""
    patch.setattr(Wrapped, "_apply", nn.Module._apply)


def share_copies(patch):
    """A copy is the original."""
    patch.setattr(Wrapped, "__deepcopy__", lambda self, memo: self, raising=False)


def accept_nan(patch):
    """Nobody looks for NaN."""
    patch.setattr("hijack.layers._check_finite", lambda weight, where: None)


def mark_modules(patch):
    """``wrap_module`` leaves a mark, whether it wraps or refuses."""
    wrap_module = hijack.wrap_module

    def marking(module, *args, **options):
        module.mark = True
        return wrap_module(module, *args, **options)

    patch.setattr(hijack, "wrap_module", marking)


def unwrap_zeros(patch):
    """``unwrap`` loses the weight."""
    patch.setattr("hijack.wrap.dense_weight", lambda m: torch.zeros(m._hijack.shape))


def load_zeros(patch):
    """safetensors gives zeros back."""
    load = safetensors.torch.load
    patch.setattr(
        "safetensors.torch.load", lambda data: {k: 0 * t for k, t in load(data).items()}
    )


def build_dense(patch):
    """``building`` builds nothing quantized."""
    patch.setattr(hijack, "building", lambda *a, **k: contextlib.nullcontext())
