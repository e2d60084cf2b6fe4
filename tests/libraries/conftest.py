"""Hosts that the tests of libraries need."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def transformers_host() -> Iterator[None]:
    """transformers, patched."""
    import hijack.hosts
    import hijack.hosts.transformers as adapter

    if "transformers" not in hijack.hosts.status():
        hijack.hosts.add_host(adapter)
    hijack.hosts.patch("transformers")
    yield
