"""Saving, so that without hijack what is saved is refused and not misread.

transformers only warns of a ``quant_method`` that it does not know, and then takes
quantized data for weights. But it reads no file whose name has a *variant* that nobody
asked for. So the files are saved as a variant, under the model's own names, which the
marker in them has too.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hijack.errors import CheckpointError
from hijack.hosts.config import HijackConfig
from hijack.hosts.libraries import is_quantized
from hijack.hosts.saving import refuse_other_quantizer
from hijack.hosts.transformers.quantizer import HijackQuantizer

Function = Callable[..., Any]

#: The variant in the names of files with quantized weights.
VARIANT = "hijack"


def make_save_pretrained(original: Function) -> Function:
    """Save models with quantized weights, whoever has quantized them."""
    signature = inspect.signature(original)

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _synchronised(self) or getattr(self, "_hf_peft_config_loaded", False):
            return original(self, *args, **kwargs)
        call = signature.bind(self, *args, **kwargs)
        variant = call.arguments.get("variant")
        _refuse_others(Path(call.arguments["save_directory"]), variant)
        call.arguments["variant"] = f"{VARIANT}.{variant}" if variant else VARIANT
        if "save_original_format" in signature.parameters:  # since transformers 5
            call.arguments["save_original_format"] = False
            return original(*call.args, **call.kwargs)
        self._checkpoint_conversion_mapping = {}  # which is the class's
        try:
            return original(*call.args, **call.kwargs)
        finally:
            del self._checkpoint_conversion_mapping

    return save_pretrained


def _refuse_others(folder: Path, variant: str | None) -> None:
    """Refuse a folder with weights that the host would read instead."""
    ending = f".{variant}" if variant else ""
    for name in (
        f"model{ending}.safetensors",
        f"model.safetensors.index{ending}.json",
        f"pytorch_model{ending}.bin",
    ):
        if (folder / name).exists():
            raise CheckpointError(
                f"{folder / name}: holds weights that are read instead of the "
                "quantized ones, expected a folder without; save to another one"
            )


def _synchronised(model: Any) -> bool:
    """Have a model's quantizer be there if, and only if, it is quantized by hijack.

    Returns:
        Whether it is.
    """
    quantizer = getattr(model, "hf_quantizer", None)
    if not is_quantized(model):
        if isinstance(quantizer, HijackQuantizer):  # it was unwrapped
            quantizer.remove_quantization_config(model)
        return False
    if quantizer is None:
        HijackQuantizer(HijackConfig()).attach(model)
    refuse_other_quantizer(model)
    return True
