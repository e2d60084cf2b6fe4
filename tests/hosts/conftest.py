"""Cases that run once for each real ComfyUI there is, each in a process of its own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COMFYUI_TESTS = HERE.parent / "comfyui"
if str(COMFYUI_TESTS) not in sys.path:
    sys.path.insert(0, str(COMFYUI_TESTS))

import comfy_harness  # noqa: E402 - found through the path set above

RELEASES = comfy_harness.releases()
HAS_DEPENDENCIES = importlib.util.find_spec("aiohttp") is not None


def pytest_generate_tests(metafunc):
    """Run the tests that ask for ``case`` or ``release`` for each release there is."""
    asked = {"case", "row"} & set(metafunc.fixturenames)
    if asked:
        reason = "no ComfyUI: set HIJACK_TEST_COMFYUI"
        if RELEASES and not HAS_DEPENDENCIES:
            reason = "ComfyUI's dependencies missing: see scripts/test"
        missing = pytest.param(None, marks=pytest.mark.skip(reason=reason))
        values = list(RELEASES) if HAS_DEPENDENCIES and RELEASES else [missing]
        name = "case" if "case" in asked else "release"
        metafunc.parametrize(name, values, scope="module", indirect=name == "case")


@pytest.fixture(scope="module")
def case(request, tmp_path_factory):
    """What the module's ``CASE``, a script here, found with one release."""
    script, root = HERE / request.module.CASE, RELEASES[request.param]
    return comfy_harness.run_case(script, root, tmp_path_factory.mktemp("files"))
