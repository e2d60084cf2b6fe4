"""Loading: the host is given one tensor for each weight, and places it itself."""

from __future__ import annotations

import contextvars
import inspect
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from hijack.errors import CheckpointError
from hijack.hosts.checkpoint import TravellingWeight, adopt, cropped, read_quantized
from hijack.hosts.config import HijackConfig
from hijack.hosts.libraries import read_files, remember, without_disk
from hijack.hosts.quantizer import Quantizer
from hijack.safetensors_io.header import QUANT_METHOD

Function = Callable[..., Any]

#: What a config calls its method.
METHOD = "quant_method"
_PARTS = "diffusers.models.model_loading_utils"


# -- folders ---------------------------------------------------------------------------


def make_merge_quantization_configs(original: Function) -> Function:
    """What a user asks for, where a folder says already that it is quantized."""

    def merge_quantization_configs(cls: Any, said: Any, asked: Any) -> Any:
        if not isinstance(asked, HijackConfig):
            return original(cls, said, asked)
        if asked.scheme is not None:
            raise CheckpointError(
                f"quantization_config: got {asked} for a folder that is quantized "
                "already, expected none; leave it out"
            )
        method = dict(said if isinstance(said, Mapping) else vars(said)).get(METHOD)
        ours = getattr(method, "value", method) == QUANT_METHOD
        return original(cls, said, None) if ours else asked

    return merge_quantization_configs


def make_load_pretrained_model(original: Function) -> Function:
    """Read all files of a folder at once: a scale may be in another than its weight."""
    signature = inspect.signature(original)

    def _load_pretrained_model(cls: Any, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(cls, *args, **kwargs)
        given = call.arguments
        if given.get("dduf_entries"):
            return original(cls, *args, **kwargs)
        weights = read_files(
            given["resolved_model_file"] or [],
            given["state_dict"],
            given.get("hf_quantizer"),
            load=sys.modules[_PARTS].load_state_dict,
        )
        if weights is None:
            if isinstance(given.get("hf_quantizer"), Quantizer):
                given["hf_quantizer"].refuse_dense()
            return original(cls, *args, **kwargs)
        if given.get("tp_shard_specs") is not None:
            raise CheckpointError(
                f"{given['pretrained_model_name_or_path']}: got quantized layers to "
                "load in slices, expected dense ones; load the model whole, then call "
                "torch's parallelize_module"
            )
        given["model"]._fix_state_dict_keys_on_load(weights)
        weights = cropped(weights, given["model"])
        given |= {"state_dict": weights, "loaded_keys": list(weights)}
        if given.get("device_map"):
            devices = without_disk(given["device_map"])  # accelerate writes there
            given |= {"device_map": devices, "offload_state_dict": False}
        return original(*call.args, **call.kwargs)

    return _load_pretrained_model


# -- single files ----------------------------------------------------------------------

#: How a file is read that a model is loaded from; None leaves it to the host.
_ASSUME: contextvars.ContextVar[Sequence[str] | None] = contextvars.ContextVar(
    "hijack_assume", default=()
)


def make_load_state_dict(original: Function) -> Function:
    """Read a file before its tensors are renamed and split."""

    def load_state_dict(checkpoint_file: Any, *args: Any, **kwargs: Any) -> Any:
        weights, assume = None, _ASSUME.get()
        if assume is not None and isinstance(checkpoint_file, str | os.PathLike):
            path = os.fspath(checkpoint_file)
            if path.endswith(".safetensors"):
                weights = read_quantized(path, assume=assume)
        if weights is None:
            return original(checkpoint_file, *args, **kwargs)
        return weights

    return load_state_dict


def make_from_single_file(original: Function) -> Function:
    """Read a state dict that a user gives, and files as a config says."""
    name = "pretrained_model_link_or_path_or_dict"

    def from_single_file(cls: Any, *args: Any, **kwargs: Any) -> Any:
        config = kwargs.get("quantization_config")
        ours = config is None or isinstance(config, HijackConfig)
        assume = getattr(config, "assume", ()) if ours else None
        source = args[0] if args else kwargs.get(name)
        if isinstance(source, dict):
            source = _readable(source, assume)
            args, kwargs = args[1:], {**kwargs, name: source}
        token = _ASSUME.set(assume)
        try:
            return original(cls, *args, **kwargs)
        finally:
            _ASSUME.reset(token)

    return from_single_file


def _readable(source: dict[str, Any], assume: Sequence[str] | None) -> dict[str, Any]:
    """A state dict as the host wants it; that of a file was read before.

    Raises:
        CheckpointError: if it was, and another than hijack is to read it.
    """
    if _any_travels(source):
        if assume is None:
            raise CheckpointError(
                "from_single_file: got a file with layers that hijack has read, and a "
                "quantization_config that is not hijack's, expected one of them; leave "
                "the config out, or set HIJACK_DISABLE=diffusers"
            )
        return source
    if assume is None or not all(isinstance(t, Tensor) for t in source.values()):
        return source
    weights = read_quantized(source, assume=assume)
    return source if weights is None else weights


# -- arriving --------------------------------------------------------------------------


def make_placing(original: Function) -> Function:
    """Make modules quantized once the host has placed the tensors of a state dict."""
    signature = inspect.signature(original)

    def load_model_dict_into_meta(*args: Any, **kwargs: Any) -> Any:
        call = signature.bind(*args, **kwargs)
        given = call.arguments
        if not _any_travels(given["state_dict"]):
            return original(*args, **kwargs)
        given["state_dict"] = cropped(given["state_dict"], given["model"])
        result = original(*call.args, **call.kwargs)
        _arrive(given["model"])
        return result

    return load_model_dict_into_meta


def make_copying(original: Function) -> Function:
    """The same where the host copies tensors into a model that has some."""

    def _load_state_dict_into_model(
        model_to_load: nn.Module,
        state_dict: Mapping[str, Tensor],
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if not _any_travels(state_dict):
            return original(model_to_load, state_dict, *args, **kwargs)
        state_dict = cropped(state_dict, model_to_load)
        errors = original(model_to_load, state_dict, *args, **kwargs)
        if not errors:
            _replace(model_to_load, state_dict)
            _arrive(model_to_load)
        return errors

    return _load_state_dict_into_model


def _replace(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put quantized weights in the place of the copies that were decoded."""
    for name, module in model.named_modules():
        for key, old in module._parameters.items():
            weight = weights.get(f"{name}.{key}" if name else key)
            if old is not None and isinstance(weight, TravellingWeight):
                there: Any = weight.to(old.device, old.dtype)
                module._parameters[key] = nn.Parameter(there)


def _any_travels(tensors: Mapping[str, Any]) -> bool:
    return any(isinstance(tensor, TravellingWeight) for tensor in tensors.values())


def _arrive(model: nn.Module) -> None:
    if adopt(model):
        remember("diffusers", model)
