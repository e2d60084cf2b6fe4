"""hijack as a ComfyUI node pack: clone this repository into ``custom_nodes``."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from pathlib import Path
from typing import Any

NODE_CLASS_MAPPINGS: dict[str, Any] = {}
NODE_DISPLAY_NAME_MAPPINGS: dict[str, str] = {}

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]


def _start() -> None:
    """Patch ComfyUI, or say in one line why not; ComfyUI goes on either way."""
    log = logging.getLogger("hijack")
    try:
        # Packs get their folder as module name, so that only this form finds the file.
        from . import prestartup_script  # noqa: F401

        importlib.import_module("schemes.blockwise_fp8")
    except ModuleNotFoundError as error:
        if error.name not in ("pluggy", "wrapt"):
            _give_up(log, error)
            return
        requirements = Path(__file__).resolve().parent / "requirements.txt"
        log.warning(
            "hijack: not loaded: %s is not installed; run: %s -m pip install -r %s",
            error.name,
            sys.executable,
            requirements,
        )
    except Exception as error:
        _give_up(log, error)


def _give_up(log: logging.Logger, error: Exception) -> None:
    if os.environ.get("HIJACK_STRICT", "") not in ("", "0"):
        raise error
    log.warning("hijack: not loaded: %s: %s", type(error).__name__, error)


if "comfy" in sys.modules:  # not when a test runner or an editor imports this file
    _start()
