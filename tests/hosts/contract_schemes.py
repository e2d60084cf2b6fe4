"""Schemes for ``contract_case.py``, each with something of its own."""

from __future__ import annotations

import threading

import torch
import torch.nn.functional as F

import hijack
from hijack.claim import Certainty, Claim
from hijack.errors import CheckpointError
from hijack.formats.dialect import Dialect

#: What bound forwards have seen: the device of input, weight, its tensors and bias.
CALLS = []


def rows(weight):
    """Int8 data and one scale a row."""
    scale = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
    return (weight / scale).round().clamp(-127, 127).to(torch.int8), scale


class Rows(hijack.Scheme):
    """Int8 with one scale a row; its forward is the default one."""

    name = "contract_rows"

    def quantize(self, weight):
        qdata, scale = rows(weight)
        return qdata, {"row_scale": scale}

    def dequantize(self, qdata, params, dtype):
        return (qdata.float() * params["row_scale"]).to(dtype)


class Doubled(Rows):
    """Reads the tensors of `Rows` as twice what they are."""

    name = "contract_doubled"

    def dequantize(self, qdata, params, dtype):
        return (2 * qdata.float() * params["row_scale"]).to(dtype)


def counting_forward(module, input, weight, bias):
    """The default forward, which keeps where everything was."""
    tensors = [input, weight.qdata, *weight.params.values(), weight, bias]
    CALLS.append({str(t.device) for t in tensors if t is not None})
    return F.linear(input, weight.dense(input.dtype), bias)


class Counting(Rows):
    """The same with a forward that counts its calls."""

    name = "contract_counting"

    def bind_forward(self, module):
        return counting_forward


def activation_forward(module, input, weight, bias):
    """Quantizes each token to int8, and multiplies what that means."""
    scale = input.abs().amax(-1, keepdim=True).clamp_min(1e-12) / 127
    tokens = (input / scale).round() * scale
    return F.linear(tokens, weight.dense(input.dtype), bias)


class Activation(Rows):
    """The same with a forward that is another than that of the decoded weight."""

    name = "contract_activation"

    def bind_forward(self, module):
        return activation_forward


class Ranked(hijack.Scheme):
    """A product of two narrow matrices: an option, and no tensor as large as W."""

    name = "contract_ranked"

    def quantize(self, weight, *, rank: int = 16):
        if weight.is_meta:
            n, k = weight.shape
            return weight.new_empty((n, rank)), {"right": weight.new_empty((rank, k))}
        u, s, v = torch.linalg.svd(weight.float(), full_matrices=False)
        left, right = u[:, :rank] * s[:rank], v[:rank]
        return left.contiguous(), {"right": right.contiguous()}

    def dequantize(self, qdata, params, dtype):
        return (qdata.float() @ params["right"].float()).to(dtype)


class Declining(Rows):
    """Wants no weight that is wider than high."""

    name = "contract_declining"

    def declines(self, shape):
        return "wider than high" if shape[1] > shape[0] else None


class Tables(Rows):
    """Int8 for embeddings alone."""

    name = "contract_tables"
    targets = (torch.nn.Embedding,)


class Nibbles(hijack.Scheme):
    """4 bits, two in a byte of a column; its names have dots in them."""

    name = "contract_nibbles"

    def quantize(self, weight):
        scale = weight.float().abs().amax(1).clamp_min(1e-12) / 7
        qdata = (weight / scale[:, None]).round().clamp(-7, 7).to(torch.uint8) + 8
        packed = qdata[:, 0::2] | qdata[:, 1::2] << 4
        state = torch.tensor([*b"nibbles"], dtype=torch.uint8, device=weight.device)
        return packed.reshape(-1, 1), {
            "weight.absmax": scale,
            "weight.quant_state.nibbles": state,
        }

    def dequantize(self, qdata, params, dtype):
        scale = params["weight.absmax"]
        packed = qdata.reshape(len(scale), -1)
        values = torch.stack((packed & 15, packed >> 4), -1).flatten(1).float() - 8
        return (values * scale[:, None]).to(dtype)


class DottedDialect(Dialect):
    """Spells `DottedRows` as bitsandbytes spells its formats."""

    name = "contract_dotted"
    names = ("weight", "weight.absmax", "weight.quant_state.rows")

    def recognise(self, scheme, header, layer):
        keys = [f"{layer}.{name}" for name in self.names]
        if not all(key in header.tensors for key in keys):
            return None
        roles = dict(zip(("weight", "absmax", "state"), keys, strict=True))
        return Claim(layer, scheme.name, self.name, roles, certainty=Certainty.UNIQUE)

    def decode(self, claim, tensors):
        return tensors["weight"], {"row_scale": tensors["absmax"][:, None]}

    def encode(self, qdata, params, options):
        if qdata.ndim != 2:
            raise CheckpointError("not a matrix")
        state = torch.zeros(4, dtype=torch.uint8, device=qdata.device)
        values = qdata, params["row_scale"].reshape(-1), state
        return dict(zip(self.names, values, strict=True))

    def finish(self, layers, others):
        return hijack.formats.dialect.FileMarks()


class DottedRows(Rows):
    """The same numbers, in files under names with dots."""

    name = "contract_dotted_rows"
    dialects = (DottedDialect(),)


class Slow(Rows):
    """Lets other threads in between, wherever it is asked."""

    name = "contract_slow"

    def bind_forward(self, module):
        return slow_forward


def slow_forward(module, input, weight, bias):
    """The default forward after a while."""
    threading.Event().wait(0.0005)
    return F.linear(input, weight.dense(input.dtype), bias)
