"""A picture of a comparison; it needs matplotlib, of the extra ``cli``."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import matplotlib
from matplotlib import font_manager
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from hijack.checkpoint.compare import Comparison

#: Weights that are labelled in the plot.
LABELLED = 5
#: Fonts with letters that matplotlib's own lacks, one or the other on every system.
FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "Source Han Sans SC",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Droid Sans Fallback",
    "Microsoft YaHei",
    "SimHei",
    "Yu Gothic",
    "Malgun Gothic",
    "PingFang SC",
    "Hiragino Sans",
    "Arial Unicode MS",
    "Segoe UI",
)


@contextlib.contextmanager
def plain_text() -> Iterator[None]:
    """Draw names as they are: ``$`` is a letter, and fonts are those that have it."""
    with matplotlib.rc_context({"text.parse_math": False, "font.family": _families()}):
        yield


def drawable(text: str) -> str:
    """Text with escapes for letters that no font here has."""
    return "".join(
        c if c.isprintable() and ord(c) in _letters() else ascii(c)[1:-1] for c in text
    )


@functools.cache
def _families() -> list[str]:
    installed = set(font_manager.fontManager.get_font_names())
    return ["DejaVu Sans", *(name for name in FONTS if name in installed)]


@functools.cache
def _letters() -> frozenset[int]:
    """Every letter that one of the fonts has."""
    fonts = map(font_manager.findfont, _families())
    return frozenset(
        letter for path in fonts for letter in font_manager.get_font(path).get_charmap()
    )


def draw_comparison(comparison: Comparison, path: Path | BinaryIO) -> None:
    """Plot the signal-to-noise ratio of every weight, and label the worst.

    Args:
        comparison: what to draw; equal weights are left out, those with NaN or inf are
            only in the legend.
        path: the PNG to write, or a file that is open for it.
    """
    with plain_text():
        _draw(comparison, path)


def _draw(comparison: Comparison, path: Path | BinaryIO) -> None:
    figure = Figure(figsize=(10, 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    points = [
        (number, key, error)
        for number, (key, error) in enumerate(comparison.layers.items())
        if math.isfinite(error.sqnr)
    ]
    worst = sorted(points, key=lambda point: point[2].sqnr)[:LABELLED]
    axes.scatter([p[0] for p in points], [p[2].sqnr for p in points], s=10)
    for rank, (number, key, error) in enumerate(worst, 1):
        label = f"{rank}  {drawable(key)}  {error.sqnr:.1f} dB"
        axes.scatter([number], [error.sqnr], s=18, color="tab:red", label=label)
        axes.annotate(
            str(rank), (number, error.sqnr), xytext=(5, 4), textcoords="offset points"
        )
    for key in comparison.broken[:LABELLED]:
        label = f"{drawable(key)}  NaN or inf"
        axes.scatter([], [], marker="x", color="black", label=label)
    if worst or comparison.broken:
        axes.legend(title="worst", fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    equal = sum(error.max_abs_error == 0 for error in comparison.layers.values())
    axes.set_xlabel(
        f"weight, in file order ({equal} of {len(comparison.layers)} are equal)"
    )
    axes.set_ylabel("SQNR, dB (higher is better)")
    names = (Path(comparison.other).name, Path(comparison.reference).name)
    axes.set_title(" against ".join(map(drawable, names)))
    axes.grid(alpha=0.3)
    figure.savefig(path, format="png", dpi=120)
