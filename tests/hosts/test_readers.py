"""Whoever asks ComfyUI's file reader gets weights that mean something."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.comfyui

CASE = "readers_case.py"
#: Callers in every release that have a loader of quantized layers behind them.
DOORS = {
    "comfy.sd.load_checkpoint_guess_config",
    "comfy.sd.load_clip",
    "comfy.sd.load_diffusion_model",
    "comfy.controlnet.load_controlnet",
}


def test_every_caller_of_the_reader_gets_dense_weights_or_opens_the_file(case):
    """Each call in the release gives decoded layers, or has a door that takes them."""
    got = {caller: gets for caller, (gets, _) in case["callers"].items()}
    assert len(got) >= 20
    assert {c for c, gets in got.items() if gets == "as stored"} == DOORS
    assert {gets for c, gets in got.items() if c not in DOORS} == {"dense"}


def test_every_caller_gets_comfyuis_own_dict_of_a_plain_file(case):
    """Files without quantized layers pass through the reader as they are."""
    assert {kind for _, kind in case["callers"].values()} == {"dict"}
    assert case["plain"] == [True, True, True, ["Tensor"]]


def test_names_that_modules_imported_are_restored(case):
    """Unpatching gives modules that imported the reader by name its original back."""
    assert case["copies restored"]


@pytest.mark.parametrize("kind", ["ours", "comfy_quant"])
def test_clip_vision_is_exact(case, kind):
    """*Load CLIP Vision* gives what the decoded file gives, of both kinds of layers."""
    assert case["clip vision"][kind] == 0.0


def test_a_damaged_clip_vision_file_is_refused_by_name(case):
    """A scale that fits no weight is an error that names the layer."""
    refused = case["clip vision"]["damaged"]
    assert "layers.0.mlp.fc1: no scheme reads" in refused
    assert "quantize it again" in refused


def test_a_small_vae_is_exact(case):
    """A VAE read from a file gives what the decoded one gives."""
    assert case["vae"] == 0.0


def test_new_loaders_load_what_a_file_means(case):
    """A loader that knows no scales gets dense weights, and no key it has not."""
    new = case["new"]
    for loader in ("comfyui", "ignorant pack"):
        assert new[loader] == {"ours": True, "theirs": True, "unexpected": []}


def test_packs_that_read_scales_get_comfyuis_own_layers_as_stored(case):
    """A pack whose code names scales is handed those, and ours decoded."""
    pack = case["new"]["knowing pack"]
    assert pack["ours"]
    if case["own formats"]:  # as without hijack: this pack is not that good
        assert not pack["theirs"]
        assert pack["unexpected"] == ["theirs.comfy_quant", "theirs.weight_scale"]
    else:
        assert pack["theirs"]


def test_layers_that_nobody_reads_are_refused(case):
    """What neither a scheme nor the loader can read is an error, and no weight."""
    assert "theirs: is in the format" in case["unreadable"]


def test_a_file_behaves_as_a_dict_of_dense_weights(case):
    """Copies, renamed keys, writes and pickles are those of a dense file."""
    manners = case["manners"]
    assert manners["is a dict"]
    assert manners["copies"]
    assert manners["pickled"]
    assert manners["hidden"] == [False, 0]
    assert manners["renamed"]
    assert manners["nested"] == ["1", "inner", "a.weight"]


def test_an_opened_file_has_no_scales_of_weights_that_are_gone(case):
    """Scales go with the weight that a loader renamed or replaced."""
    plain = ["embedding.weight", "norm.weight", "positions"]
    assert case["manners"]["renamed, opened"] == sorted([*plain, "new.weight"])
    keys, size = case["manners"]["written, opened"]
    assert (keys, size) == (sorted([*plain, "ours.weight"]), 1)
    assert case["manners"]["opened"]


def test_a_copy_of_a_file_stays_quantized(case):
    """What a node reads and saves again is stored as it was."""
    assert case["manners"]["copied file"]


def test_the_log_says_what_was_decoded(case):
    """One line counts the layers and names the file."""
    (line,) = case["manners"]["log"]
    assert line.startswith("hijack: ours.safetensors: 1 quantized layers: ")
    assert line.endswith("; decoded, because its loader takes dense weights only")


def test_a_model_is_decoded_where_somebody_took_a_patch_out(case):
    """A patch that is missing costs memory, not the picture, and is told."""
    found = case["restored"]
    assert (
        "not patched (comfy.model_detection.model_config_from_unet" in found["status"]
    )
    assert "comfy.sd.CLIP.load_sd" in found["status"]
    assert max(found["errors"].values()) < 1e-3  # decoded in bfloat16 or float32
    (line,) = found["log"]
    assert "hijack.patch() puts it back" in line


def test_patching_again_keeps_models_quantized(case):
    """patch() puts back what was taken out."""
    assert case["restored"]["healed"]
    assert case["restored"]["quantized"] > 10
    assert case["restored"]["errors"]["healed"] < 1e-6
