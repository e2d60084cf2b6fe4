"""A run as files: JSON, Markdown tables, and a chart of each benchmark."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

from benchmarks.harness import Cell, Chart, Missing, Result, Row, Run, to_json
from benchmarks.timing import Spread

NAME = "benchmarks"
QUICK = "**A quick run, to see that everything runs: these figures compare nothing.**"


def write(run: Run, folder: Path, name: str = NAME) -> None:
    """Write what there is so far: ``name``.json and ``name``.md."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(to_json(run), indent=1)
    (folder / f"{name}.json").write_text(f"{text}\n", "utf-8")
    names = (each.name for each in run.results)
    text = markdown(run, drawn={n for n in names if (folder / f"{n}.png").exists()})
    (folder / f"{name}.md").write_text(f"# Benchmarks\n\n{text}", "utf-8")


def markdown(
    run: Run, heading: str = "##", folder: str = ".", drawn: Collection[str] = ()
) -> str:
    """All tables, and what is missing and why.

    Args:
        run: what was measured.
        heading: of each benchmark.
        folder: of the charts, as the document links to them.
        drawn: names of the benchmarks that have a chart there.
    """
    parts = [f"> {run.machine}; {run.date}\n>\n> {versions(run)}\n"]
    if run.quick:
        parts.append(f"{QUICK}\n")
    parts.append(
        "Ratios are medians of the quotients of alternating rounds, with the quartiles "
        "in brackets.\n"
    )
    for result in run.results:
        parts.append(f"{heading} {result.name}\n\n{result.about}\n")
        if result.rows:
            parts.append("\n".join(table(result.rows)) + "\n")
        if result.name in drawn:
            parts.append(f"![{result.name}]({folder}/{result.name}.png)\n")
        if result.missing:
            lines = (f"- {each.what}: {each.why}" for each in result.missing)
            parts.append("Not measured:\n\n" + "\n".join(lines) + "\n")
    return "\n".join(parts)


def versions(run: Run) -> str:
    """What it ran with."""
    return ", ".join(f"{name} {version}" for name, version in run.versions.items())


def columns_of(rows: Sequence[Row]) -> list[str]:
    """Every column, in the order in which they first appear."""
    return list(dict.fromkeys(column for row in rows for column in row))


def table(rows: Sequence[Row]) -> Iterator[str]:
    """A Markdown table, line by line."""
    columns = columns_of(rows)
    yield f"| {' | '.join(columns)} |"
    text = [any(isinstance(row.get(c), str) for row in rows) for c in columns]
    yield f"|{'|'.join('---' if is_text else '---:' for is_text in text)}|"
    for row in rows:
        yield f"| {' | '.join(cell_text(row.get(c)) for c in columns)} |"


def cell_text(cell: Cell) -> str:
    """A cell as a table shows it."""
    if cell is None:
        return "-"
    if isinstance(cell, Spread):
        if cell.rounds == 1:
            return figure(cell.median)
        return f"{figure(cell.median)} ({figure(cell.low)} to {figure(cell.high)})"
    return figure(cell) if isinstance(cell, float) else str(cell).replace("|", "/")


def figure(value: float) -> str:
    """Three digits, but for the zeros in front: 0.026, 1.05, 12.3, 1234."""
    for least, digits in ((99.95, 0), (9.995, 1), (0.0995, 2)):
        if abs(value) >= least:
            return f"{value:.{digits}f}"
    return f"{value:.3f}"


def line(name: str, found: Row | Missing) -> str:
    """One row as it is shown while a benchmark runs."""
    if isinstance(found, Missing):
        return f"{name}: {found.what}: not measured: {found.why}"
    cells = ", ".join(f"{c} {cell_text(v)}" for c, v in found.items() if v is not None)
    return f"{name}: {cells}"


# -- charts ----------------------------------------------------------------------------


def draw(run: Run, folder: Path) -> str | None:
    """Write a PNG for each benchmark that has a chart.

    Returns:
        Why there are none, or None.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        return "matplotlib is not installed; pip install comfyui-hijack[cli]"
    mpl.use("Agg")
    for result in run.results:
        if result.chart is not None and result.rows:
            draw_one(result, result.chart, folder / f"{result.name}.png")
    return None


def draw_one(result: Result, chart: Chart, path: Path) -> None:
    """One picture: a panel for each group of rows, a line for each column."""
    from matplotlib import pyplot

    panels: dict[str, list[Row]] = {}
    for row in result.rows:
        names = [f"{c} {row.get(c)}" for c in chart.panels]
        panels.setdefault(", ".join(names), []).append(row)
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    figure, axes = pyplot.subplots(
        down, across, figsize=(5 * across, 3.6 * down), squeeze=False, sharey=True
    )
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, rows) in zip(axes.flat, panels.items(), strict=False):
        for column in chart.lines or _ratios(result.rows):
            cells = [(row[chart.x], row.get(column)) for row in rows]
            points = [(x, y) for x, y in cells if isinstance(y, Spread)]
            if points:
                x = [str(x) for x, _ in points]
                y = [y.median for _, y in points]
                below = [y.median - y.low for _, y in points]
                above = [y.high - y.median for _, y in points]
                axis.errorbar(x, y, (below, above), label=column, marker="o", capsize=2)
        axis.set_yscale("log")
        axis.set_title(title, fontsize=9)
        axis.set_xlabel(chart.x)
        axis.set_ylabel(chart.label)
        axis.grid(alpha=0.3)
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower center", ncols=6, fontsize=8)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _ratios(rows: Sequence[Row]) -> list[str]:
    """Columns of spreads, but for those with a unit or a divisor in their name."""
    return [
        column
        for column in columns_of(rows)
        if ", " not in column
        and " / " not in column
        and any(isinstance(row.get(column), Spread) for row in rows)
    ]
