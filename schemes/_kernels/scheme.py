"""The base class of schemes whose weight is a code times the scale of its block."""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

import hijack
from hijack.errors import SchemeError
from hijack.formats.comfyui_markers import FULL_PRECISION
from hijack.kernels import PLAIN, Choice, inputs_asked
from hijack.quantized import WeightView
from schemes._kernels.block_scaled import BlockScaled
from schemes._kernels.forward import decode, linear_forward
from schemes._kernels.table import TABLE

#: The option of layers whose inputs are quantized too, of schemes that declare it.
QUANTIZED_INPUTS = "quantized_inputs"


class BlockScaledScheme(hijack.Scheme):
    """A scheme that says what kernels need to know; they do the rest."""

    kernels = TABLE

    @abc.abstractmethod
    def block_scaled(
        self, qdata: Tensor, params: Mapping[str, Tensor]
    ) -> BlockScaled | None:
        """The weight as kernels take it, made of views where that is possible.

        Args:
            qdata: the quantized data.
            params: the scheme's other tensors.

        Returns:
            Rows and columns are those of the weight, or padded; None if the weight is
            more than codes times scales, so that `dequantize` must be replaced.

        Raises:
            ShapeError: if the scale does not cover the weight.
        """

    def dequantize(
        self, qdata: Tensor, params: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        """Multiply each code by its block's scale.

        The product is formed in float32 and rounded once. With scale and result of one
        16-bit dtype this equals the product in that dtype.

        Args:
            qdata: as `quantize` gives it.
            params: as `quantize` gives them.
            dtype: floating dtype of the result.

        Returns:
            The dense weight, of ``dtype``.

        Raises:
            ShapeError: if the scale does not cover the weight.
        """
        weight = self.block_scaled(qdata, params)
        if weight is None:
            raise SchemeError(
                f"{self.name}: block_scaled: got None, expected codes and scales; a "
                "scheme with other weights too overrides dequantize"
            )
        return decode(weight, dtype)

    def quantizes_inputs(self, weight: hijack.QuantizedTensor | WeightView) -> bool:
        """Whether a layer asks for kernels that quantize its input.

        It does if its option says so, or ``HIJACK_QUANTIZED_INPUTS`` does and its
        options do not say otherwise.
        """
        options = weight.options
        if options.get(FULL_PRECISION):
            return False
        asked = inputs_asked(self.name)
        if asked is None:
            return bool(options.get(QUANTIZED_INPUTS))
        declared = any(o.name == QUANTIZED_INPUTS for o in self.declared_options())
        return asked and declared and bool(options.get(QUANTIZED_INPUTS, True))

    def bind_forward(self, module: nn.Module) -> Callable[..., Tensor] | None:
        """The forward that chooses a kernel, for a Linear."""
        return linear_forward if isinstance(module, nn.Linear) else None

    def explain_forward(
        self,
        weight: hijack.QuantizedTensor | WeightView,
        dtype: torch.dtype,
        rows: int,
    ) -> Choice:
        """The kernel that `linear_forward` would take, and why none before it."""
        operand = self.block_scaled(weight.qdata, weight.params)
        if operand is None or operand.shape != tuple(weight.shape):
            return Choice(PLAIN, {"all": "the weight is more than codes and scales"})
        opt_in = self.quantizes_inputs(weight)
        return TABLE.explain(operand, dtype, rows, opt_in=opt_in)
