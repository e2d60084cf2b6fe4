"""What hijack does under the dynamic VRAM of each real ComfyUI that has it.

The device and comfy_aimdo's native half are doubles, so this shows what ComfyUI's and
hijack's Python code do; it says nothing of speed or of the driver.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

import comfy_harness  # its folder is put on the path in conftest.py
import pytest

HERE = Path(__file__).parent
RELEASES = {
    version: folder
    for version, folder in comfy_harness.releases().items()
    if comfy_harness.has_dynamic_vram(folder)
}
MODES = ("all", "none", "half")
#: Two ways to compute the same in float32 differ by less.
ROUNDING = 1e-6

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.thorough,
    pytest.mark.skipif(
        not RELEASES, reason="no ComfyUI with dynamic VRAM: set HIJACK_TEST_COMFYUI"
    ),
    pytest.mark.skipif(
        importlib.util.find_spec("aiohttp") is None, reason="not installed: aiohttp"
    ),
]


@pytest.fixture(scope="module", params=list(RELEASES) or [None])
def release(request):
    """A release's folder."""
    return RELEASES[request.param]


@pytest.fixture(scope="module")
def found(release, tmp_path_factory):
    """What one process with that release found."""
    folder = tmp_path_factory.mktemp("files")
    return comfy_harness.run_case(HERE / "dynamic_case.py", release, folder)


def test_the_double_runs_comfyui_s_dynamic_vram(found):
    """Core takes the dynamic path: weights stay, stream, or come back after a while."""
    assert found["patcher"] == "ModelPatcherDynamic"
    assert found["device"] != "cpu"
    all_, none, half = (found["faults"][mode] for mode in MODES)
    assert all_["loaded"] > 0
    assert all_["resident"] == 2 * all_["loaded"]
    assert all_["refused"] == 0
    assert none["loaded"] == none["resident"] == 0 < none["refused"]
    assert min(half.values()) > 0


def test_ordinary_models_give_the_same_under_the_double(found):
    """ComfyUI's own layers are exact there, and merge LoRAs where a weight stays."""
    assert found["plain"] == {mode: [0.0] * 3 for mode in MODES}
    lora = found["plain lora"]
    assert lora["none"] == [0.0] * 3
    assert lora["all"][0] == 0.0
    assert 0.0 < lora["all"][1] < 0.01 * found["effects"]["large"]
    assert max(lora["half"]) < 0.01 * found["effects"]["large"]


def test_quantized_weights_are_exact(found):
    """Resident, streamed or evicted, cast or not: nothing but rounding, ever."""
    assert found["cost"] > 100 * ROUNDING  # or it would not matter what is computed
    expected = {f"{dtype} {mode}" for dtype in ("cast", "kept") for mode in MODES}
    assert found["exact"].keys() == expected
    assert {len(steps) for steps in found["exact"].values()} == {3}
    assert max(max(steps) for steps in found["exact"].values()) < ROUNDING


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", ["small", "large"])
def test_loras_are_exact_in_every_step(found, size, mode):
    """A LoRA is never rounded into a resident weight; removed, all bits are back."""
    assert found["effects"][size] > 10 * ROUNDING
    assert max(found["lora"][f"{size} {mode}"]) < ROUNDING
    assert found["removed"][f"{size} {mode}"]


def test_a_lora_that_is_gone_takes_no_memory(found):
    """The next model's load lets go of its file and of its copies on the device."""
    assert found["LoRA held"]
    assert found["LoRA forgotten"]


@pytest.mark.parametrize("mode", MODES)
def test_a_saved_checkpoint_has_the_layers_as_they_came(found, mode):
    """ModelSave writes data and scales bit for bit, wherever the weights are."""
    assert found["saved"][mode] is True


def test_comfyui_plans_with_the_size_of_data_and_scales(found):
    """The model's size is what its tensors take in the file."""
    planned, stored = found["sizes"]
    assert planned == stored


def test_nothing_is_held_or_left(found):
    """Used weights are let go after each step; an unloaded model leaves nothing."""
    assert found["held"] == 0
    assert found["loaded"] > 0
    assert found["left"] == {
        "device": 0,
        "host": 0,
        "held": 0,
        "parameters": [],
        "loras": [],
    }
