"""The part of the conformance kit that changes what is around a scheme.

Devices, defaults of torch, threads and random numbers: none may change what a scheme
computes, and none may be changed by it.
"""

from __future__ import annotations

import contextlib
import random
import sys
import threading
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses import fake_tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from hijack.modules import prepare
from hijack.scheme import Quantized, Scheme
from hijack.testing.checks import alone, expect, kind_of, same_numbers
from hijack.testing.modules import ModuleConformance

#: What a device without memory raises where values are asked for.
_NEEDS_DATA = (
    fake_tensor.DataDependentOutputException,
    fake_tensor.DynamicOutputShapeException,
    fake_tensor.UnsupportedOperatorException,
)
#: What a torch without the device says of a few operations.
_NO_DEVICE = "not linked with support"
#: Lines of a scheme's code between which another thread is let in, at most.
_MOST_LINES = 300
#: Folders whose code is not the scheme's.
_OTHERS = (
    str(Path(torch.__file__).parent),
    str(Path(__file__).parents[1]),
    str(Path(threading.__file__).parent),
)

Call = Callable[[], list[Tensor]]


class SurroundingsConformance(ModuleConformance):
    """Tests of what a scheme takes from its surroundings, and leaves to them."""

    def test_tensors_stay_on_their_device(self, scheme: Scheme) -> None:
        """On a GPU nothing is left on the CPU; shown without one, and without data."""
        shape, device = self.weight_shape, torch.device("cuda", 0)
        calls: dict[str, Call] = {}
        with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
            made = scheme.create_params(shape, torch.float32, device, **self.options)
            like = torch.empty(shape, device=device)
            calls["create_params"] = lambda: _parts(made)
            calls["quantize"] = lambda: _parts(self._quantize(scheme, like))
            calls["dequantize"] = lambda: [
                self._decode(scheme, made, like, dtype)
                for dtype in (torch.float32, torch.bfloat16)
            ]
            for module, x in self._all_subjects_on(scheme, device):
                calls[f"forward of {kind_of(module)}"] = lambda m=module, v=x: [m(v)]  # type: ignore[misc]
            for what, call in calls.items():
                try:
                    got: Any = {tensor.device for tensor in call()}
                except Exception as error:
                    if isinstance(error, _NEEDS_DATA) or _NO_DEVICE in str(error):
                        continue
                    got = f"{type(error).__name__}: {error}"
                expect(
                    got == {device},
                    f"{scheme.name}: {what} on {device}: got {got}, expected it there",
                )

    def test_defaults_of_torch_do_not_matter(self, scheme: Scheme) -> None:
        """The default dtype and the default device change no result."""
        calls = self._calls(scheme)
        expected = {what: call() for what, call in calls.items()}
        for default in ("float64", "meta"):
            for what, call in self._calls(scheme).items():
                got: Any
                try:
                    with _default(default):
                        got = call()
                except Exception as error:
                    got = error
                expect(
                    isinstance(got, list) and _same(got, expected[what]),
                    f"{scheme.name}: {what} with the default {default}: got "
                    f"{_told(got)}, expected {_told(expected[what])}",
                )

    def test_state_of_the_process_is_left_alone(self, scheme: Scheme) -> None:
        """Random numbers, gradient mode and other settings are what they were."""
        for seed in (1, 2):
            for what, call in self._calls(scheme, record=True).items():
                with torch.random.fork_rng(devices=[]), torch.enable_grad():
                    torch.manual_seed(seed)
                    before = _state()
                    call()
                    after = _state()
                    _restore(before)
                changed = [name for name in before if before[name] != after[name]]
                expect(
                    not changed,
                    f"{scheme.name}: {what}: changed {', '.join(changed)}, expected "
                    "the process as it was",
                )

    def test_threads_do_not_meet(self, scheme: Scheme) -> None:
        """Between any two lines of a scheme another thread may call it."""
        mine, others = self._calls(scheme), self._calls(scheme, seed=1)
        expected = {what: call() for what, call in mine.items()}
        wanted = {what: call() for what, call in others.items()}
        for what, call in mine.items():
            for beside in {what, "forward 0"} & others.keys():
                got, seen = _interleaved(call, others[beside])
                expect(
                    _same(got, expected[what])
                    and all(_same(one, wanted[beside]) for one in seen),
                    f"{scheme.name}: {what} while another thread runs {beside}: got "
                    "other results than alone",
                )

    # -- details -----------------------------------------------------------------------

    def _calls(
        self, scheme: Scheme, seed: int = 0, record: bool = False
    ) -> dict[str, Call]:
        """Everything a scheme is asked to do, ready to be done."""
        weight = self._weight(seed=seed)
        made = self._quantize(scheme, weight)

        def create() -> list[Tensor]:
            return _parts(
                scheme.create_params(
                    self.weight_shape, torch.float32, self.device, **self.options
                )
            )

        def decode() -> list[Tensor]:
            dense = self._as_weight(scheme, made, weight)
            return [dense.dense(dtype) for dtype in (torch.float32, torch.bfloat16)]

        calls: dict[str, Call] = {
            "quantize": lambda: _parts(scheme.quantize(weight, **self.options)),
            "dequantize": decode,
            "create_params": create,
        }
        layers = self._every(scheme, 1.0 + seed)
        for index, (module, _, x) in enumerate(layers):
            calls[f"forward {index}"] = lambda m=module, v=x: [m(v).detach()]  # type: ignore[misc]
        if record:
            for module, _ in self.subjects(scheme):
                calls[f"bind_forward of {kind_of(module)}"] = partial(
                    _bound, scheme, module
                )
        return calls

    def _all_subjects_on(
        self, scheme: Scheme, device: torch.device
    ) -> Iterator[tuple[nn.Module, Tensor]]:
        """Wrapped subjects whose tensors are fake ones on a device."""
        for module, x in self._all_subjects(scheme):
            weight = module._parameters["weight"]
            if weight is None:
                continue
            made = scheme.create_params(
                tuple(weight.shape), torch.float32, device, **self.options
            )
            quantized = self._as_weight(scheme, made, weight)
            with alone(scheme) as registry:
                prepare(module, quantized, registry).apply()
            bias = module._parameters.get("bias")
            if bias is not None:
                moved = torch.empty(bias.shape, device=device)
                module._parameters["bias"] = nn.Parameter(moved, requires_grad=False)
            yield module, torch.zeros(x.shape, dtype=x.dtype, device=device)


def _bound(scheme: Scheme, module: nn.Module) -> list[Tensor]:
    scheme.bind_forward(module)
    return []


def _parts(made: Quantized) -> list[Tensor]:
    return [made[0], *made[1].values()]


def _same(got: list[Tensor], expected: list[Tensor]) -> bool:
    return len(got) == len(expected) and all(
        a.device == b.device and same_numbers(a, b)
        for a, b in zip(got, expected, strict=True)
    )


def _told(result: object) -> str:
    if isinstance(result, list):
        return ", ".join(f"{t.dtype} {tuple(t.shape)} on {t.device}" for t in result)
    return f"{type(result).__name__}: {result}"


@contextlib.contextmanager
def _default(name: str) -> Iterator[None]:
    """Another default dtype or device of torch for a while."""
    if name == "meta":
        with torch.device("meta"):
            yield
        return
    before = torch.get_default_dtype()
    torch.set_default_dtype(getattr(torch, name))
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _state() -> dict[str, object]:
    """What all code of the process shares."""
    return {
        "torch's random state": torch.get_rng_state().numpy().tobytes(),
        "Python's random state": random.getstate(),
        "the gradient mode": torch.is_grad_enabled(),
        "the default dtype": torch.get_default_dtype(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
        "the number of threads": torch.get_num_threads(),
        "the precision of products": torch.get_float32_matmul_precision(),
        "autocast": torch.is_autocast_enabled("cpu"),
        "inference mode": torch.is_inference_mode_enabled(),
    }


def _restore(state: dict[str, Any]) -> None:
    """Put back what tests after this one would notice."""
    random.setstate(state["Python's random state"])
    torch.set_grad_enabled(state["the gradient mode"])
    torch.set_default_dtype(state["the default dtype"])
    torch.use_deterministic_algorithms(state["deterministic algorithms"])
    torch.set_num_threads(state["the number of threads"])
    torch.set_float32_matmul_precision(state["the precision of products"])


def _interleaved(call: Call, other: Call) -> tuple[list[Tensor], list[list[Tensor]]]:
    """Run a call; between its lines, another one in another thread.

    A line that holds a lock keeps the other thread waiting, and is not waited for.
    """
    results: list[list[Tensor]] = []
    errors: list[BaseException] = []
    turn, done = threading.Semaphore(0), threading.Event()
    over = threading.Event()

    def run() -> None:
        while True:
            turn.acquire()
            if over.is_set():
                return
            try:
                results.append(other())
            except BaseException as error:
                errors.append(error)
            done.set()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    lines = 0

    def trace(frame: Any, event: str, argument: object) -> Any:
        nonlocal lines
        if frame.f_code.co_filename.startswith(_OTHERS):
            return trace if event == "call" else None
        if event == "line" and lines < _MOST_LINES and not errors:
            lines += 1
            done.clear()
            turn.release()
            done.wait(0.2)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        got = call()
    finally:
        sys.settrace(before)
        over.set()
        turn.release()
        thread.join(10)
    if errors:
        raise errors[0]
    return got, results
