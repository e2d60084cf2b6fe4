"""What the host asks of a quantizer where a config names hijack's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hijack.errors import CheckpointError
from hijack.hosts.checkpoint import TravellingWeight
from hijack.hosts.config import HijackConfig
from hijack.registry import current_registry
from hijack.safetensors_io.header import Header
from hijack.scheme import Scheme
from hijack.selection import choose
from hijack.wrap import unwrap, wrap_layer


def create_class() -> type[Any]:
    """The class for the host's table, which derives from the host's own."""
    from diffusers.quantizers.base import DiffusersQuantizer

    return type("HijackQuantizer", (Quantizer, DiffusersQuantizer), {})


class Quantizer:
    """Quantizes dense files layer by layer; of quantized ones it only says so."""

    quantization_config: HijackConfig
    use_keep_in_fp32_modules = True  # what stays dense is as in a dense model
    is_serializable = True
    is_trainable = True
    is_compileable = True

    def __init__(self, quantization_config: HijackConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)  # type: ignore[call-arg]
        self.layers: Mapping[str, Mapping[str, Any]] = {}

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a scheme or options that nobody knows, before anything is read."""
        scheme = self._scheme
        if scheme is not None:
            scheme.check_options(self.quantization_config.options)

    @property
    def _scheme(self) -> Scheme | None:
        name = self.quantization_config.scheme
        return None if name is None else current_registry().get(name)

    def preprocess_model(self, model: nn.Module, **kwargs: Any) -> None:
        """Choose the layers to quantize, in a model without weights.

        The host's own would have the model refuse casts, which are right.
        """
        self._process_model_before_weight_loading(model)

    def _process_model_before_weight_loading(
        self, model: nn.Module, **kwargs: Any
    ) -> None:
        config, scheme = self.quantization_config, self._scheme
        if scheme is None:
            return
        choice = choose(
            Header.from_state_dict(model.state_dict()),
            scheme.targets,
            config.include,
            config.exclude,
            config.rules,
            lambda shape, own: scheme.declines(shape, **{**config.options, **own}),
        )
        self.layers = choice.layers

    def _process_model_after_weight_loading(
        self, model: nn.Module, **kwargs: Any
    ) -> None:
        """Do nothing: layers became quantized as they arrived."""

    def check_if_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> bool:
        """Whether a weight is to be quantized.

        Raises:
            CheckpointError: if it is already.
        """
        layer, _, attribute = param_name.rpartition(".")
        if attribute != "weight" or layer not in self.layers:
            return False
        if isinstance(param_value, TravellingWeight):
            raise CheckpointError(
                f"{layer}: got a layer quantized with {param_value.scheme.name}, "
                f"expected a dense one to quantize with {self.quantization_config}; "
                "leave out the quantization_config"
            )
        return True

    def create_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        target_device: Any,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """Quantize a layer, on the device it is for."""
        layer = param_name.rpartition(".")[0]
        module, config = model.get_submodule(layer), self.quantization_config
        dense = param_value.to(target_device)
        module.weight = nn.Parameter(dense)
        options = {**config.options, **self.layers[layer]}
        wrap_layer(module, layer, config.scheme or "", **options)

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], **kwargs: Any
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What a file holds, and its metadata."""
        return state_dict, self.quantization_config.metadata

    def dequantize(self, model: Any) -> Any:
        """Make the model dense; nothing of hijack is left in it."""
        unwrap(model)
        model.__dict__.pop("hf_quantizer", None)
        return model
