"""What transformers finds under ``quant_method: hijack``: a quantizer, its config."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from hijack.errors import CheckpointError
from hijack.hosts.checkpoint import adopt
from hijack.hosts.transformers import LIVE, METHOD
from hijack.modules import Wrapped, quantized_weight, restore
from hijack.quantized import QuantizedTensor
from hijack.registry import current_registry
from hijack.safetensors_io.header import Header
from hijack.selection import Patterns, choose
from hijack.wrap import unwrap, wrap_model


class HijackConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """How transformers is to load a model with hijack.

    Args:
        scheme: name of the scheme to quantize a dense model with; None for files that
            are quantized already, in any format that hijack reads.
        include: patterns on the names of layers to quantize, as for
            `hijack.quantize_file`; None is what is usual for the model.
        exclude: patterns on the names of layers to leave dense, likewise.
        rules: as for `hijack.quantize_file`.
        assume: how to read what a file does not tell, as for `hijack.identify`.
        options: of the scheme; they may also be given by name, as in ``block_size=64``.
        **more: options of the scheme.
    """

    def __init__(
        self,
        scheme: str | None = None,
        *,
        include: Patterns = None,
        exclude: Patterns = None,
        rules: str | Iterable[str] = (),
        assume: Sequence[str] = (),
        options: Mapping[str, Any] | None = None,
        quant_method: str = METHOD,
        **more: Any,
    ) -> None:
        self.quant_method = METHOD
        self.scheme = scheme
        self.include, self.exclude, self.rules = include, exclude, rules
        self.assume = assume
        self.options = {**(options or {}), **more}

    def to_dict(self) -> dict[str, Any]:
        """What ``config.json`` says of it: what was asked for."""
        fields = {name: value for name, value in vars(self).items() if value}
        return {name: _plain(value) for name, value in fields.items()}

    def described(self) -> HijackConfig:
        """The config of a model that is loaded, for whoever reads what it saves."""
        fields = {name: value for name, value in vars(self).items() if name != "assume"}
        return HijackConfig(**fields)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, Iterable) and not isinstance(value, str):
        return [_plain(part) for part in value]
    return value if isinstance(value, str | int | float | None) else str(value)


class HijackQuantizer(HfQuantizer):  # type: ignore[misc]
    """What transformers asks of a quantizer, answered for hijack.

    Attributes:
        refused: why the host's own quantizer for the file does not work here, if that
            is why this one is asked.
    """

    requires_calibration = False
    quantization_config: HijackConfig

    def __init__(self, quantization_config: HijackConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.refused: Exception | None = None
        self._finished = False

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse a scheme or an option that does not exist before anything is read."""
        config = self.quantization_config
        if config.scheme is not None:
            current_registry().get(config.scheme).check_options(config.options)

    # -- loading -----------------------------------------------------------------------

    def finish(self, model: nn.Module) -> None:
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
        quantized = is_quantized(model)
        scheme = None if self.pre_quantized else self.quantization_config.scheme
        if scheme is not None and quantized:
            raise CheckpointError(
                f"quantization_config: got scheme={scheme!r} for a checkpoint that is "
                "quantized already, expected a dense one; leave out the scheme"
            )
        if scheme is not None:
            self._quantize(model)
        elif not quantized:
            raise CheckpointError(
                "quantization_config: got a checkpoint without any quantized layer, "
                "expected one that hijack reads, or a scheme to quantize it with, "
                "such as HijackConfig('blockwise_fp8')"
            ) from self.refused
        self._finished = True
        self.attach(model)

    def _quantize(self, model: Any) -> None:
        config = self.quantization_config
        scheme = current_registry().get(config.scheme)  # type: ignore[arg-type]
        choice = choose(
            Header.from_state_dict(model.state_dict()),
            scheme.targets,
            config.include,
            config.exclude,
            config.rules,
            lambda shape, options: scheme.declines(
                shape, **{**config.options, **options}
            ),
        )
        modules = dict(model.named_modules())
        for layer, options in choice.layers.items():
            if isinstance(modules[layer], scheme.targets):  # routers may not be
                # one after another, so that at most one is there dense and quantized
                exactly = glob.escape(layer)
                wrap_model(model, scheme, exactly, **{**config.options, **options})
        model.tie_weights()  # layers go by the one whose weight they share
        adopt(model)
        for module in model.modules():
            if isinstance(module, Wrapped) and quantized_weight(module) is None:
                restore(module, module.weight)

    def attach(self, model: Any) -> None:
        """Have the host know that a model is quantized."""
        model.hf_quantizer = self
        model.is_quantized = True
        model.quantization_method = METHOD
        model.config.quantization_config = self.quantization_config.described()
        LIVE.add(model)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        return model

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
        from hijack.hosts.transformers.saving import spelled_state_dict

        if getattr(model, "_hf_peft_config_loaded", False):
            return None, {}  # adapters alone are saved
        return spelled_state_dict(model)


def is_quantized(model: nn.Module) -> bool:
    """Whether any weight of a model is quantized by hijack."""
    return any(isinstance(weight, QuantizedTensor) for weight in model.parameters())
