"""hijack's nodes in ComfyUI's page, as users meet them: a real Chromium, headless."""

import importlib.util

import comfy_harness
import page as pages
import pytest
from comfy_harness import PromptError

from hijack.hosts.comfyui.nodes import NODES

pytestmark = pytest.mark.thorough

EXAMPLES = sorted(path.stem for path in pages.WORKFLOWS.glob("*.json"))
#: Examples that need a text encoder and a VAE, which are too large for tests.
WHOLE = ("load-block-fp8", "quantize-online")
#: The first release that the page of the frontend package belongs to.
FIRST = (0, 33)


@pytest.fixture(scope="module")
def server(request, tmp_path_factory):
    """The newest release with hijack, and the files the examples name."""
    releases = comfy_harness.releases()
    if not releases:
        pytest.skip("no ComfyUI found: set HIJACK_TEST_COMFYUI")
    for module in ("aiohttp", "playwright"):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"{module} is missing: install tests/comfyui/requirements.txt")
    if pages.chromium() is None:
        pytest.skip("no Chromium found: apt-get install chromium")
    newest = list(releases)[-1]
    if tuple(comfy_harness._numbers(newest))[:2] < FIRST:
        pytest.skip(f"the page is tested with ComfyUI 0.33 or newer, not {newest}")
    models = request.getfixturevalue("models")
    base = tmp_path_factory.mktemp("page")
    with pages.serve(releases[newest], base, models) as running:
        yield running


@pytest.fixture(scope="module")
def browser(server):
    """A headless Chromium."""
    with pages.browser() as launched:
        yield launched


@pytest.fixture(scope="module")
def shared(browser, server):
    """One page for all tests; a page takes seconds to load."""
    return pages.Page(browser, server)


@pytest.fixture
def page(shared):
    """The page, with an empty graph."""
    shared.clear()
    return shared


@pytest.mark.parametrize(
    ("words", "node", "title"),
    [
        ("Quantize Model", "HijackQuantizeModel", "Quantize Model"),
        ("bake lora", "HijackMergeLoras", "Merge LoRAs into Quantized Weights"),
        ("what is this file", "HijackInspectCheckpoint", "Inspect Checkpoint"),
    ],
    ids=["title", "alias", "question"],
)
def test_typing_into_the_search_finds_nodes(page, words, node, title):
    """The first hit for a title, or for other words for it, is the node."""
    hits = page.search(words)
    assert title in hits[0]
    page.take_first()
    assert page.types() == [node]


@pytest.mark.parametrize("name", EXAMPLES)
def test_an_example_opens(page, name):
    """The page knows every node of an example, and keeps every value."""
    wanted = pages.example(name)
    page.load(wanted)
    kept = {node["id"]: node for node in page.workflow()["nodes"]}
    assert len(kept) == len(wanted["nodes"])
    for node in wanted["nodes"]:
        assert kept[node["id"]]["type"] == node["type"]
        values = kept[node["id"]].get("widgets_values") or []
        assert values == node.get("widgets_values", [])
        assert not page.tab.evaluate(
            "id => app.graph.getNodeById(id).has_errors", node["id"]
        )
    assert len(page.workflow()["links"]) == len(wanted["links"])
    assert page.types().count("Note") == 1


def test_a_workflow_of_before_keeps_its_values(page, server):
    """Inputs that were added come last; any text stays the block size, and it runs."""
    old = pages.example("quantize-on-load-and-save")
    values = ["qwen_image_bf16.safetensors", "blockwise_fp8", "1x48", "", "*norm*"]
    (node,) = [node for node in old["nodes"] if node["type"] == "HijackLoadQuantized"]
    node["widgets_values"] = values
    page.load(old)
    (kept,) = [n for n in page.workflow()["nodes"] if n["id"] == node["id"]]
    assert kept["widgets_values"][: len(values)] == values
    added = kept["widgets_values"][len(values) :]
    inputs = next(n for n in NODES if n.id == "HijackLoadQuantized").inputs
    assert added == [given.default for given in inputs[len(values) :]]
    page.fill("HijackSaveQuantized", "filename_prefix", "before/file")
    entry = server.run(page.prompt())
    texts = [output["text"][0] for output in entry["outputs"].values()]
    assert any("28 layers quantized" in text for text in texts)


@pytest.mark.parametrize("name", WHOLE)
def test_an_example_is_accepted_by_the_server(page, server, name):
    """Nothing stops the prompt before the text encoder or VAE, which are empty here."""
    page.load(pages.example(name))
    first = '"node_type": "(CLIPLoader|VAELoader)"'
    with pytest.raises(PromptError, match=first):
        server.run(page.prompt())


def test_saving_a_quantized_file_works_in_the_page(page, server):
    """Run writes the file, and the nodes show what they have to say."""
    page.load(pages.example("quantize-on-load-and-save"))
    saved = page.workflow()
    page.run()
    (path,) = (server.base / "output" / "diffusion_models").iterdir()
    shown = page.tab.locator("pre").all_inner_texts()
    assert any(f"output/diffusion_models/{path.name}" in text for text in shown)
    assert any("qwen_image_bf16.safetensors: 77 tensors" in text for text in shown)
    values = [node.get("widgets_values") for node in saved["nodes"]]
    assert [n.get("widgets_values") for n in page.workflow()["nodes"]] == values


def test_the_report_is_shown(page):
    """Run shows plot and text, also where the page draws nodes in its new way."""
    page.load(pages.example("report"))
    page.run()
    page.tab.wait_for_function(
        """() => app.graph.nodes.find(
            node => node.type == "SaveImage").imgs?.length > 0"""
    )
    page.set("Comfy.VueNodes.Enabled", True)
    try:
        text = page.tab.locator("[data-node-id] pre")
        text.get_by_text("28 quantized layers, median SQNR").wait_for()
    finally:
        page.set("Comfy.VueNodes.Enabled", False)


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        (
            "block_size",
            "1x64x2",
            "block_size: got '1x64x2', expected ROWSxCOLS such as 1x64 or 128x128",
        ),
        (
            "unet_name",
            "qwen_image_fp8_block64.safetensors",
            "is quantized already; expected dense weights; load it with the Load "
            "Diffusion Model node",
        ),
    ],
    ids=["block size", "quantized already"],
)
def test_an_error_is_shown_in_our_words(page, name, value, sentence):
    """What the page shows of a failed run has the sentence that says what to do."""
    page.load(pages.example("quantize-on-load-and-save"))
    page.fill("HijackLoadQuantized", name, value)
    page.run()
    page.tab.get_by_test_id("error-overlay-see-errors").click()
    panel = page.tab.get_by_test_id("runtime-error-panel")
    panel.get_by_text(sentence).first.wait_for()
