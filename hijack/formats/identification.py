"""Detect the format of a checkpoint: which scheme reads each layer, and why."""

from __future__ import annotations

import dataclasses
import functools
import os
import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from hijack.claim import Certainty, Claim
from hijack.errors import (
    AmbiguousError,
    CheckpointError,
    HijackError,
    UnconsumedScaleError,
)
from hijack.formats import matching, report
from hijack.formats.comfyui_markers import needless_markers
from hijack.formats.dialect import check_marker
from hijack.formats.gguf import read_gguf
from hijack.formats.native_marker import METADATA_KEY
from hijack.formats.preference import preferred
from hijack.formats.unsupported import UnsupportedLayer, find_unsupported
from hijack.registry import Registry, current_registry, disabled
from hijack.safetensors_io.header import (
    DENSE_NAMES,
    Header,
    TensorInfo,
    gc_paused,
    join,
)
from hijack.safetensors_io.reader import Paths, read_header
from hijack.text import block_text, excerpt

#: Last parts of keys of scales of weights and inputs, in all known formats.
SCALE_NAMES = frozenset(
    {
        "scale_weight",
        "weight_scale",
        "weight_scale_inv",
        "weight_scale_2",
        "weight_global_scale",
        "qscale_weight",
        "scale_input",
        "input_scale",
        "activation_scale",
        "_weight_scale",
    }
)
#: Dtypes that files hold dense tensors in, to make them small.
PLAIN_CASTS = ("F8_E4M3", "F8_E5M2")
#: Words in the names of tensors that are needed to decode the weight beside them.
_DECODING_WORDS = ("scale", "scaling", "amax", "absmax", "zero_point", "svd_")
#: Names of what else a weight is made of: a part of low rank, the order of its columns,
#: a rotation, factors of its inputs.
_REST_NAMES = frozenset(
    {
        *("proj_down", "proj_up", "lora_down", "lora_up", "lora_A", "lora_B"),
        *("perm", "g_idx", "smooth", "smooth_factor", "hadamard", "rotation"),
        *("weight_offset", "weight_bias", "zero_points", "zeros", "codebook", "lut"),
    }
)
#: Words beside those in names of scales, which are none of the layer's own.
_SCALE_FILLERS = frozenset({"weight", "weights", "inv", "factor", "fp8"})
#: Last parts of keys of scales of the outputs of a layer or its attention.
_OUTPUT_SCALES = frozenset({"output_scale", "q_scale", "k_scale", "v_scale"})


@dataclasses.dataclass(frozen=True)
class Identification:
    """What `identify` found.

    Attributes:
        source: name of the checkpoint.
        tensors: number of tensors in it.
        layers: layer to the most certain claim to it.
        ambiguous: layer to the claims of which one must be assumed.
        unsupported: layer to its format, which no registered scheme reads.
        unconsumed: keys of scales that no scheme reads.
        unscaled: layers whose weight is quantized data without any scale: plain casts,
            or an unknown format.
        mismatches: layer to where its tensors do not match its metadata.
        unknown: layer to the scheme its metadata names, which is not registered.
        needless: keys of markers of quantized layers on dense ones, which are ignored.
        container: what the file is instead of safetensors, such as GGUF; else "".
        infos: key to dtype and shape of every tensor.
    """

    source: str
    tensors: int
    layers: Mapping[str, Claim]
    ambiguous: Mapping[str, tuple[Claim, ...]] = dataclasses.field(default_factory=dict)
    unsupported: Mapping[str, UnsupportedLayer] = dataclasses.field(
        default_factory=dict
    )
    unconsumed: tuple[str, ...] = ()
    unscaled: tuple[str, ...] = ()
    mismatches: Mapping[str, str] = dataclasses.field(default_factory=dict)
    unknown: Mapping[str, str] = dataclasses.field(default_factory=dict)
    needless: tuple[str, ...] = ()
    container: str = ""
    infos: Mapping[str, TensorInfo] = dataclasses.field(
        default_factory=dict, repr=False, compare=False
    )

    @property
    def foreign(self) -> Mapping[str, UnsupportedLayer]:
        """Former name of `unsupported`."""
        return self.unsupported

    @property
    def orphans(self) -> tuple[str, ...]:
        """Former name of `unconsumed`."""
        return self.unconsumed

    @property
    def contradictions(self) -> Mapping[str, str]:
        """Former name of `mismatches`."""
        return self.mismatches

    @property
    def clear(self) -> bool:
        """True if the checkpoint can be loaded without errors."""
        return next(self._problems(), None) is None

    def check(self) -> None:
        """Refuse a checkpoint that is not `clear`.

        Raises:
            AmbiguousError: naming an ambiguous layer and its interpretations.
            UnconsumedScaleError: naming scales that no scheme reads.
            CheckpointError: naming anything else that stands in the way.
        """
        for problem in self._problems():
            raise problem

    def _problems(self) -> Iterator[CheckpointError]:
        """What stands in the way of loading the checkpoint, the gravest first."""
        yield from self._unreadable()
        for layer, other in self.unsupported.items():
            yield CheckpointError(
                f"{self.source}: {layer or 'weight'}: is in the format "
                f"{other.format}, expected one that a registered scheme reads; install "
                "a plugin for it, or see `hijack identify`"
            )
        for layer, name in self.unknown.items():
            yield CheckpointError(
                f"{self.source}: {layer or 'weight'}: was written by scheme "
                f"{excerpt(name)}, expected one that is registered; install the plugin "
                "that has it, or see `hijack schemes`"
            )
        if self.unconsumed:
            yield UnconsumedScaleError(
                f"{self.source}: no scheme reads {', '.join(self.unconsumed[:3])}"
                f"{' ...' if len(self.unconsumed) > 3 else ''} "
                f"({len(self.unconsumed)} keys); loading would ignore these scales; "
                "install the scheme that wrote the file"
            )
        if self.lacks_scales():
            yield CheckpointError(
                f"{self.source}: {self.unscaled[0] or 'weight'}: holds quantized data "
                "without a scale, expected one beside it, as others have, or plain FP8 "
                "casts alone; install the scheme that wrote the file"
            )

        for key in self._not_dense():
            yield CheckpointError(
                f"{self.source}: {key}: is {self.infos[key].dtype}, expected a dense "
                "dtype or FP8; install the scheme that wrote the file"
            )

    def _not_dense(self) -> Iterator[str]:
        """Keys beside weights that no model has in their dtype.

        Integers may be buffers, but no biases.
        """
        used = {key for claim in self.layers.values() for key in claim.keys.values()}
        used.update(key for layer in self.unsupported.values() for key in layer.keys)
        for key, info in self.infos.items():
            name = key.rpartition(".")[2]
            readable = info.dtype in DENSE_NAMES or info.dtype in PLAIN_CASTS
            odd = info.dtype.startswith(("F8", "F6", "F4")) or name == "bias"
            if odd and not readable and key not in used:
                yield key

    def lacks_scales(self) -> bool:
        """Whether any unscaled data is not a plain cast.

        Only FP8 is, and a matrix is none if other layers of the file have scales.
        """
        infos = [self.infos.get(join(layer, "weight")) for layer in self.unscaled]
        dtypes = {info.dtype for info in infos if info is not None}
        weights = (next(iter(claim.keys.values())) for claim in self.layers.values())
        if not dtypes.issubset(PLAIN_CASTS):
            return True
        matrices = {
            info.dtype for info in infos if info is not None and len(info.shape) > 1
        }
        return any(self.infos[key].dtype in matrices for key in weights)

    def claims(self) -> dict[str, Claim]:
        """The claim to each layer.

        Raises:
            AmbiguousError: naming an ambiguous layer and its interpretations.
            CheckpointError: naming a layer whose tensors do not match its metadata, or
                what the file is if it is not safetensors.
        """
        for problem in self._unreadable():
            raise problem
        return dict(self.layers)

    def _unreadable(self) -> Iterator[CheckpointError]:
        """What stands in the way of reading the claimed layers."""
        if self.container:
            yield CheckpointError(
                f"{self.source}: is {self.container}, expected safetensors"
            )
        for layer, reason in self.mismatches.items():
            yield CheckpointError(
                f"{self.source}: {layer}: metadata and tensors do not match; "
                f"{excerpt(reason)}; get the file again, or quantize the original"
            )
        for layer, claims in self.ambiguous.items():
            yield AmbiguousError(f"{self.source}: {layer}: {report.choice(claims)}")

    def groups(self) -> list[tuple[str, str, str, int]]:
        """Scheme, dialect, block size and number of layers of each kind."""
        return report.groups(self, lambda claim: block_text(claim.block_size))

    def as_table(self, *, verbose: bool = False) -> str:
        """Everything found, human-readable.

        Args:
            verbose: whether to list every layer, with the evidence.
        """
        return report.as_table(self, verbose)

    def to_json(self) -> str:
        """Everything found, as JSON; its keys do not change with the attributes."""
        return report.to_json(self)


@gc_paused()
def identify(
    source: Paths | Header,
    registry: Registry | None = None,
    *,
    assume: Sequence[str] = (),
) -> Identification:
    """Detect from the header alone which scheme reads which layer.

    Args:
        source: a path, a list of shards, or a header already read.
        registry: whose schemes are tried; default is the registry in force.
        assume: names of schemes or dialects, block sizes such as ``"128x128"``, or
            options such as ``"rotation=256"``, that choose where the file is ambiguous.
            They change nothing elsewhere. What they leave open, ``HIJACK_PREFER``
            chooses, a comma list of the same words, the first first.

    Returns:
        Claims with their evidence, and what no scheme claims.

    Raises:
        HeaderError: if a file is malformed.
        CheckpointError: if an assumption has nothing to choose.
    """
    if isinstance(source, str | os.PathLike) and (gguf := read_gguf(source)):
        return Identification(str(source), gguf.tensors, {}, container=str(gguf))
    header = source if isinstance(source, Header) else read_header(source)
    registry = current_registry(registry)
    claims = registry.identify(header) + _scheme_claims(registry, header)
    layers, ambiguous = _resolve(claims)
    layers, ambiguous = _assume(header.source, layers, ambiguous, assume)
    mismatches, unknown = _metadata_mismatches(header, registry, layers)
    mismatches |= _impossible(header, registry, layers)
    layers = {name: claim for name, claim in layers.items() if name not in unknown}
    known = {*layers, *ambiguous, *mismatches, *unknown}
    unsupported: Mapping[str, UnsupportedLayer] = {}
    if _has_quantized_data(header, known):
        unsupported = find_unsupported(header, known)
    unscaled = _unscaled(header, known.union(unsupported))
    return Identification(
        source=header.source,
        tensors=len(header.tensors),
        layers=layers,
        ambiguous=ambiguous,
        unsupported=unsupported,
        unconsumed=_unconsumed(header, claims, unsupported, unscaled),
        unscaled=unscaled,
        mismatches=mismatches,
        unknown=unknown,
        needless=needless_markers(header),
        infos=header.tensors,
    )


def _has_quantized_data(header: Header, known: set[str]) -> bool:
    """Whether a layer beside the known ones has anything but dense tensors."""
    return any(
        info.dtype not in DENSE_NAMES
        for layer, parts in header.parts.items()
        if layer not in known
        for info in parts.values()
    )


def _scheme_claims(registry: Registry, header: Header) -> list[Claim]:
    """The claims of the registered schemes; one that fails claims nothing.

    A disabled scheme can be used by name, but claims nothing.
    """
    claims: list[Claim] = []
    for name, scheme in registry.schemes().items():
        if not disabled(name):
            claim = functools.partial(matching.claims_of, scheme, header)
            claims += registry.claims_of(scheme, header, claim)
    return claims


def _resolve(
    claims: Iterable[Claim],
) -> tuple[dict[str, Claim], dict[str, tuple[Claim, ...]]]:
    """The most certain claim to each layer, and the layers without a single one."""
    by_layer: dict[str, list[Claim]] = {}
    for claim in claims:
        by_layer.setdefault(claim.layer, []).append(claim)
    layers: dict[str, Claim] = {}
    ambiguous: dict[str, tuple[Claim, ...]] = {}
    for layer, candidates in by_layer.items():
        best = max(claim.certainty for claim in candidates)
        top = [claim for claim in candidates if claim.certainty == best]
        if best is Certainty.GUESS or any(c.scheme != top[0].scheme for c in top):
            ambiguous[layer] = tuple(top)
        else:
            layers[layer] = top[0]
    return layers, ambiguous


def _assume(
    source: str,
    layers: dict[str, Claim],
    ambiguous: dict[str, tuple[Claim, ...]],
    assume: Sequence[str],
) -> tuple[dict[str, Claim], dict[str, tuple[Claim, ...]]]:
    """Choose among the claims to a layer by what the user assumes, then prefers."""
    assumed = [assume] if isinstance(assume, str) else list(assume)
    orders = (("assumed", assumed), ("preferred", preferred()))
    unused = set(assumed)
    undecided: dict[str, tuple[Claim, ...]] = {}
    for layer, claims in ambiguous.items():
        why: list[str] = []
        for verb, words in orders:
            if why and _is_one(claims):
                break
            used = []
            for word in words:
                fitting = tuple(c for c in claims if word in c.words().values())
                unused.difference_update([word] if fitting else ())
                used += [word] if fitting else []
                claims = fitting or claims
            why += [f"{verb}: {', '.join(used)}"] if used else []
        if why and _is_one(claims):
            evidence = (*claims[0].evidence, *why)
            layers[layer] = dataclasses.replace(
                claims[0], evidence=evidence, chosen="; ".join(why)
            )
        else:
            undecided[layer] = claims
    if unused:
        raise CheckpointError(
            f"assume: {sorted(unused)[0]!r} chooses nothing in {source}; expected the "
            "name of a scheme or dialect, a block size, or an option as NAME=VALUE, "
            "that a layer is ambiguous about; see `hijack identify`"
        )
    return layers, undecided


def _is_one(claims: Sequence[Claim]) -> bool:
    """Whether all claims decode a layer to the same weight."""
    return len({claim.interpretation() for claim in claims}) == 1


def _metadata_mismatches(
    header: Header, registry: Registry, layers: Mapping[str, Claim]
) -> tuple[dict[str, str], dict[str, str]]:
    """Marked layers whose tensors do not match, and those of unknown schemes.

    Keys that only one dialect uses outrank a marker: some tool kept old metadata.
    """
    schemes = registry.schemes()
    mismatches: dict[str, str] = {}
    unknown: dict[str, str] = {}
    for layer, marker in header.layer_metadata(METADATA_KEY).items():
        claim = layers.get(layer)
        certain = claim is not None and claim.certainty > Certainty.FITS
        if certain or not _is_quantized(header, layer, marker):
            continue
        name = str(marker.get("scheme"))
        if name not in schemes:
            unknown[layer] = name
            continue
        native = matching.native_of(schemes[name])
        if problem := check_marker(schemes[name], native, header, layer):
            mismatches[layer] = problem
    return mismatches, unknown


def _impossible(
    header: Header, registry: Registry, layers: Mapping[str, Claim]
) -> dict[str, str]:
    """Layers whose marker says what an option, or the tensors, cannot be.

    What only the data show is found when they are read.
    """
    reasons: dict[tuple[object, ...], str] = {}
    impossible: dict[str, str] = {}
    for layer, claim in layers.items():
        if not claim.options:
            continue
        infos = (header.tensors[key] for key in claim.keys.values())
        shapes = tuple((info.dtype, info.shape) for info in infos)
        kind = (claim.interpretation(), claim.shape, tuple(claim.keys), shapes)
        if kind not in reasons:
            reason = _why_impossible(header, registry, claim)
            reason = reason.removeprefix(f"{layer}: ")
            reasons[kind] = reason.removesuffix("; get the file again")
        if reasons[kind]:
            impossible[layer] = reasons[kind]
    return impossible


def _why_impossible(header: Header, registry: Registry, claim: Claim) -> str:
    """What a scheme says against a claim, or ""."""
    try:
        scheme = registry.get(claim.scheme)
        matching.declared_options(claim, scheme)
        dialects = {d.name: d for d in matching.dialects_of(scheme)}
        if claim.dialect not in dialects:
            return ""  # a plugin makes the layer's tensors
        tensors = matching.meta_tensors(header.tensors, claim)
        qdata, params = dialects[claim.dialect].decode(claim, tensors)
        scheme.validate(qdata, params, claim.layer or "weight")
    except HijackError as error:
        return str(error)
    except Exception:  # a plugin's, which must see data
        return ""
    return ""


def _is_quantized(header: Header, layer: str, marker: Mapping[str, Any]) -> bool:
    """Whether a marked layer is still quantized, and was not made dense since."""
    weight, names = header.tensors.get(join(layer, "weight")), marker.get("params")
    listed = names if isinstance(names, list) else []
    return weight is not None and (
        weight.dtype not in DENSE_NAMES
        or any(join(layer, str(name)) in header.tensors for name in listed)
    )


def _unscaled(header: Header, known: set[str]) -> tuple[str, ...]:
    """Layers whose weight is quantized data that is otherwise unknown."""
    return tuple(
        layer
        for layer, parts in header.parts.items()
        if "weight" in parts
        and parts["weight"].dtype not in DENSE_NAMES
        and layer not in known
    )


def _unconsumed(
    header: Header,
    claims: Iterable[Claim],
    unsupported: Mapping[str, UnsupportedLayer],
    unscaled: Iterable[str],
) -> tuple[str, ...]:
    """Keys of scales that no scheme reads; under unknown names beside quantized data.

    A claimed layer may have more tensors than its dialect knows, such as a scale that
    its inputs are multiplied by. Without it the weight would be decoded wrongly.
    """
    used = {key for claim in claims for key in claim.keys.values()}
    used |= {key for layer in unsupported.values() for key in layer.keys}
    quantized = {claim.layer for claim in claims}.union(unscaled)
    lone = set(unscaled)
    nearby = _Nearby(header, lone, used)
    decoding = {n for n in header.owners if any(word in n for word in _DECODING_WORDS)}
    unconsumed = []
    for key in header.tensors:
        if key in used:
            continue
        layer, _, name = key.rpartition(".")
        if name in _OUTPUT_SCALES and not nearby.is_named(key):
            continue
        scales = name in SCALE_NAMES or (
            layer in quantized and (name in decoding or name in _REST_NAMES)
        )
        if scales or nearby.may_scale(key):
            unconsumed.append(key)
    return tuple(unconsumed)


class _Nearby:
    """Finds the tensors that may be the scales of quantized data without any.

    Programs keep them one level down (``X.weight_quantizer.scale``), beside the layer
    (``X_scale``, ``scale_X``), in a table of their own (``scales.X``), or all in one
    tensor. Data of any name counts, such as that of stacked experts.

    Args:
        header: of the checkpoint.
        layers: those whose weight is such data.
        used: keys that are read.
    """

    def __init__(
        self, header: Header, layers: Collection[str], used: Collection[str]
    ) -> None:
        self.header, self.layers = header, layers
        self.stacked = {
            key
            for key, info in header.tensors.items()
            if info.dtype in PLAIN_CASTS and len(info.shape) > 2 and key not in used
            if key.rpartition(".")[2] != "weight"
        }
        matrices = [
            layer for layer in layers if len(header.parts[layer]["weight"].shape) > 1
        ]
        self.names = {_words(name) for name in (*matrices, *self.stacked)}
        self.owners = {key.rpartition(".")[0] for key in self.stacked}

    def may_scale(self, key: str) -> bool:
        """Whether a tensor may be the scale of any of the data."""
        if not self.names or not self.header.tensors[key].real:
            return False
        if self.layers and _is_part_of(self.layers, self.header, key):
            return True
        if not any(word in key.lower() for word in _DECODING_WORDS):
            return False
        if self.is_named(key):
            return True
        owner, _, name = key.rpartition(".")
        if not any(word in name.lower() for word in _DECODING_WORDS):
            return False  # of a module such as an upscaler
        of_all = "weight" in name or "quant" in key
        return of_all or owner in self.owners

    def is_named(self, key: str) -> bool:
        """Whether a tensor has the name of any of the data, apart from its own."""
        words = _words(key)
        inner = (words[start:] for start in range(1, len(words) - 2))  # of a table
        return words in self.names or any(name in self.names for name in inner)


def _words(key: str) -> tuple[str, ...]:
    """The words of a name, without those that only say that it is of a scale."""
    return tuple(
        word
        for word in re.split("[^0-9a-z]+", key.lower())
        if word
        and word not in _SCALE_FILLERS
        and not any(each in word for each in _DECODING_WORDS)
    )


def _is_part_of(layers: Collection[str], header: Header, key: str) -> bool:
    """Whether a tensor is of a layer whose matrix needs none beside it but a bias.

    Whatever its name is, it may be the scale.
    """
    owner, _, name = key.rpartition(".")
    if name in ("weight", "bias") or not header.tensors[key].real:
        return False
    if owner not in layers and "weight" in header.parts.get(owner, {}):
        return False  # of a module within
    modules = owner.split(".")
    outer = (".".join(modules[:end]) for end in range(len(modules), 0, -1))
    layer = next((name for name in outer if name in layers), None)
    return layer is not None and len(header.parts[layer]["weight"].shape) > 1
