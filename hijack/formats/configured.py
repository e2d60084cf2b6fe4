"""The base of dialects whose files a ``quantization_config`` describes."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping

from hijack.formats.dialect import Dialect, FormatMetadata
from hijack.safetensors_io.header import CONFIG_KEY


class ConfiguredFiles(Dialect):
    """A dialect whose config is in ``config.json``, and in the header's metadata.

    A config beside a file is easily lost, so hijack writes it into the header too.
    """

    def unmark(
        self, metadata: Mapping[str, str], keys: Collection[str], layers: Iterable[str]
    ) -> tuple[dict[str, str], set[str]]:
        """Drop the config; it describes the whole file."""
        return {k: v for k, v in metadata.items() if k != CONFIG_KEY}, set()

    def format_metadata(self, config: Mapping[str, object]) -> FormatMetadata:
        """The config, for both places."""
        return FormatMetadata({CONFIG_KEY: json.dumps(config)}, config=config)
