"""The one place where diffusion models enter: ``model_config_from_unet``.

Every loader of ComfyUI asks it what a state dict is. Here the layers that a scheme
claims become `Coded` tensors in that state dict, and the answer, a config object of
this model alone, gets operations that take them.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import sys
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from hijack.checkpoint.dialect import Claim
from hijack.checkpoint.header import Header, join
from hijack.errors import AmbiguousError, HijackError, UnconsumedScaleError
from hijack.hosts.comfyui import markers
from hijack.hosts.comfyui.coded import PLAIN, Coded, Coding
from hijack.hosts.comfyui.layers import make_operations
from hijack.registry import Registry, default_registry

log = logging.getLogger(__name__)


def make_door(original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of ``model_config_from_unet``."""

    @functools.wraps(original)
    def model_config_from_unet(*args: Any, **kwargs: Any) -> Any:
        given = inspect.signature(original).bind(*args, **kwargs).arguments
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
    if any(isinstance(t, Coded) for k, t in state_dict.items() if k.startswith(prefix)):
        return True  # the loader asks again, after renaming keys
    unusual = _unusual(state_dict, prefix)
    if not unusual:
        return False
    registry = default_registry() if registry is None else registry
    tensors = markers.read_through(unusual, prefix)
    claims = _best(registry.identify(Header.from_state_dict(tensors, metadata)))
    claims = {n: c for n, c in claims.items() if not markers.native(tensors, n)}
    left = set(tensors).difference(*(claim.keys.values() for claim in claims.values()))
    orphans = sorted(key for key in left if _is_orphan(tensors, key))
    if not claims:
        _warn_of(orphans)
        return False
    if orphans:
        raise UnconsumedScaleError(
            f"{orphans[0].rpartition('.')[0]}: no scheme reads {orphans[0]} of shape "
            f"{tuple(tensors[orphans[0]].shape)}, one of {len(orphans)} such scales; "
            "loading would ignore it; install the scheme that wrote this file, or "
            "quantize it again"
        )
    made = {
        claim.keys["weight"]: _encode(registry, claim, tensors)
        for claim in claims.values()
    }
    for key in unusual.keys() - left:
        del state_dict[key]
    for key in unusual.keys() - tensors.keys():  # what ComfyUI renamed or put in
        state_dict.pop(key, None)
    state_dict.update(made)
    _log_claims(claims)
    return True


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
    coded = any(t.dtype not in PLAIN or _scale_of(k) for k, t in found.items())
    return found if coded else {}


def _scale_of(key: str) -> str | None:
    """The layer that a key looks like the scale of."""
    layer, _, name = key.rpartition(".")
    return layer if name in markers.SCALES else None


def _best(claims: list[Claim]) -> dict[str, Claim]:
    """The best founded claim to each layer."""
    best: dict[str, Claim] = {}
    for claim in claims:
        other = best.get(claim.layer)
        if other is None or claim.certainty > other.certainty:
            best[claim.layer] = claim
        elif claim.certainty == other.certainty and claim.scheme != other.scheme:
            raise AmbiguousError(
                f"{claim.layer}: {other.scheme} and {claim.scheme} claim it equally; "
                f"disable one of them with HIJACK_DISABLE={claim.scheme}"
            )
    return best


def _is_orphan(tensors: Mapping[str, Tensor], key: str) -> bool:
    """Whether a key that nobody claimed is the scale of codes."""
    layer, _, name = key.rpartition(".")
    if markers.native(tensors, layer):
        return False
    weight = tensors.get(join(layer, "weight"))
    coded = weight is not None and weight.dtype not in PLAIN
    return name in markers.SCALES or (coded and "scale" in name and "input" not in name)


def _encode(registry: Registry, claim: Claim, tensors: Mapping[str, Tensor]) -> Coded:
    scheme = registry.get(claim.scheme)
    try:
        qdata, params = scheme.decode(claim, tensors)
        options: dict[str, Any] = {}
        accepted = inspect.signature(scheme.quantize).parameters
        if claim.block_size is not None:
            options["block_size"] = claim.block_size
        if "dtype" in accepted:  # what a later LoRA is quantized to
            options["dtype"] = qdata.dtype
        coding = Coding(scheme, claim.dialect, tuple(sorted(options.items())))
        return Coded(qdata, params, coding)
    except HijackError:
        raise
    except Exception as error:
        raise HijackError(
            f"{claim.layer}: scheme {claim.scheme} cannot read it; "
            f"{type(error).__name__}: {error}; is the file damaged?"
        ) from error


def _log_claims(claims: Mapping[str, Claim]) -> None:
    count = Counter((claim.scheme, claim.dialect) for claim in claims.values())
    for (scheme, dialect), layers in sorted(count.items()):
        log.info("hijack: %d layers read by %s (dialect %s)", layers, scheme, dialect)


def _warn_of(orphans: list[str]) -> None:
    if orphans:
        log.warning(
            "hijack: no scheme reads %s and %d more scales; ComfyUI may ignore them "
            "and give garbage",
            orphans[0],
            len(orphans) - 1,
        )


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
            base = _core_operations(config)
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


def _core_operations(config: Any) -> Any:
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
