"""What libraries ask of a quantizer where a config names hijack's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from hijack.checkpoint.notes import declined_notes
from hijack.errors import CheckpointError, ShapeError
from hijack.hosts.config import HijackConfig
from hijack.quantized import QuantizedTensor
from hijack.registry import current_registry
from hijack.safetensors_io.header import Header
from hijack.scheme import Scheme
from hijack.selection import choose
from hijack.text import logger
from hijack.wrap import unwrap, wrap_layer

log = logger(__name__)


class Quantizer:
    """Quantizes a dense model layer by layer; of a quantized one it only says so.

    A library's own base class is to come second among the bases.

    Attributes:
        layers: those to quantize, with the options of each.
    """

    quantization_config: HijackConfig
    requires_calibration = False
    is_trainable = True  # adapters beside the quantized layers
    is_compileable = True

    def __init__(self, quantization_config: HijackConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)  # type: ignore[call-arg]
        self.layers: Mapping[str, Mapping[str, Any]] = {}

    @property
    def scheme(self) -> Scheme | None:
        """The scheme to quantize with, if it is to quantize anything."""
        name = self.quantization_config.scheme
        return None if name is None else current_registry().get(name)

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a scheme or options that nobody knows, before anything is read."""
        if self.scheme is not None:
            self.scheme.check_options(self.quantization_config.options)

    def refuse_dense(self) -> None:
        """Refuse a checkpoint without quantized layers, if nothing is to quantize it.

        Raises:
            CheckpointError: if the config names no scheme.
        """
        if self.scheme is None:
            raise CheckpointError(
                "quantization_config: got a checkpoint without any quantized layer, "
                "expected one that hijack reads, or a scheme to quantize it with, "
                "such as HijackConfig('blockwise_fp8')"
            )

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        """Choose the layers to quantize, in a model that may be on the meta device.

        Raises:
            CheckpointError: if a pattern matches no layer, or none is left to quantize.
        """
        config, scheme = self.quantization_config, self.scheme
        if scheme is None:
            return model
        modules = dict(model.named_modules())
        choice = choose(
            Header.from_state_dict(model.state_dict()),
            scheme.targets,
            config.include,
            config.exclude,
            config.rules,
            lambda shape, own: scheme.declines(shape, **{**config.options, **own}),
        )
        for note in declined_notes(choice):
            log.warning("hijack: %s", note)
        self.layers = {
            layer: {**config.options, **options}
            for layer, options in choice.layers.items()
            if isinstance(modules[layer], scheme.targets)  # routers may not be
        }
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        return model

    def is_chosen(self, name: str) -> bool:
        """Whether a parameter is to be quantized."""
        layer, _, attribute = name.rpartition(".")
        return attribute == "weight" and layer in self.layers

    def quantize(
        self, model: nn.Module, layer: str, weight: Tensor | None = None
    ) -> None:
        """Quantize a layer.

        Args:
            model: that has it.
            layer: one of `layers`.
            weight: the dense one that it gets; None if it has it.

        Raises:
            CheckpointError: if the weight is quantized already.
            ShapeError: if it does not fit.
        """
        module: Any = model.get_submodule(layer)
        if isinstance(weight, QuantizedTensor):
            raise CheckpointError(
                f"{layer}: got a layer quantized with {weight.scheme.name}, expected a "
                f"dense one to quantize with {self.quantization_config}; leave out the "
                "quantization_config"
            )
        if weight is not None:
            if weight.shape != module.weight.shape:
                raise ShapeError(
                    f"{layer}.weight: got shape {tuple(weight.shape)}, expected "
                    f"{tuple(module.weight.shape)}; is this the right model?"
                )
            module.weight = nn.Parameter(weight, requires_grad=False)
        wrap_layer(module, layer, self.scheme or "", **self.layers[layer])

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        """Make a model dense again, in the dtype it computes in."""
        return unwrap(model)
