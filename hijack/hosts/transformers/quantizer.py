"""The quantizer that transformers finds under ``quant_method: hijack``."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

from hijack.errors import CheckpointError, HijackError, ShapeError
from hijack.hosts.checkpoint import adopt
from hijack.hosts.config import HijackConfig
from hijack.hosts.transformers.state import spelled_state_dict
from hijack.modules import Wrapped, quantized_weight, restore
from hijack.quantized import QuantizedTensor
from hijack.registry import current_registry
from hijack.safetensors_io.header import Header
from hijack.scheme import Scheme
from hijack.selection import choose
from hijack.wrap import unwrap, wrap_layer

#: Models with quantized weights that are alive.
LIVE: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class HijackQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers asks of a quantizer, answered for hijack.

    Attributes:
        refused: why the host's own quantizer for the file does not work here, if that
            is why this one is asked.
        error: why a layer could not be quantized; the host reports such errors of all
            layers and raises one of its own.
        layers: those to quantize, with the options of each.
    """

    requires_calibration = False
    quantization_config: HijackConfig

    def __init__(self, quantization_config: HijackConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.refused: Exception | None = None
        self.error: HijackError | None = None
        self.layers: Mapping[str, Mapping[str, Any]] = {}
        self._finished = False

    @property
    def scheme(self) -> Scheme | None:
        """The scheme to quantize with; that of a config.json says what was done."""
        name = None if self.pre_quantized else self.quantization_config.scheme
        return None if name is None else current_registry().get(name)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a scheme or an option that does not exist before anything is read."""
        if self.scheme is not None:
            self.scheme.check_options(self.quantization_config.options)

    # -- loading -----------------------------------------------------------------------

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Choose the layers to quantize, in a model without weights."""
        config, scheme = self.quantization_config, self.scheme
        if scheme is None:
            return model
        choice = choose(
            Header.from_state_dict(model.state_dict()),
            scheme.targets,
            config.include,
            config.exclude,
            config.rules,
            lambda shape, own: scheme.declines(shape, **{**config.options, **own}),
        )
        modules = dict(model.named_modules())
        self.layers = {
            layer: {**config.options, **options}
            for layer, options in choice.layers.items()
            if isinstance(modules[layer], scheme.targets)  # routers may not be
        }
        return model

    def param_needs_quantization(
        self, model: nn.Module, param_name: str, **kwargs: Any
    ) -> bool:
        """Whether a weight is quantized when it arrives, as transformers 5 can do."""
        layer, _, attribute = param_name.rpartition(".")
        arrives = hasattr(HfQuantizer, "get_quantize_ops")
        return arrives and attribute == "weight" and layer in self.layers

    def get_quantize_ops(self) -> _Quantize:
        """What quantizes a weight when it arrives."""
        return _Quantize(self)

    def quantize(self, model: nn.Module, layer: str) -> None:
        """Quantize a layer that has its weight."""
        module = model.get_submodule(layer)
        try:
            wrap_layer(module, layer, self.scheme or "", **self.layers[layer])
        except HijackError as error:
            self.error = error
            raise

    def finish(self, model: Any) -> None:
        """Make a model quantized that has its weights.

        Args:
            model: with what was read of its files; its weights are tied.

        Raises:
            CheckpointError: if nothing in it is quantized, or is to be.
            HijackError: what a scheme or a plugin refuses.
        """
        adopt(model)
        if self._finished:  # an adapter was loaded into it
            return
        for layer in self.layers:
            if quantized_weight(model.get_submodule(layer)) is None:
                self.quantize(model, layer)
        if self.layers:
            model.tie_weights()  # layers go by the one whose weight they share
            adopt(model)
            for module in model.modules():
                if isinstance(module, Wrapped) and quantized_weight(module) is None:
                    restore(module, module.weight)
        elif not is_quantized(model):
            raise CheckpointError(
                "quantization_config: got a checkpoint without any quantized layer, "
                "expected one that hijack reads, or a scheme to quantize it with, "
                "such as HijackConfig('blockwise_fp8')"
            ) from self.refused
        self._finished = True
        self.attach(model)

    def attach(self, model: Any) -> None:
        """Have the host know that a model is quantized."""
        config = copy.copy(self.quantization_config)
        config.assume = []  # what is saved says itself what it is
        model.hf_quantizer, model.is_quantized = self, True
        model.quantization_method = config.quant_method
        model.config.quantization_config = config
        LIVE.add(model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.attach(model)
        return model

    def dequantize(self, model: nn.Module, dtype: Any = None) -> nn.Module:
        """Make a model dense again, in the dtype it computes in."""
        unwrap(model)
        self.remove_quantization_config(model)
        return model

    # -- what it can do ----------------------------------------------------------------

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """Whether a model can be saved: as safetensors."""
        return safe_serialization is not False

    @property
    def is_trainable(self) -> bool:
        """Whether adapters beside the quantized layers can be trained."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Whether the quantized layers can be compiled."""
        return True

    def get_state_dict_and_metadata(
        self, model: Any, safe_serialization: bool = True
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """The tensors and the metadata that a file is to have."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # adapters alone are saved
        return spelled_state_dict(model)


class _Quantize:
    """What the host calls with the weights it has renamed, merged and split."""

    def __init__(self, quantizer: HijackQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], *, model: Any, **kwargs: Any
    ) -> dict[str, Any]:
        """Quantize those that are chosen.

        Args:
            input_dict: full name to a tensor, or to a list with one.
            model: whose layers they are for.
            **kwargs: what the host says besides, such as ``missing_keys``.

        Returns:
            The others.
        """
        for name, value in list(input_dict.items()):
            if not self.quantizer.param_needs_quantization(model, name):
                continue
            weight = value[0] if isinstance(value, list) else value
            layer = name.rpartition(".")[0]
            module = model.get_submodule(layer)
            if weight.shape != module.weight.shape:
                raise ShapeError(
                    f"{name}: got shape {tuple(weight.shape)}, expected "
                    f"{tuple(module.weight.shape)}; is this the right model?"
                )
            module.weight = nn.Parameter(weight, requires_grad=False)
            self.quantizer.quantize(model, layer)
            module.weight._is_hf_initialized = True
            kwargs["missing_keys"].discard(name)
            del input_dict[name]
        return input_dict


def is_quantized(model: nn.Module) -> bool:
    """Whether any weight of a model is quantized by hijack."""
    return any(isinstance(weight, QuantizedTensor) for weight in model.parameters())
