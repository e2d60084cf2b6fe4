"""The contract in each real ComfyUI there is: see ``contract_case.py``."""

from __future__ import annotations

import comfy_harness  # its folder is put on the path in conftest.py
import pytest

pytestmark = [pytest.mark.comfyui, pytest.mark.thorough]

CASE = "contract_case.py"
#: Two ways to compute the same in float32.
ROUNDING = 1e-6
#: What quantizing the sum of a weight and a LoRA costs at most, in 4 bits.
QUANTIZED = 0.02
WAYS = ("stock loader", "second load", "load quantized", "quantize model")
WAYS += ("quantize again",)
FILES = ("ModelSave", "ModelSave, low VRAM", "our node")
HOOKS = ("select_scheme", "create_params", "bind_forward", "init")


# -- which questions are asked ---------------------------------------------------------


@pytest.mark.parametrize("way", [*WAYS, "text encoder"])
def test_every_way_in_asks_the_same_in_the_same_order(case, way):
    """Scheme, tensors, forward, done: each once for each layer, about that layer."""
    found = case["questions"][way]
    assert found["wrong"] == []
    assert found["layers"] == found["claimed"] > 10
    assert found["identify"] == (0 if way.startswith("quantize") else 1)


@pytest.mark.parametrize("way", WAYS)
def test_a_module_changes_between_the_third_question_and_the_last(case, way):
    """A layer is dense while plugins decide, and quantized when they are told."""
    assert case["questions"][way]["dense before"]
    assert case["questions"][way]["quantized after"]


@pytest.mark.parametrize("way", WAYS)
def test_nobody_is_asked_in_a_forward_and_a_copy_is_told(case, way):
    """Forwards, LoRAs and clones ask nothing; a copied layer gets a forward."""
    found = case["questions"][way]
    assert found["later"] == []
    assert found["copy"] == ["bind_forward", "init"]
    assert found["copy is told"]


# -- what answers do -------------------------------------------------------------------


def test_a_plugin_s_answer_is_what_a_layer_of_a_file_becomes(case):
    """Another scheme's claim, other tensors and another forward each have effect."""
    found = case["answers"]
    name, error = found["claim"]
    assert name == "contract_doubled"
    assert error < ROUNDING
    assert found["tensors"] < ROUNDING
    assert found["forward"] == 0.0
    assert found["calls"]


@pytest.mark.parametrize("way", ["load quantized", "quantize model"])
def test_a_plugin_s_answer_is_what_a_layer_quantized_here_becomes(case, way):
    """A scheme by its name, and tensors of its own making."""
    assert case["answers"][f"{way}: scheme"] == ["contract_doubled", True]
    assert case["answers"][f"{way}: tensors"]


@pytest.mark.parametrize("hook", ["identify", *HOOKS])
def test_a_failing_plugin_stops_no_load(case, hook):
    """The model is as it would be without it; what failed is logged and kept."""
    found = case["failures"][hook]
    assert found["error"] == 0.0
    assert found["lines"] == found["problems"] >= 1
    assert found["line"].startswith(f"plugin plugin0: hijack_{hook}")
    assert found["line"].endswith("RuntimeError: out of ideas")


@pytest.mark.parametrize("hook", ["identify", *HOOKS])
def test_a_failing_plugin_is_an_error_if_strict(case, hook):
    """The error names plugin, hook and layer; nothing is left of the attempt."""
    found = case["failures"][hook]
    assert found["strict"].startswith("PluginError: ")
    for words in ("plugin plugin0", f"hijack_{hook}", "out of ideas"):
        assert words in found["strict"]
    assert ("transformer_blocks.0." in found["strict"]) == (hook != "identify")
    assert found["left alive"] == 0
    assert found["next load"] == 0.0


@pytest.mark.parametrize("hook", HOOKS)
def test_no_layer_is_half_changed(case, hook):
    """After the error the layer can be loaded as any other of ComfyUI's."""
    assert case["half changed"][hook] == [True, True, True]


# -- the forward that runs -------------------------------------------------------------


def modes_of(version):
    """How weights may be loaded with a release."""
    modes = ["full", "low VRAM", "device, full", "device, half", "device, none"]
    if comfy_harness.has_dynamic_vram(comfy_harness.releases()[version]):
        modes += ["dynamic, all", "dynamic, none", "dynamic, half"]
    return modes


@pytest.fixture
def modes(request, case):
    """How weights may be loaded with the release of the case."""
    return modes_of(request.node.callspec.params["case"])


LORAS = ("plain", "dora", "loha", "diff")


@pytest.mark.parametrize("scheme", ["Rows", "Counting", "Activation"])
def test_the_scheme_s_forward_runs_however_weights_are_loaded(case, scheme, modes):
    """Its output is that of the forward called by itself, to the last bit."""
    found = case["forwards"][scheme]
    errors = {mode: found[f"{mode}, none"]["error"] for mode in modes}
    assert errors == dict.fromkeys(modes, 0.0)


def test_that_is_another_than_the_decoded_weight_s(case):
    """So the check above can fail, where the forward quantizes its input."""
    assert case["forwards"]["Activation"]["effect of the forward"] > 1000 * ROUNDING
    assert case["forwards"]["Activation"]["network"] > 1000 * ROUNDING


def test_without_a_forward_of_its_own_a_scheme_is_exact(case):
    """The network's output is that of the decoded weights, to the last bit."""
    assert case["forwards"]["Rows"]["network"] == 0.0
    assert case["forwards"]["Counting"]["network"] == 0.0


@pytest.mark.parametrize("scheme", ["Rows", "Counting", "Activation"])
@pytest.mark.parametrize("kind", LORAS)
def test_loras_are_added_after_the_forward(case, scheme, kind, modes):
    """The forward's output and the input times the LoRA; without it, as before."""
    for mode in modes:
        found = case["forwards"][scheme][f"{mode}, {kind}"]
        assert found["error"] < ROUNDING, mode
        assert found["removed"], mode


def test_the_forward_is_called_once_with_everything_where_the_input_is(case, modes):
    """One call each, with or without LoRA; weight and bias are on the same device."""
    found = case["forwards"]["Counting"]
    for mode in modes:
        for kind in ("none", *LORAS):
            entry = found[f"{mode}, {kind}"]
            assert entry["calls"] == 1, (mode, kind)
            assert entry["devices"] == [entry["device"]], (mode, kind)
        calls, layers = found[f"{mode}, none"]["network"]
        assert calls == layers > 20, mode
        assert (found[f"{mode}, none"]["device"] == "cpu") == (
            mode in ("full", "low VRAM")
        )


def test_dynamic_vram_merges_and_falls_back_with_the_forward(case, modes):
    """Merged on demand it runs from the first step on, and so it does on the CPU."""
    if "dynamic, all" not in modes:
        pytest.skip("this ComfyUI has no dynamic VRAM")
    merging = case["dynamic merging"]
    assert merging["calls"] == 3
    assert merging["same"]
    assert merging["error"] < QUANTIZED
    assert case["dynamic on CPU"]["calls"] == 1
    assert case["dynamic on CPU"]["error"] < ROUNDING


@pytest.mark.parametrize("mode", ["full", "low VRAM"])
def test_threads_run_forwards_at_once(case, mode):
    """Every one has the LoRA, and the module is afterwards what it was."""
    assert case["threads"][mode] == {"wrong": 0, "unchanged": True}


# -- files -----------------------------------------------------------------------------

ROUND_TRIPS = {
    ("dialects", "torchao"): ["blockwise_fp8: weight", "blockwise_fp8: weight_scale"],
    ("dialects", "quanto"): ["blockwise_fp8: weight", "blockwise_fp8: weight_scale"],
    ("dialects", "dotted"): [
        "contract_dotted_rows: row_scale",
        "contract_dotted_rows: weight",
    ],
    ("dialects", "native dots"): [
        "contract_nibbles: weight",
        "contract_nibbles: weight.absmax",
        "contract_nibbles: weight.quant_state.nibbles",
    ],
    ("mixed", "two"): [
        "blockwise_fp8: weight",
        "blockwise_fp8: weight_scale",
        "contract_rows: row_scale",
        "contract_rows: weight",
    ],
    ("mixed", "three"): [
        "blockwise_fp8: weight",
        "blockwise_fp8: weight_scale",
        "contract_nibbles: weight",
        "contract_nibbles: weight.absmax",
        "contract_nibbles: weight.quant_state.nibbles",
        "contract_rows: row_scale",
        "contract_rows: weight",
    ],
}


@pytest.fixture(params=list(ROUND_TRIPS), ids=lambda trip: trip[1])
def trip(request):
    """One file: a spelling, or a mixture of schemes."""
    return request.param


@pytest.fixture
def found(case, trip):
    """What was found for it."""
    return case[trip[0]][trip[1]]


def test_a_file_is_read_exactly_whatever_its_keys_are(found, trip):
    """The network is the exact one, and says ``weight`` and the schemes' own names."""
    loaded, expected = found["layers"]
    assert loaded == expected > 20
    assert found["error"] < ROUNDING
    assert found["live"] == ROUND_TRIPS[trip]


def test_loras_and_merges_take_effect_whatever_the_keys_are(found):
    """As on the dense model, in low VRAM too, and where models are merged."""
    assert found["effect"] > 1000 * ROUNDING
    assert found["lora"] < ROUNDING
    assert found["lora, low VRAM"] < ROUNDING
    assert max(found["merged"]) < ROUNDING


@pytest.mark.parametrize("way", FILES)
def test_a_saved_file_loads_again_with_all_its_schemes(found, trip, way):
    """In ComfyUI and in plain torch, with the keys it came with."""
    saved = found[way]
    if trip[1] != "quanto":  # it is read, and never written
        assert saved["keys"] == []
    assert saved["error"] < ROUNDING
    assert saved["schemes"]
    assert saved["torch"] == []


@pytest.mark.parametrize("way", FILES)
def test_a_lora_is_saved_whatever_the_keys_are(found, way):
    """Quantized into the weights, with scales that go with them."""
    assert found["effect"] > QUANTIZED
    assert found[way]["lora"] < QUANTIZED


# -- options, declined layers, targets -------------------------------------------------


@pytest.mark.parametrize("way", ["quantize model", "load quantized"])
def test_options_survive_saving(case, way):
    """A rank of 4 is one of 4 in the next file too, and after a LoRA is saved."""
    found = case["options"][way]
    assert found["rank"] == [[4, 4]]
    for file in FILES:
        assert found[file] == [[[4, 4]], 0.0], file
    assert case["options"]["with a LoRA"] == [[4, 4]]


def test_an_option_that_is_not_there_is_refused(case):
    """The error names the layer, the scheme and the options it has."""
    error = case["options"]["typo"]
    assert error.startswith("SchemeError: transformer_blocks.0")
    assert "has no option 'rnak'; expected options among rank" in error


@pytest.mark.parametrize("way", ["quantize model", "load quantized"])
def test_layers_a_scheme_declines_stay_dense(case, way):
    """The others are quantized, and the model works."""
    layers, fit, finite = case["options"][f"declined, {way}"]
    assert 10 < layers < 28
    assert fit
    assert finite


@pytest.mark.parametrize("way", ["quantize model", "load quantized"])
def test_a_scheme_that_is_not_for_linears_is_refused(case, way):
    """Before anything is read; the error says what it is for."""
    words = "scheme contract_tables is for Embedding, and ComfyUI's layers that"
    assert words in case["options"][f"targets, {way}"]


def test_a_file_of_a_scheme_that_is_not_for_linears_is_decoded(case):
    """Its layers are ComfyUI's own, with the exact weights."""
    assert case["options"]["targets, file"] == [0, 0.0]
