"""Load quantized checkpoints into any model."""

from __future__ import annotations

import dataclasses
import os
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hijack.claim import Claim
from hijack.device_map import DeviceMap, Devices
from hijack.dtypes import DENSE_DTYPES
from hijack.errors import (
    CheckpointError,
    ModuleError,
    ShapeError,
    UnconsumedScaleError,
)
from hijack.formats import matching
from hijack.formats.comfyui_markers import needless_markers
from hijack.formats.dialect import Dialect
from hijack.formats.identification import PLAIN_CASTS, identify
from hijack.formats.native_marker import METADATA_KEY, write_marker
from hijack.kernels import describe
from hijack.module_names import LayerNames
from hijack.modules import Change, Wrapped, apply_all, prepare, quantized_weight
from hijack.offloading import refuse_offloaded
from hijack.quantized import QuantizedTensor
from hijack.registry import Registry, current_registry, strict
from hijack.resharding import is_distributed, like
from hijack.safetensors_io.header import Header, join
from hijack.safetensors_io.reader import open_tensors, read_header
from hijack.safetensors_io.reader import prefetch as read_ahead
from hijack.scheme import Scheme
from hijack.stored import plain, refuse_raw
from hijack.unsaved_tensors import recompute_unsaved, unsaved_on_meta

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
        cast: keys of plain FP8 tensors, which were cast to the model's dtype.
        on_meta: tensors of the model that no checkpoint holds and that are on the meta
            device still; empty if strict.
        model: what was loaded into, unless it is gone.
    """

    layers: Mapping[str, Claim]
    dense: int
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    cast: tuple[str, ...] = ()
    on_meta: tuple[str, ...] = ()
    model: Callable[[], nn.Module | None] = dataclasses.field(
        default=lambda: None, repr=False, compare=False
    )

    def forwards(self) -> dict[str, str]:
        """What computes each quantized layer now, and why nothing faster does.

        The answer depends on the device the layer is on; on the CPU the weights are
        read for it.

        Returns:
            Module name to the name of a kernel and the reasons against the others.
        """
        model = self.model()
        modules = {} if model is None else dict(model.named_modules())
        weights = {n: quantized_weight(modules[n]) for n in self.layers if n in modules}
        return {
            name: describe(modules[name], weight)
            for name, weight in weights.items()
            if weight is not None
        }

    def __str__(self) -> str:
        schemes = sorted({claim.scheme for claim in self.layers.values()})
        cast = f" ({len(self.cast)} cast from FP8)" if self.cast else ""
        on_meta = f", {len(self.on_meta)} on meta" if self.on_meta else ""
        return (
            f"{len(self.layers)} quantized layers ({', '.join(schemes) or 'none'}), "
            f"{self.dense} dense tensors{cast}, {len(self.missing)} missing, "
            f"{len(self.unexpected)} unexpected{on_meta}"
        )


def load(
    model: nn.Module,
    source: Source,
    strict: bool = True,
    *,
    assume: Sequence[str] = (),
    prefetch: bool = False,
    device_map: DeviceMap | None = None,
    registry: Registry | None = None,
) -> LoadReport:
    """Load a checkpoint, wrapping the layers that are quantized in it.

    Tensors are taken as they are in the file (mapped, not copied), keep their dtypes,
    and go to the device their module is on; a model on the meta device stays where the
    file is read. Everything is checked before the model is touched.

    The file may hold the model under a prefix, such as ``model.diffusion_model.``, and
    the model may have adapters around its layers: they stay as they are. Tensors that a
    model built on meta computes itself, such as tables of positions, are computed.

    Args:
        model: any module, dense, wrapped or on the meta device.
        source: a safetensors file, an index file, a list of shards, or a state dict.
        strict: whether missing and unexpected keys are errors.
        assume: how to read what the file does not tell, as for `identify`.
        prefetch: whether to have the system read the files into its cache in the
            background, where it can. Otherwise tensors are read when they are used.
        device_map: a device, or names of modules to devices, as accelerate has them
            but for ``disk``; what is mapped to ``meta`` is not loaded.
        registry: whose schemes and plugins are asked; None for the one in force.

    Returns:
        Which layer was read by which scheme, and what was left over.

    Raises:
        HeaderError: if a file is malformed.
        AmbiguousError: if a layer may be read in several ways.
        UnconsumedScaleError: if a scale belongs to no claimed layer.
        ShapeError: if tensors do not fit the model or each other.
        CheckpointError: if keys are missing or unexpected, or tensors would stay on
            meta, and ``strict``.
        ModuleError: if weights of the model are offloaded by hooks, or a layer of the
            file is quantized that cannot be in the model.
    """
    registry = current_registry(registry)
    refuse_offloaded(model, "load")
    devices = Devices(device_map, model)
    header, tensors = open_source(source)
    if prefetch:
        read_ahead(header)
    found = identify(header, registry, assume=assume)
    found.check()
    plan = _Plan(model, header, found.claims(), tensors, registry, devices)
    plan.check(strict)
    plan.apply()
    return LoadReport(
        {plan.names.module(layer): claim for layer, claim in plan.claims.items()},
        len(plan.dense),
        plan.missing,
        plan.unexpected,
        plan.cast,
        plan.on_meta,
        weakref.ref(model),
    )


def open_source(source: Source) -> tuple[Header, Mapping[str, Tensor]]:
    """The header and the tensors of what `load` accepts."""
    if isinstance(source, Mapping):
        refuse_raw(source)
        tensors = {key: plain(tensor) for key, tensor in source.items()}
        return Header.from_state_dict(tensors, _state_dict_metadata(source)), tensors
    header = read_header(source)
    return header, open_tensors(header)


# -- details ---------------------------------------------------------------------------


def _state_dict_metadata(state_dict: Mapping[str, Tensor]) -> dict[str, str]:
    """The markers wrapped modules left in their state dict, as a file has them."""
    entries = getattr(state_dict, "_metadata", None) or {}
    marked = {n: entry["hijack"] for n, entry in entries.items() if "hijack" in entry}
    return {METADATA_KEY: write_marker(marked)} if marked else {}


class _Plan:
    """All of a load that can be known before the model changes.

    Modules and their tensors are called here what the checkpoint calls them.
    """

    def __init__(
        self,
        model: nn.Module,
        header: Header,
        claims: Mapping[str, Claim],
        tensors: Mapping[str, Tensor],
        registry: Registry,
        devices: Devices,
    ) -> None:
        self.model, self.header, self.tensors = model, header, tensors
        self.registry, self.devices = registry, devices
        self.names = LayerNames(model, {*header.parts, *claims})
        self.modules = {
            self.names.layer(name): module for name, module in model.named_modules()
        }
        self.claims = {name: self._select(name, c) for name, c in claims.items()}
        used = {key for c in self.claims.values() for key in c.keys.values()}
        used |= marker_keys(header, self.claims, registry)
        self.dense = dict.fromkeys(key for key in header.tensors if key not in used)
        self._leave_on_meta()
        self.changes: dict[str, Change] = {}
        self.places: dict[str, tuple[torch.device, torch.dtype | None]] = {}
        self.distributed: dict[str, Tensor] = {}
        self.missing: tuple[str, ...] = ()
        self.unexpected: tuple[str, ...] = ()
        self.on_meta: tuple[str, ...] = ()
        self.computed: list[tuple[nn.Module, dict[str, Tensor]]] = []

    def _device(self, key: str) -> torch.device | None:
        """Where the device map has a tensor."""
        return self.devices.of(self.names.name(key))

    def _stays(self, key: str) -> bool:
        """Whether the device map has a tensor stay on meta."""
        device = self._device(key)
        return device is not None and device.type == "meta"

    def _leave_on_meta(self) -> None:
        """Forget what is not to be loaded."""
        self.dense = {key: None for key in self.dense if not self._stays(key)}
        self.claims = {
            name: claim
            for name, claim in self.claims.items()
            if not self._stays(join(name, "weight"))
        }

    def _select(self, name: str, claim: Claim) -> Claim:
        """The claim to a layer, unless a plugin has another."""
        module = self.modules.get(name)
        if module is None:
            return claim
        answer = self.registry.select_scheme(module, join(name, ""), self.header)
        return answer if isinstance(answer, Claim) else claim

    def check(self, strict: bool) -> None:
        """Compare keys and shapes; decode the claimed layers and bind their forwards.

        Raises:
            HijackError: as `load` documents.
        """
        self._check_keys(strict)
        self._check_unsaved(strict)
        for name, claim in self.claims.items():
            module = self.modules.get(name)
            if module is None:
                continue  # among the unexpected keys, which strict refuses
            scheme = self.registry.get(claim.scheme)
            _check_target(module, scheme, name)
            weight = self._quantized(module, scheme, name, claim)
            self.changes[name] = prepare(module, weight, self.registry)
        self._share_changes()

    def _share_changes(self) -> None:
        """Have modules share a quantized weight that shared the dense one."""
        changing = {id(change.module) for change in self.changes.values()}
        for group in _tied_modules(self.model, self.names):
            source = _first_loaded(group, self.dense, self.changes)
            if source is None or source.name not in self.changes:
                continue
            shared = self.changes[source.name].weight
            for place in group:
                if place.key not in self.dense and id(place.module) not in changing:
                    change = prepare(place.module, shared, self.registry)
                    self.changes[place.name] = change
                    changing.add(id(place.module))

    def _quantized(
        self, module: nn.Module, scheme: Scheme, name: str, claim: Claim
    ) -> QuantizedTensor:
        """A layer of the file as its module will have it, still where the file is."""
        old: Tensor = module._parameters["weight"]  # type: ignore[assignment]
        prefix = join(name, "")
        answer = self.registry.create_params(module, scheme, prefix, self.tensors)
        weight = matching.read_weight(
            scheme, claim, self.tensors, tuple(old.shape), old.dtype, answer
        )
        self._check_names(name, claim, weight.params)
        return weight

    def _check_names(
        self, name: str, claim: Claim, params: Mapping[str, Tensor]
    ) -> None:
        """Refuse a tensor that would take the place of one the layer was read from."""
        taken = {join(name, param) for param in params}.intersection(self.dense)
        if taken:
            raise CheckpointError(
                f"{self.header.source}: {min(taken)}: is beside a layer read in "
                f"dialect {claim.dialect}, which has no such tensor; expected a "
                "layer in one dialect; convert the file it came from again"
            )

    def _check_keys(self, strict: bool) -> None:
        names = self.names
        state = self.model.state_dict()
        current = {names.key(name): tensor for name, tensor in state.items()}
        expected = {
            names.key(name)
            for name in state
            if not names.is_adapter(name) and not self._stays(names.key(name))
        }
        tied = _tied_names(self.model, names)
        for name in self.claims:
            if name in self.modules:
                expected.discard(join(name, "weight"))
        for name, module in self.modules.items():
            weight = quantized_weight(module)
            if weight is not None:  # its scales come with it
                expected -= {join(name, key) for key in weight.params}
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
            dtype = _check_dense(key, self.header, current[key], self.modules)
            self.places[key] = self._device(key) or current[key].device, dtype
            if is_distributed(current[key]):
                self.distributed[key] = current[key]
        self._check_unknown_scales()

    def _check_unsaved(self, strict: bool) -> None:
        """Compute what is on meta and in no checkpoint, or name it."""
        on_meta: dict[str, list[str]] = {}
        for name, tensor in unsaved_on_meta(self.model):
            if not self._stays(self.names.key(join(name, tensor))):
                on_meta.setdefault(name, []).append(tensor)
        computed = recompute_unsaved(self.model, on_meta)
        for name, tensors in computed.items():
            device = self.devices.of(name) or torch.device("cpu")
            there = {key: tensor.to(device) for key, tensor in tensors.items()}
            self.computed.append((self.model.get_submodule(name), there))
        left = [
            join(name, tensor)
            for name, tensors in on_meta.items()
            if name not in computed
            for tensor in tensors
        ]
        self.on_meta = tuple(left)
        if strict and left:
            raise CheckpointError(
                f"{self.header.source}: got a model with {_some(left)} on the meta "
                "device, which no checkpoint holds, expected what its constructor "
                "computes; build the model so that only its parameters are on meta, "
                "as accelerate.init_empty_weights does, or pass strict=False and set "
                "them afterwards"
            )

    def _check_unknown_scales(self) -> None:
        """Refuse what the model lacks and may be the scale of plain FP8 data."""
        cast = self.cast
        for key in self.unexpected if cast else ():
            if "scale" in key.rpartition(".")[2] or "quant" in key:
                raise UnconsumedScaleError(
                    f"{self.header.source}: {key}: the model has no such tensor; "
                    f"it may be the scale of FP8 data such as {cast[0]}; expected "
                    "plain casts alone; install the scheme that wrote the file"
                )

    @property
    def cast(self) -> tuple[str, ...]:
        """Keys of plain FP8 tensors, which the model has in a dense dtype."""
        return tuple(key for key, (_, dtype) in self.places.items() if dtype)

    def apply(self) -> None:
        """Change the model; nothing here is expected to fail."""
        tied = _tied_modules(self.model, self.names)
        # undoing takes the memory of the old weights; only strict plugins may fail here
        moved: dict[int, QuantizedTensor] = {}
        placed = (
            _placed(change, moved, self._device(join(layer, "weight")))
            for layer, change in self.changes.items()
        )
        apply_all(placed, keep=strict())
        dense = {
            self.names.name(key): like(
                _place(self.tensors[key], *self.places.get(key, (None, None))),
                self.distributed.get(key),
            )
            for key in self.dense
        }
        self.model.load_state_dict(dense, strict=False, assign=True)
        _tie(tied, self.dense, self.changes)
        for module, tensors in self.computed:
            for name, tensor in tensors.items():
                held = module._buffers if name in module._buffers else vars(module)
                held[name] = tensor
        self.devices.move(self.model)


def marker_keys(
    header: Header, claims: Mapping[str, Claim], registry: Registry
) -> set[str]:
    """Tensors that say something of the whole file, and are none of the model's."""
    layers: dict[Dialect, list[str]] = {}
    for name, claim in claims.items():
        dialect = matching.dialect_of(registry.get(claim.scheme), claim.dialect)
        layers.setdefault(dialect, []).append(name)
    keys = header.tensors.keys()
    marked = {
        key
        for dialect, names in layers.items()
        for key in dialect.unmark(header.metadata, keys, names)[1]
    }
    return marked.union(needless_markers(header))


def _check_target(module: nn.Module, scheme: Scheme, name: str) -> None:
    if not isinstance(module, scheme.targets):
        names = ", ".join(target.__name__ for target in scheme.targets)
        raise ModuleError(
            f"{name}: the checkpoint has {scheme.name} data for a "
            f"{type(module).__name__}, expected one of {names}"
        )


def _check_dense(
    key: str, header: Header, current: Tensor, modules: Mapping[str, nn.Module]
) -> torch.dtype | None:
    """Refuse a dense tensor of another shape, or quantized data nobody can read.

    Returns:
        The dtype to cast it to, if it is a plain cast to FP8; else None.
    """
    info = header.tensors[key]
    owner = modules.get(key.rpartition(".")[0])
    if isinstance(owner, Wrapped) and key.rpartition(".")[2] == "weight":
        weight: Tensor = owner._parameters["weight"]  # type: ignore[assignment]
        expected, dtype = tuple(weight.shape), weight.dtype
    else:
        expected, dtype = tuple(current.shape), current.dtype
    if info.shape != expected:
        raise ShapeError(
            f"{key}: got shape {info.shape}, expected {expected}; is this the right "
            "model for the file?"
        )
    if dtype not in DENSE_DTYPES or info.torch_dtype in DENSE_DTYPES:
        return None
    if info.dtype not in PLAIN_CASTS:
        raise CheckpointError(
            f"{key}: got {info.dtype} without scales that a scheme reads, expected a "
            "dense dtype; install the scheme that wrote the file, or see "
            "`hijack identify`"
        )
    return dtype  # identify found nothing that would scale it


def _placed(
    change: Change, moved: dict[int, QuantizedTensor], device: torch.device | None
) -> Change:
    """The same change with the weight on a device.

    Args:
        change: to a module.
        moved: weights that were moved already, which modules go on sharing.
        device: where to; None is where the module is, or anywhere if that is on meta.
    """
    old: Tensor = change.module._parameters["weight"]  # type: ignore[assignment]
    weight: Any = change.weight
    if device is None:
        device = weight.device if old.is_meta else old.device
    if device == weight.device:
        return change
    if id(weight) not in moved:
        there: Any = weight.to(device).as_parameter()
        moved[id(weight)] = there
    return dataclasses.replace(change, weight=moved[id(weight)])


def _place(
    tensor: Tensor, device: torch.device | None, dtype: torch.dtype | None
) -> Tensor:
    """Move a tensor to a device, or to none for anywhere, and cast it if asked to."""
    anywhere = device is None or device.type == "meta"
    return tensor.to(None if anywhere else device, dtype or tensor.dtype)


@dataclasses.dataclass(frozen=True)
class _Place:
    """One name under which a parameter is registered."""

    key: str
    name: str
    module: nn.Module
    attribute: str


def _tied_modules(model: nn.Module, names: LayerNames) -> list[list[_Place]]:
    """Places that share a parameter, for each parameter that has several."""
    groups: dict[int, list[_Place]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        for attribute, parameter in module._parameters.items():
            if parameter is not None:
                layer = names.layer(name)
                place = _Place(join(layer, attribute), layer, module, attribute)
                groups.setdefault(id(parameter), []).append(place)
    return [group for group in groups.values() if len(group) > 1]


def _tied_names(model: nn.Module, names: LayerNames) -> dict[str, set[str]]:
    """Key to the other keys of the same parameter."""
    groups = [{place.key for place in group} for group in _tied_modules(model, names)]
    return {key: group - {key} for group in groups for key in group}


def _first_loaded(
    group: list[_Place], dense: Collection[str], changes: Mapping[str, Change]
) -> _Place | None:
    """The place that the checkpoint has a tensor for, which the others share."""
    loaded = (p for p in group if p.key in dense or p.name in changes)
    return next(loaded, None)


def _tie(
    groups: list[list[_Place]], dense: Collection[str], changes: Mapping[str, Change]
) -> None:
    """Share again what was shared, where the checkpoint holds only one of the names."""
    for group in groups:
        source = _first_loaded(group, dense, changes)
        if source is None or source.name in changes:
            continue
        shared = source.module._parameters[source.attribute]
        for place in group:
            if place.key not in dense and place.name not in changes:
                place.module._parameters[place.attribute] = shared


def _some(keys: Sequence[str]) -> str:
    shown = ", ".join(keys[:3]) + (" ..." if len(keys) > 3 else "")
    return f"{len(keys)} ({shown})" if keys else "none"
