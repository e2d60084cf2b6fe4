"""What the host asks of a quantizer where a config names hijack's."""

from __future__ import annotations

from typing import Any

from diffusers.quantizers.base import DiffusersQuantizer
from torch import Tensor, nn

from hijack.hosts.quantizer import Quantizer


class HijackQuantizer(Quantizer, DiffusersQuantizer):  # type: ignore[misc]
    """What diffusers asks of a quantizer, answered for hijack."""

    use_keep_in_fp32_modules = True  # what stays dense is as in a dense model
    is_serializable = True

    def preprocess_model(self, model: nn.Module, **kwargs: Any) -> None:
        """Choose the layers to quantize.

        The host's own would have the model refuse casts, which are right.
        """
        self._process_model_before_weight_loading(model)

    def check_if_quantized_param(
        self,
        model: nn.Module,
        param_value: Tensor,
        param_name: str,
        *args: Any,
        **kwargs: Any,
    ) -> bool:
        """Whether a weight is to be quantized."""
        return self.is_chosen(param_name)

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
        self.quantize(model, layer, param_value.to(target_device))

    def get_state_dict_and_metadata(
        self, state_dict: dict[str, Tensor], **kwargs: Any
    ) -> tuple[dict[str, Tensor], dict[str, str]]:
        """What a file holds, and its metadata."""
        return state_dict, self.quantization_config.metadata
