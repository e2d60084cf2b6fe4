"""Rows of quantized weights: cut out, and put together in another order.

Hosts split, join and swap the rows of weights when they rename a file's tensors to
those of their model. Quantized data are put together the same way where that is the
same weight; else the rows are decoded, which is right too, and larger.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hijack.errors import HijackError
from hijack.formats import matching
from hijack.quantized import QuantizedTensor
from hijack.text import logger

log = logger(__name__)


class Run(NamedTuple):
    """Rows of a tensor that follow one another."""

    tensor: Tensor
    start: int
    stop: int

    def whole(self) -> bool:
        """Whether these are all rows there are; a scalar counts as one."""
        return (self.start, self.stop) == (0, length(self.tensor))

    def rows(self, tensor: Tensor) -> Tensor:
        """The part for these rows, of a tensor with rows for each, or one for several.

        Raises:
            ValueError: if it has no such part.
        """
        total, count = length(self.tensor), length(tensor)
        if tensor.ndim and total and count and not count % total:
            several = count // total
            return tensor[self.start * several : self.stop * several]
        each = total // count if count else 0
        if not tensor.ndim or not each or total % count:
            raise ValueError("has other rows")
        if self.start % each or self.stop % each:
            raise ValueError("does not begin and end with a row")
        return tensor[self.start // each : self.stop // each]


class Joiner:
    """Makes tensors of rows of others."""

    def __init__(self) -> None:
        #: How data like this can be joined, or None; its values do not matter.
        self._ways: dict[Any, _Way | None] = {}

    def join(self, runs: list[Run], name: str = "a tensor") -> Tensor:
        """The tensor that has these rows, one after another.

        Args:
            runs: of one tensor, or of several of the same width.
            name: of the result, for the log.

        Returns:
            The tensor itself if it is all of one; else quantized if all are and their
            data can be joined; else dense, float32 if any was quantized.
        """
        if len(runs) == 1 and runs[0].whole():
            return runs[0].tensor
        if not any(isinstance(run.tensor, QuantizedTensor) for run in runs):
            return torch.cat([run.rows(run.tensor) for run in runs])
        joined = self.quantized(runs)
        if joined is None:
            log.info(
                "hijack: %s is decoded: its parts cannot be joined quantized", name
            )
            return dense(runs)
        return joined

    def quantized(self, runs: list[Run]) -> QuantizedTensor | None:
        """The rows quantized, if joining what a scheme keeps joins what it stands for.

        What a scheme does with its tensors their shapes do not tell, so it is tried.
        """
        kinds = [_kind(run.tensor) for run in runs]
        if None in kinds or len({kind[0] for kind in kinds if kind}) > 1:
            return None
        known = tuple(
            (kind, run.start, run.stop) for kind, run in zip(kinds, runs, strict=True)
        )
        if known in self._ways:
            way = self._ways[known]
            return None if way is None else _join_data(runs, way)
        for way in (_if_possible, _row_each):
            joined = _join_data(runs, way)
            if joined is not None and _is_right(joined, runs):
                self._ways[known] = way
                return joined
        if all(run.tensor is runs[0].tensor for run in runs):
            self._ways[known] = None  # of others, other values may be alike
        return None


def length(tensor: Tensor) -> int:
    """How many rows a tensor has; a scalar has one."""
    return tensor.shape[0] if tensor.ndim else 1


def dense(runs: list[Run]) -> Tensor:
    """The rows decoded, in float32."""
    decoded = {id(run.tensor): _float32(run.tensor) for run in runs}
    return torch.cat([run.rows(decoded[id(run.tensor)]) for run in runs])


# -- details ---------------------------------------------------------------------------


#: Whether a tensor of a scheme is cut with a weight's rows; else all rows share it.
_Way = Callable[[Run, Tensor], bool]


def _if_possible(run: Run, tensor: Tensor) -> bool:
    try:
        run.rows(tensor)
    except ValueError:
        return False
    return True


def _row_each(run: Run, tensor: Tensor) -> bool:
    return tensor.ndim > 0 and tensor.shape[0] == length(run.tensor)


def _join_data(runs: list[Run], way: _Way) -> QuantizedTensor | None:
    first: Any = runs[0].tensor
    parts: list[Any] = [run.tensor for run in runs]
    count = sum(run.stop - run.start for run in runs)

    def cat(tensors: list[Tensor]) -> Tensor:
        rows = [r.rows(t) for r, t in zip(runs, tensors, strict=True)]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def join(tensors: list[Tensor]) -> Tensor:
        if all(way(run, t) for run, t in zip(runs, tensors, strict=True)):
            return cat(tensors)
        if all(_same_bytes(tensor, tensors[0]) for tensor in tensors[1:]):
            return tensors[0]
        raise ValueError("differs between the parts")

    try:
        qdata = cat([part.qdata for part in parts])
        params = {
            name: join([part.params[name] for part in parts]) for name in first.params
        }
        dialect = matching.encoding_dialect(
            first.scheme, first.config.dialect, qdata, params, first.options
        )
        config = dataclasses.replace(first.config, dialect=dialect.name)
        shape = (count, *first.shape[1:])
        return QuantizedTensor(qdata, params, config, shape, first.dtype)
    except (HijackError, ValueError, RuntimeError):
        return None


def _same_bytes(tensor: Tensor, other: Tensor) -> bool:
    """Whether two tensors of a scheme hold the same."""
    if (tensor.shape, tensor.dtype) != (other.shape, other.dtype):
        return False
    mine, theirs = (
        t.contiguous().reshape(-1).view(torch.uint8) for t in (tensor, other)
    )
    return torch.equal(mine, theirs)


def _is_right(joined: QuantizedTensor, runs: list[Run]) -> bool:
    try:
        return torch.equal(joined.dense(torch.float32), dense(runs))
    except Exception:  # a scheme that cannot decode it says so in its own way
        return False


def _kind(tensor: Tensor) -> Any | None:
    """What tensors must have in common to be joined, and all their shapes."""
    if not isinstance(tensor, QuantizedTensor) or tensor.additions:
        return None
    inner = tensor.plain_tensors()
    names = tuple((name, t.dtype, tuple(t.shape[1:])) for name, t in inner.items())
    lengths = tuple(length(t) for t in inner.values())
    return (tensor.config, tuple(tensor.shape[1:]), names), lengths, tensor.shape[0]


def _float32(tensor: Tensor) -> Tensor:
    if isinstance(tensor, QuantizedTensor):
        return tensor.value(torch.float32)
    return tensor.to(torch.float32)
