"""A scheme's layers in a file: which dialect reads each, and their tensors.

The functions here connect a scheme, which knows no files, with its dialects, which
know no numerics.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from hijack.claim import Certainty, Claim
from hijack.errors import CheckpointError, HijackError
from hijack.formats.dialect import (
    Dialect,
    EncodedLayer,
    FormatMetadata,
    infos_of,
    layer_entry,
)
from hijack.quantized import (
    QuantizationConfig,
    QuantizedTensor,
    check_shape,
)
from hijack.safetensors_io.header import (
    CONFIG_KEY,
    Header,
    TensorInfo,
    join,
    merge_metadata,
    metadata_clash,
)
from hijack.scheme import Quantized, Scheme
from hijack.text import did_you_mean

#: The dialect of schemes that have no native one of their own.
NATIVE = Dialect()


# -- dialects of a scheme --------------------------------------------------------------


def native_of(scheme: Scheme) -> Dialect:
    """The dialect whose keys are the scheme's own names."""
    return NATIVE if scheme.native is None else scheme.native


def dialects_of(scheme: Scheme) -> tuple[Dialect, ...]:
    """The declared dialects, and the native one last."""
    return (*scheme.dialects, native_of(scheme))


def dialect_of(scheme: Scheme, name: str | None = None) -> Dialect:
    """The dialect of that name; without a name, the one written by default.

    Raises:
        CheckpointError: if the scheme has none of that name.
    """
    known = {dialect.name: dialect for dialect in dialects_of(scheme)}
    if name is None:
        return next(iter(known.values()))
    if name not in known:
        raise CheckpointError(
            f"{scheme.name}: unknown dialect {name!r}; "
            f"expected one of {', '.join(sorted(known))}{did_you_mean(name, known)}"
        )
    return known[name]


def written_dialect(scheme: Scheme, name: str | None = None) -> Dialect:
    """The dialect of that name if it can be written; see `dialect_of`.

    Raises:
        CheckpointError: if there is none, or it can only be read.
    """
    dialects = dialects_of(scheme)
    names = ", ".join(sorted(dialect.name for dialect in dialects if dialect.writes))
    if name is not None and name not in {dialect.name for dialect in dialects}:
        raise CheckpointError(
            f"{scheme.name}: unknown dialect {name!r}; expected one of {names}"
            f"{did_you_mean(name, names.split(', '))}"
        )
    dialect = dialect_of(scheme, name)
    if not dialect.writes:
        raise CheckpointError(
            f"dialect {dialect.name}: can be read, not written; expected one of {names}"
        )
    return dialect


def encoding_dialect(
    scheme: Scheme,
    name: str | None,
    qdata: Tensor,
    params: Mapping[str, Tensor],
    options: Mapping[str, Any],
) -> Dialect:
    """The dialect of that name if it can store these tensors, else one that can.

    The others are the scheme's default and the native one, which can store all.

    Args:
        scheme: the scheme.
        name: of the dialect the layer was read from, or None.
        qdata: the quantized data.
        params: the scheme's other tensors.
        options: as for `Dialect.encode`.
    """
    metas = {key: tensor.to("meta") for key, tensor in params.items()}
    for dialect in (dialect_of(scheme, name), dialect_of(scheme)):
        try:
            dialect.encode(qdata.to("meta"), metas, options)
        except CheckpointError:
            continue
        return dialect
    return native_of(scheme)


# -- claims ----------------------------------------------------------------------------


def claims_of(scheme: Scheme, header: Header) -> Iterator[Claim]:
    """Claim the layers of a checkpoint that a scheme can read.

    If a layer can only be guessed at, all interpretations are claimed.
    """
    claims = scheme.match(header)
    if claims is not None:
        yield from claims
        return
    layers = {
        dialect: dict.fromkeys(dialect.layers(header))
        for dialect in dialects_of(scheme)
        if not dialect.needs or any(name in header.owners for name in dialect.needs)
    }
    cache: dict[Hashable, list[Callable[[str], Claim]]] = {}
    for layer in dict.fromkeys(itertools.chain.from_iterable(layers.values())):
        cache_key = scheme.likeness(header, layer)
        if cache_key in cache:
            for claim_layer in cache[cache_key]:
                yield claim_layer(layer)
            continue
        dialects = [dialect for dialect in layers if layer in layers[dialect]]
        claims = _best_claims(scheme, header, layer, dialects)
        if cache_key is not None and all(_is_general(claim) for claim in claims):
            cache[cache_key] = [claim.for_layers() for claim in claims]
        yield from claims


def recognise(scheme: Scheme, header: Header, layer: str) -> Claim | None:
    """The most certain claim of any of a scheme's dialects to one layer.

    A layer that can only be guessed at is not claimed.
    """
    claims = _best_claims(scheme, header, layer, dialects_of(scheme))
    if not claims or claims[0].certainty is Certainty.GUESS:
        return None
    return claims[0]


def decode(
    scheme: Scheme, claim: Claim, state_dict: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Take a claimed layer's tensors out of a state dict and check them.

    Args:
        scheme: the scheme of the claim.
        claim: to a layer.
        state_dict: full key to tensor.

    Returns:
        ``(qdata, params)``, views of the state dict's tensors where possible.

    Raises:
        HijackError: if the tensors do not fit each other.
    """
    tensors = {role: state_dict[key] for role, key in claim.keys.items()}
    dialect = dialect_of(scheme, claim.dialect)
    with _naming(scheme, claim):
        qdata, params = dialect.decode(claim, tensors)
        scheme.validate(qdata, params, claim.layer or "weight")
    return qdata, params


def meta_tensors(tensors: Mapping[str, TensorInfo], claim: Claim) -> dict[str, Tensor]:
    """A claimed layer's tensors by role, without their values.

    Args:
        tensors: full key to dtype and shape.
        claim: to the layer.
    """
    infos = {role: tensors[key] for role, key in claim.keys.items()}
    return {
        role: torch.empty(info.torch_shape, dtype=info.torch_dtype, device="meta")
        for role, info in infos.items()
    }


@contextlib.contextmanager
def _naming(scheme: Scheme, claim: Claim) -> Iterator[None]:
    """Have what fails inside say which layer it was and which scheme."""
    try:
        yield
    except HijackError:
        raise
    except Exception as error:
        raise CheckpointError(
            f"{claim.layer or 'weight'}: scheme {scheme.name} cannot read it; "
            f"{type(error).__name__}: {error}; is the file damaged?"
        ) from error


def read_weight(
    scheme: Scheme,
    claim: Claim,
    tensors: Mapping[str, Tensor],
    shape: tuple[int, ...] | None = None,
    dtype: torch.dtype = torch.float32,
    quantized: Quantized | None = None,
) -> QuantizedTensor:
    """A claimed layer of a file as one tensor.

    Args:
        scheme: the scheme of the claim.
        claim: to the layer.
        tensors: full key to tensor.
        shape: of the dense weight, where the caller knows it; a file may pad it.
        dtype: of the dense weight, which files do not store.
        quantized: the layer's tensors where a plugin made them.

    Raises:
        HijackError: if the tensors do not fit each other or the shape.
    """
    if shape is not None:
        claim = claim.cropped(shape)
    if quantized is None:
        quantized = decode(scheme, claim, tensors)
    with _naming(scheme, claim):
        if shape is not None:
            stored = claim.shape
            if stored is None and claim.dialect != native_of(scheme).name:
                stored = scheme.dense_shape(*quantized)  # others pad as they say
            check_shape(scheme, quantized, shape, claim.layer or "weight", stored)
        options = options_of(claim, scheme, quantized)
        config = QuantizationConfig.of(scheme, options, claim.dialect)
        return QuantizedTensor(*quantized, config, shape or claim.shape, dtype)


def options_of(claim: Claim, scheme: Scheme, quantized: Quantized) -> dict[str, Any]:
    """Options a layer of a file was quantized with, as far as they are known.

    What the tensors tell outranks what the file declares.
    """
    return {**declared_options(claim, scheme), **scheme.options_of(*quantized)}


def declared_options(claim: Claim, scheme: Scheme) -> dict[str, Any]:
    """The options that a file declares for a layer, as values.

    Raises:
        CheckpointError: if a value is none of the option's, naming the layer.
    """
    declared = {option.name: option for option in scheme.declared_options()}
    try:
        return {
            name: declared[name].parse(str(value)) if name in declared else value
            for name, value in claim.options.items()
        }
    except HijackError as error:
        raise CheckpointError(f"{claim.layer}: {error}") from error


# -- metadata of a weight --------------------------------------------------------------


def encoded_layer(
    weight: QuantizedTensor, tensors: Mapping[str, Tensor]
) -> EncodedLayer:
    """A layer as `Dialect.finish` expects it.

    Args:
        weight: the layer; may be on the meta device.
        tensors: suffix to tensor, as `Dialect.encode` returned them.
    """
    return EncodedLayer(
        weight.scheme.name,
        tuple(weight.params),
        tuple(weight.shape),
        weight.scheme.block_size(weight.qdata, weight.params),
        infos_of(tensors),
        hidden_options(weight),
        infos_of(weight.plain_tensors()),
    )


def file_metadata(
    layers: Mapping[Dialect, Mapping[str, EncodedLayer]],
    others: Mapping[str, TensorInfo],
) -> FormatMetadata:
    """What the dialects of a file's layers say of the file as a whole.

    Args:
        layers: dialect to the layers it encoded, by name.
        others: key to dtype and shape of all other tensors of the file.

    Raises:
        CheckpointError: if two dialects say what cannot both be in a file.
    """
    merged, names = FormatMetadata(), list[str]()
    for dialect, encoded in layers.items():
        beside = {
            join(name, suffix): info
            for other, named in layers.items()
            if other is not dialect
            for name, layer in named.items()
            for suffix, info in layer.tensors.items()
        }
        more = dialect.finish(encoded, {**others, **beside})
        clash = metadata_clash(merged.metadata, more.metadata)
        if clash is None and None not in (merged.config, more.config):
            clash = None if merged.config == more.config else CONFIG_KEY
        if clash is not None:
            entries = (entry for named in layers.values() for entry in named.values())
            schemes = {entry.scheme for entry in entries}
            raise CheckpointError(
                f"dialect {dialect.name}: says in {clash} what the whole file is, and "
                f"so does dialect {' or '.join(names)} for other layers; expected "
                f"layers of {', '.join(sorted(schemes))} in dialects that share a "
                "file; write them in dialect hijack"
            )
        merged = FormatMetadata(
            merge_metadata(merged.metadata, more.metadata),
            {**merged.tensors, **more.tensors},
            merged.config if more.config is None else more.config,
            tuple(dict.fromkeys((*merged.notes, *more.notes))),
        )
        names.append(dialect.name)
    return merged


def marker_of(weight: QuantizedTensor) -> dict[str, object]:
    """hijack's own marker of a layer, for the metadata of a state dict."""
    return layer_entry(encoded_layer(weight, weight.plain_tensors()))


def hidden_options(weight: QuantizedTensor) -> dict[str, str]:
    """Options that cannot be inferred from a weight's tensors, as texts."""
    inferred = weight.scheme.options_of(weight.qdata, weight.params)
    declared = {option.name: option for option in weight.scheme.declared_options()}
    return {
        name: declared[name].text(value) if name in declared else str(value)
        for name, value in weight.options.items()
        if name not in inferred
    }


def _best_claims(
    scheme: Scheme, header: Header, layer: str, dialects: Iterable[Dialect]
) -> list[Claim]:
    """The most certain claim; all of them if they are guesses."""
    claims: list[Claim] = []
    for claim in (c for d in dialects for c in d.readings(scheme, header, layer)):
        if claim.certainty is Certainty.MARKED:
            return [claim]  # none is more certain, and the first of equals wins
        claims.append(claim)
    best = max(claims, key=lambda claim: claim.certainty, default=None)
    guessed = best is not None and best.certainty is Certainty.GUESS
    return claims if guessed or best is None else [best]


def _is_general(claim: Claim) -> bool:
    """Whether a claim holds for any layer with the same tensors."""
    prefix = f"{claim.layer}." if claim.layer else ""
    beside = all(key.startswith(prefix) for key in claim.keys.values())
    return beside and not claim.contradiction  # which names the layer
