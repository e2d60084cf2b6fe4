"""The one place where diffusion models enter: ``model_config_from_unet``.

Every loader of ComfyUI asks it what a state dict is. Here the layers that a scheme
claims become `Coded` tensors in that state dict, and the answer, a config object of
this model alone, gets operations that take them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hijack.hosts.comfyui.claims import encode_claimed, encode_others
from hijack.hosts.comfyui.coded import Coded
from hijack.hosts.comfyui.layers import make_operations

#: The same in every release; somebody's wrapper may hide them.
ARGUMENTS = ("state_dict", "unet_key_prefix", "use_base_if_no_match", "metadata")


def make_door(original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of ``model_config_from_unet``."""

    @functools.wraps(original)
    def model_config_from_unet(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
        state_dict, prefix = given["state_dict"], given["unet_key_prefix"]
        coded = encode_claimed(state_dict, prefix, given.get("metadata"))
        if prefix:  # a whole checkpoint, whose other models are built from it next
            encode_others(state_dict, prefix, given.get("metadata"))
        config = original(*args, **kwargs)
        if coded and config is not None:
            adopt(config, state_dict, prefix)
        return config

    return model_config_from_unet


# -- the config ------------------------------------------------------------------------


def adopt(config: Any, state_dict: Mapping[str, Tensor], prefix: str) -> None:
    """Give a model's config the right dtypes and our operations.

    Both are set when the loader sets dtypes, on the object, and not before: only then
    are the dtypes known, and some loaders overwrite what is set earlier.
    """
    chosen = _Choice(config, state_dict, prefix)
    set_dtype, process = config.set_inference_dtype, config.process_unet_state_dict

    def set_inference_dtype(dtype: Any, cast: Any, *args: Any, **kwargs: Any) -> Any:
        dtype, cast = chosen.dtypes(dtype, cast, kwargs.get("device"))
        result = set_dtype(dtype, cast, *args, **kwargs)
        if config.custom_operations is None:
            base = core_operations(config)
            config.custom_operations = make_operations(base, cast or dtype)
        return result

    def process_unet_state_dict(state_dict: dict[str, Tensor]) -> Any:
        processed = process(state_dict)
        dtype = config.unet_config.get("dtype") or torch.float32
        for key, tensor in processed.items():
            # Only a Linear carries codes, and this is none.
            if isinstance(tensor, Coded) and tensor.ndim != 2:
                processed[key] = tensor.dense(dtype)
        return processed

    config.set_inference_dtype = set_inference_dtype
    config.process_unet_state_dict = process_unet_state_dict


@dataclasses.dataclass
class _Choice:
    """Which dtypes ComfyUI would choose if the claimed layers were not quantized."""

    config: Any
    state_dict: Mapping[str, Tensor]
    prefix: str

    def __post_init__(self) -> None:
        utils = sys.modules["comfy.utils"]
        plain = {
            k: t
            for k, t in self.state_dict.items()
            if k.startswith(self.prefix) and not isinstance(t, Coded)
        }
        self.parameters = utils.calculate_parameters(self.state_dict, self.prefix)
        self.weight_dtype = utils.weight_dtype(plain, self.prefix)
        del self.state_dict  # or the config would keep the file in memory

    def dtypes(self, dtype: Any, cast: Any, device: Any) -> tuple[Any, Any]:
        """The weights' dtype and the one to cast to, given what ComfyUI inferred."""
        if dtype is None or dtype.itemsize > 1:
            return dtype, cast
        management = sys.modules["comfy.model_management"]
        supported = list(self.config.supported_inference_dtypes)
        chosen = management.unet_dtype(
            model_params=self.parameters,
            supported_dtypes=supported,
            weight_dtype=self.weight_dtype,
        )
        if chosen.itemsize == 1:  # --fp8_e4m3fn-unet, or the rest is unscaled FP8
            chosen = cast or supported[0]
        device = management.get_torch_device() if device is None else device
        return chosen, management.unet_manual_cast(chosen, device, supported)


def core_operations(config: Any) -> Any:
    """The operations ComfyUI would pick for the layers that are not quantized."""
    pick = sys.modules["comfy.ops"].pick_operations
    accepted = inspect.signature(pick).parameters
    options = {
        "fp8_optimizations": config.optimizations.get("fp8", False),
        "scaled_fp8": None,
        "model_config": config,
    }
    options = {name: value for name, value in options.items() if name in accepted}
    return pick(config.unet_config.get("dtype"), config.manual_cast_dtype, **options)
