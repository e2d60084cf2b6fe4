"""The base of the dialects that are described in ``config.json``."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch

from hijack.claim import Certainty, Claim
from hijack.formats.configured import ConfiguredFiles
from hijack.formats.native_marker import native_marker
from hijack.safetensors_io.header import Header
from hijack.scheme import Scheme
from schemes._blocks import SCALE_DTYPES, Pair
from schemes._fp8.blocks import POWER_DTYPES
from schemes._fp8.dialects.base import FP8Dialect

#: DeepSeek's blocks, and those of most programs since.
BLOCK = (128, 128)


class ConfiguredDialect(ConfiguredFiles, FP8Dialect):
    """A dialect whose files are described by a ``quantization_config``.

    It is in ``config.json``. Since that is easily lost, hijack also writes it into the
    header's metadata, and looks there first.
    """

    scale_dtypes = (*SCALE_DTYPES, *POWER_DTYPES)

    def readings(self, scheme: Scheme, header: Header, layer: str) -> Iterator[Claim]:
        """As in the base class; hijack's own marker in the file outranks a config.

        The config may be that of another file in the folder.
        """
        claims = super().readings(scheme, header, layer)
        if native_marker(header, layer) is None:
            yield from claims
            return
        for claim in claims:
            certainty = min(claim.certainty, Certainty.UNIQUE)
            yield dataclasses.replace(claim, certainty=certainty)


def common_block_size(
    sizes: Iterable[tuple[Pair, Pair | None]], choose: Callable[[int, int], int]
) -> Pair:
    """One block size for many layers, each side chosen by a function.

    A side as long as the weight's does not count, except that the result must not be
    shorter. If none counts, it is DeepSeek's, or longer.
    """
    known = [(shape, size) for shape, size in sizes if size is not None]
    sides = []
    for axis in (0, 1):
        real = {size[axis] for shape, size in known if size[axis] < shape[axis]}
        longest = max((shape[axis] for shape, _ in known), default=0)
        side = 0
        for length in sorted(real):
            side = choose(side, length)
        sides.append(side or max(BLOCK[axis], longest))
    return sides[0], sides[1]


def with_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """DeepSeek's blocks and float32 scales by default."""
    return {"block_size": BLOCK, "scale_dtype": torch.float32, **options}


def dense_layers(others: Collection[str]) -> list[str]:
    """Layers that stay dense, which readers would otherwise expect quantized."""
    return [key.removesuffix(".weight") for key in others if key.endswith(".weight")]


def block_pair(value: object) -> Pair | None:
    """A block size as two positive integers; None if it is something else."""
    if not isinstance(value, list | tuple) or len(value) != 2:
        return None
    if not all(type(size) is int and size > 0 for size in value):
        return None
    return value[0], value[1]
