"""The environment that the tests of this folder run in."""

import importlib.metadata
import subprocess
import sys


def test_importing_hijack_imports_no_library():
    """They are imported by who uses them."""
    code = (
        "import hijack, sys; hijack.status(); "
        "print([n for n in ('accelerate', 'diffusers', 'peft', 'transformers') "
        "if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    assert done.stdout.strip() == "[]"


def test_the_package_asks_for_no_library():
    """The core depends on four packages, whatever the environment has."""
    wanted = importlib.metadata.requires("comfyui-hijack") or []
    core = {w.partition(">")[0] for w in wanted if "extra ==" not in w}
    assert core == {"torch", "safetensors", "pluggy", "wrapt"}
