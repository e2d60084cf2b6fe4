"""Give any torch module a weight format its host never heard of."""

from hijack.checkpoint.dialect import Certainty, Claim, Dialect
from hijack.checkpoint.header import Header, TensorInfo
from hijack.errors import HijackError
from hijack.hooks import hookimpl
from hijack.registry import (
    create_registry,
    default_registry,
    register,
    schemes,
    unregister,
)
from hijack.scheme import Scheme
from hijack.wrap import WrapReport, building, unwrap, wrap_model, wrap_module

__all__ = [
    "Certainty",
    "Claim",
    "Dialect",
    "Header",
    "HijackError",
    "Scheme",
    "TensorInfo",
    "WrapReport",
    "building",
    "create_registry",
    "default_registry",
    "hookimpl",
    "register",
    "schemes",
    "unregister",
    "unwrap",
    "wrap_model",
    "wrap_module",
]
