"""A ComfyUI of tomorrow starts and works, with hijack or without it.

Changes are made to a copy of the newest ComfyUI there is: see `future_case.CHANGES`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
for folder in (HERE, HERE.parent / "comfyui"):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import comfy_harness  # noqa: E402 - found through the path set above

RELEASES = comfy_harness.releases()
HAS_DEPENDENCIES = importlib.util.find_spec("aiohttp") is not None

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.thorough,
    pytest.mark.skipif(not RELEASES, reason="no ComfyUI: set HIJACK_TEST_COMFYUI"),
    pytest.mark.skipif(not HAS_DEPENDENCIES, reason="ComfyUI's dependencies missing"),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="forks a process per change"),
]

#: Changes to something hijack needs, and what its one line must name.
STAYS_OUT = {
    "detection renamed": "model_detection.model_config_from_unet: does not exist",
    "detection with other names": "does not accept state_dict; got (weights, ",
    "class removed": "comfy.ops.disable_weight_init.Linear: does not exist",
    "custom operations gone": "BASE.custom_operations: does not exist",
}
#: Changes to nothing hijack needs.
GOES_ON = [
    "nothing",
    "version far ahead",
    "detection with another argument",
    "detection with an argument in front",
]
#: Two ways to compute the same in float32.
ROUNDING = 1e-6
#: A change that no probe can see.
UNSEEN = "detection returns a pair"


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What one process, and one child of it per change, found."""
    newest = list(RELEASES.values())[-1]
    folder = tmp_path_factory.mktemp("future")
    done = subprocess.run(
        [sys.executable, HERE / "future_case.py", newest, folder],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("change", [*STAYS_OUT, *GOES_ON, UNSEEN])
def test_ordinary_models_work_whatever_changes(found, change):
    """A bf16 model loads and gives the same bits as before hijack came."""
    assert found[change].get("bf16 as before"), found[change]


@pytest.mark.parametrize("change", STAYS_OUT)
def test_hijack_stays_out_and_says_why_in_one_line(found, change):
    """What is missing is named at start and in the status; nothing is patched."""
    [line] = found[change]["start"]
    assert line.startswith("hijack: comfyui not patched: comfyui ")
    assert STAYS_OUT[change] in line
    assert "\n" not in line
    assert "not patched (" in found[change]["status"]
    assert STAYS_OUT[change] in found[change]["status"]
    assert found[change]["fp8"] > 0.1  # so the change is what ComfyUI runs with


@pytest.mark.parametrize("change", GOES_ON)
def test_hijack_goes_on_where_it_can(found, change):
    """Quantized files are exact; a version that was not tested is only mentioned."""
    assert found[change]["start"] == []
    assert ": patched" in found[change]["status"]
    assert found[change]["fp8"] < ROUNDING
    untested = "version not tested" in found[change]["status"]
    assert untested == (change == "version far ahead")


def test_an_answer_that_hijack_does_not_know_is_an_error_in_words(found):
    """A quantized file is refused, saying what came instead of a config."""
    words = "gave what hijack does not know; got a tuple, expected an object with"
    assert found[UNSEEN]["fp8"].startswith("HijackError: comfy.model_detection.")
    assert words in found[UNSEEN]["fp8"]
