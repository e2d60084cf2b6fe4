"""What hijack writes, read by the programs whose dialects it writes: bit for bit.

They are found beside the tests' own Python, or through ``HIJACK_TEST_READERS``, a
Python that has some of them (hijack itself it need not have). ``golden/read_back.py``
does the reading.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "tests" / "golden" / "read_back.py"
VARIABLE = "HIJACK_TEST_READERS"
#: What a program needs besides, to load such files.
ALSO = {"transformers": ("accelerate",), "compressed_tensors": ("transformers",)}
PROGRAMS = (
    *("torchao", "compressed_tensors", "transformers", "comfy_kitchen"),
    *("bitsandbytes", "modelopt"),
)


def python_with(program):
    """A Python that can import a program, or None."""
    return python_with_all(program, *ALSO.get(program, ()))


def python_with_all(*needed, ours=True):
    """A Python that can import all of some packages, or None; the tests' own or not."""
    if ours and all(importlib.util.find_spec(name) for name in needed):
        return sys.executable
    named = os.environ.get(VARIABLE)
    if named is None:
        return None
    asks = f"import importlib.util as u; print(all(map(u.find_spec, {needed!r})))"
    found = subprocess.run([named, "-c", asks], capture_output=True, check=True)
    return named if found.stdout.strip() == b"True" else None


@pytest.mark.parametrize("program", PROGRAMS)
def test_the_original_program_reads_every_bit(program):
    """In every dialect, block size and kind of scale, of even and of ragged shapes."""
    python = python_with(program)
    if python is None:
        pytest.skip(f"no {program}: set {VARIABLE} to a Python that has it")
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    done = subprocess.run(
        [python, SCRIPT, program],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    cases = json.loads(done.stdout.splitlines()[-1])
    assert cases
    wrong = {
        (case, layer): what
        for case, layers in cases.items()
        for layer, what in layers.items()
        if what != "same"
    }
    assert not wrong
    assert all(cases.values())
