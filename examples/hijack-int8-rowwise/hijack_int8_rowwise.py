"""Int8 weights with one scale per output row, as a plugin of hijack."""

import torch

import hijack


class Int8Rowwise(hijack.Scheme):
    """Symmetric int8, one scale per output row."""

    name = "int8_rowwise"
    targets = (torch.nn.Linear,)

    def quantize(self, weight, **options):
        """Divide each row by its largest magnitude."""
        scale = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        qdata = (weight / scale).round().clamp(-127, 127).to(torch.int8)
        return qdata, {"weight_scale": scale}

    def dequantize(self, qdata, params, dtype):
        """Multiply each row by its scale."""
        return (qdata.float() * params["weight_scale"]).to(dtype)
