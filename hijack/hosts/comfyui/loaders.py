"""The one place where diffusion models enter: ``model_config_from_unet``.

Every loader of ComfyUI asks it what a state dict is. Here each layer that a scheme
claims becomes one `QuantizedTensor` in that state dict, and the answer, a config object
of this model alone, gets operations that take them.
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

from hijack.errors import HijackError
from hijack.hosts.comfyui.detection import encode_claimed, encode_others
from hijack.hosts.comfyui.file_tensors import file_tensors
from hijack.hosts.comfyui.operations import make_operations
from hijack.hosts.comfyui.reader import open_file
from hijack.quantized import QuantizedTensor
from hijack.safetensors_io.header import join
from hijack.text import logger

log = logger(__name__)

#: The same in every release; somebody's wrapper may hide them.
ARGUMENTS = ("state_dict", "unet_key_prefix", "use_base_if_no_match", "metadata")

#: Methods of a model's config that are replaced on the object.
SHADOWED = ("set_inference_dtype", "get_model", "process_unet_state_dict")


def make_model_config_from_unet(original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of ``model_config_from_unet``."""
    name_arguments = _name_arguments(original)

    @functools.wraps(original)
    def model_config_from_unet(*args: Any, **kwargs: Any) -> Any:
        given = name_arguments(*args, **kwargs)
        state_dict, prefix = given.get("state_dict"), given.get("unet_key_prefix")
        if not isinstance(state_dict, dict) or not isinstance(prefix, str):
            return original(*args, **kwargs)
        open_file(state_dict)
        file = dict(state_dict)
        try:
            quantized = encode_claimed(state_dict, prefix, given.get("metadata"))
        except HijackError as error:
            config = original(*args, **kwargs)
            if not hasattr(config, "get_model"):
                raise
            refuse(config, error)
            return config
        if prefix:  # a whole checkpoint, whose other models are built from it next
            encode_others(state_dict, prefix, given.get("metadata"))
        config = original(*args, **kwargs)
        vision = getattr(config, "clip_vision_prefix", None)
        if prefix and vision:  # is built next too, without a way to keep them quantized
            _decode(state_dict, vision)
        if quantized and config is not None:
            _check(config)
            adopt(config, state_dict, prefix, file)
        return config

    return model_config_from_unet


def _decode(state_dict: dict[str, Tensor], prefix: str) -> None:
    """Turn the quantized weights whose keys start with a prefix into dense ones."""
    for key, tensor in state_dict.items():
        if key.startswith(prefix) and isinstance(tensor, QuantizedTensor):
            state_dict[key] = tensor.value(tensor.dtype)


def make_diffusers_unet(original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of ``model_config_from_diffusers_unet``.

    ComfyUI asks it for a UNet in diffusers' names, when the other one knew nothing.
    """

    @functools.wraps(original)
    def model_config_from_diffusers_unet(
        state_dict: dict[str, Tensor], *args: Any, **kwargs: Any
    ) -> Any:
        open_file(state_dict)
        file = dict(state_dict)
        quantized = encode_claimed(state_dict)
        config = original(state_dict, *args, **kwargs)
        if quantized and config is not None:
            _check(config)
            adopt(config, state_dict, "", file)
        return config

    return model_config_from_diffusers_unet


def _name_arguments(original: Callable[..., Any]) -> Callable[..., dict[str, Any]]:
    """A function that gives the arguments of a call by name, if they can be known."""
    try:
        signature = inspect.signature(original)
    except (TypeError, ValueError):
        signature = inspect.Signature()

    def name_arguments(*args: Any, **kwargs: Any) -> dict[str, Any]:
        if ARGUMENTS[0] not in signature.parameters:  # somebody's wrapper
            return {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
        try:
            return dict(signature.bind(*args, **kwargs).arguments)
        except TypeError:  # which the original will say better
            return {}

    return name_arguments


def _check(config: Any) -> None:
    """What this ComfyUI answers must be what `adopt` changes.

    Raises:
        HijackError: if it is not.
    """
    missing = [name for name in SHADOWED if not callable(getattr(config, name, None))]
    if missing:
        raise HijackError(
            "comfy.model_detection.model_config_from_unet: gave what hijack does not "
            f"know; got a {type(config).__name__}, expected an object with "
            f"{', '.join(missing)}; get a hijack for this ComfyUI"
        )


# -- the config ------------------------------------------------------------------------


def refuse(config: Any, error: HijackError) -> None:
    """Let nobody build the model but a loader that brings its own operations."""
    build = config.get_model

    def get_model(*args: Any, **kwargs: Any) -> Any:
        if config.custom_operations is None:
            raise error
        return build(*args, **kwargs)

    config.get_model = get_model


def adopt(
    config: Any,
    state_dict: Mapping[str, Tensor],
    prefix: str,
    file: Mapping[str, Tensor],
) -> None:
    """Give a model's config the right dtypes and our operations.

    Both are set when the loader sets dtypes, on the object, and not before: only then
    are the dtypes known, and some loaders overwrite what is set earlier. Others then
    put in operations that read the file themselves, and get it as it was.

    Args:
        config: of one model.
        state_dict: with quantized layers.
        prefix: of the model's keys.
        file: the state dict without them.
    """
    chosen, undo = _Choice(config, state_dict, prefix), _Undo(file, state_dict, prefix)
    set_dtype, process = config.set_inference_dtype, config.process_unet_state_dict
    build = config.get_model
    ours = {"operations": None}

    def set_inference_dtype(dtype: Any, cast: Any, *args: Any, **kwargs: Any) -> Any:
        undo.set_dtype = functools.partial(set_dtype, dtype, cast, *args, **kwargs)
        dtype, cast = chosen.dtypes(dtype, cast, kwargs.get("device"))
        result = set_dtype(dtype, cast, *args, **kwargs)
        if config.custom_operations is None:
            base = core_operations(config)
            ours["operations"] = make_operations(base, cast or dtype)
            config.custom_operations = ours["operations"]
        return result

    def get_model(state_dict: dict[str, Tensor], *args: Any, **kwargs: Any) -> Any:
        if config.custom_operations not in (None, ours["operations"]):
            log.info("hijack: left to the loader, which has operations of its own")
            undo(state_dict)
        undo.forget()
        return build(state_dict, *args, **kwargs)

    def process_unet_state_dict(state_dict: dict[str, Tensor]) -> Any:
        processed = process(state_dict)
        dtype = config.unet_config.get("dtype") or torch.float32
        for key, tensor in processed.items():
            # only a Linear keeps a quantized weight, and this is none
            if isinstance(tensor, QuantizedTensor) and tensor.ndim != 2:
                processed[key] = tensor.dense(dtype)
        return processed

    config.set_inference_dtype = set_inference_dtype
    config.get_model = get_model
    config.process_unet_state_dict = process_unet_state_dict


class _Undo:
    """Takes quantized layers out of a state dict again, and dtypes chosen for them.

    Args:
        file: the state dict as it was.
        quantized: and as it is.
        prefix: only keys that start with it are looked at.
    """

    def __init__(
        self, file: Mapping[str, Tensor], quantized: Mapping[str, Tensor], prefix: str
    ) -> None:
        self.prefix = prefix
        self.file = {
            key: tensor
            for key, tensor in file.items()
            if key.startswith(prefix) and quantized.get(key) is not tensor
        }
        self.set_dtype: Callable[[], Any] = lambda: None

    def __call__(self, state_dict: dict[str, Tensor]) -> None:
        for key, tensor in list(state_dict.items()):
            if isinstance(tensor, QuantizedTensor) and key.startswith(self.prefix):
                del state_dict[key]
                if key not in self.file:  # renamed since, and maybe joined with others
                    layer = key.rpartition(".")[0]
                    for name, part in file_tensors(tensor).items():
                        state_dict[join(layer, name)] = part
        state_dict.update(self.file)
        self.set_dtype()

    def forget(self) -> None:
        """Keep no tensor of the file in memory."""
        self.file = {}


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
            if k.startswith(self.prefix) and not isinstance(t, QuantizedTensor)
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
