"""NF4 and FP4 of bitsandbytes: four bits from a table, a scale per run of elements.

A weight is read as one row of n elements and cut into runs of B, of which the last may
be short. With T the sixteen numbers of a table, every run r has the scale and codes ::

    a_r = max_{i in r} |W_i|                               in float32
    c_i = the code whose T_c is nearest to W_i * (1 / a_r) between neighbours, downwards
    W_i ~ T_{c_i} * a_r                                    the product in float32

NF4's table holds quantiles of a normal distribution; FP4's is that of a float with two
bits of exponent and one of mantissa, over its largest. Two codes are one byte, the
first in the upper half. ``double_quant`` stores the scales in eight bits in the same
manner: their mean m is taken off, runs are of 256, and the table D of 256 numbers goes
into the file ::

    a_r ~ D_{d_r} * s + m                                  s the scale of the run of r

The quantized data tell neither the weight's shape nor its table. An empty tensor does:
``nf4_shape`` or ``fp4_shape``, whose shape is the weight's with a 0 at the end, and
whose dtype is the weight's when it was quantized, which bitsandbytes decodes to.

References: Dettmers et al., QLoRA (arXiv 2305.14314), section 3 and appendix E, for NF4
and double quantization; Dettmers et al. (arXiv 2110.02861), for the table D;
bitsandbytes, ``backends/default/ops.py`` and ``functional.py``, for the order of
operations.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hijack
from hijack.errors import DTypeError, NonFiniteError
from hijack.options import Option
from schemes._blocks import matrix_shape
from schemes._kernels.block_scaled import BlockScaled
from schemes._kernels.forward import decode
from schemes._kernels.scheme import BlockScaledScheme
from schemes._kernels.tables import table_on
from schemes._nf4.dialects import DIALECTS
from schemes._nf4.tensors import (
    BLOCK_SIZES,
    DTYPES,
    NESTED,
    TABLES,
    block_size_of,
    check,
    shape_of,
)


class NF4(BlockScaledScheme):
    """Codes of four bits with a table, and one multiplying scale per run."""

    name = "nf4"
    targets = (nn.Linear, nn.Embedding)
    dialects = DIALECTS
    options = (
        Option("quant_type", "str", "nf4", "the table", choices=tuple(TABLES)),
        Option(
            "blocksize",
            "int",
            64,
            "elements that share a scale",
            choices=tuple(sorted(BLOCK_SIZES)),
        ),
        Option("double_quant", "bool", False, "store the scales in eight bits"),
        Option(
            "dtype",
            "dtype",
            help="that bitsandbytes decodes to; the weight's own",
            choices=DTYPES,
        ),
    )

    def quantize(  # type: ignore[override]
        self,
        weight: Tensor,
        *,
        quant_type: str = "nf4",
        blocksize: int = 64,
        double_quant: bool = False,
        dtype: torch.dtype | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Scale each run of a weight to the table, and take the nearest code.

        Args:
            weight: (N, ...) floating point; meta tensors give meta tensors.
            quant_type: ``"nf4"`` or ``"fp4"``.
            blocksize: elements that share a scale, a power of two from 32 to 4096.
            double_quant: whether the scales are stored in eight bits.
            dtype: of the weight as bitsandbytes decodes it; None is the weight's own,
                or float32 for float64.

        Returns:
            Codes (ceil(n/2), 1) uint8; ``absmax`` (ceil(n/B),), float32, or uint8 with
            ``nested_absmax``, ``nested_quant_map`` (256,) and ``nested_offset`` ();
            ``nf4_shape`` or ``fp4_shape`` (N, ..., 0).

        Raises:
            SchemeError: if an option is wrong.
            DTypeError: if the weight is not floating point.
        """
        chosen = {"quant_type": quant_type, "blocksize": blocksize, "dtype": dtype}
        self.check_options({**chosen, "double_quant": double_quant})
        if not weight.is_floating_point() or weight.element_size() == 1:
            raise DTypeError(
                f"weight is {weight.dtype}, expected a dense floating dtype; "
                "dequantize it first"
            )
        if dtype is None:
            dtype = weight.dtype if weight.dtype in DTYPES else torch.float32
        table = table_on(TABLES[quant_type], weight.device)
        levels, order = table.sort(stable=True)
        scaled, absmax = _scaled(weight.detach().reshape(-1).float(), blocksize)
        codes = order.to(torch.uint8)[torch.bucketize(scaled, _middles(levels))]
        codes = F.pad(codes, (0, len(codes) % 2), value=int(quant_type == "nf4") * 7)
        shape = weight.new_empty((*weight.shape, 0), dtype=dtype)
        params = {"absmax": absmax, f"{quant_type}_shape": shape}
        if double_quant:
            params |= _nest(absmax)
        return (codes[::2] * 16 + codes[1::2]).unsqueeze(1), params

    def dequantize(
        self, qdata: Tensor, params: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        """Look each code up in the table and multiply by its run's scale.

        Args:
            qdata: (ceil(n/2), 1) uint8.
            params: as `quantize` gives them.
            dtype: floating dtype of the result; the product is rounded once.

        Returns:
            The weight, (N, ...) of ``dtype``.

        Raises:
            CheckpointError: if a tensor is missing.
            ShapeError: if the scales do not cover the weight.
        """
        shape = self.dense_shape(qdata, params)
        dense = decode(self.block_scaled(qdata, params), dtype)
        return dense.flatten()[: math.prod(shape)].view(shape)

    def block_scaled(self, qdata: Tensor, params: Mapping[str, Tensor]) -> BlockScaled:
        """The codes as rows of the weight, where runs of elements allow it.

        Else they are one row, whose last code may be of no element.

        Args:
            qdata: (ceil(n/2), 1) uint8.
            params: as for `dequantize`.
        """
        quant_type, shape = shape_of(params)
        n, k = matrix_shape(shape)
        size, absmax = block_size_of(params), params["absmax"]
        if "nested_absmax" in params:
            scales, runs = params["nested_quant_map"], params["nested_absmax"]
            absmax = _multiply(scales[absmax.int()], runs, NESTED)
            absmax = absmax + params["nested_offset"]
        table = table_on(TABLES[quant_type], qdata.device)
        if k and k % size == 0:
            codes, scale, block = qdata.view(n, -1), absmax.view(n, -1), (1, size)
        elif k and k % 2 == 0 and size % k == 0:
            codes, scale, block = qdata.view(n, -1), absmax[:, None], (size // k, k)
        else:
            codes, scale, block = qdata.view(1, -1), absmax[None], (1, size)
        return BlockScaled(codes, scale, block, table, high_first=True)

    def dense_shape(
        self, qdata: Tensor, params: Mapping[str, Tensor]
    ) -> tuple[int, ...]:
        """What the empty tensor says."""
        return shape_of(params)[1]

    def declines(self, shape: tuple[int, ...], **options: Any) -> str | None:
        """Weights without elements, which have no scales to take the mean of."""
        return None if math.prod(shape) else "it has no elements"

    def options_of(self, qdata: Tensor, params: Mapping[str, Tensor]) -> dict[str, Any]:
        """All options, from names, shapes and dtypes."""
        quant_type, _ = shape_of(params)
        return {
            "quant_type": quant_type,
            "blocksize": block_size_of(params),
            "double_quant": "nested_absmax" in params,
            "dtype": params[f"{quant_type}_shape"].dtype,
        }

    def options_like(self, dtype: torch.dtype) -> dict[str, Any]:
        """The dtype that bitsandbytes decodes to."""
        return {"dtype": dtype if dtype in DTYPES else torch.float32}

    def validate(self, qdata: Tensor, params: Mapping[str, Tensor], where: str) -> None:
        """Refuse tensors that do not cover the weight, and scales that cannot be."""
        check(qdata, params, where)
        for name, tensor in params.items():
            plain = tensor.dtype == torch.float32 and not tensor.is_meta
            if plain and not tensor.isfinite().all():
                raise NonFiniteError(
                    f"{where}: {name} holds NaN or inf, expected finite numbers; the "
                    "file is damaged, get it again"
                )


# -- numerics --------------------------------------------------------------------------


def _middles(levels: Tensor) -> Tensor:
    """The bounds between neighbouring levels; a number on one takes the lower."""
    return (levels[:-1] + levels[1:]) / 2


def _scaled(flat: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Numbers over the largest of their run, and these: (n,) and (ceil(n/size),)."""
    whole = len(flat) // size * size
    runs = flat[:whole].view(-1, size)
    absmax = runs.abs().amax(1)
    scaled = (runs * (1 / absmax.clamp_min(1e-38)).unsqueeze(1)).clamp(-1, 1).flatten()
    if whole == len(flat):
        return scaled, absmax
    last = flat[whole:].abs().amax().clamp_min(1e-38)
    rest = (flat[whole:] / last).clamp(-1, 1)
    return torch.cat([scaled, rest]), torch.cat([absmax, last.view(1)])


def _multiply(numbers: Tensor, scales: Tensor, size: int) -> Tensor:
    """(n,) times (ceil(n/size),), each scale over its run."""
    whole = len(numbers) // size * size
    runs = (numbers[:whole].view(-1, size) * scales[: whole // size, None]).flatten()
    if whole == len(numbers):
        return runs
    return torch.cat([runs, numbers[whole:] * scales[-1]])


def _nest(absmax: Tensor) -> dict[str, Tensor]:
    """The scales in eight bits, and what decodes them."""
    offset = absmax.mean()
    table = _dynamic_table(absmax.device)
    scaled, nested = _scaled(absmax - offset, NESTED)
    return {
        "absmax": torch.bucketize(scaled, _middles(table)).to(torch.uint8),
        "nested_absmax": nested,
        "nested_quant_map": table,
        "nested_offset": offset,
    }


def _dynamic_table(device: torch.device) -> Tensor:
    """(256,) float32: signed numbers of seven magnitudes, the larger the finer.

    Computed on the CPU: devices round differently, and the table is stored.
    """
    single: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    numbers = [torch.tensor([0.0, 1.0], **single)]
    for power in range(7):
        bounds = torch.linspace(0.1, 1, 2**power + 1, **single)
        means = 10 ** (power - 6) * _middles(bounds)
        numbers += [means, -means]
    return torch.cat(numbers).sort().values.to(device)


#: The scheme; it keeps nothing, so that one serves everybody.
SCHEME = NF4()


@hijack.hookimpl
def hijack_register_schemes(registry: hijack.Registry) -> None:
    """Register the scheme with any registry that loads this plugin."""
    registry.register(SCHEME)


hijack.default_registry().register(SCHEME)
