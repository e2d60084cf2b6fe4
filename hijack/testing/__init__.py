"""The conformance kit: proof that a scheme works wherever hijack does.

`HostConformance` proves the same of the adapter of a host.

The author of a scheme says what is to be tested, the kit supplies every assertion::

    class TestInt8Rowwise(hijack.testing.SchemeConformance):
        min_sqnr_db = 30.0

        @pytest.fixture
        def scheme(self):
            return Int8Rowwise()

Only the test on random weights needs hypothesis; it is skipped where that is missing.
"""

from __future__ import annotations

from hijack.metrics import sqnr_db
from hijack.testing.checks import registered
from hijack.testing.compiled import CompiledConformance
from hijack.testing.files import FileConformance
from hijack.testing.hosts import HostConformance
from hijack.testing.subjects import (
    realistic_weight,
    weight_shapes,
    weights,
)
from hijack.testing.surroundings import SurroundingsConformance
from hijack.testing.tensors import TensorConformance

__all__ = [
    "HostConformance",
    "SchemeConformance",
    "realistic_weight",
    "registered",
    "sqnr_db",
    "weight_shapes",
    "weights",
]


class SchemeConformance(
    TensorConformance,
    SurroundingsConformance,
    CompiledConformance,
    FileConformance,
):
    """Every test of a scheme.

    Subclass it under a name that starts with ``Test``, give ``min_sqnr_db`` and a
    pytest fixture ``scheme``. `hijack.testing.base.Conformance` lists the attributes
    that can be set too.
    """
