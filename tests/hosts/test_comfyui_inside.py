"""What hijack does inside each real ComfyUI there is, without a server."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
COMFYUI_TESTS = HERE.parent / "comfyui"
if str(COMFYUI_TESTS) not in sys.path:
    sys.path.insert(0, str(COMFYUI_TESTS))

import comfy_harness  # noqa: E402 - found through the path set above

from hijack.testing import HostConformance  # noqa: E402

RELEASES = comfy_harness.releases()
HAS_DEPENDENCIES = importlib.util.find_spec("aiohttp") is not None
#: Of a diffusion model's keys in a whole checkpoint.
PREFIX = "model.diffusion_model."
#: Two ways to compute the same in float32: a scheme's own forward may form products in
#: another order than the dense layer.
ROUNDING = 1e-6

pytestmark = [
    pytest.mark.comfyui,
    pytest.mark.thorough,
    pytest.mark.skipif(not RELEASES, reason="no ComfyUI: set HIJACK_TEST_COMFYUI"),
    pytest.mark.skipif(not HAS_DEPENDENCIES, reason="ComfyUI's dependencies missing"),
]


@pytest.fixture(scope="module", params=list(RELEASES) or [None])
def release(request):
    """A release's folder."""
    return RELEASES[request.param]


@pytest.fixture(scope="module")
def found(release, tmp_path_factory):
    """What one process with that release found."""
    folder = tmp_path_factory.mktemp("files")
    done = subprocess.run(
        [sys.executable, HERE / "comfy_case.py", release, folder],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_the_host_is_patched(found, release):
    """ComfyUI's version is found, probes pass, and the version counts as tested."""
    assert found["status"] == f"comfyui {comfy_harness.version(release)}: patched"


def test_every_way_in_gives_the_exact_model(found):
    """Whatever loader, prefix, weight_dtype or wrong marker: nothing but rounding."""
    assert found["without hijack"] > 0.1
    assert len(found["errors"]) == 7
    assert max(found["errors"].values()) < ROUNDING, found["errors"]


def test_other_layers_keep_what_comfyui_gives_them(found):
    """Layers that are not quantized get the dtype they have in the dense model."""
    assert found["other dtypes"] == []


def test_any_scheme_loads_exactly(found):
    """Schemes of two methods load without error, packed data included."""
    assert set(found["schemes"].values()) == {0.0}, found["schemes"]
    assert {"plain_int8 ", "plain_nibbles ", f"plain_nibbles {PREFIX}"} <= set(
        found["schemes"]
    )


def test_loras_take_effect_and_leave_no_trace(found):
    """LoRAs act through ComfyUI's own patching; removed, all bits are as before."""
    assert found["lora small"] < ROUNDING
    assert found["lora large"] < ROUNDING
    assert found["lora small low vram"] < ROUNDING
    assert found["lora large low vram"] < ROUNDING
    assert found["lora removed"]
    assert found["weights restored"]


def test_partial_loading_is_exact(found):
    """With weights left on the offload device the output is the same."""
    assert found["low vram"] < ROUNDING


def test_a_saved_checkpoint_has_the_layers_as_they_came(found):
    """ModelSave writes the dialect's own keys, bit for bit; the file loads again."""
    assert found["saved"]
    assert found["saved and loaded"] < ROUNDING


def test_ordinary_models_are_untouched(found):
    """With nothing claimed, config and output are ComfyUI's own, bit for bit."""
    assert found["config untouched"]
    assert found["inert"]


def test_a_damaged_file_is_refused_in_a_sentence(found):
    """The error names layer, key and shapes, and says what to do."""
    assert found["refused"].startswith("UnconsumedScaleError: transformer_blocks.0")
    assert "(7, 3, 1) beside a weight of (256, 256)" in found["refused"]
    assert "quantize it again" in found["refused"]


def test_layers_behave_as_modules(found):
    """Forward, deepcopy, .to(dtype), state_dict and loading dense weights work."""
    assert all(found["modules"].values()), found["modules"]


def test_unpatching_refuses_and_restores(found):
    """Live models are named; forced, the function is restored and models still work."""
    assert "quantized modules are alive" in found["unpatch refused"]
    assert found["restored"]
    assert found["works unpatched"] < ROUNDING


class TestAdapter(HostConformance):
    """ComfyUI passes what every host passes."""

    adapter = "hijack.hosts.comfyui"
    use = """
import sys, torch
detection = sys.modules["comfy.model_detection"]
layer = sys.modules["comfy.ops"].manual_cast.Linear(8, 4)
with torch.no_grad():
    layer.weight.fill_(0.5)
    layer.bias.fill_(0.25)
config = detection.model_config_from_unet({"a.weight": torch.zeros(2, 2)}, "")
result = [layer(torch.ones(2, 8)).detach(), config is None]
"""

    @pytest.fixture(autouse=True)
    def prepared(self, release):
        """Make the release importable."""
        paths = [str(HERE.parents[1]), str(COMFYUI_TESTS)]
        self.setup = (
            f"import sys\nsys.path[:0] = {paths}\n"
            f"import launch\nlaunch.prepare({str(release)!r})\n"
        )
