"""What hijack must do with any file: finish, or refuse in its own words."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import json
import shutil
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

import hijack
from hijack.checkpoint.compare import compare_files
from hijack.errors import HijackError
from hijack.formats import matching
from hijack.lora.files import Loras
from hijack.registry import default_registry
from hijack.safetensors_io.header import Header, join
from hijack.safetensors_io.reader import open_tensors, read_header
from tests.fuzz.case import Case
from tests.fuzz.seeds import WRITTEN, dense

#: Seconds of CPU that everything done with one file may take.
SECONDS = 1.0
#: Bytes over 3 x the file: pages of torch's own code and of Python's and the C
#: library's allocators, which the first use of each operation brings in.
ALLOWANCE = 8 << 20
_STATUS = Path("/proc/self/status")
_RESET = Path("/proc/self/clear_refs")


@dataclasses.dataclass
class Outcome:
    """What became of one case.

    Attributes:
        steps: operation to ``"ok"``, or to the class of the HijackError it raised.
        seconds: of CPU, all operations together.
        memory: bytes the process grew by at most; 0 where nobody can tell.
        problem: what must not be, with a traceback; empty if all is well.
    """

    steps: dict[str, str] = dataclasses.field(default_factory=dict)
    seconds: float = 0.0
    memory: int = 0
    problem: str = ""


class Checker:
    """Runs cases, each in a folder of its own that is removed again.

    Args:
        folder: where to work; best in memory.
        cases: the seeds; models are made to match them.
    """

    def __init__(self, folder: Path, cases: list[Case]) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._base = folder / "base.safetensors"
        save_file(dense(), self._base)
        self._base_header = read_header(self._base)
        self._models = {case.name: self._shapes(case) for case in cases}

    def run(self, case: Case, random: Random) -> Outcome:
        """Do everything with one case, and hold it against the limits."""
        outcome, place = Outcome(), self._folder / "case"
        path = case.write(place)
        try:
            start, before = time.thread_time(), _reset_peak()
            try:
                self._all(case, path, random, outcome)
            except Exception:  # whatever it is, it is what we look for
                outcome.problem = traceback.format_exc()
            outcome.seconds = time.thread_time() - start
            outcome.memory = max(_memory("VmHWM") - before, 0)
            self._judge(case, outcome)
        finally:
            shutil.rmtree(place)
        return outcome

    def _judge(self, case: Case, outcome: Outcome) -> None:
        limit = 3 * case.size + ALLOWANCE
        if outcome.seconds > SECONDS and not outcome.problem:
            outcome.problem = f"took {outcome.seconds:.1f} s of CPU"
        if outcome.memory > limit and not outcome.problem:
            outcome.problem = f"took {outcome.memory:,} bytes for {case.size:,}"

    def _all(self, case: Case, path: Path, random: Random, outcome: Outcome) -> None:
        def step(name: str, action: Callable[[], object]) -> None:
            try:
                action()
                outcome.steps[name] = "ok"
            except HijackError as error:
                _readable(error)
                outcome.steps[name] = type(error).__name__

        if case.kind == "lora":
            step("lora", lambda: self._lora(path, random))
            return
        step("identify", lambda: _identify(path))
        if outcome.steps["identify"] == "HeaderError":
            step("load", lambda: hijack.load(nn.Linear(2, 2), path))
            step("convert", lambda: self._convert(path, random))
            return
        ways = [("load_loose", "cpu", False), ("load_meta", "meta", False)]
        for name, device, strict in (("load", "cpu", True), random.choice(ways)):
            model = build(self._models.get(case.name, {}), device)
            step(name, lambda m=model, s=strict: hijack.load(m, path, strict=s))
        step("convert", lambda: self._convert(path, random))
        step("compare", lambda: _compare(path))

    def _convert(self, path: Path, random: Random) -> None:
        target = path.parent / "converted.out"
        hijack.convert_file(
            path,
            target,
            random.choice(list(WRITTEN)),
            requantize=random.random() < 0.5,
            drop_input_scales=random.random() < 0.5,
            write_config=random.random() < 0.2,
        )
        # what was written must be read, by hijack and by safetensors itself
        read_header(target)

    def _lora(self, path: Path, random: Random) -> None:
        strength = random.choice((1.0, 0.5, -2.0))
        loose = random.random() < 0.7
        loras = Loras.open([(path, strength)], self._base_header, loose)
        tensors = open_tensors(self._base_header)
        for key in loras.keys:
            merged = loras.merge(key, tensors[key])
            if merged.shape != tensors[key].shape:
                raise RuntimeError(f"{key}: {merged.shape} after merging")

    def _shapes(self, case: Case) -> dict[str, Any]:
        """Layer to the shape of its weight, and key to that of every other tensor."""
        place = self._folder / "seed"
        try:
            header = read_header(case.write(place))
            if case.kind != "model":
                return {}
            return _shapes_of(header)
        finally:
            shutil.rmtree(place)


def _shapes_of(header: Header) -> dict[str, Any]:
    claims: dict[str, Any] = {}
    with contextlib.suppress(HijackError):
        claims = hijack.identify(header).claims()
    tensors, shapes = open_tensors(header), {}
    used = {key for claim in claims.values() for key in claim.keys.values()}
    for layer, claim in claims.items():
        scheme = default_registry().get(claim.scheme)
        decoded = scheme.dequantize(
            *matching.decode(scheme, claim, tensors), torch.float32
        )
        shapes[join(layer, "weight")] = (tuple(decoded.shape), True)
    for key, info in header.tensors.items():
        if key not in used:
            shapes[key] = (info.shape, False)
    return shapes


def build(shapes: dict[str, Any], device: str) -> nn.Module:
    """A model with the layers of a seed, and all its other tensors."""
    root = nn.Module()
    # the layers first, so that what else they hold finds them
    for key, (shape, quantized) in sorted(shapes.items(), key=lambda i: not i[1][1]):
        layer, _, name = key.rpartition(".")
        if quantized and len(shape) == 2:
            made: nn.Module = nn.Linear(shape[1], shape[0], bias=False, device=device)
            if not layer:
                root = made
                continue
            owner, _, last = layer.rpartition(".")
            _module(root, owner).add_module(last, made)
        else:
            empty = torch.zeros(shape, device=device)
            parameter = nn.Parameter(empty, requires_grad=False)
            _module(root, layer)._parameters[name] = parameter
    return root


def _module(root: nn.Module, path: str) -> nn.Module:
    """The module of a name; made, with those around it, if it is not there."""
    for part in filter(None, path.split(".")):
        # not add_module: bitsandbytes has X.weight beside X.weight.absmax
        root = root._modules.setdefault(part, nn.Module())  # type: ignore[assignment]
    return root


def _identify(path: Path) -> None:
    found = hijack.identify(path)
    for text in (found.to_json(), found.as_table(), found.as_table(verbose=True)):
        text.encode()
    json.loads(found.to_json())


def _compare(path: Path) -> None:
    found = compare_files(path, path)
    found.as_table().encode()
    json.loads(found.to_json())


def _readable(error: HijackError) -> None:
    """A message a user can be shown: some text, and not a whole file of it."""
    text = str(error)
    text.encode()
    if not text or len(text) > 5_000:
        raise RuntimeError(f"a message of {len(text)} letters: {text[:200]}") from error


def _reset_peak() -> int:
    """Forget the most memory ever used; returns what is used now."""
    gc.collect(0)
    with contextlib.suppress(OSError):
        _RESET.write_text("5")
    return _memory("VmRSS")


def _memory(name: str) -> int:
    with contextlib.suppress(OSError):
        for line in _STATUS.read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
    return 0
