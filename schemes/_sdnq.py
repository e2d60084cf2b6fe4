"""What SDNQ's config says, of whatever dtype its weights are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

#: SDNQ's tensors of a weight that is more than its data times one scale.
EXTRA = frozenset({"scale_2", "zero_point", "zero_point_scale", "svd_up", "svd_down"})


def asks_for(config: Mapping[str, Any], option: str) -> bool:
    """Whether an option is set for the model, or for any module of it.

    Args:
        config: the ``quantization_config``.
        option: such as ``use_hadamard``.
    """
    return any(table.get(option) for table in _options(config))


def _options(config: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """The config's options, and those of single modules."""
    yield config
    modules = config.get("modules_quant_config")
    for options in modules.values() if isinstance(modules, dict) else ():
        if isinstance(options, dict):
            yield options
