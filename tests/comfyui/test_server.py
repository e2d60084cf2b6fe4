"""The stock workflow on a real server: UNETLoader, KSampler, SaveLatent over HTTP."""

import json
import subprocess
import sys
import urllib.request

import comfy_harness
import pytest
import torch
from comfy_harness import PromptError, relative_error
from safetensors.torch import load_file, save_file

#: Latents of two ways to compute the same are equal to this.
ROUNDING = 1e-5
#: And outputs of the network; nothing but the order of sums differs, in float32.
ROUNDING_OF_ONE = 1e-6


def test_without_hijack_the_file_is_garbage(stock, expected):
    """Stock ComfyUI fails on the block FP8 file, or computes with raw FP8."""
    try:
        latent = stock.latent("fp8")
    except PromptError:
        return
    assert relative_error(latent, expected["exact"]) > 0.5
    assert "unet unexpected" in stock.log()


def test_the_reference_is_not_the_unquantized_model(expected):
    """The comparison can tell quantized weights from the original ones."""
    assert relative_error(expected["bf16"], expected["exact"]) > 100 * ROUNDING


@pytest.mark.parametrize("model", ["fp8", "fp8-prefixed"])
def test_a_block_fp8_file_samples_as_its_dequantized_weights(hijacked, expected, model):
    """The stock loader and sampler give the latent of the exact weights."""
    latent = hijacked.latent(model)
    assert relative_error(latent, expected["exact"]) < ROUNDING


def test_the_network_s_first_output_is_exact(hijacked, stock):
    """One step, so one output of the network: nothing but rounding differs."""
    expected = stock.latent("exact", steps=1)
    latent = hijacked.latent("fp8", steps=1)
    assert relative_error(latent, expected) < ROUNDING_OF_ONE


@pytest.mark.parametrize("weight_dtype", ["fp8_e4m3fn", "fp8_e5m2"])
def test_the_loader_s_weight_dtype_changes_nothing(hijacked, expected, weight_dtype):
    """Unquantized layers keep their dtype, whatever the node is set to."""
    latent = hijacked.latent("fp8", weight_dtype=weight_dtype)
    assert relative_error(latent, expected["exact"]) < ROUNDING


def test_a_plain_checkpoint_is_untouched(hijacked, expected):
    """With hijack loaded, a bf16 file gives the same bits as without."""
    assert torch.equal(hijacked.latent("bf16"), expected["bf16"])


def test_a_third_party_scheme_loads(hijacked, expected):
    """A plugin with only quantize and dequantize works through the stock loader."""
    latent = hijacked.latent("int8")
    assert relative_error(latent, expected["exact-int8"]) < ROUNDING


def test_the_page_is_offered_the_example_workflows(hijacked):
    """ComfyUI lists them among its templates, each with a picture."""
    address = f"http://127.0.0.1:{hijacked.port}"
    with urllib.request.urlopen(f"{address}/workflow_templates") as answer:
        listed = json.load(answer)["hijack"]
    files = comfy_harness.REPOSITORY / "example_workflows"
    assert sorted(listed) == sorted(path.stem for path in files.glob("*.json"))
    for name in listed:
        for kind in ("json", "jpg"):
            path = f"/api/workflow_templates/hijack/{name}.{kind}"
            with urllib.request.urlopen(address + path) as answer:
                assert answer.read() == (files / f"{name}.{kind}").read_bytes()


def test_a_file_with_a_scale_that_does_not_fit_says_so(hijacked, models):
    """A damaged file is refused in the words of hijack, naming layer and shape."""
    broken = load_file(models / "fp8.safetensors")
    key = "transformer_blocks.0.img_mlp.net.0.proj.scale_weight"
    broken[key] = broken[key][:-1].contiguous()
    save_file(broken, models / "broken.safetensors")
    words = r"img_mlp\.net\.0\.proj: no scheme reads .*\(1023, 4, 1\) beside"
    with pytest.raises(PromptError, match=words):
        hijacked.latent("broken")


def test_a_pip_installed_hijack_serves_a_pack_of_one_line(
    release, base, models, expected, tmp_path
):
    """Installed, not cloned, one import in any node pack is enough."""
    if release != list(comfy_harness.releases())[-1]:
        pytest.skip("one release is enough: it is the import that is tested")
    site = tmp_path / "site"
    command = ["install", "--quiet", "--no-deps", "--no-build-isolation", "--target"]
    source = tmp_path / "source"
    comfy_harness.clone_repository(source)
    subprocess.run(
        [sys.executable, "-m", "pip", *command, str(site), str(source)], check=True
    )

    def one_line(target):
        target.mkdir()
        text = "import schemes.blockwise_fp8\nNODE_CLASS_MAPPINGS = {}\n"
        (target / "__init__.py").write_text(text)

    server = comfy_harness.Server(
        comfy_harness.releases()[release],
        base / "installed",
        models,
        {"one_line": one_line},
        {"PYTHONPATH": str(site)},
    )
    with server:
        latent = server.latent("fp8")
    assert relative_error(latent, expected["exact"]) < ROUNDING
