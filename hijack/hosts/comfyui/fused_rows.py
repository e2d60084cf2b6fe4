"""Quantized weights in files whose tensors ComfyUI renames and joins.

ComfyUI reads diffusers' names by renaming tensors, writing several into one (q, k and
v), and swapping halves of some. All that it does to rows of plain tensors. So it is
given numbers for rows, and where they end up says how to do the same to quantized data.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from hijack.hosts.comfyui.lazy_tensor import LazyTensor
from hijack.hosts.rows import Joiner, Run, length
from hijack.quantized import QuantizedTensor

Convert = Callable[[dict[str, Tensor]], "dict[str, Tensor] | None"]


def make_convert_diffusers_mmdit(original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of ``comfy.model_detection.convert_diffusers_mmdit``."""

    @functools.wraps(original)
    def convert_diffusers_mmdit(
        state_dict: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        if not any(
            isinstance(t, QuantizedTensor | LazyTensor) for t in state_dict.values()
        ):
            return original(state_dict, *args, **kwargs)
        return convert_rows(state_dict, lambda sd: original(sd, *args, **kwargs))

    return convert_diffusers_mmdit


def convert_rows(
    state_dict: dict[str, Tensor], convert: Convert
) -> dict[str, Tensor] | None:
    """Do to quantized tensors what a function does to the rows of plain ones.

    Args:
        state_dict: key to tensor; what ``convert`` removes is removed.
        convert: takes a state dict, removes tensors from it, and gives another one with
            their rows, or None.

    Returns:
        What ``convert`` would give for the decoded tensors. A tensor with the rows of
        quantized ones is quantized too, where their data can be put together.
    """
    numbered: dict[str, Tensor] = {}
    starts, count = [], 0
    for key, tensor in state_dict.items():
        starts.append(count)
        count += length(tensor)
        numbers = torch.arange(starts[-1], count)
        shape = (-1, *[1] * (tensor.ndim - 1))[: tensor.ndim]
        numbered[key] = numbers.reshape(shape) if len(numbers) else tensor
    tensors, keys = list(state_dict.values()), set(numbered)
    converted = convert(numbered)
    if converted is None:
        return None
    for key in keys.difference(numbered):
        del state_dict[key]
    joiner = LazyJoiner()
    return {
        key: joiner.join(_runs(rows.flatten(), starts, tensors), key)
        if rows.numel()
        else rows
        for key, rows in converted.items()
    }


def _runs(numbers: Tensor, starts: list[int], tensors: list[Tensor]) -> list[Run]:
    """The rows that were given these numbers."""
    jumps = (numbers.diff() != 1).nonzero().flatten() + 1
    ends = [*jumps.tolist(), len(numbers)]
    runs: list[Run] = []
    for begin, end in zip([0, *ends], ends, strict=False):
        number, last = int(numbers[begin]), int(numbers[end - 1]) + 1
        while number < last:  # numbers go on from one tensor to the next
            index = bisect.bisect_right(starts, number) - 1
            tensor, row = tensors[index], number - starts[index]
            stop = min(length(tensor), row + last - number)
            runs.append(Run(tensor, row, stop))
            number += stop - row
    return runs


class LazyJoiner(Joiner):
    """Joins tensors that are read when they are needed, too."""

    def join(self, runs: list[Run], name: str = "a tensor") -> Tensor:
        """The tensor that has these rows; lazy if any part is."""
        whole = len(runs) == 1 and runs[0].whole()
        if not whole and any(isinstance(run.tensor, LazyTensor) for run in runs):
            return _lazy(runs)
        return super().join(runs, name)


def _lazy(runs: list[Run]) -> LazyTensor:
    """The rows, read when they are needed; quantized if all parts are to be."""
    first = runs[0].tensor
    ways = [getattr(run.tensor, "quantize", None) for run in runs]

    def read() -> Tensor:
        parts = []
        for run in runs:
            whole = (
                run.tensor.read() if isinstance(run.tensor, LazyTensor) else run.tensor
            )
            parts.append(run.rows(whole))
        return torch.cat(parts)

    shape = (sum(run.stop - run.start for run in runs), *first.shape[1:])
    quantize = None if None in ways else ways[0]
    scheme = getattr(first, "scheme", None)
    return LazyTensor(shape, first.dtype, read, quantize, scheme)
