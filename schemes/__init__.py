"""Weight formats that come with hijack; importing one registers it."""

from __future__ import annotations

import importlib
import pkgutil


def register_all() -> None:
    """Register the schemes of this package, where no entry point did.

    One that fails is passed over and reported, as other plugins are. Those that
    ``HIJACK_DISABLE`` names are not imported.
    """
    from hijack.registry import current_registry, disabled

    for module in pkgutil.iter_modules(__path__):
        if not module.name.startswith("_") and not disabled(module.name):
            name = f"{__name__}.{module.name}"
            current_registry().guard(
                module.name, "loading", importlib.import_module, name
            )
