"""Loading: which quantizer is asked, which files are read, and as which tensors."""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from hijack.dtypes import DENSE_DTYPES
from hijack.errors import HijackError
from hijack.hosts.config import HijackConfig
from hijack.hosts.libraries import (
    decode_stacks_on_disk,
    is_quantized,
    read_files,
    without_disk,
)
from hijack.hosts.transformers.quantizer import HijackQuantizer
from hijack.hosts.transformers.saving import VARIANT
from hijack.safetensors_io.header import QUANT_METHOD
from hijack.text import logger

log = logger(__name__)

Function = Callable[..., Any]


# -- which quantizer -------------------------------------------------------------------


def make_get_hf_quantizer(original: Function) -> Function:
    """hijack's quantizer where it is asked for, or the host's own refuses."""

    def get_hf_quantizer(
        config: Any, quantization_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        asked = _as_hijack(quantization_config)
        if asked is not None:
            _forget(config)  # what it says of the files, the files say too
            return original(config, asked, *args, **kwargs)
        try:
            return original(config, quantization_config, *args, **kwargs)
        except Exception as error:
            method = _forget(config)
            if quantization_config is not None or method in (None, QUANT_METHOD):
                raise
            log.warning(
                "hijack: transformers cannot use quant_method %s here; hijack reads "
                "the file: %s",
                method,
                error,
            )
            result = original(config, HijackConfig(), *args, **kwargs)
            result[0].refused = error
            return result

    return get_hf_quantizer


def _as_hijack(given: Any) -> HijackConfig | None:
    """The config if it is one of hijack's, which may be given as a table."""
    if isinstance(given, Mapping) and given.get("quant_method") == QUANT_METHOD:
        return HijackConfig(**given)
    return given if isinstance(given, HijackConfig) else None


def _forget(config: Any) -> str | None:
    """Take the ``quantization_config`` out of a model's config.

    Returns:
        The method it names; None if there is no such config.
    """
    method = None
    parts = [getattr(config, name, None) for name in config.sub_configs]
    for part in (config, *parts):
        found = getattr(part, "quantization_config", None)
        if found is not None:
            del part.quantization_config
            table = found if isinstance(found, Mapping) else vars(found)
            name = table.get("quant_method")
            method = method or str(getattr(name, "value", name))
    return method


# -- which files -----------------------------------------------------------------------


def make_get_resolved_checkpoint_files(original: Function) -> Function:
    """Find the files that `save_pretrained` writes where hijack has patched it."""
    signature = inspect.signature(original)

    def get_resolved_checkpoint_files(*args: Any, **kwargs: Any) -> Any:
        try:
            return original(*args, **kwargs)
        except OSError as error:
            call = signature.bind(*args, **kwargs)
            variant = call.arguments.get("variant")
            call.arguments["variant"] = f"{VARIANT}.{variant}" if variant else VARIANT
            try:
                return original(*call.args, **call.kwargs)
            except OSError:
                raise error from None

    return get_resolved_checkpoint_files


def make_get_state_dict_dtype(original: Function) -> Function:
    """The dtype of a checkpoint is that of its dense tensors, not of its codes."""

    def get_state_dict_dtype(state_dict: Mapping[str, Tensor]) -> Any:
        layers = {
            key.rpartition(".")[0]
            for key, tensor in state_dict.items()
            if tensor.dtype not in DENSE_DTYPES
        }
        dense = {
            key: tensor
            for key, tensor in state_dict.items()
            if tensor.dtype in DENSE_DTYPES and key.rpartition(".")[0] not in layers
        }
        dtype = original(dense or state_dict)
        quantized = dtype.is_floating_point and dtype not in DENSE_DTYPES
        return torch.bfloat16 if quantized else dtype

    return get_state_dict_dtype


# -- which tensors ---------------------------------------------------------------------


def make_load_pretrained_model(original: Function) -> Function:
    """Give the host one tensor for each weight, where any is quantized."""
    signature = inspect.signature(original)

    def load_pretrained_model(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        call.apply_defaults()
        given = call.arguments
        new = "load_config" in given  # since transformers 5
        settings = vars(given["load_config"]) if new else given
        quantizer = settings["hf_quantizer"]
        dtype, state_dict = settings["dtype"], given["state_dict"]
        weights = read_files(
            (state_dict is None and given["checkpoint_files"]) or (),
            state_dict,
            quantizer,
            # a cast would copy what is mapped from the file
            dtype=dtype if dtype in DENSE_DTYPES else torch.float32,
            load=sys.modules["transformers.modeling_utils"].load_state_dict,
        )
        if not isinstance(quantizer, HijackQuantizer | None):
            return original(*args, **kwargs)
        changes, device_map = dict[str, Any](), settings["device_map"]
        if weights is not None:
            given["state_dict"], changes["sharded_metadata"] = weights, None
        if device_map and (weights is not None or quantizer is not None):
            # what is to be on the disk is written there when it is quantized
            changes["device_map"] = without_disk(device_map)
        if new:
            config = dataclasses.replace(given["load_config"], **changes)
            changes = {"load_config": config}
        given.update(changes)
        result = original(*call.args, **call.kwargs)
        if not new:
            given["model"].tie_weights()
            _finish(given["model"], quantizer, device_map)
        return result

    return load_pretrained_model


def make_finalize_model_loading(original: Function) -> Function:
    """Make a model quantized once its weights are complete and tied."""

    def finalize_model_loading(
        model: nn.Module, load_config: Any, *args: Any, **kwargs: Any
    ) -> Any:
        quantizer = load_config.hf_quantizer
        try:
            result = original(model, load_config, *args, **kwargs)
        except RuntimeError as error:  # which says "some issues"
            reason = getattr(quantizer, "error", None)
            if not isinstance(reason, HijackError):
                raise
            raise reason from error
        _finish(model, quantizer, load_config.device_map)
        return result

    return finalize_model_loading


def _finish(
    model: nn.Module, quantizer: Any, device_map: Mapping[str, Any] | None
) -> None:
    if quantizer is None and is_quantized(model):
        quantizer = HijackQuantizer(HijackConfig())
    if isinstance(quantizer, HijackQuantizer):
        quantizer.finish(model)
        decode_stacks_on_disk(model, device_map or {})
