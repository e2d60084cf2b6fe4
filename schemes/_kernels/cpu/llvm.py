"""Compile kernels for the processor at hand, with llvmlite.

A kernel is LLVM IR whose loops and vectors are written out, see `vectors.py`, so that
nothing depends on what an optimizer makes of it. Compiling one takes a few
hundredths of a second, once in a process; only what is called is compiled.
"""

from __future__ import annotations

import ctypes
import functools
import platform
import struct
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

from hijack.errors import HijackError

_lock = threading.RLock()
#: What compiled code lives in; it must outlive all kernels.
_engines: list[Any] = []
_kernels: dict[tuple[Any, ...], Kernel] = {}


class Kernel(NamedTuple):
    """A compiled kernel: a function of the address of its arguments.

    Arguments are the first row, the row after the last and the address of scratch
    memory, then what `pack` makes of the others. The kernel writes what it returns over
    the first of them.

    Attributes:
        call: runs it, without Python's lock.
        address: of its code.
        pack: makes bytes of the other arguments, in the order of `Function`.
    """

    call: Callable[[int], None]
    address: int
    pack: Callable[..., bytes]


class KernelError(HijackError):
    """A kernel cannot be compiled here."""


class Host(NamedTuple):
    """What the processor offers that kernels make use of.

    Attributes:
        permute16: looks up 16 numbers in a vector (AVX-512).
        permute8: looks up 8 numbers in a vector (AVX2).
        bf16: rounds to bfloat16 and multiplies pairs of them (AVX-512 BF16).
        tiles: multiplies matrices of bfloat16 (AMX), which torch makes use of.
    """

    permute16: bool
    permute8: bool
    bf16: bool
    tiles: bool


@functools.cache
def why_not() -> str | None:
    """Why no kernel can be compiled here, in a sentence; None if they can."""
    try:
        import llvmlite
        import llvmlite.binding as llvm
    except (ImportError, OSError) as error:
        return f"llvmlite cannot be imported ({error}); pip install llvmlite"
    if llvm.llvm_version_info[0] < 20:
        return f"llvmlite is {llvmlite.__version__}, expected 0.45 or newer; update it"
    machine = platform.machine().lower()
    if machine in ("arm64", "aarch64"):
        return None
    if machine not in ("x86_64", "amd64"):
        return f"the processor is of kind {machine}, expected x86-64 or ARM64"
    features = _features()
    if not (features.get("avx2") and features.get("f16c") and features.get("fma")):
        return "the processor has no AVX2"
    return None


def _features() -> dict[str, bool]:
    import llvmlite.binding as llvm

    try:
        return dict(llvm.get_host_cpu_features())
    except RuntimeError:  # LLVM does not know this operating system
        return {}


@functools.cache
def host() -> Host:
    """What this processor offers."""
    features = _features()
    wide = bool(features.get("avx512f") and features.get("avx512bw"))
    return Host(
        permute16=wide,
        permute8=bool(features.get("avx2")),
        bf16=wide and bool(features.get("avx512bf16")),
        tiles=bool(features.get("amx-bf16")),
    )


@functools.cache
def _machine() -> Any:
    import llvmlite.binding as llvm

    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    features = _features()
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    return llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(
        cpu=llvm.get_host_cpu_name(),
        features=",".join(
            f"{'+' if on else '-'}{name}" for name, on in features.items()
        ),
        opt=3,
        reloc="static" if x86 else "default",
        codemodel="jitdefault",
        jit=True,
    )


def kernel(build: Callable[..., Any], *key: Any) -> Kernel:
    """The compiled function that ``build(*key)`` describes, compiled once.

    Args:
        build: returns a `vectors.Function`; called only if there is none yet.
        key: what the kernel is specialised for; hashable.

    Raises:
        KernelError: if it cannot be compiled.
    """
    known = _kernels.get((build, *key))
    if known is not None:
        return known
    with _lock:
        if (build, *key) not in _kernels:
            reason = why_not()
            if reason is not None:
                raise KernelError(f"CPU kernels: {reason}")
            try:
                _kernels[(build, *key)] = _compile(build(*key))
            except RuntimeError as error:
                raise KernelError(
                    f"CPU kernels: LLVM cannot compile {build.__name__}{key}: {error}"
                ) from error
        return _kernels[(build, *key)]


def _compile(function: Any) -> Kernel:
    import llvmlite.binding as llvm

    parsed = llvm.parse_assembly(str(function.module))
    parsed.triple = llvm.get_process_triple()
    parsed.verify()
    engine = llvm.create_mcjit_compiler(parsed, _machine())
    engine.finalize_object()
    _engines.append(engine)
    address = engine.get_function_address(function.name)
    layout = "".join("q" if kind == "i" else "f4x" for kind in function.kinds)
    return Kernel(
        call=ctypes.CFUNCTYPE(None, ctypes.c_int64)(address),
        address=address,
        pack=struct.Struct(f"={layout}").pack,
    )
