"""Saving: quantized layers are written as a file of their dialect has them.

The config says so, in the words of the host, which refuses a method that it does not
know: without hijack nobody takes the quantized data for weights.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from hijack.hosts.config import HijackConfig
from hijack.hosts.diffusers.quantizer import HijackQuantizer
from hijack.hosts.libraries import is_quantized
from hijack.hosts.saving import file_contents, refuse_other_quantizer
from hijack.safetensors_io.header import CONFIG_KEY

Function = Callable[..., Any]


def make_save_pretrained(original: Function) -> Function:
    """Save a model with its quantized layers, whoever quantized them."""

    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = dict(self.config)
        known = isinstance(config.pop(CONFIG_KEY, None), HijackConfig)
        if not is_quantized(self):
            # one that was quantized is dense now, and its config would say otherwise
            instead = _instead(self, config) if known else contextlib.nullcontext()
            with instead:
                return original(self, *args, **kwargs)
        refuse_other_quantizer(self)
        tensors, metadata = file_contents(self)
        own = HijackConfig(metadata=metadata)
        attributes = {
            "state_dict": lambda: tensors,
            "hf_quantizer": HijackQuantizer(own),
        }
        with _instead(self, {**config, CONFIG_KEY: own}, **attributes):
            return original(self, *args, **kwargs)

    return save_pretrained


@contextlib.contextmanager
def _instead(model: Any, config: dict[str, Any], **attributes: Any) -> Iterator[None]:
    """Have a model another config and other attributes meanwhile."""
    changes = {"_internal_dict": type(model.config)(config), **attributes}
    before = {key: vars(model)[key] for key in changes if key in vars(model)}
    vars(model).update(changes)
    try:
        yield
    finally:
        for key in changes:
            del vars(model)[key]
        vars(model).update(before)
