"""Quantizing inside ComfyUI: a model that is loaded, or one while it is loaded."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from hijack.errors import CheckpointError, HijackError
from hijack.formats.detection import identify
from hijack.hosts.comfyui import selection
from hijack.hosts.comfyui.coded import PLAIN, Coded
from hijack.hosts.comfyui.lazy_tensor import Lazy, Recipe
from hijack.hosts.comfyui.loaders import SHADOWED, core_operations
from hijack.hosts.comfyui.operations import make_operations
from hijack.safetensors_io.header import Header, join
from hijack.safetensors_io.reader import open_tensors, read_header

#: Where ComfyUI keeps the network in its models.
NETWORK = "diffusion_model"
#: Under what name it injects LoRAs in bypass mode.
BYPASS = "bypass_lora"
#: Parameters of ComfyUI's own quantized layers that a decoded weight has no use for.
NATIVE_SCALES = ("scale_weight", "scale_input", "input_scale")
#: Called with the number of layers done and of all layers, after each.
Progress = Callable[[int, int], None]

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


class Quantizer:
    """Makes the state dict a model is built from, and counts what is done of it."""

    def __init__(
        self, recipe: Recipe, chosen: selection.Choice, progress: Progress | None
    ) -> None:
        self.recipe, self.chosen, self.progress = recipe, chosen, progress
        self.total = self.done = 0

    def lazy(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        read: Callable[[], Tensor],
    ) -> Lazy:
        """What stands for one tensor.

        Args:
            name: its key, without the model's prefix.
            shape: dense shape.
            dtype: dense dtype.
            read: gives the dense tensor.
        """
        layer, _, kind = name.rpartition(".")
        if kind != "weight" or len(shape) != 2 or dtype not in PLAIN:
            return Lazy(shape, dtype, read)
        if not self.chosen(layer):
            return Lazy(shape, dtype, read)
        self.total += 1

        def code(weight: Tensor) -> Coded:
            _check_interrupted()
            coded = self.recipe.apply(weight, layer)
            self.done += 1
            if self.progress is not None:
                self.progress(self.done, self.total)
            return coded

        return Lazy(shape, dtype, read, code)

    def check(self, where: str) -> None:
        """Refuse to go on if nothing was chosen.

        Raises:
            HijackError: saying so.
        """
        if not self.total:
            raise HijackError(
                f"{where}: no layer is left to quantize; widen include or narrow "
                "exclude"
            )


def quantize_model(
    patcher: Any,
    recipe: Recipe,
    include: str = "",
    exclude: str = "",
    progress: Progress | None = None,
    disable_dynamic: bool = False,
) -> Any:
    """Quantize a loaded model, with whatever LoRAs are on it merged in first.

    Layers are dequantized, merged in float32 and quantized one at a time.

    Args:
        patcher: a ModelPatcher; left as it is.
        recipe: how.
        include: patterns on layer names, one a line; empty for the repeated blocks.
        exclude: patterns of layers to leave dense; empty for the architecture's own.
        progress: called after each layer.
        disable_dynamic: build a ModelPatcher without dynamic VRAM.

    Returns:
        A new ModelPatcher, as if loaded from a quantized file.

    Raises:
        HijackError: if no layer is chosen, one cannot be quantized, or a LoRA cannot
            be merged.
    """
    model = patcher.model
    _refuse_bypass(patcher)
    chosen = selection.choose(type(model.model_config).__name__, include, exclude)
    quantizer = Quantizer(recipe, chosen, progress)
    state_dict: dict[str, Tensor] = {}
    for name, tensor in _own_tensors(getattr(model, NETWORK)):
        read = _reader(patcher, f"{NETWORK}.{name}", tensor)
        dtype = _dense_dtype(tensor, model)
        state_dict[name] = quantizer.lazy(name, tuple(tensor.shape), dtype, read)
    quantizer.check(type(model).__name__)
    new = _rebuild(patcher, state_dict)
    result = _patcher_class(disable_dynamic)(
        new, load_device=patcher.load_device, offload_device=patcher.offload_device
    )
    _hand_on(patcher.clone(), result)
    if hasattr(result, "cached_patcher_init"):
        arguments = (weakref.ref(patcher), recipe, include, exclude)
        result.cached_patcher_init = (_quantize_again, arguments)
    return result


def _quantize_again(
    original: Callable[[], Any],
    recipe: Recipe,
    include: str,
    exclude: str,
    disable_dynamic: bool = False,
) -> Any:
    """Make the model once more, for ComfyUI's copies on other devices."""
    patcher = original()
    if patcher is None:
        raise HijackError(
            "Quantize Model: the original model is gone, and ComfyUI needs another "
            "copy; run the workflow again"
        )
    return quantize_model(
        patcher, recipe, include, exclude, disable_dynamic=disable_dynamic
    )


def load_quantized(
    path: str,
    recipe: Recipe,
    include: str = "",
    exclude: str = "",
    progress: Progress | None = None,
    model_options: Mapping[str, Any] | None = None,
    disable_dynamic: bool = False,
) -> Any:
    """Load a dense diffusion model from disk, quantizing each layer as it is read.

    Args:
        path: a safetensors file, or the index of a sharded one.
        recipe: how.
        include: patterns on layer names, one a line; empty for the repeated blocks.
        exclude: patterns of layers to leave dense; empty for the architecture's own.
        progress: called after each layer.
        model_options: of ComfyUI's loader.
        disable_dynamic: build a ModelPatcher without dynamic VRAM.

    Returns:
        A ModelPatcher.

    Raises:
        CheckpointError: if the file is quantized already, or ComfyUI does not know its
            architecture.
        HijackError: if no layer is chosen, or one cannot be quantized.
    """
    sd = sys.modules["comfy.sd"]
    header = read_header(path)
    _refuse_quantized(header)
    detection = sys.modules["comfy.model_detection"]
    plain = {key: _file_tensor(header, key) for key in header.tensors}
    prefix = detection.unet_prefix_from_state_dict(plain)
    if not any(key.startswith(prefix) for key in plain):
        prefix = ""
    config = detection.model_config_from_unet(dict(plain), prefix)
    chosen = selection.choose(type(config).__name__, include, exclude)
    quantizer = Quantizer(recipe, chosen, progress)
    state_dict = {
        key: quantizer.lazy(key.removeprefix(prefix), tuple(t.shape), t.dtype, t.read)
        for key, t in plain.items()
    }
    quantizer.check(Path(path).name)
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
        arguments = (path, recipe, include, exclude, None, model_options)
        result.cached_patcher_init = (load_quantized, arguments)
    return result


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
        ordinary = type(weight) in (Tensor, nn.Parameter) and weight.dtype in PLAIN
        if ordinary and not patches:
            return weight.detach().to("cpu", copy=True)  # type: ignore[no-any-return]
        _, _, convert = get_key_weight(patcher.model, key)
        dense = weight.detach().to("cpu", torch.float32, copy=True)
        if convert is not None:
            dense = convert(dense, inplace=True)
        if hasattr(dense, "dequantize") and type(dense) is not Tensor:
            dense = dense.dequantize()
        if isinstance(dense, Coded):
            dense = dense.dense(torch.float32)
        return calculate(patches, dense, key) if patches else dense  # type: ignore[no-any-return]

    return read


def _dense_dtype(tensor: Tensor, model: Any) -> torch.dtype:
    """The dtype of a tensor; of a coded one what the model computes in."""
    if tensor.dtype in PLAIN or not tensor.is_floating_point():
        return tensor.dtype
    found: torch.dtype | None = model.manual_cast_dtype
    return torch.bfloat16 if found is None else found


def _file_tensor(header: Header, key: str) -> Lazy:
    info = header.tensors[key]
    if info.torch_dtype is None:
        raise CheckpointError(
            f"{key}: dtype {info.dtype} is not one of torch's; expected a dense file"
        )
    # Mapped anew each time, so that the pages read do not add up.
    return Lazy(info.torch_shape, info.torch_dtype, lambda: open_tensors(header)[key])


def _refuse_quantized(header: Header) -> None:
    found = identify(header)
    if found.layers or found.foreign or found.orphans or found.unscaled:
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
            if isinstance(parameter, Lazy):
                dense = nn.Parameter(parameter.read().clone(), requires_grad=False)
                setattr(module, name, dense)
        for name, buffer in module.named_buffers(recurse=False):
            if isinstance(buffer, Lazy):
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


def _check_interrupted() -> None:
    sys.modules["comfy.model_management"].throw_exception_if_processing_interrupted()
