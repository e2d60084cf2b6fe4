"""W4A8 and W6A8 of ComfyUI: rotated weights in 4 or 6 bits, on a grid of 8 bits.

A weight W of shape (N, K) is rotated in groups of R columns, which spreads outliers:
see `schemes._rotation`. The rotated row n, in groups of S columns, is ::

    i = clamp(round(T_c * r_ng), -127, 127)                a whole number of 8 bits
    W' ~ i * s_n                                           then rotated back

with a code c and a relative scale r in E4M3 for each group g, a scale s in float32 for
each row, and a table T: the sixteen numbers of ``weight_codebook`` that fit a normal
distribution scaled to its largest, or, without it, c - 8; of 6 bits always c - 32.
Older files shift groups by a ``weight_correction`` before they are rotated back.

`quantize` starts from the largest number of each group, improves the group's scale
twice by least squares, and takes the code whose number on the grid is nearest. Of 6
bits it tries the next E4M3 numbers too, and keeps the one with the least error.

A row holds two codes to a byte, the first in the lower half; of 6 bits these are the
lower four, and the upper two follow, four to a byte, the first lowest. What all these
do not tell is in empty tensors: ``weight_group_size`` (S, 0), ``weight_rotation``
(R, 0).

Reference: comfy-kitchen 0.2.40, ``backends/eager/w4a8_int8.py`` and
``tensor/w4a8_packed.py``, for the format, the table and the order of operations.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

import hijack
from hijack.errors import CheckpointError, DTypeError, NonFiniteError, ShapeError
from hijack.formats.comfyui_markers import FULL_PRECISION
from hijack.options import Option
from schemes._rotation import (
    ROTATIONS,
    is_rotation_size,
    rotate,
    rotation_marker,
    rotation_of,
    uniform,
)
from schemes._w4a8_dialects import (
    DIALECTS,
    code_bits,
    is_group_size,
    size_marker,
)

#: Levels of least squared error for a normal distribution over its largest of 16.
CODEBOOK = (
    *(-0.980602, -0.794529, -0.638165, -0.500986),
    *(-0.377321, -0.263187, -0.155210, -0.050720),
    *(0.052541, 0.156985, 0.265284, 0.379533),
    *(0.502636, 0.638953, 0.794876, 0.980671),
)
#: The largest code of 6 bits that is written, counted from the middle.
MOST = 31
#: Elements quantized at once, which bounds the memory needed.
CHUNK = 1 << 22


class W4A8(hijack.Scheme):
    """Packed codes of rotated weights, with scales of groups and rows."""

    name = "w4a8"
    dialects = DIALECTS
    options = (
        Option("bits", "int", 4, "of a code", choices=(4, 6)),
        Option("group_size", "int", 16, "columns that share a scale", minimum=4),
        Option(
            "rotation", "int", 256, "columns rotated together", choices=ROTATIONS[1:]
        ),
        Option("stochastic", "bool", False, "round up or down at random"),
        Option("seed", "int", 0, "of the random numbers"),
        Option(
            FULL_PRECISION,
            "bool",
            False,
            "never multiply the layer in 8 bits, where a program could",
            forward=True,
        ),
    )

    def quantize(  # type: ignore[override]
        self,
        weight: Tensor,
        *,
        bits: int = 4,
        group_size: int = 16,
        rotation: int = 256,
        stochastic: bool = False,
        seed: int = 0,
        full_precision_matrix_mult: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Rotate a weight, and fit scales and codes to each group.

        Args:
            weight: (N, K) floating point; meta tensors give meta tensors.
            bits: of a code, 4 or 6.
            group_size: columns that share a scale; 4, 8 or a multiple of 16.
            rotation: columns rotated together, a power of 4.
            stochastic: round up or down at random, without bias, so that changes of
                less than a step are not lost.
            seed: of the random numbers; the same seed gives the same codes.
            full_precision_matrix_mult: of the layer that the weight is for; the weight
                is the same.

        Returns:
            Codes (N, K * bits / 8) int8; ``weight_s_rel`` (N, K/S) float8_e4m3fn,
            ``weight_s_channel`` (N,) float32, of 4 bits ``weight_codebook`` (16,)
            float32, ``weight_group_size`` (S, 0) and ``weight_rotation`` (R, 0).

        Raises:
            ShapeError: if the groups do not divide the weight.
            DTypeError: if the weight is not floating point.
        """
        chosen = {"bits": bits, "group_size": group_size, "rotation": rotation}
        self.check_options({**chosen, "stochastic": stochastic, "seed": seed})
        if not weight.is_floating_point() or weight.element_size() == 1:
            raise DTypeError(
                f"weight is {weight.dtype}, expected a dense floating dtype; "
                "dequantize it first"
            )
        if reason := self.declines(tuple(weight.shape), **chosen):
            raise ShapeError(f"weight: {reason}; leave the layer dense")
        table = _levels(bits, weight.device)
        many = max(1, CHUNK // weight.shape[1])
        starts = range(0, weight.shape[0], many)
        randoms: list[torch.Generator | None] = [None] * len(starts)
        if stochastic and not weight.is_meta:
            # each chunk has a seed of its own, as in comfy-kitchen
            generator = torch.Generator
            randoms = [
                generator(weight.device).manual_seed(seed + start) for start in starts
            ]
        made = []
        for start, random in zip(starts, randoms, strict=True):
            rows = rotate(weight.detach()[start : start + many], rotation).float()
            made.append(_quantize(rows, table, bits, group_size, random))
        codes, relative, channel = (
            torch.cat(parts) for parts in zip(*made, strict=True)
        )
        params = {
            "weight_s_rel": relative,
            "weight_s_channel": channel,
            **size_marker(group_size, weight.device),
            **rotation_marker(rotation, weight.device),
        }
        return codes, params | ({"weight_codebook": table} if bits == 4 else {})

    def dequantize(
        self, qdata: Tensor, params: Mapping[str, Tensor], dtype: torch.dtype
    ) -> Tensor:
        """Decode to the grid, multiply by each row's scale and rotate back.

        As in comfy-kitchen, the weight is rotated in ``dtype``.

        Args:
            qdata: (N, K * bits / 8) int8.
            params: as `quantize` gives them; ``weight_correction`` is (K/S, N).
            dtype: floating dtype of the result.

        Returns:
            (N, K) of ``dtype``.
        """
        relative = params["weight_s_rel"].float().unsqueeze(2)  # (N, K/S, 1)
        group_size = params["weight_group_size"].shape[0]
        columns = relative.shape[1] * group_size
        bits = code_bits(qdata.shape[1], columns)
        codes = _unpack(qdata, columns, bits)
        if "weight_codebook" in params:
            numbers = params["weight_codebook"][codes]
        else:
            numbers = codes.float() - 2 ** (bits - 1)
        numbers = numbers.view(*relative.shape[:2], group_size) * relative
        dense = numbers.round().clamp(-127, 127)
        dense = dense * params["weight_s_channel"].float().view(-1, 1, 1)
        if "weight_correction" in params:
            dense = dense + params["weight_correction"].t().unsqueeze(2).float()
        return rotate(dense.flatten(1).to(dtype), rotation_of(params))

    def dense_shape(
        self, qdata: Tensor, params: Mapping[str, Tensor]
    ) -> tuple[int, ...]:
        """As many columns as the groups have."""
        size = params["weight_group_size"].shape[0]
        return (qdata.shape[0], params["weight_s_rel"].shape[1] * size)

    def declines(self, shape: tuple[int, ...], **options: Any) -> str | None:
        """Weights whose columns are not whole groups, or packed rows whole words."""
        size, rotation = options.get("group_size", 16), options.get("rotation", 256)
        columns = shape[1] if len(shape) == 2 else 0
        bits = options.get("bits", 4)
        least = 32 if bits == 6 else 16  # columns of whole words
        if len(shape) != 2 or not shape[0] or not columns:
            return "it is no matrix with elements"
        if not is_rotation_size(rotation) or columns % rotation:
            return f"its {columns} columns are no whole groups of {rotation} to rotate"
        if not is_group_size(size, bits) or columns % size or columns % least:
            return f"{columns} columns are not cut into groups of {size}"
        return None

    def options_of(self, qdata: Tensor, params: Mapping[str, Tensor]) -> dict[str, Any]:
        """All options, from shapes."""
        _, columns = self.dense_shape(qdata, params)
        return {
            "bits": code_bits(qdata.shape[1], columns),
            "group_size": params["weight_group_size"].shape[0],
            "rotation": rotation_of(params),
        }

    def requantize(
        self, weight: Tensor, old: hijack.QuantizedTensor, *, seed: int = 0
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Quantize again with the options the layer has; a seed rounds at random."""
        told = self.options_of(old.qdata, old.params)
        random = {"stochastic": bool(seed), "seed": seed}
        return self.quantize(weight, **{**old.options, **told, **random})

    def block_size(
        self, qdata: Tensor, params: Mapping[str, Tensor]
    ) -> tuple[int, int]:
        """A group of a row, after the rotation."""
        return (1, params["weight_group_size"].shape[0])

    def validate(self, qdata: Tensor, params: Mapping[str, Tensor], where: str) -> None:
        """Refuse tensors that do not fit each other, and numbers that cannot be."""
        markers = ("weight_group_size", "weight_rotation")
        for name in ("weight_s_rel", "weight_s_channel", *markers):
            if name not in params:
                raise CheckpointError(f"{where}: {name} is missing beside the weight")
            tensor, empty = params[name], name in markers
            if empty and (tensor.ndim != 2 or tensor.shape[1]):
                raise ShapeError(
                    f"{where}: {name} has the shape {tuple(tensor.shape)}, expected "
                    "(columns, 0); get the file again"
                )
        if qdata.ndim != 2 or params["weight_s_rel"].ndim != 2:
            raise ShapeError(
                f"{where}: weight is {tuple(qdata.shape)}, expected rows of codes, and "
                "rows of scales in weight_s_rel; get the file again"
            )
        n, columns = self.dense_shape(qdata, params)
        told = self.options_of(qdata, params)
        reason = self.declines((n, columns), **told)
        bits, group_size = told["bits"], told["group_size"]
        if not bits or reason or (bits == 6 and len(params) > 4):
            raise ShapeError(
                f"{where}: {qdata.shape[1]} bytes in a row and {columns} columns in "
                f"groups of {group_size}, expected 4 or 6 bits for each"
                f"{f': {reason}' if reason else ''}; get the file again"
            )
        floats = (torch.float32, torch.float16, torch.bfloat16)
        expected = {
            "weight": (qdata, (torch.int8,), qdata.shape),
            "weight_s_rel": (
                *(params["weight_s_rel"], (torch.float8_e4m3fn, torch.float32)),
                (n, columns // group_size),
            ),
            "weight_s_channel": (params["weight_s_channel"], floats, (n,)),
            "weight_codebook": (params.get("weight_codebook"), floats[:1], (16,)),
            "weight_correction": (
                *(params.get("weight_correction"), floats),
                (columns // group_size, n),
            ),
        }
        for name, (given, dtypes, shape) in expected.items():
            if given is not None:
                _check(given, dtypes, tuple(shape), f"{where}: {name}")
        relative = params["weight_s_rel"]
        if bits == 6 or "weight_codebook" in params or relative.is_meta:
            return
        # a group reaches 7 or 8 steps without a table, which are 127 or less together
        if relative.float().max() > 127 / 4:
            raise CheckpointError(
                f"{where}: weight_codebook is missing, expected it beside scales as "
                "large as weight_s_rel's; get the file again"
            )


# -- numerics --------------------------------------------------------------------------


def _levels(bits: int, device: torch.device) -> Tensor:
    """The numbers of the codes that `quantize` gives, ascending."""
    if bits == 4:
        return torch.tensor(CODEBOOK, dtype=torch.float32, device="cpu").to(device)
    return torch.arange(-MOST, MOST + 1, dtype=torch.float32, device=device)


def _quantize(
    rotated: Tensor,
    table: Tensor,
    bits: int,
    size: int,
    random: torch.Generator | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Codes, relative scales and scales of some rows of a rotated weight."""
    groups = rotated.view(len(rotated), -1, size)  # (N, K/S, S)
    nearest: Callable[[Tensor], Tensor] = functools.partial(_nearest_of, table)
    scale = groups.abs().amax(2, keepdim=True)
    if bits == 6:
        nearest, scale = _nearest_whole, scale / MOST
    scale = scale.clamp_min(1e-8)
    levels = table[nearest(groups / scale)]
    for _ in range(2):  # more gain nothing
        fitted = (groups * levels).sum(2, keepdim=True)
        squares = (levels * levels).sum(2, keepdim=True).clamp_min(1e-8)
        scale = (fitted / squares).clamp_min(1e-8)
        levels = table[nearest(groups / scale)]
    channel = ((levels * scale).abs().amax((1, 2)) / 127).clamp_min(1e-8)
    relative = (scale.squeeze(2) / channel.unsqueeze(1)).to(torch.float8_e4m3fn)
    target = groups / channel.view(-1, 1, 1)
    error, codes = _on_grid(target, table, relative)
    steps = (-1, 1) if bits == 6 else ()
    stored, best = relative.view(torch.uint8).int(), relative.float()
    for step in steps:  # the next numbers of E4M3; 0x7F is none
        other = (stored + step).clamp(1, 0x7E).to(torch.uint8).view(relative.dtype)
        tried, found = _on_grid(target, table, other)
        better = tried < error
        error = torch.where(better, tried, error)
        codes = torch.where(better.unsqueeze(2), found, codes)
        best = torch.where(better, other.float(), best)
    if random is not None:
        codes = _at_random(target, _grid(table, best), random)
    codes = codes.view(len(rotated), -1) + (bits == 6)  # of 6 bits 0 is not used
    return _pack(codes, bits), best.to(relative.dtype), channel


def _nearest_of(table: Tensor, numbers: Tensor) -> Tensor:
    """Codes of the nearest levels; of two as near, the lower."""
    return _nearer(table, torch.searchsorted(table, numbers), numbers)


def _nearest_whole(numbers: Tensor) -> Tensor:
    """Codes of the nearest whole numbers; of two as near, the even one."""
    return (numbers.round().clamp(-MOST, MOST) + MOST).long()


def _nearer(levels: Tensor, place: Tensor, numbers: Tensor) -> Tensor:
    """Of the levels on both sides of a place, the nearer one."""
    last = levels.shape[-1] - 1
    low, high = (place - 1).clamp(0, last), place.clamp(0, last)
    below, above = ((numbers - _at(levels, index)).abs() for index in (low, high))
    return torch.where(above < below, high, low)


def _at(levels: Tensor, index: Tensor) -> Tensor:
    """Levels of all numbers, or of each row of numbers."""
    return levels[index] if levels.ndim == 1 else levels.gather(-1, index)


def _on_grid(target: Tensor, table: Tensor, relative: Tensor) -> tuple[Tensor, Tensor]:
    """Squared error of each group, and the codes nearest on the grid."""
    grid = _grid(table, relative)
    codes = _nearer(grid, torch.searchsorted(grid, target), target)
    return (grid.gather(2, codes) - target).pow(2).sum(2), codes


def _at_random(target: Tensor, grid: Tensor, random: torch.Generator) -> Tensor:
    """Codes of the levels around each number, the nearer one more often."""
    last = grid.shape[2] - 1
    low = (torch.searchsorted(grid, target) - 1).clamp(0, last - 1)
    below = grid.gather(2, low)
    bound = uniform(target, random) * (grid.gather(2, low + 1) - below) + below
    return low + (target > bound)


def _grid(table: Tensor, relative: Tensor) -> Tensor:
    """The whole numbers that the codes of each group decode to."""
    return (table * relative.float().unsqueeze(2)).round().clamp(-127, 127)


# -- packing ---------------------------------------------------------------------------


def _pack(codes: Tensor, bits: int) -> Tensor:
    """(N, K) to (N, K * bits / 8) int8."""
    codes = codes.to(torch.uint8)
    packed = (codes[:, ::2] & 15) | (codes[:, 1::2] & 15) << 4
    if bits == 6:
        upper = [(codes[:, i::4] >> 4) << 2 * i for i in range(4)]
        packed = torch.cat([packed, upper[0] | upper[1] | upper[2] | upper[3]], 1)
    return packed.view(torch.int8)


def _unpack(qdata: Tensor, columns: int, bits: int) -> Tensor:
    """(N, K * bits / 8) int8 to (N, K) int32."""
    packed = qdata.view(torch.uint8)
    lower = packed[:, : columns // 2]
    codes = torch.stack([lower & 15, lower >> 4], 2).flatten(1)
    if bits == 6:
        upper = packed[:, columns // 2 :]
        parts = [(upper >> 2 * i & 3) << 4 for i in range(4)]
        codes = codes | torch.stack(parts, 2).flatten(1)
    return codes.int()


def _check(
    tensor: Tensor, dtypes: tuple[torch.dtype, ...], shape: tuple[int, ...], where: str
) -> None:
    """Refuse a tensor of another dtype or shape, or with NaN or inf."""
    if tensor.dtype not in dtypes:
        raise DTypeError(f"{where} is {tensor.dtype}, expected {dtypes[0]}")
    if tuple(tensor.shape) != shape:
        raise ShapeError(
            f"{where} has the shape {tuple(tensor.shape)}, expected {shape}; get the "
            "file again"
        )
    plain = tensor.is_floating_point() and not tensor.is_meta
    if plain and not tensor.float().isfinite().all():
        raise NonFiniteError(
            f"{where} holds NaN or inf, expected finite numbers; the file is damaged, "
            "get it again"
        )


#: The scheme; it keeps nothing, so that one serves everybody.
SCHEME = W4A8()


@hijack.hookimpl
def hijack_register_schemes(registry: hijack.Registry) -> None:
    """Register the scheme with any registry that loads this plugin."""
    registry.register(SCHEME)


hijack.default_registry().register(SCHEME)
