"""What hijack itself costs in a forward, beside the module it wraps.

::

    python -m benchmarks.overhead

A scheme that does nothing is put on a small Linear. Its forward is compared with that
of ``nn.Linear``, and that of an unwrapped Linear before and after ``import hijack``.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.timing import alternate, machine

#: Short batches, many times: one of them meets a quiet moment of a busy machine.
CALLS, ROUNDS = 200, 400


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


def nothing() -> Any:
    """A scheme whose quantized data is the weight."""
    import hijack

    class Nothing(hijack.Scheme):
        name = "nothing"

        def quantize(
            self, weight: Tensor, **options: Any
        ) -> tuple[Tensor, dict[str, Tensor]]:
            return weight, {}

        def dequantize(
            self, qdata: Tensor, params: Mapping[str, Tensor], dtype: torch.dtype
        ) -> Tensor:
            return qdata

        def bind_forward(self, module: nn.Module) -> Any:
            return forward

    return Nothing()


def forward(self: Any, input: Tensor) -> Tensor:
    """What ``nn.Linear.forward`` does."""
    return F.linear(input, self.weight, self.bias)


def main() -> None:
    """Measure, and print a Markdown table."""
    torch.set_num_threads(1)
    if "hijack" in sys.modules:
        raise SystemExit("hijack is imported already; nothing can be measured before")
    before = time_calls({"plain": nn.Linear(16, 16)})["plain"]
    import hijack

    plain, wrapped = nn.Linear(16, 16), nn.Linear(16, 16)
    default = hijack.wrap_module(nn.Linear(16, 16), DefaultForward.of(nothing()))
    hijack.wrap_module(wrapped, nothing())
    times = time_calls({"plain": plain, "wrapped": wrapped, "default": default})
    print(f"{machine()}\n\n| Linear 16 -> 16, M = 1 | us a call | more than plain |")
    print("|---|---:|---:|")
    print(f"| before `import hijack` | {min(before):.2f} | |")
    for name, title in (
        ("plain", "not wrapped, after `import hijack`"),
        ("wrapped", "wrapped, a scheme that does nothing, its own forward"),
        ("default", "wrapped, a scheme that does nothing, the default forward"),
    ):
        more = min(times[name]) - min(times["plain"])
        print(f"| {title} | {min(times[name]):.2f} | {more:.2f} |")


class DefaultForward:
    """Makes a scheme keep hijack's default forward."""

    @staticmethod
    def of(scheme: Any) -> Any:
        scheme.bind_forward = lambda module: None
        return scheme


if __name__ == "__main__":
    main()
