"""The one place where diffusion models enter: ``model_config_from_unet``.

Every loader of ComfyUI asks it what a state dict is. Here the layers that a scheme
claims become `Coded` tensors in that state dict, and the answer, a config object of
this model alone, gets operations that take them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import logging
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hijack.checkpoint.dialect import METADATA_KEY, Claim, write_marker
from hijack.checkpoint.header import Header, join
from hijack.checkpoint.identify import SCALE_NAMES, Identification, identify
from hijack.errors import HijackError, UnconsumedScaleError
from hijack.hosts.comfyui import markers
from hijack.hosts.comfyui.coded import PLAIN, Coded, Coding
from hijack.hosts.comfyui.layers import make_operations
from hijack.hosts.comfyui.lazy import Lazy
from hijack.registry import Registry, default_registry

log = logging.getLogger(__name__)

#: The same in every release; somebody's wrapper may hide them.
ARGUMENTS = ("state_dict", "unet_key_prefix", "use_base_if_no_match", "metadata")


def make_door(original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of ``model_config_from_unet``."""

    @functools.wraps(original)
    def model_config_from_unet(*args: Any, **kwargs: Any) -> Any:
        given = {**dict(zip(ARGUMENTS, args, strict=False)), **kwargs}
        state_dict, prefix = given["state_dict"], given["unet_key_prefix"]
        coded = encode_claimed(state_dict, prefix, given.get("metadata"))
        config = original(*args, **kwargs)
        if coded and config is not None:
            adopt(config, state_dict, prefix)
        return config

    return model_config_from_unet


# -- claims ----------------------------------------------------------------------------


def encode_claimed(
    state_dict: dict[str, Tensor],
    prefix: str,
    metadata: Mapping[str, str] | None = None,
    registry: Registry | None = None,
) -> bool:
    """Turn every claimed layer of a state dict into one `Coded` tensor, in place.

    Args:
        state_dict: full key to tensor; changed only if a layer is claimed.
        prefix: only keys that start with it are looked at.
        metadata: the file's header metadata, if the host knows it.
        registry: whose schemes are asked.

    Returns:
        Whether the state dict has coded layers now.

    Raises:
        HijackError: if claimed tensors do not fit each other, if two schemes claim a
            layer equally, or if a scale is left that nobody consumed.
    """
    for key, tensor in state_dict.items():
        if key.startswith(prefix) and isinstance(tensor, Coded | Lazy):
            # the loader asks again, after renaming keys; or quantizes while it loads
            return isinstance(tensor, Coded) or _to_quantize(state_dict)
    unusual = _unusual(state_dict, prefix)
    if not unusual:
        return False
    registry = default_registry() if registry is None else registry
    tensors = markers.read_through(unusual, prefix)
    claims = _claims(tensors, metadata, registry)
    coded = {
        claim.keys["weight"]: _encode(registry, claim, tensors)
        for claim in claims.values()
    }
    used = {key for claim in claims.values() for key in claim.keys.values()}
    for key in unusual if claims else ():
        if key in used or key not in tensors:  # or ComfyUI renamed it or put it in
            del state_dict[key]
    state_dict.update(coded)
    return bool(claims)


def _to_quantize(state_dict: Mapping[str, Tensor]) -> bool:
    return any(getattr(t, "quantize", None) is not None for t in state_dict.values())


def _claims(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None,
    registry: Registry,
) -> dict[str, Claim]:
    """The claim to each layer that is not ComfyUI's own."""
    metadata = _renamed(metadata, tensors)
    found = identify(Header.from_state_dict(tensors, metadata), registry)
    claims = {
        layer: claim
        for layer, claim in found.claims().items()
        if not markers.native(tensors, layer)
    }
    orphans = _orphans(found, tensors)
    if orphans and not claims:
        log.warning(
            "hijack: no scheme reads %s and %d more scales; ComfyUI may ignore them "
            "and give garbage",
            orphans[0],
            len(orphans) - 1,
        )
    elif orphans:
        layer, key = orphans[0].rpartition(".")[0], orphans[0]
        weight = tensors.get(join(layer, "weight"))
        raise UnconsumedScaleError(
            f"{layer}: no scheme reads {key}, {tuple(tensors[key].shape)} beside a "
            f"weight of {None if weight is None else tuple(weight.shape)}; loading "
            f"would ignore it and {len(orphans) - 1} others; install the scheme that "
            "wrote this file, or quantize it again"
        )
    count = Counter((claim.scheme, claim.dialect) for claim in claims.values())
    for (scheme, dialect), layers in sorted(count.items()):
        log.info("hijack: %d layers read by %s (dialect %s)", layers, scheme, dialect)
    return claims


def _renamed(
    metadata: Mapping[str, str] | None, tensors: Mapping[str, Tensor]
) -> Mapping[str, str] | None:
    """Our own marker, with the layers' names as the loader changed them.

    Loaders cut the model's prefix off the keys, but hand on the file's metadata.
    """
    try:
        marked = json.loads((metadata or {})[METADATA_KEY])["layers"]
        first = next(iter(marked))
    except (ValueError, LookupError, TypeError, StopIteration):
        return metadata
    for start in [0, *(i + 1 for i, letter in enumerate(first) if letter == ".")]:
        if join(first[start:], "weight") in tensors:
            prefix = first[:start]
            layers = {
                name[start:]: entry
                for name, entry in marked.items()
                if name.startswith(prefix)
            }
            return {**(metadata or {}), METADATA_KEY: write_marker(layers)}
    return metadata


def _unusual(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors under a prefix without those of ordinary layers.

    A layer is ordinary if it has a weight of a dtype one computes in, and nothing
    beside it but a bias. No scheme reads those, and most files have no others.
    """
    keys = [key for key in state_dict if key.startswith(prefix)]
    count = Counter(key.rpartition(".")[0] for key in keys)
    plain: set[str] = set()
    for key in keys:
        layer, _, name = key.rpartition(".")
        if name == "weight" and state_dict[key].dtype in PLAIN:
            bias = f"{layer}.bias"
            if count[layer] == 1 + (bias in state_dict):
                plain.update((key, bias))
    found = {key: state_dict[key] for key in keys if key not in plain}
    coded = any(
        tensor.dtype not in PLAIN or key.rpartition(".")[2] in SCALE_NAMES
        for key, tensor in found.items()
    )
    return found if coded else {}


def _orphans(found: Identification, tensors: Mapping[str, Tensor]) -> list[str]:
    """Scales that nobody consumes, also those of names nobody knows beside codes."""
    unscaled = {layer for layer in found.unscaled if not markers.native(tensors, layer)}
    strange = [
        key
        for key in tensors
        if key.rpartition(".")[0] in unscaled and "scale" in key.rpartition(".")[2]
    ]
    return sorted({*found.orphans, *strange})


def _encode(registry: Registry, claim: Claim, tensors: Mapping[str, Tensor]) -> Coded:
    scheme = registry.get(claim.scheme)
    try:
        qdata, params = scheme.decode(claim, tensors)
        options: dict[str, Any] = {}
        accepted = inspect.signature(scheme.quantize).parameters
        if claim.block_size is not None:
            options["block_size"] = claim.block_size
        if "dtype" in accepted:  # what a weight with a LoRA in it is quantized to
            options["dtype"] = qdata.dtype
        scale = params.get("weight_scale")
        if "scale_dtype" in accepted and scale is not None and scale.dtype in PLAIN:
            options["scale_dtype"] = scale.dtype
        coding = Coding(scheme, claim.dialect, tuple(sorted(options.items())))
        return Coded(qdata, params, coding)
    except HijackError:
        raise
    except Exception as error:
        raise HijackError(
            f"{claim.layer}: scheme {claim.scheme} cannot read it; "
            f"{type(error).__name__}: {error}; is the file damaged?"
        ) from error


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
