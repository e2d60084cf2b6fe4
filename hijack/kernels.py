"""Kernels: several ways to compute what a quantized layer computes, and which is taken.

A scheme may have a `KernelTable`. Of its kernels the first one takes a layer that is
for the device and for as many rows of input, and does not refuse the weight. One that
fails is not tried again on that device: a line in the log says so, and the next one
takes its place. ``HIJACK_FORWARD`` names kernels that are to be tried before others;
with ``HIJACK_FORWARD=plain`` none is taken, and layers decode and multiply.

Kernels that quantize the input too are for layers that ask for it.
``HIJACK_QUANTIZED_INPUTS`` asks for all layers that allow it: ``1``, or a comma list of
schemes; with ``0`` no layer is asked.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import threading
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from hijack.errors import printable
from hijack.registry import strict
from hijack.text import did_you_mean, logger

if TYPE_CHECKING:
    from hijack.quantized import QuantizedTensor, WeightView
    from hijack.scheme import Scheme

log = logger(__name__)

Function = TypeVar("Function", bound=Callable[..., Any])


def constant(function: Function) -> Function:
    """Let compilers take what a function returns for a constant of the graph.

    As ``torch.compiler.assume_constant_result``, which imports the compiler.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


#: Environment variable with a comma list of kernels to try before others.
VARIABLE = "HIJACK_FORWARD"
#: Environment variable that says for which schemes kernels quantize the input too.
INPUTS_VARIABLE = "HIJACK_QUANTIZED_INPUTS"
#: The forward without kernels.
PLAIN = "plain"


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One way to compute.

    Attributes:
        name: for ``HIJACK_FORWARD`` and reports.
        devices: types of the devices it runs on.
        refuses: called with a weight and the dtype of the input; says why the kernel
            cannot take them, or None. It is asked at each call, so it must be quick.
        linear: called with an input (M, K), a weight (N, K) and a bias (N,) or None,
            gives (M, N) of the input's dtype; None if the kernel only decodes.
        decode: called with a weight and a dense tensor (N, K) to write to; None if the
            kernel only multiplies.
        quantize: called with a dense matrix (N, K), a weight to write to and a number
            of scales to try, says whether all numbers are finite, or None if it cannot
            do this; None if the kernel does not quantize. The dtype that ``refuses``
            gets is that of the matrix.
        rows: most rows M of an input it is for; None for any number.
        opt_in: whether only layers that ask for it get it, because its results differ;
            compilers can look into it.
        on_request: whether it is taken only where ``HIJACK_FORWARD`` names it.
    """

    name: str
    devices: tuple[str, ...]
    refuses: Callable[[Any, torch.dtype], str | None]
    linear: Callable[[Tensor, Any, Tensor | None], Tensor] | None = None
    decode: Callable[[Any, Tensor], None] | None = None
    quantize: Callable[[Tensor, Any, int], bool | None] | None = None
    rows: int | None = None
    opt_in: bool = False
    on_request: bool = False

    def is_wanted(self, opt_in: bool, names: tuple[str, ...]) -> bool:
        """Whether a layer may get it.

        Args:
            opt_in: whether the layer asks for kernels whose results differ.
            names: of the kernels that are forced.
        """
        return self.name in names or (
            (opt_in or not self.opt_in) and not self.on_request
        )


@dataclasses.dataclass(frozen=True)
class Choice:
    """What computes a layer, for reports.

    Attributes:
        kernel: name of the kernel; ``plain`` for none.
        others: the kernels before it in the table, and why they were not taken.
    """

    kernel: str
    others: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def __str__(self) -> str:
        if not self.others:
            return self.kernel
        reasons = "; ".join(f"{name}: {why}" for name, why in self.others.items())
        return f"{self.kernel} (not {reasons})"


#: Every table alive, so that a name that none has can be told.
_tables: weakref.WeakSet[KernelTable] = weakref.WeakSet()


class KernelTable:
    """The kernels of a scheme, the preferred ones first.

    Args:
        *kernels: of different names on a device.
    """

    def __init__(self, *kernels: Kernel) -> None:
        self.kernels = kernels
        self._failures: dict[tuple[str, torch.device], str] = {}
        self._lock = threading.Lock()
        _tables.add(self)

    def linear(
        self, x: Tensor, weight: Any, bias: Tensor | None, *, opt_in: bool = False
    ) -> Tensor | None:
        """The product of a Linear, by the first kernel that takes it.

        Args:
            x: (M, K).
            weight: (N, K), as the kernels of the table know it.
            bias: (N,) of ``x``'s dtype, or None.
            opt_in: whether the layer wants kernels whose results differ.

        Returns:
            (M, N) of ``x``'s dtype; None if no kernel takes it.
        """
        dtype, device = x.dtype, x.device
        for kernel in self._wanted(device, opt_in):
            if kernel.linear is None:
                continue
            if self._why_not(kernel, weight, dtype, device, len(x)):
                continue
            try:
                return kernel.linear(x, weight, bias)
            except Exception as error:
                self._fail(kernel, device, error)
        return None

    def traced(self, x: Tensor, weight: Any, bias: Tensor | None) -> Tensor | None:
        """As `linear` for a layer that asks, where torch looks into what is computed.

        Only kernels with ``opt_in`` are taken. What they raise is the compiler's to
        report; no other kernel takes their place.
        """
        if PLAIN in forced():
            return None
        for kernel in self.kernels:
            if not kernel.opt_in or x.device.type not in kernel.devices:
                continue
            if kernel.linear is not None and kernel.refuses(weight, x.dtype) is None:
                return kernel.linear(x, weight, bias)
        return None

    def decode(self, weight: Any, out: Tensor) -> bool:
        """Write a dense weight by the first kernel that takes it.

        Args:
            weight: (N, K), as the kernels of the table know it.
            out: (N, K), to write to.

        Returns:
            Whether a kernel took it.
        """
        dtype, device = out.dtype, out.device
        for kernel in self._wanted(device, False):
            if kernel.decode is None or self._why_not(kernel, weight, dtype, device):
                continue
            try:
                kernel.decode(weight, out)
                return True
            except Exception as error:
                self._fail(kernel, device, error)
        return False

    def quantize(self, matrix: Tensor, weight: Any, candidates: int) -> bool | None:
        """Quantize a weight by the first kernel that takes it.

        Args:
            matrix: (N, K), dense.
            weight: (N, K), as the kernels of the table know it, to write to.
            candidates: scales to try.

        Returns:
            Whether all numbers are finite; None if no kernel takes it.
        """
        dtype, device = matrix.dtype, matrix.device
        for kernel in self._wanted(device, False):
            if kernel.quantize is None or self._why_not(kernel, weight, dtype, device):
                continue
            try:
                finite = kernel.quantize(matrix, weight, candidates)
                if finite is not None:
                    return finite
            except Exception as error:
                self._fail(kernel, device, error)
        return None

    def explain(
        self, weight: Any, dtype: torch.dtype, rows: int, *, opt_in: bool = False
    ) -> Choice:
        """What would compute a Linear now, and why nothing before it in the table.

        Args:
            weight: as for `linear`, where it is to be computed with.
            dtype: of the input.
            rows: of the input.
            opt_in: whether the layer wants kernels whose results differ.
        """
        others: dict[str, str] = {}
        for kernel in self._wanted(weight.device, opt_in):
            if kernel.linear is None:
                continue
            why = self._why_not(kernel, weight, dtype, weight.device, rows)
            if why is None:
                return Choice(kernel.name, others)
            others[kernel.name] = why
        return Choice(PLAIN, others)

    def failures(self) -> Mapping[str, str]:
        """Kernel and device to what went wrong there."""
        failures = self._failures.items()
        return {f"{name} on {device}": why for (name, device), why in failures}

    def _wanted(self, device: torch.device, opt_in: bool) -> Iterator[Kernel]:
        """The kernels that a layer on a device may get, those that are forced first."""
        names, kernels = forced(), self.kernels
        if names:
            _tell_of_misspelled(names)
            first = [k for name in names for k in kernels if k.name == name]
            rest = [] if PLAIN in names else [k for k in kernels if k not in first]
            kernels = (*first, *rest)
        for kernel in kernels:
            if device.type in kernel.devices and kernel.is_wanted(opt_in, names):
                yield kernel

    def _why_not(
        self,
        kernel: Kernel,
        weight: Any,
        dtype: torch.dtype,
        device: torch.device,
        rows: int = 0,
    ) -> str | None:
        """Why a kernel does not take a weight and inputs, or None if it does."""
        if kernel.rows is not None and rows > kernel.rows:
            return f"for at most {kernel.rows} rows"
        failure = self._failures.get((kernel.name, device))
        return failure or kernel.refuses(weight, dtype)

    def _fail(self, kernel: Kernel, device: torch.device, error: Exception) -> None:
        """Take a kernel no more on a device; raise what is not the kernel's fault."""
        if strict() or _is_out_of_memory(error):
            raise error
        what = printable(f"{type(error).__name__}: {error}".splitlines()[0])
        with self._lock:
            if (kernel.name, device) in self._failures:
                return
            self._failures[kernel.name, device] = f"failed with {what}"
        log.warning(
            "hijack: kernel %s failed on %s and is not used there any more; got %s; "
            "layers are computed by the next kernel",
            *(kernel.name, device, what),
        )


@constant
def forced() -> tuple[str, ...]:
    """The kernels that ``HIJACK_FORWARD`` names, the first first."""
    listed = os.environ.get(VARIABLE)
    if not listed:
        return ()
    return tuple(name for name in (n.strip() for n in listed.split(",")) if name)


@constant
def inputs_asked(scheme: str) -> bool | None:
    """Whether ``HIJACK_QUANTIZED_INPUTS`` asks layers of a scheme to quantize inputs.

    Args:
        scheme: its name.

    Returns:
        None if the layer decides.
    """
    listed = os.environ.get(INPUTS_VARIABLE, "")
    names = {name.strip() for name in listed.split(",") if name.strip()}
    if not names:
        return None
    if names == {"0"}:
        return False
    return True if names & {"1", "*", scheme} else None


@functools.lru_cache(maxsize=16)
def _tell_of_misspelled(names: tuple[str, ...]) -> None:
    """Log, once, which names no kernel has."""
    known = {kernel.name for table in _tables for kernel in table.kernels} | {PLAIN}
    for sentence in misspelled(known):
        log.warning("hijack: %s; the name is ignored", sentence)


def misspelled(known: Collection[str]) -> list[str]:
    """A sentence for each name in ``HIJACK_FORWARD`` that is not among those known."""
    return [
        f"{VARIABLE}: got {name!r}, expected kernels among {', '.join(sorted(known))}"
        f"{did_you_mean(name, known)}"
        for name in forced()
        if name not in known
    ]


def kernel_names(schemes: Iterable[Scheme]) -> set[str]:
    """What ``HIJACK_FORWARD`` may name: the kernels of all schemes, and ``plain``."""
    tables = [scheme.kernels for scheme in schemes if scheme.kernels is not None]
    return {kernel.name for table in tables for kernel in table.kernels} | {PLAIN}


# -- reports ---------------------------------------------------------------------------

#: Rows of inputs that reports speak of: a token, a few, a prompt, an image.
ROWS = (1, 16, 64, 256, 4096)


def describe(module: nn.Module, weight: QuantizedTensor | WeightView) -> str:
    """What computes a module, for inputs of the weight's dtype.

    Args:
        module: only its type matters.
        weight: its quantized weight, where it is computed with.

    Returns:
        Such as ``cpu (not triton: ...)``, or ``gemv up to 16 rows, decode``.
    """
    bound = getattr(module, "_bound_forward", None)
    bound = bound or getattr(module, "bound_forward", None)  # of a host's module
    if bound is None:
        return PLAIN
    if not isinstance(module, nn.Linear):
        return function_name(bound)
    return describe_rows(weight, bound)


def describe_rows(
    weight: QuantizedTensor | WeightView, bound: Callable[..., Any] | None
) -> str:
    """As `describe`, of a Linear with a bound forward."""
    explain = weight.scheme.explain_forward
    choices = [(rows, explain(weight, weight.dtype, rows)) for rows in ROWS]
    if bound is None or choices[0][1] is None:
        return PLAIN if bound is None else function_name(bound)
    parts: list[str] = []
    for at, (rows, choice) in enumerate(choices):
        following = choices[at + 1][1] if at + 1 < len(choices) else None
        if following is not None and choice is not None:
            if following.kernel == choice.kernel:
                continue
            parts.append(f"{choice.kernel} up to {rows} rows")
        else:
            parts.append(str(choice))
    return ", ".join(parts)


def function_name(bound: Callable[..., Any]) -> str:
    """The name of a bound forward, such as ``forward.linear_forward``."""
    while isinstance(bound, functools.partial):
        bound = bound.func
    function: Any = bound
    name = getattr(function, "__qualname__", type(function).__qualname__)
    return f"{function.__module__.rpartition('.')[2]}.{name}"


def _is_out_of_memory(error: Exception) -> bool:
    """Whether there is too little memory, which another kernel would not mend.

    torch has an exception of its own for devices, and none for the CPU.
    """
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "allocate memory" in str(error)
