"""FSDP2, DDP and tensor parallelism of quantized models, two processes over gloo."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import hijack

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What ``sharding_run`` found."""
    path = tmp_path_factory.mktemp("sharding") / "results.json"
    paths = [str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "sharding_run.py", path],
        capture_output=True,
        text=True,
        timeout=300,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text("utf-8"))


def test_sharded_models_equal_the_dequantized_ones(results):
    """Outputs, gradients of inputs and of adapters, and checkpoints, bit for bit."""
    exact = {k: v for k, v in results.items() if not k.startswith("refused")}
    assert len(exact) == 51
    assert set(exact.values()) == {0.0}, exact


def test_what_a_shard_cannot_do_is_refused(results):
    """With an error that says what to do."""
    refused = {k: v for k, v in results.items() if k.startswith("refused")}
    assert len(refused) == 7
    assert all(isinstance(v, str) and "; " in v for v in refused.values()), refused


@pytest.mark.parametrize("block_size", [(1, 64), (128, 128), "row", "tensor", (24, 40)])
@pytest.mark.parametrize(
    "part", [(0, 48, 0, 200), (48, 96, 0, 200), (5, 31, 64, 199), (24, 96, 40, 80)]
)
def test_any_part_decodes_as_in_the_whole(block_size, part):
    """On the borders of blocks and within them."""
    scheme = hijack.default_registry().get("blockwise_fp8")
    qdata, params = scheme.quantize(torch.randn(96, 200), block_size=block_size)
    rows, cols = slice(*part[:2]), slice(*part[2:])
    cut = scheme.params_of_part(params, (96, 200), (rows, cols))
    whole = scheme.dequantize(qdata, params, torch.float32)
    alone = scheme.dequantize(qdata[rows, cols].contiguous(), cut, torch.float32)
    assert torch.equal(alone, whole[rows, cols])
