"""Loading: the host is given one tensor for each weight, and places it itself."""

from __future__ import annotations

import inspect
import os
import weakref
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from hijack.formats.native_marker import marked_layers
from hijack.hosts.checkpoint import TravellingWeight, adopt, cropped, read_quantized
from hijack.hosts.diffusers.quantizer import Quantizer
from hijack.modules import quantized_weight

Function = Callable[..., Any]

#: Models with quantized weights that the host has loaded.
_LOADED: weakref.WeakSet[nn.Module] = weakref.WeakSet()


def count_live() -> int:
    """How many layers of models that were loaded hold quantized weights."""
    modules = (module for model in list(_LOADED) for module in model.modules())
    return sum(quantized_weight(module) is not None for module in modules)


# -- folders ---------------------------------------------------------------------------


def make_load_pretrained_model(original: Function) -> Function:
    """Read all files of a folder at once: a scale may be in another than its weight."""
    signature = inspect.signature(original)

    def _load_pretrained_model(cls: Any, *args: Any, **kwargs: Any) -> Any:
        call = signature.bind(cls, *args, **kwargs)
        given = call.arguments
        quantizer = given.get("hf_quantizer")
        if quantizer is not None and not isinstance(quantizer, Quantizer):
            return original(cls, *args, **kwargs)  # another's files
        weights = _read_folder(given, quantizer)
        if weights is None:
            return original(cls, *args, **kwargs)
        given["model"]._fix_state_dict_keys_on_load(weights)
        given |= {"state_dict": weights, "loaded_keys": list(weights)}
        if given.get("device_map"):
            # what goes to the disk is read from the file, and accelerate writes it
            places = given["device_map"].items()
            on_cpu = {name: "cpu" if at == "disk" else at for name, at in places}
            given |= {"device_map": on_cpu, "offload_state_dict": False}
        return original(*call.args, **call.kwargs)

    return _load_pretrained_model


def _read_folder(
    given: Mapping[str, Any], quantizer: Quantizer | None
) -> dict[str, Tensor] | None:
    """The weights of a folder's files; None if none is quantized."""
    files = given["resolved_model_file"] or []
    assume = () if quantizer is None else quantizer.quantization_config.assume
    if files and all(str(file).endswith(".safetensors") for file in files):
        paths = [os.fspath(file) for file in files]
        return read_quantized(paths, assume=assume)
    state_dict = given["state_dict"]
    if state_dict is None:
        state_dict = _unpickle(files)
    metadata = {} if quantizer is None else quantizer.quantization_config.metadata
    return read_quantized(_Marked(state_dict, metadata), assume=assume)


def _unpickle(files: list[Any]) -> dict[str, Tensor]:
    from diffusers.models.model_loading_utils import load_state_dict

    return {key: t for file in files for key, t in load_state_dict(file).items()}


class _Marked(dict[str, Tensor]):
    """A state dict that says which layers are quantized, as that of a module does."""

    def __init__(self, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]):
        super().__init__(tensors)
        marked = marked_layers(metadata)
        self._metadata = {name: {"hijack": entry} for name, entry in marked.items()}


# -- single files ----------------------------------------------------------------------


def make_load_state_dict(original: Function) -> Function:
    """Read a file before its tensors are renamed and split."""

    def load_state_dict(checkpoint_file: Any, *args: Any, **kwargs: Any) -> Any:
        weights = None
        if isinstance(checkpoint_file, str | os.PathLike):
            path = os.fspath(checkpoint_file)
            weights = read_quantized(path) if path.endswith(".safetensors") else None
        if weights is None:
            return original(checkpoint_file, *args, **kwargs)
        return weights

    return load_state_dict


def make_from_single_file(original: Function) -> Function:
    """Read a state dict that a user gives."""

    def from_single_file(cls: Any, *args: Any, **kwargs: Any) -> Any:
        name = "pretrained_model_link_or_path_or_dict"
        source = args[0] if args else kwargs.get(name)
        if not isinstance(source, dict) or _any_travels(source):
            return original(cls, *args, **kwargs)
        tensors = {k: t for k, t in source.items() if isinstance(t, Tensor)}
        weights = read_quantized(tensors) if tensors else None
        if weights is None:
            return original(cls, *args, **kwargs)
        kwargs[name] = weights
        return original(cls, *args[1:], **kwargs)

    return from_single_file


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
        model_to_load: nn.Module, state_dict: Mapping[str, Tensor], *args: Any
    ) -> Any:
        if not _any_travels(state_dict):
            return original(model_to_load, state_dict, *args)
        state_dict = cropped(state_dict, model_to_load)
        errors = original(model_to_load, state_dict, *args)
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
        _LOADED.add(model)
