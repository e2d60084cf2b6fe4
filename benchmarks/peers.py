"""Import other projects from their checkouts; none of them is in this repository."""

from __future__ import annotations

import importlib.util
import os
import sys
import types
from pathlib import Path
from types import ModuleType
from unittest import mock

MUSUBI = "HIJACK_PEER_MUSUBI"


def musubi(variable: str = MUSUBI) -> ModuleType | None:
    """musubi-tuner's FP8 module, or None if there is no checkout.

    Only what the module itself imports is replaced: helpers that read files and free
    device memory, none of which its quantizer or its forward use.

    Args:
        variable: the environment variable that holds the path of a checkout.
    """
    root = os.environ.get(variable)
    if not root:
        return None
    path = Path(root) / "src/musubi_tuner/modules/fp8_optimization_utils.py"
    if not path.is_file():
        raise SystemExit(f"{variable}: {path} is no file; set it to a checkout")
    files, device, progress = (
        types.ModuleType("musubi_tuner.utils.safetensors_utils"),
        types.ModuleType("musubi_tuner.utils.device_utils"),
        types.ModuleType("tqdm"),
    )
    for name in ("MemoryEfficientSafeOpen", "TensorWeightAdapter"):
        setattr(files, name, object)
    vars(files)["WeightTransformHooks"] = object
    vars(device)["clean_memory_on_device"] = lambda device: None
    vars(progress)["tqdm"] = lambda iterable, **_: iterable
    stubs = {module.__name__: module for module in (files, device, progress)}
    spec = importlib.util.spec_from_file_location("peer_musubi", path)
    if spec is None or spec.loader is None:
        raise SystemExit(f"{path}: cannot be imported")
    module = importlib.util.module_from_spec(spec)
    packages = {n: types.ModuleType(n) for n in ("musubi_tuner", "musubi_tuner.utils")}
    with mock.patch.dict(sys.modules, {**packages, **stubs}):
        spec.loader.exec_module(module)
    return module
