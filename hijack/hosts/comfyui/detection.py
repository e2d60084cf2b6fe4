"""Which layers of a state dict a scheme reads, and those layers as `Coded` tensors."""

from __future__ import annotations

import inspect
import json
import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from hijack.errors import HijackError, UnconsumedScaleError, UnknownSchemeError
from hijack.formats.claim import Claim
from hijack.formats.detection import SCALE_NAMES, identify
from hijack.formats.identification import Identification
from hijack.formats.named_only import comfy_marker
from hijack.formats.native_marker import METADATA_KEY, write_marker
from hijack.hosts.comfyui import markers, tensor_metadata
from hijack.hosts.comfyui.coded import PLAIN, Coded, Coding
from hijack.hosts.comfyui.lazy_tensor import Lazy
from hijack.registry import Registry, default_registry
from hijack.safetensors_io.header import Header, join
from hijack.text import shown

log = logging.getLogger(__name__)

#: Scales of what a layer is given; without them its weight is the same.
_INPUTS = ("scale_input", "input_scale", "activation_scale")


def encode_claimed(
    state_dict: dict[str, Tensor],
    prefix: str = "",
    metadata: Mapping[str, str] | None = None,
    registry: Registry | None = None,
) -> bool:
    """Turn every claimed layer of a model into one `Coded` tensor, in place.

    Args:
        state_dict: full key to tensor; changed only if a layer is claimed.
        prefix: only keys that start with it are looked at.
        metadata: the file's header metadata, if the host knows it.
        registry: whose schemes are asked.

    Returns:
        Whether the model has coded layers now.

    Raises:
        HijackError: if claimed tensors do not fit each other, if two schemes claim a
            layer equally, or if a scale is left that nobody consumed.
    """
    keys = [key for key in state_dict if key.startswith(prefix)]
    return _encode_keys(state_dict, keys, metadata, registry)


def encode_others(
    state_dict: dict[str, Tensor],
    prefix: str,
    metadata: Mapping[str, str] | None = None,
    registry: Registry | None = None,
) -> bool:
    """Do as `encode_claimed` with the keys that do not start with ``prefix``.

    In a whole checkpoint those are text encoders and the VAE.
    """
    keys = [key for key in state_dict if not key.startswith(prefix)]
    return _encode_keys(state_dict, keys, metadata, registry)


def decode_claimed(
    state_dict: dict[str, Tensor],
    what: str,
    metadata: Mapping[str, str] | None = None,
    registry: Registry | None = None,
) -> int:
    """Turn every claimed layer into a dense float32 weight, in place.

    Args:
        state_dict: key to tensor; changed only if a layer is claimed.
        what: the model, for the log.
        metadata: as for `encode_claimed`.
        registry: as for `encode_claimed`.

    Returns:
        The number of layers decoded.

    Raises:
        HijackError: as `encode_claimed`.
    """
    encode_claimed(state_dict, "", metadata, registry)
    coded = {key: t for key, t in state_dict.items() if isinstance(t, Coded)}
    for key, tensor in coded.items():
        state_dict[key] = tensor.dense(torch.float32)
    if coded:
        log.info(
            "hijack: %d layers of the %s decoded, which ComfyUI builds without a way "
            "to keep them quantized",
            len(coded),
            what,
        )
    return len(coded)


def _encode_keys(
    state_dict: dict[str, Tensor],
    keys: Iterable[str],
    metadata: Mapping[str, str] | None,
    registry: Registry | None,
) -> bool:
    chosen = {key: state_dict[key] for key in keys}
    if any(isinstance(tensor, Coded) for tensor in chosen.values()):
        return True  # the loader asks again, after renaming keys
    if any(isinstance(tensor, Lazy) for tensor in chosen.values()):
        return any(getattr(t, "code", None) for t in chosen.values())
    unusual = _unusual(chosen)
    if not unusual:
        return False
    registry = default_registry() if registry is None else registry
    tensors = markers.read_through(unusual)
    claims = _claims(tensors, metadata, registry)
    coded = {
        join(layer, "weight"): _encode(registry, claim, tensors)
        for layer, claim in claims.items()
    }
    used = {key for claim in claims.values() for key in claim.keys.values()}
    for key in unusual if claims else ():
        if key in used or key not in tensors:  # or ComfyUI renamed it or put it in
            del state_dict[key]
    state_dict.update(coded)
    return bool(claims)


def _claims(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None,
    registry: Registry,
) -> dict[str, Claim]:
    """The claim to each layer that is not ComfyUI's own."""
    metadata = {
        **(_renamed(metadata, tensors) or {}),
        **tensor_metadata.metadata_of(tensors),
    }
    given = tensor_metadata.claims_of(tensors)
    used = {key for claim in given.values() for key in claim.keys.values()}
    rest = {key: tensor for key, tensor in tensors.items() if key not in used}
    header = Header.from_state_dict(tensors, metadata)
    found = identify(Header.from_state_dict(rest, metadata), registry)
    every = {**given, **found.claims()}
    claims = {la: c for la, c in every.items() if not markers.native(header, la)}
    if claims and not markers.reads_layers():
        claims = every  # it cannot have layers of its own kind beside ours
    _check_unknown(found, header, registry)
    _check_foreign(found, header, alone=not claims)
    _check_orphans(_orphans(found, header), tensors, alone=not claims)
    bare = [la for la in found.unscaled if not markers.native(header, la)]
    if claims and bare:
        log.warning(
            "hijack: %d layers hold codes without a scale, such as %s, while others "
            "have one; they are used as they are",
            len(bare),
            bare[0],
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


def _unusual(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without those of ordinary layers.

    A layer is ordinary if it has a weight of a dtype one computes in, and nothing
    beside it but a bias. No scheme reads those, and most files have no others.
    """
    count = Counter(key.rpartition(".")[0] for key in tensors)
    plain: set[str] = set()
    for key, tensor in tensors.items():
        layer, _, name = key.rpartition(".")
        if name == "weight" and tensor.dtype in PLAIN:
            bias = f"{layer}.bias"
            if count[layer] == 1 + (bias in tensors):
                plain.update((key, bias))
    found = {key: tensor for key, tensor in tensors.items() if key not in plain}
    coded = any(
        tensor.dtype not in PLAIN or key.rpartition(".")[2] in SCALE_NAMES
        for key, tensor in found.items()
    )
    return found if coded else {}


def _check_unknown(found: Identification, header: Header, registry: Registry) -> None:
    """Refuse layers of a scheme that is not there: their codes are no weights."""
    for layer, scheme in found.unknown.items():
        if not markers.native(header, layer):
            raise UnknownSchemeError(
                f"{layer}: was written by scheme {shown(scheme)}, as "
                f"{len(found.unknown)} layers were, which is not registered; expected "
                f"one of {', '.join(sorted(registry.schemes()))}; install "
                "the plugin that has it"
            )


def _check_foreign(found: Identification, header: Header, *, alone: bool) -> None:
    """Refuse layers that neither a scheme nor this ComfyUI reads.

    Where no layer is ours that is ComfyUI's business, unless it would take codes that
    nothing marks for weights.
    """
    for layer, other in found.foreign.items():
        if markers.reads_layers() and markers.native(header, layer):
            continue
        weight = header.tensors.get(join(layer, "weight"))
        silent = weight is not None and weight.torch_dtype not in PLAIN
        if alone and not (silent and comfy_marker(header, layer) is None):
            continue
        what = "and others are read by a scheme; this ComfyUI cannot read both"
        if alone:
            what = "which no scheme reads; this ComfyUI would use its codes as weights"
        raise HijackError(
            f"{layer}: is in the format {other.format}, as {len(found.foreign)} layers "
            f"are, {what}; use a later one, or quantize the original with one scheme"
        )


def _check_orphans(
    orphans: list[str], tensors: Mapping[str, Tensor], *, alone: bool
) -> None:
    """Refuse to ignore scales that a weight needs."""
    for key in orphans:
        layer, _, name = key.rpartition(".")
        weight = tensors.get(join(layer, "weight"))
        if alone and (weight is None or weight.dtype in PLAIN or name in _INPUTS):
            continue
        others = f" and {len(orphans) - 1} others" if len(orphans) > 1 else ""
        raise UnconsumedScaleError(
            f"{layer}: no scheme reads {key}, {tuple(tensors[key].shape)} beside a "
            f"weight of {None if weight is None else tuple(weight.shape)}; loading "
            f"would ignore it{others}; install the scheme that wrote this file, or "
            "quantize it again"
        )
    if orphans:
        log.warning(
            "hijack: no scheme reads %s, one of %d such scales; ComfyUI may ignore "
            "them and give garbage",
            orphans[0],
            len(orphans),
        )


def _orphans(found: Identification, header: Header) -> list[str]:
    """Scales that neither a scheme nor ComfyUI consumes."""
    return sorted(
        key
        for key in found.orphans
        if not markers.native(header, key.rpartition(".")[0])
    )


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
        dialect = scheme.written_as(claim.dialect, qdata, params, options)
        coding = Coding(scheme, dialect.name, tuple(sorted(options.items())))
        return Coded(qdata, params, coding)
    except HijackError:
        raise
    except Exception as error:
        raise HijackError(
            f"{claim.layer}: scheme {claim.scheme} cannot read it; "
            f"{type(error).__name__}: {error}; is the file damaged?"
        ) from error
