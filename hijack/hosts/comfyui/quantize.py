"""Quantizing inside ComfyUI: a model that is loaded, or one while it is loaded."""

from __future__ import annotations

import dataclasses
import functools
import sys
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hijack import selection
from hijack.checkpoint.notes import declined_notes, replaced_notes
from hijack.dtypes import DENSE_DTYPES
from hijack.errors import CheckpointError, HijackError, SchemeError
from hijack.formats.identification import identify
from hijack.hosts.comfyui.lazy_tensor import LazyTensor, quantize_layer
from hijack.hosts.comfyui.linear import for_linears
from hijack.hosts.comfyui.loaders import SHADOWED, core_operations
from hijack.hosts.comfyui.operations import make_operations
from hijack.lora.files import Loras, Spec
from hijack.progress import Progress
from hijack.quantized import QuantizationConfig, QuantizedTensor
from hijack.safetensors_io.header import Header, join
from hijack.safetensors_io.reader import open_tensors, read_header
from hijack.scheme import Scheme

#: Where ComfyUI keeps the network in its models.
NETWORK = "diffusion_model"
#: Under what name it injects LoRAs in bypass mode.
BYPASS = "bypass_lora"
#: Parameters of ComfyUI's own quantized layers that a decoded weight has no use for.
NATIVE_SCALES = ("scale_weight", "scale_input", "input_scale")

#: What a ModelPatcher carries besides weights and their patches.
_INTENTS = (
    "model_options",
    "object_patches",
    "weight_wrapper_patches",
    "force_cast_weights",
    "attachments",
    "additional_models",
    "callbacks",
    "wrappers",
    "injections",
    "hook_patches",
    "hook_patches_backup",
    "forced_hooks",
    "hook_mode",
    "is_clip",
)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How a model is quantized.

    Attributes:
        config: scheme and options.
        include: patterns on layer names, one a line; empty for the family's.
        exclude: patterns of layers to leave dense; empty for the family's.
        rules: what is special about some layers, as for `selection.choose`.
        device: where each layer is quantized.
    """

    config: QuantizationConfig
    include: str = ""
    exclude: str = ""
    rules: tuple[str, ...] = ()
    device: str | torch.device = "cpu"


class Quantizer:
    """Makes the state dict a model is built from, and counts what is done of it."""

    def __init__(self, recipe: Recipe, progress: Progress | None) -> None:
        self.recipe, self.progress = recipe, progress
        self.total = self.done = 0
        self.choice: selection.Choice | None = None

    def mark(
        self,
        tensors: Mapping[str, LazyTensor],
        where: str,
        merged: Mapping[str, Callable[[], Tensor]] | None = None,
    ) -> dict[str, Tensor]:
        """The tensors; those of chosen layers are quantized when a layer takes them.

        Args:
            tensors: key to dense tensor, of a whole model.
            where: the model or file, for messages.
            merged: key to what reads a tensor with LoRAs in it, in float32.

        Raises:
            HijackError: if a pattern matches no layer, no layer is chosen, or the
                scheme is not for Linears.
        """
        recipe, scheme = self.recipe, self.recipe.config.scheme
        if not for_linears(scheme):
            names = ", ".join(target.__name__ for target in scheme.targets)
            raise SchemeError(
                f"{where}: scheme {scheme.name} is for {names}, and ComfyUI's layers "
                "that can be quantized are Linear; choose another scheme"
            )
        header = dataclasses.replace(Header.from_state_dict(tensors), source=where)
        options = dict(recipe.config.options)
        self.choice = selection.choose(
            header,
            (nn.Linear,),
            recipe.include.split() or None,
            recipe.exclude.split() or None,
            recipe.rules,
            lambda shape, own: scheme.declines(shape, **{**options, **own}),
        )
        self.total = len(self.choice.layers)
        marked: dict[str, Tensor] = dict(tensors)
        for layer, dtype in self.choice.casts.items():
            key = join(layer, "weight")
            dense = tensors[key]
            read = functools.partial(_read_as, dense.read, dtype)
            marked[key] = LazyTensor(tuple(dense.shape), dtype, read)
        for layer, own in self.choice.layers.items():
            key = join(layer, "weight")
            dense = tensors[key]
            exact = (merged or {}).get(key)
            marked[key] = LazyTensor(
                tuple(dense.shape),
                dense.dtype,
                exact or dense.read,
                self._quantizer(layer, own, dense.dtype if exact else None),
                scheme,
            )
        return marked

    def _quantizer(
        self, layer: str, own: Mapping[str, Any], like: torch.dtype | None
    ) -> Callable[[Scheme, Tensor], QuantizedTensor]:
        """What quantizes one layer.

        Args:
            layer: its name.
            own: options that a rule gives it.
            like: dtype of the file's weight, if the one to quantize is float32 because
                LoRAs were merged into it; it gets parameters as the former would.
        """

        def quantize(scheme: Scheme, weight: Tensor) -> QuantizedTensor:
            check_interrupted()
            options = {**dict(self.recipe.config.options), **own}
            if like is not None:
                kept = scheme.options_like(like)
                weight = weight.to(like) if kept is None else weight
                options = {**(kept or {}), **options}
            config = QuantizationConfig.of(scheme, options)
            moved = weight.to(self.recipe.device)
            quantized = quantize_layer(config, moved, layer).map(Tensor.cpu)
            if like is not None:
                quantized = quantized.replace(dtype=like)
            self.done += 1
            if self.progress is not None:
                self.progress(self.done, self.total, layer)
            return quantized

        return quantize

    def notes(self) -> list[str]:
        """What is worth knowing of the choice of layers, one sentence each."""
        if self.choice is None:
            return []
        choice = self.choice
        family = "" if choice.family is None else choice.family.name
        return [
            selection.model_text(family, choice.skipped, "include names others"),
            f"{len(choice.layers)} layers quantized, {len(choice.skipped)} left dense",
            *replaced_notes(choice),
            *declined_notes(choice),
        ]


def quantize_model(
    patcher: Any,
    config: QuantizationConfig,
    include: str = "",
    exclude: str = "",
    progress: Progress | None = None,
    disable_dynamic: bool = False,
    *,
    rules: Sequence[str] = (),
    device: str | torch.device = "cpu",
    notes: list[str] | None = None,
) -> Any:
    """Quantize a loaded model, with whatever LoRAs are on it merged in first.

    Layers are dequantized, merged in float32 and quantized one at a time.

    Args:
        patcher: a ModelPatcher; left as it is.
        config: how.
        include: patterns on layer names, one a line; empty for the family's.
        exclude: patterns of layers to leave dense; empty for the family's.
        progress: called after each layer.
        disable_dynamic: build a ModelPatcher without dynamic VRAM.
        rules: what is special about some layers, as for `quantize_file`.
        device: where each layer is quantized.
        notes: gets what is worth knowing of the result, one sentence each.

    Returns:
        A new ModelPatcher, as if loaded from a quantized file.

    Raises:
        HijackError: if no layer is chosen, one cannot be quantized, or a LoRA cannot
            be merged.
    """
    model = patcher.model
    recipe = Recipe(config, include, exclude, tuple(rules), device)
    _refuse_bypass(patcher)
    tensors = {
        name: LazyTensor(
            tuple(tensor.shape),
            _dense_dtype(tensor, model),
            _reader(patcher, f"{NETWORK}.{name}", tensor),
        )
        for name, tensor in _own_tensors(getattr(model, NETWORK))
    }
    quantizer = Quantizer(recipe, progress)
    state_dict = quantizer.mark(tensors, type(model).__name__)
    new = _rebuild(patcher, state_dict)
    result = _patcher_class(disable_dynamic)(
        new, load_device=patcher.load_device, offload_device=patcher.offload_device
    )
    _hand_on(patcher.clone(), result)
    if hasattr(result, "cached_patcher_init"):
        arguments = (weakref.ref(patcher), recipe)
        result.cached_patcher_init = (_quantize_again, arguments)
    if notes is not None:
        notes += quantizer.notes()
    return result


def _quantize_again(
    original: Callable[[], Any], recipe: Recipe, disable_dynamic: bool = False
) -> Any:
    """Make the model once more, for ComfyUI's copies on other devices."""
    patcher = original()
    if patcher is None:
        raise HijackError(
            "Quantize Model: the original model is gone, and ComfyUI needs another "
            "copy; run the workflow again"
        )
    return quantize_model(
        patcher,
        recipe.config,
        recipe.include,
        recipe.exclude,
        disable_dynamic=disable_dynamic,
        rules=recipe.rules,
        device=recipe.device,
    )


def load_quantized(
    path: str,
    config: QuantizationConfig,
    include: str = "",
    exclude: str = "",
    progress: Progress | None = None,
    model_options: Mapping[str, Any] | None = None,
    disable_dynamic: bool = False,
    *,
    rules: Sequence[str] = (),
    loras: Sequence[Spec] = (),
    device: str | torch.device = "cpu",
    notes: list[str] | None = None,
) -> Any:
    """Load a dense diffusion model from disk, quantizing each layer as it is read.

    Args:
        path: a safetensors file, or the index of a sharded one.
        config: how.
        include: patterns on layer names, one a line; empty for the family's.
        exclude: patterns of layers to leave dense; empty for the family's.
        progress: called after each layer.
        model_options: of ComfyUI's loader.
        disable_dynamic: build a ModelPatcher without dynamic VRAM.
        rules: what is special about some layers, as for `quantize_file`.
        loras: files to merge first, as for `quantize_file`.
        device: where each layer is quantized.
        notes: gets what is worth knowing of the result, one sentence each.

    Returns:
        A ModelPatcher.

    Raises:
        CheckpointError: if the file is quantized already or changes while it is read,
            a LoRA does not fit, or ComfyUI does not know its architecture.
        HijackError: if no layer is chosen, or one cannot be quantized.
    """
    sd = sys.modules["comfy.sd"]
    header = read_header(path)
    _refuse_quantized(header)
    detection = sys.modules["comfy.model_detection"]
    recipe = Recipe(config, include, exclude, tuple(rules), device)
    plain, merged = _file_tensors(header, Loras.open(loras, header), device)
    prefix = detection.unet_prefix_from_state_dict(plain)
    if not any(key.startswith(prefix) for key in plain):
        prefix = ""
    network = {
        key.removeprefix(prefix): tensor
        for key, tensor in plain.items()
        if key.startswith(prefix)
    }
    exact = {key.removeprefix(prefix): read for key, read in merged.items()}
    quantizer = Quantizer(recipe, progress)
    marked = quantizer.mark(network, Path(path).name, exact)
    state_dict = plain | {f"{prefix}{key}": tensor for key, tensor in marked.items()}
    options = {"disable_dynamic": True} if disable_dynamic else {}
    result = sd.load_diffusion_model_state_dict(
        state_dict, model_options=dict(model_options or {}), **options
    )
    if result is None:
        raise CheckpointError(
            f"{Path(path).name}: ComfyUI does not know this architecture; expected a "
            "diffusion model it can load"
        )
    _settle(getattr(result.model, NETWORK))
    if hasattr(result, "cached_patcher_init"):
        result.cached_patcher_init = (
            _load_again,
            (path, recipe, tuple(loras), model_options),
        )
    if notes is not None:
        notes += quantizer.notes()
    return result


def _load_again(
    path: str,
    recipe: Recipe,
    loras: Sequence[Spec],
    model_options: Mapping[str, Any] | None,
    disable_dynamic: bool = False,
) -> Any:
    """Load the model once more, for ComfyUI's copies on other devices."""
    return load_quantized(
        path,
        recipe.config,
        recipe.include,
        recipe.exclude,
        None,
        model_options,
        disable_dynamic,
        rules=recipe.rules,
        loras=loras,
        device=recipe.device,
    )


# -- what is read ----------------------------------------------------------------------


def read_weight(patcher: Any, key: str) -> Tensor:
    """One tensor of a model as it is used: decoded, with its LoRAs, on the CPU.

    Args:
        patcher: a ModelPatcher.
        key: as in its patches, such as ``diffusion_model.blocks.0.attn.to_q.weight``.

    Raises:
        AttributeError: if the model has no such tensor.
    """
    tensor = sys.modules["comfy.utils"].get_attr(patcher.model, key)
    return _reader(patcher, key, tensor)()


def _own_tensors(network: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters and saved buffers: of a quantized layer the weight alone."""
    own = dict(network.named_parameters(remove_duplicate=False))
    found: list[tuple[str, Tensor]] = []
    for key, tensor in own.items():
        path, _, name = key.rpartition(".")
        if name not in NATIVE_SCALES or join(path, "weight") not in own:
            found.append((key, tensor))
    for path, module in network.named_modules():
        for name, buffer in module.named_buffers(recurse=False):
            if name not in module._non_persistent_buffers_set:
                found.append((join(path, name), buffer))
    return found


def _reader(patcher: Any, key: str, tensor: Tensor) -> Callable[[], Tensor]:
    """Reads a tensor of a model as it is without patches, then adds them."""
    kept = [*getattr(patcher, "hook_backup", {}).get(key, ()), tensor][0]
    weight = patcher.backup[key].weight if key in patcher.backup else kept
    patches = list(patcher.patches.get(key, ()))
    get_key_weight = sys.modules["comfy.model_patcher"].get_key_weight
    calculate = sys.modules["comfy.lora"].calculate_weight

    def read() -> Tensor:
        ordinary = (
            type(weight) in (Tensor, nn.Parameter) and weight.dtype in DENSE_DTYPES
        )
        if ordinary and not patches:
            return weight.detach().to("cpu", copy=True)  # type: ignore[no-any-return]
        _, _, convert = get_key_weight(patcher.model, key)
        dense = weight.detach().to("cpu", torch.float32, copy=True)
        if convert is not None:
            dense = convert(dense, inplace=True)
        if hasattr(dense, "dequantize") and type(dense) is not Tensor:
            dense = dense.dequantize()
        if isinstance(dense, QuantizedTensor):
            dense = dense.value(torch.float32)
        return calculate(patches, dense, key) if patches else dense  # type: ignore[no-any-return]

    return read


def _dense_dtype(tensor: Tensor, model: Any) -> torch.dtype:
    """The dtype of a tensor; of a quantized one what the model computes in."""
    if tensor.dtype in DENSE_DTYPES or not tensor.is_floating_point():
        return tensor.dtype
    found: torch.dtype | None = model.manual_cast_dtype
    return torch.bfloat16 if found is None else found


def _file_tensors(
    header: Header, loras: Loras, device: str | torch.device
) -> tuple[dict[str, LazyTensor], dict[str, Callable[[], Tensor]]]:
    """The tensors of a file with LoRAs in them, in their dtype and in float32.

    Args:
        header: of the file.
        loras: for the file.
        device: where they are merged.

    Returns:
        Key to tensor; and key to what reads it in float32, of those LoRAs change.
    """
    tensors: dict[str, LazyTensor] = {}
    merged: dict[str, Callable[[], Tensor]] = {}
    for key, info in header.tensors.items():
        dtype = info.torch_dtype
        if dtype is None:
            raise CheckpointError(
                f"{key}: dtype {info.dtype} is not one of torch's; expected a dense "
                "file"
            )
        read = functools.partial(_read_file, header, key)
        if loras.touches(key):
            merged[key] = functools.partial(_read_merged, loras, key, read, device)
            read = functools.partial(_read_as, merged[key], dtype)
        tensors[key] = LazyTensor(info.torch_shape, dtype, read)
    return tensors, merged


def _read_file(header: Header, key: str) -> Tensor:
    # Mapped anew each time, so that the pages read do not add up.
    return open_tensors(header)[key]


def _read_merged(
    loras: Loras, key: str, read: Callable[[], Tensor], device: str | torch.device
) -> Tensor:
    return loras.merge(key, read().to(device)).cpu()


def _read_as(read: Callable[[], Tensor], dtype: torch.dtype) -> Tensor:
    return read().to(dtype)


def _refuse_quantized(header: Header) -> None:
    found = identify(header)
    if found.layers or found.unsupported or found.unconsumed or found.unscaled:
        raise CheckpointError(
            f"{header.source}: is quantized already; expected dense weights; load it "
            "with the Load Diffusion Model node, which hijack extends"
        )


def _refuse_bypass(patcher: Any) -> None:
    if BYPASS in patcher.injections:  # its hooks hold the layers of this model
        raise HijackError(
            f"{type(patcher.model).__name__}: a LoRA in bypass mode cannot be merged; "
            "load it with the Load LoRA node, or in bypass mode after Quantize Model"
        )


# -- what is built ---------------------------------------------------------------------


def _rebuild(patcher: Any, state_dict: dict[str, Tensor]) -> Any:
    """A model like a patcher's, with the tensors of a state dict."""
    model, device = patcher.model, patcher.offload_device
    config = object.__new__(type(model.model_config))  # it cannot be copied
    vars(config).update(vars(model.model_config))
    for name in SHADOWED:  # by functions that know the other model's config
        vars(config).pop(name, None)
    config.unet_config = dict(config.unet_config)
    dtype = config.unet_config.get("dtype")
    if dtype is not None and dtype.itemsize == 1:
        dtype = config.unet_config["dtype"] = config.manual_cast_dtype or torch.bfloat16
    config.custom_operations = None
    base = core_operations(config)
    compute = config.manual_cast_dtype or dtype or torch.float32
    config.custom_operations = make_operations(base, compute)
    kind = model.model_type  # and not the model, which would stay in memory
    config.model_type = lambda *_, **__: kind
    prefix = "model.diffusion_model."
    given = {f"{prefix}{name}": tensor for name, tensor in state_dict.items()}
    new = config.get_model(given, prefix, device=device)
    network = getattr(new, NETWORK)
    missing, unexpected = network.load_state_dict(state_dict, strict=False)
    lost = [name for name in missing if name in state_dict] + list(unexpected)
    if lost:
        raise HijackError(
            f"{type(model).__name__}: cannot be built anew; {len(lost)} tensors have "
            f"no place, such as {lost[0]}; quantize the file instead"
        )
    for name, child in model.named_children():
        if name != NETWORK:  # as it is without what another patcher has put there
            own = patcher.object_patches_backup.get(name, child)
            getattr(new, name).load_state_dict(own.state_dict())
    _settle(network)
    return new


def _settle(network: nn.Module) -> None:
    """Read what was put into modules unread: they took it without looking."""
    for module in network.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(parameter, LazyTensor):
                dense = nn.Parameter(parameter.read().clone(), requires_grad=False)
                setattr(module, name, dense)
        for name, buffer in module.named_buffers(recurse=False):
            if isinstance(buffer, LazyTensor):
                setattr(module, name, buffer.read().clone())


def _patcher_class(disable_dynamic: bool) -> Any:
    module = sys.modules["comfy.model_patcher"]
    if disable_dynamic:
        return module.ModelPatcher
    return getattr(module, "CoreModelPatcher", module.ModelPatcher)


def _hand_on(clone: Any, result: Any) -> None:
    """Give a ModelPatcher everything another one carries but weights and patches."""
    for name in _INTENTS:
        if hasattr(clone, name):
            setattr(result, name, getattr(clone, name))
    for name in list(result.object_patches):
        if name.split(".")[0] == NETWORK:  # belongs to the other model's layers
            del result.object_patches[name]


def check_interrupted() -> None:
    """Raise what ComfyUI does when the user has pressed cancel."""
    sys.modules["comfy.model_management"].throw_exception_if_processing_interrupted()
