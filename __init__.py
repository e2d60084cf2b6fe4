"""hijack as a ComfyUI node pack: clone this repository into ``custom_nodes``.

A clone whose folder is called ``hijack`` looks like the package from the folder above
it. There this file gives way to the package.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import sys
from pathlib import Path
from typing import Any


def _start() -> dict[str, Any]:
    """Patch ComfyUI, or say in one line why not; ComfyUI goes on either way.

    Returns:
        What ComfyUI looks for in this module: nodes, in the schema it knows.
    """
    log = logging.getLogger("hijack")
    try:
        # Packs get their folder as module name, so that only this form finds the file.
        from . import prestartup_script  # noqa: F401

        importlib.import_module("hijack.public")  # what is missing is said once
        importlib.import_module("schemes").register_all()
        importlib.import_module("hijack.hosts").arm("comfyui")
        return _nodes()
    except ModuleNotFoundError as error:
        if error.name not in ("pluggy", "wrapt"):
            _give_up(log, error)
            return _NOTHING
        requirements = Path(__file__).resolve().parent / "requirements.txt"
        log.warning(
            "hijack: not loaded: %s is not installed; run: %s -m pip install -r %s",
            error.name,
            sys.executable,
            requirements,
        )
    except Exception as error:
        _give_up(log, error)
    return _NOTHING


def _nodes() -> dict[str, Any]:
    if not importlib.import_module("hijack").status()["comfyui"].patched:
        return _NOTHING  # they need what the patches bring
    nodes = importlib.import_module("hijack.hosts.comfyui.nodes")
    if nodes.has_v3():
        return {"comfy_entrypoint": lambda: nodes.extension(nodes.NODES)}
    classes, names = nodes.classic()
    return {"NODE_CLASS_MAPPINGS": classes, "NODE_DISPLAY_NAME_MAPPINGS": names}


def _give_up(log: logging.Logger, error: Exception) -> None:
    if os.environ.get("HIJACK_STRICT", "") not in ("", "0"):
        raise error
    log.warning("hijack: not loaded: %s: %s", type(error).__name__, error)


def _give_way() -> None:
    """Put the package in this module's place, and let it find ``schemes``."""
    root = Path(__file__).resolve().parent
    for name, file in (
        (__name__, root / "hijack" / "__init__.py"),
        ("hijack_prestartup_script", root / "prestartup_script.py"),
    ):
        folder = [str(file.parent)] if file.name == "__init__.py" else None
        spec = importlib.util.spec_from_file_location(
            name, file, submodule_search_locations=folder
        )
        assert spec is not None
        assert spec.loader is not None
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


_NOTHING: dict[str, Any] = {"NODE_CLASS_MAPPINGS": {}}

if __name__ == "hijack":
    _give_way()
elif "comfy" in sys.modules:  # not when a test runner or an editor imports this file
    globals().update(_start())
else:
    NODE_CLASS_MAPPINGS: dict[str, Any] = {}
