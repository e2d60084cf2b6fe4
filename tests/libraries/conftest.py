"""Tests in libraries that load models and know nothing of hijack.

``scripts/test-libraries`` runs them, in environments of their own.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent
LIBRARIES = ("accelerate", "diffusers", "peft", "transformers")
MISSING = [name for name in LIBRARIES if importlib.util.find_spec(name) is None]

# before a library reads them: nothing here is asked of the network
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

if MISSING:
    collect_ignore_glob = ["test_*.py"]


def pytest_terminal_summary(terminalreporter, config):
    """Say which libraries the tests ran with, or that they did not run."""
    if MISSING:
        text = f"libraries: {', '.join(MISSING)} missing: run scripts/test-libraries"
    else:
        found = [f"{name} {importlib.metadata.version(name)}" for name in LIBRARIES]
        text = f"libraries: {', '.join(found)}"
    terminalreporter.write_line(text)


@pytest.fixture(autouse=True)
def quiet_libraries():
    """Warnings of libraries are theirs; ours are errors all the same."""
    import warnings

    with warnings.catch_warnings():
        for kind in (DeprecationWarning, FutureWarning, UserWarning):
            warnings.simplefilter("ignore", kind)
        yield
