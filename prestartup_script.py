"""Make ``import hijack`` and ``import schemes`` find this clone, in every node pack.

ComfyUI runs this file before it imports anything big, torch included, and before any
node pack: packs whose names sort before ours can build on hijack too. The clone's root
does not go on ``sys.path``, where its ``tests`` would shadow others' modules.
"""

from __future__ import annotations

import importlib.machinery
import importlib.util
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

log = logging.getLogger("hijack")

ROOT = Path(__file__).resolve().parent
PACKAGES = ("hijack", "schemes")


class CloneFinder:
    """Finds the packages of one clone, and nothing else."""

    def __init__(self, root: Path) -> None:
        self.hijack_root = root

    def find_spec(
        self,
        name: str,
        path: Sequence[str] | None = None,
        target: ModuleType | None = None,
    ) -> importlib.machinery.ModuleSpec | None:
        """The spec of one of our packages; their submodules are found through it."""
        if name not in PACKAGES:
            return None
        folder = self.hijack_root / name
        return importlib.util.spec_from_file_location(
            name, folder / "__init__.py", submodule_search_locations=[str(folder)]
        )


def install(root: Path = ROOT) -> None:
    """Let this clone serve the packages, unless another copy does already."""
    loaded = getattr(sys.modules.get("hijack"), "__file__", None)
    served = next(
        (f.hijack_root for f in sys.meta_path if hasattr(f, "hijack_root")), None
    )
    other = Path(loaded).resolve().parents[1] if loaded else served
    if other not in (None, root):
        log.warning("hijack: using the copy in %s, not the one in %s", other, root)
        return
    if served is not None:
        return
    spec = importlib.machinery.PathFinder.find_spec("hijack")
    if spec is not None and spec.origin is not None:
        origin = Path(spec.origin).resolve()
        installed = origin.parents[1]
        # a clone called hijack is found itself from the folder above it
        if installed != root and origin != root / "__init__.py":
            log.warning("hijack: using the clone in %s, not %s", root, installed)
    sys.meta_path.insert(0, CloneFinder(root))  # type: ignore[arg-type]


install()
