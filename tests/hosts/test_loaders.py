"""Text encoders, VAEs, ControlNets and whole checkpoints, in each real ComfyUI."""

from __future__ import annotations

import pytest

pytestmark = [pytest.mark.comfyui, pytest.mark.thorough]

CASE = "loaders_case.py"
#: Two ways to compute the same in float32: a scheme's own forward may form products in
#: another order than the dense layer.
ROUNDING = 1e-6


@pytest.mark.parametrize("way", ["clip_l", "t5", "qwen", "dual"])
def test_text_encoders_are_exact_and_stay_quantized(case, way):
    """Text encoders give what the exactly dequantized files give."""
    found = case["text encoders"][way]
    assert found["error"] < ROUNDING
    assert found["quantized"] == found["expected"] > 10


def test_a_scheme_of_two_methods_reads_text_encoders(case):
    """An author's scheme works there as it does in diffusion models."""
    found = case["plugin"]
    assert found["error"] == 0.0
    assert found["quantized"] == found["expected"] > 10


def test_other_layers_of_a_text_encoder_keep_their_dtypes(case):
    """What is not quantized has the dtype it has in a dense file."""
    assert case["encoder dtypes"] == []


def test_a_wrong_marker_on_a_text_encoder_is_read_through(case):
    """ComfyUI's marker of one scale a layer, on block scales, changes nothing."""
    assert case["wrong marker"] < ROUNDING


def test_a_lora_on_a_text_encoder_takes_effect(case):
    """The LoRA's effect is that on the dense model, and goes with it."""
    found = case["encoder lora"]
    assert found["error"] < ROUNDING < 1e-3 < found["effect"]
    assert found["removed"]


def test_a_text_encoder_is_saved_quantized(case):
    """A saved text encoder is quantized and loads again, exactly."""
    found = case["encoder saved"]
    assert found["error"] < ROUNDING
    assert found["quantized"] == found["expected"] > 10


def test_a_vae_is_decoded_and_says_so(case):
    """A VAE gives what the exact one gives; one line counts the layers decoded."""
    found = case["vae"]
    assert found["error"] == 0.0
    (line,) = found["log"]
    assert f": {found['layers']} quantized layers: blockwise_fp8 (" in line
    assert "because ComfyUI builds the VAE without quantized layers" in line


@pytest.mark.parametrize("part", ["model", "t5", "clip_l", "vae"])
def test_every_part_of_a_checkpoint_is_exact(case, part):
    """A whole checkpoint, quantized in every part, loads through the stock loader."""
    most = 0.0 if part == "vae" else ROUNDING  # it is decoded when it is loaded
    assert case["checkpoint"][part] <= most
    assert case["checkpoint quantized"] > 20


def test_a_controlnet_is_exact_and_stays_quantized(case):
    """A ControlNet of a diffusion transformer runs quantized, the rest as ever."""
    found = case["controlnet"]
    assert found["error"] < ROUNDING
    assert found["quantized"] == found["expected"] > 10
    assert found["dtypes"] == []


@pytest.mark.parametrize("prefix", ["", "control_model."])
def test_an_older_controlnet_is_exact(case, prefix):
    """So does one of Stable Diffusion's kind, however its keys begin."""
    found = case["old controlnet"]
    assert found[prefix] < ROUNDING
    assert found[f"{prefix} quantized"] == found["expected"] > 10


def test_a_control_lora_is_decoded(case):
    """Weights that ComfyUI computes with are dense and exact."""
    assert case["control lora"]


def test_native_layers_beside_ours_are_exact(case):
    """In one file, ComfyUI's layers are ComfyUI's and ours are ours, both exact.

    Where ComfyUI has no such layers yet, the file is refused by name.
    """
    if "mixed refused" in case:
        assert case["mixed"] == {}
        assert (
            "0.attn.to_k: is in the format comfy_quant of another"
            in case["mixed refused"]
        )
        assert "this ComfyUI cannot read both" in case["mixed refused"]
        return
    assert list(case["mixed"]) == case["mixed kinds"]
    assert "float8_e4m3fn" in case["mixed kinds"]
    for kind, found in case["mixed"].items():
        assert found["error"] < ROUNDING, kind
        assert found["native"] == f"Linear {kind}"
        assert found["quantized"] == found["expected"] > 5
    found = case["mixed text encoder"]
    assert found["error"] < ROUNDING
    assert found["quantized"] == found["expected"] > 5


def test_native_files_are_comfyuis_own(case):
    """A file of native layers alone goes through ComfyUI untouched, bit for bit."""
    if "mixed refused" in case:
        assert "native only" not in case
    else:
        assert case["native only"] == {"same": True, "config": True}


def test_damaged_files_are_refused_by_name(case):
    """In each loader the error names the layer, what it has, and what to do."""
    refused = case["refused"]
    layer = "encoder.block.1.layer.1.DenseReluDense.wo"
    text = f"{layer}: no scheme reads {layer}.scale_weight, (7, 3, 1) beside a weight"
    assert text in refused["text encoder"]
    assert "taesd_decoder.1: no scheme reads" in refused["vae"]
    assert "a: no scheme reads a.scale_weight, (7,)" in refused["controlnet"]
    assert all("quantize it again" in text for text in refused.values())


def test_operations_of_others_read_the_file_themselves(case):
    """A loader that brings its own operations, as for GGUF, gets data and scales."""
    found = case["own operations"]
    assert found["scales"] == found["expected"] > 10
    assert found["quantized"] == 0


def test_plain_files_are_not_touched(case):
    """Plain text encoders and VAEs give the same bits with hijack and without."""
    assert case["inert"] == {"same": [True] * 3, "classes": []}
