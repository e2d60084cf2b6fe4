"""The benchmarks: what is computed from times, what is written, and that all runs."""

import itertools
import json
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as command
from benchmarks import documents, forward, peers, report, timing
from benchmarks.gpu import __main__ as gpu
from benchmarks.gpu import checks
from benchmarks.gpu.subjects import make_layer
from benchmarks.harness import (
    Benchmark,
    Chart,
    Missing,
    Result,
    Run,
    Setting,
    entry,
    from_json,
    run,
    to_json,
    unfinished,
)
from benchmarks.kernels import KINDS, block_scaled, plain_decode, random_weight
from benchmarks.timing import Spread, alternate, ratio, spread
from hijack.kernels import Kernel

QUICK = Setting(quick=True, rounds=1)


@pytest.fixture(autouse=True)
def _same_threads():
    """Benchmarks set the number of threads of their own process."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def clock(monkeypatch):
    """A clock that only moves when it is told to."""
    now = SimpleNamespace(seconds=0.0)
    fake = SimpleNamespace(perf_counter=lambda: now.seconds)
    monkeypatch.setattr(timing, "time", fake)
    return now


def small_run():
    """Results of every kind."""
    chart = Chart("M", ("layer",), "time / bfloat16")
    forwards = [
        {"layer": "4 -> 8", "block": "1x64", "threads": 1, "M": m, "hijack": figure}
        for m, figure in (
            (1, Spread(4.0, 3.5, 4.25, 9)),
            (16, Spread(3.0, 3.0, 3.0, 1)),
        )
    ]
    results = [
        Result("forward", "Of a Linear.", forwards, [Missing("x", "no y")], 1.5, chart),
        Result("other", "Of another.", [{"what": "a|b", "n": 3, "nothing": None}]),
    ]
    return Run("a machine", {"torch": "2"}, "2026-11-28 12:00 UTC", False, results)


def test_a_ratio_is_that_of_each_round(clock):
    """What slows a whole round down does not change the ratio, nor its spread."""
    load = itertools.cycle([1.0, 7.0, 0.5])
    turns = {}

    def work(seconds):
        def call(turn):
            turns.setdefault(turn, next(load))
            clock.seconds += seconds * turns[turn]

        return call

    seconds = alternate({"fast": work(1.0), "slow": work(2.5)}, rounds=6)
    assert len(seconds["fast"]) == 6
    assert len(set(seconds["fast"])) == 3
    assert ratio(seconds["slow"], seconds["fast"]) == Spread(2.5, 2.5, 2.5, 6)


def test_calls_in_a_row_are_timed_as_one(clock):
    """Seconds are those of one call, and calls are numbered through."""
    numbers = []

    def call(number):
        numbers.append(number)
        clock.seconds += 3.0

    assert alternate({"f": call}, rounds=2, repeat=4)["f"] == [3.0, 3.0]
    assert numbers == list(range(12))


def test_a_spread_is_the_median_and_the_quartiles():
    """Order and outliers do not matter; a single value is all three."""
    assert spread([9.0, 1.0, 3.0, 2.0, 1000.0]) == Spread(3.0, 2.0, 9.0, 5)
    assert spread([5.0]) == Spread(5.0, 5.0, 5.0, 1)
    assert f"{spread([1.0, 2.0, 3.0]):.1f}" == "2.0"


def test_a_run_survives_json():
    """Rows, spreads, charts and what is missing come back as they were."""
    before = small_run()
    assert from_json(json.loads(json.dumps(to_json(before)))) == before


def test_markdown_has_figures_spread_and_what_is_missing(tmp_path):
    """Also the machine; and a quick run says that it is one."""
    report.write(small_run(), tmp_path)
    text = (tmp_path / "benchmarks.md").read_text()
    assert "| 4 -> 8 | 1x64 | 1 | 1 | 4.00 (3.50 to 4.25) |" in text
    assert "| 4 -> 8 | 1x64 | 1 | 16 | 3.00 |" in text
    assert "| a/b | 3 | - |" in text
    assert "- x: no y" in text
    assert "> a machine; 2026-11-28 12:00 UTC" in text
    assert report.QUICK not in text
    quick = small_run()
    quick.quick = True
    assert report.QUICK in report.markdown(quick)
    assert from_json(json.loads((tmp_path / "benchmarks.json").read_text())).results


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (1234.5, "1234"),
        (99.96, "100"),
        (12.34, "12.3"),
        (1.0, "1.00"),
        (0.026, "0.026"),
    ],
)
def test_figures_have_three_digits(value, text):
    """Large and small ones alike."""
    assert report.figure(value) == text


def test_charts_are_drawn_and_linked(tmp_path):
    """One picture for each benchmark that asks for it."""
    pytest.importorskip("matplotlib")
    assert report.draw(small_run(), tmp_path) is None
    report.write(small_run(), tmp_path)
    assert [path.name for path in tmp_path.glob("*.png")] == ["forward.png"]
    assert "![forward](./forward.png)" in (tmp_path / "benchmarks.md").read_text()


def test_without_matplotlib_there_are_tables_and_a_reason(tmp_path, monkeypatch):
    """Charts need the extra `cli`."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install" in report.draw(small_run(), tmp_path)


def test_a_failing_benchmark_keeps_its_rows():
    """What it had measured stays, and the failure is named."""

    def measure(setting):
        yield {"a": 1}
        yield Missing("b", "no b")
        raise ValueError("broken\nin two lines")

    told = []
    result = run(Benchmark("x", "About.", measure), QUICK, told.append)
    assert result.rows == [{"a": 1}]
    assert result.missing[0] == Missing("b", "no b")
    assert result.missing[1] == Missing("the rest", "ValueError: broken")
    assert told == [{"a": 1}, *result.missing]


def test_a_benchmark_that_cannot_run_says_why():
    """It is not begun."""
    never = Benchmark("x", "About.", lambda s: 1 / 0, refuses=lambda s: "no x here")
    assert run(never, QUICK).missing == [Missing("x", "no x here")]


def test_a_process_that_dies_leaves_what_it_had_yielded():
    """Rows and what was missing, in order, and how it ended."""
    benchmark = Benchmark("x", "About.", lambda s: iter(()))
    entries = [entry({"a": Spread(1.0, 1.0, 2.0, 3)}), entry(Missing("b", "no b"))]
    result = unfinished(benchmark, [{"start": None}, *entries], "it ended with -9")
    assert result.rows == [{"a": Spread(1.0, 1.0, 2.0, 3)}]
    assert result.missing == [
        Missing("b", "no b"),
        Missing("the rest", "it ended with -9"),
    ]


@pytest.mark.parametrize("name", command.NAMES)
def test_every_benchmark_declares_itself(name):
    """Its name is its module's, and it says in a sentence what it measures."""
    benchmark = command.find(name)
    assert benchmark.name == name
    assert benchmark.about.endswith(".")


def test_a_quick_benchmark_in_this_process(tmp_path):
    """`overhead` yields its rows, and each is in the file as soon as it is there."""
    path = tmp_path / "result"
    command.child("overhead", path, QUICK)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [line["row"] for line in lines if "row" in line]
    assert lines[-1]["result"]["rows"] == rows
    assert len(rows) == 4
    assert rows[-1]["least, us"] > 0


def test_benchmarks_can_be_added_to_a_run(tmp_path, monkeypatch):
    """They replace those of their name; a run of another machine is not mixed in."""

    def measured(what):
        return lambda name, words: Result(name, "About.", [{"what": what}])

    words = ["--quick", "--out", str(tmp_path)]
    for names, what in ((["load", "lora"], "old"), (["load", "--add"], "new")):
        monkeypatch.setattr(command, "in_a_process", measured(what))
        assert command.main([*names, *words]) == 0
    found = from_json(json.loads((tmp_path / "benchmarks.json").read_text()))
    assert [(r.name, r.rows[0]["what"]) for r in found.results] == [
        ("lora", "old"),
        ("load", "new"),
    ]
    with pytest.raises(SystemExit, match="quick was True"):
        command.main(["load", "--add", "--out", str(tmp_path)])


def test_forwards_are_compared_before_they_are_timed(monkeypatch):
    """One that computes something else, or fails, is named and left out."""
    monkeypatch.delenv(peers.MUSUBI, raising=False)
    with torch.inference_mode():
        pool = forward.make_pool(128, 256, (1, 64), 0)
        right = pool.runs["hijack"]
        pool.runs["wrong"] = [lambda x: right[0](x) * 1.1]
        pool.runs["fails"] = [lambda x: x @ x]
        found = list(forward.measure_pool(pool, {}, [4], QUICK))
    missing = [each.what for each in found if isinstance(each, Missing)]
    (row,) = (each for each in found if not isinstance(each, Missing))
    assert missing == ["wrong", "fails"]
    assert {"hijack", "naive"} <= row.keys()
    assert not {"wrong", "fails"} & row.keys()


@pytest.mark.parametrize(
    "title", ["fp8 1x64", "fp8 128x128", "int8 row", "nvfp4", "nf4"]
)
def test_weights_for_kernels_are_those_of_the_layers(title):
    """The formula for kernels gives the bits that the scheme gives."""
    layer = make_layer(title, 256, 384, "cpu")
    for dtype in (torch.float32, torch.bfloat16):
        expected = layer.weight.dense(dtype)
        assert torch.equal(plain_decode(block_scaled(layer), dtype), expected)


@pytest.mark.parametrize("kind", KINDS)
def test_random_weights_have_every_finite_code(kind):
    """And decode to finite numbers, ragged ones too."""
    weight = random_weight(kind, 300, 520, "cpu")
    assert weight.shape == (300, 520)
    codes = weight.codes.view(torch.uint8).unique()
    first = {torch.float8_e4m3fn: 254, torch.float8_e5m2: 248}
    assert len(codes) == first.get(weight.codes.dtype, 256)
    assert plain_decode(weight, torch.bfloat16).isfinite().all()


def test_a_wrong_kernel_fails_its_checks(monkeypatch):
    """One bit of one weight, or a product that is off, is found; a right one passes."""

    def decode(weight, out):
        out.copy_(plain_decode(weight, out.dtype))

    def decode_wrong(weight, out):
        decode(weight, out)
        out[5, 7] += 1

    def linear(x, weight, bias):
        return torch.nn.functional.linear(x, plain_decode(weight, x.dtype), bias)

    def only_bfloat16(weight, dtype):
        return None if dtype == torch.bfloat16 else "only bfloat16"

    parts = {
        "right": (decode, linear),
        "wrong": (decode_wrong, lambda x, w, b: linear(x, w, b) * 1.1),
    }
    found = {
        name: Kernel(name, ("cpu",), only_bfloat16, f, d)
        for name, (d, f) in parts.items()
    }
    monkeypatch.setattr(checks, "kernels", lambda device: found)
    for step in (checks.DECODE, checks.LINEAR):
        result = run(step, QUICK)
        for name, passes in (("right", True), ("wrong", False)):
            passed = [r["result"] == "ok" for r in result.rows if r["kernel"] == name]
            assert passed == [passes] * len(KINDS)
        failed = gpu.failures(Run("", {}, "", True, [result]))
        assert len(failed) == len(KINDS)


# -- the documents ---------------------------------------------------------------------


def test_the_documents_have_the_figures_of_the_committed_run():
    """README.md and docs/benchmarks.md are what the command writes."""
    for path, text in documents.texts().items():
        assert path.read_text("utf-8") == text, "run python -m benchmarks.documents"


def test_a_run_goes_into_the_documents_and_nothing_else_changes(tmp_path):
    """Figures stand between the marks; a new run replaces them."""
    root = tmp_path / "root"
    (root / "docs").mkdir(parents=True)
    marks = "<!-- benchmarks -->\nold\n<!-- /benchmarks -->\n"
    (root / "README.md").write_text(f"before\n{marks}after\n")
    page = f"before\n{marks}\n<!-- gpu -->\n<!-- /gpu -->\nafter\n"
    (root / "docs/benchmarks.md").write_text(page)
    report.write(small_run(), tmp_path)
    documents.take(tmp_path, root)
    texts = documents.texts(root)
    readme = texts[root / "README.md"]
    assert readme.startswith("before\n<!-- benchmarks -->\n")
    assert readme.endswith("<!-- /benchmarks -->\nafter\n")
    assert "| hijack | 4.00 | 3.00 |" in readme
    assert "old" not in readme
    assert "### forward" in texts[root / "docs/benchmarks.md"]
    assert "### other" not in texts[root / "docs/benchmarks.md"]
    with pytest.raises(ValueError, match="once each"):
        documents.between("no marks", "gpu", "text")


# -- the command for GPUs --------------------------------------------------------------


def watched(tmp_path, script, names, end=60.0):
    """What the watching process makes of a script that writes entries."""
    path = tmp_path / "rows"
    path.touch()
    code = f"import json, sys, time\nfile = open({str(path)!r}, 'a', buffering=1)\n"
    code += "put = lambda n, **d: file.write(json.dumps({'name': n, **d}) + '\\n')\n"
    process = subprocess.Popen([sys.executable, "-c", code + script])
    waiting = [Benchmark(n, "About.", lambda s: iter(()), budget=0) for n in names]
    try:
        found = list(gpu._watch(process, path, waiting, time.monotonic() + end))
    finally:
        process.kill()
        process.wait()
    return found, [step.name for step in waiting]


def ends(name):
    """The line of a script that says that a step has ended."""
    empty = {"name": name, "about": "", "rows": [], "missing": []}
    return f"put({name!r}, result={ {**empty, 'seconds': 1, 'chart': None} })"


def test_a_step_that_kills_its_process_is_named_and_the_next_is_left(tmp_path):
    """What it had measured is kept, and another process may go on."""
    script = f"{ends('a')}; put('b', start=0); put('b', row={{'x': 1}})"
    found, left = watched(tmp_path, f"{script}; sys.exit(3)", "abc")
    assert [result.name for result in found] == ["a", "b"]
    assert found[1].rows == [{"x": 1}]
    assert found[1].missing == [Missing("the rest", "its process ended with 3")]
    assert left == ["c"]


def test_a_step_that_never_began_is_not_blamed(tmp_path):
    """A process that gives up after a step leaves the next to another."""
    found, left = watched(tmp_path, ends("a"), "ab")
    assert [result.name for result in found] == ["a"]
    assert left == ["b"]


def test_a_step_that_hangs_is_given_up(tmp_path, monkeypatch):
    """When its time and the grace are over."""
    monkeypatch.setattr(gpu, "GRACE", 0.2)
    script = "put('a', start=0); time.sleep(60)"
    found, left = watched(tmp_path, script, "ab")
    assert "was killed after" in found[0].missing[0].why
    assert left == ["b"]
    found, left = watched(tmp_path, script, "ab", end=0.0)
    assert [each.missing[-1].why for each in found] == ["no time was left"] * 2
    assert left == []


@pytest.mark.skipif(not hasattr(signal, "SIGALRM"), reason="the system has no alarms")
def test_a_step_out_of_time_keeps_its_rows():
    """Also where it handles every error of what it measures."""

    def measure(setting):
        yield {"a": 1}
        outcome = checks.outcome(lambda: time.sleep(60) or "")
        yield {"a": outcome}

    with gpu._alarm(1):
        result = run(Benchmark("x", "About.", measure), QUICK)
    assert result.rows == [{"a": 1}]
    assert "over its 1 seconds" in result.missing[0].why


def test_the_rehearsal_runs_every_step(tmp_path, monkeypatch):
    """On a CPU every step has figures, or says that it needs a GPU."""
    monkeypatch.delenv(peers.MUSUBI, raising=False)
    assert gpu.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 0
    everything = from_json(json.loads((tmp_path / "gpu.json").read_text()))
    assert [each.name for each in everything.results] == [s.name for s in gpu.STEPS]
    for result in everything.results:
        assert result.rows or result.missing
        reasons = [each.why for each in result.missing]
        assert not [why for why in reasons if "Error" in why]
    assert (tmp_path / "gpu.md").exists()
