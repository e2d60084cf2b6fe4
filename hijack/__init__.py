"""Give any torch module a weight format its host never heard of."""

from hijack.checkpoint.dialect import Certainty, Claim, Dialect
from hijack.checkpoint.header import Header, TensorInfo
from hijack.errors import HijackError
from hijack.hooks import hookimpl
from hijack.registry import create_registry, default_registry
from hijack.scheme import Scheme

__all__ = [
    "Certainty",
    "Claim",
    "Dialect",
    "Header",
    "HijackError",
    "Scheme",
    "TensorInfo",
    "create_registry",
    "default_registry",
    "hookimpl",
]
