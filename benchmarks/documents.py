"""Write the figures of a run into README.md and docs/benchmarks.md.

::

    python -m benchmarks --out FOLDER
    python -m benchmarks.documents FOLDER

takes over FOLDER's run: its JSON becomes docs/benchmarks.json, its charts go to
docs/charts/; so does `gpu.json` of ``python -m benchmarks.gpu``, if it is there, as
docs/benchmarks-gpu.json. Without FOLDER the documents are written again from what is
there. Only what stands between ``<!-- NAME -->`` and ``<!-- /NAME -->`` is changed.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Collection, Iterator
from pathlib import Path

from benchmarks import report
from benchmarks.harness import Cell, Row, Run, from_json
from benchmarks.timing import Spread

ROOT = Path(__file__).resolve().parents[1]
CPU, GPU = "docs/benchmarks.json", "docs/benchmarks-gpu.json"
CHARTS = "charts"
#: Benchmarks whose tables stand in docs/benchmarks.md; others have pages of their own.
SHOWN = ("forward", "formats", "lora", "quantize", "load", "overhead", "comfyui")
SHOWN_OF_GPU = (
    *("forward", "formats", "launches", "model", "quantize", "kernels", "lora"),
)


def read(path: Path) -> Run:
    """A committed run."""
    return from_json(json.loads(path.read_text("utf-8")))


def take(folder: Path, root: Path = ROOT) -> None:
    """Copy a run's JSON and charts into docs/.

    Raises:
        SystemExit: if there is no run in the folder.
    """
    charts = root / "docs" / CHARTS
    runs = {folder / f"{report.NAME}.json": CPU, folder / "gpu.json": GPU}
    found = [path for path in runs if path.exists()]
    if not found:
        raise SystemExit(f"{folder}: has neither of {[path.name for path in runs]}")
    for path in found:
        shutil.copy(path, root / runs[path])
    charts.mkdir(exist_ok=True)
    for name in SHOWN:
        if (folder / f"{name}.png").exists():
            shutil.copy(folder / f"{name}.png", charts)


def texts(root: Path = ROOT) -> dict[Path, str]:
    """Each document with the figures of the committed runs in it."""
    run, charts = read(root / CPU), root / "docs" / CHARTS
    readme, page = root / "README.md", root / "docs/benchmarks.md"
    text = between(page.read_text("utf-8"), "benchmarks", details(run, SHOWN, charts))
    return {
        readme: between(readme.read_text("utf-8"), "benchmarks", summary(run)),
        page: between(text, "gpu", of_gpu(root / GPU)),
    }


def between(document: str, name: str, text: str) -> str:
    """A document with another text between its marks of that name.

    Raises:
        ValueError: if the marks are not there once each.
    """
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    if document.count(begin) != 1 or document.count(end) != 1:
        raise ValueError(f"expected {begin} and {end} once each in the document")
    before, _, rest = document.partition(begin)
    _, _, after = rest.partition(end)
    return f"{before}{begin}\n{text.strip()}\n{end}{after}"


def of_gpu(path: Path) -> str:
    """The tables of a run on a GPU, and how many checks passed."""
    if not path.exists():
        return "Nothing has been measured on a GPU since the tables below were made."
    run = read(path)
    found = [
        row["result"] for each in run.results for row in each.rows if "result" in row
    ]
    checks = f"{len(found)} checks, of which {found.count('ok')} passed."
    return f"{checks}\n\n{details(run, SHOWN_OF_GPU, path.parent / 'none')}"


def details(run: Run, names: Collection[str], charts: Path) -> str:
    """The tables of some benchmarks, as docs/benchmarks.md has them."""
    chosen = Run(run.machine, run.versions, run.date, run.quick)
    chosen.results = [each for each in run.results if each.name in names]
    drawn = {path.stem for path in charts.glob("*.png")} if charts.is_dir() else set()
    return report.markdown(chosen, "###", CHARTS, drawn)


# -- the README's tables ---------------------------------------------------------------


def summary(run: Run) -> str:
    """What the README says of speed."""
    parts = [report.QUICK] if run.quick else []
    forward = list(forward_rows(run))
    if forward:
        parts.append("\n".join(report.table(forward)))
    others = list(other_rows(run))
    if others:
        parts.append("\n".join(report.table(others)))
    parts.append(
        f"Made on {run.machine}, {run.date}; [all figures](docs/benchmarks.md)."
    )
    return "\n\n".join(parts)


def forward_rows(run: Run) -> Iterator[Row]:
    """The first layer in blocks of 1 x 64 on one thread: a row a program."""
    rows = [r for r in run.of("forward") if (r["block"], r["threads"]) == ("1x64", 1)]
    rows = [row for row in rows if row["layer"] == rows[0]["layer"]]
    if not rows:
        return
    title = f"FP8 Linear {rows[0]['layer']}, one thread: time over bfloat16"
    for name in ("hijack", "musubi-tuner", "naive"):
        if any(row.get(name) is not None for row in rows):
            yield {
                title: name,
                **{f"M = {row['M']}": middle(row, name) for row in rows},
            }


def other_rows(run: Run) -> Iterator[Row]:
    """One line for each of the other benchmarks."""

    def line(what: str, figure: str, *beside: str) -> Row:
        return {
            "what": what,
            "hijack": figure,
            "beside": "; ".join(filter(None, beside)),
        }

    for row in _of(run, "quantize", program="hijack", blocks="1x64"):
        search = f", {row['candidates']} scales tried" if row["candidates"] else ""
        yield line(
            f"quantizing a file, {_threads(row)}{search}",
            f"{middle(row, 'GB/s')} GB/s",
            times(row, "musubi-tuner / this", "as fast as musubi-tuner"),
            f"{report.cell_text(row['anonymous MB'])} MB of memory",
        )
    for row in run.of("load"):
        if "copying / this" in row:
            yield line(
                f"{row['what']}, {report.cell_text(row['GB'])} GB",
                f"{middle(row, 'ms')} ms",
                times(row, "copying / this", "as fast as copying"),
                f"{report.cell_text(row['anonymous MB'])} MB of memory",
            )
    for row in _of(run, "comfyui", model="quantized"):
        yield line(
            f"a block of Qwen-Image in ComfyUI, {row['dtype']}, {row['tokens']} tokens",
            f"{middle(row, 'over dense')} of the dense time",
            times(row, "ComfyUI-musubi / this", "as fast as ComfyUI-musubi"),
        )
    loras = _of(run, "lora", threads=1)
    for row in loras[-1:]:
        yield line(
            f"a LoRA of rank 32 on {row['layer']}, M = {row['M']}",
            f"{middle(row, '1 LoRA / none')} of the time without",
            f"three: {middle(row, '3 LoRAs / none')}",
        )
    for row in run.of("overhead")[-1:]:
        more = middle(row, "more than plain, us")
        yield line("a call of a wrapped module, 20 plugins", f"{more} us more")


def _threads(row: Row) -> str:
    return "one thread" if row["threads"] == 1 else f"{row['threads']} threads"


def _of(run: Run, name: str, **cells: Cell) -> list[Row]:
    """Rows of a benchmark that have those cells."""
    return [
        row
        for row in run.of(name)
        if all(row.get(column) == cell for column, cell in cells.items())
    ]


def middle(row: Row, column: str) -> str:
    """The median of a cell, as a table shows it."""
    cell = row.get(column)
    return report.cell_text(cell.median if isinstance(cell, Spread) else cell)


def times(row: Row, column: str, what: str) -> str:
    """``3.4 times as fast as``, or nothing where that was not measured."""
    return f"{middle(row, column)} times {what}" if row.get(column) is not None else ""


def main(words: list[str]) -> None:
    """Take over a run if one is named, and write the documents."""
    if words:
        take(Path(words[0]))
    for path, text in texts().items():
        path.write_text(text, "utf-8")
        print(f"written: {path.relative_to(ROOT)}")


if __name__ == "__main__":
    main(sys.argv[1:])
