"""Quantized weights in accelerate, PEFT, diffusers and transformers.

The programs are found through ``HIJACK_TEST_READERS``, a Python that has some of them
and what hijack needs; the tests' own may have halves of them, for ComfyUI.
``peers_run.py`` does the work.
"""

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.test_read_back import VARIABLE, python_with_all

ROOT = Path(__file__).parent.parent
#: Program to the number of its cases.
PROGRAMS = {"accelerate": 52, "peft": 24, "diffusers": 8, "transformers": 5}


@pytest.mark.parametrize("program", PROGRAMS)
def test_a_quantized_model_equals_the_dequantized_one(program):
    """Bit for bit, or the program is told that it cannot be."""
    needed = ("pluggy", "wrapt", "safetensors", program)
    python, arguments, more = python_with_all(*needed, ours=False), [program], 0
    if python is None:
        pytest.skip(f"no {program}: set {VARIABLE} to a Python that has it")
    trained = ("peft", "accelerate")
    if program == "transformers" and python_with_all(*needed, *trained, ours=False):
        python = python_with_all(*needed, *trained, ours=False)
        arguments, more = [program, "peft"], 1
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    done = subprocess.run(
        [python, ROOT / "tests" / "peers_run.py", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) == PROGRAMS[program] + more
    wrong = {k: v for k, v in found.items() if not _good(k, v)}
    assert not wrong


def _good(case, value):
    if case.startswith("refused"):
        return isinstance(value, str) and "unwrap" in value
    return value == 0.0
