"""What hijack itself costs in a forward, beside the module it wraps.

A scheme that does nothing is put on a small Linear. Its forward is compared with that
of ``nn.Linear``, also with twenty plugins registered, and that of an unwrapped Linear
before and after ``import hijack``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.harness import Benchmark, Missing, Row, Setting
from benchmarks.timing import alternate, spread

#: Short batches, many times: one of them meets a quiet moment of a busy machine.
CALLS, ROUNDS, PLUGINS = 200, 400, 20


def time_calls(
    modules: Mapping[str, nn.Module], rounds: int = ROUNDS
) -> dict[str, list[float]]:
    """Microseconds of one call of each module, round by round."""
    x = torch.randn(1, 16)

    def run(module: nn.Module) -> Any:
        def calls(_: int) -> None:
            for _ in range(CALLS):
                module(x)

        return calls

    with torch.inference_mode():
        seconds = alternate({n: run(m) for n, m in modules.items()}, rounds)
    return {n: [s / CALLS * 1e6 for s in each] for n, each in seconds.items()}


def nothing(own_forward: bool) -> Any:
    """A scheme whose quantized data is the weight.

    Args:
        own_forward: whether it binds one, or keeps hijack's default.
    """
    import hijack

    class Nothing(hijack.Scheme):
        name = "nothing" if own_forward else "nothing_default"

        def quantize(
            self, weight: Tensor, **options: Any
        ) -> tuple[Tensor, dict[str, Tensor]]:
            return weight, {}

        def dequantize(
            self, qdata: Tensor, params: Mapping[str, Tensor], dtype: torch.dtype
        ) -> Tensor:
            return qdata

        def bind_forward(self, module: nn.Module) -> Any:
            return forward if own_forward else None

    return Nothing()


def silent_plugin() -> Any:
    """A plugin that is asked everything and answers nothing."""
    import hijack

    class Silent:
        @hijack.hookimpl
        def hijack_select_scheme(self, module: Any, prefix: Any, header: Any) -> None:
            return None

        @hijack.hookimpl
        def hijack_bind_forward(self, module: Any, scheme: Any) -> None:
            return None

        @hijack.hookimpl
        def hijack_init(self, module: Any, scheme: Any) -> None:
            return None

    return Silent()


def forward(self: Any, input: Tensor, weight: Any, bias: Any) -> Tensor:
    """What ``nn.Linear.forward`` does."""
    return F.linear(input, weight.qdata, bias)


def measure(setting: Setting) -> Iterator[Row | Missing]:
    """A row for each kind of module."""
    torch.set_num_threads(1)
    rounds = setting.rounds or (20 if setting.quick else ROUNDS)
    title = "before `import hijack`"
    if "hijack" in sys.modules:
        yield Missing(title, "hijack is imported already in this process")
    else:
        before = time_calls({"plain": nn.Linear(16, 16)}, rounds)["plain"]
        yield {"Linear 16 -> 16, M = 1": title, "least, us": min(before)}
    import hijack

    modules = {"not wrapped, after `import hijack`": nn.Linear(16, 16)}
    own, default = nothing(True), nothing(False)

    def wrap(scheme: Any) -> nn.Module:
        return hijack.wrap_module(nn.Linear(16, 16), scheme)

    modules["wrapped, its scheme's own forward"] = wrap(own)
    modules["wrapped, the default forward"] = wrap(default)
    registry = hijack.create_registry()
    for index in range(PLUGINS):
        registry.add_plugin(silent_plugin(), f"silent{index}")
    with hijack.use_registry(registry):
        registry.register(own)
        modules[f"wrapped, its scheme's own forward, {PLUGINS} plugins"] = wrap(own)
        times = time_calls(modules, rounds)
    plain = next(iter(times.values()))
    for name, each in times.items():
        row: Row = {"Linear 16 -> 16, M = 1": name, "least, us": min(each)}
        if each is not plain:
            more = spread([a - b for a, b in zip(each, plain, strict=True)])
            row = {**row, "more than plain, us": more}
        yield row


BENCHMARK = Benchmark(
    "overhead",
    "Microseconds that a call of a wrapped module takes more than the module itself.",
    measure,
)
