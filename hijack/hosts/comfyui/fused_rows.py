"""Quantized weights in files whose tensors ComfyUI renames and joins.

ComfyUI reads diffusers' names by renaming tensors, writing several into one (q, k and
v), and swapping halves of some. All that it does to rows of plain tensors. So it is
given numbers for rows, and where they end up says how to do the same to quantized data.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hijack.errors import HijackError
from hijack.formats.dialect import Dialect
from hijack.hosts.comfyui.file_tensors import file_tensors
from hijack.hosts.comfyui.lazy_tensor import LazyTensor
from hijack.quantized import QuantizedTensor
from hijack.text import logger

log = logger(__name__)

Convert = Callable[[dict[str, Tensor]], "dict[str, Tensor] | None"]


class Run(NamedTuple):
    """Rows of a tensor that follow one another."""

    tensor: Tensor
    start: int
    stop: int

    def whole(self) -> bool:
        """Whether these are all rows there are; a scalar counts as one."""
        return (self.start, self.stop) == (0, _length(self.tensor))

    def rows(self, tensor: Tensor) -> Tensor:
        """The part for these rows, of a tensor with a row for every one or several.

        Raises:
            ValueError: if it has no such part.
        """
        length, count = _length(self.tensor), _length(tensor)
        each = length // count if count else 0
        if not tensor.ndim or not each or length % count:
            raise ValueError("has other rows")
        if self.start % each or self.stop % each:
            raise ValueError("does not begin and end with a row")
        return tensor[self.start // each : self.stop // each]


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
        count += _length(tensor)
        numbers = torch.arange(starts[-1], count)
        shape = (-1, *[1] * (tensor.ndim - 1))[: tensor.ndim]
        numbered[key] = numbers.reshape(shape) if len(numbers) else tensor
    tensors, keys = list(state_dict.values()), set(numbered)
    converted = convert(numbered)
    if converted is None:
        return None
    for key in keys.difference(numbered):
        del state_dict[key]
    joiner = Joiner()
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
            stop = min(_length(tensor), row + last - number)
            runs.append(Run(tensor, row, stop))
            number += stop - row
    return runs


class Joiner:
    """Makes tensors of rows of others."""

    def __init__(self) -> None:
        #: Whether data like this can be joined; its values do not matter.
        self._joinable: dict[Any, bool] = {}

    def join(self, runs: list[Run], name: str) -> Tensor:
        """The tensor that has these rows, one after another.

        Args:
            runs: of one tensor, or of several of the same width.
            name: of the result, for the log.

        Returns:
            The tensor itself if it is all of one; else quantized if all are and their
            data can be joined, or lazy if any is; else dense, float32 if any was
            quantized.
        """
        if len(runs) == 1 and runs[0].whole():
            return runs[0].tensor
        if any(isinstance(run.tensor, LazyTensor) for run in runs):
            return _lazy(runs)
        if not any(isinstance(run.tensor, QuantizedTensor) for run in runs):
            return torch.cat([run.rows(run.tensor) for run in runs])
        joined = self._coded(runs)
        if joined is None:
            log.info(
                "hijack: %s is decoded: its parts cannot be joined quantized", name
            )
            return _dense(runs)
        return joined

    def _coded(self, runs: list[Run]) -> QuantizedTensor | None:
        """The rows quantized, if joining what a scheme keeps joins what it stands for.

        What a scheme does with its tensors their shapes do not tell, so it is tried.
        """
        kinds = [_kind(run.tensor) for run in runs]
        if None in kinds or len({kind[0] for kind in kinds if kind}) > 1:
            return None
        known = tuple(
            (kind, run.start, run.stop) for kind, run in zip(kinds, runs, strict=True)
        )
        if not self._joinable.get(known, True):
            return None
        joined = _join_codes(runs)
        if known not in self._joinable:
            self._joinable[known] = joined is not None and _is_right(joined, runs)
        return joined if self._joinable[known] else None


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


def _join_codes(runs: list[Run]) -> QuantizedTensor | None:
    first: Any = runs[0].tensor
    parts: list[Any] = [run.tensor for run in runs]
    count = sum(run.stop - run.start for run in runs)

    def cat(tensors: list[Tensor]) -> Tensor:
        return torch.cat([r.rows(t) for r, t in zip(runs, tensors, strict=True)])

    try:
        qdata = cat([part.qdata for part in parts])
        params = {
            name: cat([part.params[name] for part in parts]) for name in first.params
        }
    except (ValueError, RuntimeError):
        return None
    for dialect in (first.config.dialect, Dialect.name):
        try:  # one may be unable to spell it
            config = dataclasses.replace(first.config, dialect=dialect)
            shape = (count, *first.shape[1:])
            joined = QuantizedTensor(qdata, params, config, shape, first.dtype)
            file_tensors(joined.map(lambda tensor: tensor.to("meta")))
        except (HijackError, ValueError, RuntimeError):
            continue
        return joined
    return None


def _is_right(joined: QuantizedTensor, runs: list[Run]) -> bool:
    try:
        return torch.equal(joined.dense(torch.float32), _dense(runs))
    except Exception:  # a scheme that cannot decode it says so in its own way
        return False


def _kind(tensor: Tensor) -> Any | None:
    """What tensors must have in common to be joined, and all their shapes."""
    if not isinstance(tensor, QuantizedTensor) or tensor.additions:
        return None
    inner = tensor.plain_tensors()
    names = tuple((name, t.dtype, tuple(t.shape[1:])) for name, t in inner.items())
    lengths = tuple(_length(t) for t in inner.values())
    return (tensor.config, tuple(tensor.shape[1:]), names), lengths, tensor.shape[0]


def _dense(runs: list[Run]) -> Tensor:
    decoded = {id(run.tensor): _float32(run.tensor) for run in runs}
    return torch.cat([run.rows(decoded[id(run.tensor)]) for run in runs])


def _float32(tensor: Tensor) -> Tensor:
    if isinstance(tensor, QuantizedTensor):
        return tensor.value(torch.float32)
    return tensor.to(torch.float32)


def _length(tensor: Tensor) -> int:
    return tensor.shape[0] if tensor.ndim else 1
