"""The example plugin passes the conformance kit, and works once it is installed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hijack_int8_rowwise import Int8Rowwise

from hijack.testing import SchemeConformance

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "hijack-int8-rowwise"

ASK = """
import json, torch, hijack
scheme = hijack.schemes()["int8_rowwise"]
layer = hijack.wrap_module(torch.nn.Linear(8, 4), "int8_rowwise")
print(json.dumps([scheme.origin, str(layer.weight.qdata.dtype)]))
"""


class TestInt8Rowwise(SchemeConformance):
    """The example against the whole kit."""

    min_sqnr_db = 30.0
    block_size = (1, -1)

    @pytest.fixture
    def scheme(self):
        """The example's scheme."""
        return Int8Rowwise()


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder the example is installed in, as pip does it."""
    folder = tmp_path_factory.mktemp("example")
    source, target = folder / "source", folder / "target"
    shutil.copytree(EXAMPLE, source, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install"]
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*pip, *options, "--target", target, source], check=True)
    return target


def python(installed, *arguments):
    """Run Python with the example installed; its output, without a complaint."""
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(installed), str(ROOT)]),
    }
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        check=True,
        capture_output=True,
        text=True,
        cwd=installed,
    )
    assert done.stderr == ""
    return done.stdout


def test_installed_plugin_is_found(installed):
    """An installed plugin is there without an import, and says where it is from."""
    origin, dtype = json.loads(python(installed, "-c", ASK))
    assert origin == "entry point int8_rowwise = hijack_int8_rowwise:Int8Rowwise"
    assert dtype == "torch.int8"


def test_command_line_lists_the_plugin(installed):
    """``hijack schemes`` shows the plugin and its origin."""
    run = "import sys; from hijack.cli import main; sys.exit(main(['schemes']))"
    listed = python(installed, "-c", run)
    line = next(line for line in listed.splitlines() if "int8_rowwise" in line)
    assert "hijack_int8_rowwise" in line


def test_plugin_can_be_disabled(installed, monkeypatch):
    """``HIJACK_DISABLE`` keeps a plugin from being loaded."""
    monkeypatch.setenv("HIJACK_DISABLE", "int8_rowwise")
    out = python(
        installed, "-c", "import hijack; print('int8_rowwise' in hijack.schemes())"
    )
    assert out.strip() == "False"


def test_example_is_small():
    """Two files, about 30 lines."""
    files = [f for f in EXAMPLE.iterdir() if f.suffix in (".py", ".toml")]
    lines = [line for f in files for line in f.read_text().splitlines() if line.strip()]
    assert len(files) == 2
    assert len(lines) <= 35
