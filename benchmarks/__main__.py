"""Measure hijack beside other programs: ``python -m benchmarks [NAME ...]``.

Without names everything runs that this machine can. Each benchmark runs in a process of
its own. ``--out`` gets `benchmarks.json`, `benchmarks.md` and charts, after each
benchmark; what cannot run is named there with the reason. ``python -m
benchmarks.documents FOLDER`` puts them into README.md and docs/.

Other programs are used where they are found: musubi-tuner and ComfyUI-musubi through
``HIJACK_PEER_MUSUBI`` and ``HIJACK_PEER_COMFYUI_MUSUBI``, the folders of checkouts;
torchao, comfy-kitchen, bitsandbytes and SDNQ where they can be imported; ComfyUIs as
the tests find them. Figures of a GPU are another command, ``python -m benchmarks.gpu``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from benchmarks import report
from benchmarks.harness import (
    Benchmark,
    Missing,
    Result,
    Row,
    Run,
    Setting,
    entry,
    find_comfyui,
    from_json,
    new_run,
    result_from_json,
    result_to_json,
    run,
    unfinished,
)

#: Every benchmark, in the order in which they run; each is a module of this package.
NAMES = (
    *("forward", "formats", "lora", "quantize", "load", "overhead"),
    *("comfyui", "comfyui_musubi", "identify", "streaming", "scale_search"),
    *("schemes", "minilm", "alternatives", "training"),
)


def find(name: str) -> Benchmark:
    """The benchmark of that name."""
    found: Benchmark = importlib.import_module(f"benchmarks.{name}").BENCHMARK
    return found


def parser() -> argparse.ArgumentParser:
    """The command line."""
    words = argparse.ArgumentParser("python -m benchmarks", description=__doc__)
    words.formatter_class = argparse.RawDescriptionHelpFormatter
    words.add_argument("names", nargs="*", metavar="NAME", help="see --list")
    words.add_argument("--quick", action="store_true", help="small shapes, to try it")
    words.add_argument("--out", type=Path, default=Path("benchmarks-out"))
    words.add_argument(
        "--add", action="store_true", help="keep the other results that --out has"
    )
    words.add_argument("--list", action="store_true", help="say what there is, and end")
    words.add_argument(
        "--threads", type=int, nargs="+", help="1 and all by default, 1 in quick runs"
    )
    words.add_argument("--rounds", type=int)
    words.add_argument("--comfyui", nargs="+", metavar="FOLDER", help="not those found")
    words.add_argument("--folder", help="for large files; the system's by default")
    words.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    return words


def setting_of(args: argparse.Namespace) -> Setting:
    """What the arguments ask of every benchmark."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None
    most = 1 if args.quick else cores or os.cpu_count() or 1
    threads = args.threads or sorted({1, most})
    comfyui = tuple(args.comfyui) if args.comfyui else find_comfyui()
    return Setting(args.quick, tuple(threads), args.rounds, comfyui, args.folder)


def child(name: str, path: str, setting: Setting) -> None:
    """Run one benchmark and write its result, and before that each row as it comes."""
    with Path(path).open("w", encoding="utf-8") as file:

        def tell(found: Row | Missing) -> None:
            print(report.line(name, found), flush=True)
            file.write(json.dumps(entry(found)) + "\n")
            file.flush()

        result = run(find(name), setting, tell)
        file.write(json.dumps({"result": result_to_json(result)}) + "\n")


def in_a_process(name: str, words: Sequence[str]) -> Result:
    """Run a benchmark in a process of its own; if that dies, what it had measured."""
    benchmark = find(name)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "result"
        command = [sys.executable, "-m", "benchmarks", *words]
        start = time.perf_counter()
        done = subprocess.run([*command, "--child", name, path])
        lines = path.read_text("utf-8").splitlines() if path.exists() else []
    found = [json.loads(line) for line in lines]
    if found and "result" in found[-1]:
        return result_from_json(found[-1]["result"])
    result = unfinished(benchmark, found, f"its process ended with {done.returncode}")
    result.seconds = time.perf_counter() - start
    return result


def earlier(folder: Path, now: Run, names: Collection[str]) -> list[Result]:
    """The results in a folder of other benchmarks than those named.

    Raises:
        SystemExit: if they are of another machine, other versions, or quick where these
            are not.
    """
    path = folder / f"{report.NAME}.json"
    if not path.exists():
        return []
    before = from_json(json.loads(path.read_text("utf-8")))
    for what in ("machine", "versions", "quick"):
        was, is_now = getattr(before, what), getattr(now, what)
        if was != is_now:
            raise SystemExit(f"--add: {path}: {what} was {was}, is {is_now} now")
    others = set(NAMES) - set(names)
    return [result for result in before.results if result.name in others]


def main(words: Sequence[str] | None = None) -> int:
    """Run what the arguments name.

    Returns:
        0, also where something could not be measured.
    """
    words = list(sys.argv[1:] if words is None else words)
    args = parser().parse_args(words)
    setting = setting_of(args)
    if args.child:
        child(*args.child, setting)
        return 0
    unknown = [name for name in args.names if name not in NAMES]
    if unknown:
        parser().error(f"unknown: {', '.join(unknown)}; known: {', '.join(NAMES)}")
    names = args.names or list(NAMES)
    if args.list:
        for name in names:
            benchmark = find(name)
            print(f"{name}: {benchmark.about} Needs {benchmark.needs}.")
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    everything = new_run(setting.quick)
    if args.add:
        everything.results = earlier(args.out, everything, names)
    for name in names:
        everything.results.append(in_a_process(name, words))
        everything.results.sort(key=lambda result: NAMES.index(result.name))
        report.write(everything, args.out)
    why = report.draw(everything, args.out)
    if why:
        print(f"no charts: {why}")
    report.write(everything, args.out)  # with links to the charts
    print(f"written: {args.out / report.NAME}.md and .json")
    return 0


if __name__ == "__main__":
    sys.exit(main())
