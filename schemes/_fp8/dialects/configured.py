"""What files that ``config.json`` explains have in common."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch

from hijack.formats.dialect import FileMarks
from hijack.safetensors_io.header import CONFIG_KEY
from schemes._fp8.blocks import POWER_DTYPES, SCALE_DTYPES, Pair
from schemes._fp8.dialects.base import FP8Dialect

#: DeepSeek's blocks, and everybody's after it.
BLOCK = (128, 128)


class ConfiguredDialect(FP8Dialect):
    """A dialect whose files say how they were quantized in ``quantization_config``.

    It stands in ``config.json``. Since that is easily lost, hijack also writes it into
    the header's metadata, and reads it there first.
    """

    scale_dtypes = (*SCALE_DTYPES, *POWER_DTYPES)

    def unmark(
        self, metadata: Mapping[str, str], keys: Collection[str], layers: Iterable[str]
    ) -> tuple[dict[str, str], set[str]]:
        """Drop the config: it is of the whole file."""
        return {k: v for k, v in metadata.items() if k != CONFIG_KEY}, set()

    def marks(self, config: Mapping[str, object]) -> FileMarks:
        """The config, for both places."""
        return FileMarks({CONFIG_KEY: json.dumps(config)}, config=config)


def common(
    sizes: Iterable[tuple[Pair, Pair | None]], choose: Callable[[int, int], int]
) -> Pair:
    """One block size for many layers, each side chosen among those that matter.

    A side as long as the weight's says nothing, except that the result must not be
    shorter. Where nobody says anything it is DeepSeek's, or longer.
    """
    known = [(shape, size) for shape, size in sizes if size is not None]
    sides = []
    for axis in (0, 1):
        real = {size[axis] for shape, size in known if size[axis] < shape[axis]}
        longest = max((shape[axis] for shape, _ in known), default=0)
        side = 0
        for one in sorted(real):
            side = choose(side, one)
        sides.append(side or max(BLOCK[axis], longest))
    return sides[0], sides[1]


def with_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    return {"block_size": BLOCK, "scale_dtype": torch.float32, **options}


def dense_layers(others: Collection[str]) -> list[str]:
    """Layers whose weights stay dense, which readers would else expect codes of."""
    return [key.removesuffix(".weight") for key in others if key.endswith(".weight")]


def pair(given: object) -> Pair | None:
    """Two positive integers, or None."""
    if not isinstance(given, list | tuple) or len(given) != 2:
        return None
    if not all(type(size) is int and size > 0 for size in given):
        return None
    return given[0], given[1]
