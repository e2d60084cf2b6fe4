"""The tests of forwards pass on processors that are not at hand."""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.thorough, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parents[1]
#: Tests that compare outputs of modules.
FILES = ("fp8_forward", "wrap", "building", "load", "example", "docs")


def run(*words):
    """Run this Python in the root of the repository; its output is the error."""
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]


def test_forwards_pass_whatever_the_order_of_sums():
    """No test asks for the bits of a matrix product."""
    files = [f"tests/test_{name}.py" for name in FILES]
    options = ["-q", "-p", "tests.other_sums", "-p", "no:cacheprovider"]
    run("-m", "pytest", *options, "-k", "not temporaries", *files)


def test_the_order_of_sums_is_another_one_each_time():
    """With the plugin two equal products differ in bits, and in no more."""
    run(
        "-c",
        "import torch, tests.other_sums\n"
        "x, w, b = torch.randn(9, 500), torch.randn(70, 500), torch.randn(70)\n"
        "first = torch.nn.functional.linear(x, w, b)\n"
        "second = torch.nn.functional.linear(x, w, b)\n"
        "assert not torch.equal(first, second)\n"
        "torch.testing.assert_close(first, second, rtol=1e-4, atol=1e-4)\n",
    )
