"""The same file gives the same layers, in plain torch and in every host."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import hijack

HERE = Path(__file__).parent
if str(HERE) not in sys.path:
    sys.path.insert(0, str(HERE))

import same_layers  # noqa: E402 - found through the path set above

pytestmark = [pytest.mark.comfyui, pytest.mark.thorough]
CASE = "same_layers_case.py"
#: A Python that has diffusers and transformers; see .ci/run.
LIBRARIES = os.environ.get("HIJACK_TEST_LIBRARIES")
#: Products in float32, added up in another order.
ROUNDING = 1e-5


@pytest.fixture(scope="module")
def folder(case):
    """The files, and what ComfyUI and plain torch give."""
    folder = Path(case["folder"])
    for scheme in same_layers.SCHEMES:
        path = folder / f"{scheme}.safetensors"
        model = same_layers.build(same_layers.layers_of(path), torch.nn.Module())
        hijack.load(model, path, strict=False)
        same_layers.save_outputs(model, folder, "plain", scheme)
    return folder


@pytest.mark.parametrize("scheme", same_layers.SCHEMES)
def test_comfyui_gives_what_plain_torch_gives(folder, scheme):
    """Of every quantized layer, for the same input."""
    compare(folder, "comfyui", scheme)


@pytest.mark.skipif(LIBRARIES is None, reason="HIJACK_TEST_LIBRARIES names no Python")
def test_diffusers_and_transformers_give_what_plain_torch_gives(folder):
    """The same files."""
    script = HERE / "same_layers_libraries.py"
    done = subprocess.run([LIBRARIES, script, folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    for scheme in same_layers.SCHEMES:
        for host in ("diffusers", "transformers"):
            compare(folder, host, scheme)


def compare(folder, host, scheme):
    """The outputs of a host and of plain torch."""
    theirs = load_file(folder / f"{host}-{scheme}.outputs")
    plain = load_file(folder / f"plain-{scheme}.outputs")
    assert theirs.keys() == plain.keys()
    assert len(plain) > 10
    for layer, expected in plain.items():
        error = (theirs[layer] - expected).norm() / expected.norm()
        assert error < ROUNDING, layer
