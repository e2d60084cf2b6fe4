"""ComfyUI's web page in a headless Chromium, with the example workflows' files.

``python page.py FOLDER`` takes the screenshots of ``docs/screenshots`` anew, and the
thumbnails beside the example workflows.
"""

import contextlib
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import comfy_harness
import comfy_models
import node_workflows

WORKFLOWS = comfy_harness.REPOSITORY / "example_workflows"
#: What stands in for the files that the example workflows name.
FP8 = "qwen_image_fp8_block64"
FILES = {"qwen_image_bf16": "bf16", FP8: "fp8"}
LORA = "qwen_image_style_lora.safetensors"
#: Files that only have to be there; nothing can be loaded from them.
EMPTY = (
    "text_encoders/qwen_2.5_vl_7b_fp8_scaled.safetensors",
    "vae/qwen_image_vae.safetensors",
)
FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
#: No tour, and no warnings about versions of packages that play no part here.
SETTINGS = {
    "Comfy.TutorialCompleted": True,
    "Comfy.VersionCompatibility.DisableWarnings": True,
    "Comfy.Minimap.Visible": False,
}
SECONDS = 60
#: What comes and goes by itself is not in pictures.
HIDDEN = "[data-testid=queue-notification-banner] { visibility: hidden }"


def chromium():
    """Where a Chromium is, or None."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


def example(name):
    """One of the example workflows."""
    return json.loads((WORKFLOWS / f"{name}.json").read_text())


def serve(release, base, models):
    """A server with hijack, and every file that the example workflows name.

    Args:
        release: folder of the ComfyUI.
        base: a folder that may be filled.
        models: folder of `comfy_models`.
    """
    named = base / "named"
    named.mkdir()
    for name, small in FILES.items():
        (named / f"{name}.safetensors").symlink_to(models / f"{small}.safetensors")
    packs = {"hijack": comfy_harness.clone_repository}
    server = comfy_harness.Server(release, base / "ComfyUI", named, packs)
    folder = server.base / "models"
    node_workflows.write_loras(models, folder / "loras")
    (folder / "loras" / "one.safetensors").rename(folder / "loras" / LORA)
    for name in EMPTY:
        (folder / name).parent.mkdir()
        (folder / name).touch()
    return server


@contextlib.contextmanager
def browser():
    """A headless Chromium."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        launched = playwright.chromium.launch(
            executable_path=chromium(), headless=True, args=list(FLAGS)
        )
        try:
            yield launched
        finally:
            launched.close()


class Page:
    """ComfyUI's page, with an empty graph.

    Args:
        browser: what `browser` gives.
        server: a running server.
        scale: pixels of a screenshot for each pixel of the page.
    """

    def __init__(self, browser, server, scale=1):
        user = server.base / "user" / "default"
        user.mkdir(parents=True, exist_ok=True)
        (user / "comfy.settings.json").write_text(json.dumps(SETTINGS))
        self.context = browser.new_context(
            viewport={"width": 1600, "height": 900}, device_scale_factor=scale
        )
        self.tab = self.context.new_page()
        self.tab.set_default_timeout(SECONDS * 1000)
        address = f"http://127.0.0.1:{server.port}/"
        self.tab.route(
            lambda url: not url.startswith((address, "data:", "blob:")),
            lambda route: route.abort(),
        )
        self.tab.goto(address)
        # The last thing that it does is to open a workflow of its own.
        self.tab.wait_for_function(
            """() => window.app?.vueAppReady && window.app.graph?.nodes.length > 0"""
        )
        self.tab.wait_for_selector("[data-testid=queue-button]")
        self.tab.evaluate(
            """() => {
                window.ended = 0;
                for (const name of ["execution_success", "execution_error"])
                    app.api.addEventListener(name, () => { window.ended += 1; });
            }"""
        )

    def set(self, name, value):
        """Change one of the page's settings."""
        self.tab.evaluate(
            "([name, value]) => app.ui.settings.setSettingValue(name, value)",
            [name, value],
        )

    def clear(self):
        """Take every node out of the graph."""
        self.tab.evaluate("app.graph.clear()")

    def load(self, workflow):
        """Open a workflow, as if its file were dropped on the page."""
        self.tab.evaluate("workflow => app.loadGraphData(workflow)", workflow)
        self.tab.evaluate(
            'app.extensionManager.command.execute("Comfy.Canvas.FitView")'
        )

    def add(self, kind):
        """Put one node on the graph, wide enough for its title."""
        self.tab.evaluate(
            """kind => {
                const node = LiteGraph.createNode(kind);
                node.setSize([400, node.size[1]]);
                app.graph.add(node);
            }""",
            kind,
        )

    def fill(self, kind, name, value):
        """Set an input of the only node of a type."""
        self.tab.evaluate(
            """([kind, name, value]) => {
                const node = app.graph.nodes.find(node => node.type == kind);
                node.widgets.find(widget => widget.name == name).value = value;
            }""",
            [kind, name, value],
        )

    def types(self):
        """The types of the graph's nodes."""
        return self.tab.evaluate("app.graph.nodes.map(node => node.type)")

    def workflow(self):
        """The graph as the page would save it."""
        return self.tab.evaluate("app.graph.serialize()")

    def prompt(self):
        """The graph as the page would send it to the server."""
        return self.tab.evaluate("app.graphToPrompt().then(made => made.output)")

    def search(self, words):
        """Type words into the node search that an empty spot opens; give the hits."""
        box = self.tab.get_by_placeholder("Add a node")
        for _ in range(SECONDS):
            self.tab.mouse.dblclick(1200, 700)
            self.settle(1000)
            if box.is_visible():
                break
        self.tab.keyboard.type(words)
        hits = self.tab.get_by_role("option")
        hits.first.wait_for()
        self.settle()
        return hits.all_inner_texts()

    def take_first(self):
        """Take the first hit of a search and put the node down."""
        self.tab.keyboard.press("Enter")
        self.tab.get_by_placeholder("Add a node").wait_for(state="hidden")
        self.tab.mouse.click(1200, 700)

    def run(self):
        """Press Run and wait for the end, good or bad."""
        before = self.tab.evaluate("window.ended")
        self.tab.get_by_test_id("queue-button").click()
        self.tab.wait_for_function("before => window.ended > before", arg=before)

    def settle(self, milliseconds=500):
        """Wait for what the page does with a delay."""
        self.tab.wait_for_timeout(milliseconds)

    def shoot(self, path, *kinds):
        """Take a picture of the page, or of nodes and what is between them.

        Args:
            path: a PNG file.
            kinds: types of nodes; none for the whole page.
        """
        clip = None
        if kinds:
            left, top, right, bottom = self.tab.evaluate(
                """kinds => {
                    const nodes = app.graph.nodes.filter(n => kinds.includes(n.type));
                    const [x, y] = app.canvas.ds.offset, scale = app.canvas.ds.scale;
                    const place = app.canvas.canvas.getBoundingClientRect();
                    const edge = (pick, of) => pick(...nodes.map(of));
                    return [
                        (edge(Math.min, n => n.pos[0]) + x - 20) * scale + place.x,
                        (edge(Math.min, n => n.pos[1]) + y - 60) * scale + place.y,
                        (edge(Math.max, n => n.pos[0] + n.size[0]) + x + 20) * scale
                            + place.x,
                        (edge(Math.max, n => n.pos[1] + n.size[1]) + y + 20) * scale
                            + place.y,
                    ];
                }""",
                list(kinds),
            )
            clip = {"x": left, "y": top, "width": right - left, "height": bottom - top}
        self.settle()
        self.tab.screenshot(path=str(path), clip=clip, style=HIDDEN)

    def show(self, kind, scale=1.0):
        """Move the view so that the first node of a type is near the top left."""
        self.tab.evaluate(
            """([kind, scale]) => {
                const node = app.graph.nodes.find(n => n.type == kind);
                const ds = app.canvas.ds;
                ds.scale = scale;
                ds.offset[0] = 120 / scale - node.pos[0];
                ds.offset[1] = 160 / scale - node.pos[1];
                app.graph.setDirtyCanvas(true, true);
            }""",
            [kind, scale],
        )


def take_screenshots(page, folder):
    """Take every picture of ``docs/screenshots``."""
    page.clear()
    page.search("quantize")
    page.shoot(folder / "search.png")
    page.take_first()
    page.clear()
    page.add("HijackMergeLoras")
    page.show("HijackMergeLoras")
    page.shoot(folder / "merge-loras.png", "HijackMergeLoras")
    page.clear()
    page.add("HijackQuantizeFile")
    page.fill("HijackQuantizeFile", "rules", "transformer_blocks.0.*=skip")
    page.run()
    page.show("HijackQuantizeFile")
    page.settle()
    page.shoot(folder / "quantize-file.png", "HijackQuantizeFile")
    page.clear()
    page.add("HijackCompareFiles")
    page.fill("HijackCompareFiles", "other", f"diffusion_models/{FP8}.safetensors")
    page.run()
    page.show("HijackCompareFiles")
    page.settle()
    page.shoot(folder / "compare-files.png", "HijackCompareFiles")
    page.clear()
    page.add("HijackOptions_int8")
    page.show("HijackOptions_int8")
    page.shoot(folder / "options-of-int8.png", "HijackOptions_int8")
    page.clear()
    page.add("HijackConvertFile")
    page.show("HijackConvertFile")
    page.shoot(folder / "convert-file.png", "HijackConvertFile")
    page.load(example("load-block-fp8"))
    page.shoot(folder / "load-block-fp8.png", *page.types())
    page.load(example("quantize-on-load-and-save"))
    page.run()
    page.show("HijackLoadQuantized")
    page.shoot(folder / "load-quantized.png", "HijackLoadQuantized")
    page.shoot(folder / "save-quantized.png", "HijackSaveQuantized")
    page.load(example("quantize-on-load-and-save"))
    page.fill(
        "HijackInspectCheckpoint",
        "file",
        f"diffusion_models/{FP8}.safetensors",
    )
    page.fill("HijackLoadQuantized", "block_size", "1x64x2")
    page.run()
    page.show("HijackInspectCheckpoint")
    page.shoot(folder / "inspect-checkpoint.png", "HijackInspectCheckpoint")
    page.tab.get_by_test_id("error-overlay-dismiss").click()
    page.load(example("report"))
    page.run()
    page.settle(2000)
    page.show("HijackQuantizeModel")
    page.shoot(folder / "quantize-model.png", "HijackQuantizeModel")
    page.show("HijackQuantizationReport", 0.9)
    page.shoot(folder / "report.png", "HijackQuantizationReport", "SaveImage")
    page.load(example("quantize-on-load-and-save"))
    page.fill("HijackLoadQuantized", "block_size", "1x64x2")
    page.run()
    page.show("HijackLoadQuantized")
    page.tab.get_by_test_id("error-overlay-see-errors").click()
    page.settle()
    clip = {"x": 0, "y": 0, "width": 1600, "height": 690}  # above the traceback
    page.tab.screenshot(path=folder / "error.png", clip=clip, style=HIDDEN)


def take_thumbnails(page):
    """Take the picture that ComfyUI shows for each example."""
    for path in sorted(WORKFLOWS.glob("*.json")):
        page.load(example(path.stem))
        page.settle(1500)  # until all of it is in view
        page.shoot(path.with_suffix(".jpg"), *page.types())


def main(folder):
    """Start a server, open its page, and take the screenshots."""
    newest = list(comfy_harness.releases().values())[-1]
    with tempfile.TemporaryDirectory() as made, browser() as launched:
        models = Path(made) / "models"
        models.mkdir()
        script = comfy_models.__file__
        command = [sys.executable, script, str(newest), str(models)]
        subprocess.run(command, check=True)
        with serve(newest, Path(made), models) as server:
            take_screenshots(Page(launched, server), Path(folder))
            take_thumbnails(Page(launched, server))


if __name__ == "__main__":
    main(sys.argv[1])
