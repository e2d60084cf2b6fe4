"""What a benchmark is, and how one is run: it yields rows, the harness keeps them."""

from __future__ import annotations

import dataclasses
import datetime
import importlib.metadata
import os
import platform
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.timing import Spread, machine

#: What stands in a table: text, a figure, a figure with its spread, or nothing.
Cell = str | int | float | Spread | None
#: Column to cell.
Row = Mapping[str, Cell]
#: Packages whose versions are noted, where they are installed.
PACKAGES = (
    *("torch", "llvmlite", "triton", "safetensors", "comfy-kitchen"),
    *("torchao", "bitsandbytes", "sdnq"),
)
#: The folders of ComfyUIs, joined by the path separator, as for the tests.
COMFYUI = "HIJACK_TEST_COMFYUI"


@dataclasses.dataclass(frozen=True)
class Missing:
    """Something that was not measured.

    Attributes:
        what: it was.
        why: not.
    """

    what: str
    why: str


class OutOfTimeError(BaseException):
    """A benchmark's time is over; no handler of what it measures may take it."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """What the user asks of every benchmark.

    Attributes:
        quick: whether small shapes and few rounds will do, to see that it runs.
        threads: numbers of threads to measure with.
        rounds: of alternating runs, or None for what the benchmark thinks right.
        comfyui: folders of ComfyUIs, the newest last.
        folder: where large files may be written, or None for the system's.
        device: of those benchmarks that run on several kinds.
    """

    quick: bool = False
    threads: tuple[int, ...] = (1,)
    rounds: int | None = None
    comfyui: tuple[str, ...] = ()
    folder: str | None = None
    device: str = "cpu"

    def rounds_or(self, usual: int) -> int:
        """How many rounds: what the user says, three in quick runs, or the usual."""
        return self.rounds or (3 if self.quick else usual)


@dataclasses.dataclass(frozen=True)
class Chart:
    """A picture of a benchmark's rows: lines over ``x``, one panel for each group.

    Attributes:
        x: column of numbers.
        lines: columns that become lines; None for all with spreads, but for those with
            a unit or a divisor in their name.
        panels: columns whose values share a panel.
        label: of the upright axis.
    """

    x: str
    panels: tuple[str, ...]
    label: str
    lines: tuple[str, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Benchmark:
    """Something that can be measured.

    Attributes:
        name: on the command line.
        about: a sentence.
        measure: yields rows, and what could not be measured.
        needs: in words.
        refuses: says why it cannot run at all, or None.
        chart: of its rows.
        budget: seconds it may take, where time is short.
    """

    name: str
    about: str
    measure: Callable[[Setting], Iterator[Row | Missing]]
    needs: str = "nothing"
    refuses: Callable[[Setting], str | None] = lambda setting: None
    chart: Chart | None = None
    budget: int = 60


@dataclasses.dataclass
class Result:
    """What came of a benchmark.

    Attributes:
        name: of the benchmark.
        about: its sentence.
        rows: in the order they were measured.
        missing: what was not.
        seconds: that it took.
        chart: of the rows.
    """

    name: str
    about: str
    rows: list[Row] = dataclasses.field(default_factory=list)
    missing: list[Missing] = dataclasses.field(default_factory=list)
    seconds: float = 0.0
    chart: Chart | None = None

    def take(self, found: Row | Missing) -> None:
        """Keep what a benchmark yields."""
        if isinstance(found, Missing):
            self.missing.append(found)
        else:
            self.rows.append(found)


@dataclasses.dataclass
class Run:
    """All results of one command.

    Attributes:
        machine: where it ran.
        versions: of what it ran with.
        date: in UTC.
        quick: whether the figures mean nothing but that everything runs.
        results: of the benchmarks.
    """

    machine: str
    versions: dict[str, str]
    date: str
    quick: bool
    results: list[Result] = dataclasses.field(default_factory=list)

    def of(self, name: str) -> list[Row]:
        """The rows of one benchmark; none if it did not run."""
        return [row for each in self.results if each.name == name for row in each.rows]


def new_run(quick: bool) -> Run:
    """A run on this machine, now, with no results yet."""
    versions = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    now = datetime.datetime.now(datetime.timezone.utc)
    where = f"{machine()}; {os.cpu_count()} cores"
    return Run(where, versions, f"{now:%Y-%m-%d %H:%M} UTC", quick)


def run(
    benchmark: Benchmark,
    setting: Setting,
    tell: Callable[[Row | Missing], None] = lambda found: None,
) -> Result:
    """Run one benchmark in this process.

    A benchmark that fails keeps the rows it had, and the failure is named.

    Args:
        benchmark: to run.
        setting: for it.
        tell: is called with everything as it comes.
    """
    result = Result(benchmark.name, benchmark.about, chart=benchmark.chart)

    def take(found: Row | Missing) -> None:
        result.take(found)
        tell(found)

    start = time.perf_counter()
    why = benchmark.refuses(setting)
    if why is not None:
        take(Missing(benchmark.name, why))
        return result
    try:
        for found in benchmark.measure(setting):
            take(found)
    except (Exception, OutOfTimeError) as error:
        traceback.print_exc()
        take(Missing("the rest", f"{type(error).__name__}: {first_line(error)}"))
    result.seconds = time.perf_counter() - start
    return result


def first_line(error: BaseException) -> str:
    """What an exception says first, and something in any case."""
    lines = (line.strip() for line in str(error).splitlines())
    return next(filter(None, lines), repr(error))[:300]


def find_comfyui() -> tuple[str, ...]:
    """The ComfyUIs of this machine, by version."""
    listed = os.environ.get(COMFYUI)
    if listed is not None:
        roots = [Path(each) for each in listed.split(os.pathsep) if each]
    else:
        roots = list((Path.home() / "comfy").glob("ComfyUI*"))
    known = [str(root) for root in roots if (root / "comfyui_version.py").is_file()]
    return tuple(sorted(known, key=comfyui_order))


def comfyui_version(root: str) -> str:
    """The version a ComfyUI says it is."""
    text = (Path(root) / "comfyui_version.py").read_text("utf-8")
    return text.partition('__version__ = "')[2].partition('"')[0]


def comfyui_order(root: str) -> list[int]:
    """The numbers of its version, to sort by."""
    return [int(part) for part in comfyui_version(root).split(".")]


# -- JSON ------------------------------------------------------------------------------


def to_json(run: Run) -> dict[str, Any]:
    """A run as plain lists, dicts, text and numbers."""
    results = [result_to_json(result) for result in run.results]
    return {**dataclasses.asdict(run), "results": results}


def result_to_json(result: Result) -> dict[str, Any]:
    """One result likewise."""
    return {
        **{"name": result.name, "about": result.about},
        "seconds": round(result.seconds, 1),
        "chart": None if result.chart is None else dataclasses.asdict(result.chart),
        "rows": [row_to_json(row) for row in result.rows],
        "missing": [dataclasses.asdict(each) for each in result.missing],
    }


def row_to_json(row: Row) -> dict[str, Any]:
    """A row; figures have four digits, and a spread says that it is one."""
    return {column: _cell_to_json(cell) for column, cell in row.items()}


def entry(found: Row | Missing) -> dict[str, Any]:
    """Something that a benchmark yielded, for a file that another process reads."""
    if isinstance(found, Missing):
        return {"missing": dataclasses.asdict(found)}
    return {"row": row_to_json(found)}


def unfinished(
    benchmark: Benchmark, entries: Iterable[Mapping[str, Any]], why: str
) -> Result:
    """The result of a benchmark whose process has ended too early.

    Args:
        benchmark: that it was.
        entries: what it had yielded; others are passed over.
        why: it ended.
    """
    result = Result(benchmark.name, benchmark.about, chart=benchmark.chart)
    for each in entries:
        if "row" in each:
            result.take(row_from_json(each["row"]))
        if "missing" in each:
            result.take(Missing(**each["missing"]))
    result.take(Missing("the rest", why))
    return result


def from_json(data: Mapping[str, Any]) -> Run:
    """The inverse of `to_json`, but for the digits."""
    return Run(**{**data, "results": [result_from_json(e) for e in data["results"]]})


def result_from_json(data: Mapping[str, Any]) -> Result:
    """The inverse of `result_to_json`."""
    chart = data["chart"]
    return Result(
        data["name"],
        data["about"],
        [row_from_json(row) for row in data["rows"]],
        [Missing(**each) for each in data["missing"]],
        data["seconds"],
        None if chart is None else _chart_from_json(chart),
    )


def row_from_json(data: Mapping[str, Any]) -> Row:
    """The inverse of `row_to_json`."""
    return {c: Spread(**v) if isinstance(v, dict) else v for c, v in data.items()}


def _chart_from_json(data: Mapping[str, Any]) -> Chart:
    lists = {k: tuple(v) if isinstance(v, list) else v for k, v in data.items()}
    return Chart(**lists)


def _cell_to_json(cell: Cell) -> object:
    if isinstance(cell, Spread):
        low, high = _rounded(cell.low), _rounded(cell.high)
        middle = {"median": _rounded(cell.median), "low": low, "high": high}
        return {**middle, "rounds": cell.rounds}
    return _rounded(cell) if isinstance(cell, float) else cell


def _rounded(figure: float) -> float:
    return float(f"{figure:.4g}")
