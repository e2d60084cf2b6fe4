"""Load quantized checkpoints into any model."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence

from torch import Tensor, nn

from hijack.errors import CheckpointError, ModuleError, ShapeError, UnconsumedScaleError
from hijack.formats.claim import Claim
from hijack.formats.detection import identify
from hijack.formats.dialect import Dialect
from hijack.formats.native_marker import METADATA_KEY, write_marker
from hijack.hooks import Layer, Wrapped
from hijack.layers import DENSE_DTYPES, Quantized, check_shape, install, restore
from hijack.registry import default_registry
from hijack.safetensors_io.header import Header, join
from hijack.safetensors_io.reader import open_tensors, read_header
from hijack.scheme import Scheme

Source = (
    str | os.PathLike[str] | Sequence[str | os.PathLike[str]] | Mapping[str, Tensor]
)


@dataclasses.dataclass(frozen=True)
class LoadReport:
    """What `load` did.

    Attributes:
        layers: module name to the claim it was loaded by.
        dense: number of other tensors loaded.
        missing: keys of the model the checkpoint lacks; empty if strict.
        unexpected: keys of the checkpoint the model lacks; empty if strict.
    """

    layers: Mapping[str, Claim]
    dense: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()

    def __str__(self) -> str:
        schemes = sorted({claim.scheme for claim in self.layers.values()})
        return (
            f"{len(self.layers)} quantized layers ({', '.join(schemes) or 'none'}), "
            f"{self.dense} dense tensors, {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected"
        )


def load(
    model: nn.Module,
    source: Source,
    strict: bool = True,
    *,
    assume: Sequence[str] = (),
) -> LoadReport:
    """Load a checkpoint, wrapping the layers that are quantized in it.

    Tensors are taken as they are in the file (mapped, not copied), keep their dtypes,
    and go to the device their module is on; a model on the meta device stays where the
    file is read. Everything is checked before the model is touched.

    Args:
        model: any module, dense, wrapped or on the meta device.
        source: a safetensors file, an index file, a list of shards, or a state dict.
        strict: whether missing and unexpected keys are errors.
        assume: how to read what the file does not tell, as for `identify`.

    Returns:
        Which layer was read by which scheme, and what was left over.

    Raises:
        HeaderError: if a file is malformed.
        AmbiguousError: if a layer may be read in several ways.
        UnconsumedScaleError: if a scale belongs to no claimed layer.
        ShapeError: if tensors do not fit the model or each other.
        CheckpointError: if keys are missing or unexpected, and ``strict``.
    """
    header, tensors = _open(source)
    found = identify(header, assume=assume)
    claims = found.claims()
    for layer, other in found.foreign.items():
        raise CheckpointError(
            f"{header.source}: {layer}: is in the format {other.format}, expected one "
            "that a registered scheme reads; install a plugin for it, or see "
            "`hijack identify`"
        )
    if found.orphans:
        raise UnconsumedScaleError(
            f"{header.source}: no scheme reads {', '.join(found.orphans[:3])}"
            f"{' ...' if len(found.orphans) > 3 else ''} ({len(found.orphans)} keys); "
            "loading would ignore these scales; install the scheme that wrote the file"
        )
    plan = _Plan(model, header, claims, tensors)
    plan.check(strict)
    plan.apply()
    return LoadReport(claims, len(plan.dense), plan.missing, plan.unexpected)


# -- details ---------------------------------------------------------------------------


def _open(source: Source) -> tuple[Header, Mapping[str, Tensor]]:
    if isinstance(source, Mapping):
        return Header.from_state_dict(source, _state_dict_metadata(source)), source
    header = read_header(source)
    return header, open_tensors(header)


def _state_dict_metadata(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """The markers wrapped modules left in their state dict, as a file has them."""
    entries = getattr(state_dict, "_metadata", None) or {}
    marked = {n: entry["hijack"] for n, entry in entries.items() if "hijack" in entry}
    return {METADATA_KEY: write_marker(marked)} if marked else {}


class _Plan:
    """All of a load that can be known before the model changes."""

    def __init__(
        self,
        model: nn.Module,
        header: Header,
        claims: Mapping[str, Claim],
        tensors: Mapping[str, Tensor],
    ) -> None:
        self.model, self.header, self.claims, self.tensors = (
            model,
            header,
            claims,
            tensors,
        )
        self.modules = dict(model.named_modules())
        used = {key for claim in claims.values() for key in claim.keys.values()}
        used |= _markers(header, claims)
        self.dense = [key for key in header.tensors if key not in used]
        self.made: dict[str, Quantized] = {}
        self.missing: tuple[str, ...] = ()
        self.unexpected: tuple[str, ...] = ()

    def check(self, strict: bool) -> None:
        """Compare keys and shapes; decode the claimed layers.

        Raises:
            HijackError: as `load` documents.
        """
        self._check_keys(strict)
        registry = default_registry()
        for name, claim in list(self.claims.items()):
            module = self.modules.get(name)
            if module is None:
                continue  # among the unexpected keys, which strict refuses
            scheme = registry.get(claim.scheme)
            _check_target(module, scheme, name)
            shape = _weight_shape(module)
            made = scheme.decode(claim.cropped(shape), self.tensors)
            check_shape(scheme, made, shape, name)
            self._check_names(name, claim, made)
            self.made[name] = made

    def _check_names(self, name: str, claim: Claim, made: Quantized) -> None:
        """Refuse a tensor that would take the place of one the layer was read from."""
        taken = {join(name, param) for param in made[1]}.intersection(self.dense)
        if taken:
            raise CheckpointError(
                f"{self.header.source}: {min(taken)}: is beside a layer read in "
                f"dialect {claim.dialect}, which has no such tensor; expected a "
                "layer in one dialect; convert the file it came from again"
            )

    def _check_keys(self, strict: bool) -> None:
        current = self.model.state_dict()
        expected = set(current)
        tied = _tied_names(self.model)
        for name in self.claims:
            if name in self.modules:
                expected.discard(join(name, "weight"))
        for name, module in self.modules.items():
            if isinstance(module, Wrapped):  # its scales come with its weight
                expected -= {join(name, key) for key in module._hijack.names}
        given = set(self.dense)
        present = given | {join(name, "weight") for name in self.claims}
        self.missing = tuple(
            key
            for key in current
            if key in expected - given and not tied.get(key, set()) & present
        )
        self.unexpected = tuple(
            [key for key in self.dense if key not in current]
            + [
                c.keys["weight"]
                for n, c in self.claims.items()
                if n not in self.modules
            ]
        )
        if strict and (self.missing or self.unexpected):
            raise CheckpointError(
                f"{self.header.source}: keys do not match the model; missing "
                f"{_some(self.missing)}; unexpected {_some(self.unexpected)}; "
                "pass strict=False to load what fits"
            )
        for key in given & set(current):
            _check_dense(key, self.header, current[key], self.modules)

    def apply(self) -> None:
        """Change the model; nothing here is expected to fail."""
        registry = default_registry()
        tied = _tied_modules(self.model)
        for name, made in self.made.items():
            claim = self.claims[name]
            _replace_layer(self.modules[name], registry.get(claim.scheme), claim, made)
        rest = {key: self.tensors[key] for key in self.dense}
        here = self.model.state_dict()
        placed = {
            key: tensor if (old := here.get(key)) is None else _place(tensor, old)
            for key, tensor in rest.items()
        }
        self.model.load_state_dict(placed, strict=False, assign=True)
        _tie(tied, set(self.dense), self.made)


def _markers(header: Header, claims: Mapping[str, Claim]) -> set[str]:
    """Tensors that say something of the whole file, and are none of the model's."""
    layers: dict[Dialect, list[str]] = {}
    for name, claim in claims.items():
        dialect = default_registry().get(claim.scheme).dialect(claim.dialect)
        layers.setdefault(dialect, []).append(name)
    keys = header.tensors.keys()
    return {
        key
        for dialect, names in layers.items()
        for key in dialect.unmark(header.metadata, keys, names)[1]
    }


def _check_target(module: nn.Module, scheme: Scheme, name: str) -> None:
    if not isinstance(module, scheme.targets):
        names = ", ".join(target.__name__ for target in scheme.targets)
        raise ModuleError(
            f"{name}: the checkpoint has {scheme.name} codes for a "
            f"{type(module).__name__}, expected one of {names}"
        )


def _check_dense(
    key: str, header: Header, current: Tensor, modules: Mapping[str, nn.Module]
) -> None:
    """Refuse a dense tensor of another shape, or codes nobody can read."""
    info = header.tensors[key]
    owner = modules.get(key.rpartition(".")[0])
    if isinstance(owner, Wrapped) and key.endswith("weight"):
        expected, floating = owner._hijack.shape, True
    else:
        expected, floating = tuple(current.shape), current.dtype in DENSE_DTYPES
    if info.shape != expected:
        raise ShapeError(
            f"{key}: got shape {info.shape}, expected {expected}; is this the right "
            "model for the file?"
        )
    if floating and info.torch_dtype not in DENSE_DTYPES:
        raise CheckpointError(
            f"{key}: got {info.dtype} without scales that a scheme reads, expected a "
            "dense dtype; install the scheme that wrote the file, or see "
            "`hijack identify`"
        )


def _weight_shape(module: nn.Module) -> tuple[int, ...]:
    if isinstance(module, Wrapped):
        return module._hijack.shape
    return tuple(module._parameters["weight"].shape)  # type: ignore[union-attr]


def quantized(module: Wrapped) -> Quantized:
    params = {name: module._buffers[name] for name in module._hijack.names}
    return module.weight.detach(), params  # type: ignore[return-value]


def _replace_layer(
    module: nn.Module, scheme: Scheme, claim: Claim, made: Quantized
) -> None:
    """Make a dense or wrapped module hold a checkpoint's codes."""
    old: nn.Parameter = module._parameters["weight"]  # type: ignore[assignment]
    shape, dtype, grad = _weight_shape(module), old.dtype, old.requires_grad
    if isinstance(module, Wrapped):
        dtype, grad = module._hijack.dtype, module._hijack.requires_grad
        restore(module, old)
    qdata, params = made
    if not isinstance(qdata, nn.Parameter):
        qdata = _place(qdata, old)
    block = {} if claim.block_size is None else {"block_size": claim.block_size}
    layer = Layer(
        scheme=scheme,
        base=type(module),
        shape=shape,
        dtype=dtype,
        options=dict(block),
        dialect=claim.dialect,
        requires_grad=grad,
    )
    install(module, layer, qdata, {n: _place(t, old) for n, t in params.items()})


def _place(tensor: Tensor, old: Tensor) -> Tensor:
    """Move a tensor to where the old one is; meta stands for anywhere."""
    return tensor if old.is_meta else tensor.to(old.device)


@dataclasses.dataclass(frozen=True)
class _Place:
    """One name under which a parameter is registered."""

    key: str
    name: str
    module: nn.Module
    attribute: str


def _tied_modules(model: nn.Module) -> list[list[_Place]]:
    """Places that share a parameter, for each parameter that has several."""
    groups: dict[int, list[_Place]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                place = _Place(join(name, attribute), name, module, attribute)
                groups.setdefault(id(parameter), []).append(place)
    return [group for group in groups.values() if len(group) > 1]


def _tied_names(model: nn.Module) -> dict[str, set[str]]:
    """Key to the other keys of the same parameter."""
    names = [{place.key for place in group} for group in _tied_modules(model)]
    return {key: group - {key} for group in names for key in group}


def _tie(
    groups: list[list[_Place]], dense: set[str], made: Mapping[str, Quantized]
) -> None:
    """Share again what was shared, where the checkpoint holds only one of the names."""
    for group in groups:
        loaded = [p for p in group if p.key in dense or p.name in made]
        if not loaded:
            continue
        source = loaded[0]
        for place in group:
            if place in loaded:
                continue
            if isinstance(source.module, Wrapped) and source.attribute == "weight":
                claim = Claim(place.name, "", source.module._hijack.dialect or "", {})
                qdata, params = source.module.weight, quantized(source.module)[1]
                scheme = source.module._hijack.scheme
                _replace_layer(place.module, scheme, claim, (qdata, params))
            else:
                shared = source.module._parameters[source.attribute]
                place.module._parameters[place.attribute] = shared


def _some(keys: Sequence[str]) -> str:
    shown = ", ".join(keys[:3]) + (" ..." if len(keys) > 3 else "")
    return f"{len(keys)} ({shown})" if keys else "none"
