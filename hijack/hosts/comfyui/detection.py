"""Which layers of a state dict a scheme reads, and those layers as one tensor each."""

from __future__ import annotations

import dataclasses
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

import hijack.hosts.comfyui.markers as markers
import hijack.hosts.comfyui.tensor_metadata as tensor_metadata
from hijack.claim import Claim
from hijack.dtypes import DENSE_DTYPES
from hijack.errors import HijackError, UnconsumedScaleError, UnknownSchemeError
from hijack.formats import matching
from hijack.formats.comfyui_markers import layer_marker
from hijack.formats.identification import SCALE_NAMES, Identification, identify
from hijack.formats.native_marker import (
    METADATA_KEY,
    marked_layers,
    write_marker,
)
from hijack.formats.preference import preferred
from hijack.hosts.comfyui.lazy_tensor import LazyTensor
from hijack.quantized import QuantizedTensor
from hijack.registry import Registry, current_registry
from hijack.safetensors_io.header import Header, join
from hijack.text import excerpt, format_text, logger

log = logger(__name__)

#: Scales of what a layer is given; without them its weight is the same.
_INPUTS = ("scale_input", "input_scale", "activation_scale")
#: The number of a block in the name of a layer.
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def encode_claimed(
    state_dict: dict[str, Tensor],
    prefix: str = "",
    metadata: Mapping[str, str] | None = None,
    registry: Registry | None = None,
    *,
    native: bool = False,
    fate: str = "",
) -> bool:
    """Turn every claimed layer of a model into one `QuantizedTensor` tensor, in place.

    Args:
        state_dict: full key to tensor; changed only if a layer is claimed.
        prefix: only keys that start with it are looked at.
        metadata: the file's header metadata, if the host knows it.
        registry: whose schemes are asked.
        native: whether the layers that ComfyUI itself reads are claimed too.
        fate: what becomes of the layers, for the log, unless they stay quantized.

    Returns:
        Whether the model has quantized layers now.

    Raises:
        HijackError: if claimed tensors do not fit each other, if two schemes claim a
            layer equally, or if a scale is left that nobody consumed.
    """
    keys = [key for key in state_dict if key.startswith(prefix)]
    return _encode_keys(state_dict, keys, metadata, registry, native, fate)


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
    fate = f"decoded, because ComfyUI builds the {what} without quantized layers"
    encode_claimed(state_dict, "", metadata, registry, fate=fate)
    quantized = {k: t for k, t in state_dict.items() if isinstance(t, QuantizedTensor)}
    for key, tensor in quantized.items():
        state_dict[key] = tensor.value(torch.float32)
    return len(quantized)


def _encode_keys(
    state_dict: dict[str, Tensor],
    keys: Iterable[str],
    metadata: Mapping[str, str] | None,
    registry: Registry | None,
    native: bool = False,
    fate: str = "",
) -> bool:
    chosen = {key: state_dict[key] for key in keys}
    if any(isinstance(tensor, QuantizedTensor) for tensor in chosen.values()):
        return True  # the loader asks again, after renaming keys
    if any(isinstance(tensor, LazyTensor) for tensor in chosen.values()):
        return any(getattr(t, "quantize", None) for t in chosen.values())
    metadata = {
        **(_renamed(metadata, chosen) or {}),
        **tensor_metadata.metadata_of(chosen),
    }
    unusual = _unusual(chosen, marked_layers(metadata))
    if not unusual:
        return False
    registry = current_registry(registry)
    tensors = markers.read_through(unusual)
    claims = _claims(tensors, metadata, registry, native)
    if claims:
        _log_layers(tensor_metadata.name_of(chosen), claims.values(), fate)
    used = {key for claim in claims.values() for key in claim.keys.values()}
    dtype = _dense_dtype(t for key, t in chosen.items() if key not in used)
    quantized = {
        join(layer, "weight"): _quantized(registry, claim, tensors, dtype)
        for layer, claim in claims.items()
    }
    for key in unusual if claims else ():
        # or ComfyUI renamed it or put it in, or it marks layers that are claimed
        if key in used or key not in tensors or (native and markers.is_marker(key)):
            del state_dict[key]
    state_dict.update(quantized)
    return bool(claims)


def _claims(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    registry: Registry,
    native: bool,
) -> dict[str, Claim]:
    """The claim to each layer that is not ComfyUI's own, unless those count too.

    A scheme that the user prefers has its layers in any case.
    """
    given = tensor_metadata.claims_of(tensors)
    used = {key for claim in given.values() for key in claim.keys.values()}
    rest = {key: tensor for key, tensor in tensors.items() if key not in used}
    header = Header.from_state_dict(tensors, metadata)
    found = identify(Header.from_state_dict(rest, metadata), registry)
    every = {**given, **found.claims()}

    wanted = set(preferred())

    def comfyuis(layer: str) -> bool:
        asked = layer in every and every[layer].scheme in wanted
        return not native and not asked and markers.native(header, layer)

    claims = {la: c for la, c in every.items() if not comfyuis(la)}
    if claims and not markers.reads_layers():
        claims = every  # it cannot have layers of its own kind beside ours
    _check_unknown(found, comfyuis, registry)
    _check_foreign(found, header, comfyuis, alone=not claims, native=native)
    orphans = sorted(k for k in found.unconsumed if not comfyuis(k.rpartition(".")[0]))
    bare = [la for la in found.unscaled if not comfyuis(la)]
    _check_orphans(orphans, tensors, alone=not claims, bare=bare)
    _check_integers(bare, tensors)
    _check_lost(bare, claims, tensors)
    if claims and bare:
        log.warning(
            "hijack: %d layers hold quantized data without a scale, such as %s, while "
            "others have one; they are used as they are",
            len(bare),
            bare[0],
        )
    return claims


def _log_layers(file: str, claims: Collection[Claim], fate: str) -> None:
    """Say in one line which quantized layers a file has, and what was odd of them."""
    count = Counter(
        format_text(claim.scheme, claim.dialect, claim.block_size) for claim in claims
    )
    each = ", ".join(f"{kind} {layers}" for kind, layers in count.most_common())
    log.info(
        "hijack: %s: %d quantized layers: %s%s",
        file,
        count.total(),
        each,
        f"; {fate}" if fate else "",
    )
    said = ("have a wrong marker", "contradiction"), ("may be read otherwise", "chosen")
    for what, field in said:
        notes = [note for claim in claims if (note := getattr(claim, field))]
        if notes:
            log.warning(
                "hijack: %s: %d layers %s: %s",
                file,
                len(notes),
                what,
                excerpt(notes[0]),
            )


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


def may_be_quantized(state_dict: Mapping[Any, Any]) -> bool:
    """Whether a file may hold quantized layers, from names and dtypes alone.

    Integers that are no weights, such as positions, are in many dense files.
    """
    for key, tensor in state_dict.items():
        if not isinstance(tensor, Tensor) or not isinstance(key, str):
            continue
        dtype, name = tensor.dtype, key.rpartition(".")[2]
        coded = dtype.itemsize == 1 and dtype is not torch.bool
        if coded or name in SCALE_NAMES:
            return True
        if dtype not in DENSE_DTYPES and name.endswith("weight"):
            return True
    return False


def _unusual(
    tensors: Mapping[str, Tensor], marked: Container[str]
) -> dict[str, Tensor]:
    """The tensors without those of ordinary layers.

    A layer is ordinary if it has a weight of a dtype one computes in, nothing beside it
    but a bias, and no marker. No scheme reads those, and most files have no others.
    """
    count = Counter(key.rpartition(".")[0] for key in tensors)
    plain: set[str] = set()
    for key, tensor in tensors.items():
        layer, _, name = key.rpartition(".")
        dense = tensor.dtype in DENSE_DTYPES and layer not in marked
        if name == "weight" and dense:
            bias = f"{layer}.bias"
            if count[layer] == 1 + (bias in tensors):
                plain.update((key, bias))
    found = {key: tensor for key, tensor in tensors.items() if key not in plain}
    quantized = any(
        tensor.dtype not in DENSE_DTYPES
        or key.rpartition(".")[2] in SCALE_NAMES
        or key.rpartition(".")[0] in marked
        for key, tensor in found.items()
    )
    return found if quantized else {}


def _check_unknown(
    found: Identification, comfyuis: Callable[[str], bool], registry: Registry
) -> None:
    """Refuse layers of a scheme that is not there: their data is no weight."""
    for layer, scheme in found.unknown.items():
        if not comfyuis(layer):
            raise UnknownSchemeError(
                f"{layer}: was written by scheme {excerpt(scheme)}, as "
                f"{len(found.unknown)} layers were, which is not registered; expected "
                f"one of {', '.join(sorted(registry.schemes()))}; install "
                "the plugin that has it"
            )


def _check_foreign(
    found: Identification,
    header: Header,
    comfyuis: Callable[[str], bool],
    *,
    alone: bool,
    native: bool,
) -> None:
    """Refuse layers that neither a scheme nor this ComfyUI reads.

    Where no layer is ours that is ComfyUI's business, unless it would take quantized
    data that nothing marks for weights, or that its loader knows no marker of.
    """
    for layer, other in found.unsupported.items():
        if markers.reads_layers() and comfyuis(layer):
            continue
        weight = header.tensors.get(join(layer, "weight"))
        silent = weight is not None and weight.torch_dtype not in DENSE_DTYPES
        unmarked = native or layer_marker(header, layer) is None
        if alone and not (silent and unmarked):
            continue
        what = "and others are read by a scheme; this ComfyUI cannot read both"
        if alone:
            what = "which no scheme reads; this ComfyUI would use its data as weights"
        raise HijackError(
            f"{layer}: is in the format {other.format}, as "
            f"{len(found.unsupported)} layers are, {what}; use a later one, or "
            "quantize the original with one scheme"
        )


def _check_orphans(
    orphans: list[str],
    tensors: Mapping[str, Tensor],
    *,
    alone: bool,
    bare: Sequence[str] = (),
) -> None:
    """Refuse to ignore scales that a weight needs.

    One that stands beside no weight may be that of any layer whose data is bare.
    """
    for key in orphans:
        name = key.rpartition(".")[2]
        layer = _scaled_layer(key, tensors)
        weight = tensors.get(join(layer, "weight"))
        dense = not bare if weight is None else weight.dtype in DENSE_DTYPES
        if alone and (dense or name in _INPUTS):
            continue
        others = f" and {len(orphans) - 1} others" if len(orphans) > 1 else ""
        beside = f"beside a weight of {None if weight is None else tuple(weight.shape)}"
        if weight is None and bare:
            beside = f"while {bare[0]} has quantized data without a scale"
        raise UnconsumedScaleError(
            f"{layer or key}: no scheme reads {key}, {tuple(tensors[key].shape)} "
            f"{beside}; loading "
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


def _check_lost(
    bare: Iterable[str], claims: Iterable[str], tensors: Mapping[str, Tensor]
) -> None:
    """Refuse data without a scale in a layer that has one in other blocks.

    Data of other layers may be casts, which ComfyUI writes beside quantized ones.
    """
    scaled = {_NUMBER.sub("*", layer): layer for layer in claims}
    for layer in bare:
        other = scaled.get(_NUMBER.sub("*", layer))
        if other is not None and tensors[join(layer, "weight")].ndim > 1:
            raise UnconsumedScaleError(
                f"{layer}: holds quantized data without a scale, expected one as "
                f"{other} has; the file is damaged, get it again"
            )


def _check_integers(bare: Iterable[str], tensors: Mapping[str, Tensor]) -> None:
    """Refuse integers that nothing scales, which ComfyUI would take for weights."""
    for layer in bare:
        dtype = tensors[join(layer, "weight")].dtype
        if not dtype.is_floating_point:
            raise HijackError(
                f"{layer}: has a weight of {dtype} without a scale, expected floating "
                "point numbers; install the scheme that wrote this file"
            )


def _scaled_layer(key: str, tensors: Mapping[str, Tensor]) -> str:
    """The layer that a scale belongs to, or the one its key stands under."""
    owner, _, name = key.rpartition(".")
    modules = owner.split(".")
    listed = key.removesuffix(".weight").partition(".")[2]
    layers = [".".join(modules[:end]) for end in range(len(modules), 0, -1)]
    layers += [join(owner, name.partition("scale")[0].rstrip("_")), listed]
    return next((la for la in layers if la and join(la, "weight") in tensors), owner)


def _quantized(
    registry: Registry,
    claim: Claim,
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
) -> QuantizedTensor:
    """A claimed layer as one tensor."""
    scheme = registry.get(claim.scheme)
    weight = matching.read_weight(scheme, claim, tensors, dtype=dtype)
    dialect = matching.encoding_dialect(
        scheme, claim.dialect, weight.qdata, weight.params, weight.options
    )
    config = dataclasses.replace(weight.config, dialect=dialect.name)
    return weight.replace(config=config)


def _dense_dtype(others: Iterable[Tensor]) -> torch.dtype:
    """What the quantized weights of a model pass for: what most other tensors are."""
    sizes: Counter[torch.dtype] = Counter()
    for tensor in others:
        if tensor.dtype in DENSE_DTYPES:
            sizes[tensor.dtype] += tensor.numel()
    return sizes.most_common(1)[0][0] if sizes else torch.float32
