"""Forward of a block-wise FP8 Linear, beside musubi-tuner's and a bfloat16 Linear.

::

    HIJACK_PEER_MUSUBI=/path/to/musubi-tuner python -m benchmarks.forward

All run in one process, in turn, in a new order each round; what is reported are medians
of the quotients of each round. Every call takes the next of several weights that
together are larger than any cache, as in a model. musubi-tuner's forward is its own
function ``fp8_linear_forward_patch``, on the same quantized data and scales.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import hijack
import schemes.blockwise_fp8  # noqa: F401 - registers the scheme
from benchmarks.peers import MUSUBI, musubi
from benchmarks.timing import alternate, machine, ratio

Runs = dict[str, Callable[[int], Tensor]]

POOL_BYTES = 200 << 20
COLUMNS = "| layer | threads | M | musubi / hijack | musubi / bf16 | hijack / bf16 |"
RULE = "|---|---:|---:|---:|---:|---:|"


def layers(n: int, k: int, device: str) -> tuple[list[nn.Module], list[Tensor]]:
    """Wrapped Linears with 1 x 64 blocks, and dense weights, (N, K) bfloat16 each."""
    count = max(POOL_BYTES // (n * k), 2)
    linears, weights = [], []
    for _ in range(count):
        linear = nn.Linear(k, n, bias=False, dtype=torch.bfloat16, device=device)
        weights.append(linear.weight.detach().clone())
        linear.requires_grad_(False)
        linears.append(hijack.wrap_module(linear, "blockwise_fp8", block_size=(1, 64)))
    return list(linears), weights


def runs_for(x: Tensor, linears: list[nn.Module], weights: list[Tensor]) -> Runs:
    """Every forward as a function of the number of the layer to run."""
    peer = musubi()

    def run_hijack(i: int) -> Tensor:
        result: Tensor = linears[i % len(linears)](x)
        return result

    def run_bf16(i: int) -> Tensor:
        return F.linear(x, weights[i % len(weights)])

    runs: Runs = {"hijack": run_hijack, "bf16": run_bf16}
    if peer is not None:
        others = [with_musubis_names(linear) for linear in linears]

        def run_musubi(i: int) -> Tensor:
            result: Tensor = peer.fp8_linear_forward_patch(others[i % len(others)], x)
            return result

        runs["musubi"] = run_musubi
    return runs


def with_musubis_names(linear: Any) -> SimpleNamespace:
    """The same quantized data and scales under musubi-tuner's names."""
    scale = linear.weight_scale[:, :, None]
    return SimpleNamespace(weight=linear.weight, scale_weight=scale, bias=None)


def measure(n: int, k: int, where: str, sizes: list[int], rounds: int) -> None:
    """Print one row for each M; ``where`` is a number of threads, or ``cuda``."""
    on_gpu = where == "cuda"
    linears, weights = layers(n, k, "cuda" if on_gpu else "cpu")
    for m in sizes:
        x = torch.randn(m, k, dtype=torch.bfloat16, device=weights[0].device)
        runs = runs_for(x, linears, weights)
        with torch.inference_mode():
            if "musubi" in runs:
                assert_same(runs["hijack"](0), runs["musubi"](0))
            repeat = 20 if on_gpu else 2 if m < 1024 else 1
            seconds = alternate(runs, rounds, repeat)
        hijack_s, bf16 = seconds["hijack"], seconds["bf16"]
        other = seconds.get("musubi")
        faster = f"{ratio(other, hijack_s):.2f}" if other else "-"
        bound = f"{ratio(other, bf16):.2f}" if other else "-"
        print(
            f"| {k} -> {n} | {where} | {m} | {faster} | {bound} | "
            f"{ratio(hijack_s, bf16):.2f} |",
            flush=True,
        )


def assert_same(ours: Tensor, theirs: Tensor) -> None:
    """What is compared must compute the same."""
    error = (ours - theirs).float().norm() / theirs.float().norm()
    if not error < 1e-2:
        raise RuntimeError(f"hijack and musubi-tuner differ by {error:.2e}")


def main() -> None:
    """Measure what the arguments ask for, and print a Markdown table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["3072x12288", "3072x3072"])
    parser.add_argument(
        "--rows", nargs="+", type=int, default=[1, 16, 256, 1024, 4096], metavar="M"
    )
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", nargs="+", type=int, default=None)
    parser.add_argument("--gpu", action="store_true", help="not on the CPU")
    args = parser.parse_args()
    if musubi() is None:
        print(f"{MUSUBI} is not set: measured without musubi-tuner\n")
    print(f"{machine()}\n\n{COLUMNS}\n{RULE}")
    threads = args.threads or sorted({1, torch.get_num_threads()})
    for where in ["cuda"] if args.gpu else threads:
        if not args.gpu:
            torch.set_num_threads(where)
        for shape in args.shapes:
            k, n = map(int, shape.split("x"))
            measure(n, k, str(where), args.rows, args.rounds)


if __name__ == "__main__":
    main()
