"""The adapter that docs/hosts.md shows passes the tests that it shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DOCUMENT = ROOT / "docs/hosts.md"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The document's files, and a distribution that names the adapter."""
    folder = tmp_path_factory.mktemp("document")
    text = DOCUMENT.read_text("utf-8")
    for name, code in re.findall(r"^```py\n# (\S+)\n(.*?)^```", text, re.M | re.S):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(code)
    (entries,) = re.findall(r"^```toml\n(.*?)^```", text, re.M | re.S)
    module = re.search(r'toyhost = "(\w+)"', entries)[1]
    info = folder / "toyhost_hijack-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: toyhost-hijack\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[hijack.hosts]\ntoyhost = {module}\n")
    return folder


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("test_toyhost.py", marks=pytest.mark.thorough),
        "test_quantized.py",
    ],
)
def test_the_tests_of_the_document_pass(folder, name):
    """The kit, and a quantized file."""
    code = "import hijack" if name == "test_quantized.py" else ""
    (folder / "conftest.py").write_text(code)
    done = run(folder, "-m", "pytest", "-q", "-p", "no:cacheprovider", name)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " skipped" not in done.stdout


def test_the_adapter_is_found_and_shown(folder):
    """By its entry point; the doctor knows it before the host is imported."""
    done = run(folder, "-m", "hijack", "doctor")
    assert "toyhost: not patched (waiting for toyhost.models" in done.stdout
    code = "import hijack, toyhost.models; print(hijack.status()['toyhost'])"
    assert "toyhost 1.2: patched" in run(folder, "-c", code).stdout
    disabled = run(folder, "-c", code, HIJACK_DISABLE="toyhost").stdout
    assert "not patched (disarmed by HIJACK_DISABLE)" in disabled


def test_an_adapter_that_cannot_be_imported_stops_nothing(tmp_path):
    """It is shown, with what it raised; the other hosts go on."""
    (tmp_path / "broken_hijack.py").write_text("raise RuntimeError('broken')\n")
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Name: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[hijack.hosts]\nbroken = broken_hijack\n")
    done = run(tmp_path, "-m", "hijack", "doctor")
    assert done.returncode == 1, done.stderr  # something is wrong
    assert "broken: not patched (its adapter cannot be loaded" in done.stdout
    assert "plugin host broken: loading: RuntimeError: broken" in done.stdout
    assert "comfyui: not patched (waiting for" in done.stdout


def run(folder, *words, **environment):
    """Python, with the folder and hijack on its path."""
    paths = os.pathsep.join([str(folder), str(ROOT)])
    return subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": paths, **environment},
        capture_output=True,
        text=True,
    )
