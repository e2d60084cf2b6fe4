"""Shared by all tests: an environment that says nothing to hijack."""

import pytest


@pytest.fixture(autouse=True)
def plain_environment(monkeypatch):
    """Tests set the variables they are about; the caller's do not count."""
    for name in ("HIJACK_DISABLE", "HIJACK_STRICT"):
        monkeypatch.delenv(name, raising=False)
