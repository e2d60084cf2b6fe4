"""`QuantizedTensor`: a quantized weight that passes for the dense one.

Models, trainers and hosts ask a weight for its dtype, shape and device, pass it around,
move it, copy it and compute with it. A `QuantizedTensor` answers as the dense weight
would and holds the quantized tensors inside: what moves, moves together, and whatever
is computed with it is computed with the decoded weight. It cannot be written to,
because a write would have to quantize.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
import uuid
import weakref
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map_only

from hijack.decoded import as_part
from hijack.dtypes import DENSE_DTYPES, autocast_dtype
from hijack.errors import (
    DTypeError,
    HijackError,
    NonFiniteError,
    ReadOnlyError,
    SchemeError,
    ShapeError,
)
from hijack.recompute import decoded, tagged
from hijack.registry import current_registry
from hijack.requantizing import is_asked
from hijack.scheme import Quantized, Scheme, checked
from hijack.staging import copied, made_like, original

aten = torch.ops.aten


@dataclasses.dataclass(frozen=True)
class QuantizationConfig:
    """How a weight is quantized and spelled; layers that are alike share one.

    Attributes:
        scheme: the scheme.
        options: options of ``scheme.quantize``, as sorted items.
        dialect: name of the dialect of the file the weight came from, or None.
    """

    scheme: Scheme
    options: tuple[tuple[str, Any], ...] = ()
    dialect: str | None = None

    @classmethod
    def of(
        cls,
        scheme: Scheme,
        options: Mapping[str, Any] | None = None,
        dialect: str | None = None,
    ) -> QuantizationConfig:
        """The config with options from a mapping."""
        items = sorted((options or {}).items())
        fixed = tuple((k, tuple(v) if isinstance(v, list) else v) for k, v in items)
        return cls(scheme, fixed, dialect)

    def __deepcopy__(self, memo: object) -> QuantizationConfig:
        return self  # it never changes; torch.compile compares copies with it

    def __reduce__(self) -> Any:
        return _unpickled, (self.scheme, self.options, self.dialect)


def _unpickled(
    scheme: Scheme, options: tuple[tuple[str, Any], ...], dialect: str | None
) -> QuantizationConfig:
    """The config, with the scheme that is registered here if it is the same."""
    known = current_registry().schemes().get(scheme.name, scheme)
    if scheme.is_like(known):
        scheme = known
    return QuantizationConfig(scheme, options, dialect)


class Addition(Protocol):
    """What a host adds to a weight without merging it, such as LoRAs."""

    def apply(self, weight: Tensor) -> Tensor:
        """The dense weight with it; may write into the weight."""


class WeightView:
    """What a forward may ask of a quantized weight, and nothing else of a tensor.

    A host that moves weights itself hands this to a bound forward: it costs next to
    nothing, and ``torch.compile`` sees through it, which it cannot where a tensor
    subclass is made. It has what `QuantizedTensor` has of the same names.

    Args:
        qdata: the quantized data, where it is now.
        params: the scheme's other tensors, beside it.
        config: how it was quantized.
        shape: of the dense weight.
        dtype: of the dense weight.
    """

    def __init__(
        self,
        qdata: Tensor,
        params: dict[str, Tensor],
        config: QuantizationConfig,
        shape: tuple[int, ...],
        dtype: torch.dtype,
    ) -> None:
        self.qdata, self.params, self.config = qdata, params, config
        self.scheme, self.shape, self.dtype = config.scheme, shape, dtype

    @property
    def options(self) -> dict[str, Any]:
        """Options it was quantized with."""
        return dict(self.config.options)

    @property
    def device(self) -> torch.device:
        """Where it is now."""
        return self.qdata.device

    def dim(self) -> int:
        """Number of dimensions of the dense weight."""
        return len(self.shape)

    def numel(self) -> int:
        """Number of elements of the dense weight."""
        return math.prod(self.shape)

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded weight; ``dtype`` None is that of the dense weight."""
        dtype = self.dtype if dtype is None else dtype
        return _dequantized(self, dtype)


def _dequantized(weight: QuantizedTensor | WeightView, dtype: torch.dtype) -> Tensor:
    """What a scheme decodes, whatever autocast casts around it."""
    if autocast_dtype(weight.device) is None:
        return weight.config.scheme.dequantize_weight(weight, dtype)
    with torch.autocast(weight.device.type, enabled=False):
        return weight.config.scheme.dequantize_weight(weight, dtype)


#: torch's own descriptor behind ``tensor.data``.
_DATA: Any = Tensor.data

#: A scheme to what stands for it in keys of compiled code.
_TOKENS: weakref.WeakKeyDictionary[Scheme, str] = weakref.WeakKeyDictionary()


class QuantizedTensor(Tensor):
    """Quantized data and the tensors to decode it with, as one tensor.

    Its shape, dtype and device are those of the dense weight. A cast changes the dtype
    it stands for, never the quantized data. ``QuantizedTensor(weight)``, with nothing
    else than ``requires_grad``, copies another one as ``nn.Parameter`` would, because
    accelerate makes parameters by their type.

    Attributes:
        qdata: the quantized data.
        params: the scheme's other tensors, by name.
        config: how it was quantized.
        additions: what a host adds to the decoded weight, in order.
    """

    qdata: Tensor
    params: dict[str, Tensor]
    config: QuantizationConfig
    additions: tuple[Addition, ...]

    # dynamo sees through a subclass only if this is so; operations arrive below
    __torch_function__: Any = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(
        cls,
        qdata: Tensor,
        params: Mapping[str, Tensor] | None = None,
        config: QuantizationConfig | None = None,
        shape: tuple[int, ...] | None = None,
        dtype: torch.dtype = torch.float32,
        additions: tuple[Addition, ...] = (),
        requires_grad: bool = False,
    ) -> QuantizedTensor:
        if params is None or config is None:
            return cls.parameter_of(qdata)
        if shape is None:
            shape = config.scheme.dense_shape(qdata, params)
        # made in inference mode it could not be detached from one made outside
        with torch.inference_mode(False):
            self: QuantizedTensor = torch.Tensor._make_wrapper_subclass(
                cls, shape, dtype=dtype, device=qdata.device, requires_grad=False
            )
        self.qdata, self.params, self.config = qdata, dict(params), config
        self.additions = additions
        return self

    @classmethod
    def parameter_of(cls, value: Tensor) -> QuantizedTensor:
        """A Parameter that holds a weight which is given as one tensor.

        Raises:
            DTypeError: if the tensor is not quantized; it does not tell how to decode.
        """
        if not isinstance(value, QuantizedTensor):
            raise DTypeError(
                f"QuantizedTensor: got a {value.dtype} tensor alone, expected a "
                "QuantizedTensor; call hijack.unwrap first, or load it with "
                "hijack.load or load_state_dict"
            )
        return value.for_module().as_parameter()

    @property
    def scheme(self) -> Scheme:
        """The scheme that decodes it."""
        return self.config.scheme

    @property
    def options(self) -> dict[str, Any]:
        """Options it was quantized with."""
        return dict(self.config.options)

    # -- decoding ----------------------------------------------------------------------

    def dense(self, dtype: torch.dtype | None = None) -> Tensor:
        """The decoded weight, without additions.

        Args:
            dtype: dtype of the result; None is its own.

        Returns:
            A plain tensor of its shape, on its device.

        Raises:
            DTypeError: if a dtype is asked for that no dense weight has.
        """
        dtype = self.dtype if dtype is None else dtype
        if dtype not in DENSE_DTYPES:
            raise DTypeError(
                f"dense: got {dtype}, expected one of "
                f"{', '.join(str(d) for d in DENSE_DTYPES)}; cast the input first"
            )
        with tagged():
            dense = _dequantized(self, dtype)
        decoded(self, dense)
        return dense

    def value(
        self, dtype: torch.dtype | None = None, device: torch.device | None = None
    ) -> Tensor:
        """The weight it stands for: decoded, with its additions.

        Args:
            dtype: dtype of the result; None is its own.
            device: where to decode it; None is its own.
        """
        weight = self
        if device is not None and torch.device(device) != self.device:
            weight = self.map(lambda tensor: tensor.to(device))
        if not self.additions:
            return weight.dense(dtype)
        dense = weight.dense(torch.float32)
        for addition in self.additions:
            dense = addition.apply(dense)
        return dense.to(self.dtype if dtype is None else dtype)

    # -- others like it ----------------------------------------------------------------

    def replace(self, **changes: Any) -> QuantizedTensor:
        """The same but for some of the constructor's arguments."""
        fields: dict[str, Any] = {
            "qdata": self.qdata,
            "params": self.params,
            "config": self.config,
            "shape": tuple(self.shape),
            "dtype": self.dtype,
            "additions": self.additions,
        }
        return QuantizedTensor(**{**fields, **changes})

    def for_module(self) -> QuantizedTensor:
        """The weight as a module may have it."""
        return self.replace()

    def as_parameter(self) -> QuantizedTensor:
        """What ``nn.Parameter(self, requires_grad=False)`` makes, and says of it.

        That runs an operation on the tensor, at the first of which torch imports half a
        second of its distributed tensors.
        """
        parameter: Any = self.replace()
        parameter._is_param = True
        return parameter  # type: ignore[no-any-return]

    def map(self, function: Callable[[Tensor], Tensor]) -> QuantizedTensor:
        """Apply a function that moves or copies to every tensor inside.

        Dtypes stay as they are: quantized data that is cast is garbage.
        """

        def keeping_dtype(tensor: Tensor) -> Tensor:
            probe = function(torch.empty(0, dtype=tensor.dtype, device=tensor.device))
            if probe.dtype != tensor.dtype:
                return tensor.to(probe.device)
            return function(tensor)

        params = {name: keeping_dtype(t) for name, t in self.params.items()}
        return self.replace(qdata=keeping_dtype(self.qdata), params=params)

    def requantized(self, weight: Tensor, seed: int = 0) -> QuantizedTensor:
        """Another dense weight, quantized as this one was; additions are dropped.

        Args:
            weight: dense, of the same shape.
            seed: other than 0 asks for stochastic rounding, if the scheme has it.
        """
        qdata, params = self.scheme.requantize(weight, self, seed=seed)
        return self.replace(qdata=qdata, params=params, additions=())

    def write(self, weight: Tensor, what: str) -> None:
        """Take another dense weight's place in memory, quantized, if that is asked for.

        Args:
            weight: dense, of the same shape.
            what: the operation, for the message.

        Raises:
            ReadOnlyError: outside `hijack.requantizing`, or if the quantized tensors
                would be others than there are.
            NonFiniteError: if it holds inf or NaN.
        """
        fits = weight.shape == self.shape and weight.dtype in DENSE_DTYPES
        if not is_asked() or not fits or self.is_meta:
            raise _no_write(self, what)
        _check_finite(weight, what)
        with torch.no_grad():
            new = self.requantized(weight.detach().to(self.dtype))
            if not _are_alike(self, new):
                raise _no_write(self, what)
            theirs = new.plain_tensors()
            for name, tensor in self.plain_tensors().items():
                tensor.copy_(theirs[name])
        self.additions = ()

    def plain_tensors(self) -> dict[str, Tensor]:
        """What a state dict holds of it: ``weight`` and the scheme's other names."""
        return {"weight": self.qdata, **self.params}

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return (
            f"QuantizedTensor({self.scheme.name}, shape={tuple(self.shape)}, "
            f"dtype={self.dtype}, device={self.device}, qdata={self.qdata.dtype})"
        )

    # -- torch -------------------------------------------------------------------------

    @property
    def data(self) -> Tensor:
        """The same memory, of which autograd knows nothing."""
        detached: Any = _DATA.__get__(self)
        # writes through it do not count as changes of this one, as for any tensor
        detached.qdata = self.qdata.data
        detached.params = {name: tensor.data for name, tensor in self.params.items()}
        return detached  # type: ignore[no-any-return]

    @data.setter
    def data(self, value: Tensor) -> None:
        if not isinstance(value, QuantizedTensor):
            staged = original(value)
            if staged is None:
                self.write(value, "an assignment to .data")
                return
            value = staged
        _DATA.__set__(self, value)
        for name in ("qdata", "params", "config", "additions"):
            setattr(self, name, getattr(value, name))

    def __setitem__(self, index: Any, value: Any) -> None:
        # it would be written into a part that was decoded, and be lost
        raise _no_write(self, "indexing")

    def fill_diagonal_(self, *_: Any, **__: Any) -> QuantizedTensor:
        """Refuse: torch would write into a part that was decoded."""
        raise _no_write(self, "fill_diagonal_")

    def data_ptr(self) -> int:
        """Address of the quantized data, by which programs find shared weights."""
        return self.qdata.data_ptr()

    def is_shared(self) -> bool:
        """Whether other processes may see the quantized data."""
        return bool(self.qdata.is_shared())  # type: ignore[no-untyped-call]

    def share_memory_(self) -> QuantizedTensor:
        """Move all that is inside to memory that other processes may see."""
        for tensor in self.plain_tensors().values():
            tensor.share_memory_()  # type: ignore[no-untyped-call]
        return self

    def requires_grad_(self, requires_grad: bool = True) -> QuantizedTensor:
        """Refuse to be trained: no gradient of it is ever computed."""
        if requires_grad:
            raise ReadOnlyError(
                f"requires_grad_: cannot train {self!r}; got a quantized weight, "
                "expected a dense one; train adapters beside it, or call "
                "hijack.unwrap first"
            )
        return self

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedTensor:
        if id(self) in memo:
            known: QuantizedTensor = memo[id(self)]
            return known
        copied = self.map(torch.clone)
        memo[id(self)] = copied = _like_parameter(copied, self)
        return copied

    def __reduce_ex__(self, protocol: Any) -> Any:
        is_parameter = isinstance(self, torch.nn.Parameter)
        tensors = {name: _as_bytes(t) for name, t in self.plain_tensors().items()}
        rest = (tuple(self.shape), self.dtype, self.additions, is_parameter)
        return _rebuild, (tensors, self.config, *rest)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        names = ["qdata"]
        for index, tensor in enumerate(self.params.values()):
            setattr(self, f"_param{index}", tensor)
            names.append(f"_param{index}")
        return names, (self.config, tuple(self.params), self.dtype, self.additions)

    @staticmethod
    def __tensor_unflatten__(
        inner: Mapping[str, Tensor], context: Any, size: Any, stride: Any
    ) -> QuantizedTensor:
        config, names, dtype, additions = context
        params = {name: inner[f"_param{index}"] for index, name in enumerate(names)}
        return QuantizedTensor(
            inner["qdata"], params, config, tuple(size), dtype, additions
        )

    def _stable_hash_for_caching(self) -> str:
        """What compiled code depends on; another in every process.

        The code of a scheme is compiled into it, and nothing here knows that code. So
        torch must not find on the disk what was compiled with an earlier version.
        """
        scheme = _TOKENS.setdefault(self.scheme, uuid.uuid4().hex)
        tensors = {name: (t.dtype, t.shape) for name, t in self.plain_tensors().items()}
        return repr((scheme, self.config.options, tensors, self.dtype, self.additions))

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        special = OPERATIONS.get(func)
        if special is not None:
            return special(*args, **kwargs)
        if func.overloadpacket is aten.to:  # reaches us whole in inference mode
            return func.decompose(*args, **kwargs)
        if func.overloadpacket in FACTORIES:
            return new_tensor(func, *args, **kwargs)
        written = _written(func, args, kwargs)
        if written:
            return _write(func, args, kwargs, written)
        return compute(func, *args, **kwargs)


def compute(func: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation with decoded weights; views of them are for reading only."""
    # a view of what is made in inference mode cannot be one of this tensor
    with torch.inference_mode(False):
        args, kwargs = tree_map_only(QuantizedTensor, _decoded, (args, kwargs))
    result = func(*args, **kwargs)
    views = func.is_view or func.overloadpacket in _UNSAFE_VIEWS
    if views and not torch.compiler.is_compiling():
        return tree_map_only(Tensor, as_part, result)
    return result


def _decoded(weight: QuantizedTensor) -> Tensor:
    return weight.value()


def _written(func: Any, args: Any, kwargs: Any) -> list[QuantizedTensor]:
    """The quantized tensors that an operation would write to."""
    if func.namespace == "c10d":  # collectives, which do not say what they write to
        written = list(args[:1])
    elif func._schema.is_mutable:
        arguments = func._schema.arguments
        given = [*zip(arguments, args, strict=False)]
        given += [(a, kwargs[a.name]) for a in arguments if a.name in kwargs]
        written = [v for a, v in given if a.alias_info and a.alias_info.is_write]
    else:
        return []
    return [t for t in tree_flatten(written)[0] if isinstance(t, QuantizedTensor)]


def _write(func: Any, args: Any, kwargs: Any, targets: list[QuantizedTensor]) -> Any:
    """Run an operation on decoded weights, and quantize what it wrote.

    Raises:
        ReadOnlyError: outside `hijack.requantizing`.
    """
    if not is_asked() or func.namespace == "c10d":
        raise _no_write(targets[0], str(func))
    dense = {id(target): target.value() for target in targets}
    args, kwargs = tree_map_only(
        QuantizedTensor, lambda t: dense.get(id(t), t), (args, kwargs)
    )
    result = func(*args, **kwargs)
    back: dict[int, Tensor] = {}
    for target in targets:
        target.write(dense[id(target)], str(func))
        back[id(dense[id(target)])] = target
    return tree_map_only(Tensor, lambda t: back.get(id(t), t), result)


def _no_write(weight: QuantizedTensor, what: str) -> ReadOnlyError:
    return ReadOnlyError(
        f"{what}: cannot write into a quantized weight; got {weight!r}, expected a "
        "dense tensor; call hijack.unwrap first, replace the whole weight, or write "
        "inside hijack.requantizing(), which rounds"
    )


def _like_parameter(weight: QuantizedTensor, model: Tensor) -> QuantizedTensor:
    """The weight as a Parameter if another is one."""
    if not isinstance(model, torch.nn.Parameter):
        return weight
    return weight.as_parameter()


def _as_bytes(tensor: Tensor) -> tuple[Tensor, torch.dtype]:
    """A tensor as `pickle` can read it again, and its dtype.

    torch 2.13 pickles FP8 tensors and cannot unpickle them.
    """
    narrow = tensor.is_floating_point() and tensor.element_size() == 1
    return (tensor.view(torch.uint8) if narrow else tensor), tensor.dtype


def _rebuild(
    tensors: Mapping[str, tuple[Tensor, torch.dtype]],
    config: QuantizationConfig,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    additions: tuple[Addition, ...],
    is_parameter: bool,
) -> Tensor:
    params = {name: tensor.view(kind) for name, (tensor, kind) in tensors.items()}
    qdata = params.pop("weight")
    weight = QuantizedTensor(qdata, params, config, shape, dtype, additions)
    return weight.as_parameter() if is_parameter else weight


def _same(weight: QuantizedTensor, *_: Any, **__: Any) -> QuantizedTensor:
    return weight.replace()


def _clone(weight: QuantizedTensor, *_: Any, **__: Any) -> QuantizedTensor:
    return weight.map(torch.clone)


def to_copy(weight: QuantizedTensor, **kwargs: Any) -> Tensor:
    """A copy with another dtype or on another device."""
    dtype, device = kwargs.get("dtype"), kwargs.get("device")
    if dtype is not None and dtype not in DENSE_DTYPES:
        return weight.value().to(dtype=dtype, device=device)
    moved = weight.map(lambda t: t.to(device=device or t.device, copy=True))
    return moved if dtype is None else moved.replace(dtype=dtype)


def new_tensor(func: Any, weight: Tensor, *args: Any, **kwargs: Any) -> Any:
    """A dense tensor that only asks for shape, dtype and device; nothing is decoded."""
    standin = torch.empty(weight.shape, dtype=weight.dtype, device="meta")
    kwargs["device"] = kwargs.get("device") or weight.device
    made = func(standin, *args, **kwargs)
    if func is aten.empty_like.default and type(made) is Tensor:
        made_like(made)
    return made


def _copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(target, QuantizedTensor):
        weight: Any = source
        dense = weight.value(target.dtype, target.device)
        target.copy_(dense, non_blocking=non_blocking)
        copied(target, weight)
        return target
    if not isinstance(source, QuantizedTensor):
        staged = original(source)
        if staged is None:
            # processes are sent the weight that they have: that changes nothing
            same = source.dtype == target.dtype and source.shape == target.shape
            if not same or not torch.equal(target.value(device=source.device), source):
                target.write(source, "copy_ of a dense tensor")
            return target
        source = staged
    mine, theirs = target.plain_tensors(), source.plain_tensors()
    if not _are_alike(target, source) or not target.scheme.is_like(source.scheme):
        raise _no_write(target, f"copy_ of {source!r}")
    target.additions, target.config = source.additions, source.config
    for name, tensor in mine.items():
        tensor.copy_(theirs[name], non_blocking=non_blocking)
    return target


def _view(weight: QuantizedTensor, size: Any) -> Tensor:
    """The weight itself where it is seen in its own shape, as ``view_as`` sees it."""
    if tuple(size) == tuple(weight.shape):
        return weight.replace()
    return compute(aten.view.default, weight, size)  # type: ignore[no-any-return]


def _are_alike(one: QuantizedTensor, other: QuantizedTensor) -> bool:
    """Whether the tensors inside are of the same names, shapes and dtypes."""
    mine, theirs = one.plain_tensors(), other.plain_tensors()
    return mine.keys() == theirs.keys() and all(
        (mine[name].shape, mine[name].dtype) == (tensor.shape, tensor.dtype)
        for name, tensor in theirs.items()
    )


def _pin_memory(weight: QuantizedTensor, *_: Any, **__: Any) -> QuantizedTensor:
    return weight.map(lambda tensor: tensor.pin_memory())


#: Operations that give views and do not say so.
_UNSAFE_VIEWS = {
    *(aten.unsafe_split, aten.unsafe_split_with_sizes, aten.unsafe_chunk),
    aten.view,
}

#: Operations that make a tensor like another.
FACTORIES = {
    *(aten.empty_like, aten.zeros_like, aten.ones_like, aten.full_like),
    *(aten.rand_like, aten.randn_like, aten.randint_like),
    *(aten.new_empty, aten.new_zeros, aten.new_ones, aten.new_full),
    aten.new_empty_strided,
}

#: Operations that do not compute with the decoded weight; other modules add theirs.
OPERATIONS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _same,
    aten.alias.default: _same,
    aten.contiguous.default: _same,
    aten.lift_fresh.default: _same,
    aten.view.default: _view,
    aten.clone.default: _clone,
    aten._to_copy.default: to_copy,
    aten._pin_memory.default: _pin_memory,
    aten.is_pinned.default: lambda weight, *_, **__: weight.qdata.is_pinned(),
    aten.copy_.default: _copy_,
}


# -- quantizing with checks ------------------------------------------------------------


def quantize_weight(
    scheme: Scheme, weight: Tensor, options: Mapping[str, Any], where: str
) -> Quantized:
    """Run ``scheme.quantize`` and check what it got and gave.

    Args:
        scheme: the scheme.
        weight: (N, ...) dense; a meta tensor gives zeroed meta tensors.
        options: the scheme's options.
        where: the layer, for messages.

    Raises:
        HijackError: naming the layer.
    """
    if weight.dtype not in DENSE_DTYPES:
        raise DTypeError(
            f"{where}: weight is {weight.dtype}, expected one of "
            f"{', '.join(str(d) for d in DENSE_DTYPES)}; dequantize it first"
        )
    if not weight.is_meta and not scheme.refuses_non_finite:
        _check_finite(weight, where)
    try:
        scheme.check_options(options)
        with torch.no_grad():
            if weight.is_meta:
                quantized = scheme.create_params(
                    tuple(weight.shape), weight.dtype, "meta", **options
                )
            else:
                quantized = scheme.quantize(weight.detach(), **options)
    except HijackError as error:
        if isinstance(error, NonFiniteError):
            _check_finite(weight, where)  # one message for all schemes
        raise type(error)(f"{where}: {error}") from error
    except Exception as error:
        raise SchemeError(
            f"{where}: scheme {scheme.name} cannot quantize a weight of shape "
            f"{tuple(weight.shape)} with options {dict(options)}; "
            f"{type(error).__name__}: {error}"
        ) from error
    quantized = checked(quantized, f"{where}: scheme {scheme.name}: quantize")
    try:
        scheme.validate(*quantized, where)
    except HijackError as error:
        reason = str(error).removeprefix(f"{where}: ")
        raise type(error)(
            f"{where}: scheme {scheme.name} cannot store a weight of shape "
            f"{tuple(weight.shape)}, {weight.dtype}, so that it can be read: {reason}; "
            "leave the layer dense"
        ) from error
    return quantized


def check_shape(
    scheme: Scheme,
    quantized: Quantized,
    expected: tuple[int, ...],
    where: str,
    stored: tuple[int, ...] | None = None,
) -> None:
    """Refuse quantized data that decodes to a weight of another shape than wanted.

    Args:
        scheme: the scheme.
        quantized: ``(qdata, params)``.
        expected: shape of the module's weight.
        where: the layer, for messages.
        stored: the dense shape if the file says it; else the scheme is asked.

    Raises:
        ShapeError: naming both shapes.
    """
    shape = scheme.dense_shape(*quantized) if stored is None else tuple(stored)
    if stored is None and tuple(quantized[0].shape) == tuple(expected):
        # padded, by chance to the shape that the stored tensor has, so that the
        # marker does not say it
        pairs = itertools.zip_longest(shape, expected, fillvalue=-1)
        shape = tuple(expected) if all(has >= needs for has, needs in pairs) else shape
    if shape != tuple(expected):
        raise ShapeError(
            f"{where}: {scheme.name} quantized data decodes to a weight of shape "
            f"{shape}, the module expects {tuple(expected)}; is this the right model "
            "for the file?"
        )


def _check_finite(weight: Tensor, where: str) -> None:
    if not weight.numel():
        return
    weight = weight.detach()
    # the least and the largest of anything with a NaN are NaN; as float32, in which
    # schemes compute
    if torch.stack(weight.aminmax()).float().isfinite().all():
        return
    # in parts: what torch makes on the way is as large as the weight itself
    parts = torch.split(weight.reshape(-1), 1 << 20)
    bad = sum(part.numel() - int(part.float().isfinite().sum()) for part in parts)
    raise NonFiniteError(
        f"{where}: weight holds inf or NaN; got {bad} non-finite "
        f"of {weight.numel()} values, expected none; repair or exclude the layer"
    )
