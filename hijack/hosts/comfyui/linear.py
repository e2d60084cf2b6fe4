"""A Linear of ComfyUI's whose weight is quantized.

ComfyUI moves the weight, which it does well; decoding it and adding LoRAs to it is done
here, in the forward.
"""

from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hijack.hosts.comfyui.coded import Coded, PlainCarrier
from hijack.hosts.comfyui.comfy_kitchen import KitchenCarrier
from hijack.hosts.comfyui.lora import Merge, Patches, merging, seed_of

#: Every quantized layer alive, so that unpatching can say how many there are.
LIVE: weakref.WeakSet[nn.Module] = weakref.WeakSet()

Carrier = KitchenCarrier | PlainCarrier


class Source:
    """Says on a tensor of a state dict which module gave it."""

    def __init__(self, module: nn.Module | None = None) -> None:
        self._module = None if module is None else weakref.ref(module)

    def module(self) -> nn.Module | None:
        """The module, unless it is gone or this is a copy from another process."""
        return None if self._module is None else self._module()

    def __reduce__(self) -> Any:  # weak references cannot be pickled, nor need they
        return Source, ()


class QuantizedLinear:
    """What a Linear does differently once its weight is quantized."""

    carrier: Carrier
    dense_class: Any
    compute_dtype: torch.dtype
    host_ops: Any
    low_vram_patch: type
    cast_options: dict[str, bool]
    #: Suffixes of the layer's keys in a state dict.
    file_names: tuple[str, ...]
    #: What is to be added to the weight, as the parameter says.
    _weight_patches: tuple[Any, ...] = ()
    #: A LoRA that ComfyUI would merge into its resident copy of the weight.
    _hidden: Any = None
    #: One that it may merge.
    _shown: Any = None
    #: The last function asked for its patches, and the answer.
    _known: tuple[Any, Patches] | None = None

    @property
    def weight_lowvram_function(self) -> Any:
        """The LoRA ComfyUI adds while it streams the weight: none, or it would stay.

        With dynamic VRAM, ComfyUI quantizes the sum into the copy it keeps, so that
        later steps run on a merged weight. It stays beside the weight here instead.
        """
        return self._shown

    @weight_lowvram_function.setter
    def weight_lowvram_function(self, function: Any) -> None:
        entries = () if function is None else function.patches[function.key]
        show = merging() or all(isinstance(entry, Merge) for entry in entries)
        self._shown, self._hidden = (function, None) if show else (None, function)
        self._known = None  # a new function each time; the last one's copies can go

    def _load_from_state_dict(
        self: Any, state_dict: Any, prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        key = f"{prefix}weight"
        coded = state_dict.get(key)
        if isinstance(coded, Coded):
            self._take(coded)
        elif coded is not None:  # loaded once more, with a dense weight
            self._become_dense(coded)
            self._load_from_state_dict(state_dict, prefix, *args, **kwargs)
            return
        bias = state_dict.get(f"{prefix}bias")
        if self._parameters.get("bias") is None:  # ComfyUI left it for later, if any
            empty = None if bias is None else torch.empty_like(bias)
            made = None if empty is None else nn.Parameter(empty, requires_grad=False)
            self.__dict__.pop("bias", None)  # None is there an ordinary attribute
            self.register_parameter("bias", made)
        rest = {name: tensor for name, tensor in state_dict.items() if name != key}
        local_metadata, strict, missing, unexpected, errors = args
        nn.Module._load_from_state_dict(
            self, rest, prefix, local_metadata, strict, missing, unexpected, errors
        )
        if coded is not None and key in missing:
            missing.remove(key)

    def _take(self: Any, coded: Coded) -> None:
        weight = self.carrier.wrap(coded, self.compute_dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.carrier.mark(self, coded)
        self.file_names = coded.file_names()
        LIVE.add(self)

    def _become_dense(self: Any, weight: Tensor) -> None:
        LIVE.discard(self)
        object.__setattr__(self, "__class__", self.dense_class)
        dense = torch.empty(dense_shape(self), dtype=weight.dtype, device=weight.device)
        self.weight = nn.Parameter(dense, requires_grad=False)

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        coded = self.carrier.unwrap(self.weight)
        if coded is not None:  # QuantizedTensor itself cannot be copied this way
            weight = self.carrier.wrap(coded.apply(torch.clone), self.compute_dtype)
            memo[id(self.weight)] = nn.Parameter(weight, requires_grad=False)
        new = memo[id(self)] = self.__class__.__new__(self.__class__)
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        LIVE.add(new)
        return new

    # ComfyUI's mixed precision Linear replaces this method, which torch's does not.
    state_dict = nn.Module.state_dict

    def _save_to_state_dict(
        self: Any, destination: Any, prefix: str, keep_vars: bool
    ) -> None:
        coded = self.carrier.unwrap(self.weight)
        for name, parameter in self._parameters.items():
            if parameter is not None and (coded is None or name != "weight"):
                tensor = parameter if keep_vars else parameter.detach()
                destination[f"{prefix}{name}"] = tensor
        if coded is not None:
            for name, tensor in coded.file_tensors().items():
                tagged = tensor.detach().contiguous()
                tagged.hijack_source = Source(self)
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

    def current(self: Any) -> Coded:
        """What the layer stands for now: as it is, or quantized with its LoRAs."""
        coded: Coded = self.carrier.unwrap(self.weight)
        patches, _ = self._additions()
        if self._shown is not None:  # merged at most into a copy that ComfyUI keeps
            patches.append(self._patches_of(self._shown))
        if not patches:
            return coded
        dense = coded.coding.scheme.dequantize(
            coded.qdata, coded.tensors, torch.float32
        )
        for patch in patches:
            dense = patch.apply(dense)
        return coded.quantize_again(dense, seed_of(patches[-1].key))

    def _additions(self: Any) -> tuple[list[Patches], list[Callable[..., Tensor]]]:
        """LoRAs, wherever ComfyUI has put them, and its other weight functions."""
        patches = list(self._weight_patches)
        functions = []
        for function in self.weight_function:
            if isinstance(function, self.low_vram_patch):
                patches.append(self._patches_of(function))
            else:
                functions.append(function)
        if self._hidden is not None:
            patches.append(self._patches_of(self._hidden))
        return patches, functions

    def _patches_of(self: Any, function: Any) -> Patches:
        if self._known is None or self._known[0] is not function:
            entries = function.patches[function.key]
            self._known = function, Patches(entries, function.key, dense_shape(self))
        return self._known[1]  # type: ignore[no-any-return]

    def _cast(self: Any, input: Tensor) -> Any:
        """Weight and bias where the input is; ComfyUI moves them, and nothing else."""
        weight, functions = self.weight, self.weight_function
        dtype = weight.dtype if self.carrier.holds(weight) else input.dtype
        if functions:  # they are not for codes
            self.weight_function = []
        try:
            return self.host_ops.cast_bias_weight(
                self,
                None,
                dtype=dtype,
                device=input.device,
                bias_dtype=input.dtype,
                **self.cast_options,
            )
        finally:
            if functions:
                self.weight_function = functions

    def _linear(
        self: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        patches: list[Patches],
        functions: list[Callable[..., Tensor]],
    ) -> Tensor:
        dtype = input.dtype
        if not functions and not any(patch.dense_entries for patch in patches):
            dense = self.carrier.dense(weight, dtype).to(dtype)
            return add_low_rank(F.linear(input, dense, bias), input, patches)
        dense = self.carrier.dense(weight, torch.float32)
        dense = dense.to(torch.float32, copy=dense is weight)
        for patch in patches:  # functions take the weight with all LoRAs in it
            dense = patch.apply(dense) if functions else patch.apply_dense(dense)
        dense = dense.to(dtype)
        for function in functions:
            dense = function(dense)
        output = F.linear(input, dense, bias)
        return output if functions else add_low_rank(output, input, patches)

    def __getattr__(self: Any, name: str) -> Any:
        if name != "weight" and name in self.__dict__.get("file_names", ()):
            coded = self.carrier.unwrap(self.weight)
            if coded is not None:  # ComfyUI takes every key of a state dict for one
                return coded.file_tensors()[name]
        return super().__getattr__(name)  # type: ignore[misc]

    def __setattr__(self: Any, name: str, value: Any) -> None:
        super().__setattr__(name, value)
        if name == "weight":  # also when ComfyUI puts its backup back
            object.__setattr__(self, "_weight_patches", self.carrier.patches(value))

    def convert_weight(
        self: Any, weight: Tensor, inplace: bool = False, **kwargs: Any
    ) -> Tensor:
        """The weight to add a LoRA to; a `Coded` one takes it without decoding."""
        coded = self.carrier.unwrap(weight)
        return weight if coded is None else coded

    def set_weight(
        self: Any,
        weight: Tensor,
        inplace_update: bool = False,
        seed: int | None = None,
        return_weight: bool = False,
        **kwargs: Any,
    ) -> Tensor | None:
        """Take a weight that something was added to, `Coded` or dense.

        Args:
            weight: as `convert_weight` and ComfyUI's ``calculate_weight`` made it.
            inplace_update: ignored: the codes may be a read-only map of the file.
            seed: to round stochastically with.
            return_weight: return the weight and take nothing. A `Coded` one is
                decoded, for it is to be computed with; saving is done elsewhere.
        """
        coded = self.carrier.unwrap(self.weight)
        if return_weight and isinstance(weight, Coded):
            return weight.dense(torch.float32)
        if isinstance(weight, Coded):
            new = self.carrier.wrap(weight, self.compute_dtype)
        elif coded is None or tuple(weight.shape) != tuple(coded.shape):
            new = weight.to(self.compute_dtype)  # nothing says how to quantize it
        else:
            again = coded.quantize_again(weight, seed or 0)
            new = self.carrier.wrap(again, self.compute_dtype)
        if return_weight:
            return new  # type: ignore[no-any-return]
        self.weight = nn.Parameter(new, requires_grad=False)
        return None

    def take_weight(self: Any, weight: Tensor) -> None:
        """Replace the weight by one of ComfyUI's backups or by a `Coded` one."""
        if isinstance(weight, Coded):
            weight = self.carrier.wrap(weight, self.compute_dtype)
        self.weight = nn.Parameter(weight, requires_grad=False)

    def drop_copies(self: Any) -> None:
        """Give back what was kept on a device for the next forward."""
        self._known = None
        for patches in self._weight_patches:
            patches.drop_copies()

    def _apply(self: Any, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        self.drop_copies()
        for name, parameter in self._parameters.items():
            if parameter is None:
                continue
            coded = self.carrier.unwrap(parameter)
            if coded is None:
                moved = fn(parameter)
            else:  # codes keep their dtype, whatever the model is cast to
                moved = self.carrier.wrap(coded.apply(fn), self.compute_dtype)
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

    ComfyUI computes with what it gives, and saves what other functions give. Codes
    without their scales would be garbage, such as in a LoRA that is extracted.
    """

    @functools.wraps(original)
    def model_state_dict(self: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(self, *args, **kwargs)
        for path, module in self.model.named_modules(remove_duplicate=False):
            key = f"{path}.weight"
            if key in found and isinstance(module, QuantizedLinear):
                coded = module.carrier.unwrap(module.weight)
                found[key] = module.weight if coded is None else coded.for_state_dict()
        return found

    return model_state_dict


def add_low_rank(output: Tensor, input: Tensor, patches: list[Patches]) -> Tensor:
    """Add the products of low-rank pairs to a Linear's output.

    Args:
        output: (..., N).
        input: (..., K), same dtype.
        patches: of the weight.
    """
    for patch in patches:
        pair = patch.low_rank(input.device, input.dtype)
        if pair is not None:
            down, up = pair
            inner = F.linear(input.reshape(-1, input.shape[-1]), down)
            flat = output.reshape(-1, output.shape[-1])
            output = torch.addmm(flat, inner, up.t()).view(output.shape)
    return output


def dense_shape(module: Any) -> tuple[int, ...]:
    return (module.out_features, module.in_features)
