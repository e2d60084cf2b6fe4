"""A Linear of ComfyUI's whose weight is quantized.

ComfyUI moves the weight, which it does well. What the layer computes with it is the
forward that the contract bound for it; LoRAs are added to the result, or where they are
no low-rank pairs, as the difference they make to the decoded weight.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import dataclasses
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hijack.claim import Claim
from hijack.errors import PluginError
from hijack.formats import matching
from hijack.hosts.comfyui.file_tensors import dialect_of, file_tensors
from hijack.hosts.comfyui.host_tensors import HostTensors
from hijack.hosts.comfyui.lazy_tensor import LazyTensor
from hijack.hosts.comfyui.lora import Merge, Patches, merging, seed_of
from hijack.modules import Forward, linear_forward
from hijack.quantized import (
    QuantizationConfig,
    QuantizedTensor,
    WeightView,
    check_shape,
)
from hijack.registry import Registry, current_registry
from hijack.safetensors_io.header import Header, join
from hijack.scheme import Scheme

#: Attribute of ComfyUI's LoRAs for low VRAM that holds them as `Patches`.
PATCHES = "hijack_patches"
#: Every quantized layer alive, so that unpatching can say how many there are.
LIVE: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class Source:
    """Says on a tensor of a state dict which module gave it, under which name."""

    def __init__(self, module: nn.Module | None = None, name: str = "") -> None:
        self._module = None if module is None else weakref.ref(module)
        self.name = name

    def module(self) -> nn.Module | None:
        """The module, unless it is gone or this is a copy from another process."""
        return None if self._module is None else self._module()

    def __reduce__(self) -> Any:  # weak references cannot be pickled, nor need they
        return Source, ()


@dataclasses.dataclass(frozen=True)
class Change:
    """A layer that is about to become quantized: all that can fail is done.

    Attributes:
        weight: its weight.
        forward: what it computes; None for the default.
        registry: whose plugins are told.
        prefix: of the layer's keys.
    """

    weight: QuantizedTensor
    forward: Forward | None
    registry: Registry
    prefix: str


class QuantizedLinear:
    """What a Linear does differently once its weight is quantized."""

    host_tensors: HostTensors
    dense_class: Any
    compute_dtype: torch.dtype
    host_ops: Any
    low_vram_patch: type
    cast_options: dict[str, bool]
    #: This class, but for the functions on the weight.
    class_to_cast: Any
    #: Names of the scheme's tensors beside the weight, in a state dict.
    param_names: tuple[str, ...]
    #: The forward a plugin or the scheme chose; None for the default.
    bound_forward: Forward | None = None
    #: What is to be added to the weight, as the parameter says.
    _weight_patches: tuple[Any, ...] = ()
    #: A LoRA that ComfyUI would merge into its resident copy of the weight.
    _deferred_patch: Any = None
    #: One that it may merge.
    _visible_patch: Any = None

    # -- becoming quantized ------------------------------------------------------------

    @classmethod
    def prepare(cls, module: Any, weight: Any, prefix: str, state_dict: Any) -> Change:
        """Decide all that the contract leaves to plugins, before a layer changes.

        Args:
            module: one of ComfyUI's Linear layers, as it was built.
            weight: a `QuantizedTensor`, or a `LazyTensor` that is to be quantized.
            prefix: of the layer's keys.
            state_dict: that the layer is loaded from.

        Raises:
            HijackError: if the tensors do not fit, or quantizing is refused.
        """
        registry = current_registry()
        with _naming(prefix):
            if isinstance(weight, LazyTensor):
                quantized = _quantize_lazy(registry, module, weight, prefix)
            else:
                quantized = _select(registry, module, weight, prefix)
                quantized = _create(registry, module, quantized, prefix, state_dict)
            forward = registry.bind_forward(module, quantized.scheme)
        return Change(quantized, forward, registry, prefix)

    def take(self: Any, change: Change) -> None:
        """Become the layer that was prepared; nothing here is expected to fail."""
        self._put(change.weight)
        self.bound_forward = change.forward
        LIVE.add(self)
        with _naming(change.prefix):
            change.registry.notify_init(self, change.weight.scheme)

    def _put(self: Any, weight: QuantizedTensor) -> None:
        tensor = self.host_tensors.wrap(weight, self.compute_dtype)
        self.weight = nn.Parameter(tensor, requires_grad=False)
        self.host_tensors.mark(self, weight)
        self.param_names = tuple(weight.params)

    # -- ComfyUI's life cycle ----------------------------------------------------------

    @property
    def weight_lowvram_function(self) -> Any:
        """The LoRA ComfyUI adds while it streams the weight: none, or it would stay.

        With dynamic VRAM, ComfyUI quantizes the sum into the copy it keeps, so that
        later steps run on a merged weight. It stays beside the weight here instead.
        """
        return self._visible_patch

    @weight_lowvram_function.setter
    def weight_lowvram_function(self, function: Any) -> None:
        entries = () if function is None else function.patches[function.key]
        show = merging() or all(isinstance(entry, Merge) for entry in entries)
        self._visible_patch = function if show else None
        self._deferred_patch = None if show else function

    def _load_from_state_dict(
        self: Any, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        """Load once more: a quantized weight, a dense one, or none."""
        key = f"{prefix}weight"
        weight = state_dict.get(key)
        if keeps_quantized(self, weight):
            self.take(self.prepare(self, weight, prefix, state_dict))
        elif weight is not None:
            if isinstance(weight, QuantizedTensor):
                weight = state_dict[key] = weight.value(self.compute_dtype)
            self._become_dense(weight)
            self._load_from_state_dict(state_dict, prefix, *args, **kwargs)
            return
        self.load_rest(state_dict, prefix, *args)

    def load_rest(
        self: Any,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing: list[str],
        unexpected: list[str],
        errors: list[str],
    ) -> None:
        """Load everything but the weight, as ``_load_from_state_dict`` does."""
        key = f"{prefix}weight"
        bias = state_dict.get(f"{prefix}bias")
        if self._parameters.get("bias") is None:  # ComfyUI left it for later, if any
            empty = None if bias is None else torch.empty_like(bias)
            made = None if empty is None else nn.Parameter(empty, requires_grad=False)
            self.__dict__.pop("bias", None)  # None is there an ordinary attribute
            self.register_parameter("bias", made)
        rest = {name: tensor for name, tensor in state_dict.items() if name != key}
        nn.Module._load_from_state_dict(
            self, rest, prefix, local_metadata, strict, missing, unexpected, errors
        )
        if key in state_dict and key in missing:
            missing.remove(key)

    def _become_dense(self: Any, weight: Tensor) -> None:
        LIVE.discard(self)
        object.__setattr__(self, "__class__", self.dense_class)
        dense = torch.empty(dense_shape(self), dtype=weight.dtype, device=weight.device)
        self.weight = nn.Parameter(dense, requires_grad=False)

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        weight = self.host_tensors.unwrap(self.weight)
        if weight is not None:  # comfy_kitchen's tensor cannot be copied this way
            copied = self.host_tensors.wrap(weight.map(torch.clone), weight.dtype)
            memo[id(self.weight)] = nn.Parameter(copied, requires_grad=False)
        new = memo[id(self)] = self.__class__.__new__(self.__class__)
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        LIVE.add(new)
        if weight is not None:
            registry = current_registry()
            new.bound_forward = registry.bind_forward(new, weight.scheme)
            registry.notify_init(new, weight.scheme)
        return new

    # ComfyUI's mixed precision Linear replaces this method, which torch's does not.
    state_dict = nn.Module.state_dict

    def _save_to_state_dict(
        self: Any, destination: Any, prefix: str, keep_vars: bool
    ) -> None:
        weight = self.host_tensors.unwrap(self.weight)
        for name, parameter in self._parameters.items():
            if parameter is not None and (weight is None or name != "weight"):
                tensor = parameter if keep_vars else parameter.detach()
                destination[f"{prefix}{name}"] = tensor
        if weight is not None:
            for name, tensor in weight.plain_tensors().items():
                tagged = tensor.detach().contiguous()
                tagged.hijack_source = Source(self, name)
                destination[f"{prefix}{name}"] = tagged

    def forward(self: Any, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.forward_comfy_cast_weights(input)  # type: ignore[no-any-return]

    def forward_comfy_cast_weights(
        self: Any, input: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        patches, functions = self._additions()
        weight, bias, *stream = self._cast(input)
        output = self._linear(input, weight, bias, patches, functions)
        if stream:
            self.host_ops.uncast_bias_weight(self, weight, bias, *stream)
        return output  # type: ignore[no-any-return]

    def current(self: Any) -> QuantizedTensor:
        """What the layer stands for now: as it is, or quantized with its LoRAs."""
        weight: QuantizedTensor = self.host_tensors.unwrap(self.weight)
        patches, _ = self._additions()
        # merged at most into a copy that ComfyUI keeps
        if self._visible_patch is not None:
            patches.append(self._patches_of(self._visible_patch))
        if not patches:
            return weight
        dense = weight.dense(torch.float32)
        for patch in patches:
            dense = patch.apply(dense)
        return weight.requantized(dense, seed_of(patches[-1].key))

    def _additions(self: Any) -> tuple[list[Patches], list[Callable[..., Tensor]]]:
        """LoRAs, wherever ComfyUI has put them, and its other weight functions."""
        patches = list(self._weight_patches)
        functions = []
        for function in self.weight_function:
            if isinstance(function, self.low_vram_patch):
                patches.append(self._patches_of(function))
            else:
                functions.append(function)
        if self._deferred_patch is not None:
            patches.append(self._patches_of(self._deferred_patch))
        return patches, functions

    def _patches_of(self: Any, function: Any) -> Patches:
        # kept on the function, which ComfyUI makes anew for each module and LoRA
        patches: Patches | None = vars(function).get(PATCHES)
        if patches is None:
            entries = function.patches[function.key]
            patches = Patches(entries, function.key, dense_shape(self))
            setattr(function, PATCHES, patches)
        return patches

    def _cast(self: Any, input: Tensor) -> Any:
        """Weight and bias where the input is; ComfyUI moves them, and nothing else."""
        quantized, dtype = self.host_tensors.holds(self.weight), input.dtype
        if quantized and hasattr(self, "_v") and input.device.type == "cpu":
            # With dynamic VRAM it would be decoded there, where it is already.
            bias = None if self.bias is None else self.bias.to(input)
            return self.weight, bias
        layer = self
        if self.weight_function:  # shares everything else, so that nobody's is changed
            layer = object.__new__(self.class_to_cast)
            object.__setattr__(layer, "__dict__", self.__dict__)
        return self.host_ops.cast_bias_weight(
            layer,
            None,
            dtype=self.weight.dtype if quantized else dtype,
            device=input.device,
            bias_dtype=dtype,
            **self.cast_options,
        )

    def _linear(
        self: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        patches: list[Patches],
        functions: list[Callable[..., Tensor]],
    ) -> Tensor:
        view = self.host_tensors.view(weight)
        changed = functions or any(patch.dense_entries for patch in patches)
        if view is None:  # ComfyUI has made it dense
            output = F.linear(input, weight.to(input.dtype), bias)
        elif not changed:
            output = (self.bound_forward or linear_forward)(self, input, view, bias)
        else:
            output = self._changed_linear(input, view, bias, patches, functions)
        return output if functions else add_low_rank(output, input, patches)

    def _changed_linear(
        self: Any,
        input: Tensor,
        view: WeightView,
        bias: Tensor | None,
        patches: list[Patches],
        functions: list[Callable[..., Tensor]],
    ) -> Tensor:
        """The product with a weight that something other than a low-rank pair changes.

        A forward that was bound computes with the weight it knows, and the difference
        is added.
        """
        dense = view.dense(torch.float32)
        weight = dense.clone()  # a scheme may keep what it decodes
        for patch in patches:  # functions take the weight with all LoRAs in it
            weight = patch.apply(weight) if functions else patch.apply_dense(weight)
        for function in functions:
            weight = function(weight.to(input.dtype))
        if self.bound_forward is None or weight.shape != dense.shape:
            return F.linear(input, weight.to(input.dtype), bias)
        output: Tensor = self.bound_forward(self, input, view, bias)
        return output + F.linear(input, (weight - dense).to(input.dtype))

    def __getattr__(self: Any, name: str) -> Any:
        if name in self.__dict__.get("param_names", ()):
            weight = self.host_tensors.unwrap(self.weight)
            if weight is not None:  # ComfyUI takes every key of a state dict for one
                return weight.params[name]
        return super().__getattr__(name)  # type: ignore[misc]

    def __setattr__(self: Any, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight":  # also when ComfyUI puts its backup back
            additions = self.host_tensors.additions(value)
            object.__setattr__(self, "_weight_patches", additions)

    def convert_weight(
        self: Any, weight: Tensor, inplace: bool = False, **kwargs: Any
    ) -> Tensor:
        """The weight to add a LoRA to; a quantized one takes it without decoding."""
        quantized = self.host_tensors.unwrap(weight)
        return weight if quantized is None else quantized

    def set_weight(
        self: Any,
        weight: Tensor,
        inplace_update: bool = False,
        seed: int | None = None,
        return_weight: bool = False,
        **kwargs: Any,
    ) -> Tensor | None:
        """Take a weight that something was added to, quantized or dense.

        Args:
            weight: as `convert_weight` and ComfyUI's ``calculate_weight`` made it.
            inplace_update: ignored: the weight may be a read-only map of the file.
            seed: to round stochastically with.
            return_weight: return the weight and take nothing. A quantized one is
                decoded, for it is to be computed with; saving is done elsewhere.
        """
        old = self.host_tensors.unwrap(self.weight)
        if return_weight and isinstance(weight, QuantizedTensor):
            return weight.value(torch.float32)
        if isinstance(weight, QuantizedTensor):
            new = self.host_tensors.wrap(weight, self.compute_dtype)
        elif old is None or tuple(weight.shape) != tuple(old.shape):
            new = weight.to(self.compute_dtype)  # nothing says how to quantize it
        else:
            again = old.requantized(weight, seed or 0)
            new = self.host_tensors.wrap(again, self.compute_dtype)
        if return_weight:
            return new  # type: ignore[no-any-return]
        self.weight = nn.Parameter(new, requires_grad=False)
        return None

    def take_weight(self: Any, weight: Tensor) -> None:
        """Replace the weight by one of ComfyUI's backups or by a quantized one."""
        if isinstance(weight, QuantizedTensor):
            weight = self.host_tensors.wrap(weight, self.compute_dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def drop_copies(self: Any) -> None:
        """Give back what was kept on a device for the next forward."""
        functions = (*self.weight_function, self._deferred_patch, self._visible_patch)
        kept = (getattr(function, PATCHES, None) for function in functions)
        for patches in (*self._weight_patches, *kept):
            if patches is not None:
                patches.drop_copies()

    def _apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.drop_copies()
        for name, parameter in self._parameters.items():
            if parameter is None:
                continue
            weight = self.host_tensors.unwrap(parameter)
            if weight is None:
                moved = fn(parameter)
            else:  # quantized data keeps its dtype, whatever the model is cast to
                moved = self.host_tensors.wrap(weight.map(fn), self.compute_dtype)
            self._parameters[name] = nn.Parameter(moved, requires_grad=False)
        for name, buffer in self._buffers.items():
            self._buffers[name] = None if buffer is None else fn(buffer)
        return self


def make_partially_unload(original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of ``ModelPatcherDynamic.partially_unload``.

    With dynamic VRAM modules are not moved, so that nothing else tells them to give
    memory back.
    """

    @functools.wraps(original)
    def partially_unload(self: Any, *args: Any, **kwargs: Any) -> Any:
        for module in self.model.modules():
            if isinstance(module, QuantizedLinear):
                module.drop_copies()
        return original(self, *args, **kwargs)

    return partially_unload


def make_model_state_dict(original: Callable[..., Any]) -> Callable[..., Any]:
    """The replacement of ``ModelPatcher.model_state_dict``.

    ComfyUI computes with what it gives, and saves what other functions give. Quantized
    data without its scales would be garbage, such as in a LoRA that is extracted; and
    the scales are no weights, which models could be merged by.
    """

    @functools.wraps(original)
    def model_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        for path, module in self.model.named_modules(remove_duplicate=False):
            key = f"{path}.weight"
            if isinstance(module, QuantizedLinear) and key in found:
                weight = module.host_tensors.unwrap(module.weight)
                found[key] = module.weight if weight is None else weight
                for name in () if weight is None else weight.params:
                    found.pop(f"{path}.{name}", None)
        return found

    return model_state_dict


def add_low_rank(output: Tensor, input: Tensor, patches: list[Patches]) -> Tensor:
    """Add low-rank pairs to a Linear's output, in two products however many they are.

    Args:
        output: (..., N).
        input: (..., K), same dtype.
        patches: of the weight.
    """
    patches = [patch for patch in patches if patch.pairs]
    pair = None
    if patches:
        pair = patches[0].low_rank(input.device, input.dtype, tuple(patches[1:]))
    if pair is None:
        return output
    down, up = pair  # (R, K), (N, R)
    inner = F.linear(input.reshape(-1, input.shape[-1]), down)
    flat = output.reshape(-1, output.shape[-1])
    return torch.addmm(flat, inner, up.t()).view(output.shape)


@contextlib.contextmanager
def _naming(prefix: str) -> Iterator[None]:
    """Put the layer's name in front of a plugin's failure that does not say it."""
    try:
        yield
    except PluginError as error:
        layer = prefix[:-1]
        if layer in str(error):
            raise
        raise PluginError(f"{layer}: {error}") from error


def _create(
    registry: Registry,
    module: Any,
    weight: QuantizedTensor,
    prefix: str,
    state_dict: Mapping[str, Any],
) -> QuantizedTensor:
    """The weight as it was read, unless a plugin has other tensors for it."""
    file = {prefix + name: tensor for name, tensor in file_tensors(weight).items()}
    tensors: Any = collections.ChainMap(file, state_dict)  # type: ignore[arg-type]
    answer = registry.create_params(module, weight.scheme, prefix, tensors)
    if answer is None:
        return weight
    check_shape(weight.scheme, answer, tuple(weight.shape), prefix[:-1])
    return weight.replace(qdata=answer[0], params=answer[1])


def _select(
    registry: Registry, module: Any, weight: QuantizedTensor, prefix: str
) -> QuantizedTensor:
    """The weight as it was read, unless a plugin says how to read it otherwise."""
    tensors, layer = file_tensors(weight), prefix[:-1]
    spelled = {layer: matching.encoded_layer(weight, tensors)}
    marks = dialect_of(weight).finish(spelled, {})
    file = {join(layer, name): tensor for name, tensor in tensors.items()}
    header = Header.from_state_dict({**file, **marks.tensors}, marks.metadata)
    claim = registry.select_scheme(module, prefix, header)
    if not isinstance(claim, Claim):
        return weight
    scheme = registry.get(claim.scheme)
    shape, dtype = tuple(weight.shape), weight.dtype
    read = {**file, **marks.tensors}
    return matching.read_weight(scheme, claim, read, shape, dtype)


def _quantize_lazy(
    registry: Registry, module: Any, weight: LazyTensor, prefix: str
) -> QuantizedTensor:
    """A dense weight of a file or model, quantized as the contract asks for."""
    answer = registry.select_scheme(module, prefix, None)
    scheme: Any = weight.scheme if answer is None else answer
    if isinstance(answer, Claim):
        scheme = registry.get(answer.scheme)
    given = registry.create_params(module, scheme, prefix)
    quantize: Any = weight.quantize
    if given is None:
        quantized: QuantizedTensor = quantize(scheme, weight.read())
        return quantized
    check_shape(scheme, given, tuple(weight.shape), prefix[:-1])
    config = QuantizationConfig.of(scheme)
    return QuantizedTensor(*given, config, tuple(weight.shape), weight.dtype)


def dense_shape(module: Any) -> tuple[int, ...]:
    return (module.out_features, module.in_features)


def for_linears(scheme: Scheme) -> bool:
    """Whether a scheme quantizes Linears; some of ComfyUI's are none of torch's."""
    return any(issubclass(nn.Linear, target) for target in scheme.targets)


def keeps_quantized(module: Any, weight: Any) -> bool:
    """Whether a Linear keeps a weight of a state dict quantized, or makes it so.

    Any other quantized weight is decoded, such as one of a scheme that is not for
    Linears, or of a shape that the layer has not.
    """
    scheme = getattr(weight, "scheme", None)
    return (
        isinstance(weight, QuantizedTensor | LazyTensor)
        and isinstance(scheme, Scheme)  # none where a lazy tensor is to stay dense
        and for_linears(scheme)
        and tuple(weight.shape) == dense_shape(module)
    )
