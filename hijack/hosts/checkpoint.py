"""Checkpoints as a host wants them: one tensor a weight.

Hosts rename, split, join, cast and place the tensors of a file before a module has
them, and know that a weight is one tensor. So they are given one: a `TravellingWeight`
stands for the dense weight, and its scales go wherever it goes. Where the host has put
them, `adopt` makes the modules quantized.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_map_only

from hijack.claim import Claim
from hijack.decoded import DecodedView
from hijack.dtypes import DENSE_DTYPES
from hijack.errors import DTypeError, ShapeError
from hijack.formats import matching
from hijack.formats.identification import PLAIN_CASTS, identify
from hijack.formats.stacked_blocks import find_stacks, keys_of, read_stack
from hijack.hosts.rows import Joiner, Run
from hijack.loading import Source, marker_keys, open_source
from hijack.modules import Change, Wrapped, apply_all, prepare
from hijack.quantized import FACTORIES, OPERATIONS, QuantizedTensor
from hijack.registry import Registry, current_registry
from hijack.safetensors_io.header import Header, join
from hijack.stacked import StackedWeight
from hijack.text import logger

log = logger(__name__)

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True, eq=False)
class Found:
    """Where a weight was found.

    Attributes:
        claim: to its layer.
        header: of the file.
        tensors: full key to tensor of the file.
    """

    claim: Claim
    header: Header
    tensors: Mapping[str, Tensor]

    def __deepcopy__(self, memo: object) -> Found:
        return self


class TravellingWeight(QuantizedTensor):
    """A quantized weight on its way from a file to a module.

    Its rows can be cut out and joined, and stay quantized where the scheme's tensors
    can be cut and joined like them; whatever else is computed with it is computed with
    the decoded weight. A module gets a `QuantizedTensor` of it, by `adopt`.

    Attributes:
        found: where; None if it was cut out or joined since.
    """

    found: Found | None = None
    name = ""  # of its layer, where it was not found in a file

    @classmethod
    def of(
        cls, weight: QuantizedTensor, found: Found | None = None
    ) -> TravellingWeight:
        """A weight that is to travel."""
        fields = (weight.config, tuple(weight.shape), weight.dtype, weight.additions)
        travelling = cls(weight.qdata, weight.params, *fields)
        travelling.found = found
        return travelling

    def replace(self, **changes: Any) -> QuantizedTensor:
        """The same but for some fields; it travels on."""
        return TravellingWeight.of(super().replace(**changes), self.found)

    def for_module(self) -> QuantizedTensor:
        """The weight as a module may have it."""
        return QuantizedTensor.replace(self)

    def requires_grad_(self, requires_grad: bool = True) -> QuantizedTensor:
        """Ignore it: hosts make Parameters with what their dense modules have."""
        return self

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        moved = _ROWS.get(func)
        if moved is not None:
            result = moved(*args, **(kwargs or {}))
            if result is not None:
                return result
        _refuse_narrow(func, args, kwargs or {})
        _tell_decoding(func, args)
        # a part that was decoded is a tensor of the host's, which may write to it
        result = super().__torch_dispatch__(func, types, args, kwargs)
        return tree_map_only(DecodedView, _plain, result)


def _refuse_narrow(func: Any, args: Any, kwargs: Any) -> None:
    """Refuse a cast that would round a quantized weight to bare numbers of FP8."""
    dtype = kwargs.get("dtype")
    if func is not aten._to_copy.default or dtype is None or dtype in DENSE_DTYPES:
        return
    if dtype.is_floating_point:
        raise DTypeError(
            f"cast: got {dtype} for {args[0]!r}, expected the dtype to compute in, "
            "such as torch.bfloat16; the weight stays quantized as it is"
        )


def _tell_decoding(func: Any, args: Any) -> None:
    """Say in the log which weights a host's own operation decodes."""
    packet = func.overloadpacket
    copies = func is aten.copy_.default and not isinstance(args[0], QuantizedTensor)
    if (func in OPERATIONS and not copies) or packet in FACTORIES or packet is aten.to:
        return
    for weight in tree_flatten(args)[0]:
        if isinstance(weight, TravellingWeight | TravellingStack):
            found = getattr(weight, "found", None)
            name = weight.name if found is None else found.claim.layer
            log.info(
                "hijack: %s of shape %s is decoded by %s",
                name or "a weight",
                tuple(weight.shape),
                packet.__name__,
            )


class TravellingStack(StackedWeight):
    """Weights on their way that the host has stacked, such as those of experts.

    Attributes:
        name: of the first one's layer.
    """

    name = ""

    def requires_grad_(self, requires_grad: bool = True) -> QuantizedTensor:
        """Ignore it: hosts make Parameters with what their dense modules have."""
        return self

    def replace(self, **changes: Any) -> QuantizedTensor:
        """The same but for some fields; it travels on."""
        replaced: Any = super().replace(**changes)
        replaced.name = self.name
        return replaced  # type: ignore[no-any-return]

    def travelling(self) -> list[Tensor]:
        """Each of the weights, travelling on its own."""
        return [TravellingWeight.of(part) for part in self.parts()]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        moved = _STACKS.get(func)
        if moved is not None and not _any_transposed(args):
            result = moved(*args, **(kwargs or {}))
            if result is not None:
                return result
        _tell_decoding(func, args)
        # a part that was decoded is a tensor of the host's, which may write to it
        result = super().__torch_dispatch__(func, types, args, kwargs)
        return tree_map_only(DecodedView, _plain, result)


def read_weights(
    source: Source,
    *,
    assume: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    registry: Registry | None = None,
) -> dict[str, Tensor]:
    """Read a checkpoint with one tensor for each weight, quantized or not.

    Args:
        source: as for `hijack.load`.
        assume: how to read what the file does not tell, as for `hijack.identify`.
        dtype: that quantized weights stand for, until the host casts them.
        registry: whose schemes and plugins are asked; None for the one in force.

    Returns:
        Key to tensor. A quantized layer is a `TravellingWeight` under the layer's
        ``weight``, experts that the file has stacked are a `TravellingStack`; plain
        casts to FP8 are bfloat16, which has all their numbers; all else is as it is in
        the file, without what only marks quantized layers.

    Raises:
        HijackError: where `hijack.load` would refuse the file.
    """
    return _weights(*open_source(source), assume, dtype, current_registry(registry))


def read_quantized(
    source: Source,
    *,
    assume: Sequence[str] = (),
    dtype: torch.dtype = torch.float32,
    registry: Registry | None = None,
) -> dict[str, Tensor] | None:
    """`read_weights`, or None where nothing is quantized: the host reads that itself.

    Of a file with nothing but dense tensors, only the header is read.
    """
    registry = current_registry(registry)
    header, tensors = open_source(source)
    if not assume and is_dense(header):
        return None
    weights = _weights(header, tensors, assume, dtype, registry)
    quantized = any(isinstance(w, QuantizedTensor) for w in weights.values())
    return weights if quantized else None


def is_dense(header: Header) -> bool:
    """Whether no tensor is, and nothing says of any, that it is quantized.

    Args:
        header: of a file or a state dict.
    """
    return set(header.metadata) <= {"format"} and all(
        info.dtype in _PLAIN for info in header.tensors.values()
    )


#: Dtypes that no tensor of a quantized layer is in alone.
_PLAIN = frozenset({"F64", "F32", "F16", "BF16", "I64", "BOOL"})


def _weights(
    header: Header,
    tensors: Mapping[str, Tensor],
    assume: Sequence[str],
    dtype: torch.dtype,
    registry: Registry,
) -> dict[str, Tensor]:
    result: dict[str, Tensor] = {}
    stacks = find_stacks(header, registry)
    if stacks:
        for name in stacks:
            stack = read_stack(name, tensors, registry, dtype)
            result[name] = travelling(stack, name)
        taken = {key for name in stacks for key in keys_of(name)}
        rest = {k: info for k, info in header.tensors.items() if k not in taken}
        header = dataclasses.replace(header, tensors=rest)
    identified = identify(header, registry, assume=assume)
    identified.check()
    claims = identified.claims()
    used = {key for claim in claims.values() for key in claim.keys.values()}
    used |= marker_keys(header, claims, registry)
    result |= {
        key: _readable(tensors[key], info.dtype)
        for key, info in header.tensors.items()
        if key not in used
    }
    for layer, claim in claims.items():
        scheme = registry.get(claim.scheme)
        weight = matching.read_weight(scheme, claim, tensors, dtype=dtype)
        found = Found(claim, header, tensors)
        result[join(layer, "weight")] = TravellingWeight.of(weight, found)
    return result


def travelling(tensor: Tensor, name: str) -> Tensor:
    """A tensor that is to be split, renamed and joined, on its way to a file or back.

    Args:
        tensor: a stack of quantized weights becomes one that travels.
        name: of the stack.
    """
    if not isinstance(tensor, StackedWeight):
        return tensor
    fields = (tensor.config, tuple(tensor.shape), tensor.dtype, tensor.additions)
    stack = TravellingStack(tensor.qdata, tensor.params, *fields)
    stack.transposed, stack.name = tensor.transposed, name
    return stack


def decoded(tensor: Tensor, name: str) -> Tensor:
    """A tensor as a dense one; a line of the log names it if it was quantized."""
    if not isinstance(tensor, QuantizedTensor):
        return tensor
    log.info("hijack: %s is decoded", name)
    return tensor.value()


def _plain(part: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return part.as_subclass(Tensor)


def _readable(tensor: Tensor, dtype: str) -> Tensor:
    return tensor.to(torch.bfloat16) if dtype in PLAIN_CASTS else tensor


def cropped(weights: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Weights in the shapes of a model's, where a file pads them.

    Args:
        weights: of `read_weights`, under the model's names.
        model: dense, or on the meta device.
    """
    result = dict(weights)
    for key, parameter in model.named_parameters():
        weight, shape = weights.get(key), tuple(parameter.shape)
        if not isinstance(weight, TravellingWeight) or tuple(weight.shape) == shape:
            continue
        found = weight.found
        if found is None:
            continue
        try:
            again = matching.read_weight(
                weight.scheme, found.claim, found.tensors, shape, weight.dtype
            )
        except ShapeError:
            continue  # the host says that it does not fit
        result[key] = TravellingWeight.of(again, found)
    return result


def adopt(model: nn.Module, registry: Registry | None = None) -> tuple[str, ...]:
    """Make modules quantized whose parameters have become quantized weights.

    Where a module cannot be (it is no target of the scheme, or the parameter is another
    than ``weight``), the parameter is decoded, and a line of the log says so. A stack
    of weights stays one, in whichever module: it computes by itself.

    Args:
        model: a host has put tensors of `read_weights` into it.
        registry: whose plugins are asked; None for the one in force.

    Returns:
        Names of the modules that are quantized now and were not before.

    Raises:
        HijackError: if a weight does not fit its module, or a plugin refuses; the model
            is then as the host left it.
    """
    registry = current_registry(registry)
    changes: dict[str, Change] = {}
    others: list[tuple[nn.Module, str, Any]] = []  # that are not quantized as modules
    arrived: dict[int, Any] = {}  # what modules share they go on sharing
    for name, module in _quantized_first(model):
        for attribute, parameter in list[Any](module._parameters.items()):
            if not isinstance(parameter, QuantizedTensor):
                continue
            if isinstance(parameter, StackedWeight):
                stack = parameter.for_module().as_parameter()
                others.append((module, attribute, stack))
                continue
            target = attribute == "weight" and isinstance(
                module, parameter.scheme.targets
            )
            key = id(parameter)
            if target and isinstance(module, Wrapped):
                arrived[key] = parameter  # others may have been tied to it
                continue
            if target:
                if key not in arrived:
                    weight = _arrived(module, name, parameter, registry)
                    arrived[key] = weight.as_parameter()
                changes[name] = prepare(module, arrived[key], registry)
                continue
            if key not in arrived:
                dense = decoded(parameter, join(name, attribute))
                arrived[key] = nn.Parameter(dense, requires_grad=False)
            others.append((module, attribute, arrived[key]))
    apply_all(changes.values())
    for module, attribute, parameter in others:
        module._parameters[attribute] = parameter
    return tuple(changes)


def _quantized_first(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules by name, those that are quantized already before the others."""
    named = model.named_modules()
    return sorted(named, key=lambda pair: not isinstance(pair[1], Wrapped))


def _arrived(
    module: nn.Module, name: str, weight: QuantizedTensor, registry: Registry
) -> QuantizedTensor:
    """The weight a module is to have, after plugins were asked."""
    found = getattr(weight, "found", None)
    if found is None:
        return weight.for_module()
    prefix, claim = join(name, ""), found.claim
    answer = registry.select_scheme(module, prefix, found.header)
    scheme = weight.scheme
    if isinstance(answer, Claim):
        claim, scheme = answer, registry.get(answer.scheme)
    given = registry.create_params(module, scheme, prefix, found.tensors)
    if claim is found.claim and given is None:
        return weight.for_module()
    shape = tuple(weight.shape)
    again = matching.read_weight(
        scheme, claim, found.tensors, shape, weight.dtype, given
    )
    return again.to(weight.device)  # type: ignore[return-value]


# -- rows ------------------------------------------------------------------------------

_JOINER = Joiner()


def _joined(runs: list[Run]) -> Tensor | None:
    """Rows of weights as one that travels, or None if they must be decoded."""
    joined = _JOINER.quantized(runs)
    return None if joined is None else TravellingWeight.of(joined)


def _slice(
    weight: Any,
    dim: int = 0,
    start: int | None = None,
    end: int | None = None,
    step: int = 1,
) -> Tensor | None:
    first, last, step = slice(start, end, step).indices(weight.shape[dim])
    if (first, last, step) == (0, weight.shape[dim], 1):
        return weight.replace()  # type: ignore[no-any-return]
    if dim % weight.dim() or step != 1 or last <= first:
        return None
    return _joined([Run(weight, first, last)])


def _split(weight: Any, size: int, dim: int = 0) -> list[Tensor] | None:
    count, rest = divmod(weight.shape[dim], size)
    return _split_with_sizes(weight, [size] * count + [rest] * bool(rest), dim)


def _split_with_sizes(
    weight: Any, sizes: Sequence[int], dim: int = 0
) -> list[Tensor] | None:
    parts, start = list[Tensor](), 0
    for size in sizes:
        part = _slice(weight, dim, start, start + size)
        if part is None:
            return None
        parts.append(part)
        start += size
    return parts


def _cat(tensors: Sequence[Tensor], dim: int = 0) -> Tensor | None:
    if dim % tensors[0].dim() or len({tensor.dtype for tensor in tensors}) > 1:
        return None
    return _joined([Run(tensor, 0, tensor.shape[0]) for tensor in tensors])


_ROWS: dict[Any, Callable[..., Any]] = {
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split_with_sizes,
    aten.cat.default: _cat,
    aten.stack.default: lambda tensors, dim=0: None if dim else _stacked(tensors),
}


# -- stacks ----------------------------------------------------------------------------


def _stacked(weights: Sequence[Tensor | None]) -> TravellingStack | None:
    """A stack of weights; None where one is None, or they cannot be stacked."""
    whole = [weight for weight in weights if weight is not None]
    stack: Any = TravellingStack.of(whole) if len(whole) == len(weights) else None
    if stack is not None:
        found = getattr(whole[0], "found", None)
        stack.name = "" if found is None else found.claim.layer
    return stack  # type: ignore[no-any-return]


def _any_transposed(args: Any) -> bool:
    """Whether any is a stack of transposed weights, whose rows are columns."""
    return any(getattr(tensor, "transposed", False) for tensor in tree_flatten(args)[0])


def _split_stack(stack: Any, size: int, dim: int = 0) -> list[Any] | None:
    parts = stack.travelling()
    if dim % stack.dim() == 0:
        stacks = [_stacked(parts[i : i + size]) for i in range(0, len(parts), size)]
    elif dim % stack.dim() == 1:
        pieces = [_split(part, size) for part in parts]
        if None in pieces:
            return None
        stacks = [_stacked(piece) for piece in zip(*pieces, strict=True)]
    else:
        return None
    return None if None in stacks else stacks


def _cat_stacks(stacks: Sequence[Any], dim: int = 0) -> TravellingStack | None:
    if not all(isinstance(stack, TravellingStack) for stack in stacks):
        return None
    if dim % stacks[0].dim() != 1 or len({stack.shape[0] for stack in stacks}) > 1:
        return None
    rows = zip(*(stack.travelling() for stack in stacks), strict=True)
    joined = _stacked([_cat(row) for row in rows])
    if joined is not None:
        joined.name = stacks[0].name
    return joined


def _squeeze_stack(stack: Any, dim: int) -> Tensor | None:
    if dim % stack.dim() or stack.shape[0] != 1:
        return None
    return stack.travelling()[0]  # type: ignore[no-any-return]


_STACKS: dict[Any, Callable[..., Any]] = {
    aten.split.Tensor: _split_stack,
    aten.cat.default: _cat_stacks,
    aten.squeeze.dim: _squeeze_stack,
}
