"""Dialects: how a program stores a scheme's tensors in files.

A dialect translates between the names and shapes of a file and those of a scheme;
nothing else does. The base class is the *native* dialect that every scheme has: keys
are the scheme's own names, and header metadata names the scheme of each layer.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from hijack.claim import Certainty, Claim
from hijack.errors import HijackError
from hijack.formats.comfyui_markers import is_marked
from hijack.formats.native_marker import (
    METADATA_KEY,
    native_marker,
    without_layers,
    write_marker,
)
from hijack.safetensors_io.header import Header, TensorInfo, join
from hijack.scheme import Scheme, may_be_cut


@dataclasses.dataclass(frozen=True)
class EncodedLayer:
    """One layer as a dialect encoded it.

    Attributes:
        scheme: name of the scheme.
        params: names of the scheme's tensors beside ``qdata``.
        shape: shape of the dense weight.
        block_size: (rows, cols), or None if the scheme has no blocks.
        tensors: suffix to dtype and shape, as `Dialect.encode` returned them.
        options: options the layer was quantized with that cannot be inferred from its
            tensors, as texts.
        quantized: dtype and shape of the scheme's own tensors, ``weight`` among them.
    """

    scheme: str
    params: tuple[str, ...]
    shape: tuple[int, ...]
    block_size: tuple[int, int] | None
    tensors: Mapping[str, TensorInfo]
    options: Mapping[str, str] = dataclasses.field(default_factory=dict)
    quantized: Mapping[str, TensorInfo] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class FormatMetadata:
    """What a dialect stores about a file as a whole.

    Attributes:
        metadata: header metadata.
        tensors: key to tensor, for markers that are tensors.
        config: ``quantization_config`` of the ``config.json`` that readers of the
            dialect expect beside the file.
        notes: human-readable notes about what other readers may not support.
    """

    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tensors: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)
    config: Mapping[str, object] | None = None
    notes: tuple[str, ...] = ()


#: Former names, for dialects outside hijack.
Spelled = EncodedLayer
FileMarks = FormatMetadata


class Dialect:
    """The native dialect, and the base of all others.

    A subclass overrides `recognise`, `decode` and `encode`. ``recognise`` sees shapes
    and dtypes only. ``decode`` and ``encode`` must return views where possible, and
    must work on meta tensors, because files are planned with them.
    """

    name = "hijack"
    #: whether hijack can write it; False if it can only be read
    writes = True
    #: last parts of keys; a file without any of them has no layer of the dialect. With
    #: none, the dialect is asked about every file
    needs: tuple[str, ...] = ()
    #: options with `Option.forward` that it can store; None for all. A subclass that
    #: writes metadata of its own stores none unless it says so
    stores: Collection[str] | None = None
    #: the value of an input scale that stands for none
    absent_input: float | None = None
    #: suffixes of input scales, which do not affect the weight
    inputs: tuple[str, ...] = ()
    #: the suffix an input scale is written under; "" if the dialect cannot store one
    input_written = ""
    #: why `fit_options` may choose other blocks than requested, human-readable
    refit_reason = "it cannot store the requested blocks"

    def __init_subclass__(cls) -> None:
        if "finish" in cls.__dict__ and "stores" not in cls.__dict__:
            cls.stores = ()

    # -- reading -----------------------------------------------------------------------

    def layers(self, header: Header) -> Iterable[str]:
        """Names of the layers the dialect may recognise."""
        return header.layers()

    def readings(self, scheme: Scheme, header: Header, layer: str) -> Iterator[Claim]:
        """Every possible interpretation of ``layer``.

        There are several only if the file is ambiguous. Then they have the certainty
        GUESS, one of them must be assumed, and the likeliest comes first.
        """
        claim = self.recognise(scheme, header, layer)
        if claim is not None:
            yield claim

    def recognise(self, scheme: Scheme, header: Header, layer: str) -> Claim | None:
        """Claim ``layer`` for ``scheme``, or None.

        Here: the header's metadata names the scheme. If the scheme claims unmarked
        layers, also those whose tensors have exactly the names, dtypes and shapes that
        ``scheme.quantize`` gives for a weight of that shape, unless a marker or config
        names another format.
        """
        weight = header.tensors.get(join(layer, "weight"))
        if weight is None:
            return None
        marker = native_marker(header, layer)
        if marker is None:
            if not scheme.claims_unmarked or _names_another(scheme, header, layer):
                return None
            names = _fitting_params(scheme, header, layer, weight)
            return None if names is None else native_claim(layer, scheme.name, names)
        if marker.get("scheme") != scheme.name:
            return None
        if check_marker(scheme, self, header, layer):
            return None
        return _marked_claim(scheme, layer, marker)

    def decode(
        self, claim: Claim, tensors: Mapping[str, Tensor]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Turn a file's tensors into ``(qdata, params)``.

        Args:
            claim: as `recognise` returned it.
            tensors: role to tensor, with the roles of ``claim.keys``.
        """
        params = {role: t for role, t in tensors.items() if role != "weight"}
        return tensors["weight"], params

    def unmark(
        self, metadata: Mapping[str, str], keys: Collection[str], layers: Iterable[str]
    ) -> tuple[dict[str, str], set[str]]:
        """Remove the dialect's metadata about layers that are no longer stored in it.

        Args:
            metadata: the header's metadata.
            keys: keys of all tensors.
            layers: the layers that will be stored otherwise.

        Returns:
            The remaining metadata, and the keys of markers to leave out.
        """
        return without_layers(metadata, layers), set()

    # -- writing -----------------------------------------------------------------------

    def encode(
        self, qdata: Tensor, params: Mapping[str, Tensor], options: Mapping[str, object]
    ) -> dict[str, Tensor]:
        """Turn ``(qdata, params)`` into a file's tensors, keyed by suffix.

        Args:
            qdata: the quantized data.
            params: the scheme's other tensors.
            options: the options the layer was quantized with (such as ``block_size``),
                and those that say how it computes.

        Raises:
            CheckpointError: if the dialect cannot store it.
        """
        return {"weight": qdata, **params}

    def fit_options(
        self, shape: tuple[int, ...], options: Mapping[str, Any]
    ) -> dict[str, Any]:
        """The options to quantize a weight with so that `encode` can store it.

        Args:
            shape: (N, ...) of the dense weight.
            options: the requested options.
        """
        return dict(options)

    def settle(
        self, layers: Mapping[str, tuple[tuple[int, ...], tuple[int, int] | None]]
    ) -> dict[str, Any]:
        """The options that all layers of a converted file must share.

        Args:
            layers: layer to shape and block size in the source.
        """
        return {}

    def blocks(
        self,
        shape: tuple[int, ...],
        block_size: tuple[int, int],
        options: Mapping[str, Any],
    ) -> Sequence[tuple[int, int]]:
        """Block sizes in which the dialect can store a quantized weight, best first.

        Args:
            shape: (N, ...) of the weight.
            block_size: its current block size.
            options: as `settle` returned them.
        """
        return [block_size]

    def finish(
        self, layers: Mapping[str, EncodedLayer], others: Mapping[str, TensorInfo]
    ) -> FormatMetadata:
        """The metadata of a whole file.

        Args:
            layers: layer to how it was encoded.
            others: key to dtype and shape of all other tensors of the file.
        """
        entries = {name: layer_entry(layer) for name, layer in layers.items()}
        return FormatMetadata({METADATA_KEY: write_marker(entries)} if entries else {})


def infos_of(tensors: Mapping[str, Tensor]) -> dict[str, TensorInfo]:
    """Dtype and shape of each tensor."""
    return {name: TensorInfo.of(tensor) for name, tensor in tensors.items()}


def layer_entry(layer: EncodedLayer) -> dict[str, object]:
    """hijack's own entry for a layer, without what its tensors show."""
    entry: dict[str, object] = {"scheme": layer.scheme, "params": list(layer.params)}
    weight = layer.tensors.get("weight")
    if weight is None or weight.shape != tuple(layer.shape):
        entry["shape"] = list(layer.shape)
    if layer.options:
        entry["options"] = dict(layer.options)
    return entry


def native_claim(
    layer: str,
    scheme: str,
    names: Iterable[str],
    block_size: Sequence[int] | None = None,
    *,
    certainty: Certainty = Certainty.FITS,
    shape: Sequence[int] | None = None,
    options: Mapping[str, str] | None = None,
) -> Claim:
    """A claim to a layer whose keys are the scheme's own names."""
    keys = {name: join(layer, name) for name in ("weight", *names)}
    evidence = "dtypes and shapes fit"
    if certainty is Certainty.MARKED:
        evidence = f"metadata names {scheme}"
    block = None if block_size is None else (int(block_size[0]), int(block_size[1]))
    return Claim(
        layer,
        scheme,
        Dialect.name,
        keys,
        block,
        certainty,
        (evidence,),
        shape=None if shape is None else tuple(shape),
        options=dict(options or {}),
    )


def _names_another(scheme: Scheme, header: Header, layer: str) -> bool:
    """Whether a config or a marker of ComfyUI's names another format than a scheme.

    Formats look alike: a rotated weight and a plain one may have the same tensors.
    """
    config = header.quantization
    named = bool(config) and config.get("quant_method") != scheme.name
    return named or is_marked(header, layer)


def _fitting_params(
    scheme: Scheme, header: Header, layer: str, weight: TensorInfo
) -> tuple[str, ...] | None:
    """Names of a scheme's parameters if the layer's tensors fit, else None.

    They fit if they have the dtypes and shapes that `quantize` gives by default for a
    dense weight of the stored shape. A scheme without parameters never fits: any plain
    tensor would.
    """
    tensors = _default_tensors(scheme, weight.shape)
    if len(tensors) < 2 or not _same(weight, tensors["weight"]):
        return None
    for name, tensor in tensors.items():
        info = header.tensors.get(join(layer, name))
        if info is None or not _same(info, tensor):
            return None
    return tuple(tensors)[1:]


@functools.lru_cache(maxsize=256)  # the layers of a model have few shapes
def _default_tensors(scheme: Scheme, shape: tuple[int, ...]) -> dict[str, Tensor]:
    """The tensors of a quantized weight, on meta; empty if the scheme refuses."""
    try:
        qdata, params = scheme.create_params(shape, torch.float32, "meta")
    except HijackError:
        return {}
    return {"weight": qdata, **params}


def _same(info: TensorInfo, tensor: Tensor) -> bool:
    return info.shape == tuple(tensor.shape) and info.torch_dtype == tensor.dtype


def check_marker(
    scheme: Scheme, native: Dialect, header: Header, layer: str
) -> str | None:
    """Where the layer's tensors do not match hijack's own marker, or None.

    They are checked as the scheme would decode them, without their data.

    Args:
        scheme: the scheme the marker names.
        native: its native dialect.
        header: of the checkpoint.
        layer: a layer with a marker.
    """
    marker = native_marker(header, layer) or {}
    names, block = marker.get("params", []), marker.get("block_size")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return f"params are {names!r}, expected a list of names"
    if block is not None and not _is_block(block):
        return f"block_size is {block!r}, expected [rows, columns]"
    shape = marker.get("shape")
    if shape is not None and not _is_shape(shape):
        return f"shape is {shape!r}, expected a list of sizes"
    lacking = [name for name in names if join(layer, name) not in header.tensors]
    if lacking:
        return f"{lacking[0]} is missing beside the weight"
    claim = _marked_claim(scheme, layer, marker)
    infos = {key: header.tensors[key] for key in claim.keys.values()}
    if any(info.torch_dtype is None for info in infos.values()):
        return None  # a newer torch may know it
    try:
        tensors = {
            role: torch.empty(
                infos[key].torch_shape, dtype=infos[key].torch_dtype, device="meta"
            )
            for role, key in claim.keys.items()
        }
        qdata, params = native.decode(claim, tensors)
        scheme.validate(qdata, params, layer or "weight")
        # the default decodes, which is slow; loading will check, as it does where a
        # scheme brings the weight into its shape itself
        if shape is not None and _shape_is_known(type(scheme)):
            dense = scheme.dense_shape(qdata, params)
            if not may_be_cut(dense, shape):
                return f"shape is {shape}, the tensors decode to {list(dense)}"
    except HijackError as error:
        return str(error).removeprefix(f"{layer or 'weight'}: ")
    except Exception:
        return None  # it needs data, which is not here; loading will check
    if block is None:
        return None
    inferred = native.recognise(scheme, header.bare, layer)
    size = None if inferred is None else inferred.block_size
    if size is None or list(size) == block:
        return None
    return f"block_size is {block}, the shapes give {list(size)}"


def _shape_is_known(kind: type[Scheme]) -> bool:
    """Whether the dense shape follows from the tensors alone."""
    own_decoding = kind.dequantize_weight is not Scheme.dequantize_weight
    return kind.dense_shape is not Scheme.dense_shape and not own_decoding


def _is_shape(shape: object) -> bool:
    return isinstance(shape, list) and all(type(n) is int and n >= 0 for n in shape)


def _is_block(block: object) -> bool:
    return (
        isinstance(block, list)
        and len(block) == 2
        and all(type(size) is int and size > 0 for size in block)
    )


def _marked_claim(scheme: Scheme, layer: str, marker: Mapping[str, Any]) -> Claim:
    options = marker.get("options")
    return native_claim(
        layer,
        scheme.name,
        marker.get("params", ()),
        marker.get("block_size"),
        certainty=Certainty.MARKED,
        shape=marker.get("shape"),
        options=options if isinstance(options, dict) else None,
    )
