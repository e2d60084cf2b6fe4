"""Programs killed at random: what they replace is the old, or whole and the new."""

import collections
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import hijack
import schemes.blockwise_fp8  # noqa: F401 - registers the scheme

pytestmark = [
    pytest.mark.thorough,
    pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here"),
]
KILLS = 200

#: Imports once and forks a child for each kill: hundreds of them take seconds. Prints
#: how each child ended and whether the old file or the new is there then.
SERVER = """
import hashlib, json, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)  # threads do not survive a fork
import hijack, schemes.blockwise_fp8

name, old, new, target, words, kills = sys.argv[1:]
target, words, call = Path(target), json.loads(words), getattr(hijack, name)
words["overwrite"] = True
index = target.with_name(target.name + ".index.json")

def content():
    files = [target]
    if "max_shard_size" in words:
        where = json.loads(index.read_text())["weight_map"]
        files = [target.with_name(shard) for shard in sorted(set(where.values()))]
    data = b"".join(file.read_bytes() for file in files)
    return hashlib.sha256(data).hexdigest()

def run(source, delay=None):
    start, child = time.perf_counter(), os.fork()
    if not child:
        try:
            call(source, target, **words)
        except BaseException as error:
            print(error, file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    if delay is not None:
        time.sleep(delay)
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return status, time.perf_counter() - start

random.seed(0)
call(new, target, **words)  # imports what torch imports late, for all children
whole = content()
longest = sorted(run(new)[1] for _ in range(3))[1]
run(old)
before = content()
assert before != whole
states = {before: "old", whole: "new"}
for _ in range(int(kills)):
    status, _ = run(new, random.uniform(0, longest))
    # how long a run takes varies with the machine: half of them shall be hit
    longest *= 1.03 if status else 0.97
    state = states.get(content(), "neither")
    print(json.dumps([status, state]), flush=True)
    if state == "new":
        run(old)
assert run(new)[0] == 0
assert content() == whole
"""


@pytest.fixture
def checkpoints(tmp_path):
    """Two dense checkpoints that take some dozens of milliseconds, as old and new."""
    paths = [tmp_path / "old.safetensors", tmp_path / "new.safetensors"]
    for seed, path in enumerate(paths):
        torch.manual_seed(seed)
        tensors = {f"l{i}.weight": torch.randn(256, 512).bfloat16() for i in range(12)}
        save_file(tensors, path)
    return paths


def kill_often(name, old, new, folder, words):
    """Kill a program that replaces a file many times; how often it left what."""
    folder.mkdir()
    sent = (name, old, new, folder / "t.safetensors", json.dumps(words), str(KILLS))
    done = subprocess.run(
        [sys.executable, "-c", SERVER, *sent],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])},
    )
    assert done.returncode == 0, done.stderr
    return collections.Counter(map(tuple, map(json.loads, done.stdout.splitlines())))


def check(ends, folder):
    """Nothing but the old and the new was seen, and kills hit while it was written."""
    assert sum(ends.values()) == KILLS
    assert {state for _, state in ends} <= {"old", "new"}
    assert {status for status, _ in ends} <= {0, -9}
    assert ends[-9, "old"] > KILLS // 5
    assert ends[0, "old"] == 0
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("words", [{}, {"max_shard_size": "400KB"}], ids=str)
def test_quantize_killed_at_any_moment_leaves_the_old_or_the_new(
    checkpoints, tmp_path, words
):
    """A file or a set of shards; the next run removes what was not finished."""
    folder = tmp_path / "out"
    check(kill_often("quantize_file", *checkpoints, folder, words), folder)
    files = {path.name for path in folder.iterdir()}
    if "max_shard_size" in words:
        index = json.loads((folder / "t.safetensors.index.json").read_text())
        assert files == {"t.safetensors.index.json", *index["weight_map"].values()}
    else:
        assert files == {"t.safetensors"}


def test_convert_killed_at_any_moment_leaves_the_old_or_the_new(checkpoints, tmp_path):
    """What is quantized already is safe, too."""
    coded = []
    for path in checkpoints:
        coded.append(path.with_name(f"q-{path.name}"))
        hijack.quantize_file(path, coded[-1])
    folder = tmp_path / "out"
    check(kill_often("convert_file", *coded, folder, {"dialect": "deepseek"}), folder)
