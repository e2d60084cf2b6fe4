"""hijack with ComfyUI's stock loader beside ComfyUI-musubi with its own.

::

    HIJACK_PEER_COMFYUI_MUSUBI=/path/to/ComfyUI-musubi python -m \\
        benchmarks.comfyui_musubi COMFYUI ... > docs/comfyui-musubi.md

Both load the same block-wise FP8 files into each ComfyUI that is named, and do the same
with the model. What counts is how far the result is from that of the exactly
dequantized weights, with the exact LoRA, through ComfyUI's own code. Needs ComfyUI's
dependencies, but no server and no GPU. ComfyUI-musubi is used as its README says: its
loader node instead of ComfyUI's, and ComfyUI's own nodes for everything else.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping

from benchmarks.comfyui_case import LARGE, REPOSITORY, SMALL
from benchmarks.harness import (
    Benchmark,
    Missing,
    Row,
    Setting,
    comfyui_order,
    comfyui_version,
)
from benchmarks.peers import COMFYUI_MUSUBI
from benchmarks.timing import machine

SIDES = {"musubi": "ComfyUI-musubi", "hijack": "hijack"}
STEPS = (
    "load and sample",
    "small LoRA",
    "large LoRA",
    "LoRA removed",
    "partial load",
    "partial load, small LoRA",
    "save and reload",
    "prefixed file",
    "width not divisible by 64",
)

TEXT = """# Beside ComfyUI-musubi

[ComfyUI-musubi](https://github.com/polym/ComfyUI-musubi) (commit {commit}) loads the
same block-wise FP8 files with its own loader node. Made with

    HIJACK_PEER_COMFYUI_MUSUBI=/path/to/ComfyUI-musubi python -m \\
        benchmarks.comfyui_musubi COMFYUI ... > docs/comfyui-musubi.md

on {machine}, without a GPU.

Numbers are relative L2 errors against the exactly dequantized model, with the exact
LoRA: 0 is right, 1 means that nothing is left of the signal. *Effect* is the size of a
LoRA's change relative to the right one: 1 is right, 0 means that the LoRA is lost.

{table}

{reasons}

- The model is a random Qwen-Image of two layers and width 256, in 1 x 64 blocks; the
  last row is a Wan of width 256 whose second MLP layer has 416 inputs.
- Results are the latent after two steps of Euler, and for partial loading, which the
  sampler would undo, the network's first output with half of the weights offloaded.
- Each side reloads what it saved with its own loader.
- The LoRAs are of rank 4, on every quantized layer, of {small} and {large} times its
  weight's norm. *LoRA removed* compares weights and result with those of before.
- ComfyUI-musubi keeps every Linear in FP8, also those that the file has in bfloat16,
  and biases; they have no scales there, which is probably its error where nothing
  else goes wrong. Its README promises neither saving, nor prefixed files, nor the last
  row; they are here because users of the stock nodes meet them.
"""


def write_table(
    results: Mapping[tuple[str, str], Mapping[str, str]],
) -> tuple[str, str]:
    """A Markdown table, and the reasons of failures that it refers to."""
    reasons: list[str] = []

    def cell(text: str) -> str:
        if not text.startswith("fails: "):
            return text
        reason = text.removeprefix("fails: ")
        if reason not in reasons:
            reasons.append(reason)
        return f"fails ({reasons.index(reason) + 1})"

    head = " | ".join(f"{release} {SIDES[side]}" for release, side in results)
    lines = [f"| | {head} |", "|---|" + "---|" * len(results)]
    for step in STEPS:
        cells = " | ".join(cell(each[step]) for each in results.values())
        lines.append(f"| {step} | {cells} |")
    listed = [f"({n}) `{reason[:300]}`" for n, reason in enumerate(reasons, 1)]
    return "\n".join(lines), "\n\n".join(listed)


def judge(side: str, root: str) -> dict[str, str]:
    """What came of every step on one side, in a process of its own.

    Raises:
        RuntimeError: if that process fails.
    """
    command = [sys.executable, "-m", "benchmarks.comfyui_case", side, root]
    done = subprocess.run(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise RuntimeError(f"{comfyui_version(root)}, {side}: see above")
    result: dict[str, str] = json.loads(done.stdout.splitlines()[-1])
    return result


def cannot(setting: Setting) -> str | None:
    """Why it cannot be measured, or None."""
    if not os.environ.get(COMFYUI_MUSUBI):
        return f"no ComfyUI-musubi; set {COMFYUI_MUSUBI} to a checkout"
    if setting.quick:
        return "it takes minutes; leave out --quick"
    return None if setting.comfyui else "no ComfyUI was found; name one in --comfyui"


def measure(setting: Setting) -> Iterator[Row | Missing]:
    """A row for each release and step."""
    for root in setting.comfyui:
        found = {SIDES[side]: judge(side, root) for side in SIDES}
        for step in STEPS:
            cells = {name: each[step] for name, each in found.items()}
            yield {"ComfyUI": comfyui_version(root), "step": step, **cells}


BENCHMARK = Benchmark(
    "comfyui_musubi",
    "What becomes of the same files with ComfyUI-musubi's loader and with hijack: "
    "relative errors, as docs/comfyui-musubi.md explains.",
    measure,
    "ComfyUI-musubi and a ComfyUI",
    cannot,
)


def main(roots: list[str]) -> None:
    """Print the document."""
    peer = os.environ.get(COMFYUI_MUSUBI)
    if not peer or not roots:
        raise SystemExit(__doc__)
    results = {
        (comfyui_version(root), side): judge(side, root)
        for root in sorted(roots, key=comfyui_order)
        for side in SIDES
    }
    git = ["git", "-C", peer, "rev-parse", "--short=8", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout
    table, reasons = write_table(results)
    text = TEXT.format(
        commit=commit.strip(),
        machine=machine(),
        table=table,
        reasons=reasons,
        small=SMALL,
        large=LARGE,
    )
    print(text, end="")


if __name__ == "__main__":
    main(sys.argv[1:])
