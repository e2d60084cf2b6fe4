"""comfy-kitchen's INT8, whose own class quantizes, decodes and multiplies."""

import torch
import torch.nn.functional as F
from comfy_kitchen.tensor import QuantizedTensor, TensorWiseINT8Layout

import hijack

LAYOUT = "TensorWiseINT8Layout"


class KitchenInt8(hijack.Scheme):
    """INT8 with a scale for each row, as comfy-kitchen has it."""

    name = "kitchen_int8"

    def quantize(self, weight):
        """Let the class quantize, and take its tensors out."""
        tensor = QuantizedTensor.from_float(weight.float(), LAYOUT, per_channel=True)
        return tensor._qdata, {"weight_scale": tensor.params.scale}

    def dequantize(self, qdata, params, dtype):
        """Put the tensors back into the class, and let that decode them."""
        return _tensor(qdata, params["weight_scale"], dtype).dequantize()

    def bind_forward(self, module):
        """The class multiplies in integers, with the input quantized by tokens."""
        return linear if isinstance(module, torch.nn.Linear) else None


def linear(module, input, weight, bias):
    """The class's own product, but where it has none: for gradients, for float64."""
    bias = None if bias is None else bias.to(input.dtype)
    if input.requires_grad or input.dtype == torch.float64 or not input.numel():
        return F.linear(input, weight.dense(input.dtype), bias)
    tensor = _tensor(weight.qdata, weight.params["weight_scale"], input.dtype)
    return F.linear(input, tensor, bias)


def _tensor(qdata, scale, dtype):
    params = TensorWiseINT8Layout.Params(scale, dtype, tuple(qdata.shape))
    return QuantizedTensor(qdata, LAYOUT, params)
