"""Nodes for ComfyUI: quantize, save, inspect and judge quantized models.

Each node is described once, in `spec`'s terms; ComfyUI gets it in its v3 schema where
the release has that, else in the classic one.
"""

from __future__ import annotations

import sys
from pathlib import Path

from hijack.hosts.comfyui.nodes import files, models, report, schemes
from hijack.hosts.comfyui.nodes.spec import Node, classic_class, extension, has_v3

__all__ = ["NODES", "Node", "classic", "extension", "has_v3"]

#: What the page runs; it shows the text of nodes.
SCRIPTS = Path(__file__).parent / "web"

NODES: tuple[Node, ...] = (
    *models.NODES,
    *files.NODES,
    *report.NODES,
    *schemes.option_nodes(),
)


def classic() -> tuple[dict[str, type], dict[str, str]]:
    """``NODE_CLASS_MAPPINGS`` and ``NODE_DISPLAY_NAME_MAPPINGS``."""
    classes = {node.id: classic_class(node) for node in NODES}
    return classes, {node.id: node.title for node in NODES}


def _serve_scripts() -> None:
    """Put our scripts among those ComfyUI's server gives to the page."""
    served = getattr(sys.modules.get("nodes"), "EXTENSION_WEB_DIRS", None)
    if isinstance(served, dict) and SCRIPTS.is_dir():  # or the server would not start
        served["hijack"] = str(SCRIPTS)


_serve_scripts()
