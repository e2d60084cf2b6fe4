"""Nodes for ComfyUI: quantize, save, inspect and judge quantized models.

Each node is described once, in `spec`'s terms; ComfyUI gets it in its v3 schema where
the release has that, else in the classic one.
"""

from __future__ import annotations

from hijack.hosts.comfyui.nodes import files, models, report
from hijack.hosts.comfyui.nodes.spec import Node, classic_class, extension, has_v3

__all__ = ["NODES", "Node", "classic", "extension", "has_v3"]

NODES: tuple[Node, ...] = (*models.NODES, *files.NODES, *report.NODES)


def classic() -> tuple[dict[str, type], dict[str, str]]:
    """``NODE_CLASS_MAPPINGS`` and ``NODE_DISPLAY_NAME_MAPPINGS``."""
    classes = {node.id: classic_class(node) for node in NODES}
    return classes, {node.id: node.title for node in NODES}
