"""The quantizer that transformers finds under ``quant_method: hijack``."""

from __future__ import annotations

import copy
import sys
from typing import Any

from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer

from hijack.errors import HijackError
from hijack.hosts.checkpoint import TravellingWeight, adopt
from hijack.hosts.config import HijackConfig
from hijack.hosts.libraries import is_quantized, remember
from hijack.hosts.quantizer import Quantizer
from hijack.hosts.saving import file_contents
from hijack.modules import Wrapped, quantized_weight, restore
from hijack.scheme import Scheme


class HijackQuantizer(Quantizer, HfQuantizer):  # type: ignore[misc]
    """What transformers asks of a quantizer, answered for hijack.

    Attributes:
        refused: why the host's own quantizer for the file does not work here, if that
            is why this one is asked.
        error: why a layer could not be quantized; the host reports such errors of all
            layers and raises one of its own.
    """

    def __init__(self, quantization_config: HijackConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.refused: Exception | None = None
        self.error: HijackError | None = None
        self._finished = False

    @property
    def scheme(self) -> Scheme | None:
        """The scheme to quantize with; that of a config.json says what was done."""
        return None if self.pre_quantized else super().scheme

    # -- loading -----------------------------------------------------------------------

    def param_needs_quantization(
        self, model: nn.Module, param_name: str, **kwargs: Any
    ) -> bool:
        """Whether a weight is quantized when it arrives, as transformers 5 can do."""
        arrives = hasattr(HfQuantizer, "get_quantize_ops")
        return arrives and self.is_chosen(param_name)

    def get_quantize_ops(self) -> _Quantize:
        """What quantizes a weight when it arrives."""
        return _Quantize(self)

    def quantize(
        self, model: nn.Module, layer: str, weight: Tensor | None = None
    ) -> None:
        """Quantize a layer, and keep the error for the host if it cannot be."""
        try:
            super().quantize(model, layer, weight)
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
            if self.refused is not None:
                raise self.refused  # hijack has nothing to do with it
            self.refuse_dense()
        self._finished = True
        self.attach(model)

    def attach(self, model: Any) -> None:
        """Have the host know that a model is quantized."""
        config = copy.copy(self.quantization_config)
        config.assume = []  # what is saved says itself what it is
        model.hf_quantizer, model.is_quantized = self, True
        model.quantization_method = config.quant_method
        model.config.quantization_config = config
        remember("transformers", model)

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        self.attach(model)
        return model

    def dequantize(self, model: Any, dtype: Any = None) -> Any:
        """Make a model dense again; before transformers 5 the host's own would fail."""
        self._dequantize(model)
        self.remove_quantization_config(model)
        return model

    # -- what it can do ----------------------------------------------------------------

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        """Whether a model can be saved: as safetensors."""
        return safe_serialization is not False

    def get_state_dict_and_metadata(
        self, model: Any, safe_serialization: bool = True
    ) -> tuple[dict[str, Tensor] | None, dict[str, str]]:
        """The tensors and the metadata that a file is to have."""
        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # adapters alone are saved
        return file_contents(model, _original_names)


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
            self.quantizer.quantize(model, layer, weight)
            model.get_submodule(layer).weight._is_hf_initialized = True
            kwargs["missing_keys"].discard(name)
            del input_dict[name]
        return input_dict


def _original_names(model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors as the model's first files had them, where the host can tell.

    Of layers that share a quantized weight only the first is there: the host ties the
    others to it when it loads the file.
    """
    seen: set[int] = set()
    for key, tensor in list(tensors.items()):
        if isinstance(tensor, TravellingWeight) and id(tensor) in seen:
            del tensors[key]
        seen.add(id(tensor))
    host = sys.modules.get("transformers.core_model_loading")
    if host is None:  # before transformers 5
        return tensors
    reverted: dict[str, Tensor] = host.revert_weight_conversion(model, tensors)
    return reverted
