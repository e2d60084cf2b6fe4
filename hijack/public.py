"""The names that `hijack` offers, all of which need torch."""

from hijack.checkpoint.compare import Comparison, compare_files
from hijack.checkpoint.convert import ConvertReport, convert_file
from hijack.checkpoint.quantize import QuantizeReport, quantize_file
from hijack.claim import Certainty, Claim
from hijack.errors import HijackError
from hijack.formats.dialect import Dialect
from hijack.formats.identification import Identification, identify
from hijack.hooks import hookimpl
from hijack.hosts import HostStatus, patch, status, unpatch
from hijack.loading import LoadReport, load
from hijack.options import Option
from hijack.quantized import QuantizedTensor
from hijack.registry import (
    Registry,
    create_registry,
    current_registry,
    default_registry,
    register,
    schemes,
    unregister,
    use_registry,
)
from hijack.requantizing import requantizing
from hijack.safetensors_io.header import Header, TensorInfo
from hijack.saving import save
from hijack.scheme import Scheme
from hijack.wrap import WrapReport, building, unwrap, wrap_model, wrap_module

__all__ = [
    "Certainty",
    "Claim",
    "Comparison",
    "ConvertReport",
    "Dialect",
    "Header",
    "HijackError",
    "HostStatus",
    "Identification",
    "LoadReport",
    "Option",
    "QuantizeReport",
    "QuantizedTensor",
    "Registry",
    "Scheme",
    "TensorInfo",
    "WrapReport",
    "building",
    "compare_files",
    "convert_file",
    "create_registry",
    "current_registry",
    "default_registry",
    "hookimpl",
    "identify",
    "load",
    "patch",
    "quantize_file",
    "register",
    "requantizing",
    "save",
    "schemes",
    "status",
    "unpatch",
    "unregister",
    "unwrap",
    "use_registry",
    "wrap_model",
    "wrap_module",
]
