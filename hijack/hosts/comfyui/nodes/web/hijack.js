// Shows a node's text below its inputs: of itself the page shows only pictures.
import { app } from "../../scripts/app.js";

const NAME = "hijack_text";

function show(node, output) {
  if (!output?.text) return;
  const text = [output.text].flat().join("\n");
  const lines = text.split("\n");
  let widget = node.widgets?.find((each) => each.name === NAME);
  if (!widget) {
    const element = document.createElement("pre");
    element.style.cssText =
      "margin: 0; padding: 6px; overflow: auto; user-select: text; " +
      "font: 11px/1.4 monospace; color: var(--input-text); " +
      "background: var(--comfy-input-bg);";
    // Neither in the workflow nor in the prompt: it is no input.
    widget = node.addDOMWidget(NAME, NAME, element, {
      serialize: false,
      getMinHeight: () => Math.min(16 * lines.length + 18, 130),
    });
    widget.serialize = false;
    const columns = Math.max(...lines.map((line) => line.length));
    const [width, height] = node.computeSize();
    node.setSize([
      Math.min(Math.max(node.size[0], width, 7 * columns + 50), 700),
      Math.max(node.size[1], height + Math.min(16 * Math.max(lines.length - 7, 0), 270)),
    ]);
  }
  widget.element.textContent = text;
  app.graph.setDirtyCanvas(true);
}

app.registerExtension({
  name: "hijack.text",
  beforeRegisterNodeDef(nodeType, nodeData) {
    if (!nodeData.name.startsWith("Hijack")) return;
    const before = nodeType.prototype.onExecuted;
    nodeType.prototype.onExecuted = function (output) {
      before?.apply(this, arguments);
      show(this, output);
    };
  },
});
