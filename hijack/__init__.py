"""Give any torch module a weight format its host never heard of."""

from hijack.checkpoint.compare import Comparison, compare_files
from hijack.checkpoint.convert import ConvertReport, convert_file
from hijack.checkpoint.quantize import QuantizeReport, quantize_file
from hijack.errors import HijackError
from hijack.formats.claim import Certainty, Claim
from hijack.formats.detection import identify
from hijack.formats.dialect import Dialect
from hijack.formats.identification import Identification
from hijack.hooks import hookimpl
from hijack.hosts import HostStatus, patch, status, unpatch
from hijack.loading import LoadReport, load
from hijack.registry import (
    create_registry,
    default_registry,
    register,
    schemes,
    unregister,
)
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
    "QuantizeReport",
    "Scheme",
    "TensorInfo",
    "WrapReport",
    "building",
    "compare_files",
    "convert_file",
    "create_registry",
    "default_registry",
    "hookimpl",
    "identify",
    "load",
    "patch",
    "quantize_file",
    "register",
    "save",
    "schemes",
    "status",
    "unpatch",
    "unregister",
    "unwrap",
    "wrap_model",
    "wrap_module",
]
